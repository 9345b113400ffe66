// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! `linux/kvm.h`: the ring of dirty pages that each vCPU fills, over any VM and vCPU descriptors.

use std::io;
use std::os::fd::AsRawFd;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use kvm_bindings::{
    KVM_CAP_DIRTY_LOG_RING, KVM_CAP_DIRTY_LOG_RING_ACQ_REL, KVM_CAP_DIRTY_LOG_RING_WITH_BITMAP,
    KVM_DIRTY_LOG_PAGE_OFFSET, kvm_enable_cap,
};

use super::{host_page_bytes, ioctl};

const KVM_CHECK_EXTENSION: ioctl::Opcode = ioctl::io(0xae, 0x03);
const KVM_ENABLE_CAP: ioctl::Opcode = ioctl::iow::<kvm_enable_cap>(0xae, 0xa3);
pub(crate) const KVM_RESET_DIRTY_RINGS: ioctl::Opcode = ioctl::io(0xae, 0xc7);

/// Flags of an entry; an entry without any is KVM's to fill.
const DIRTY: u32 = 1;
const RESET: u32 = 2;

/// `struct kvm_dirty_gfn`, as two sides see it that share no lock.
#[derive(Debug)]
#[repr(C)]
struct Gfn {
    flags: AtomicU32,
    slot: AtomicU32,
    offset: AtomicU64,
}

/// Which dirty-ring capability a VM has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct RingSupport {
    /// What to enable.
    capability: u32,
    /// Bytes a vCPU's ring may take at most.
    pub(crate) max_bytes: u32,
    /// Whether the kernel writes guest memory without a vCPU, and needs the bitmap beside the ring for that.
    pub(crate) with_bitmap: bool,
}

/// Asks which dirty-ring capability the VM, or `/dev/kvm`, has; `None` where it has none.
pub(crate) fn ring_support(kvm: &impl AsRawFd) -> Option<RingSupport> {
    // The one that promises acquire and release order comes first: where order is weak there is no other.
    let capability = [KVM_CAP_DIRTY_LOG_RING_ACQ_REL, KVM_CAP_DIRTY_LOG_RING]
        .into_iter()
        .find(|&capability| extension(kvm, capability) > 0)?;
    let with_bitmap = extension(kvm, KVM_CAP_DIRTY_LOG_RING_WITH_BITMAP) > 0;
    Some(RingSupport { capability, max_bytes: extension(kvm, capability), with_bitmap })
}

fn extension(kvm: &impl AsRawFd, capability: u32) -> u32 {
    // SAFETY: the argument is a number.
    let answer = unsafe { ioctl::with_val(kvm, KVM_CHECK_EXTENSION, capability.into()) };
    answer.ok().and_then(|answer| u32::try_from(answer).ok()).unwrap_or(0)
}

/// Gives every vCPU, none of which exists yet, a ring of `bytes`; with the bitmap beside it where the kernel needs that.
pub(crate) fn enable_rings(vm: &impl AsRawFd, support: RingSupport, bytes: u32) -> io::Result<()> {
    enable(vm, support.capability, bytes.into())?;
    if support.with_bitmap { enable(vm, KVM_CAP_DIRTY_LOG_RING_WITH_BITMAP, 0) } else { Ok(()) }
}

fn enable(vm: &impl AsRawFd, capability: u32, argument: u64) -> io::Result<()> {
    let mut cap = kvm_enable_cap { cap: capability, ..Default::default() };
    cap.args[0] = argument;
    // SAFETY: the kernel reads `cap` during the call.
    unsafe { ioctl::with_ref(vm, KVM_ENABLE_CAP, &cap) }.map(drop)
}

/// Takes back the harvested entries of all rings and protects their pages again; returns how many, which may be
/// fewer than there are.
pub(crate) fn reset_rings(vm: &impl AsRawFd) -> io::Result<usize> {
    // SAFETY: the call takes no argument.
    let reset = unsafe { ioctl::with_val(vm, KVM_RESET_DIRTY_RINGS, 0) }?;
    Ok(usize::try_from(reset).unwrap_or(0))
}

/// One vCPU's ring, mapped here.
#[derive(Debug)]
pub(crate) struct Ring {
    entries: NonNull<Gfn>,
    bytes: usize,
    count: usize,
    cursor: Cursor,
}

