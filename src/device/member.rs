// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! One device of a set: its moves, one at a time, and what it read of its state.

mod estimating;
mod streaming;

use std::fmt;
use std::sync::Arc;

use log::{error, warn};

use super::failure::DeviceFailure;
use super::incoming::Incoming;
use super::outgoing::Outgoing;
use super::saved::{Identity, SavedText, SavedVersion, blob_to_snapshot};
use super::shared::SharedIo;
use super::size::StateSize;
use super::state::{Recovery, quiescent_state, recovery};
use super::stream::{PrecopyRead, StateStream, StateWrite};
use super::{ArcError, Basis, Capabilities, DeviceIo, DeviceState, STATE_LIMIT_BYTES, next_state};
use crate::error::Chain;

/// State size assumed for a device that fails to report it: so large that no downtime limit is met by mistake.
pub const UNKNOWN_STATE_BYTES: u64 = 100 << 30;

/// State size assumed for a device whose interface cannot report it, until some of its state was read.
pub const UNASKABLE_STATE_BYTES: u64 = 16 << 20;

/// When to ask a device in PRE_COPY how much is left. Some devices start another piece of their state whenever they
/// are asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Asking {
    /// As long as its last answer had initial bytes left.
    WhileInitial,
    /// Now.
    Anew,
}

/// A pass-through device: who it is, and its migration interface.
pub struct Device {
    identity: Identity,
    firmware: String,
    stream_version: u32,
    maps_only_ram: bool,
    io: SharedIo,
    capabilities: Capabilities,
    stream: StateStream,
    size: StateSize,
    /// Whether the device's saving session is the one that `stream` was read from.
    in_session: bool,
    /// Whether the device holds a loaded state that has not run yet.
    holds_loaded: bool,
    last_state_bytes: Option<u64>,
    /// How well it was known, and how much, when it was last asked what is left for the downtime.
    last_left: (Basis, u64),
    /// Bytes that its state had at least when it was last asked.
    known_bytes: u64,
    was_reset: bool,
    /// Where the state goes away as a stream.
    outgoing: Option<Outgoing>,
    /// Where a state comes in as a stream.
    incoming: Option<Arc<Incoming>>,
}

impl fmt::Debug for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Device")
            .field("identity", &self.identity)
            .field("maps_only_ram", &self.maps_only_ram)
            .field("capabilities", &self.capabilities)
            .finish_non_exhaustive()
    }
}

impl Device {
    /// Makes a device with a name that is unique in the VM.
    pub fn new(name: impl Into<String>, io: Box<dyn DeviceIo>) -> Self {
        Self {
            identity: Identity { name: name.into(), kind: String::new() },
            firmware: String::new(),
            stream_version: 0,
            maps_only_ram: false,
            capabilities: io.capabilities(),
            io: SharedIo::new(io),
            stream: StateStream::new(STATE_LIMIT_BYTES),
            size: StateSize::default(),
            in_session: false,
            holds_loaded: false,
            last_state_bytes: None,
            last_left: (Basis::Told, 0),
            known_bytes: 0,
            was_reset: false,
            outgoing: None,
            incoming: None,
        }
    }

    /// Declares what the device is, as `15b3:101e mlx5`: its state goes only into a device of the same kind.
    #[must_use]
    pub fn kind(mut self, kind: impl Into<String>) -> Self {
        self.identity.kind = kind.into();
        self
    }

    /// Declares that the device can reach RAM only, no other device's registers, so that it needs no P2P-quiescent state.
    #[must_use]
    pub fn maps_only_ram(self) -> Self {
        Self { maps_only_ram: true, ..self }
    }

    /// Sets the most bytes that the device's state may have, saved or loaded; [`STATE_LIMIT_BYTES`] unless set.
    ///
    /// A device that reports more is refused while it still runs. State carries it in base64, four bytes for three,
    /// so the receiver's limit on State may have to grow too.
    #[must_use]
    pub fn state_limit(mut self, bytes: usize) -> Self {
        self.stream.set_limit(bytes);
        self
    }

    /// Who the device is.
    pub fn identity(&self) -> &Identity {
        &self.identity
    }

    /// What the device offers.
    pub fn capabilities(&self) -> Capabilities {
        self.capabilities
    }

    /// Whether the device can be at rest while others still run.
    pub(super) fn is_quiescible(&self) -> bool {
        self.capabilities.p2p || self.maps_only_ram
    }

    pub(super) fn in_session(&self) -> bool {
        self.in_session
    }

    /// Most bytes that the device's state may have.
    pub(super) fn limit_bytes(&self) -> usize {
        self.stream.limit()
    }

    pub(super) fn precopy_bytes(&self) -> u64 {
        self.stream.precopy_bytes() as u64
    }

    pub(super) fn state_bytes(&self) -> u64 {
        self.stream.state_bytes() as u64
    }

