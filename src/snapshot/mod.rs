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
//! A full snapshot is a directory that Cloud Hypervisor restores; it ignores the manifest. [`SnapshotWriter`] and
//! [`DifferentialWriter`] take pages from any number of threads and bring a directory under its name whole or not at
//! all; [`SnapshotDir`] and [`Chain`] read them; [`verify`] finds altered bytes, [`apply`] turns a chain into a full
//! snapshot, [`subtract`] a snapshot into a differential, [`compare`] lists what differs, [`describe`] says what a
//! directory holds. `docs/snapshot-format.md` has the bytes.

mod apply;
mod block_reader;
mod blocks;
mod changed_pages;
mod compare;
mod describe;
mod destination;
mod differential;
mod differential_writer;
mod digest;
mod dir;
mod directory;
mod document;
mod feed;
mod files;
mod flusher;
mod limits;
mod manifest;
mod memory_file;
mod partial;
mod placement;
mod source;
mod staging;
mod subtract;
mod verify;
mod writer;

#[cfg(test)]
mod tests;

pub use apply::{ApplyError, SealError, apply, seal};
pub use compare::{CompareError, Differences, compare};
pub use describe::{Description, Kind, describe};
pub use destination::{DestinationError, DestinationOptions, OnPaused, SnapshotDestination};
pub use differential::{Chain, ChainError, Differential};
pub use differential_writer::{Base, DifferentialWriter};
pub use digest::{Digest, DigestError};
pub use dir::{OpenError, SnapshotDir};
pub use document::{ConfigMessage, DocumentError, VmConfig, VmState};
pub use files::{CHANGES_FILE, CONFIG_FILE, FileError, MANIFEST_FILE, MEMORY_FILE, STATE_FILE};
pub use limits::Limits;
pub use manifest::{Manifest, ManifestError};
pub use placement::{Extent, Placement, PlacementError};
pub use source::{SnapshotSource, SourceError};
pub use staging::StagingError;
pub use subtract::{SubtractError, subtract};
pub use verify::{Finding, Report, VerifyError, verify};
pub use writer::{Announced, SnapshotWriter, WriteError};
