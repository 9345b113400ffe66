// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A round of this library, fed with bits that lie ready.

use std::hint::black_box;
use std::sync::Arc;

use vfio_migration::granule::Granule;
use vfio_migration::iova::IovaMap;
use vfio_migration::layout::Layout;
use vfio_migration::ledger::{ChunkLimits, CursorId, Start};
use vfio_migration::range::GpaRange;
use vfio_migration::source::{Cover, DirtySource, Reports, Sink, SourceError, SummaryBitmap, TakeDirtyWords};
use vfio_migration::tracker::{Tracker, VmMappings};
use vm_memory::bitmap::{Bitmap, NewBitmap};

use crate::contenders::is;
use crate::pattern::Bits;
use crate::report::milliseconds;

const LIMITS: ChunkLimits = ChunkLimits { bytes: 4 << 20, ranges: 4096 };

/// A tracker of two logs and the VMM's writes.
pub(crate) struct Ours {
    tracker: Tracker,
    cursor: CursorId,
    own: Arc<SummaryBitmap>,
}

/// What one round took, in milliseconds, and what it brought.
pub(crate) struct Spent {
    pub(crate) collect: f64,
    /// Taking and committing.
    pub(crate) drain: f64,
    pub(crate) pages: u64,
}

/// Marks the pages that the VMM writes in a round.
pub(crate) fn mark_own(bits: &Bits, own: &SummaryBitmap) {
    bits.own.iter().for_each(|page| own.mark_dirty(page << 12, 1));
}

impl Ours {
    pub(crate) fn new(bits: &Bits) -> Self {
        let (tracker, own) = Self::tracker(bits);
        Self::begin(tracker, own)
    }

    /// One whose RAM begins at `base`, and whose first log is `first`.
    pub(crate) fn over(bits: &Bits, base: u64, first: Box<dyn DirtySource>) -> Self {
        let (tracker, own) = Self::tracker_over(bits, base, first, 1);
        Self::begin(tracker, own)
    }

    /// A tracker of two logs and the VMM's writes, which the bitmap has.
    pub(crate) fn tracker(bits: &Bits) -> (Tracker, Arc<SummaryBitmap>) {
        let ram = GpaRange::new(0, bits.ram_bytes).unwrap();
        Self::tracker_over(bits, 0, Log::boxed("first", ram, &bits.first), 1)
    }

    /// A tracker of `first`, the VMM's writes and four more logs.
    pub(crate) fn six_sources(bits: &Bits, base: u64, first: Box<dyn DirtySource>) -> Tracker {
        Self::tracker_over(bits, base, first, 4).0
    }

    fn tracker_over(
        bits: &Bits,
        base: u64,
        first: Box<dyn DirtySource>,
        others: usize,
    ) -> (Tracker, Arc<SummaryBitmap>) {
        const IDS: [&str; 4] = ["second", "third", "fourth", "fifth"];
        let ram = GpaRange::new(base, bits.ram_bytes).unwrap();
        let own = Arc::new(SummaryBitmap::with_len(bits.ram_bytes as usize));
        let mut builder = Tracker::builder(Layout::new([ram], Granule::KIB_4).unwrap()).source(first);
        for id in &IDS[..others] {
            builder = builder.source(Log::boxed(id, ram, &bits.second));
        }
        let tracker = builder
            .source(Box::new(Own { ram, bitmap: Arc::clone(&own) }))
            .mappings(move || VmMappings { ram: vec![ram], vcpu_slots: vec![ram], ..VmMappings::default() })
            .build()
            .unwrap();
        (tracker, own)
    }

    fn begin(mut tracker: Tracker, own: Arc<SummaryBitmap>) -> Self {
        let cursor = tracker.begin(Start::Copied).unwrap();
        Self { tracker, cursor, own }
    }

    pub(crate) fn round(&mut self, bits: &Bits) -> Spent {
        self.round_with(bits, |range| {
            black_box(range);
        })
    }

    /// Whether a round brings just the pages that are dirty.
    pub(crate) fn has(&mut self, bits: &Bits) -> bool {
        let mut ranges = Vec::new();
        self.round_with(bits, |chunk| ranges.extend(chunk.iter().map(|range| (range.start(), range.end()))));
        is(bits, ranges.into_iter())
    }

    fn round_with(&mut self, bits: &Bits, mut chunk_of: impl FnMut(&[GpaRange])) -> Spent {
        mark_own(bits, &self.own);
        let collect = milliseconds(|| assert!(self.tracker.collect().is_empty()));
        let mut bytes = 0;
        let drain = milliseconds(|| {
            self.tracker.begin_round(self.cursor);
            while let Some(chunk) = self.tracker.take(self.cursor, LIMITS).unwrap() {
                bytes += chunk.bytes();
                chunk_of(chunk.ranges());
                self.tracker.commit(chunk);
            }
        });
        Spent { collect, drain, pages: bytes >> 12 }
    }
}

/// A log whose bits the kernel has just handed over.
struct Log {
    id: &'static str,
    reports: Reports,
    ram: GpaRange,
    words: Arc<Vec<u64>>,
}

impl Log {
    fn boxed(id: &'static str, ram: GpaRange, words: &Arc<Vec<u64>>) -> Box<dyn DirtySource> {
        let reports = if id == "first" { Reports::Vcpus } else { Reports::Component };
        Box::new(Self { id, reports, ram, words: Arc::clone(words) })
    }
}

impl DirtySource for Log {
    fn id(&self) -> &str {
        self.id
    }

    fn reports(&self) -> Reports {
        self.reports
    }

    fn cover(&self) -> Cover {
        Cover { ranges: vec![self.ram], precise: true }
    }

    fn start(&mut self, _layout: &Layout, _iova: &IovaMap) -> Result<(), SourceError> {
        Ok(())
    }

    fn collect<'a>(&'a mut self, sink: &mut Sink<'a>) -> Result<(), SourceError> {
        sink.lend_gpa_words(self.ram, Granule::KIB_4, &self.words, None).unwrap();
        Ok(())
    }

    fn stop(&mut self) -> Result<(), SourceError> {
        Ok(())
    }
}

/// The VMM's own writes, with no memory under them.
struct Own {
    ram: GpaRange,
    bitmap: Arc<SummaryBitmap>,
}

impl DirtySource for Own {
    fn id(&self) -> &str {
        "own"
    }

    fn reports(&self) -> Reports {
        Reports::Vmm
    }

    fn cover(&self) -> Cover {
        Cover { ranges: vec![self.ram], precise: true }
    }

    fn start(&mut self, _layout: &Layout, _iova: &IovaMap) -> Result<(), SourceError> {
        Ok(())
    }

    fn collect(&mut self, sink: &mut Sink<'_>) -> Result<(), SourceError> {
        self.bitmap.take_dirty_words(&mut |first, words| {
            let bytes = |words: usize| (words as u64 * 64) << 12;
            let range = GpaRange::new(self.ram.start() + bytes(first), bytes(words.len())).unwrap();
            sink.gpa_words(range, Granule::KIB_4, words).unwrap();
        });
        Ok(())
    }

    fn stop(&mut self) -> Result<(), SourceError> {
        Ok(())
    }
}