    /// Tells whether the device was reset since this was last asked.
    pub(super) fn take_was_reset(&mut self) -> bool {
        std::mem::take(&mut self.was_reset)
    }

    /// Asks where the device is.
    ///
    /// If something else moved it and its session is over, drops what was read in that session.
    ///
    /// # Errors
    /// The device does not answer, or lost a loaded state.
    pub(super) fn state(&mut self) -> Result<DeviceState, DeviceFailure> {
        let state = self.io.lock().state()?;
        if self.in_session && !state.is_saving() {
            warn!("Device {:?} left its saving session for {state} unasked", self.identity.name);
            self.end_session();
            self.outgoing.iter_mut().for_each(|outgoing| outgoing.was_reset = state != DeviceState::Error);
        }
        if self.holds_loaded && state.is_running() {
            return Err(DeviceFailure::SessionLost { state });
        }
        Ok(state)
    }

    /// Moves the device to `target`, unless it is there. Leaving the saving group drops what was read.
    ///
    /// # Errors
    /// The device is somewhere on the way, or in ERROR.
    pub(super) fn go(&mut self, target: DeviceState) -> Result<(), DeviceFailure> {
        let now = self.state()?;
        if now == target {
            return Ok(());
        }
        next_state(now, target, self.capabilities)?;
        if !(now.is_saving() && target.is_saving()) {
            self.end_session();
        }
        self.io.lock().set_state(target)?;
        if target.is_saving() && !now.is_saving() {
            self.stream.restart();
            self.in_session = true;
            self.outgoing.iter_mut().for_each(Outgoing::restart);
        }
        self.holds_loaded = target == DeviceState::Resuming || (self.holds_loaded && !target.is_running());
        Ok(())
    }

    fn end_session(&mut self) {
        self.in_session = false;
        self.size = StateSize::default();
        self.stream.release();
    }

    /// Enters PRE_COPY if the device offers it and runs; otherwise does nothing.
    pub(super) fn start_precopy(&mut self) -> Result<(), DeviceFailure> {
        if !self.capabilities.pre_copy {
            return Ok(());
        }
        match self.state()? {
            DeviceState::Running => self.go(DeviceState::PreCopy),
            DeviceState::PreCopy if !self.in_session => {
                self.go(DeviceState::Running)?;
                self.go(DeviceState::PreCopy)
            }
            DeviceState::Error => Err(ArcError::NeedsReset { to: DeviceState::PreCopy }.into()),
            _ => Ok(()),
        }
    }

    /// Reads what of the device's state is worth reading in PRE_COPY, at most `budget` bytes.
    ///
    /// # Errors
    /// The session is over and what was read is dropped; the device is out of PRE_COPY, or recovered as far as it can be.
    pub(super) fn read_precopy(&mut self, budget: u64) -> Result<PrecopyRead, DeviceFailure> {
        self.try_read_precopy(budget).map_err(|failure| {
            let failure = self.explain(failure);
            self.end_session();
            if let Err(second) = self.recover() {
                error!("Device {:?} is not as it was: {}", self.identity.name, Chain(&second));
            }
            failure
        })
    }

    fn try_read_precopy(&mut self, budget: u64) -> Result<PrecopyRead, DeviceFailure> {
        let state = self.state()?;
        if !self.in_session {
            return Err(DeviceFailure::SessionLost { state });
        }
        let budget = budget.min(self.worth_reading()?);
        let read = self.stream.read_precopy(self.io.lock().as_mut(), budget)?;
        self.size.precopy_read(read.bytes);
        Ok(PrecopyRead { drained: read.drained || self.worth_reading()? == 0, ..read })
    }

    /// Bytes worth reading while the device runs, given that all of its state is sent in the downtime.
    ///
    /// These are the initial bytes. The rest may change again and would be read twice.
    fn worth_reading(&mut self) -> Result<u64, DeviceFailure> {
        let told = match self.size.precopy() {
            Some(info) => Some(info),
            None => self.ask_precopy()?,
        };
        Ok(told.map_or_else(|| self.stream.worth_reading_untold(), |info| info.initial_bytes))
    }

    /// Makes a running device P2P-quiescent on the way to `goal`, if it has such a state, before any device is
    /// stopped.
    pub(super) fn quiesce(&mut self, goal: DeviceState) -> Result<(), DeviceFailure> {
        let now = self.state()?;
        match quiescent_state(now, goal, self.capabilities) {
            Some(quiescent) => self.go(quiescent),
            None => Ok(()),
        }
    }

    /// Brings a stopped device to the P2P-quiescent state in which it waits for the others, if it has one.
    pub(super) fn wake(&mut self) -> Result<(), DeviceFailure> {
        match self.state()? {
            DeviceState::Resuming => Err(DeviceFailure::Unfinished),
            now if now.is_stopped() && self.capabilities.p2p => self.go(DeviceState::RunningP2p),
            _ => Ok(()),
        }
    }

