// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! [`Tracker`]: everything that knows which pages are dirty, and nothing about devices' state.

mod address_space;
mod attached;
mod builder;
mod changes;
mod mappings;
mod table_log;
#[cfg(test)]
pub(crate) mod tests;

use std::sync::{Mutex, MutexGuard};

use thiserror::Error;
#[cfg(feature = "transfer")]
use vm_memory::GuestMemoryBackend;

use crate::error::Chain;
use crate::iova::{IovaError, IovaMap};
use crate::layout::{Layout, LayoutError, Region};
use crate::ledger::{Attribution, Chunk, ChunkLimits, CursorId, Ledger, Outstanding, Start};
use crate::range::GpaRange;
#[cfg(feature = "transfer")]
use crate::source::Reports;
use crate::source::{SourceError, choose};

pub use address_space::{AddressSpace, AddressSpaceError, SpaceDevice, SpaceTable};
use attached::Attached;
pub use attached::SpaceId;
pub use builder::{ImpreciseSource, TrackerBuilder};
pub use mappings::{DeviceMappings, Disagreement, VmMappings};
use mappings::{check_covers, check_devices, check_memory};
pub(crate) use table_log::TableLog;

/// Why a call of [`Tracker`] failed.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum TrackerError {
    /// A source could not be started, or refused a change of the VM.
    #[error("Cannot track dirty pages")]
    Source(#[from] SourceError),
    /// The IOVA map refuses a change.
    #[error("Cannot change the IOVA map")]
    Iova(#[from] IovaError),
    /// Two sources carry the same id.
    #[error("Two dirty sources are named {id}")]
    TwoSources {
        /// The name.
        id: String,
    },
    /// An imprecise source, which reports all pages that could have been written, was not allowed.
    #[error("Dirty source {id} is imprecise: it reports every page its devices could have written")]
    Imprecise {
        /// The source.
        id: String,
    },
    /// An imprecise source is used beside others, and the devices whose writes each one reports were not named.
    #[error(
        "Dirty source {id} is imprecise: name the devices that it and every other device source speak for (source_of)"
    )]
    DevicesNotNamed {
        /// The source.
        id: String,
    },
    /// An imprecise source and a precise one report the same device: the imprecise one would make the other useless.
    #[error(
        "Dirty source {imprecise} is imprecise and would drown {precise}, which reports exactly what device {device} writes"
    )]
    ImpreciseBesidePrecise {
        /// The imprecise source.
        imprecise: String,
        /// The precise one.
        precise: String,
        /// The device of both.
        device: String,
    },
    /// There are sources, but [`TrackerBuilder::mappings`] was not called.
    #[error(
        "Dirty source {id} takes what really maps the VM's memory (TrackerBuilder::mappings), to be compared with what it covers"
    )]
    NoMappings {
        /// The source.
        id: String,
    },
    /// The tracked memory differs from the memory that can be written.
    #[error("Tracked memory is not what the VM maps")]
    Disagreement(#[from] Disagreement),
    /// RAM can not be added or removed like this.
    #[error("Cannot change the VM's RAM")]
    Layout(#[from] LayoutError),
    /// There is no such source.
    #[error("No dirty source is named {id}")]
    NoSuchSource {
        /// The name looked for.
        id: String,
    },
    /// The source reports one device's writes only.
    #[error(
        "Dirty source {id} does not see what device {device} writes: add a source for that one (add_source)"
    )]
    CannotJoin {
        /// The source.
        id: String,
        /// The device that was to join it.
        device: String,
    },
    /// The source does not report what the device writes.
    #[error("Dirty source {id} knows no device {device}")]
    NoSuchDevice {
        /// The source.
        id: String,
        /// The name looked for.
        device: String,
    },
    /// This is the source's last device; without one every session would be refused.
    #[error("Device {device} is the last one of dirty source {id}: remove the source (remove_source)")]
    LastDevice {
        /// The source.
        id: String,
        /// Its device.
        device: String,
    },
    /// The cursor is closed.
    #[error("Dirty log is not running for this receiver")]
    CursorClosed,
    /// A thread panicked while it held the tracker, so bits may be lost: build a new tracker, and start again with an
    /// empty receiver.
    #[error("Tracking was cut short by a panic")]
    Poisoned,
    /// Some pages that should be saved together are still in flight.
    #[error("Cannot save all pending pages at once while {bytes} bytes are in flight")]
    InFlight {
        /// Bytes of the chunks that were neither committed nor rolled back.
        bytes: u64,
    },
}

/// What the failure of a source does to a migration. In both cases all memory that the source covers counts as
/// written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum OnFailure {
    /// The migration goes on with a degradation, unless the source is gone for good.
    #[default]
    Widen,
    /// It ends.
    Fail,
}

