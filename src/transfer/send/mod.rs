// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The sending end of a migration: [`Sender`] moves a running VM to a receiver that speaks the protocol.
//!
//! `phases` is a migration from its first word to its last:
//!
//! - `phases`: the order in which everything happens, and the decision after each round;
//! - `logging`: a line for each phase;
//! - `copier`: passes over memory, chunk by chunk, held back by the rate limit (`rate_limit`) and by the back-pressure of the
//!   `connections` that carry them, whose workers leave out what the zero-page filter (`zero_filter`) finds;
//! - `device_streams`: devices' states, read on threads of their own and sent beside memory;
//! - `meter`: figures (`rates`), never a deed;
//! - `control`: the first connection, which carries all but the running VM's memory;
//! - `restorable_vm`, `device_precopy`, `tracking`: the VM, its devices and its dirty pages, each with what sets it back after a
//!   failure;
//! - `sent`, `downtime`, `error`, `options`: what comes of a migration, and what is asked of it;
//! - `pinning`: receivers that pin all memory;
//! - `progress`: what other threads see of a migration, and how they cancel it;
//! - `exchange`, `payload`: a request and its answer, and the payload of State.

mod connections;
mod control;
mod copier;
mod device_precopy;
mod device_streams;
mod downtime;
mod error;
mod exchange;
mod logging;
mod meter;
mod options;
mod payload;
mod phases;
mod piece;
mod pinning;
mod progress;
mod rate_limit;
mod rates;
mod restorable_vm;
mod sent;
mod tracking;
mod zero_filter;

use std::sync::Mutex;

use phases::Session;

use crate::device::DeviceSet;
use crate::tracker::Tracker;
use crate::vm::Vm;

pub use downtime::DowntimeParts;
pub use error::{SendError, SendStep, SourceVm, VmOperation};
pub use exchange::PeerError;
pub use options::{SendOptions, SendOptionsError};
pub use pinning::{MissedBecause, MissedDowntime, PinningReceiver, Populated};
pub use progress::{Phase, Progress, SendDegradation, SenderHandle, SourceProgress};
pub use sent::{DeviceDowntime, Sent};

/// Sends VMs.
///
/// ```
/// use std::sync::Mutex;
/// use std::time::Duration;
/// use vfio_migration::{device::DeviceSet, tracker::Tracker, vm::Vm};
/// use vfio_migration::transfer::{SenderHandle, SendError, SendOptions, Sender, Sent};
///
/// fn move_away(
///     vm: &mut impl Vm,
///     tracker: &Mutex<Tracker>,
///     devices: &Mutex<DeviceSet>,
///     watch: impl FnOnce(SenderHandle),
/// ) -> Result<Sent, SendError> {
///     let options = SendOptions::new("tcp:destination:4444".parse().expect("a URL"));
///     let sender = Sender::new(options.downtime(Duration::from_millis(100)));
///     watch(sender.handle());
///     sender.send(vm, tracker, devices)
/// }
/// ```
#[derive(Debug)]
pub struct Sender {
    options: SendOptions,
    handle: SenderHandle,
}

impl Sender {
    /// Makes a sender for one migration.
    pub fn new(options: SendOptions) -> Self {
        Self { options, handle: SenderHandle::default() }
    }

    /// Returns what cancels and measures the migration from any thread.
    pub fn handle(&self) -> SenderHandle {
        self.handle.clone()
    }

    /// Moves the running VM to the receiver; on success it stands still here, with no log running.
    ///
    /// Returns when the receiver has it. `tracker` knows its dirty pages and is locked for each collect and each chunk, never
    /// while bytes are sent: the VMM may map, unmap, plug and unplug meanwhile. `devices` are its pass-through devices, locked
    /// while they are moved, asked or read.
    ///
    /// # Errors
    /// Anything fails. The VM runs on here, its logs off, and may be sent again to another receiver, which then gets every page
    /// anew. The two exceptions are told by [`SendError::source_vm`].
    pub fn send<V: Vm>(
        self,
        vm: &mut V,
        tracker: &Mutex<Tracker>,
        devices: &Mutex<DeviceSet>,
    ) -> Result<Sent, SendError> {
        let options = self.options.for_vm(vm.can_throttle());
        Session::new(&options, vm, tracker, devices, &self.handle).migrate()
    }
}
