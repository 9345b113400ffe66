// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Guest memory allocated a piece ahead of the bytes that fill it.
//!
//! Bytes that arrive in memory nobody has touched fault page by page. One system call for a piece costs the kernel less than
//! that. Nothing but what a source has announced is allocated, and only a piece at a time: holes stay holes, and a source that
//! announces much and sends little costs little.

use std::sync::atomic::{AtomicU64, Ordering};

use vm_memory::{GuestAddress, GuestMemoryBackend};

use super::through_file::{Hole, MemoryFiles};
use crate::layout::Layout;
use crate::range::GpaRange;
use crate::sys::guest::allocate;

/// Bytes allocated before the first of them has come, and a multiple of which they begin at.
const PIECE_BYTES: u64 = 1 << 20;

/// Bytes of a range below which page faults cost no more than the call.
const LEAST_BYTES: u64 = 64 << 10;

/// Which memory needs no readying any more.
#[derive(Debug)]
pub(super) struct Ahead {
    regions: Vec<Pieces>,
    files: MemoryFiles,
    bytes: AtomicU64,
}

impl Ahead {
    /// Takes all RAM of `layout` for untouched, but for what `files` show.
    pub(super) fn new(layout: &Layout, files: MemoryFiles) -> Self {
        let regions = layout.regions().iter().map(|region| Pieces::new(region.range()));
        Self { regions: regions.collect(), files, bytes: AtomicU64::new(0) }
    }

    /// Readies `range`, a [`Piece::Long`], for its bytes: returns the hole of a file that they go into, or has the kernel allocate
    /// the memory, unless that was done before.
    ///
    /// What cannot be allocated is left to whoever writes it, who gets to know why.
    pub(super) fn ready<M: GuestMemoryBackend>(&self, memory: &M, range: GpaRange) -> Option<Hole<'_>> {
        let region = self.regions.iter().find(|region| region.gpa.covers(range))?;
        if region.is_ready(range) {
            return None;
        }
        let hole = self.files.hole(range);
        // What of a file is no hole was allocated by whoever wrote it.
        let allocated = || !self.files.cover(range) && allocate_all(memory, range);
        if hole.is_some() || allocated() {
            self.bytes.fetch_add(range.len(), Ordering::Relaxed);
        }
        region.note(range);
        hole
    }

    /// Bytes readied so far.
    pub(super) fn bytes(&self) -> u64 {
        self.bytes.load(Ordering::Relaxed)
    }
}

/// What of a table is received in one go.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Piece {
    /// Long enough to ready its memory first, and in one of the stretches that multiples of [`PIECE_BYTES`] bound.
    Long(GpaRange),
    /// Ranges that are too short for that, [`PIECE_BYTES`] in all at most.
    Short(Vec<GpaRange>),
}

/// Groups `ranges` into pieces, in their order; a range that crosses a multiple of [`PIECE_BYTES`] is cut there.
pub(super) fn pieces(ranges: impl Iterator<Item = GpaRange>) -> impl Iterator<Item = Piece> {
    let is_short = |range: &GpaRange| range.len() < LEAST_BYTES;
    let mut parts = ranges.flat_map(parts).peekable();
    std::iter::from_fn(move || {
        let first = parts.next()?;
        if !is_short(&first) {
            return Some(Piece::Long(first));
        }
        let (mut piece, mut bytes) = (vec![first], first.len());
        while let Some(part) = parts.next_if(|part| is_short(part) && bytes + part.len() <= PIECE_BYTES) {
            bytes += part.len();
            piece.push(part);
        }
        Some(Piece::Short(piece))
    })
}

/// Has the kernel allocate `range`; returns whether it did.
fn allocate_all<M: GuestMemoryBackend>(memory: &M, range: GpaRange) -> bool {
    let length = usize::try_from(range.len()).unwrap_or(usize::MAX);
    memory
        .get_slices(GuestAddress(range.start()), length)
        .all(|slice| slice.is_ok_and(|slice| allocate(&slice).is_ok()))
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

/// A bit for each [`PIECE_BYTES`] of a region: whether all of it was readied.
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

    /// Whether all of the piece that `range` is in was readied.
    fn is_ready(&self, range: GpaRange) -> bool {
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
        let parts_of = |piece: &Piece| match piece {
            Piece::Long(part) => vec![*part],
            Piece::Short(parts) => parts.clone(),
        };
        let bytes = |piece: &Piece| parts_of(piece).iter().map(|part| part.len()).sum::<u64>();
        assert!(pieces.iter().all(|piece| bytes(piece) <= PIECE_BYTES));
        assert!(pieces.iter().all(|piece| matches!(piece, Piece::Long(_)) == (bytes(piece) >= LEAST_BYTES)));
        let mut joined: Vec<GpaRange> = Vec::new();
        for part in pieces.iter().flat_map(parts_of) {
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
    fn a_piece_is_allocated_once() {
        let memory = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(PAGE), 4 << 20)]).unwrap();
        let ahead = Ahead::new(&Layout::from_guest_memory(&memory).unwrap(), MemoryFiles::default());
        let whole = range(PIECE_BYTES, PIECE_BYTES);
        for _ in 0..2 {
            assert!(ahead.ready(&memory, whole).is_none());
            assert_eq!(ahead.bytes(), PIECE_BYTES);
        }
        ahead.ready(&memory, range(PIECE_BYTES + PAGE, PAGE));
        assert_eq!(ahead.bytes(), PIECE_BYTES, "it is part of the piece");
        ahead.ready(&memory, range(PAGE, PAGE));
        assert_eq!(ahead.bytes(), PIECE_BYTES + PAGE);
        for nowhere in [range(0, PIECE_BYTES), range(u64::MAX - PIECE_BYTES, PIECE_BYTES)] {
            assert!(ahead.ready(&memory, nowhere).is_none());
        }
        assert_eq!(ahead.bytes(), PIECE_BYTES + PAGE, "no memory is there");
    }
}