/// Knows which pages of a VM are dirty: its sources, their address spaces, and a cursor for each receiver or snapshot base.
///
/// [`crate::transfer`] reads it chunk by chunk, [`crate::migratable::MigratableDevice`] table by table. To share it,
/// put it into an `Arc<Mutex<Tracker>>`: a sender locks it for each collect and each chunk, never while it sends
/// bytes, so the VMM can plug, unplug, map and unmap during a migration.
///
/// ```
/// use vfio_migration::{granule::Granule, layout::Layout, ledger::{ChunkLimits, Start}, range::GpaRange, tracker::Tracker};
/// let layout = Layout::new([GpaRange::new(0, 1 << 20)?], Granule::KIB_4)?;
/// let mut tracker = Tracker::builder(layout).build()?;
/// let receiver = tracker.begin(Start::Empty)?;
/// let chunk = tracker.take(receiver, ChunkLimits::NONE)?.expect("a new receiver lacks all RAM");
/// assert_eq!(chunk.bytes(), 1 << 20);
/// tracker.commit(chunk);
/// tracker.end(receiver)?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub struct Tracker {
    ledger: Ledger,
    spaces: Vec<IovaMap>,
    sources: Vec<Attached>,
    mappings: Option<Mappings>,
    allow_imprecise: bool,
    on_failure: OnFailure,
    degradations: Vec<choose::SpaceDegradation>,
    tracking: bool,
}

/// Returns what maps the VM's memory now.
type Mappings = Box<dyn Fn() -> VmMappings + Send>;

impl Tracker {
    /// Starts a builder for a VM with this RAM.
    pub fn builder(layout: Layout) -> TrackerBuilder {
        TrackerBuilder::new(layout)
    }

    /// The VM's RAM.
    pub fn layout(&self) -> &Layout {
        self.ledger.layout()
    }

    /// Opens a cursor for a receiver that holds what `start` says; starts all sources first, unless they run.
    ///
    /// With [`Start::Copied`] and sources that already run, pages whose bits are set in a kernel are pending, because
    /// the copy for another receiver may clear those bits. Where the kernel starts with every bit set, the bits are
    /// cleared first.
    ///
    /// What the sources cover is compared with what really maps the VM's memory, see [`TrackerBuilder::mappings`].
    ///
    /// # Errors
    /// A source could not be started, its initial bits could not be cleared, or no source covers memory that can be
    /// written. All sources are off again unless another cursor is open.
    pub fn begin(&mut self, start: Start) -> Result<CursorId, TrackerError> {
        let ran_before = self.tracking;
        self.arm()?;
        if let Err(disagreement) = self.check_mappings() {
            if !self.ledger.has_cursors() {
                let _already_failing = self.disarm();
            }
            return Err(disagreement.into());
        }
        let cursor = self.ledger.open(start);
        if start == Start::Copied && ran_before {
            warn_of(self.collect());
        } else if start == Start::Copied {
            let ram: Vec<_> = self.layout().regions().iter().map(Region::range).collect();
            self.before_read(&ram).inspect_err(|_| {
                let _already_failing = self.end(cursor);
            })?;
        }
        Ok(cursor)
    }

    /// Closes a cursor; switches all sources off when it was the last.
    ///
    /// # Errors
    /// A source could not be stopped; the cursor is closed, and the sources count as off.
    pub fn end(&mut self, cursor: CursorId) -> Result<(), TrackerError> {
        self.ledger.close(cursor);
        if self.ledger.has_cursors() { Ok(()) } else { self.disarm() }
    }

    /// Collects from every precise source into every cursor.
    ///
    /// If a source fails, all memory it covers is marked dirty and its error is returned as a degradation. No page is
    /// lost.
    #[must_use = "each error is a degradation to report"]
    pub fn collect(&mut self) -> Vec<SourceError> {
        self.collect_from(|attached| attached.precise)
    }

    /// Collects from every source, imprecise ones too: for the last round, when vCPUs and devices are stopped.
    #[must_use = "each error is a degradation to report"]
    pub fn collect_final(&mut self) -> Vec<SourceError> {
        self.collect_from(|_| true)
    }

    /// Sources that report what could have been written; see [`TrackerBuilder::allow_imprecise`].
    pub fn imprecise_sources(&self) -> impl Iterator<Item = ImpreciseSource> {
        let imprecise = self.sources.iter().filter(|attached| !attached.precise);
        imprecise.map(|attached| ImpreciseSource { id: attached.source.id().to_owned() })
    }

