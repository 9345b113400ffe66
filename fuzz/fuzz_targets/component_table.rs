// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Tables that a component of the VMM hands out as its dirty log.
#![no_main]

use std::sync::{Arc, Mutex};

use libfuzzer_sys::fuzz_target;
use vfio_migration::granule::Granule;
use vfio_migration::iova::IovaMap;
use vfio_migration::layout::Layout;
use vfio_migration::ledger::{ChunkLimits, Ledger, Start};
use vfio_migration::range::GpaRange;
use vfio_migration::source::{DirtySource, MigratableLog};
use vm_migration::protocol::{MemoryRange, MemoryRangeTable};
use vm_migration::{Migratable, MigratableError, Pausable, Snapshottable, Transportable};

const PAGE: u64 = 4096;

/// Pages of RAM, the last ones at the end of the address space.
const RAM: [(u64, u64); 3] = [(0, 130), (200, 64), ((1 << 52) - 10, 9)];

/// A component that was always written as one table says.
struct Component(MemoryRangeTable);

impl Pausable for Component {}
impl Snapshottable for Component {}
impl Transportable for Component {}
impl Migratable for Component {
    fn dirty_log(&mut self) -> Result<MemoryRangeTable, MigratableError> {
        Ok(self.0.clone())
    }
}

/// Reads ranges of 16 bytes; an odd address stands for one near RAM.
fn table(input: &[u8]) -> MemoryRangeTable {
    let mut table = MemoryRangeTable::default();
    for entry in input.chunks_exact(16) {
        let word = |at: usize| u64::from_le_bytes(entry[at..at + 8].try_into().expect("eight bytes"));
        let near = |value: u64| if word(0) & 1 == 1 { value % (300 * PAGE) } else { value };
        table.push(MemoryRange { gpa: near(word(0)), length: near(word(8)) });
    }
    table
}

fuzz_target!(|input: &[u8]| {
    let table = table(input);
    let ranges: Vec<_> =
        table.ranges().iter().map(|range| (range.gpa, range.gpa.checked_add(range.length))).collect();
    let regions = RAM.map(|(page, pages)| GpaRange::new(page * PAGE, pages * PAGE).expect("RAM"));
    let layout = Layout::new(regions, Granule::KIB_4).expect("a layout");
    let mut log = MigratableLog::new("component", Arc::new(Mutex::new(Component(table))));
    log.start(&layout, &IovaMap::Identity).expect("it starts");
    let mut ledger = Ledger::new(layout, 1);
    let cursor = ledger.open(Start::Copied);
    let answer = log.collect(&mut ledger.sink(0, &IovaMap::Identity));
    assert_eq!(
        answer.is_err(),
        ranges.iter().any(|(_, end)| end.is_none()),
        "a table is refused if a range wraps"
    );
    if answer.is_err() {
        return;
    }
    ledger.absorb();
    let chunk = ledger.take(cursor, ChunkLimits::NONE);
    let marked = |page: u64| {
        chunk.as_ref().is_some_and(|chunk| chunk.ranges().iter().any(|range| range.contains(page * PAGE)))
    };
    for page in RAM.into_iter().flat_map(|(first, pages)| first..first + pages) {
        let (start, last) = (page * PAGE, page * PAGE + (PAGE - 1));
        let named =
            ranges.iter().any(|&(gpa, end)| end.is_some_and(|end| end > gpa && gpa <= last && start < end));
        assert_eq!(marked(page), named, "page {page:#x}");
    }
});