    /// Forgets that the device holds a loaded state, so that its loss is no error.
    pub(super) fn give_up_loaded(&mut self) {
        self.holds_loaded = false;
    }

    /// Makes the device run: retries, then goes through intermediate states, and resets it as a last resort.
    ///
    /// # Errors
    /// The device was reset, or is lost.
    pub(super) fn recover(&mut self) -> Result<(), DeviceFailure> {
        for attempts in 0.. {
            let state = self.state();
            let attempt = match recovery(state.as_ref().ok().copied(), attempts) {
                Recovery::Settled => return Ok(()),
                Recovery::Reset => break,
                Recovery::Move(target) => state.and_then(|_| self.go(target)).map(|()| target),
            };
            match attempt {
                Ok(DeviceState::Running) => return Ok(()),
                Ok(_) => {}
                Err(failure) => {
                    warn!("Device {:?} does not run on yet: {}", self.identity.name, Chain(&failure));
                }
            }
        }
        self.reset()?;
        Err(DeviceFailure::Reset)
    }

    /// Resets the device and checks that it is RUNNING; its state is lost.
    fn reset(&mut self) -> Result<(), DeviceFailure> {
        error!("Resetting device {:?}: its state is lost", self.identity.name);
        self.end_session();
        self.holds_loaded = false;
        // Even a reset that fails may have wiped the device.
        self.was_reset = true;
        self.io.lock().reset()?;
        let state = self.io.lock().state()?;
        match state {
            DeviceState::Running => Ok(()),
            state => Err(DeviceFailure::NotReset { state }),
        }
    }

    /// Reads the stopped device's state to its end, in STOP_COPY; what PRE_COPY brought stays in front.
    ///
    /// # Errors
    /// The state is not complete; the device stays stopped, and the next call begins anew.
    pub(super) fn read_state(&mut self) -> Result<(), DeviceFailure> {
        let state = self.state()?;
        match state {
            DeviceState::StopCopy if self.in_session && !self.stream.is_taken() => {}
            DeviceState::StopCopy => {
                self.go(DeviceState::Stop)?;
                self.go(DeviceState::StopCopy)?;
            }
            DeviceState::Stop => self.go(DeviceState::StopCopy)?,
            _ => return Err(DeviceFailure::NotStopped { state }),
        }
        if !self.stream.is_complete() && self.is_streaming() {
            return Err(DeviceFailure::SessionLost { state });
        }
        if !self.stream.is_complete() {
            let read = self.stream.read_to_end(self.io.lock().as_mut());
            read.inspect_err(|_| self.end_session())?;
            self.last_state_bytes = Some(self.state_bytes());
        }
        Ok(())
    }

    /// Moves the state read into the device's node of the Snapshot tree. To make another node, read the state again.
    pub(super) fn take_snapshot(
        &mut self,
        version: SavedVersion,
    ) -> Result<vm_migration::Snapshot, DeviceFailure> {
        if let Some(node) = self.streamed_snapshot()? {
            return Ok(node);
        }
        let precopy_bytes = self.precopy_bytes();
        Ok(blob_to_snapshot(&self.identity, self.stream.take(), precopy_bytes, version)?)
    }

    /// Prepares a device for [`Device::write_state`], whatever state earlier attempts left it in.
    pub(super) fn prepare_to_load(&mut self) -> Result<(), DeviceFailure> {
        self.give_up_loaded();
        match self.state()? {
            DeviceState::Error | DeviceState::Resuming => self.reset(),
            _ => Ok(()),
        }
    }

    /// Writes a saved state into the stopped device, which checks it and is in STOP afterwards.
    ///
    /// # Errors
    /// The device refused the state and holds a part of it: it has to be reset.
    pub(super) fn write_state(&mut self, state: &SavedText<'_>) -> Result<(), DeviceFailure> {
        self.go(DeviceState::Resuming)?;
        let mut io = self.io.lock();
        let mut writing = StateWrite::new(io.as_mut());
        state.each_piece(|piece| writing.write(piece).map_err(DeviceFailure::from))?;
        drop(io);
        self.go(DeviceState::Stop)?;
        self.last_state_bytes = Some(state.bytes() as u64);
        Ok(())
    }

    /// Drops a state loaded, whole or in part. A reset that fails is tried once more: nobody else would drop it.
    pub(super) fn discard_loaded(&mut self) {
        let reset = self.reset().or_else(|failure| {
            warn!("Device {:?} is not reset yet: {}", self.identity.name, Chain(&failure));
            self.reset()
        });
        if let Err(failure) = reset {
            error!("Device {:?} keeps a state it was to drop: {}", self.identity.name, Chain(&failure));
        }
    }

    /// Ends the saving session of a stopped device whose VM has moved.
    pub(super) fn retire(&mut self) -> Result<(), DeviceFailure> {
        match self.state()? {
            DeviceState::StopCopy => self.go(DeviceState::Stop),
            _ => Ok(()),
        }
    }
}
