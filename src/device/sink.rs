// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Writes one device's state piece by piece as it arrives, on whatever thread brings it.

use std::sync::Arc;
use std::time::Instant;

use super::failure::DeviceFailure;
use super::incoming::Incoming;
use super::pace::{PATIENCE, Pace};
use super::shared::SharedIo;
use super::state::path;
use super::{Capabilities, DeviceState, StreamError};

/// Takes one device's state in, in order. The device is in RESUMING.
pub(crate) struct StateSink {
    name: String,
    version: u32,
    io: SharedIo,
    capabilities: Capabilities,
    incoming: Arc<Incoming>,
    pace: Pace,
}

impl StateSink {
    pub(super) fn new(
        (name, version): (String, u32),
        io: SharedIo,
        capabilities: Capabilities,
        incoming: Arc<Incoming>,
    ) -> Self {
        Self { name, version, io, capabilities, incoming, pace: Pace::new(PATIENCE, Instant::now()) }
    }

    /// The device's name.
    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    /// The version of the device's stream.
    pub(crate) fn version(&self) -> u32 {
        self.version
    }

    /// Bytes written.
    pub(crate) fn bytes(&self) -> u64 {
        self.incoming.bytes()
    }

    /// Writes the next bytes.
    ///
    /// # Errors
    /// The device refused them, or takes them too slowly.
    pub(crate) fn write(&mut self, data: &[u8]) -> Result<(), StreamError> {
        let written_bytes = usize::try_from(self.bytes()).unwrap_or(usize::MAX);
        // The time until they came is the source's.
        self.pace.go_on(Instant::now());
        if !data.is_empty() {
            let written = self.io.lock().write_data(data);
            written.map_err(|source| StreamError::Write { written_bytes, source })?;
        }
        self.incoming.add(data.len() as u64);
        match self.pace.keeps_up(data.len(), Instant::now()) {
            true => Ok(()),
            false => Err(StreamError::Slow { moved_bytes: written_bytes, patience: PATIENCE }),
        }
    }

    /// Takes in that the last byte was written.
    pub(crate) fn complete(&mut self) {
        self.incoming.end();
    }

    /// Drops what was written, and begins anew: only a reset leads out of RESUMING without a whole state.
    ///
    /// # Errors
    /// The device cannot be reset, or does not go to RESUMING again.
    pub(crate) fn begin_anew(&mut self) -> Result<(), DeviceFailure> {
        let mut io = self.io.lock();
        self.incoming.begin_anew();
        io.reset()?;
        let state = io.state()?;
        for next in path(state, DeviceState::Resuming, self.capabilities)? {
            io.set_state(next)?;
        }
        self.pace = Pace::new(PATIENCE, Instant::now());
        Ok(())
    }
}