// SAFETY: the mapping belongs to this value alone, and its entries are atomics.
unsafe impl Send for Ring {}

impl Ring {
    /// Maps the ring of `bytes` that KVM shares through a vCPU's descriptor.
    pub(crate) fn map(vcpu: &impl AsRawFd, bytes: u32) -> io::Result<Self> {
        let bytes = usize::try_from(bytes).map_err(io::Error::other)?;
        let offset = u64::from(KVM_DIRTY_LOG_PAGE_OFFSET) * host_page_bytes();
        let offset = libc::off_t::try_from(offset).map_err(io::Error::other)?;
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        let none = std::ptr::null_mut();
        // SAFETY: a new mapping, where the kernel has room for it, touches no memory that is in use.
        let address =
            unsafe { libc::mmap(none, bytes, protection, libc::MAP_SHARED, vcpu.as_raw_fd(), offset) };
        if address == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let entries =
            NonNull::new(address.cast()).ok_or_else(|| io::Error::from_raw_os_error(libc::EFAULT))?;
        Ok(Self { entries, bytes, count: bytes / size_of::<Gfn>(), cursor: Cursor::default() })
    }

    /// Returns the entries and where the harvest stands.
    fn parts(&mut self) -> (&[Gfn], &mut Cursor) {
        // SAFETY: the mapping holds `count` entries, all of them atomics, and stands as long as `self`.
        (unsafe { std::slice::from_raw_parts(self.entries.as_ptr(), self.count) }, &mut self.cursor)
    }

    /// Hands every dirty entry, oldest first, to `report` as (slot, page of the slot), then marks it harvested; returns how many
    /// entries KVM has to reset for it.
    pub(crate) fn harvest(&mut self, report: impl FnMut(u32, u64)) -> usize {
        let (entries, cursor) = self.parts();
        cursor.harvest(entries, report)
    }

    /// Harvests again what KVM overwrote between a harvest and its reset, so that the reset can go on.
    pub(crate) fn harvest_overwritten(&mut self, report: impl FnMut(u32, u64)) {
        let (entries, cursor) = self.parts();
        cursor.harvest_overwritten(entries, report);
    }

    /// Takes in that KVM has reset all that was harvested.
    pub(crate) fn all_reset(&mut self) {
        self.cursor.harvested = 0;
    }

    /// Whether KVM has overwritten entries since this was asked last: pages are missing from the ring, and are not protected.
    pub(crate) fn take_overflow(&mut self) -> bool {
        std::mem::take(&mut self.cursor.overflowed)
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        // SAFETY: the mapping was made with this address and length, and nothing borrows from it any more.
        unsafe { libc::munmap(self.entries.as_ptr().cast(), self.bytes) };
    }
}

/// Where the harvest of a ring stands.
///
/// KVM leaves some entries free when it stops a vCPU at a full ring; one that fills them all the same overwrites what nobody has
/// seen. A KVM that emulates the guest has been seen to. From then on it counts entries that are not there: as many as it
/// overwrote, between the last one that was reset and the oldest dirty one, never become dirty. They are given back clean.
#[derive(Debug, Default)]
struct Cursor {
    /// The entry to harvest next.
    next: usize,
    /// Entries before that one that KVM was not seen to reset.
    harvested: usize,
    /// Entries were overwritten, and it was not told yet.
    overflowed: bool,
    /// Entries were overwritten once: there may be a gap of entries that never become dirty.
    suspect: bool,
}

impl Cursor {
    fn harvest(&mut self, entries: &[Gfn], mut report: impl FnMut(u32, u64)) -> usize {
        let before = self.harvested;
        if self.suspect {
            self.close_gap(entries, &mut report);
        }
        let dirty = self.unharvested(entries).take_while(|entry| entry.is_dirty());
        let found = take_dirty(dirty, &mut report);
        self.advance(entries, found);
        if self.harvested == entries.len() {
            self.overflow();
        }
        self.harvested - before
    }

    fn harvest_overwritten(&mut self, entries: &[Gfn], mut report: impl FnMut(u32, u64)) {
        let first = (self.next + entries.len() - self.harvested) % entries.len().max(1);
        let harvested = around(entries, first).take(self.harvested);
        if take_dirty(harvested.filter(|entry| entry.is_dirty()), &mut report) > 0 {
            self.overflow();
        }
    }

