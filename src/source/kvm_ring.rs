// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! KVM's dirty ring: each vCPU lists the pages it writes, and stops when its list is full.
//!
//! The rings are chosen when the VM is made ([`RingSize::enable`]). They are harvested from two sides: by a vCPU that left
//! the guest with `KVM_EXIT_DIRTY_RING_FULL`, and by the collector. Both put what they find into one bitmap, which the
//! collector empties. A harvest, its RESET and the emptying exclude each other: were a bit handed out before its page is
//! protected again, a write in between would be lost.

use std::fmt;
use std::io::{self, ErrorKind};
use std::os::fd::AsRawFd;
use std::sync::{Arc, Mutex, MutexGuard};

use thiserror::Error;

use super::{Cover, DirtySource, KvmSlot, Operation, PluggedRam, Reports, Sink, SourceError};
use crate::bitmap::{BLOCK_WORDS, Bitmap, WORD_BITS};
use crate::granule::Granule;
use crate::iova::IovaMap;
use crate::layout::Layout;
use crate::range::GpaRange;
use crate::sync;
use crate::sys::kvm_ring::{self as sys, Ring, RingSupport};
use crate::units::Count;

/// What KVM refused.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum KvmRingError {
    /// The kernel has no dirty ring.
    #[error("KVM has no dirty ring")]
    Absent,
    /// A ring cannot have this size.
    #[error("Dirty ring of {} is not a power of two from a host page to {max_bytes} bytes", Count(.bytes, "byte"))]
    Size {
        /// Bytes asked for.
        bytes: u32,
        /// Bytes the kernel allows.
        max_bytes: u32,
    },
    /// The rings could not be switched on: a vCPU exists already, or a memory slot where the bitmap is needed too.
    #[error("Cannot give every vCPU a dirty ring of {bytes} bytes")]
    Enable {
        /// Bytes asked for.
        bytes: u32,
        /// KVM's answer.
        source: io::Error,
    },
    /// A vCPU's ring could not be mapped.
    #[error("Cannot map the dirty ring of a vCPU")]
    Map(#[source] io::Error),
    /// A slot's logging could not be switched.
    #[error("Cannot switch the dirty log of slot {slot} at {gpa} {}", if *.on { "on" } else { "off" })]
    Switch {
        /// Slot number.
        slot: u32,
        /// The slot's pages.
        gpa: GpaRange,
        /// On or off.
        on: bool,
        /// KVM's answer.
        source: io::Error,
    },
    /// Harvested pages could not be protected again; writes to them go unseen until this succeeds.
    #[error("Cannot reset the dirty rings")]
    Reset(#[source] io::Error),
    /// KVM overwrote entries that nobody had seen. All pages are protected again.
    #[error("A dirty ring has overflowed")]
    Overflowed,
    /// The bitmap beside the rings could not be read.
    #[error("Cannot read the dirty bitmap beside the rings for slot {slot} at {gpa}")]
    Bitmap {
        /// Slot number.
        slot: u32,
        /// The slot's pages.
        gpa: GpaRange,
        /// KVM's answer.
        source: io::Error,
    },
}

/// The size of every vCPU's ring in one VM, where the rings are on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RingSize {
    bytes: u32,
    with_bitmap: bool,
}

impl RingSize {
    /// Gives each vCPU of `vm` a ring of `bytes`, 16 for each page. Comes before the first vCPU and the first memory slot.
    ///
    /// # Errors
    /// KVM has no rings, none of this size, or the VM is too far made already.
    pub fn enable(vm: &impl AsRawFd, bytes: u32) -> Result<Self, KvmRingError> {
        let support = sys::ring_support(vm).ok_or(KvmRingError::Absent)?;
        let size = Self::new(support, bytes)?;
        sys::enable_rings(vm, support, bytes).map_err(|source| KvmRingError::Enable { bytes, source })?;
        Ok(size)
    }

    /// Describes the rings of a VM that were switched on by other means, with the bitmap beside them where the kernel needs one.
    ///
    /// # Errors
    /// KVM has no rings, or none of this size.
    pub fn enabled_elsewhere(vm: &impl AsRawFd, bytes: u32) -> Result<Self, KvmRingError> {
        Self::new(sys::ring_support(vm).ok_or(KvmRingError::Absent)?, bytes)
    }

    fn new(support: RingSupport, bytes: u32) -> Result<Self, KvmRingError> {
        let RingSupport { max_bytes, with_bitmap, .. } = support;
        let fits = u64::from(bytes) >= Granule::host_page().bytes() && bytes <= max_bytes;
        if bytes.is_power_of_two() && fits {
            Ok(Self { bytes, with_bitmap })
        } else {
            Err(KvmRingError::Size { bytes, max_bytes })
        }
    }

