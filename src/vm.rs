// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What a migration asks of a VMM.

use std::error::Error;
use std::sync::Arc;

use vm_memory::GuestMemoryBackend;
use vm_migration::Snapshot;

mod backing;
mod reading;
mod userfault;

pub use backing::Backing;
pub(crate) use backing::{Behind, bytes_without_hole};
pub use reading::UnreadableMemory;
pub(crate) use reading::{has_address, read_memory};
pub(crate) use userfault::HoleWatch;
#[cfg(feature = "snapshot")]
pub(crate) use userfault::ReadableCheck;
pub use userfault::UserfaultError;

pub use crate::state_tree::read_tree;

/// A VMM's own error, whatever it is.
pub type VmError = Box<dyn Error + Send + Sync>;

/// A paused VM as it was captured: what the State message carries.
///
/// A migration converts neither: a tree is serialised straight to the receiver, without a copy in memory.
/// [`Captured::into_text`] returns the text of either.
#[derive(Clone)]
#[non_exhaustive]
pub enum Captured {
    /// A tree of states, as a VMM makes it.
    Tree(Snapshot),
    /// The JSON text of such a tree, as a snapshot on disk holds it.
    Text(Arc<String>),
}

impl Captured {
    /// Returns the JSON text, as `state.json` holds it; makes it of a tree.
    ///
    /// # Errors
    /// A tree has no JSON form.
    pub fn into_text(self) -> serde_json::Result<Arc<String>> {
        match self {
            Self::Tree(tree) => serde_json::to_string(&tree).map(Arc::new),
            Self::Text(text) => Ok(text),
        }
    }
}

impl From<Snapshot> for Captured {
    fn from(tree: Snapshot) -> Self {
        Self::Tree(tree)
    }
}

/// The VM as its sender sees it. Pass-through devices are handled by [`crate::device::DeviceSet`], not here.
pub trait Vm {
    /// The VM's guest memory.
    type Memory: GuestMemoryBackend + Send + Sync + 'static;

    /// The guest memory as it stands; all of it is copied.
    ///
    /// The tracker is usually locked during this call, so that no RAM is unplugged after its pages were chosen: do
    /// not wait here for a thread that may wait for the tracker, such as one that plugs or unplugs. RAM unplugged
    /// through [`Tracker::remove_ram`](crate::tracker::Tracker::remove_ram) may be pending or on its way then; what
    /// was returned before stays mapped until its bytes are sent.
    ///
    /// Memory that gives no slices ([`HostAddressNotAvailable`](vm_memory::GuestMemoryError::HostAddressNotAvailable)) is read through its
    /// [`Bytes`](vm_memory::Bytes): it is in a file, and nowhere in this process. All its regions are of that kind, or none is.
    fn memory(&self) -> Arc<Self::Memory>;

    /// Returns what backs the memory, so that pages never written can be skipped in the first pass.
    ///
    /// [`Backing::of_mmap`] works for most VMMs; [`Backing::default`] is always safe, and skips nothing.
    fn backing(&self) -> Backing;

    /// Describes the VM to the receiver, before any page: the JSON text of the Config message.
    ///
    /// # Errors
    /// The VMM cannot describe its VM.
    fn config(&mut self) -> Result<Vec<u8>, VmError>;

    /// Stops the vCPUs and everything in the VMM that writes guest memory. Pausing a paused VM does nothing.
    ///
    /// # Errors
    /// The VM may be running or paused; [`Vm::resume`] makes it run.
    fn pause(&mut self) -> Result<(), VmError>;

    /// Lets the vCPUs run again. Resuming a running VM does nothing.
    ///
    /// # Errors
    /// The VM is stuck.
    fn resume(&mut self) -> Result<(), VmError>;

    /// Captures the paused VM: what State carries, with `devices` where the VMM keeps its pass-through devices.
    ///
    /// May write guest memory (and marks what it writes).
    ///
    /// # Errors
    /// The VMM cannot capture its VM.
    fn state(&mut self, devices: Snapshot) -> Result<Captured, VmError>;

    /// Releases what the receiver takes when it gets State, such as disk locks. The VM is paused.
    ///
    /// # Errors
    /// Something cannot be let go; [`Vm::reclaim`] follows.
    fn release(&mut self) -> Result<(), VmError> {
        Ok(())
    }

    /// Takes back what [`Vm::release`] released, because the receiver will not run the VM. [`Vm::resume`] follows,
    /// unless the VM was paused before.
    ///
    /// # Errors
    /// Something could not be taken back: the VM is stuck, and not resumed.
    fn reclaim(&mut self) -> Result<(), VmError> {
        Ok(())
    }

    /// Whether the vCPUs can be slowed down.
    fn can_throttle(&self) -> bool;

    /// Takes `percent` of the vCPUs' time away, 0 to 99; does nothing where [`Vm::can_throttle`] says no.
    fn throttle(&mut self, percent: u8);
}
