// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Guest memory allocated a piece ahead of the bytes that fill it.
//!
//! Bytes that arrive in memory nobody has touched fault page by page. One system call for a piece costs the kernel about half of
//! that. Nothing but what a source has announced is allocated, and only a piece at a time: holes stay holes, and a source that
//! announces much and sends little costs little.

use std::sync::atomic::{AtomicU64, Ordering};

use vm_memory::{GuestAddress, GuestMemoryBackend};

use crate::layout::Layout;
use crate::range::GpaRange;
use crate::sys::guest::allocate;

/// Bytes allocated before the first of them has come, and a multiple of which they begin at.
const PIECE_BYTES: u64 = 1 << 20;

/// Bytes of a range below which page faults cost no more than the call.
const LEAST_BYTES: u64 = 64 << 10;

/// Which memory needs no allocating any more.
#[derive(Debug)]
pub(super) struct Ahead {
    regions: Vec<Pieces>,
    bytes: AtomicU64,
}

impl Ahead {
    /// Takes all RAM of `layout` for untouched.
    pub(super) fn new(layout: &Layout) -> Self {
        let regions = layout.regions().iter().map(|region| Pieces::new(region.range()));
        Self { regions: regions.collect(), bytes: AtomicU64::new(0) }
    }

    /// Has the kernel allocate the long ones of `ranges`, a piece of [`pieces`], unless that was done before.
    ///
    /// What cannot be allocated is left to whoever writes it, who gets to know why.
    pub(super) fn allocate<M: GuestMemoryBackend>(&self, memory: &M, ranges: &[GpaRange]) {
        for &range in ranges.iter().filter(|range| range.len() >= LEAST_BYTES) {
            let Some(region) = self.regions.iter().find(|region| region.gpa.covers(range)) else { continue };
            let length = usize::try_from(range.len()).unwrap_or(usize::MAX);
            let mut slices = memory.get_slices(GuestAddress(range.start()), length).map_while(Result::ok);
            if !region.is_allocated(range) && slices.all(|slice| allocate(&slice).is_ok()) {
                region.note(range);
                self.bytes.fetch_add(range.len(), Ordering::Relaxed);
            }
        }
    }

    /// Bytes allocated so far.
    pub(super) fn bytes(&self) -> u64 {
        self.bytes.load(Ordering::Relaxed)
    }
}

/// Groups `ranges` into pieces, in their order; a range that crosses a multiple of [`PIECE_BYTES`] is cut there.
pub(super) fn pieces(ranges: impl Iterator<Item = GpaRange>) -> impl Iterator<Item = Vec<GpaRange>> {
    let mut parts = ranges.flat_map(parts).peekable();
    std::iter::from_fn(move || {
        let first = parts.next()?;
        let (mut piece, mut bytes) = (vec![first], first.len());
        while let Some(part) = parts.next_if(|part| bytes + part.len() <= PIECE_BYTES) {
            bytes += part.len();
            piece.push(part);
        }
        Some(piece)
    })
}

/// Cuts `range` at each multiple of [`PIECE_BYTES`].
fn parts(range: GpaRange) -> impl Iterator<Item = GpaRange> {
    let mut start = range.start();
    std::iter::from_fn(move || {
        let end = (start / PIECE_BYTES + 1).saturating_mul(PIECE_BYTES).min(range.end());
        let part = GpaRange::from_bounds(start, end).ok()?;
        start = end;
        Some(part)
    })
}

/// A bit for each [`PIECE_BYTES`] of a region: whether all of it was allocated.
#[derive(Debug)]
struct Pieces {
    gpa: GpaRange,
    words: Box<[AtomicU64]>,
}

impl Pieces {
    fn new(gpa: GpaRange) -> Self {
        let pieces = gpa.end().div_ceil(PIECE_BYTES) - gpa.start() / PIECE_BYTES;
        Self { gpa, words: (0..pieces.div_ceil(64)).map(|_| AtomicU64::new(0)).collect() }
    }

    /// Whether all of the piece that `range` is in was allocated.
    fn is_allocated(&self, range: GpaRange) -> bool {
        let (word, bit) = self.bit(range);
        word.load(Ordering::Relaxed) & bit != 0
    }

    /// Notes that `range` was, if it is a whole piece.
    fn note(&self, range: GpaRange) {
        if range.len() == PIECE_BYTES {
            let (word, bit) = self.bit(range);
            word.fetch_or(bit, Ordering::Relaxed);
        }
    }

    fn bit(&self, range: GpaRange) -> (&AtomicU64, u64) {
        let piece = range.start() / PIECE_BYTES - self.gpa.start() / PIECE_BYTES;
        let word = usize::try_from(piece / 64).expect("a word of a region that fits this process");
        (&self.words[word], 1 << (piece % 64))
    }
}

#[cfg(test)]
mod tests {
    use vm_memory::GuestMemoryMmap;

    use super::*;

    const PAGE: u64 = 64 << 10;

    fn range(start: u64, length: u64) -> GpaRange {
        GpaRange::new(start, length).unwrap()
    }

    #[test]
    fn pieces_hold_every_byte_in_order_and_none_is_larger_than_one() {
        let ranges =
            [range(0, 3 * PIECE_BYTES), range(PIECE_BYTES / 2, PIECE_BYTES), range(8, 1), range(0, 1)];
        let pieces: Vec<_> = pieces(ranges.into_iter()).collect();
        assert!(pieces.iter().all(|piece| piece.iter().map(|part| part.len()).sum::<u64>() <= PIECE_BYTES));
        let mut joined: Vec<GpaRange> = Vec::new();
        for part in pieces.into_iter().flatten() {
            match joined.last_mut() {
                Some(last) if last.end() == part.start() && part.start() % PIECE_BYTES == 0 => {
                    *last = GpaRange::from_bounds(last.start(), part.end()).unwrap();
                }
                _ => joined.push(part),
            }
        }
        assert_eq!(joined, ranges);
    }

    #[test]
    fn a_piece_is_allocated_once_and_a_short_range_is_left_to_faults() {
        let memory = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(PAGE), 4 << 20)]).unwrap();
        let ahead = Ahead::new(&Layout::from_guest_memory(&memory).unwrap());
        let whole = range(PIECE_BYTES, PIECE_BYTES);
        for _ in 0..2 {
            ahead.allocate(&memory, &[whole]);
            assert_eq!(ahead.bytes(), PIECE_BYTES);
        }
        ahead.allocate(&memory, &[range(PIECE_BYTES + PAGE, PAGE), range(2 * PIECE_BYTES, PAGE / 2)]);
        assert_eq!(ahead.bytes(), PIECE_BYTES, "the first is part of it, the second too short");
        ahead.allocate(&memory, &[range(PAGE, PAGE)]);
        assert_eq!(ahead.bytes(), PIECE_BYTES + PAGE);
        ahead.allocate(&memory, &[range(0, PIECE_BYTES), range(u64::MAX - PIECE_BYTES, PIECE_BYTES)]);
        assert_eq!(ahead.bytes(), PIECE_BYTES + PAGE, "no memory is there");
    }
}
