// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Cloud Hypervisor's local migrations: guest memory passed as descriptors, between a VMM and a process beside it.
//!
//! With `local=on` a source sends no bytes of memory but a descriptor for each memory slot. [`SnapshotDestination`] copies from them, most
//! of it while the VM still runs, for the source pauses it only when Config is answered. [`LocalSender`] is the way back.
//!
//! Descriptors of a peer are checked before they are believed ([`SlotError`]), and read with `pread`, never mapped: their owner may cut
//! them off at any time.
//!
//! This room lies above [`snapshot`](crate::snapshot) and uses it; nothing in there uses this one. To receive over descriptors is a way of
//! writing a snapshot, so its code is the wing `passed` of `snapshot`, below the destination that the transfer knows; what is public of it
//! is named here. To restore over descriptors is a way of reading snapshots and a protocol of its own, and is at home here.
//!
//! [`SnapshotDestination`]: crate::snapshot::SnapshotDestination

mod restore;

pub use self::restore::{
    LocalSendError, LocalSendOptions, LocalSendProgress, LocalSender, LocalSenderHandle, LocalSent,
};
pub use crate::snapshot::passed::{CopyProgress, LocalEvent, LocalOptions, SlotError};