    /// Gives back the entries that never become dirty.
    fn close_gap(&mut self, entries: &[Gfn], report: &mut impl FnMut(u32, u64)) {
        // The last entry is looked at first: KVM fills it last, so in a ring without a gap the others are dirty by now too.
        let around_the_end =
            self.harvested == 0 && self.unharvested(entries).last().is_some_and(Gfn::is_dirty);
        if around_the_end && self.unharvested(entries).any(|entry| !entry.is_dirty()) {
            take_dirty(self.unharvested(entries).filter(|entry| entry.is_dirty()), report);
            self.give_back(entries, entries.len());
        } else if let Some(dirty) = self.unharvested(entries).position(Gfn::is_dirty) {
            // KVM may have come by between two looks; what it filled before this one is seen as dirty now.
            let gap = self.unharvested(entries).take(dirty).position(Gfn::is_dirty).unwrap_or(dirty);
            self.give_back(entries, gap);
        }
    }

    /// Marks the next `count` entries as harvested that are not so marked.
    fn give_back(&mut self, entries: &[Gfn], count: usize) {
        let gap = self.unharvested(entries).take(count);
        gap.for_each(|entry| entry.flags.store(RESET, Ordering::Release));
        self.advance(entries, count);
    }

    /// The entries from the next on that are not harvested.
    fn unharvested<'a>(&self, entries: &'a [Gfn]) -> impl Iterator<Item = &'a Gfn> + use<'a> {
        around(entries, self.next).take(entries.len() - self.harvested)
    }

    fn advance(&mut self, entries: &[Gfn], by: usize) {
        self.next = (self.next + by) % entries.len().max(1);
        self.harvested += by;
    }

    fn overflow(&mut self) {
        (self.overflowed, self.suspect) = (true, true);
    }
}

impl Gfn {
    fn is_dirty(&self) -> bool {
        self.flags.load(Ordering::Acquire) & (DIRTY | RESET) == DIRTY
    }
}

/// The entries from `next` on, once around.
fn around(entries: &[Gfn], next: usize) -> impl Iterator<Item = &Gfn> {
    let (before, from_next) = entries.split_at(next);
    from_next.iter().chain(before)
}

/// Hands out each of these dirty entries, then marks it harvested; returns how many.
fn take_dirty<'a>(dirty: impl Iterator<Item = &'a Gfn>, report: &mut impl FnMut(u32, u64)) -> usize {
    let take = |entry: &Gfn| {
        report(entry.slot.load(Ordering::Relaxed), entry.offset.load(Ordering::Relaxed));
        entry.flags.store(RESET, Ordering::Release);
    };
    dirty.map(take).count()
}

#[cfg(test)]
mod tests {
    use std::mem::{offset_of, size_of};

    use kvm_bindings::kvm_dirty_gfn;
    use proptest::prelude::*;

    use super::*;

    fn entry(flags: u32, offset: u64) -> Gfn {
        Gfn { flags: flags.into(), slot: 7.into(), offset: offset.into() }
    }

    fn harvested(entries: &[Gfn], cursor: &mut Cursor) -> Vec<u64> {
        let mut pages = Vec::new();
        cursor.harvest(entries, |slot, page| {
            assert_eq!(slot, 7);
            pages.push(page);
        });
        pages
    }

    fn at(next: usize) -> Cursor {
        Cursor { next, ..Default::default() }
    }

    /// KVM's side of a ring, as its source has it, with no care for overflow.
    struct Kvm {
        entries: Vec<Gfn>,
        dirty_index: usize,
        reset_index: usize,
    }

    impl Kvm {
        fn push(&mut self, page: u64) {
            let entry = &self.entries[self.dirty_index % self.entries.len()];
            entry.slot.store(7, Ordering::Relaxed);
            entry.offset.store(page, Ordering::Relaxed);
            entry.flags.store(DIRTY, Ordering::Relaxed);
            self.dirty_index += 1;
        }

        fn reset(&mut self) -> usize {
            let before = self.reset_index;
            loop {
                let entry = &self.entries[self.reset_index % self.entries.len()];
                if entry.flags.load(Ordering::Relaxed) & RESET == 0 {
                    return self.reset_index - before;
                }
                entry.flags.store(0, Ordering::Relaxed);
                self.reset_index += 1;
            }
        }
    }

