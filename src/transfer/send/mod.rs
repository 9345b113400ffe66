// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The sending end of a migration: [`Sender`] moves a running VM to a receiver that speaks the protocol.
//!
//! `phases` is a migration from its first word to its last. It goes through these, top down:
//!
//! - `options`, `error`, `sent`: what is asked of a migration, and what comes of it;
//! - `control`: the first connection, which carries all but the memory of a running VM;
//! - `copier`: passes over memory, chunk by chunk, under the rate limit, onto `connections`, of which each has a worker;
//! - `zero_filter`: pages that the first pass leaves out because nobody wrote them or they read zero;
//! - `device_precopy`: what devices hand out while they run; `pinning`: receivers that pin all memory;
//! - `meter`, `rates`: figures; `progress` shows them to other threads, `logging` tells them to the log, and `downtime` says
//!   where the time went;
//! - `exchange`, `payload`: a request and its answer, and the payload of State.

mod connections;
mod control;
mod copier;
mod device_precopy;
mod downtime;
mod error;
mod exchange;
mod logging;
mod meter;
mod options;
mod payload;
mod phases;
mod pinning;
mod progress;
mod rates;
mod sent;
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
pub use progress::{Degradation, Migration, Phase, Progress, SourceProgress};
pub use sent::Sent;

/// Sends VMs.
///
/// ```
/// use std::sync::Mutex;
/// use vfio_migration::{device::DeviceSet, tracker::Tracker, vm::Vm};
/// use vfio_migration::transfer::{Migration, SendError, SendOptions, Sender, Sent};
///
/// fn move_away(
///     vm: &mut impl Vm,
///     tracker: &Mutex<Tracker>,
///     devices: &Mutex<DeviceSet>,
///     migration: &Migration,
/// ) -> Result<Sent, SendError> {
///     let mut options = SendOptions::new("tcp:destination:4444".parse().expect("a URL"));
///     options.downtime_ms = 100;
///     Sender::new(options).send(vm, tracker, devices, migration)
/// }
/// ```
#[derive(Debug, Clone)]
pub struct Sender {
    options: SendOptions,
}

impl Sender {
    /// Makes a sender; [`Sender::send`] refuses options out of their bounds.
    pub fn new(options: SendOptions) -> Self {
        Self { options }
    }

    /// Moves the running VM to the receiver; on success it stands still here, with no log running.
    ///
    /// Returns when the receiver has it. `tracker` knows its dirty pages and is locked for each collect and each chunk, never
    /// while bytes are sent: the VMM may map, unmap, plug and unplug meanwhile. `devices` are its pass-through devices, locked
    /// while they are moved, asked or read.
    ///
    /// # Errors
    /// An option is out of its bounds, or anything fails. The VM runs on here, its logs off, and may be sent again to another receiver, which then gets every page anew. The two
    /// exceptions are told by [`SendError::source_vm`].
    pub fn send<V: Vm>(
        &self,
        vm: &mut V,
        tracker: &Mutex<Tracker>,
        devices: &Mutex<DeviceSet>,
        migration: &Migration,
    ) -> Result<Sent, SendError> {
        self.options.check()?;
        Session::new(&self.options, vm, tracker, devices, migration).migrate()
    }
}
