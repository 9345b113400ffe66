// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Reads a table whose length is claimed by the input, and partitions what was accepted.

#![no_main]

use libfuzzer_sys::fuzz_target;
use vm_migration::protocol::MemoryRangeTable;

/// Chunks looked at: a range may claim 2^64 bytes, and chunks of it come one by one.
const CHUNKS: usize = 64;

fuzz_target!(|input: &[u8]| {
    let Some((length, rest)) = input.split_first_chunk() else { return };
    let Some((chunk_size, stream)) = rest.split_first_chunk() else { return };
    let length = u64::from_le_bytes(*length);
    let chunk_size = u64::from_le_bytes(*chunk_size).max(1);

    let mut rest = stream;
    let Ok(table) = MemoryRangeTable::read_from(&mut rest, length) else {
        assert!(!length.is_multiple_of(16) || length > stream.len() as u64, "an honest table was refused");
        return;
    };
    assert_eq!(table.length(), length);
    let mut written = Vec::new();
    table.write_to(&mut written).expect("a vector takes all bytes");
    assert_eq!(written, stream[..stream.len() - rest.len()]);
    check_partition(&table, chunk_size);
});

/// Checks that the first chunks are full and go on, byte for byte, where the one before ended.
fn check_partition(table: &MemoryRangeTable, chunk_size: u64) {
    let mut expected = table.ranges().iter().filter(|range| range.length > 0).copied();
    let mut left = expected.next();
    let mut chunks = table.clone().partition(chunk_size);
    for chunk in chunks.by_ref().take(CHUNKS) {
        assert!(chunk.effective_size() <= chunk_size);
        for range in chunk.ranges() {
            let whole = left.as_mut().expect("a chunk names only what the table names");
            assert_eq!(range.gpa, whole.gpa);
            assert!(0 < range.length && range.length <= whole.length);
            whole.gpa = whole.gpa.wrapping_add(range.length);
            whole.length -= range.length;
            if whole.length == 0 {
                left = expected.next();
            }
        }
        assert!(chunk.effective_size() == chunk_size || left.is_none());
    }
    assert!(left.is_none() || chunks.next().is_some(), "memory was lost");
}
