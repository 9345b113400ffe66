// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The VMM's own writes: the dirty bitmap inside vm-memory's guest memory.

use std::sync::atomic::{AtomicU64, Ordering};

use vm_memory::bitmap::{AtomicBitmap, Bitmap, NewBitmap, RefSlice, WithBitmapSlice};
use vm_memory::{Address, GuestAddressSpace, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

use super::{Cover, DirtySource, Reports, Sink, SourceError};
use crate::bitmap::{BLOCK_WORDS, WORD_BITS, masks};
use crate::granule::Granule;
use crate::iova::IovaMap;
use crate::layout::Layout;
use crate::range::GpaRange;

/// A region's dirty bitmap, one bit per host page, that can be read and cleared in one step.
pub trait TakeDirtyWords: Bitmap {
    /// Clears the bitmap, handing each stretch of words that may hold a bit to `report` with the index of its first word.
    fn take_dirty_words(&self, report: &mut dyn FnMut(usize, &[u64]));
}

/// Allocates the words it hands over: vm-memory returns them as a fresh vector.
impl TakeDirtyWords for AtomicBitmap {
    fn take_dirty_words(&self, report: &mut dyn FnMut(usize, &[u64])) {
        report(0, &self.get_and_reset());
    }
}

/// Words under one bit of a [`SummaryBitmap`]'s upper level.
const WORDS: usize = BLOCK_WORDS;

/// A dirty bitmap for vm-memory with a summary level: taking an idle one reads a word per 128 MiB of 4 KiB pages, and allocates nothing.
///
/// A drop-in for [`AtomicBitmap`] as the `B` of `GuestMemoryMmap<B>`.
#[derive(Debug, Default)]
pub struct SummaryBitmap {
    levels: Levels,
    page_shift: u32,
}

/// Bits, and above each block of words one that says whether it may hold any.
#[derive(Debug, Default)]
struct Levels {
    words: Vec<AtomicU64>,
    summary: Vec<AtomicU64>,
}

impl Levels {
    fn new(words: usize) -> Self {
        let words = words.next_multiple_of(WORDS);
        let zeros = |count| std::iter::repeat_with(AtomicU64::default).take(count).collect();
        Self { words: zeros(words), summary: zeros((words / WORDS).div_ceil(WORD_BITS)) }
    }

    /// Sets bits of a word.
    ///
    /// The word is marked before the summary and always by a read-modify-write: that orders the guest-memory write before
    /// whoever takes the bit.
    #[inline(always)]
    fn mark(&self, word: usize, mask: u64) {
        self.words[word].fetch_or(mask, Ordering::SeqCst);
        let block = word / WORDS;
        let (above, bit) = (&self.summary[block / WORD_BITS], 1 << (block % WORD_BITS));
        if above.load(Ordering::SeqCst) & bit == 0 {
            above.fetch_or(bit, Ordering::SeqCst);
        }
    }

    /// Hands over all bits and clears them, a block at a time.
    ///
    /// The summary is taken before the words under it: a mark that comes in between is taken now or reported next time.
    fn take(&self, report: &mut dyn FnMut(usize, &[u64])) {
        for (index, above) in self.summary.iter().enumerate() {
            // Most are zero, and to read a word costs less than to exchange it.
            if above.load(Ordering::SeqCst) == 0 {
                continue;
            }
            let mut blocks = above.swap(0, Ordering::SeqCst);
            while blocks != 0 {
                let first = (index * WORD_BITS + blocks.trailing_zeros() as usize) * WORDS;
                let words: [u64; WORDS] =
                    std::array::from_fn(|word| self.words[first + word].swap(0, Ordering::SeqCst));
                report(first, &words);
                blocks &= blocks - 1;
            }
        }
    }
}

/// A [`SummaryBitmap`] seen from an offset.
pub type SummarySlice<'a> = RefSlice<'a, SummaryBitmap>;

impl NewBitmap for SummaryBitmap {
    fn with_len(len: usize) -> Self {
        let page_shift = Granule::host_page().shift();
        let pages = len.div_ceil(1 << page_shift);
        Self { levels: Levels::new(pages.div_ceil(WORD_BITS)), page_shift }
    }
}

impl<'a> WithBitmapSlice<'a> for SummaryBitmap {
    type S = SummarySlice<'a>;
}

impl Bitmap for SummaryBitmap {
    /// Marks the pages; those past the end are ignored, as vm-memory's own bitmap does.
    fn mark_dirty(&self, offset: usize, len: usize) {
        if len == 0 {
            return;
        }
        let (first, last) = (offset >> self.page_shift, offset.saturating_add(len - 1) >> self.page_shift);
        if first == last {
            if first < self.levels.words.len() * WORD_BITS {
                self.levels.mark(first / WORD_BITS, 1 << (first % WORD_BITS));
            }
            return;
        }
        let end = (last + 1).min(self.levels.words.len() * WORD_BITS);
        for (word, mask) in masks(first.min(end)..end) {
            self.levels.mark(word, mask);
        }
    }

    fn dirty_at(&self, offset: usize) -> bool {
        let page = offset >> self.page_shift;
        let word = self.levels.words.get(page / WORD_BITS);
        word.is_some_and(|word| word.load(Ordering::SeqCst) >> (page % WORD_BITS) & 1 == 1)
    }

    fn slice_at(&self, offset: usize) -> SummarySlice<'_> {
        RefSlice::new(self, offset)
    }
}

