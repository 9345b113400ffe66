// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What tracking costs in memory: the library's own heap, counted, for a VM on this host's real KVM with memory that is not there.
//! The VMM's own bitmap is the VMM's, and not counted.
#![cfg(target_arch = "x86_64")]
#![expect(unsafe_code, reason = "a global allocator that counts; memory slots of a real VM")]
#![expect(clippy::unwrap_used, reason = "a test that cannot go on panics")]
#![expect(clippy::cast_precision_loss, reason = "bytes that fit in memory")]
#![expect(clippy::print_stdout, reason = "figures are what the test counts")]

use std::alloc::{GlobalAlloc, Layout as Allocation, System};
use std::cell::Cell;
use std::sync::Arc;

use vfio_migration::granule::Granule;
use vfio_migration::iova::IovaMap;
use vfio_migration::layout::Layout;
use vfio_migration::ledger::{ChunkLimits, CursorId, Start};
use vfio_migration::range::{GpaRange, IovaRange};
use vfio_migration::source::{
    Cover, DirtySource, GuestMemoryLog, KvmLog, KvmLogMode, Reports, Sink, SourceError, SummaryBitmap,
};
use vfio_migration::tracker::{Tracker, VmMappings};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

#[expect(dead_code, reason = "other tests use the rest")]
mod guest;

use guest::{Guest, Ram};

thread_local! {
    static LIVE: Cell<usize> = const { Cell::new(0) };
    static PEAK: Cell<usize> = const { Cell::new(0) };
}

struct Counting;

impl Counting {
    fn add(bytes: usize) {
        let live = LIVE.get() + bytes;
        LIVE.set(live);
        PEAK.set(PEAK.get().max(live));
    }
}

// SAFETY: every call goes to the system's allocator unchanged.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Allocation) -> *mut u8 {
        Self::add(layout.size());
        // SAFETY: the caller's promises are passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Allocation) -> *mut u8 {
        Self::add(layout.size());
        // SAFETY: the caller's promises are passed on.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Allocation) {
        // What another thread made may end here.
        LIVE.set(LIVE.get().saturating_sub(layout.size()));
        // SAFETY: the caller's promises are passed on.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static COUNTING: Counting = Counting;

/// Two regions around the addresses below 4 GiB that are no RAM.
fn regions(gib: u64) -> [(u64, u64); 2] {
    [(1 << 30, 1 << 30), (4 << 30, (gib - 1) << 30)]
}

/// A VM of that many GiB, of which nothing is touched, and its memory with the VMM's bitmap.
struct Vm {
    guest: Guest,
    memory: Arc<GuestMemoryMmap<SummaryBitmap>>,
    pages: u64,
}

impl Vm {
    fn new(gib: u64) -> Option<Self> {
        let ranges = regions(gib).map(|(start, len)| (GuestAddress(start), usize::try_from(len).unwrap()));
        let memory = Arc::new(GuestMemoryMmap::from_ranges(&ranges).unwrap());
        let slots: Vec<_> = memory
            .iter()
            .map(|region| Ram {
                gpa: GpaRange::new(region.start_addr().0, region.len()).unwrap(),
                userspace_addr: region.as_ptr() as u64,
            })
            .collect();
        let guest = Guest::over(&[], &slots, None)?;
        Some(Self { guest, memory, pages: gib << 18 })
    }

    /// A tracker of KVM's log in `mode`, of the VMM's writes and of devices' logs that report this of every word of pages.
    fn tracker(&self, mode: KvmLogMode, devices: &[fn(usize) -> u64]) -> Tracker {
        let slots: Vec<_> = self.guest.slots().iter().map(|slot| slot.gpa()).collect();
        let mappings = VmMappings { ram: slots.clone(), vcpu_slots: slots, ..VmMappings::default() };
        let builder = Tracker::builder(self.guest.layout())
            .mappings(move || mappings.clone())
            .source(Box::new(KvmLog::new(Arc::clone(&self.guest.vm), self.guest.slots(), mode)))
            .source(Box::new(GuestMemoryLog::new(Arc::clone(&self.memory))));
        let device = |(number, &word)| Box::new(Device::new(number, word));
        devices
            .iter()
            .enumerate()
            .map(device)
            .fold(builder, |builder, device| builder.source(device))
            .build()
            .unwrap()
    }

