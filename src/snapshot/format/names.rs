// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The files of a snapshot.

/// The VM's configuration.
pub const CONFIG_FILE: &str = "config.json";
/// The tree of the VM's state.
pub const STATE_FILE: &str = "state.json";
/// The VM's memory: its ranges, back to back.
pub const MEMORY_FILE: &str = "memory-ranges";
/// The pages in which a differential differs from its base, back to back.
pub const CHANGES_FILE: &str = "memory-changes";
/// What the other files hold, block by block.
pub const MANIFEST_FILE: &str = "snapshot-manifest";
/// Where pages of a differential wait, until it is known which of them differ.
pub(crate) const WORK_FILE: &str = "memory-work";