    /// Pages a vCPU can write before it must be harvested, nearly: KVM keeps some entries back.
    pub fn entries(self) -> u32 {
        self.bytes / 16
    }
}

/// Pages of one slot, and which of them were harvested.
#[derive(Debug)]
struct SlotBits {
    slot: KvmSlot,
    bits: Bitmap,
}

/// What harvests and collects share.
#[derive(Debug)]
struct Shared<F> {
    vm: F,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    rings: Vec<Ring>,
    slots: Vec<SlotBits>,
    /// Entries harvested whose RESET has not succeeded yet.
    awaiting_reset: usize,
    /// KVM overwrote entries that nobody had harvested.
    overflowed: bool,
}

/// Calls in a row that reset nothing, after which something is wrong.
const IDLE_RESETS: u32 = 64;

impl<F: AsRawFd> Shared<F> {
    fn lock(&self) -> MutexGuard<'_, State> {
        sync::lock(&self.state)
    }

    /// Empties all rings into the bitmap and resets them; returns how many entries it took.
    fn harvest(&self, state: &mut State) -> Result<usize, KvmRingError> {
        let State { rings, slots, awaiting_reset, overflowed } = state;
        let found: usize =
            rings.iter_mut().map(|ring| ring.harvest(|slot, page| mark(slots, slot, page))).sum();
        *awaiting_reset += found;
        let mut idle = 0;
        while *awaiting_reset > 0 {
            let reset = sys::reset_rings(&self.vm).map_err(KvmRingError::Reset)?;
            *awaiting_reset = awaiting_reset.saturating_sub(reset);
            // A call may end early when the thread has a signal to handle, or stop at an entry that was overwritten.
            idle = if reset == 0 { idle + 1 } else { 0 };
            if idle > IDLE_RESETS {
                return Err(KvmRingError::Reset(ErrorKind::Interrupted.into()));
            }
            if reset == 0 {
                rings
                    .iter_mut()
                    .for_each(|ring| ring.harvest_overwritten(|slot, page| mark(slots, slot, page)));
            }
        }
        for ring in rings {
            ring.all_reset();
            *overflowed |= ring.take_overflow();
        }
        Ok(found)
    }

    /// Protects every page again after an overflow: those whose entries were overwritten are missing from every later reset.
    fn recover(&self, state: &mut State) -> Result<(), KvmRingError> {
        for slot in &state.slots {
            slot.switch(&self.vm, false)?;
            slot.switch(&self.vm, true)?;
        }
        state.overflowed = false;
        Ok(())
    }
}

/// Sets the bit of a page; an entry that names no page, left by a slot that has changed since, is dropped.
fn mark(slots: &mut [SlotBits], slot: u32, page: u64) {
    let Some(of) = slots.iter_mut().find(|of| of.slot.id() == slot) else { return };
    if page < of.slot.pages() {
        let page = usize::try_from(page).expect("the slot is mapped here");
        of.bits.or_word(page / WORD_BITS, 1 << (page % WORD_BITS));
    }
}

impl SlotBits {
    fn new(slot: KvmSlot) -> Self {
        Self { slot, bits: Bitmap::new(slot.words().next_multiple_of(BLOCK_WORDS)) }
    }

    fn switch(&self, vm: &impl AsRawFd, on: bool) -> Result<(), KvmRingError> {
        let (slot, gpa) = (self.slot.id(), self.slot.gpa());
        self.slot.log_dirty_pages(vm, on).map_err(|source| KvmRingError::Switch { slot, gpa, on, source })
    }

    /// Hands out the harvested pages and forgets them.
    fn drain(&mut self, mut report: impl FnMut(GpaRange, &[u64])) {
        let gpa = self.slot.gpa();
        let block_bytes = (BLOCK_WORDS * WORD_BITS) as u64 * Granule::host_page().bytes();
        let mut next = 0;
        while let Some(block) = self.bits.next_block(next) {
            let start = gpa.start() + block as u64 * block_bytes;
            let range = GpaRange::from_bounds(start, gpa.end().min(start.saturating_add(block_bytes)));
            if let Ok(range) = range {
                report(range, self.bits.block(block));
            }
            self.bits.clear_block(block);
            next = block + 1;
        }
    }
}

/// Harvests the rings of a VM, from any thread.
pub struct Harvester<F>(Arc<Shared<F>>);

impl<F: AsRawFd> Harvester<F> {
    /// Empties all vCPUs' rings, so that those that stopped at a full one can go on; returns the entries it took.
    ///
    /// For a vCPU's thread after `KVM_EXIT_DIRTY_RING_FULL`. The pages are kept for the next collect.
    ///
    /// # Errors
    /// The rings could not be reset. Nothing is lost: the next harvest tries again, and until then collects fail.
    pub fn harvest(&self) -> Result<usize, KvmRingError> {
        let mut state = self.0.lock();
        self.0.harvest(&mut state)
    }
}

