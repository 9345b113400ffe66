// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A VMM component that keeps its own dirty log and returns it as tables.

use std::sync::{Arc, Mutex, MutexGuard, TryLockError};
use std::thread;
use std::time::{Duration, Instant};

use thiserror::Error;
use vm_migration::protocol::{MemoryRange, MemoryRangeTable};
use vm_migration::{Migratable, MigratableError};

use super::{Cover, DirtySource, Operation, Reports, Sink, SourceError};
use crate::iova::IovaMap;
use crate::layout::Layout;
use crate::range::{GpaRange, RangeError, united};

/// Why a component's log cannot be used.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum MigratableLogError {
    /// A thread panicked while it held the component's lock.
    #[error("Lock of the component is poisoned")]
    Poisoned,
    /// The component's lock could not be taken in time.
    #[error(
        "Component stayed locked for {} ms: whoever holds its lock may be waiting for this very call, a deadlock",
        .limit.as_millis()
    )]
    Locked {
        /// How long it was waited for.
        limit: Duration,
    },
    /// The component's own log failed.
    #[error(transparent)]
    Component(#[from] MigratableError),
    /// An entry of the component's table is not a valid range.
    #[error("Entry {index} of the component's table is not a valid range")]
    Entry {
        /// Position in the table.
        index: usize,
        /// What is wrong with it.
        source: RangeError,
    },
}

/// The dirty log of a [`Migratable`] component: a vhost-user device of the VMM's own, another hypervisor's memory, anything that
/// returns a table.
///
/// A wrapped component must leave the VMM's own loop: `start_dirty_log`, `dirty_log` and `stop_dirty_log` are called
/// from here only. A second caller would take pages from this one. Everything else stays with the VMM: `pause`,
/// `resume`, `snapshot`, `start_migration` and `complete_migration` are never called from here.
///
/// Never wrap the object that calls this library, nor one whose lock its caller holds: Cloud Hypervisor's
/// `DeviceManager` holds its device tree and each device in turn while it asks for `dirty_log`, and waiting for one
/// of these locks would deadlock. The source therefore waits 5 seconds for the lock; then the read fails with an
/// error that names the deadlock.
///
/// Do not wrap a component whose tables name pages that could have been written: this source counts as precise. Its
/// cover is all RAM, since a component may write anywhere.
///
/// ```
/// use std::sync::{Arc, Mutex};
/// use vfio_migration::source::MigratableLog;
/// use vm_migration::{Migratable, MigratableError, Pausable, Snapshottable, Transportable};
///
/// struct Network;
/// impl Pausable for Network {}
/// impl Snapshottable for Network {}
/// impl Transportable for Network {}
/// impl Migratable for Network {}
///
/// let network: Arc<Mutex<dyn Migratable>> = Arc::new(Mutex::new(Network));
/// let source = MigratableLog::new("net0", network);
/// ```
pub struct MigratableLog {
    id: String,
    component: Arc<Mutex<dyn Migratable>>,
    lock_limit: Duration,
    on: bool,
}

/// How long a component's lock is waited for. A vCPU or a request to a back end holds one for milliseconds; a deadlock, for ever.
const LOCK_LIMIT: Duration = Duration::from_secs(5);

/// How often a held lock is tried again.
const LOCK_POLL: Duration = Duration::from_millis(1);

impl MigratableLog {
    /// Makes the source `id` over the log of `component`, which is off until [`DirtySource::start`].
    pub fn new(id: impl Into<String>, component: Arc<Mutex<dyn Migratable>>) -> Self {
        Self { id: id.into(), component, lock_limit: LOCK_LIMIT, on: false }
    }

    /// Calls the component under its lock.
    fn call<T>(
        &self,
        operation: Operation,
        call: impl FnOnce(&mut dyn Migratable) -> Result<T, MigratableError>,
    ) -> Result<T, SourceError> {
        let called = self.lock().and_then(|mut component| Ok(call(&mut *component)?));
        called.map_err(|cause| self.failed(operation, cause))
    }