    #[test]
    fn an_entry_has_the_kernels_layout() {
        assert_eq!(size_of::<Gfn>(), size_of::<kvm_dirty_gfn>());
        assert_eq!(size_of::<Gfn>(), 16);
        assert_eq!(offset_of!(Gfn, flags), offset_of!(kvm_dirty_gfn, flags));
        assert_eq!(offset_of!(Gfn, slot), offset_of!(kvm_dirty_gfn, slot));
        assert_eq!(offset_of!(Gfn, offset), offset_of!(kvm_dirty_gfn, offset));
        assert_eq!(DIRTY | RESET, kvm_bindings::KVM_DIRTY_GFN_F_MASK);
    }

    #[test]
    fn opcodes_are_the_kernels() {
        assert_eq!(KVM_RESET_DIRTY_RINGS, 0xaec7);
        assert_eq!(KVM_ENABLE_CAP, 0x4068_aea3);
        assert_eq!(KVM_CHECK_EXTENSION, 0xae03);
    }

    #[test]
    fn c22_entries_are_harvested_in_order_around_the_end_up_to_the_first_clean_one() {
        let entries = [entry(DIRTY, 12), entry(0, 0), entry(DIRTY, 99), entry(DIRTY, 10), entry(DIRTY, 11)];
        let mut cursor = at(3);
        assert_eq!(harvested(&entries, &mut cursor), [10, 11, 12]);
        assert_eq!((cursor.next, cursor.overflowed), (1, false));
        let flags: Vec<_> = entries.iter().map(|entry| entry.flags.load(Ordering::Relaxed)).collect();
        assert_eq!(flags, [RESET, 0, DIRTY, RESET, RESET]);
    }

    #[test]
    fn c22_an_entry_that_waits_for_its_reset_is_not_harvested_again() {
        let entries = [entry(RESET, 1), entry(DIRTY, 2)];
        assert!(harvested(&entries, &mut at(0)).is_empty());
        assert!(harvested(&[entry(DIRTY | RESET, 1)], &mut at(0)).is_empty());
    }

    #[test]
    fn a_full_ring_is_harvested_once_around_and_counts_as_overflowed() {
        let entries: Vec<_> = (0..64).map(|page| entry(DIRTY, page)).collect();
        let mut cursor = at(20);
        assert_eq!(harvested(&entries, &mut cursor).len(), 64);
        assert!(cursor.overflowed);
        assert!(harvested(&entries, &mut cursor).is_empty());
    }

    proptest! {
        #[test]
        fn c22_a_ring_goes_on_after_any_overflow_and_tells_of_each(
            steps in prop::collection::vec((0..40u64, 0..12u64), 1..30),
        ) {
            let entries: Vec<_> = (0..16).map(|_| entry(0, 0)).collect();
            let mut kvm = Kvm { entries, dirty_index: 0, reset_index: 0 };
            let (mut cursor, mut awaiting, mut page) = (Cursor::default(), 0, 0);
            for (before, between) in steps {
                // A vCPU stops when less than half the ring is free, if not just there.
                let stopped = kvm.dirty_index - kvm.reset_index >= 8;
                let (mut expected, mut found) = (Vec::new(), Vec::new());
                for count in if stopped { [0, 0] } else { [before, between] } {
                    for _ in 0..count {
                        page += 1;
                        kvm.push(page);
                        expected.push(page);
                    }
                    awaiting += cursor.harvest(&kvm.entries, |_, page| found.push(page));
                }
                for _ in 0..3 {
                    awaiting -= kvm.reset().min(awaiting);
                    if awaiting > 0 {
                        cursor.harvest_overwritten(&kvm.entries, |_, page| found.push(page));
                    }
                }
                prop_assert_eq!(awaiting, 0);
                cursor.harvested = 0;
                let overflowed = std::mem::take(&mut cursor.overflowed);
                prop_assert!(kvm.reset_index <= kvm.dirty_index);
                if !overflowed {
                    prop_assert!(expected.iter().all(|page| found.contains(page)), "{:?} of {:?}", found, expected);
                }
            }
        }
    }
}