impl TakeDirtyWords for SummaryBitmap {
    fn take_dirty_words(&self, report: &mut dyn FnMut(usize, &[u64])) {
        self.levels.take(report);
    }
}

/// The VMM's own writes to guest memory: device models, loaders, anything that writes through vm-memory.
///
/// Over an `Arc` the memory is fixed; a VM whose RAM changes hands over what tells the memory of the moment, as vm-memory's
/// `GuestMemoryAtomic` does.
#[derive(Debug)]
pub struct GuestMemoryLog<A> {
    memory: A,
}

const ID: &str = "vmm-writes";

impl<A, B> GuestMemoryLog<A>
where
    A: GuestAddressSpace<M = GuestMemoryMmap<B>>,
    B: TakeDirtyWords + Send + Sync,
{
    /// Makes the source for `memory`. The bitmap is part of the memory and always on.
    pub fn new(memory: A) -> Self {
        Self { memory }
    }

    /// Takes every region's words, handing over the pages they speak of, cut to the region.
    fn take(&self, mut report: impl FnMut(GpaRange, &[u64])) {
        let page = Granule::host_page();
        for region in self.memory.memory().iter() {
            let end = region.start_addr().raw_value() + region.len();
            (**region).bitmap().take_dirty_words(&mut |first, words| {
                let start = region.start_addr().raw_value() + ((first * WORD_BITS) as u64 * page.bytes());
                let spoken = start + (words.len() * WORD_BITS) as u64 * page.bytes();
                if let Ok(range) = GpaRange::from_bounds(start, spoken.min(end)) {
                    report(range, words);
                }
            });
        }
    }
}