    /// Compares the memory that is about to be copied with the RAM that is tracked.
    #[cfg(feature = "transfer")]
    pub(crate) fn check_memory(&self, memory: &impl GuestMemoryBackend) -> Result<(), TrackerError> {
        let ranges = VmMappings::of_memory(memory).ram;
        let absent = self.mappings.as_ref().map_or(Vec::new(), |mappings| mappings().absent);
        Ok(check_memory(self.layout(), &ranges, &absent)?)
    }

    /// Whether pass-through devices can write this VM's memory, according to the sources and the VMM's mappings.
    #[cfg(feature = "transfer")]
    pub(crate) fn has_devices(&self) -> bool {
        let of_devices = |attached: &Attached| {
            attached.source.reports() == Reports::Devices || !attached.devices.is_empty()
        };
        let mapped = || self.mappings.as_ref().is_some_and(|mappings| !mappings().devices.is_empty());
        self.sources.iter().any(of_devices) || mapped()
    }

    /// Whether a source's failure ends a migration: the source is gone for good, or [`OnFailure::Fail`] was chosen.
    pub fn is_fatal(&self, failure: &SourceError) -> bool {
        failure.gone || self.on_failure == OnFailure::Fail
    }

    /// Degradations of the address spaces that were probed, see [`TrackerBuilder::address_space`].
    pub fn space_degradations(&self) -> &[choose::SpaceDegradation] {
        &self.degradations
    }

    /// Bytes that only [`Tracker::collect_final`] makes pending: the RAM that imprecise sources cover. An upper
    /// bound.
    pub fn imprecise_bytes(&self) -> u64 {
        let layout = self.ledger.layout();
        let imprecise = self.sources.iter().filter(|attached| !attached.precise);
        let covers = imprecise.flat_map(|attached| attached.source.cover().ranges);
        let in_ram = |range| layout.parts(range).map(|(_, part)| part.len()).sum::<u64>();
        covers.map(in_ram).sum::<u64>().min(layout.bytes())
    }

    /// How much a cursor's receiver still lacks; `None` once it is closed.
    pub fn outstanding(&self, cursor: CursorId) -> Option<Outstanding> {
        self.ledger.outstanding(cursor)
    }

    /// Bytes of pages reported dirty at least once since the cursor was opened; `None` once it is closed.
    pub fn dirtied_bytes(&self, cursor: CursorId) -> Option<u64> {
        self.ledger.dirtied_bytes(cursor)
    }

    /// RAM plugged in since the cursor was opened, including RAM unplugged since.
    #[cfg(feature = "transfer")]
    pub(crate) fn plugged(&self, cursor: CursorId) -> &[GpaRange] {
        self.ledger.plugged(cursor)
    }

    /// How often RAM was plugged in since the cursor was opened.
    #[cfg(feature = "transfer")]
    pub(crate) fn plugs(&self, cursor: CursorId) -> u64 {
        self.ledger.plugs(cursor)
    }

    /// Begins a round: the next [`Tracker::take`] starts again at the lowest page.
    pub fn begin_round(&mut self, cursor: CursorId) {
        self.ledger.begin_round(cursor);
    }

    /// Takes the round's next pages into flight and clears their bits in the sources. Read their bytes after this
    /// returns.
    ///
    /// # Errors
    /// A source could not clear its bits; the pages are pending again.
    pub fn take(&mut self, cursor: CursorId, limits: ChunkLimits) -> Result<Option<Chunk>, TrackerError> {
        let Some(chunk) = self.ledger.take(cursor, limits) else { return Ok(None) };
        if let Err(error) = self.before_read(chunk.ranges()) {
            self.ledger.roll_back(chunk);
            return Err(error.into());
        }
        Ok(Some(chunk))
    }

    /// Forgets pages the receiver acknowledged.
    pub fn commit(&mut self, chunk: Chunk) {
        self.ledger.commit(chunk);
    }

    /// Makes pages pending again whose copy did not arrive.
    pub fn roll_back(&mut self, chunk: Chunk) {
        self.ledger.roll_back(chunk);
    }