impl<F> Clone for Harvester<F> {
    fn clone(&self) -> Self {
        Self(Arc::clone(&self.0))
    }
}

impl<F> fmt::Debug for Harvester<F> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Harvester").finish_non_exhaustive()
    }
}

/// The dirty rings of a VM's vCPUs, over any VM descriptor.
///
/// A page that a vCPU wrote may stay in the processor's own buffer until that vCPU leaves the guest; so the last collect comes
/// after all vCPUs have stopped. An entry names a slot by number: one that goes is harvested first, and its number is not used again
/// while the source is on.
#[derive(Debug)]
pub struct KvmRing<F> {
    shared: Arc<Shared<F>>,
    size: RingSize,
    /// For the bitmap beside the rings, where there is one.
    words: Vec<u64>,
    on: bool,
}

const ID: &str = "kvm-ring";

impl<F: AsRawFd + Send + Sync> KvmRing<F> {
    /// Makes the source for `slots` of `vm`; it knows no vCPU yet, and is off until [`DirtySource::start`].
    pub fn new(vm: F, slots: impl IntoIterator<Item = KvmSlot>, size: RingSize) -> Self {
        let slots: Vec<_> = slots.into_iter().map(SlotBits::new).collect();
        let state = State { rings: Vec::new(), slots, awaiting_reset: 0, overflowed: false };
        let shared = Arc::new(Shared { vm, state: Mutex::new(state) });
        Self { shared, size, words: Vec::new(), on: false }
    }

    /// Adds a vCPU's ring. All vCPUs must be added before the first of them runs with the source on.
    ///
    /// # Errors
    /// The descriptor is no vCPU's, or of a VM without rings.
    pub fn add_vcpu(&mut self, vcpu: &impl AsRawFd) -> Result<(), KvmRingError> {
        let ring = Ring::map(vcpu, self.size.bytes).map_err(KvmRingError::Map)?;
        self.shared.lock().rings.push(ring);
        Ok(())
    }

    /// Returns a handle to harvest with, for vCPU threads.
    pub fn harvester(&self) -> Harvester<F> {
        Harvester(Arc::clone(&self.shared))
    }

    fn try_start(&self) -> Result<(), KvmRingError> {
        let mut state = self.shared.lock();
        // What an earlier session left behind is nobody's any more.
        self.shared.harvest(&mut state)?;
        state.overflowed = false;
        state.slots.iter_mut().for_each(|slot| slot.drain(|_, _| {}));
        for index in 0..state.slots.len() {
            if let Err(error) = state.slots[index].switch(&self.shared.vm, true) {
                for started in &state.slots[..index] {
                    let _already_failing = started.switch(&self.shared.vm, false);
                }
                return Err(error);
            }
        }
        Ok(())
    }

    fn try_collect(&mut self, sink: &mut Sink<'_>) -> Result<(), KvmRingError> {
        let mut state = self.shared.lock();
        self.shared.harvest(&mut state)?;
        for slot in &mut state.slots {
            slot.drain(|range, words| {
                sink.gpa_words(range, Granule::host_page(), words).expect("a block's words reach its end");
            });
        }
        if state.overflowed {
            self.shared.recover(&mut state)?;
            return Err(KvmRingError::Overflowed);
        }
        if self.size.with_bitmap {
            collect_bitmap(&self.shared.vm, &state.slots, &mut self.words, sink)?;
        }
        Ok(())
    }

    fn try_stop(&mut self) -> Result<(), KvmRingError> {
        if !std::mem::take(&mut self.on) {
            return Ok(());
        }
        let state = self.shared.lock();
        let switch = |slot: &SlotBits| slot.switch(&self.shared.vm, false);
        state.slots.iter().map(switch).fold(Ok(()), Result::and)
    }
}

/// Reports what the kernel wrote on no vCPU's behalf, which no ring lists; after the rings, as KVM demands.
fn collect_bitmap(
    vm: &impl AsRawFd,
    slots: &[SlotBits],
    words: &mut Vec<u64>,
    sink: &mut Sink<'_>,
) -> Result<(), KvmRingError> {
    for SlotBits { slot, .. } in slots {
        let (id, gpa) = (slot.id(), slot.gpa());
        words.clear();
        words.resize(slot.words(), 0);
        slot.dirty_log(vm, words).map_err(|source| KvmRingError::Bitmap { slot: id, gpa, source })?;
        sink.gpa_words(gpa, Granule::host_page(), words)
            .expect("the log has a bit for each page of its slot");
    }
    Ok(())
}

