// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! How much state one device has left, as far as it tells, or as can be guessed.

use log::warn;

use super::{Asking, Device, UNASKABLE_STATE_BYTES, UNKNOWN_STATE_BYTES};
use crate::device::{ArcError, Basis, DeviceFailure, DeviceState, Estimate, PrecopyInfo};
use crate::error::Chain;
use crate::precopy::UNTOLD_BYTES;

impl Device {
    /// Estimates how much state the device has left to hand over once it is stopped. An unknown size gets an estimate
    /// too.
    ///
    /// # Errors
    /// The device is gone for good, or in ERROR, or says that its state is larger than allowed.
    pub(in crate::device) fn estimate(&mut self, asking: Asking) -> Result<Estimate, DeviceFailure> {
        let estimate = self.try_estimate(asking).or_else(|failure| match self.explain(failure) {
            // A device outside a session tells its size, too.
            DeviceFailure::SessionLost { .. } => self.try_estimate(asking),
            failure => Err(failure),
        });
        match estimate {
            Err(failure @ DeviceFailure::Arc(_)) => Err(failure),
            Err(failure) if failure.tells_of_lost_device() => Err(failure),
            Err(failure) => Ok(self.unknown(&failure)),
            Ok(estimate) => self.check_limit(estimate).map(|()| estimate),
        }
    }

    pub(in crate::device) fn note_estimate(&mut self, estimate: Estimate) {
        let basis = if estimate.basis == Basis::Unknown { Basis::Unknown } else { Basis::Told };
        self.last_left = (basis, estimate.stop_copy_bytes);
        self.known_bytes = estimate.known_bytes;
    }

    pub(in crate::device) fn known_bytes(&self) -> u64 {
        self.known_bytes
    }

    pub(in crate::device) fn last_left(&self) -> (Basis, u64) {
        self.last_left
    }

    fn try_estimate(&mut self, asking: Asking) -> Result<Estimate, DeviceFailure> {
        let state = self.state()?;
        if state == DeviceState::Error {
            return Err(ArcError::NeedsReset { to: DeviceState::StopCopy }.into());
        }
        if self.in_session && self.stream.is_complete() {
            let state_bytes = self.state_bytes();
            return Ok(Estimate { state_bytes, known_bytes: state_bytes, ..Estimate::NOTHING });
        }
        let precopying = self.in_session && matches!(state, DeviceState::PreCopy | DeviceState::PreCopyP2p);
        if precopying && (asking == Asking::Anew || !self.size.is_past_initial()) {
            self.ask_precopy()?;
        }
        let read = if self.in_session { self.state_bytes() } else { 0 };
        let answer = self.io.lock().data_size()?;
        let (state_bytes, known_bytes, basis) = match answer {
            Some(answer) => {
                let told = self.size.whole(answer, read);
                self.note_told_size(told);
                (told, told, Basis::Told)
            }
            None => match self.guess(read) {
                Some(guess) => (guess, self.size.least(read), Basis::Guessed),
                None => (UNKNOWN_STATE_BYTES.max(read), self.size.least(read), Basis::Unknown),
            },
        };
        let initial_bytes = if precopying { self.initial_bytes() } else { 0 };
        let early_bytes = if precopying { self.early_bytes() } else { 0 };
        let stop_copy_bytes = state_bytes - read;
        Ok(Estimate { state_bytes, known_bytes, stop_copy_bytes, initial_bytes, early_bytes, basis })
    }

    /// Asks how much PRE_COPY has left; `None` if the interface cannot report it.
    pub(super) fn ask_precopy(&mut self) -> Result<Option<PrecopyInfo>, DeviceFailure> {
        let info = self.io.lock().precopy_info()?;
        if let Some(info) = info {
            self.size.precopy_told(info);
        }
        Ok(info)
    }

    /// Bytes to read before the device is stopped. A device that reports no sizes counts as having some until it has
    /// paused once; where its state streams, until what it has left is known.
    pub(super) fn initial_bytes(&self) -> u64 {
        let untold = || match self.is_streaming() {
            true => self.is_unsettled(),
            false => self.stream.is_short_of_first_pause(),
        };
        let untold_bytes = || if untold() { UNTOLD_BYTES } else { 0 };
        self.size.precopy().map_or_else(untold_bytes, |info| info.initial_bytes)
    }

    fn check_limit(&self, estimate: Estimate) -> Result<(), DeviceFailure> {
        let limit_bytes = self.limit_bytes() as u64;
        let state_bytes = estimate.known_bytes;
        // Of a stream nothing is held.
        match state_bytes > limit_bytes && !self.is_streaming() {
            true => Err(DeviceFailure::StateTooLarge { state_bytes, limit_bytes }),
            false => Ok(()),
        }
    }

    fn unknown(&self, failure: &DeviceFailure) -> Estimate {
        warn!("Device {:?} does not tell the size of its state: {}", self.identity.name, Chain(failure));
        let read = if self.in_session { self.state_bytes() } else { 0 };
        Estimate {
            state_bytes: UNKNOWN_STATE_BYTES,
            known_bytes: self.size.least(read),
            stop_copy_bytes: UNKNOWN_STATE_BYTES,
            initial_bytes: 0,
            early_bytes: 0,
            basis: Basis::Unknown,
        }
    }

    /// Guesses the size of the whole state, of which `read` bytes were read: what changed between the last two pauses is taken
    /// to change again; else the state is taken to be as long as last time. Of a stream, what was read twice counts twice; `None` where
    /// nothing is known of what is left.
    fn guess(&self, read: u64) -> Option<u64> {
        if self.is_streaming() && self.in_session {
            return Some(read.saturating_add(self.untold_left()?));
        }
        let last_batch = self.stream.last_batch().filter(|_| self.in_session);
        let guess = match (last_batch, self.last_state_bytes) {
            (Some(batch), _) => read.saturating_add(batch as u64),
            (None, Some(last)) => last,
            (None, None) => read.saturating_add(UNASKABLE_STATE_BYTES),
        };
        Some(guess.max(self.size.least(read)))
    }
}
