// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Files and directories on disk: opened without trust, filled under another name, synced while they are written.

pub(super) mod directory;
pub(super) mod error;
pub(super) mod files;
pub(super) mod partial;
pub(super) mod staging;
pub(super) mod write_back;