impl<F: AsRawFd + Send + Sync> DirtySource for KvmRing<F> {
    fn id(&self) -> &str {
        ID
    }

    fn reports(&self) -> Reports {
        Reports::Vcpus
    }

    fn cover(&self) -> Cover {
        let ranges = self.shared.lock().slots.iter().map(|slot| slot.slot.gpa()).collect();
        Cover { ranges, precise: true }
    }

    fn start(&mut self, _layout: &Layout, _iova: &IovaMap) -> Result<(), SourceError> {
        if self.on {
            return Ok(());
        }
        self.try_start().map_err(|cause| SourceError::new(ID, Operation::Start, cause))?;
        self.on = true;
        Ok(())
    }

    fn collect(&mut self, sink: &mut Sink<'_>) -> Result<(), SourceError> {
        self.try_collect(sink).map_err(|cause| SourceError::new(ID, Operation::Collect, cause))
    }

    fn plugged(&mut self, ram: &PluggedRam) -> Result<(), SourceError> {
        let Some(slot) = ram.kvm_slot else { return Ok(()) };
        let bits = SlotBits::new(slot);
        if self.on {
            bits.switch(&self.shared.vm, true)
                .map_err(|cause| SourceError::new(ID, Operation::Plugged, cause))?;
        }
        self.shared.lock().slots.push(bits);
        Ok(())
    }

    fn unplugged(&mut self, gpa: GpaRange) {
        self.shared.lock().slots.retain(|bits| !gpa.covers(bits.slot.gpa()));
    }

    fn stop(&mut self) -> Result<(), SourceError> {
        self.try_stop().map_err(|cause| SourceError::new(ID, Operation::Stop, cause))
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;

    use super::*;
    use crate::source::Marks;

    fn slot(id: u32, start: u64, pages: u64) -> KvmSlot {
        let gpa = GpaRange::new(start, pages * Granule::host_page().bytes()).unwrap();
        #[expect(unsafe_code, reason = "no VM is behind the slot")]
        // SAFETY: the slot is only used on a descriptor that is no VM.
        unsafe {
            KvmSlot::new(id, gpa, 0, 0)
        }
    }

    fn source() -> KvmRing<File> {
        let size = RingSize { bytes: 4096, with_bitmap: false };
        KvmRing::new(File::open("/dev/null").unwrap(), [slot(1, 0, 1000), slot(0x1_0001, 1 << 30, 3)], size)
    }

    fn pages(source: &mut KvmRing<File>) -> Result<u64, SourceError> {
        let ranges = source.cover().ranges;
        let layout = Layout::new(ranges, Granule::host_page()).unwrap();
        let mut marks = Marks::new(&layout);
        source.collect(&mut Sink::new(&layout, &IovaMap::Identity, &mut marks))?;
        Ok((0..layout.words()).map(|word| u64::from(marks.dirty.word(word).count_ones())).sum())
    }

    #[test]
    fn a_vm_without_rings_and_a_size_that_is_none_are_refused() {
        let null = File::open("/dev/null").unwrap();
        assert!(matches!(RingSize::enable(&null, 4096), Err(KvmRingError::Absent)));
        assert_eq!(RingSize { bytes: 65536, with_bitmap: false }.entries(), 4096);
    }

    #[test]
    fn c22_entries_outside_their_slot_are_dropped_and_pages_listed_twice_count_once() {
        let mut source = source();
        for (id, page) in [(1, 999), (1, 1000), (1, 999), (1, u64::MAX), (9, 0), (0x1_0001, 2), (0x1_0001, 3)]
        {
            mark(&mut source.shared.lock().slots, id, page);
        }
        assert_eq!(pages(&mut source).unwrap(), 2);
        assert_eq!(pages(&mut source).unwrap(), 0);
    }

    #[test]
    fn c22_bits_are_not_handed_out_before_their_pages_are_protected_again() {
        let mut source = source();
        mark(&mut source.shared.lock().slots, 1, 5);
        source.shared.lock().awaiting_reset = 1;
        source.harvester().harvest().unwrap_err();
        assert_eq!(pages(&mut source).unwrap_err().operation, Operation::Collect);
        source.shared.lock().awaiting_reset = 0;
        assert_eq!(pages(&mut source).unwrap(), 1);
    }

    #[test]
    fn a_refused_start_leaves_the_source_off() {
        let mut source = source();
        let layout = Layout::new(source.cover().ranges, Granule::host_page()).unwrap();
        let error = source.start(&layout, &IovaMap::Identity).unwrap_err();
        assert!(
            error.cause.to_string().starts_with("Cannot switch the dirty log of slot 1"),
            "{}",
            error.cause
        );
        source.stop().unwrap();
    }
}
