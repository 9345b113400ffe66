// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What the threads of a migration share.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::thread::Scope;
use std::time::Duration;

use super::connections::{Entry, ReceiverHandle};
use super::error::ReceiveError;
use super::phase_gate::PhaseGate;
use crate::threads::ThreadStart;
use crate::transfer::connection::Connection;
use crate::transfer::frame::Request;
use crate::transfer::limits::PeerLimits;

/// How often a wait looks whether the migration has ended elsewhere.
pub(super) const TICK: Duration = Duration::from_millis(50);

/// What all connections of a migration share.
#[derive(Clone, Copy)]
pub(super) struct Context<'a> {
    pub(super) gate: &'a PhaseGate,
    pub(super) connections: &'a ReceiverHandle,
    pub(super) limits: &'a PeerLimits,
    pub(super) threads: ThreadStart,
}

impl<'a> Context<'a> {
    /// Starts a thread that works for this migration. One that panics ends it.
    ///
    /// # Errors
    /// There is no thread to be had.
    pub(super) fn spawn<'scope>(
        self,
        scope: &'scope Scope<'scope, 'a>,
        name: &str,
        work: impl FnOnce() + Send + 'scope,
    ) -> Result<(), ReceiveError> {
        let gate = self.gate;
        let watched = move || {
            // What the work shares is whole after any statement, and the migration goes no further.
            if catch_unwind(AssertUnwindSafe(work)).is_err() {
                gate.fail(ReceiveError::ThreadDied);
            }
        };
        let spawned = self.threads.spawn_scoped(scope, name, watched);
        spawned.map(drop).map_err(|source| ReceiveError::Thread { source })
    }
}

/// A source on its main connection, with the first request it made.
pub(super) struct Source {
    pub(super) connection: Connection,
    pub(super) entry: Entry,
    pub(super) first: Request,
}