    /// Bits of heap for each page of RAM that tracking takes at most.
    fn bits_a_page(&self, mode: KvmLogMode, devices: &[fn(usize) -> u64], cursors: usize) -> f64 {
        let before = LIVE.get();
        PEAK.set(before);
        let mut tracker = self.tracker(mode, devices);
        let cursors: Vec<_> = (0..cursors).map(|_| tracker.begin(Start::Copied).unwrap()).collect();
        for _ in 0..2 {
            // A VMM writes its devices' rings.
            for page in 0..100 {
                self.memory.write_obj(page, GuestAddress((5 << 30) + (page << 14))).unwrap();
            }
            round(&mut tracker, &cursors);
        }
        ((PEAK.get() - before) * 8) as f64 / self.pages as f64
    }
}

fn round(tracker: &mut Tracker, cursors: &[CursorId]) {
    assert!(tracker.collect().is_empty());
    for &cursor in cursors {
        tracker.begin_round(cursor);
        while let Some(chunk) = tracker.take(cursor, ChunkLimits { bytes: 4 << 20, ranges: 4096 }).unwrap() {
            tracker.commit(chunk);
        }
    }
}

/// A device's log, read a piece at a time as a kernel's is.
struct Device {
    id: String,
    ram: Vec<GpaRange>,
    words: Vec<u64>,
    word: fn(usize) -> u64,
}

impl Device {
    /// Words of a piece, as `DeviceLog` reads them.
    const WORDS: usize = 1 << 15;

    fn new(number: usize, word: fn(usize) -> u64) -> Self {
        Self { id: format!("device-{number}"), ram: Vec::new(), words: Vec::new(), word }
    }
}

impl DirtySource for Device {
    fn id(&self) -> &str {
        &self.id
    }

    fn reports(&self) -> Reports {
        Reports::Component
    }

    fn cover(&self) -> Cover {
        Cover { ranges: self.ram.clone(), precise: true }
    }

    fn start(&mut self, layout: &Layout, _iova: &IovaMap) -> Result<(), SourceError> {
        self.ram = layout.regions().iter().map(|region| region.range()).collect();
        Ok(())
    }

    fn collect(&mut self, sink: &mut Sink<'_>) -> Result<(), SourceError> {
        self.words.resize(Self::WORDS, 0);
        for range in &self.ram {
            for piece in range.pieces((Self::WORDS as u64 * 64) << 12) {
                let first = usize::try_from(piece.start() >> 18).unwrap();
                self.words.iter_mut().enumerate().for_each(|(at, word)| *word = (self.word)(first + at));
                let iova = IovaRange::new(piece.start(), piece.len()).unwrap();
                sink.iova_words(iova, Granule::KIB_4, &self.words).unwrap();
            }
        }
        Ok(())
    }

    fn stop(&mut self) -> Result<(), SourceError> {
        Ok(())
    }
}

/// Dirties a page of every 16 MiB.
fn everywhere(word: usize) -> u64 {
    u64::from(word.is_multiple_of(64))
}

/// Dirties 16 pages.
fn little(word: usize) -> u64 {
    if word == 5 << 12 { 0xffff } else { 0 }
}

#[test]
fn tracking_takes_few_bits_a_page() {
    let Some(vm) = Vm::new(128) else { return };
    let at_report = vm.bits_a_page(KvmLogMode::AtReport, &[everywhere], 1);
    let at_read = vm.bits_a_page(KvmLogMode::ManualAtRead, &[everywhere], 1);
    let device = vm.bits_a_page(KvmLogMode::AtReport, &[everywhere, everywhere], 1) - at_report;
    let quiet_device = vm.bits_a_page(KvmLogMode::AtReport, &[everywhere, little], 1) - at_report;
    // One that was opened before another had the pages of two collects pending, and so a bitmap of them.
    let [two, three] = [2, 3].map(|cursors| vm.bits_a_page(KvmLogMode::AtReport, &[everywhere], cursors));
    let cursor = three - two;
    println!("bits of heap for each page: {at_report:.3} with AtReport, {at_read:.3} with ManualAtRead");
    println!(
        "more for a device {device:.3}, for one with little to say {quiet_device:.3}, for a cursor {cursor:.3}"
    );
    assert!(at_report <= 5.0 && at_read <= 6.0);
    assert!(device <= 1.1 && quiet_device <= 0.1);
    // Two bitmaps, their summaries, and a list of what is pending while that is little.
    assert!(cursor <= 2.1 && two <= at_report + 4.2);
}
