// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What a snapshot's files say: Cloud Hypervisor's documents, the manifest and its digests. Pure: no file is touched here.
//!
//! - `config`, `config_message`, `state`, `tree`, `list`: Cloud Hypervisor's documents; `passthrough`: the devices in them;
//! - `placement`: where memory lies in a file; `elsewhere`: memory that lies in files of its own;
//! - `manifest`, `blocks`, `digest`: what every byte is checked against; `names`, `limits`: the files, and how large they may be.

mod blocks;
mod config;
mod config_message;
mod digest;
mod elsewhere;
mod error;
mod limits;
mod list;
mod manifest;
mod names;
mod passthrough;
mod placement;
mod state;
mod tree;

#[cfg(test)]
pub(crate) use self::blocks::LEAST_BLOCK_BYTES;
pub(crate) use self::blocks::{BlockTable, block_bytes_for, block_bytes_of_full, is_zero};
pub use self::config::{VmConfig, ZoneFile};
pub use self::config_message::ConfigMessage;
pub(crate) use self::config_message::RamSlot;
pub use self::digest::{Digest, DigestError};
pub use self::elsewhere::{Elsewhere, LeftOut};
pub use self::error::FormatError;
pub use self::limits::SnapshotLimits;
pub use self::manifest::Manifest;
pub(crate) use self::manifest::{Changes, Covered};
pub(crate) use self::names::WORK_FILE;
pub use self::names::{CHANGES_FILE, CONFIG_FILE, MANIFEST_FILE, MEMORY_FILE, STATE_FILE};
pub use self::passthrough::{Interface, PassThrough};
pub use self::placement::{Extent, Placement, PlacementError};
pub use self::state::VmState;
