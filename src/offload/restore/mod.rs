// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Hands a stored VM to a VMM that waits on this host: its memory in memfds, each as a descriptor.

mod error;
mod exchange;
mod fill;
mod handle;
mod memory;

use std::fmt;
use std::time::{Duration, Instant};

use self::exchange::Exchange;
use self::memory::VmMemory;
use crate::range::{GpaRange, first_outside};
use crate::snapshot::{
    ChainBlocks, ConfigMessage, RamSlot, SnapshotChain, SnapshotLimits, VmConfig, VmState,
};
use crate::transfer::connection::Connection;
use crate::transfer::frame::Command;
use crate::transfer::limits::PeerLimits;
use crate::transfer::url::Url;

pub use self::error::LocalSendError;
pub use self::handle::{LocalSendProgress, LocalSenderHandle};

/// How a stored VM is sent to a receiver on this host.
#[derive(Debug, Clone, Default)]
pub struct LocalSendOptions {
    /// Sent in place of the snapshot's own configuration: for a host where disks, taps and files have other names.
    pub config: Option<VmConfig>,
    /// Leave the VM paused at the receiver.
    pub paused: bool,
    /// What the receiver may ask of this process.
    pub limits: PeerLimits,
    /// What the snapshot may ask of this process.
    pub snapshot_limits: SnapshotLimits,
}

/// A VM that was handed over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct LocalSent {
    /// Bytes of RAM.
    pub ram_bytes: u64,
    /// Bytes of it that are not zero, and so were read and written.
    pub filled_bytes: u64,
    /// From the first connection to the last answer.
    pub took: Duration,
}

/// Sends a stored VM to a Cloud Hypervisor that waits in `receive-migration` on this host, its memory as descriptors.
///
/// The snapshot may be a full one with differentials on top: they are applied as they are read, and nothing is written to disk. Every
/// block that is read is checked against the manifests before the receiver hears of the VM. What is zero stays a hole.
pub struct LocalSender {
    chain: SnapshotChain,
    message: Vec<u8>,
    slots: Vec<RamSlot>,
    options: LocalSendOptions,
    handle: LocalSenderHandle,
}

impl fmt::Debug for LocalSender {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LocalSender")
            .field("chain", &self.chain)
            .field("slots", &self.slots)
            .field("handle", &self.handle)
            .finish_non_exhaustive()
    }
}

impl LocalSender {
    /// Makes a VM of `chain`.
    ///
    /// # Errors
    /// The snapshot is not all of a VM.
    pub fn new(chain: SnapshotChain, options: LocalSendOptions) -> Result<Self, LocalSendError> {
        let elsewhere = chain.elsewhere();
        if !elsewhere.is_empty() {
            return Err(LocalSendError::Elsewhere { elsewhere });
        }
        let config = options.config.as_ref().unwrap_or(chain.config());
        let message = chain.state().config_message(config)?;
        let slots = ConfigMessage::parse(&message, &options.snapshot_limits)?.slots().to_vec();
        check_slots(chain.state(), &slots)?;
        Ok(Self { chain, message, slots, options, handle: LocalSenderHandle::default() })
    }

    /// Returns what stops and measures it from any thread.
    pub fn handle(&self) -> LocalSenderHandle {
        self.handle.clone()
    }

    /// Sends the VM to the receiver at `url`, over a UNIX socket.
    ///
    /// # Errors
    /// The receiver has no VM, unless [`LocalSendError::is_outcome_unknown`].
    pub fn send(&self, url: &Url) -> Result<LocalSent, LocalSendError> {
        let began = Instant::now();
        let limits = &self.options.limits;
        let connection = Connection::connect(url, None, limits)?;
        let mut exchange = Exchange { connection, limits, handle: &self.handle };
        let sent = self.fill_and_hand_over(&mut exchange);
        exchange.connection.close(limits.linger);
        sent?;
        let progress = self.handle.progress();
        let (ram_bytes, filled_bytes) = (progress.ram_bytes, progress.filled_bytes);
        Ok(LocalSent { ram_bytes, filled_bytes, took: began.elapsed() })
    }

    fn fill_and_hand_over(&self, exchange: &mut Exchange<'_>) -> Result<(), LocalSendError> {
        let memory = VmMemory::make(&self.slots)?;
        let ram = self.slots.iter().map(|slot| slot.range);
        self.handle.begin(ram.clone().map(GpaRange::len).sum());
        let blocks = ChainBlocks::of(&self.chain, ram).map_err(LocalSendError::Fill)?;
        fill::all(&blocks, &memory, &self.handle, self.options.snapshot_limits.thread_start)?;
        exchange.start()?;
        for (slot, file) in memory.descriptors() {
            exchange.memory(slot, file)?;
        }
        exchange.ask(Command::Config, &self.message)?;
        exchange.ask(Command::State, self.chain.state().text())?;
        self.handle.pass_the_point_of_no_return()?;
        let complete = if self.options.paused { Command::CompletePaused } else { Command::Complete };
        exchange.ask(complete, &[])
    }
}

/// Checks that all memory of the state is in a slot.
fn check_slots(state: &VmState, slots: &[RamSlot]) -> Result<(), LocalSendError> {
    let wanted: Vec<_> = state.memory().ranges().collect();
    let outside = first_outside(&wanted, slots.iter().map(|slot| slot.range));
    outside.map_or(Ok(()), |range| Err(LocalSendError::NoSlot { range }))
}
