// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! One device whose state goes away, or comes in, as a stream of its own.

use std::sync::Arc;
use std::time::Instant;

use log::error;

use super::Device;
use crate::device::DeviceFailure;
use crate::device::changes::Turn;
use crate::device::identity::StreamIdentity;
use crate::device::incoming::Incoming;
use crate::device::outgoing::{Outgoing, StreamLeft};
use crate::device::reader::{Piece, StateRead, StateReader, Until};
use crate::device::saved::streamed_to_snapshot;
use crate::device::sink::StateSink;
use crate::device::{DeviceState, SavedStateError};
use crate::error::Chain;

impl Device {
    /// Declares the device's firmware: a state streams only into a device with the same.
    #[must_use]
    pub fn firmware(mut self, firmware: impl Into<String>) -> Self {
        self.firmware = firmware.into();
        self
    }

    /// Declares the version of the stream that the device's driver writes and reads; 0 unless declared. A state streams only into a device
    /// with the same.
    #[must_use]
    pub fn stream_version(self, stream_version: u32) -> Self {
        Self { stream_version, ..self }
    }

    /// Who the device is to the other end of a stream.
    pub fn stream_identity(&self) -> StreamIdentity {
        StreamIdentity {
            name: self.identity.name.clone(),
            model: self.identity.kind.clone(),
            firmware: self.firmware.clone(),
            stream_version: self.stream_version,
        }
    }

    /// Whether the device's state goes away as a stream.
    pub(in crate::device) fn is_streaming(&self) -> bool {
        self.outgoing.is_some()
    }

    /// Whether PRE_COPY brings more than it saves.
    pub(super) fn is_futile(&self) -> bool {
        self.outgoing.is_some_and(|outgoing| outgoing.is_futile)
    }

    /// The number of the stream in which the device's state goes away.
    pub(in crate::device) fn stream_number(&self) -> Option<u16> {
        self.outgoing.map(|outgoing| outgoing.number)
    }

    /// What the device had left for the downtime when it was last asked, if its state goes away as a stream.
    pub(in crate::device) fn stream_left(&self) -> Option<StreamLeft> {
        let (_, bytes) = self.last_left();
        Some(StreamLeft { number: self.stream_number()?, bytes, early_bytes: self.early_bytes() })
    }

    /// Has the state go away as a stream from the next session on. A session from which something was read already is over: a stream
    /// has all of a session.
    pub(in crate::device) fn begin_streaming(&mut self, number: u16) {
        if self.stream.has_begun() {
            self.end_session();
        }
        self.outgoing = Some(Outgoing::new(number, self.in_session.into()));
    }

    /// Has the state go into the Snapshot tree again, read anew where some of it has gone away.
    pub(in crate::device) fn end_streaming(&mut self) {
        self.outgoing = None;
        self.stream.keep_whole();
    }

    /// Returns what reads the state on while the device runs; `None` where nothing of it is worth reading now.
    ///
    /// What is read goes away while the device runs, so all of it is: read as long as the device changes it slower than it is read.
    pub(in crate::device) fn precopy_reader(&mut self) -> Result<Option<StateReader>, DeviceFailure> {
        if !self.is_streaming() {
            return Ok(None);
        }
        let state = self.state()?;
        let Some(outgoing) = self.outgoing else { return Ok(None) };
        if !self.in_session || state != DeviceState::PreCopy {
            return Ok(None);
        }
        let budget = match self.unread_in_precopy().map_err(|failure| self.fail_reading(failure))? {
            _ if outgoing.is_futile => self.initial_bytes(),
            Some(bytes) => bytes,
            None => u64::MAX,
        };
        if budget == 0 {
            return Ok(None);
        }
        Ok(Some(self.reader(outgoing, Until::Pause { budget })))
    }

    /// Bytes that PRE_COPY has to bring. A device that has none left is asked anew.
    fn unread_in_precopy(&mut self) -> Result<Option<u64>, DeviceFailure> {
        let sum = |info: crate::device::PrecopyInfo| info.initial_bytes.saturating_add(info.dirty_bytes);
        match self.size.precopy().map(sum) {
            Some(0) | None => Ok(self.ask_precopy()?.map(sum)),
            told => Ok(told),
        }
    }

