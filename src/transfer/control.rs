// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The first connection: everything but precopied memory goes over it, one request at a time.

use std::time::Duration;

use vm_memory::GuestMemoryBackend;

use super::connection::{Connection, ConnectionError};
use super::lanes::wire_bytes;
use super::progress::{Migration, Phase};
use super::send::{SendError, SendOptions, Step};
use crate::ledger::Chunk;

/// How long a receiver may take to answer that it has abandoned the migration, too.
const FAREWELL: Duration = Duration::from_millis(250);

/// The control connection of one migration.
pub(super) struct Control<'a> {
    migration: &'a Migration,
    /// `None` while it carries precopied memory, and once that failed.
    connection: Option<Connection>,
    answer_timeout: Duration,
    /// Whether the receiver has answered every request, so that another may follow.
    between_requests: bool,
}

impl<'a> Control<'a> {
    /// Connects to the receiver.
    pub(super) fn connect(options: &SendOptions, migration: &'a Migration) -> Result<Self, SendError> {
        todo!()
    }
}