    fn failed(&self, operation: Operation, cause: MigratableLogError) -> SourceError {
        let gone = matches!(cause, MigratableLogError::Component(MigratableError::DeviceDisconnected(_)));
        SourceError::new(&self.id, operation, cause).or_gone(gone)
    }

    /// Takes the lock, or gives up: std has no lock with a timeout, so this polls.
    fn lock(&self) -> Result<MutexGuard<'_, dyn Migratable + 'static>, MigratableLogError> {
        let deadline = Instant::now() + self.lock_limit;
        loop {
            match self.component.try_lock() {
                Ok(component) => return Ok(component),
                Err(TryLockError::Poisoned(_)) => return Err(MigratableLogError::Poisoned),
                Err(TryLockError::WouldBlock) if Instant::now() < deadline => thread::sleep(LOCK_POLL),
                Err(TryLockError::WouldBlock) => {
                    return Err(MigratableLogError::Locked { limit: self.lock_limit });
                }
            }
        }
    }
}

impl DirtySource for MigratableLog {
    fn id(&self) -> &str {
        &self.id
    }

    fn reports(&self) -> Reports {
        Reports::Component
    }

    fn cover(&self) -> Cover {
        Cover::everything()
    }

    fn start(&mut self, _layout: &Layout, _iova: &IovaMap) -> Result<(), SourceError> {
        if !self.on {
            self.call(Operation::Start, |component| component.start_dirty_log())?;
            self.on = true;
        }
        Ok(())
    }

    /// Marks the pages of the component's table, in any order, with repetitions; what is not RAM is ignored.
    fn collect(&mut self, sink: &mut Sink<'_>) -> Result<(), SourceError> {
        if !self.on {
            return Ok(());
        }
        let table = self.call(Operation::Collect, |component| component.dirty_log())?;
        let ranges = ranges_of(&table).map_err(|cause| self.failed(Operation::Collect, cause))?;
        united(ranges).into_iter().for_each(|range| sink.gpa_range(range));
        Ok(())
    }

    fn stop(&mut self) -> Result<(), SourceError> {
        if !std::mem::take(&mut self.on) {
            return Ok(());
        }
        self.call(Operation::Stop, |component| component.stop_dirty_log())
    }
}

