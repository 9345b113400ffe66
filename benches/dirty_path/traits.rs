// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A VMM's own loop, which asks the `vm-migration` traits for one table a round, against a round of chunks and a table written once.

use std::hint::black_box;
use std::sync::{Arc, Mutex};

use vfio_migration::device::DeviceSet;
use vfio_migration::migratable::MigratableDevice;
use vm_migration::Migratable;
use vm_migration::protocol::{MemoryRange, MemoryRangeTable};

use crate::contenders::{floor, is};
use crate::ours::{Ours, mark_own};
use crate::pattern::{Bits, Pattern};
use crate::report::{Line, median, milliseconds};

/// What is wanted of the loop's round, against the other.
const MOST: f64 = 1.2;

/// Compares the two at the pattern's bits.
pub(crate) fn measure(pattern: Pattern, ram_bytes: u64, runs: usize) -> Line {
    let bits = Bits::new(pattern, ram_bytes);
    let mut chunks = Ours::new(&bits);
    let (tracker, own) = Ours::tracker(&bits);
    let mut device = MigratableDevice::new(
        "bench",
        Arc::new(Mutex::new(tracker)),
        Arc::new(Mutex::new(DeviceSet::default())),
    );
    device.start_dirty_log().unwrap();
    let mut round = |check: bool| {
        mark_own(&bits, &own);
        floor(&bits);
        let mut table = MemoryRangeTable::default();
        let spent = milliseconds(|| table = device.dirty_log().unwrap());
        if check {
            let ranges = table.regions().iter().map(|range| (range.gpa, range.gpa + range.length));
            assert!(is(&bits, ranges), "the table has just the pages of the pattern");
        }
        (spent, table)
    };
    round(true);
    chunks.round(&bits);
    let times: Vec<_> = (0..runs)
        .map(|_| {
            let (by_traits, table) = round(false);
            floor(&bits);
            let spent = chunks.round(&bits);
            let written = milliseconds(|| {
                black_box(copy_of(&table));
            });
            (by_traits, spent.collect + spent.drain, written)
        })
        .collect();
    let by_traits = median(times.iter().map(|time| time.0));
    let (by_chunks, written) =
        (median(times.iter().map(|time| time.1)), median(times.iter().map(|time| time.2)));
    Line::new(format!("traits {}", pattern.name()), by_traits / (by_chunks + written), MOST)
        .with("table_ms", by_traits)
        .with("round_ms", by_chunks)
        .with("write_table_ms", written)
}

fn copy_of(table: &MemoryRangeTable) -> MemoryRangeTable {
    let mut copy = MemoryRangeTable::default();
    for range in table.regions() {
        copy.push(MemoryRange { gpa: range.gpa, length: range.length });
    }
    copy
}
