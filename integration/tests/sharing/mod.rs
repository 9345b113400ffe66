// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A component of the VMM with a dirty log of its own, which writes pages that the guest writes as well.

use std::collections::BTreeSet;
use std::mem;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use vfio_migration_integration::vmm::{AreaKind, Machine, Memory, PAGE_BYTES, PAGE_LEN, SHARED_BYTES};
use vm_memory::{Bytes, GuestAddress};
use vm_migration::protocol::{MemoryRange, MemoryRangeTable};
use vm_migration::{Migratable, MigratableError, Pausable, Snapshottable, Transportable};

/// Writes the shared part of every page that guest and device share, again and again, in a thread of its own.
///
/// It writes through a mapping of its own, as a back end in another process would: nobody but this log knows.
pub(crate) struct Sharer {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Default)]
struct Shared {
    stop: AtomicBool,
    passes: AtomicU64,
    /// Pages written since the log was read; none while it is off.
    log: Mutex<Option<BTreeSet<u64>>>,
}

impl Sharer {
    /// Begins to write.
    pub(crate) fn new(machine: &Machine, memory: Memory) -> Self {
        let areas = machine.map().ranges(AreaKind::GuestAndDevice);
        let pages: Vec<_> = areas.flat_map(|area| area.step_by(PAGE_LEN)).collect();
        assert!(!pages.is_empty(), "guest and device share pages");
        let shared = Arc::<Shared>::default();
        let thread = thread::spawn({
            let shared = Arc::clone(&shared);
            move || shared.write(&memory, &pages)
        });
        Self { shared, thread: Some(thread) }
    }

    /// What this component is for whoever migrates it.
    pub(crate) fn component(&self) -> Arc<Mutex<dyn Migratable>> {
        Arc::new(Mutex::new(Component(Arc::clone(&self.shared))))
    }

    /// Waits until every page was written once more.
    pub(crate) fn pass(&self) {
        let until = self.shared.passes.load(Ordering::SeqCst) + 2;
        let deadline = Instant::now() + Duration::from_secs(30);
        while self.shared.passes.load(Ordering::SeqCst) < until {
            assert!(Instant::now() < deadline, "nothing is written");
            thread::sleep(Duration::from_millis(1));
        }
    }

    /// Writes no more once this returns.
    pub(crate) fn stop(&mut self) {
        self.shared.stop.store(true, Ordering::SeqCst);
        if let Some(thread) = self.thread.take() {
            thread.join().unwrap();
        }
    }
}

impl Drop for Sharer {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::SeqCst);
    }
}

impl Shared {
    fn write(&self, memory: &Memory, pages: &[u64]) {
        for pass in 1_u64.. {
            for &page in pages {
                if self.stop.load(Ordering::SeqCst) {
                    return;
                }
                memory.guest().write_obj(pass, GuestAddress(page + SHARED_BYTES.start)).unwrap();
                if let Some(log) = &mut *self.log.lock().unwrap() {
                    log.insert(page);
                }
            }
            self.passes.store(pass, Ordering::SeqCst);
            thread::sleep(Duration::from_millis(2));
        }
    }
}

struct Component(Arc<Shared>);

impl Pausable for Component {}
impl Snapshottable for Component {}
impl Transportable for Component {}

impl Migratable for Component {
    fn start_dirty_log(&mut self) -> Result<(), MigratableError> {
        *self.0.log.lock().unwrap() = Some(BTreeSet::new());
        Ok(())
    }

    fn stop_dirty_log(&mut self) -> Result<(), MigratableError> {
        *self.0.log.lock().unwrap() = None;
        Ok(())
    }

    fn dirty_log(&mut self) -> Result<MemoryRangeTable, MigratableError> {
        let pages = self.0.log.lock().unwrap().as_mut().map(mem::take).unwrap_or_default();
        let mut table = MemoryRangeTable::default();
        pages.into_iter().for_each(|gpa| table.push(MemoryRange { gpa, length: PAGE_BYTES }));
        Ok(table)
    }
}