/// Reads a table, which may hold anything: empty entries are left out, and one that wraps around makes the table a failed read.
fn ranges_of(table: &MemoryRangeTable) -> Result<Vec<GpaRange>, MigratableLogError> {
    let entries = table.regions().iter().enumerate();
    let range = |(index, entry): (usize, &MemoryRange)| match GpaRange::new(entry.gpa, entry.length) {
        Ok(range) => Some(Ok(range)),
        Err(RangeError::Empty { .. }) => None,
        Err(source) => Some(Err(MigratableLogError::Entry { index, source })),
    };
    entries.filter_map(range).collect()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::panic;

    use anyhow::anyhow;
    use proptest::prelude::*;
    use vm_migration::{Pausable, Snapshot, Snapshottable, Transportable};

    use super::*;
    use crate::granule::Granule;
    use crate::ledger::{ChunkLimits, Ledger, Start};

    const PAGE: u64 = 4096;

    /// Answers `dirty_log` with the tables it was given, and notes each call.
    #[derive(Default)]
    struct Scripted {
        calls: Vec<&'static str>,
        tables: Vec<Result<MemoryRangeTable, MigratableError>>,
    }

    impl Pausable for Scripted {
        fn pause(&mut self) -> Result<(), MigratableError> {
            self.calls.push("pause");
            Ok(())
        }

        fn resume(&mut self) -> Result<(), MigratableError> {
            self.calls.push("resume");
            Ok(())
        }
    }

    impl Snapshottable for Scripted {
        fn snapshot(&mut self) -> Result<Snapshot, MigratableError> {
            self.calls.push("snapshot");
            Ok(Snapshot::default())
        }
    }

    impl Transportable for Scripted {}

    impl Migratable for Scripted {
        fn start_dirty_log(&mut self) -> Result<(), MigratableError> {
            self.calls.push("start_dirty_log");
            Ok(())
        }

        fn stop_dirty_log(&mut self) -> Result<(), MigratableError> {
            self.calls.push("stop_dirty_log");
            Ok(())
        }

        fn dirty_log(&mut self) -> Result<MemoryRangeTable, MigratableError> {
            self.calls.push("dirty_log");
            self.tables.pop().unwrap_or_else(|| Ok(MemoryRangeTable::default()))
        }

        fn start_migration(&mut self) -> Result<(), MigratableError> {
            self.calls.push("start_migration");
            Ok(())
        }

        fn complete_migration(&mut self) -> Result<(), MigratableError> {
            self.calls.push("complete_migration");
            Ok(())
        }
    }

    /// Pages 0..130 and 200..264.
    fn layout() -> Layout {
        let ram = [(0, 130), (200, 64)];
        Layout::new(ram.map(|(page, pages)| range(page * PAGE, pages * PAGE)), Granule::KIB_4).unwrap()
    }

    fn range(start: u64, bytes: u64) -> GpaRange {
        GpaRange::new(start, bytes).unwrap()
    }

    fn table(entries: &[(u64, u64)]) -> MemoryRangeTable {
        let mut table = MemoryRangeTable::default();
        entries.iter().for_each(|&(gpa, length)| table.push(MemoryRange { gpa, length }));
        table
    }

    fn answering(answer: Result<MemoryRangeTable, MigratableError>) -> (Arc<Mutex<Scripted>>, MigratableLog) {
        let component = Arc::new(Mutex::new(Scripted { tables: vec![answer], ..Scripted::default() }));
        let mut log = MigratableLog::new("net0", Arc::clone(&component) as Arc<Mutex<dyn Migratable>>);
        log.start(&layout(), &IovaMap::Identity).unwrap();
        (component, log)
    }

    /// Collects once and returns the pages marked.
    fn collected(log: &mut MigratableLog) -> Result<BTreeSet<u64>, SourceError> {
        let mut ledger = Ledger::new(layout(), 1);
        let cursor = ledger.open(Start::Copied);
        log.collect(&mut ledger.sink(0, &IovaMap::Identity))?;
        ledger.absorb();
        let chunk = ledger.take(cursor, ChunkLimits::NONE);
        let ranges = chunk.map(|chunk| chunk.ranges().to_vec()).unwrap_or_default();
        Ok(ranges.iter().flat_map(|range| range.start() / PAGE..range.end() / PAGE).collect())
    }

    proptest! {
        #[test]
        fn any_table_marks_just_the_ram_that_it_names(
            entries in prop::collection::vec((0..300 * PAGE, prop_oneof![Just(0), 1..PAGE, 1..90 * PAGE]), 0..30),
        ) {
            let named = |page: u64| entries.iter().any(|&(gpa, length)| {
                length > 0 && gpa < (page + 1) * PAGE && page * PAGE < gpa + length
            });
            let oracle: BTreeSet<_> = (0..130).chain(200..264).filter(|&page| named(page)).collect();
            let (_, mut log) = answering(Ok(table(&entries)));
            prop_assert_eq!(collected(&mut log).unwrap(), oracle);
        }
    }

    #[test]
    fn nothing_but_the_log_calls_is_forwarded() {
        let (component, mut log) = answering(Ok(table(&[(0, PAGE)])));
        log.start(&layout(), &IovaMap::Identity).unwrap();
        collected(&mut log).unwrap();
        log.before_read(&[range(0, PAGE)]).unwrap();
        log.stop().unwrap();
        log.stop().unwrap();
        assert!(collected(&mut log).unwrap().is_empty());
        assert_eq!(component.lock().unwrap().calls, ["start_dirty_log", "dirty_log", "stop_dirty_log"]);
    }

    #[test]
    fn a_table_with_a_range_that_wraps_around_is_a_failed_read_of_all_ram() {
        let (_, mut log) = answering(Ok(table(&[(0, PAGE), (u64::MAX - 5, PAGE)])));
        let error = collected(&mut log).unwrap_err();
        assert_eq!(error.cause.to_string(), "Entry 1 of the component's table is not a valid range");
        assert_eq!(error.operation, Operation::Collect);
        let (layout, cover) = (layout(), log.cover());
        assert!(cover.precise);
        for region in layout.regions() {
            assert!(cover.ranges.iter().any(|range| range.covers(region.range())));
        }
    }

    #[test]
    fn a_table_up_to_the_last_byte_of_the_address_space_is_collected() {
        let (_, mut log) = answering(Ok(table(&[(0, u64::MAX), (u64::MAX - 1, 1), (1 << 63, 1 << 62)])));
        assert_eq!(collected(&mut log).unwrap().len(), 130 + 64);
    }

    #[test]
    fn as_many_ranges_as_there_are_words_each_over_all_ram_are_collected_in_seconds() {
        let layout = Layout::new([range(0, 16 << 30)], Granule::KIB_4).unwrap();
        let (_, mut log) = answering(Ok(table(&vec![(0, 1 << 40); layout.words()])));
        let mut ledger = Ledger::new(layout, 1);
        let begun = Instant::now();
        log.collect(&mut ledger.sink(0, &IovaMap::Identity)).unwrap();
        assert!(begun.elapsed() < Duration::from_secs(10), "{:?}", begun.elapsed());
    }

    #[test]
    fn a_component_that_fails_is_named_and_one_that_is_disconnected_is_gone() {
        let (_, mut log) = answering(Err(MigratableError::DirtyLog(anyhow!("back end is dead"))));
        let error = collected(&mut log).unwrap_err();
        assert_eq!((error.id.as_str(), error.gone), ("net0", false));
        assert_eq!(error.cause.source().unwrap().to_string(), "back end is dead");
        let (_, mut log) = answering(Err(MigratableError::DeviceDisconnected("net0".to_owned())));
        assert!(collected(&mut log).unwrap_err().gone);
    }

    #[test]
    fn a_poisoned_lock_is_a_failed_read() {
        let (component, mut log) = answering(Ok(table(&[])));
        let poisoner = thread::spawn(move || {
            let _held = component.lock().unwrap();
            panic::resume_unwind(Box::new("while it holds the lock"));
        });
        poisoner.join().unwrap_err();
        assert_eq!(collected(&mut log).unwrap_err().cause.to_string(), "Lock of the component is poisoned");
        assert_eq!(log.stop().unwrap_err().operation, Operation::Stop);
        log.start(&layout(), &IovaMap::Identity).unwrap_err();
    }

    #[test]
    fn a_lock_that_its_holder_takes_along_into_the_call_is_an_error_that_names_the_deadlock() {
        let (component, mut log) = answering(Ok(table(&[(0, PAGE)])));
        log.lock_limit = Duration::from_millis(20);
        let held = component.lock().unwrap();
        let error = collected(&mut log).unwrap_err();
        assert!(error.cause.to_string().contains("locked for 20 ms"), "{}", error.cause);
        assert!(error.cause.to_string().contains("deadlock"), "{}", error.cause);
        drop(held);
        assert_eq!(collected(&mut log).unwrap(), BTreeSet::from([0]), "and the table is still there");
    }

    #[test]
    fn a_lock_that_is_held_for_a_moment_is_waited_for() {
        let (component, mut log) = answering(Ok(table(&[(0, PAGE)])));
        let held = component.lock().unwrap();
        thread::scope(|scope| {
            let collecting = scope.spawn(|| collected(&mut log));
            thread::sleep(Duration::from_millis(30));
            drop(held);
            assert_eq!(collecting.join().unwrap().unwrap(), BTreeSet::from([0]));
        });
    }
}