impl<A, B> DirtySource for GuestMemoryLog<A>
where
    A: GuestAddressSpace<M = GuestMemoryMmap<B>> + Send,
    B: TakeDirtyWords + Send + Sync,
{
    fn id(&self) -> &str {
        ID
    }

    fn reports(&self) -> Reports {
        Reports::Vmm
    }

    fn cover(&self) -> Cover {
        let mut ranges = Vec::new();
        for region in self.memory.memory().iter() {
            ranges.extend(GpaRange::new(region.start_addr().raw_value(), region.len()));
        }
        Cover { ranges, precise: true }
    }

    /// Forgets what was written before.
    fn start(&mut self, _layout: &Layout, _iova: &IovaMap) -> Result<(), SourceError> {
        self.take(|_, _| {});
        Ok(())
    }

    fn collect(&mut self, sink: &mut Sink<'_>) -> Result<(), SourceError> {
        self.take(|range, words| {
            sink.gpa_words(range, Granule::host_page(), words).expect("the range is cut to the words");
        });
        Ok(())
    }

    fn stop(&mut self) -> Result<(), SourceError> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use proptest::prelude::*;
    use vm_memory::{Bytes, GuestAddress};

    use super::*;
    use crate::ledger::{ChunkLimits, Ledger, Start};

    fn memory<B: NewBitmap>() -> Arc<GuestMemoryMmap<B>> {
        let regions = [(GuestAddress(0), 700 << 12), (GuestAddress(4 << 30), 3 << 12)];
        Arc::new(GuestMemoryMmap::from_ranges(&regions).unwrap())
    }

    fn dirty<B: TakeDirtyWords + NewBitmap + Send + Sync>(writes: &[(u64, usize)]) -> Vec<GpaRange> {
        let memory = memory::<B>();
        memory.write_slice(&[1; 9], GuestAddress(0)).unwrap();
        let layout = Layout::from_guest_memory(&*memory).unwrap();
        let mut source = GuestMemoryLog::new(Arc::clone(&memory));
        source.start(&layout, &IovaMap::Identity).unwrap();
        for &(gpa, len) in writes {
            let _past_the_end = memory.write(&vec![7; len], GuestAddress(gpa));
        }
        let mut ledger = Ledger::new(layout, 1);
        let cursor = ledger.open(Start::Copied);
        source.collect(&mut ledger.sink(0, &IovaMap::Identity)).unwrap();
        ledger.absorb();
        let first = ledger.take(cursor, ChunkLimits::NONE).map(|chunk| chunk.ranges().to_vec());
        source.collect(&mut ledger.sink(0, &IovaMap::Identity)).unwrap();
        ledger.absorb();
        ledger.begin_round(cursor);
        assert!(ledger.take(cursor, ChunkLimits::NONE).is_none(), "a second collect finds nothing");
        first.unwrap_or_default()
    }

    proptest! {
        #[test]
        fn both_bitmaps_report_just_the_pages_written(
            writes in prop::collection::vec((prop_oneof![0..700u64 << 12, (4u64 << 30)..(4u64 << 30) + (3 << 12)], 1..9000usize), 0..12),
        ) {
            let mut pages = std::collections::BTreeSet::new();
            for &(gpa, len) in &writes {
                let region_end = if gpa < 1 << 32 { 700 << 12 } else { (4 << 30) + (3 << 12) };
                let end = (gpa + len as u64).min(region_end);
                pages.extend((gpa >> 12)..end.div_ceil(1 << 12));
            }
            for found in [dirty::<AtomicBitmap>(&writes), dirty::<SummaryBitmap>(&writes)] {
                let found: Vec<u64> = found.iter().flat_map(|range| (range.start() >> 12)..(range.end() >> 12)).collect();
                prop_assert_eq!(&found, &pages.iter().copied().collect::<Vec<_>>());
            }
        }
    }

    #[test]
    fn marks_beside_a_taking_thread_are_never_lost() {
        let bitmap = SummaryBitmap::with_len(64 << 12);
        let total: u32 = std::thread::scope(|scope| {
            let marker = scope.spawn(|| {
                for round in 0..20_000usize {
                    let page = round % 64;
                    while bitmap.dirty_at(page << 12) {
                        std::thread::yield_now();
                    }
                    bitmap.mark_dirty(page << 12, 1);
                }
            });
            let mut total = 0;
            let mut take = || {
                bitmap.take_dirty_words(&mut |_, words| {
                    total += words.iter().map(|w| w.count_ones()).sum::<u32>();
                });
            };
            while !marker.is_finished() {
                take();
            }
            take();
            total
        });
        assert_eq!(total, 20_000);
    }
}
