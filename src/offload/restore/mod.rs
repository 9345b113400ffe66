// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Hands a stored VM to a VMM that waits on this host: its memory in memfds, each as a descriptor.
//!
//! - `memory`, `fill`: the memfds, and filling them before the VM is handed over;
//! - `on_demand`: handing it over first (postcopy); `faults` answers the receiver's requests for pages (`asked`, `latency`), `prefetch`
//!   decides which block is read next; `supply` reads, checks and writes each block once, for both;
//! - `exchange`, `handle`, `error`: requests and answers, what other threads see, what can go wrong.

mod asked;
mod error;
mod exchange;
mod faults;
mod fill;
mod handle;
mod latency;
mod memory;
mod on_demand;
mod prefetch;
mod supply;

use std::fmt;
use std::time::Duration;

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
pub use self::handle::{FaultProgress, LocalSendProgress, LocalSenderHandle};

/// How a stored VM is sent to a receiver on this host.
#[derive(Debug, Clone, Default)]
pub struct LocalSendOptions {
    /// Sent in place of the snapshot's own configuration: for a host where disks, taps and files have other names.
    pub config: Option<VmConfig>,
    /// Leave the VM paused at the receiver.
    pub paused: bool,
    /// Hand the VM over before its memory is there: pages come when they are asked for, each checked before it is given, and ahead of that.
    /// The receiver has to ask for them: Cloud Hypervisor does with `memory_mode=postcopy`. Not for VMs whose devices or back ends reach
    /// memory without a vCPU, for these cannot wait for a page.
    pub on_demand: bool,
    /// What the receiver may ask of this process.
    pub limits: PeerLimits,
    /// What the snapshot may ask of this process.
    pub snapshot_limits: SnapshotLimits,
}

/// A VM that was handed over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct LocalSent {
    /// What it came to.
    pub progress: LocalSendProgress,
    /// From the first connection to the end: the last answer, or, with memory on demand, the last page that the receiver asked for.
    pub took: Duration,
}

/// Sends a stored VM to a Cloud Hypervisor that waits in `receive-migration` on this host, its memory as descriptors.
///
/// The snapshot may be a full one with differentials on top: they are applied as they are read, and nothing is written to disk. Every
/// block that is read is checked against the manifests before the receiver hears of the VM. What is zero stays a hole.
///
/// On demand, the receiver has the VM before that, and each block is checked before a page of it is given. The process has to stay until
/// the last page: then [`LocalSender::send`] returns. If a block was altered, or the file cannot be read, the memory is taken away from the
/// receiver before it hears of it, so that its VM ends, and never goes on with other bytes.
pub struct LocalSender {
    chain: SnapshotChain,
    message: Vec<u8>,
    slots: Vec<RamSlot>,
    /// Memory that a receiver does not ask for on demand.
    hotpluggable: Vec<GpaRange>,
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
        let mut config = options.config.as_ref().unwrap_or(chain.config()).clone();
        if options.on_demand {
            check_faults(&config)?;
            if let Some(without) = config.without_prefault()? {
                log::warn!(
                    "Sending the configuration without prefault=on, which a receiver on demand refuses"
                );
                config = without;
            }
        }
        let message = chain.state().config_message(&config)?;
        let parsed = ConfigMessage::parse(&message, &options.snapshot_limits)?;
        let (slots, hotpluggable) = (parsed.slots().to_vec(), parsed.hotpluggable().to_vec());
        check_slots(chain.state(), &slots)?;
        Ok(Self { chain, message, slots, hotpluggable, options, handle: LocalSenderHandle::default() })
    }

    /// Returns what stops and measures it from any thread.
    pub fn handle(&self) -> LocalSenderHandle {
        self.handle.clone()
    }

    /// Sends the VM to the receiver at `url`, over a UNIX socket.
    ///
    /// # Errors
    /// The receiver has no VM, unless [`LocalSendError::is_outcome_unknown`].
    pub fn send(self, url: &Url) -> Result<LocalSent, LocalSendError> {
        let memory = VmMemory::make(&self.slots)?;
        let ram = self.slots.iter().map(|slot| slot.range);
        let blocks = ChainBlocks::of(&self.chain, ram.clone()).map_err(LocalSendError::Fill)?;
        let limits = &self.options.limits;
        self.handle.begin(ram.map(GpaRange::len).sum());
        self.handle.begin_time();
        let connection = Connection::connect(url, None, limits)?;
        let mut exchange = Exchange { connection, limits, handle: &self.handle };
        let sent = if self.options.on_demand {
            self.serve(&mut exchange, url, (&blocks, &memory))
        } else {
            self.fill_and_hand_over(&mut exchange, &blocks, &memory)
        };
        exchange.connection.close(limits.linger);
        sent?;
        Ok(LocalSent { progress: self.handle.progress(), took: self.handle.elapsed() })
    }

    fn fill_and_hand_over(
        &self,
        exchange: &mut Exchange<'_>,
        blocks: &ChainBlocks<'_>,
        memory: &VmMemory,
    ) -> Result<(), LocalSendError> {
        fill::all(blocks, memory, &self.handle, self.options.snapshot_limits.thread_start)?;
        self.begin(exchange, memory)?;
        exchange.ask(Command::State, self.chain.state().text())?;
        self.handle.pass_the_point_of_no_return()?;
        exchange.ask(self.complete(), &[])?;
        self.handle.note_handed_over();
        Ok(())
    }

    /// Says all up to Config.
    fn begin(&self, exchange: &mut Exchange<'_>, memory: &VmMemory) -> Result<(), LocalSendError> {
        exchange.start()?;
        memory.descriptors().try_for_each(|(slot, file)| exchange.memory(slot, file))?;
        exchange.ask(Command::Config, &self.message)
    }

    fn complete(&self) -> Command {
        if self.options.paused { Command::CompletePaused } else { Command::Complete }
    }
}

/// Checks that nothing but vCPUs and the VMM reaches the VM's memory.
fn check_faults(config: &VmConfig) -> Result<(), LocalSendError> {
    let devices = config.devices().iter().map(|device| format!("pass-through device {device}"));
    let vdpa = config.vdpa().iter().map(|path| format!("vDPA device {}", path.escape_debug()));
    let back_ends =
        config.vhost_user().iter().map(|name| format!("vhost-user back end {}", name.escape_debug()));
    let devices: Vec<_> = devices.chain(vdpa).chain(back_ends).collect();
    if devices.is_empty() { Ok(()) } else { Err(LocalSendError::CannotFault { devices: devices.join(", ") }) }
}

/// Checks that all memory of the state is in a slot.
fn check_slots(state: &VmState, slots: &[RamSlot]) -> Result<(), LocalSendError> {
    let wanted: Vec<_> = state.memory().ranges().collect();
    let outside = first_outside(&wanted, slots.iter().map(|slot| slot.range));
    outside.map_or(Ok(()), |range| Err(LocalSendError::NoSlot { range }))
}
