// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What a round is compared with.

use std::hint::black_box;

use vm_memory::bitmap::{AtomicBitmap, Bitmap, NewBitmap};

use crate::pattern::Bits;
use crate::report::milliseconds;

/// Reads both logs once.
pub(crate) fn floor(bits: &Bits) {
    let all = bits.first.iter().zip(&*bits.second).fold(0, |all, (first, second)| all | first | second);
    black_box(all);
}

/// Finds every run of the merged bitmap, and adds up where they begin and end.
pub(crate) fn scalar(bits: &Bits) {
    let mut sum = 0;
    runs(bits.merged.iter().copied(), |start, end| sum += start ^ end);
    black_box(sum);
}

/// Calls `run` with first bit and end of each run of set bits, coalesced across words.
fn runs(words: impl Iterator<Item = u64>, mut run: impl FnMut(u64, u64)) {
    let (mut start, mut end) = (0, 0);
    let mut base = 0;
    for mut word in words {
        while word != 0 {
            let first = u64::from(word.trailing_zeros());
            let length = u64::from((word >> first).trailing_ones());
            if base + first != end {
                if end > start {
                    run(start, end);
                }
                start = base + first;
            }
            end = base + first + length;
            word &= u64::MAX.checked_shl((first + length) as u32).unwrap_or(0);
        }
        base += 64;
    }
    if end > start {
        run(start, end);
    }
}

/// A range of guest memory, as VMMs' tables have it.
#[derive(Clone, Copy)]
pub(crate) struct Dirty {
    gpa: u64,
    length: u64,
}

/// Makes the table the usual way; returns it, and the milliseconds that took.
pub(crate) fn usual(bits: &Bits) -> (Vec<Dirty>, f64) {
    let own = AtomicBitmap::with_len(bits.ram_bytes as usize);
    bits.own.iter().for_each(|page| own.mark_dirty(page << 12, 1));
    let mut table = Vec::new();
    let spent = milliseconds(|| {
        // The kernel's answer comes in a fresh vector.
        let log = bits.first.to_vec();
        let written = own.get_and_reset();
        table = table_of(log.iter().zip(&written).map(|(log, written)| log | written));
        table.extend(table_of(bits.second.iter().copied()));
    });
    (table, spent)
}

fn table_of(words: impl Iterator<Item = u64>) -> Vec<Dirty> {
    let mut table = Vec::new();
    runs(words, |start, end| table.push(Dirty { gpa: start << 12, length: (end - start) << 12 }));
    table
}

/// Whether the usual way's table holds just the pages that are dirty.
pub(crate) fn usual_has(bits: &Bits) -> bool {
    let table = usual(bits).0;
    is(bits, table.iter().map(|dirty| (dirty.gpa, dirty.gpa + dirty.length)))
}

/// Whether the ranges hold just the pages that are dirty.
pub(crate) fn is(bits: &Bits, ranges: impl Iterator<Item = (u64, u64)>) -> bool {
    let mut found = vec![0; bits.merged.len()];
    for (start, end) in ranges {
        (start >> 12..end >> 12).for_each(|page| found[(page / 64) as usize] |= 1_u64 << (page % 64));
    }
    found == bits.merged
}
