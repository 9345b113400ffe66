// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! [`TableLog`]: the dirty log of a caller that asks for one whole table a round.

use vm_migration::protocol::MemoryRangeTable;

use super::{Tracker, TrackerError, warn_of};
use crate::ledger::{Chunk, ChunkLimits, CursorId, Start};
use crate::table::table_of;

/// A session of a [`Tracker`] whose caller copies all RAM itself, then asks for table after table, and never says which of
/// them arrived: asking for the next one counts as the receipt of the one before.
#[derive(Debug)]
pub(crate) struct TableLog {
    cursor: CursorId,
    handed_out: Option<Table>,
    /// A table with the imprecise sources was returned since the devices stopped; they have nothing new until devices
    /// run again.
    reported_since_stop: bool,
}

/// The pages of a table in flight; none, where nothing was dirty.
#[derive(Debug)]
struct Table(Option<Chunk>);

impl TableLog {
    /// Switches every source on.
    ///
    /// # Errors
    /// As [`Tracker::begin`].
    pub(crate) fn start(tracker: &mut Tracker) -> Result<Self, TrackerError> {
        let cursor = tracker.begin(Start::Copied)?;
        Ok(Self { cursor, handed_out: None, reported_since_stop: false })
    }

    /// Returns the pages written since the call before, whose table counts as received. The first table with `stopped` devices
    /// has what imprecise sources cover, and no other has until [`TableLog::devices_run`].
    ///
    /// # Errors
    /// A source failed in a way that ends a migration, or could not clear its bits. All pages are in the next table.
    pub(crate) fn next(
        &mut self,
        tracker: &mut Tracker,
        stopped: bool,
    ) -> Result<MemoryRangeTable, TrackerError> {
        if let Some(Table(Some(received))) = self.handed_out.take() {
            tracker.commit(received);
        }
        let with_imprecise = stopped && !self.reported_since_stop;
        let mut failures = if with_imprecise { tracker.collect_final() } else { tracker.collect() };
        self.reported_since_stop |= with_imprecise;
        if let Some(fatal) = failures.iter().position(|failure| tracker.is_fatal(failure)) {
            return Err(failures.swap_remove(fatal).into());
        }
        warn_of(failures);
        tracker.begin_round(self.cursor);
        let chunk = tracker.take(self.cursor, ChunkLimits::NONE)?;
        let table = table_of(chunk.as_ref().map_or(&[][..], Chunk::ranges).iter().copied());
        self.handed_out = Some(Table(chunk));
        Ok(table)
    }

    /// Makes the pages of the last table pending again; `None` if there is no such table.
    pub(crate) fn hand_back(&mut self, tracker: &mut Tracker) -> Option<()> {
        let Table(pages) = self.handed_out.take()?;
        if let Some(pages) = pages {
            tracker.roll_back(pages);
        }
        Some(())
    }

    /// Records that devices run, so imprecise sources have something new at the next stop.
    pub(crate) fn devices_run(&mut self) {
        self.reported_since_stop = false;
    }

    /// Whether stopped devices wrote pages that were in no table yet.
    pub(crate) fn owes(&self, tracker: &Tracker) -> bool {
        let pending = tracker.outstanding(self.cursor).is_some_and(|left| left.pending_bytes > 0);
        pending || !self.reported_since_stop
    }

    /// Ends the session.
    ///
    /// # Errors
    /// As [`Tracker::end`].
    pub(crate) fn stop(self, tracker: &mut Tracker) -> Result<(), TrackerError> {
        tracker.end(self.cursor)
    }
}
