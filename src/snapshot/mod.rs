// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Snapshots on disk: Cloud Hypervisor's directory, differentials on top of it, and the check of every byte.
//!
//! ```text
//!  full snapshot                                   differential
//!    config.json        the VM's configuration       config.json
//!    state.json         the tree of its state        state.json
//!    memory-ranges      its memory, sparse           memory-changes       only pages that differ
//!    snapshot-manifest  a digest for each block      snapshot-manifest    runs of pages, the base's name, digests
//! ```
//!
//! A full snapshot is a directory that Cloud Hypervisor restores; it ignores the manifest. [`SnapshotWriter`] takes pages from any number
//! of threads and brings a directory under its name whole or not at all; [`FullSnapshot`], [`Differential`] and [`SnapshotChain`] read them;
//! [`verify`] finds altered bytes, [`apply`] turns a chain into a full snapshot, [`subtract`] a snapshot into a differential, [`compare`]
//! lists what differs, [`seal`] names what a VMM wrote, [`reseal`] takes an edited configuration, [`describe`] says what a directory
//! holds. [`SnapshotDestination`] receives a running VM into a directory, [`SnapshotSource`] sends one to a VMM.
//! `docs/snapshot-format.md` has the bytes.
//!
//! Inside, each wing uses only those before it: `format` (what the files say), `disk` (files and directories), `read`, `write`, `ops`,
//! `passed` (memory that comes as descriptors), `migrate` (the two sides of a transfer).
//!
//! # One snapshot after another
//!
//! A cursor of [`Tracker`](crate::tracker::Tracker) represents the last snapshot: it knows every page that was written since then, by
//! the VM, a device or the VMM, and no other reader takes pages from it. It begins with all RAM pending, so the first snapshot is a full
//! one; each later one holds the pages that are pending then.
//! If a snapshot fails, [`save_pending`](crate::tracker::Tracker::save_pending) keeps its pages pending for the next one, whose base still
//! is the last snapshot that succeeded. A VM that was restored from a snapshot begins with
//! [`Start::Copied`](crate::ledger::Start::Copied) instead, before it runs, and takes differentials to that snapshot at once.
//!
//! ```
//! # use std::error::Error;
//! # use std::path::Path;
//! # use std::sync::Arc;
//! # use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap, bitmap::AtomicBitmap};
//! # use vfio_migration::layout::Layout;
//! # use vfio_migration::source::GuestMemoryLog;
//! use vfio_migration::ledger::{CursorId, Start};
//! use vfio_migration::tracker::Tracker;
//! # use vfio_migration::tracker::VmMappings;
//! use vfio_migration::snapshot::{AnnouncedRam, Base, Digest, SnapshotLimits, SnapshotWriter};
//!
//! # type Memory = GuestMemoryMmap<AtomicBitmap>;
//! /// The VM's configuration, and its state: the least that a snapshot has, see `docs/snapshot-format.md`.
//! const CONFIG: &[u8] = br#"{"memory":{"size":1048576}}"#;
//! const STATE: &[u8] = r#"{"snapshots":{"memory-manager":{"snapshots":{},"snapshot_data":{"state":
//!     "{\"memory_ranges\":{\"data\":[{\"gpa\":0,\"length\":1048576}]}}"}}},"snapshot_data":null}"#.as_bytes();
//!
//! /// Takes a snapshot of a VM whose vCPUs and devices are stopped, and whose state is captured: vCPUs first, then
//! /// `DeviceSet::stop` and `DeviceSet::save`, then the VM's own state. Afterwards `DeviceSet::run`, then the vCPUs.
//! fn take(
//!     tracker: &mut Tracker,
//!     cursor: CursorId,
//!     last: Option<Digest>,
//!     memory: &Memory,
//!     target: &Path,
//! ) -> Result<Digest, Box<dyn Error>> {
//!     for degradation in tracker.collect_final() {
//!         eprintln!("{degradation}; all it covers is saved");
//!     }
//!     let (ram, limits) = (AnnouncedRam::all(tracker.layout().clone()), SnapshotLimits::default());
//!     tracker.save_pending(cursor, |pages| {
//!         let writer = SnapshotWriter::create(target, ram, last.map(Base::Named), limits)?;
//!         writer.copy_from(pages.iter().copied(), memory)?;
//!         Ok(writer.finish(CONFIG, STATE)?)
//!     })
//! }
//!
//! # let dir = tempfile::tempdir()?;
//! # let memory = Arc::new(Memory::from_ranges(&[(GuestAddress(0), 1 << 20)])?);
//! # let layout = Layout::from_guest_memory(&*memory)?;
//! # let maps = memory.clone();
//! # let builder = Tracker::builder(layout).mappings(move || VmMappings::of_memory(&*maps));
//! # let builder = builder.source(Box::new(GuestMemoryLog::new(memory.clone())));
//! # let mut vm = builder.build()?;
//! let cursor = vm.begin(Start::Empty)?;
//! let sunday = take(&mut vm, cursor, None, &memory, &dir.path().join("sunday"))?;
//! memory.write_obj(7u32, GuestAddress(0x5004))?;
//! # std::fs::write(dir.path().join("taken"), "")?;
//! assert!(take(&mut vm, cursor, Some(sunday), &memory, &dir.path().join("taken")).is_err());
//! memory.write_obj(7u32, GuestAddress(0x9004))?;
//! let monday = take(&mut vm, cursor, Some(sunday), &memory, &dir.path().join("monday"))?;
//! let changes = std::fs::metadata(dir.path().join("monday/memory-changes"))?;
//! assert_eq!(changes.len(), 2 * vm.layout().host_page().bytes());
//! # assert_ne!(sunday, monday);
//! # Ok::<(), Box<dyn Error>>(())
//! ```

mod disk;
mod format;
mod migrate;
mod ops;
pub(crate) mod parallel;
pub(crate) mod passed;
mod read;
mod reserve;
mod write;

#[cfg(test)]
mod tests;

pub use self::disk::{ManifestUse, ReadError, WriteError};
pub(crate) use self::format::RamSlot;
pub use self::format::{
    CHANGES_FILE, CONFIG_FILE, ConfigMessage, Digest, DigestError, Elsewhere, Extent, FormatError, Interface,
    LeftOut, MANIFEST_FILE, MEMORY_FILE, Manifest, PassThrough, Placement, PlacementError, STATE_FILE,
    SnapshotLimits, VmConfig, VmState, ZoneFile,
};
pub use self::migrate::{
    DestinationError, DestinationOptions, NameSnapshot, OnPaused, SnapshotDestination, SnapshotSource,
};
pub use self::ops::{
    Description, Differences, OperationError, SnapshotKind, VerifyFinding, VerifyReport, apply, compare,
    describe, reseal, seal, subtract, verify,
};
pub(crate) use self::read::ChainBlocks;
pub use self::read::{
    Altered, Differential, FullSnapshot, PlacedMemory, PlacedRegion, SnapshotChain, read_config,
};
pub use self::write::{AnnouncedRam, Base, SnapshotWriter};
