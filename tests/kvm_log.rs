// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! KVM's dirty log as a source, against this host's real KVM.
#![cfg(target_arch = "x86_64")]
#![expect(unsafe_code, reason = "memory slots of a real VM")]
#![expect(clippy::unwrap_used, reason = "a test that cannot go on panics")]

use std::collections::BTreeSet;
use std::sync::Arc;

use kvm_ioctls::VmFd;
use vfio_migration::iova::IovaMap;
use vfio_migration::ledger::{ChunkLimits, CursorId, Ledger, Start};
use vfio_migration::range::GpaRange;
use vfio_migration::source::{DirtySource, GuestMemoryLog, KvmLog, KvmLogMode, KvmSlot};
use vfio_migration::tracker::{Tracker, TrackerBuilder, VmMappings};
use vm_memory::bitmap::AtomicBitmap;
use vm_memory::{GuestAddress, GuestMemoryMmap};

mod guest;

use guest::{Guest, PAGE, collect, taken};

/// Two slots: one of an odd number of pages, one that fits no word at all.
const RAM: [(u64, u64); 2] = [(16 << 20, 1001 * PAGE), (64 << 20, 7 * PAGE)];
const LAST_ODD: u64 = (16 << 20) + 1000 * PAGE;
const MODES: [KvmLogMode; 3] = [KvmLogMode::AtReport, KvmLogMode::ManualAtReport, KvmLogMode::ManualAtRead];

fn started(mode: KvmLogMode) -> Option<(Guest, KvmLog<Arc<VmFd>>, Ledger)> {
    let guest = Guest::new(&RAM, None)?;
    assert!(guest.ring.is_none(), "a VM has a log or rings");
    let mut source = KvmLog::new(Arc::clone(&guest.vm), guest.slots(), mode);
    let ledger = Ledger::new(guest.layout(), 1);
    source.start(&guest.layout(), &IovaMap::Identity).unwrap();
    Some((guest, source, ledger))
}

/// Sends all RAM once, as the first pass does.
fn first_pass(source: &mut dyn DirtySource, ledger: &mut Ledger) -> CursorId {
    let cursor = ledger.open(Start::Empty);
    send_round(source, ledger, cursor);
    cursor
}

/// Takes, clears and commits all that is pending; returns its pages.
fn send_round(source: &mut dyn DirtySource, ledger: &mut Ledger, cursor: CursorId) -> BTreeSet<u64> {
    let mut pages = BTreeSet::new();
    ledger.begin_round(cursor);
    while let Some(chunk) = ledger.take(cursor, ChunkLimits { bytes: 37 * PAGE, ranges: 5 }) {
        source.before_read(chunk.ranges()).unwrap();
        pages.extend(chunk.ranges().iter().flat_map(|range| range.pieces(PAGE)).map(GpaRange::start));
        ledger.commit(chunk);
    }
    pages
}

fn odd_pages() -> BTreeSet<u64> {
    let first = [0, 1, 62, 63, 64, 127, 128, 640, 959, 960, 999].map(|page| (16 << 20) + page * PAGE);
    let second = [0, 3, 6].map(|page| (64 << 20) + page * PAGE);
    first.into_iter().chain(second).chain([LAST_ODD]).collect()
}

#[test]
fn every_mode_reports_just_what_the_guest_wrote_and_then_nothing() {
    for mode in MODES {
        let Some((mut guest, mut source, mut ledger)) = started(mode) else { return };
        let cursor = first_pass(&mut source, &mut ledger);
        collect(&mut source, &mut ledger);
        assert_eq!(
            send_round(&mut source, &mut ledger, cursor),
            BTreeSet::new(),
            "{mode:?}: nothing was written"
        );
        for _ in 0..2 {
            guest.write(odd_pages(), || {});
            collect(&mut source, &mut ledger);
            assert_eq!(send_round(&mut source, &mut ledger, cursor), odd_pages(), "{mode:?}");
            collect(&mut source, &mut ledger);
            assert_eq!(send_round(&mut source, &mut ledger, cursor), BTreeSet::new(), "{mode:?}");
        }
        source.stop().unwrap();
        source.stop().unwrap();
    }
}

