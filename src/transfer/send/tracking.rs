// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The pages that the receiver of this migration lacks: the shared tracker, and this receiver's cursor in it.

use std::sync::{Arc, Mutex, MutexGuard};

use thiserror::Error;
use vm_memory::GuestMemoryBackend;

use super::error::SendError;
use super::progress::SenderHandle;
use crate::ledger::{Chunk, ChunkLimits, CursorId, Outstanding, Start};
use crate::source::{SourceError, choose};
use crate::sync::lock;
use crate::tracker::{Tracker, TrackerError, locked};

/// Pages in flight, and the memory that their bytes are in.
pub(super) type TakenFrom<M> = (Chunk, Arc<M>);

/// A source whose pages come back in every round, because a device's driver keeps them pinned.
#[derive(Debug, Error)]
#[error(
    "Pages that {id} reports stay pinned: they are sent in every round, and once more while the VM stands still"
)]
struct StandingPages {
    id: String,
}

/// The tracker, locked for one step at a time, and the cursor of the receiver.
pub(super) struct Tracking<'a> {
    tracker: &'a Mutex<Tracker>,
    migration: &'a SenderHandle,
    /// `None` before the sources are on, and after they are off.
    cursor: Option<CursorId>,
}

impl<'a> Tracking<'a> {
    pub(super) fn new(tracker: &'a Mutex<Tracker>, migration: &'a SenderHandle) -> Self {
        Self { tracker, migration, cursor: None }
    }

    /// The tracker, to be asked how it stands.
    pub(super) fn look(&self) -> MutexGuard<'a, Tracker> {
        lock(self.tracker)
    }

    /// The tracker, for the next step; an error once a thread died in the middle of one.
    fn tracker(&self) -> Result<MutexGuard<'a, Tracker>, TrackerError> {
        locked(self.tracker)
    }

    /// Switches every source on; all of `memory`, which is what they have to cover, is pending.
    pub(super) fn begin<M: GuestMemoryBackend>(
        &mut self,
        memory: impl FnOnce() -> Arc<M>,
    ) -> Result<(), SendError> {
        let mut tracker = self.tracker()?;
        tracker.check_memory(&*memory())?;
        self.cursor = Some(tracker.begin(Start::Empty)?);
        let told = |degradation: &&choose::SpaceDegradation| {
            !matches!(degradation, choose::SpaceDegradation::Imprecise { .. })
        };
        tracker.space_degradations().iter().filter(told).for_each(|one| self.migration.degrade(one.clone()));
        tracker.imprecise_sources().for_each(|source| self.migration.degrade(source));
        Ok(())
    }

    /// Switches the sources off, unless another cursor needs them; `None` where they were not on.
    pub(super) fn end(&mut self) -> Option<Result<(), TrackerError>> {
        self.cursor.take().map(|cursor| self.look().end(cursor))
    }

    /// Collects, and returns the bytes that became pending by it: counted under one lock, since RAM may go before and after.
    pub(super) fn collect(&self) -> Result<u64, SendError> {
        let mut tracker = self.tracker()?;
        let before = self.left_in(&tracker).pending_bytes;
        let failures = tracker.collect();
        let collected_bytes = self.left_in(&tracker).pending_bytes - before;
        drop(tracker);
        self.tolerate(failures)?;
        Ok(collected_bytes)
    }

    /// Collects for the last time before the last round: the VM and its devices stand still.
    pub(super) fn collect_final(&self) -> Result<(), SendError> {
        let failures = self.tracker()?.collect_final();
        self.tolerate(failures)
    }

    /// Goes on without what sources failed to report, all they cover being dirty; ends the migration where one is gone.
    fn tolerate(&self, failures: Vec<SourceError>) -> Result<(), SendError> {
        for failure in failures {
            if self.look().is_fatal(&failure) {
                return Err(TrackerError::from(failure).into());
            }
            self.migration.degrade(failure);
        }
        Ok(())
    }

    /// Names the sources whose pages come back in every round.
    pub(super) fn name_standing_pages(&self) {
        let tracker = self.look();
        for (id, _) in tracker.standing_bytes().filter(|(_, bytes)| *bytes > 0) {
            self.migration.degrade(StandingPages { id: id.to_owned() });
        }
    }

    /// Begins a pass over the pages that are pending now.
    pub(super) fn begin_round(&self) -> Result<(), SendError> {
        let mut tracker = self.tracker()?;
        if let Some(cursor) = self.cursor {
            tracker.begin_round(cursor);
        }
        Ok(())
    }

    /// Takes the round's next pages, and the memory that their bytes are in: RAM that goes now is in both or in neither.
    pub(super) fn take<M>(
        &self,
        limits: ChunkLimits,
        memory: impl FnOnce() -> Arc<M>,
    ) -> Result<Option<TakenFrom<M>>, SendError> {
        let Some(cursor) = self.cursor else { return Ok(None) };
        let mut tracker = self.tracker()?;
        let chunk = tracker.take(cursor, limits)?;
        Ok(chunk.map(|chunk| (chunk, memory())))
    }

    /// Takes in that the receiver has a chunk.
    pub(super) fn commit(&self, chunk: Chunk) {
        self.look().commit(chunk);
    }

    /// What the receiver lacks.
    pub(super) fn left(&self) -> Outstanding {
        self.left_in(&self.look())
    }

    fn left_in(&self, tracker: &Tracker) -> Outstanding {
        self.cursor.and_then(|cursor| tracker.outstanding(cursor)).unwrap_or_default()
    }

    /// Bytes of pages that were reported dirty at least once.
    pub(super) fn dirtied_bytes(&self) -> u64 {
        self.cursor.and_then(|cursor| self.look().dirtied_bytes(cursor)).unwrap_or(0)
    }

    /// How often RAM was plugged in since the sources were switched on.
    pub(super) fn plugs(&self) -> u64 {
        self.cursor.map_or(0, |cursor| self.look().plugs(cursor))
    }

    /// Whether a chunk holds RAM that was plugged in since the sources were switched on.
    pub(super) fn is_plugged_in(&self, chunk: &Chunk) -> bool {
        let tracker = self.look();
        let plugged = self.cursor.map_or(&[][..], |cursor| tracker.plugged(cursor));
        plugged.iter().any(|new| chunk.ranges().iter().any(|range| range.intersection(*new).is_some()))
    }

    /// Whether a chunk holds the VM's last page.
    pub(super) fn reaches_end_of_ram(&self, chunk: &Chunk) -> bool {
        let end_of_ram = self.look().layout().regions().last().map(|region| region.range().end());
        chunk.ranges().last().map(|range| range.end()) == end_of_ram
    }
}
