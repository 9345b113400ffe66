// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Cloud Hypervisor's local migrations: guest memory passed as descriptors, between a VMM and a process beside it.
//!
//! With `local=on` a source sends no bytes of memory but a descriptor for each memory slot. [`SnapshotDestination`] copies from them, most
//! of it while the VM still runs, for the source pauses it only when Config is answered.
//!
//! Descriptors of a peer are checked before they are believed ([`SlotError`]), and read with `pread`, never mapped: their owner may cut
//! them off at any time.
//!
//! [`SnapshotDestination`]: crate::snapshot::SnapshotDestination

pub(crate) mod slots;
pub(crate) mod warm;

pub use slots::SlotError;
pub use warm::{LocalEvent, LocalOptions};
