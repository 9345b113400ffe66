// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Files and directories on disk: opened without trust, filled under another name, synced while they are written.
//!
//! - `files`, `directory`: opening and reading what may be anything;
//! - `staging`: a directory that is filled under another name and renamed when whole; `partial`: what a dead writer left;
//! - `write_back`: syncs files while they are written, and holds writers up (back-pressure) when too much waits for the disk.

mod directory;
mod error;
mod files;
mod partial;
mod staging;
mod write_back;

pub use self::error::{ManifestUse, ReadError, WriteError};
pub(crate) use self::files::{
    data_parts, expect_length, extend, is_unsupported, named, next_data, open_sized, read_bounded, read_named,
};
pub(crate) use self::staging::{StagedDir, add_file, clear_added};
pub(crate) use self::write_back::WriteBack;
