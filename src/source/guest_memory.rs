// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The VMM's own writes: the dirty bitmap inside vm-memory's guest memory.

use vm_memory::bitmap::{AtomicBitmap, Bitmap, NewBitmap, RefSlice, WithBitmapSlice};
use vm_memory::{Address, GuestAddressSpace, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

use super::{Cover, DirtySource, Reports, Sink, SourceError};
use crate::bitmap::{WORD_BITS, masks};
use crate::granule::Granule;
use crate::iova::IovaMap;
use crate::layout::Layout;
use crate::range::GpaRange;

mod levels {
    use std::sync::atomic::AtomicU64;

    include!("guest_memory/levels.rs");
}

use levels::Levels;

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

/// A dirty bitmap for vm-memory with a summary level: taking an idle one reads a word per 128 MiB of 4 KiB pages, and allocates nothing.
///
/// A drop-in for [`AtomicBitmap`] as the `B` of `GuestMemoryMmap<B>`.
#[derive(Debug, Default)]
pub struct SummaryBitmap {
    levels: Levels,
    page_shift: u32,
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
            if first < self.levels.bits() {
                self.levels.mark(first / WORD_BITS, 1 << (first % WORD_BITS));
            }
            return;
        }
        let end = (last + 1).min(self.levels.bits());
        for (word, mask) in masks(first.min(end)..end) {
            self.levels.mark(word, mask);
        }
    }

    fn dirty_at(&self, offset: usize) -> bool {
        let page = offset >> self.page_shift;
        self.levels.word(page / WORD_BITS) >> (page % WORD_BITS) & 1 == 1
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
    use std::sync::atomic::{AtomicUsize, Ordering};

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

    /// The words over atomics of a checker, which has threads run in every order.
    mod checked {
        use shuttle::sync::atomic::AtomicU64;

        include!("guest_memory/levels.rs");
    }

    #[test]
    fn no_order_of_marking_and_taking_threads_loses_a_mark() {
        static ORDERS: AtomicUsize = AtomicUsize::new(0);
        let every_order = || {
            ORDERS.fetch_add(1, Ordering::Relaxed);
            let levels = shuttle::sync::Arc::new(checked::Levels::new(1));
            let marks = [1 << 3, 1 << 5].map(|mask| {
                let levels = shuttle::sync::Arc::clone(&levels);
                shuttle::thread::spawn(move || levels.mark(0, mask))
            });
            let mut taken = 0;
            levels.take(&mut |_, words| taken |= words[0]);
            marks.into_iter().for_each(|marker| marker.join().unwrap());
            let mut left = 0;
            levels.take(&mut |_, words| left |= words[0]);
            assert_eq!((taken | left, taken & left), (1 << 3 | 1 << 5, 0), "each mark is taken once");
            assert_eq!((levels.word(0), levels.bits()), (0, 8 * 64), "none is left");
        };
        shuttle::check_dfs(every_order, None);
        assert!(ORDERS.load(Ordering::Relaxed) > 100, "{ORDERS:?} orders are not all");
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