#[test]
fn c01_writes_during_the_first_pass_are_caught_in_every_mode() {
    for mode in MODES {
        let Some((mut guest, mut source, mut ledger)) = started(mode) else { return };
        let cursor = ledger.open(Start::Empty);
        ledger.begin_round(cursor);
        let first = ledger.take(cursor, ChunkLimits { bytes: 500 * PAGE, ranges: 1 }).unwrap();
        source.before_read(first.ranges()).unwrap();
        let behind = (16 << 20) + 5 * PAGE;
        guest.write([behind], || {});
        ledger.commit(first);
        send_round_on(&mut source, &mut ledger, cursor);
        collect(&mut source, &mut ledger);
        assert!(send_round(&mut source, &mut ledger, cursor).contains(&behind), "{mode:?}");
    }
}

/// As [`send_round`], going on with the round that has begun.
fn send_round_on(source: &mut dyn DirtySource, ledger: &mut Ledger, cursor: CursorId) {
    while let Some(chunk) = ledger.take(cursor, ChunkLimits { bytes: 100 * PAGE, ranges: 3 }) {
        source.before_read(chunk.ranges()).unwrap();
        ledger.commit(chunk);
    }
}

#[test]
fn c02_a_page_written_between_its_clear_and_its_read_is_reported_again() {
    let Some((mut guest, mut source, mut ledger)) = started(KvmLogMode::ManualAtRead) else { return };
    let cursor = first_pass(&mut source, &mut ledger);
    guest.write([LAST_ODD], || {});
    collect(&mut source, &mut ledger);
    ledger.begin_round(cursor);
    let chunk = ledger.take(cursor, ChunkLimits::NONE).unwrap();
    source.before_read(chunk.ranges()).unwrap();
    guest.write([LAST_ODD], || {});
    ledger.commit(chunk);
    collect(&mut source, &mut ledger);
    assert_eq!(send_round(&mut source, &mut ledger, cursor), BTreeSet::from([LAST_ODD]));
}

#[test]
fn c21_a_clear_takes_only_the_pages_of_its_chunk_even_where_they_share_words_with_others() {
    let Some((mut guest, mut source, mut ledger)) = started(KvmLogMode::ManualAtRead) else { return };
    let cursor = first_pass(&mut source, &mut ledger);
    guest.write(odd_pages(), || {});
    collect(&mut source, &mut ledger);
    let page = |gpa: u64| GpaRange::new(gpa, PAGE).unwrap();
    let read = [page((16 << 20) + 63 * PAGE), page(LAST_ODD), page((64 << 20) + 6 * PAGE)];
    source.before_read(&read).unwrap();
    assert_eq!(send_round(&mut source, &mut ledger, cursor), odd_pages());
    collect(&mut source, &mut ledger);
    assert_eq!(taken(&mut ledger, cursor), BTreeSet::new(), "all bits were cleared by their own reads");
}

#[test]
fn standing_bits_are_reported_until_they_are_read_but_counted_once() {
    let Some((mut guest, mut source, mut ledger)) = started(KvmLogMode::ManualAtRead) else { return };
    let cursor = first_pass(&mut source, &mut ledger);
    collect(&mut source, &mut ledger);
    let before = ledger.attribution()[0].pages;
    guest.write(odd_pages(), || {});
    for _ in 0..3 {
        collect(&mut source, &mut ledger);
    }
    assert_eq!(ledger.attribution()[0].pages - before, odd_pages().len() as u64);
    assert_eq!(send_round(&mut source, &mut ledger, cursor), odd_pages());
    guest.write([LAST_ODD], || {});
    collect(&mut source, &mut ledger);
    assert_eq!(ledger.attribution()[0].pages - before, odd_pages().len() as u64 + 1);
}

#[test]
fn c23_two_receivers_each_get_every_page_whoever_reads_first() {
    for mode in MODES {
        let Some((mut guest, mut source, mut ledger)) = started(mode) else { return };
        let one = first_pass(&mut source, &mut ledger);
        let other = first_pass(&mut source, &mut ledger);
        guest.write(odd_pages(), || {});
        collect(&mut source, &mut ledger);
        assert_eq!(send_round(&mut source, &mut ledger, one), odd_pages(), "{mode:?}");
        guest.write([LAST_ODD], || {});
        collect(&mut source, &mut ledger);
        assert_eq!(send_round(&mut source, &mut ledger, one), BTreeSet::from([LAST_ODD]), "{mode:?}");
        assert_eq!(send_round(&mut source, &mut ledger, other), odd_pages(), "{mode:?}");
        collect(&mut source, &mut ledger);
        assert_eq!(taken(&mut ledger, one), BTreeSet::new(), "{mode:?}");
        assert_eq!(taken(&mut ledger, other), BTreeSet::new(), "{mode:?}");
    }
}

