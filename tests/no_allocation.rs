// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Once warm, a round allocates nothing: not in the sources, not in the ledger, not in its chunks.
#![expect(unsafe_code, reason = "a global allocator that counts")]

use std::alloc::{GlobalAlloc, Layout as Allocation, System};
use std::cell::Cell;
use std::sync::Arc;

use vfio_migration::granule::Granule;
use vfio_migration::iova::IovaMap;
use vfio_migration::layout::Layout;
use vfio_migration::ledger::{ChunkLimits, Start};
use vfio_migration::range::GpaRange;
use vfio_migration::source::{Cover, DirtySource, GuestMemoryLog, Reports, Sink, SourceError, SummaryBitmap};
use vfio_migration::tracker::{Tracker, VmMappings};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

thread_local! {
    static ALLOCATIONS: Cell<u64> = const { Cell::new(0) };
}

struct Counting;

// SAFETY: every call goes to the system's allocator unchanged.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Allocation) -> *mut u8 {
        ALLOCATIONS.with(|count| count.set(count.get() + 1));
        // SAFETY: the caller's promises are passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Allocation) {
        // SAFETY: the caller's promises are passed on.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static COUNTING: Counting = Counting;

/// A device log that reports a fixed pattern from a buffer it keeps.
struct Pattern {
    id: &'static str,
    words: Vec<u64>,
    range: GpaRange,
    granule: Granule,
}

impl DirtySource for Pattern {
    fn id(&self) -> &str {
        self.id
    }

    fn reports(&self) -> Reports {
        Reports::Component
    }

    fn cover(&self) -> Cover {
        Cover { ranges: vec![self.range], precise: true }
    }

    fn start(&mut self, _layout: &Layout, _iova: &IovaMap) -> Result<(), SourceError> {
        Ok(())
    }

    fn collect<'a>(&'a mut self, sink: &mut Sink<'a>) -> Result<(), SourceError> {
        sink.lend_gpa_words(self.range, self.granule, &self.words, None)
            .expect("as many words as the range has bits");
        Ok(())
    }

    fn stop(&mut self) -> Result<(), SourceError> {
        Ok(())
    }
}

fn round(
    vm: &mut Tracker,
    memory: &GuestMemoryMmap<SummaryBitmap>,
    cursor: vfio_migration::ledger::CursorId,
) -> u64 {
    for page in (0..8192u64).step_by(37) {
        memory.write_obj(page, GuestAddress(page << 12)).expect("inside RAM");
    }
    assert!(vm.collect().is_empty());
    vm.begin_round(cursor);
    let limits = ChunkLimits { bytes: 1 << 20, ranges: 64 };
    let mut taken = 0;
    let mut in_flight: [Option<vfio_migration::ledger::Chunk>; 4] = [const { None }; 4];
    while let Some(chunk) = vm.take(cursor, limits).expect("nothing to clear") {
        taken += chunk.bytes();
        in_flight.rotate_right(1);
        if let Some(acknowledged) = in_flight[0].replace(chunk) {
            vm.commit(acknowledged);
        }
    }
    for chunk in in_flight.into_iter().flatten() {
        vm.commit(chunk);
    }
    taken
}

#[test]
fn a_warm_round_allocates_nothing() {
    let memory: Arc<GuestMemoryMmap<SummaryBitmap>> =
        Arc::new(GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 32 << 20)]).expect("memory"));
    let layout = Layout::from_guest_memory(&*memory).expect("one region");
    let coarse = Pattern {
        id: "coarse",
        words: vec![0x0010_0200_8000_0401; 2],
        range: GpaRange::new(0, 8 << 20).expect("a range"),
        granule: Granule::new(64 << 10).expect("a power of two"),
    };
    let lent = Pattern {
        id: "lent",
        words: vec![0x0010_0200_8000_0401; 64],
        range: GpaRange::new(8 << 20, 16 << 20).expect("a range"),
        granule: Granule::host_page(),
    };
    let maps = Arc::clone(&memory);
    let mut vm = Tracker::builder(layout)
        .mappings(move || VmMappings::of_memory(&*maps))
        .source(Box::new(GuestMemoryLog::new(Arc::clone(&memory))))
        .source(Box::new(coarse))
        .source(Box::new(lent))
        .build()
        .expect("two names");
    let cursor = vm.begin(Start::Copied).expect("sources start");
    let first = round(&mut vm, &memory, cursor);
    round(&mut vm, &memory, cursor);
    let before = ALLOCATIONS.with(Cell::get);
    for _ in 0..20 {
        assert_eq!(round(&mut vm, &memory, cursor), first);
    }
    assert_eq!(ALLOCATIONS.with(Cell::get) - before, 0, "allocations in twenty rounds");
    assert!(first > 0);
}