    /// Returns what reads the stopped device's state to its end; `None` where the state is no stream.
    pub(in crate::device) fn final_reader(&mut self) -> Result<Option<StateReader>, DeviceFailure> {
        if !self.is_streaming() {
            return Ok(None);
        }
        match self.state()? {
            DeviceState::StopCopy if self.in_session => {}
            DeviceState::StopCopy => {
                self.go(DeviceState::Stop)?;
                self.go(DeviceState::StopCopy)?;
            }
            state => return Err(DeviceFailure::NotStopped { state }),
        }
        Ok(self.outgoing.map(|outgoing| self.reader(outgoing, Until::End)))
    }

    fn reader(&self, outgoing: Outgoing, until: Until) -> StateReader {
        let next = Piece {
            device: outgoing.number,
            version: self.stream_version,
            session: outgoing.session,
            index: outgoing.next_index,
            position: self.stream.streamed() as u64,
            last: false,
        };
        StateReader::new(self.io.clone(), until, next, outgoing.largest_read)
    }

    /// Takes in what a reader brought, all of which has arrived.
    ///
    /// # Errors
    /// The device failed, and so what it handed over is worth nothing. In PRE_COPY it was made to run again.
    pub(in crate::device) fn finish_read(&mut self, read: StateRead) -> Result<(), DeviceFailure> {
        let Some(outgoing) = self.outgoing.as_mut().filter(|outgoing| outgoing.session == read.session)
        else {
            return Ok(());
        };
        outgoing.next_index += read.pieces;
        outgoing.largest_read = read.largest;
        if let Some(failure) = read.failure {
            return Err(self.fail_reading(failure.into()));
        }
        if read.complete {
            self.stream.streamed_to_end(read.bytes);
            self.last_state_bytes = Some(self.state_bytes());
            return Ok(());
        }
        self.size.precopy_read(read.bytes);
        let has_nothing_told = self.size.precopy().is_some_and(|_| self.size.unread() == 0);
        self.stream.streamed_in_precopy(Turn {
            bytes: read.bytes,
            drained: read.drained || has_nothing_told,
            took: read.took,
            ended: read.ended,
        });
        let most = self.most_bytes().unwrap_or(self.limit_bytes() as u64);
        let is_futile = self.stream.changes().are_as_fast_as_reading(most);
        self.outgoing.iter_mut().for_each(|outgoing| outgoing.is_futile = is_futile);
        Ok(())
    }

    /// Bytes that the whole state has at most, as far as it was told or read.
    fn most_bytes(&self) -> Option<u64> {
        let told = self.outgoing.and_then(|outgoing| outgoing.told_bytes);
        [self.last_state_bytes, told, self.stream.changes().most()].into_iter().flatten().max()
    }

    /// Whether a device that tells no sizes has to be read further, for nothing can be said of what it has left: it has paused less than
    /// twice, or has more.
    pub(super) fn is_unsettled(&self) -> bool {
        !self.is_futile() && self.stream.changes().left(Instant::now()).is_none()
    }

    /// Bytes that a device that tells no sizes has left to hand out, `None` where nobody can tell: what it has changed since it last paused,
    /// or else as much as it ever had.
    pub(super) fn untold_left(&self) -> Option<u64> {
        let left = self.stream.changes().left(Instant::now()).filter(|_| !self.is_futile());
        left.or_else(|| self.most_bytes()).or_else(|| self.is_futile().then_some(self.limit_bytes() as u64))
    }

    /// Bytes that a streaming device still hands out in PRE_COPY, where it is worth reading them: they are no part of the downtime.
    pub(super) fn early_bytes(&self) -> u64 {
        if self.is_streaming() && !self.is_futile() { self.size.unread() } else { 0 }
    }

    /// Has a device that something reset while it streamed enter PRE_COPY again: its state begins anew, in a session of its own.
    ///
    /// # Errors
    /// It was reset, or does not answer.
    pub(in crate::device) fn restart_after_reset(&mut self) -> Result<(), DeviceFailure> {
        if !self.is_streaming() {
            return Ok(());
        }
        let state = self.state()?;
        let was_reset =
            self.outgoing.as_mut().is_some_and(|outgoing| std::mem::take(&mut outgoing.was_reset));
        if !was_reset {
            return Ok(());
        }
        self.start_precopy()?;
        Err(DeviceFailure::SessionLost { state })
    }

