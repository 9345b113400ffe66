// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! [`MigratableDevice`]: every source of dirty pages and every device of a VM under one roof.

mod builder;
#[cfg(test)]
mod tests;

use thiserror::Error;
use vm_migration::protocol::MemoryRangeTable;
use vm_migration::{
    Migratable, MigratableError, Pausable, Snapshot, Snapshottable, Transportable, snapshot_from_id,
};

use crate::device::{DeviceSet, DeviceSetError};
use crate::iova::{IovaError, IovaMap, Mapping};
use crate::layout::{Layout, Region};
use crate::ledger::{Attribution, Chunk, ChunkLimits, CursorId, Ledger, Outstanding, Start};
use crate::range::{GpaRange, IovaRange};
use crate::source::{DirtySource, SourceError};
use crate::table::table_of;

pub use builder::{Builder, ImpreciseSource};

/// Why a [`MigratableDevice`] could not do its part.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum MigratableDeviceError {
    /// A source could not be switched on, or not be told of what happens.
    #[error("Cannot track dirty pages")]
    Source(#[from] SourceError),
    /// Devices could not be moved, saved or restored.
    #[error("Cannot move the devices' state")]
    Devices(#[source] Box<DeviceSetError>),
    /// The IOVA map refuses a change.
    #[error("Cannot change the IOVA map")]
    Iova(#[from] IovaError),
    /// Two sources carry the same id.
    #[error("Two dirty sources are named {id}")]
    TwoSources {
        /// The name.
        id: String,
    },
    /// A source cannot tell written pages from pages that could have been written, and that was not allowed.
    #[error("Dirty source {id} is imprecise: it reports every page its devices could have written")]
    Imprecise {
        /// The source.
        id: String,
    },
    /// The snapshot holds nothing of these devices.
    #[error("Snapshot has no child {id}")]
    NoSnapshot {
        /// The child looked for.
        id: String,
    },
    /// No dirty log runs, or not for this cursor.
    #[error("Dirty log is not running")]
    NotLogging,
    /// Pages that should be saved together are elsewhere.
    #[error("Cannot save all pending pages at once while {bytes} bytes are in flight")]
    InFlight {
        /// Bytes of the chunks that were neither committed nor rolled back.
        bytes: u64,
    },
}

impl From<DeviceSetError> for MigratableDeviceError {
    fn from(error: DeviceSetError) -> Self {
        Self::Devices(Box::new(error))
    }
}

/// Names one IOVA address space of a [`MigratableDevice`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct SpaceId(usize);

impl SpaceId {
    /// The space where IOVA equals GPA, which is always there.
    pub const IDENTITY: Self = Self(0);
}

struct Attached {
    source: Box<dyn DirtySource>,
    space: SpaceId,
    precise: bool,
}

/// What the `vm-migration` traits' caller holds: a cursor, and the table it was given last.
#[derive(Debug)]
struct Session {
    cursor: CursorId,
    handed_out: Option<Chunk>,
}

/// Gathers every source of dirty guest memory, unites them exactly, and moves the state of the VM's pass-through devices.
///
/// Driven either by [`crate::transfer`], chunk by chunk with a cursor for each receiver, or through the `vm-migration` traits
/// by a VMM with a loop of its own. A session of one kind does not disturb one of the other.
///
/// ```
/// use vfio_migration::{granule::Granule, layout::Layout, ledger::{ChunkLimits, Start}, migratable::MigratableDevice, range::GpaRange};
/// let layout = Layout::new([GpaRange::new(0, 1 << 20)?], Granule::KIB_4)?;
/// let mut vm = MigratableDevice::builder("pass-through", layout).build()?;
/// let receiver = vm.begin(Start::Empty)?;
/// let chunk = vm.take(receiver, ChunkLimits::NONE)?.expect("a new receiver lacks all RAM");
/// assert_eq!(chunk.bytes(), 1 << 20);
/// vm.commit(chunk);
/// vm.end(receiver)?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub struct MigratableDevice {
    id: String,
    ledger: Ledger,
    spaces: Vec<IovaMap>,
    sources: Vec<Attached>,
    devices: DeviceSet,
    logging: bool,
    migrating: bool,
    paused: bool,
    session: Option<Session>,
}

impl MigratableDevice {
    /// Starts naming the parts of the device `id` of a VM with this RAM.
    pub fn builder(id: impl Into<String>, layout: Layout) -> Builder {
        let spaces = vec![IovaMap::Identity];
        Builder::new(id.into(), layout, spaces)
    }

    /// The VM's RAM.
    pub fn layout(&self) -> &Layout {
        self.ledger.layout()
    }

    /// The devices whose state moves.
    pub fn devices(&mut self) -> &mut DeviceSet {
        &mut self.devices
    }

    /// Opens a cursor for a receiver that holds what `start` says; switches all sources on first, unless they run.
    ///
    /// With [`Start::Copied`] and sources that ran before, pages whose bits stand in a kernel are pending: another write to
    /// them shows no more once another receiver's copy has cleared them. A kernel that begins with every bit set has them cleared.
    ///
    /// # Errors
    /// A source could not be switched on, or not begin with clean pages; all are off again unless another cursor is open.
    pub fn begin(&mut self, start: Start) -> Result<CursorId, MigratableDeviceError> {
        let ran_before = self.logging;
        self.arm()?;
        let cursor = self.ledger.open(start);
        if start == Start::Copied && ran_before {
            self.collect_or_warn(|attached| attached.precise);
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
    /// A source could not be switched off; the cursor is closed and the sources count as off all the same.
    pub fn end(&mut self, cursor: CursorId) -> Result<(), MigratableDeviceError> {
        self.ledger.close(cursor);
        if self.ledger.has_cursors() { Ok(()) } else { self.disarm() }
    }

    /// Collects from every precise source into every cursor.
    ///
    /// A source that fails has all it covers marked dirty; its error comes back as a degradation, and nothing is lost.
    #[must_use = "each error is a degradation to report"]
    pub fn collect(&mut self) -> Vec<SourceError> {
        self.collect_from(|attached| attached.precise)
    }

    /// Collects from every source, imprecise ones too: for the last round, when vCPUs and devices are stopped.
    #[must_use = "each error is a degradation to report"]
    pub fn collect_final(&mut self) -> Vec<SourceError> {
        self.collect_from(|_| true)
    }

    /// Sources that report what could have been written; see [`Builder::allow_imprecise`].
    pub fn imprecise_sources(&self) -> impl Iterator<Item = ImpreciseSource> {
        let imprecise = self.sources.iter().filter(|attached| !attached.precise);
        imprecise.map(|attached| ImpreciseSource { id: attached.source.id().to_owned() })
    }

    /// Bytes that only [`MigratableDevice::collect_final`] makes pending: the RAM imprecise sources cover, rather too much.
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

    /// Begins a round: the next [`MigratableDevice::take`] starts again at the lowest page.
    pub fn begin_round(&mut self, cursor: CursorId) {
        self.ledger.begin_round(cursor);
    }

    /// Takes the round's next pages into flight and clears their standing bits: their bytes may be read from now on.
    ///
    /// # Errors
    /// A source could not clear its bits; the pages are pending again.
    pub fn take(
        &mut self,
        cursor: CursorId,
        limits: ChunkLimits,
    ) -> Result<Option<Chunk>, MigratableDeviceError> {
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
    /// This is how one snapshot after another is taken: see [`crate::snapshot`]. Call [`MigratableDevice::collect_final`]
    /// right before, when vCPUs and devices are stopped and their state is captured. `save` is called even if nothing is pending.
    /// A VM that is to run on once its pages are copied, before they are safe on disk, does the same with `take`, `commit` and
    /// `roll_back`.
    ///
    /// # Errors
    /// The cursor is closed, a chunk of it is neither committed nor rolled back, a source could not clear its bits, or `save`
    /// failed. What was pending is pending.
    pub fn save_pending<T, E: From<MigratableDeviceError>>(
        &mut self,
        cursor: CursorId,
        save: impl FnOnce(&[GpaRange]) -> Result<T, E>,
    ) -> Result<T, E> {
        let outstanding = self.outstanding(cursor).ok_or(MigratableDeviceError::NotLogging)?;
        if outstanding.in_flight_bytes > 0 {
            return Err(MigratableDeviceError::InFlight { bytes: outstanding.in_flight_bytes }.into());
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

    /// Pages each source reported since this value was built, by source id.
    pub fn attribution(&self) -> impl Iterator<Item = (&str, Attribution)> {
        let ids = self.sources.iter().map(|attached| attached.source.id());
        ids.zip(self.ledger.attribution().iter().copied())
    }

    /// Takes in a mapping that a virtual IOMMU has made.
    ///
    /// # Errors
    /// It overlaps one that stands, or a source would not see writes through it: tear it down again, or end the migration.
    pub fn map(&mut self, space: SpaceId, mapping: Mapping) -> Result<(), MigratableDeviceError> {
        self.spaces[space.0].map(mapping)?;
        if !self.logging {
            return Ok(());
        }
        // All are told, whoever fails: one that did not know of the mapping would take it for clean.
        let mut told = Ok(());
        for attached in self.sources.iter_mut().filter(|attached| attached.space == space) {
            told = told.and(attached.source.mapped(&mapping));
        }
        Ok(told?)
    }

    /// Harvests the mappings in `iova` that are about to go, and forgets them; the caller unmaps whatever the answer.
    ///
    /// Returns the degradations: a mapping whose bits could not be read counts as written all over.
    ///
    /// # Errors
    /// `iova` would cut a mapping in two; nothing changed.
    pub fn unmap(
        &mut self,
        space: SpaceId,
        iova: IovaRange,
    ) -> Result<Vec<SourceError>, MigratableDeviceError> {
        let mut degradations = Vec::new();
        for mapping in self.spaces[space.0].whole_mappings(iova)? {
            if self.logging {
                self.harvest(space, &mapping, &mut degradations);
            }
            self.spaces[space.0].forget(&mapping);
        }
        self.ledger.absorb();
        Ok(degradations)
    }

    /// Restores the devices from a snapshot that [`Snapshottable::snapshot`] made, or the `vm-migration` tree around it.
    /// They stay stopped until [`Pausable::resume`].
    ///
    /// # Errors
    /// The snapshot is not of these devices, or a device refuses its state.
    pub fn restore(&mut self, snapshot: &Snapshot) -> Result<(), MigratableDeviceError> {
        self.devices.load(snapshot)?;
        self.paused = true;
        Ok(())
    }

    /// Restores the devices from the child of `parent` that carries this value's id.
    ///
    /// # Errors
    /// There is no such child; else as [`MigratableDevice::restore`].
    pub fn restore_child(&mut self, parent: &Snapshot) -> Result<(), MigratableDeviceError> {
        let missing = || MigratableDeviceError::NoSnapshot { id: self.id.clone() };
        let child = snapshot_from_id(Some(parent), &self.id).ok_or_else(missing)?;
        self.restore(child)
    }

    fn arm(&mut self) -> Result<(), MigratableDeviceError> {
        if self.logging {
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
        self.logging = true;
        Ok(())
    }

    fn disarm(&mut self) -> Result<(), MigratableDeviceError> {
        if !std::mem::take(&mut self.logging) {
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
        for (index, attached) in self.sources.iter_mut().enumerate().filter(|(_, attached)| which(attached)) {
            let mut sink = self.ledger.sink(index, &self.spaces[attached.space.0]);
            if let Err(error) = attached.source.collect(&mut sink) {
                attached.source.cover().ranges.into_iter().for_each(|range| sink.gpa_range(range));
                degradations.push(error);
            }
        }
        self.ledger.absorb();
        degradations
    }

    /// Collects where there is nobody to tell of degradations but the log.
    fn collect_or_warn(&mut self, which: impl Fn(&Attached) -> bool) {
        for degradation in self.collect_from(which) {
            log::warn!("{degradation}; all it covers counts as written");
        }
    }

    fn harvest(&mut self, space: SpaceId, mapping: &Mapping, degradations: &mut Vec<SourceError>) {
        for (index, attached) in self.sources.iter_mut().enumerate() {
            if attached.space != space {
                continue;
            }
            let mut sink = self.ledger.sink(index, &self.spaces[space.0]);
            if let Err(error) = attached.source.unmapped(mapping, &mut sink) {
                sink.gpa_range(mapping.gpa());
                degradations.push(error);
            }
        }
    }

    /// Ends the traits' session, if there is one.
    fn close_session(&mut self) -> Result<(), MigratableDeviceError> {
        self.session.take().map_or(Ok(()), |session| self.end(session.cursor))
    }

    fn next_table(&mut self) -> Result<MemoryRangeTable, MigratableDeviceError> {
        let session = self.session.as_mut().ok_or(MigratableDeviceError::NotLogging)?;
        let (cursor, received) = (session.cursor, session.handed_out.take());
        if let Some(chunk) = received {
            self.commit(chunk);
        }
        let paused = self.paused;
        self.collect_or_warn(|attached| attached.precise || paused);
        self.begin_round(cursor);
        let chunk = self.take(cursor, ChunkLimits::NONE)?;
        let ranges = chunk.as_ref().map_or(&[][..], Chunk::ranges);
        let table = table_of(ranges.iter().copied());
        self.session = Some(Session { cursor, handed_out: chunk });
        Ok(table)
    }
}

impl Pausable for MigratableDevice {
    /// Stops all devices, P2P-quiescent first; call it when the vCPUs are paused.
    fn pause(&mut self) -> Result<(), MigratableError> {
        let stopped =
            if self.migrating { self.devices.stop_for_copy().map(drop) } else { self.devices.stop() };
        stopped.map_err(|error| MigratableError::Pause(error.into()))?;
        self.paused = true;
        Ok(())
    }

    /// Lets all devices run, P2P-quiescent first; call it before the vCPUs run.
    fn resume(&mut self) -> Result<(), MigratableError> {
        self.devices.run().map_err(|error| MigratableError::Resume(error.into()))?;
        self.paused = false;
        self.migrating = false;
        Ok(())
    }
}

impl Snapshottable for MigratableDevice {
    fn id(&self) -> String {
        self.id.clone()
    }

    /// Reads the stopped devices' state: a child for each device.
    fn snapshot(&mut self) -> Result<Snapshot, MigratableError> {
        self.devices.save().map_err(|error| MigratableError::Snapshot(error.into()))
    }
}

/// The VMM's own files and sockets carry the snapshot.
impl Transportable for MigratableDevice {}

impl Migratable for MigratableDevice {
    /// Switches every source on for a caller that then copies all RAM itself.
    fn start_dirty_log(&mut self) -> Result<(), MigratableError> {
        let failed = |error: MigratableDeviceError| MigratableError::StartDirtyLog(error.into());
        self.close_session().map_err(failed)?;
        let cursor = self.begin(Start::Copied).map_err(failed)?;
        self.session = Some(Session { cursor, handed_out: None });
        Ok(())
    }

    /// Drops the session: what it handed out counts for nothing with the next one. Devices that still run are taken out of
    /// the migration; stopped ones wait for [`Pausable::resume`] or [`Migratable::complete_migration`].
    fn stop_dirty_log(&mut self) -> Result<(), MigratableError> {
        let failed = |error: MigratableDeviceError| MigratableError::StopDirtyLog(error.into());
        self.close_session().map_err(failed)?;
        if self.migrating && !self.paused {
            self.migrating = false;
            self.devices.abort_to_running().map_err(|error| failed(error.into()))?;
        }
        Ok(())
    }

    /// Returns the pages written since the call before, sorted, disjoint, coalesced; that call's table counts as received.
    fn dirty_log(&mut self) -> Result<MemoryRangeTable, MigratableError> {
        self.next_table().map_err(|error| MigratableError::DirtyLog(error.into()))
    }

    /// Lets devices that can begin to hand out their state while they run.
    fn start_migration(&mut self) -> Result<(), MigratableError> {
        self.devices.start_precopy().map_err(|error| MigratableError::StartMigration(error.into()))?;
        self.migrating = true;
        Ok(())
    }

    /// Ends the session of a migration that succeeded, and the devices' sessions with it.
    fn complete_migration(&mut self) -> Result<(), MigratableError> {
        let failed = |error: MigratableDeviceError| MigratableError::CompleteMigration(error.into());
        self.migrating = false;
        self.close_session().map_err(failed)?;
        self.devices.retire().map_err(|error| failed(error.into()))
    }
}