/// Starts a tracker that knows the guest's slots, and a VMM that writes nothing.
fn tracker_of(guest: &Guest) -> TrackerBuilder {
    let ram = RAM.map(|(gpa, bytes)| (GuestAddress(gpa), usize::try_from(bytes).unwrap()));
    let quiet = Arc::new(GuestMemoryMmap::<AtomicBitmap>::from_ranges(&ram).unwrap());
    let slots: Vec<_> = guest.slots().iter().map(KvmSlot::gpa).collect();
    let mappings = VmMappings { ram: slots.clone(), vcpu_slots: slots, ..VmMappings::default() };
    let builder = Tracker::builder(guest.layout()).mappings(move || mappings.clone());
    builder.source(Box::new(GuestMemoryLog::new(quiet)))
}

#[test]
fn c21_what_one_receiver_clears_unreported_is_not_lost_to_one_that_holds_a_copy() {
    for mode in MODES {
        for copied_first in [true, false] {
            let Some(mut guest) = Guest::new(&RAM, None) else { return };
            let source = KvmLog::new(Arc::clone(&guest.vm), guest.slots(), mode);
            let builder = tracker_of(&guest).source(Box::new(source));
            let mut vm = builder.build().unwrap();
            let order =
                if copied_first { [Start::Copied, Start::Empty] } else { [Start::Empty, Start::Copied] };
            let mut cursors = order.map(|start| vm.begin(start).unwrap());
            if !copied_first {
                cursors.reverse();
            }
            let [copied, empty] = cursors;
            guest.write(odd_pages(), || {});
            while let Some(chunk) = vm.take(empty, ChunkLimits { bytes: 37 * PAGE, ranges: 5 }).unwrap() {
                vm.commit(chunk);
            }
            assert!(vm.collect().is_empty());
            let mut left = BTreeSet::new();
            while let Some(chunk) = vm.take(copied, ChunkLimits::NONE).unwrap() {
                left.extend(chunk.ranges().iter().flat_map(|range| range.pieces(PAGE)).map(GpaRange::start));
                vm.commit(chunk);
            }
            assert!(left.is_superset(&odd_pages()), "{mode:?}, the copy first: {copied_first}");
        }
    }
}

#[test]
fn who_holds_a_copy_lacks_only_what_is_written_from_then_on() {
    for mode in MODES {
        let Some(mut guest) = Guest::new(&RAM, None) else { return };
        let source = KvmLog::new(Arc::clone(&guest.vm), guest.slots(), mode);
        let builder = tracker_of(&guest).source(Box::new(source));
        let mut vm = builder.build().unwrap();
        let copied = vm.begin(Start::Copied).unwrap();
        guest.write(odd_pages(), || {});
        assert!(vm.collect().is_empty());
        let lacks = vm.take(copied, ChunkLimits::NONE).unwrap().unwrap();
        let pages = lacks.ranges().iter().flat_map(|range| range.pieces(PAGE)).map(GpaRange::start);
        assert_eq!(pages.collect::<BTreeSet<_>>(), odd_pages(), "{mode:?}");
        vm.commit(lacks);
    }
}

#[test]
fn a_log_can_be_started_again_after_a_stop_and_starts_clean() {
    for mode in MODES {
        let Some((mut guest, mut source, mut ledger)) = started(mode) else { return };
        source.stop().unwrap();
        guest.write(odd_pages(), || {});
        source.start(&guest.layout(), &IovaMap::Identity).unwrap();
        let cursor = first_pass(&mut source, &mut ledger);
        guest.write([LAST_ODD], || {});
        collect(&mut source, &mut ledger);
        assert_eq!(send_round(&mut source, &mut ledger, cursor), BTreeSet::from([LAST_ODD]), "{mode:?}");
    }
}
