// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! How large a snapshot's parts may be.

use crate::threads::ThreadStart;

/// The most that is read of a snapshot before it is refused, and what the threads that work on it do first.
#[derive(Debug, Clone, Copy)]
pub struct SnapshotLimits {
    /// Bytes of `config.json`, of a Config message, and of either state in `state.json` that such a message is made of.
    pub config_bytes: u64,
    /// Bytes of `state.json`, which holds the state of pass-through devices too. It is in memory once, as the text that it is.
    pub state_bytes: u64,
    /// Bytes of `snapshot-manifest`.
    pub manifest_bytes: u64,
    /// Bytes of guest memory.
    pub memory_bytes: u64,
    /// Ranges of guest memory.
    pub ranges: usize,
    /// What each thread that works on the snapshot does first.
    pub thread_start: ThreadStart,
}

impl Default for SnapshotLimits {
    fn default() -> Self {
        Self {
            config_bytes: 64 << 20,
            state_bytes: 4 << 30,
            manifest_bytes: 2 << 30,
            memory_bytes: 16 << 40,
            ranges: 1 << 20,
            thread_start: ThreadStart::NOTHING,
        }
    }
}