    /// Hands all pending pages to `save` at once: committed if it succeeds, pending again if it fails, for another attempt.
    ///
    /// Use it for a series of snapshots, see [`crate::snapshot`]. Call [`Tracker::collect_final`] right before, when
    /// vCPUs and devices are stopped and their state is captured. `save` is called even if nothing is pending. To let
    /// the VM run on as soon as its pages are copied, before they are on disk, use `take`, `commit` and `roll_back`
    /// instead.
    ///
    /// # Errors
    /// The cursor is closed, a chunk of it is neither committed nor rolled back, a source could not clear its bits,
    /// or `save` failed. The pages stay pending.
    pub fn save_pending<T, E: From<TrackerError>>(
        &mut self,
        cursor: CursorId,
        save: impl FnOnce(&[GpaRange]) -> Result<T, E>,
    ) -> Result<T, E> {
        let outstanding = self.outstanding(cursor).ok_or(TrackerError::CursorClosed)?;
        if outstanding.in_flight_bytes > 0 {
            return Err(TrackerError::InFlight { bytes: outstanding.in_flight_bytes }.into());
        }
        self.begin_round(cursor);
        let chunk = self.take(cursor, ChunkLimits::NONE)?;
        let saved = save(chunk.as_ref().map_or(&[][..], Chunk::ranges));
        match (chunk, saved.is_ok()) {
            (Some(chunk), true) => self.commit(chunk),
            (Some(chunk), false) => self.roll_back(chunk),
            (None, _) => {}
        }
        saved
    }

    /// Pages that each source has reported since the tracker was built, by source id.
    pub fn attribution(&self) -> impl Iterator<Item = (&str, Attribution)> {
        let ids = self.sources.iter().map(|attached| attached.source.id());
        ids.zip(self.ledger.attribution().iter().copied())
    }

    /// Bytes of pages that come back in every report of each source, by source id: see [`crate::source::DirtySource::standing_bytes`].
    pub fn standing_bytes(&self) -> impl Iterator<Item = (&str, u64)> {
        self.sources.iter().map(|attached| (attached.source.id(), attached.source.standing_bytes()))
    }

    fn arm(&mut self) -> Result<(), TrackerError> {
        if self.tracking {
            return Ok(());
        }
        for index in 0..self.sources.len() {
            let Attached { source, space, .. } = &mut self.sources[index];
            if let Err(error) = source.start(self.ledger.layout(), &self.spaces[space.0]) {
                for started in &mut self.sources[..index] {
                    let _already_failing = started.source.stop();
                }
                return Err(error.into());
            }
        }
        self.tracking = true;
        Ok(())
    }

    fn disarm(&mut self) -> Result<(), TrackerError> {
        if !std::mem::take(&mut self.tracking) {
            return Ok(());
        }
        let mut first_error = Ok(());
        for attached in &mut self.sources {
            first_error = first_error.and(attached.source.stop());
        }
        Ok(first_error?)
    }

    /// Tells every source that the bytes of `ranges`, which ascend, are about to be read.
    fn before_read(&mut self, ranges: &[GpaRange]) -> Result<(), SourceError> {
        self.sources.iter_mut().try_for_each(|attached| attached.source.before_read(ranges))
    }

    fn collect_from(&mut self, which: impl Fn(&Attached) -> bool) -> Vec<SourceError> {
        let mut degradations = Vec::new();
        let mut next = 0;
        while let Err((failed, error)) = self.collect_until_failure(next, &which) {
            let Attached { source, space, .. } = &self.sources[failed];
            let mut sink = self.ledger.sink(failed, &self.spaces[space.0]);
            source.cover().ranges.into_iter().for_each(|range| sink.gpa_range(range));
            degradations.push(error);
            next = failed + 1;
        }
        degradations
    }

    /// Collects from source number `first` on, then absorbs all reports. If a source fails, returns its number; the
    /// reports so far wait in the ledger.
    fn collect_until_failure(
        &mut self,
        first: usize,
        which: impl Fn(&Attached) -> bool,
    ) -> Result<(), (usize, SourceError)> {
        let mut collection = self.ledger.collection();
        for (index, attached) in self.sources.iter_mut().enumerate() {
            let sink = collection.next_sink(&self.spaces[attached.space.0]);
            if index >= first && which(attached) {
                attached.source.collect(sink).map_err(|error| (index, error))?;
            }
        }
        collection.absorb();
        Ok(())
    }

    fn check_mappings(&self) -> Result<(), Disagreement> {
        let Some(mappings) = &self.mappings else { return Ok(()) };
        let mappings = mappings();
        check_memory(self.layout(), &mappings.ram, &mappings.absent)?;
        check_covers(self.layout(), &self.sources, &mappings)?;
        check_devices(self.layout(), &self.sources, &mappings)
    }
}

/// Locks a shared tracker for the next step of a migration, unless a thread died in the middle of one.
pub(crate) fn locked(tracker: &Mutex<Tracker>) -> Result<MutexGuard<'_, Tracker>, TrackerError> {
    tracker.lock().map_err(|_| TrackerError::Poisoned)
}

/// Logs degradations that are not returned to a caller.
pub(crate) fn warn_of(degradations: Vec<SourceError>) {
    for degradation in degradations {
        log::warn!("{}; all it covers counts as written", Chain(&degradation));
    }
}
