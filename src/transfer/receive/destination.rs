// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What receives the VM, and the result.

use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex};

use super::store::PageStore;
use crate::device::DeviceSet;
use crate::transfer::frame::Features;
use crate::vm::VmError;

/// What becomes of a VM that is received: a VMM, or a directory on disk.
///
/// The calls come in this order, each at most once, on the thread that receives; an error ends the migration, and the
/// source hears of it.
pub trait Destination {
    /// Returns the devices whose states may come as streams of their own, ahead of State, from a source of this crate; asked once,
    /// before all else, or right after [`Destination::config`] where [`Destination::makes_devices_of_config`]. They are there then, and
    /// their VM does not run.
    ///
    /// After [`Destination::config`] they are stopped and take in what comes, in RESUMING, with no more than a queue's worth of it in
    /// memory. In the tree of State something stands for each state that came, and a device accepts its state, and leaves RESUMING, in
    /// [`DeviceSet::load`]: a VMM that has to restore an interrupt controller before its devices does so in [`Destination::state`],
    /// before it calls that and before it sets up the devices' registers and interrupts. A State that is taken without it is refused,
    /// with the device's name. After a failure the devices are reset.
    ///
    /// `None`, the default: all states come in State, as from any source. A VMM whose devices can take no byte of their states in before
    /// something that is in State stays with it.
    fn device_streams(&mut self) -> Option<Arc<Mutex<DeviceSet>>> {
        None
    }

    /// Whether [`Destination::device_streams`] has the devices only once [`Destination::config`] has made them; `false`, the default: it
    /// has them before, and other devices than the source's are refused before the Config comes.
    fn makes_devices_of_config(&self) -> bool {
        false
    }

    /// Whether guest memory may come as descriptors (`local=on` of Cloud Hypervisor); `false`, the default: such a source is refused.
    fn takes_descriptors(&self) -> bool {
        false
    }

    /// Takes the descriptor of the memory in a slot that the Config will describe. Each is called for at once, before
    /// [`Destination::config`]; no Memory comes after one.
    ///
    /// # Errors
    /// The descriptor is not one of memory.
    fn descriptor(&mut self, slot: u32, memory: OwnedFd) -> Result<(), VmError> {
        drop((slot, memory));
        Ok(())
    }

    /// Takes the JSON text of the Config, and tells where the pages go.
    ///
    /// # Errors
    /// This host cannot run this VM.
    fn config(&mut self, json: &[u8]) -> Result<Arc<dyn PageStore>, VmError>;

    /// Takes the JSON text of the State; every page is in place. Nobody else keeps the text, which may be large.
    ///
    /// # Errors
    /// The state does not fit.
    fn state(&mut self, json: Vec<u8>) -> Result<(), VmError>;

    /// Runs the VM, or keeps it paused as it was at its source; returns which side has the VM from here on.
    ///
    /// # Errors
    /// The VM does not run here: the source is told so, and runs it again.
    fn complete(&mut self, paused: bool) -> Result<Completion, VmError>;

    /// Called when the migration ended before [`Destination::complete`]: nothing more will come.
    fn abandoned(&mut self);
}

/// Which side has the VM once its migration is complete.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Completion {
    /// This one: the source gives its VM up.
    Moved,
    /// The source: what arrived is a checkpoint, which is kept. The source is told that the migration failed, and runs its VM again.
    Checkpointed,
}

/// A VM that was received.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Received {
    /// Bytes that came from the source's sockets, those of TLS included. Other callers do not count, nor does an additional
    /// connection that brought no memory.
    pub received_bytes: u64,
    /// Memory messages.
    pub memory_messages: u64,
    /// Ranges in their tables.
    pub memory_ranges: u64,
    /// Bytes of guest memory in them, repeated ones counted each time.
    pub memory_bytes: u64,
    /// Bytes of device state that came as streams.
    pub device_bytes: u64,
    /// Additional connections that brought memory.
    pub connections: usize,
    /// What a source of ours agreed to; `None` with any other.
    pub features: Option<Features>,
    /// Whether the VM stays paused.
    pub paused: bool,
    /// Which side has the VM.
    pub completion: Completion,
    /// Whether the source was told that the VM is here. Where it was not, and the VM has moved, the source stays paused, and the VM here
    /// is the one to keep.
    pub confirmed: bool,
}
