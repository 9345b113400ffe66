// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Laws of `MemoryRangeTable` against naive oracles.

use proptest::collection::vec;
use proptest::prelude::*;
use vm_migration::protocol::{MemoryRange, MemoryRangeTable};

const PAGE_SIZES: [u64; 6] = [1, 512, 0x1000, 0x1_0000, 0x20_0000, 12_345];

/// Words as dirty logs have them: long clean and dirty stretches, lone bits, edges, and noise.
fn words() -> impl Strategy<Value = Vec<u64>> {
    let word = prop_oneof![
        4 => Just(0),
        4 => Just(u64::MAX),
        2 => (0..64u32).prop_map(|bit| 1 << bit),
        2 => (0..64u32).prop_map(|bit| u64::MAX << bit),
        2 => (0..64u32).prop_map(|bit| u64::MAX >> bit),
        4 => any::<u64>(),
    ];
    vec(word, 0..24)
}

fn tables() -> impl Strategy<Value = MemoryRangeTable> {
    let range = (0..0x1_0000u64, 0..200u64).prop_map(|(gpa, length)| MemoryRange { gpa, length });
    vec(range, 0..20).prop_map(|ranges| {
        let mut table = MemoryRangeTable::default();
        ranges.into_iter().for_each(|range| table.push(range));
        table
    })
}

/// Walks the bitmap page by page and joins a page to the range before it if that ends where it begins.
fn ranges_page_by_page(words: &[u64], start_addr: u64, page_size: u64) -> Vec<MemoryRange> {
    let mut ranges: Vec<MemoryRange> = Vec::new();
    for page in 0..words.len() as u64 * 64 {
        if words[(page / 64) as usize] >> (page % 64) & 1 == 0 {
            continue;
        }
        let gpa = start_addr + page * page_size;
        match ranges.last_mut() {
            Some(last) if last.gpa + last.length == gpa => last.length += page_size,
            _ => ranges.push(MemoryRange { gpa, length: page_size }),
        }
    }
    ranges
}

/// Lists every byte the table names, in order.
fn bytes_of(table: &MemoryRangeTable) -> Vec<u64> {
    table.ranges().iter().flat_map(|range| range.gpa..range.gpa + range.length).collect()
}

proptest! {
    #[test]
    fn a_dirty_bitmap_makes_the_ranges_of_a_walk_page_by_page(
        words in words(),
        start_addr in prop_oneof![Just(0), Just(0x1_0000_0000), 0..1u64 << 52],
        page_size in prop_oneof![prop::sample::select(&PAGE_SIZES[..]), 1..1u64 << 30],
    ) {
        let table = MemoryRangeTable::from_dirty_bitmap(words.iter().copied(), start_addr, page_size);
        prop_assert_eq!(table.ranges(), ranges_page_by_page(&words, start_addr, page_size));
    }

    #[test]
    fn the_effective_size_of_a_bitmap_is_its_population(words in words()) {
        let dirty_pages: u64 = words.iter().map(|word| u64::from(word.count_ones())).sum();
        let table = MemoryRangeTable::from_dirty_bitmap(words, 0x1000, 0x1000);
        prop_assert_eq!(table.effective_size(), dirty_pages * 0x1000);
    }

    #[test]
    fn a_partition_names_every_byte_in_order(table in tables(), chunk_size in 1..300u64) {
        let partitioned: Vec<u64> =
            table.clone().partition(chunk_size).flat_map(|chunk| bytes_of(&chunk)).collect();
        prop_assert_eq!(partitioned, bytes_of(&table));
    }

    #[test]
    fn every_chunk_but_the_last_is_full_and_none_holds_an_empty_range(
        table in tables(),
        chunk_size in prop_oneof![1..300u64, Just(u64::MAX)],
    ) {
        let chunks: Vec<_> = table.partition(chunk_size).collect();
        for (index, chunk) in chunks.iter().enumerate() {
            prop_assert!(chunk.ranges().iter().all(|range| range.length > 0));
            prop_assert!(!chunk.is_empty() && chunk.effective_size() <= chunk_size);
            prop_assert!(index + 1 == chunks.len() || chunk.effective_size() == chunk_size);
        }
    }

    #[test]
    fn pages_split_by_any_chunk_size_stay_whole_together(
        words in words(),
        chunk_size in prop_oneof![
            0x1000..0x10_0000u64,
            // Less than a page; large enough that the chunks stay few.
            0x200..0x1000u64,
            (1..64u64).prop_map(|pages| pages * 0x1000),
        ],
    ) {
        let table = MemoryRangeTable::from_dirty_bitmap(words, 0, 0x1000);
        let mut rejoined: Vec<MemoryRange> = Vec::new();
        for chunk in table.clone().partition(chunk_size) {
            prop_assert!(chunk.effective_size() <= chunk_size);
            for &range in chunk.ranges() {
                match rejoined.last_mut() {
                    Some(last) if last.gpa + last.length == range.gpa => last.length += range.length,
                    _ => rejoined.push(range),
                }
            }
        }
        prop_assert_eq!(rejoined, table.ranges());
    }

    #[test]
    fn a_table_is_read_as_it_was_written(table in tables()) {
        let mut bytes = Vec::new();
        table.write_to(&mut bytes).unwrap();
        prop_assert_eq!(bytes.len() as u64, table.length());
        let read = MemoryRangeTable::read_from(&mut bytes.as_slice(), table.length()).unwrap();
        prop_assert_eq!(read.ranges(), table.ranges());
    }

    #[test]
    fn reading_a_table_leaves_what_follows_it(table in tables(), tail in vec(any::<u8>(), 0..40)) {
        let mut bytes = Vec::new();
        table.write_to(&mut bytes).unwrap();
        bytes.extend(&tail);
        let mut stream = bytes.as_slice();
        MemoryRangeTable::read_from(&mut stream, table.length()).unwrap();
        prop_assert_eq!(stream, tail);
    }
}