    /// Tells what a failed call of the saving session means: a device that answers is not gone, and one that left the session was reset.
    /// A reset takes the session's descriptor away, which then fails as that of a lost device does.
    pub(super) fn explain(&mut self, failure: DeviceFailure) -> DeviceFailure {
        let was_in_session = self.in_session;
        match self.state() {
            Ok(state) if was_in_session && !self.in_session && state != DeviceState::Error => {
                DeviceFailure::SessionLost { state }
            }
            Ok(_) => failure.of_present_device(),
            Err(_) => failure,
        }
    }

    fn fail_reading(&mut self, failure: DeviceFailure) -> DeviceFailure {
        let failure = self.explain(failure);
        self.end_session();
        let stopped = self.io.lock().state().is_ok_and(DeviceState::is_stopped);
        if !stopped && let Err(second) = self.recover() {
            error!("Device {:?} is not as it was: {}", self.identity.name, Chain(&second));
        }
        failure
    }

    /// Takes in the size of the whole state as the device told it.
    pub(super) fn note_told_size(&mut self, bytes: u64) {
        if let Some(outgoing) = &mut self.outgoing {
            outgoing.told_bytes.get_or_insert(bytes);
        }
    }

    /// Makes the node that stands for the state that went ahead; `None` where it did not.
    pub(super) fn streamed_snapshot(&self) -> Result<Option<vm_migration::Snapshot>, SavedStateError> {
        let went_ahead = self.is_streaming() && self.stream.is_complete() && !self.stream.is_taken();
        let bytes = self.stream.streamed() as u64;
        went_ahead.then(|| streamed_to_snapshot(bytes)).transpose()
    }

    /// Readies the stopped device to take a state in as it comes.
    pub(in crate::device) fn begin_loading(&mut self) -> Result<StateSink, DeviceFailure> {
        self.go(DeviceState::Resuming)?;
        let incoming = Arc::new(Incoming::default());
        self.incoming = Some(Arc::clone(&incoming));
        let who = (self.identity.name.clone(), self.stream_version);
        Ok(StateSink::new(who, self.io.clone(), self.capabilities, incoming))
    }

    /// Whether the device takes a state in as it comes.
    pub(in crate::device) fn is_loading(&self) -> bool {
        self.incoming.is_some()
    }

    /// Whether the device holds a loaded state that has not run yet.
    pub(in crate::device) fn holds_loaded(&self) -> bool {
        self.holds_loaded
    }

    /// Checks that the state that came is whole, of `bytes` bytes.
    pub(in crate::device) fn check_came(&self, bytes: u64) -> Result<(), DeviceFailure> {
        let came = self.incoming.as_ref().and_then(|incoming| incoming.complete_bytes());
        match came {
            Some(came) if came == bytes => Ok(()),
            _ => {
                let came_bytes = self.incoming.as_ref().map_or(0, |incoming| incoming.bytes());
                Err(DeviceFailure::Incomplete { came_bytes, bytes })
            }
        }
    }

    /// Has the device accept the state that came; it is in STOP afterwards.
    ///
    /// # Errors
    /// The state was refused: the device has to be reset.
    pub(in crate::device) fn accept_came(&mut self) -> Result<(), DeviceFailure> {
        self.go(DeviceState::Stop)?;
        if let Some(incoming) = self.incoming.take() {
            self.was_reset |= incoming.was_reset();
            self.last_state_bytes = Some(incoming.bytes());
        }
        Ok(())
    }

    /// Has a device that took a part of a state in drop it, and stand still again: its whole state comes another way.
    ///
    /// # Errors
    /// It cannot be reset, or does not stop.
    pub(in crate::device) fn drop_part(&mut self) -> Result<(), DeviceFailure> {
        let Some(incoming) = self.incoming.take() else { return Ok(()) };
        self.was_reset |= incoming.was_reset();
        if incoming.bytes() > 0 {
            self.reset()?;
            self.go(DeviceState::Stop)?;
        }
        Ok(())
    }

    /// Ends that the device takes a state in as it comes.
    pub(in crate::device) fn end_loading(&mut self) {
        self.incoming = None;
    }
}
