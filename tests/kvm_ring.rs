// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! KVM's dirty ring as a source, against this host's real KVM.
#![cfg(target_arch = "x86_64")]
#![expect(unsafe_code, reason = "memory slots of a real VM")]
#![expect(clippy::unwrap_used, reason = "a test panics, and says why it was skipped")]

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use kvm_ioctls::VmFd;
use vfio_migration::iova::IovaMap;
use vfio_migration::ledger::{Ledger, Start};
use vfio_migration::source::{DirtySource, KvmRing, KvmRingError, RingSize};

mod guest;

use guest::{Guest, PAGE, collect, taken};

const START: u64 = 16 << 20;
const PAGES: u64 = 5001;
const SMALL: u32 = 16 << 10;

fn started(ring_bytes: u32) -> Option<(Guest, KvmRing<Arc<VmFd>>, Ledger)> {
    let guest = Guest::new(&[(START, PAGES * PAGE), (64 << 20, 7 * PAGE)], Some(ring_bytes))?;
    let mut source = KvmRing::new(Arc::clone(&guest.vm), guest.slots(), guest.ring.unwrap());
    source.add_vcpu(&guest.vcpu).unwrap();
    source.start(&guest.layout(), &IovaMap::Identity).unwrap();
    let ledger = Ledger::new(guest.layout(), 1);
    Some((guest, source, ledger))
}

fn pages(numbers: impl IntoIterator<Item = u64>) -> BTreeSet<u64> {
    numbers.into_iter().map(|number| START + number * PAGE).collect()
}

#[test]
fn c22_the_ring_reports_just_what_the_guest_wrote_again_and_again() {
    let Some((mut guest, mut source, mut ledger)) = started(SMALL) else { return };
    let cursor = ledger.open(Start::Copied);
    let all = || pages([0, 1, 63, 64, 999, PAGES - 1]).into_iter().chain([(64 << 20) + 6 * PAGE]);
    for _ in 0..300 {
        guest.write(all(), || panic!("seven pages do not fill the ring"));
        collect(&mut source, &mut ledger);
        assert_eq!(taken(&mut ledger, cursor), all().collect());
        collect(&mut source, &mut ledger);
        assert_eq!(taken(&mut ledger, cursor), BTreeSet::new());
    }
    source.stop().unwrap();
    source.stop().unwrap();
}

/// Collects; a ring that overflowed leaves every page dirty, as `Tracker` makes it. Returns whether one did.
fn collect_whatever(source: &mut dyn DirtySource, ledger: &mut Ledger) -> bool {
    let result = source.collect(&mut ledger.sink(0, &IovaMap::Identity));
    ledger.absorb();
    let Err(error) = result else { return false };
    let cause = error.cause.downcast_ref::<KvmRingError>();
    assert!(matches!(cause, Some(KvmRingError::Overflowed)), "{:?}", error.cause);
    source.cover().ranges.into_iter().for_each(|range| ledger.mark(range));
    true
}

#[test]
fn c22_a_full_ring_is_harvested_by_the_vcpu_and_the_pages_wait_for_the_collector() {
    let Some((mut guest, mut source, mut ledger)) = started(SMALL) else { return };
    let cursor = ledger.open(Start::Copied);
    let (harvester, mut exits) = (source.harvester(), 0);
    guest.write(pages(0..PAGES), || {
        exits += 1;
        harvester.harvest().unwrap();
        assert!(exits < 2 * PAGES, "the vCPU does not get on");
    });
    let held = u64::from(guest.ring.unwrap().entries());
    assert!(exits >= PAGES / (held + held / 2), "{exits} exits for {PAGES} pages in rings of {held}");
    let overflowed = collect_whatever(&mut source, &mut ledger);
    let found = taken(&mut ledger, cursor);
    assert!(found.is_superset(&pages(0..PAGES)));
    assert!(overflowed || found == pages(0..PAGES));
}

#[test]
fn c22_after_an_overflow_the_ring_is_exact_again() {
    let Some((mut guest, mut source, mut ledger)) = started(SMALL) else { return };
    let cursor = ledger.open(Start::Copied);
    let harvester = source.harvester();
    for _ in 0..3 {
        guest.write(pages(0..PAGES), || assert!(harvester.harvest().is_ok()));
        collect_whatever(&mut source, &mut ledger);
        assert!(taken(&mut ledger, cursor).is_superset(&pages(0..PAGES)));
        for page in [0, 17, 2000, PAGES - 1] {
            guest.write(pages([page]), || panic!("one page does not fill the ring"));
            collect(&mut source, &mut ledger);
            assert_eq!(taken(&mut ledger, cursor), pages([page]));
        }
    }
}

#[test]
fn c22_no_write_is_lost_between_a_harvest_by_the_vcpu_and_one_by_the_collector() {
    let Some((mut guest, mut source, mut ledger)) = started(SMALL) else { return };
    let cursor = ledger.open(Start::Copied);
    let harvester = source.harvester();
    let (round, harvests) = (AtomicU64::new(0), AtomicUsize::new(0));
    const ROUNDS: u64 = 6;
    let found = std::thread::scope(|scope| {
        let collector = scope.spawn(|| {
            let mut found = BTreeSet::new();
            while round.load(Ordering::Acquire) < ROUNDS {
                collect_whatever(&mut source, &mut ledger);
                found.extend(taken(&mut ledger, cursor));
                std::thread::sleep(Duration::from_micros(300));
            }
            collect_whatever(&mut source, &mut ledger);
            found.extend(taken(&mut ledger, cursor));
            found
        });
        for of in 0..ROUNDS {
            guest.write(pages((0..PAGES).filter(|page| page % ROUNDS <= of)), || {
                harvests.fetch_add(1, Ordering::Relaxed);
                harvester.harvest().unwrap();
            });
            round.store(of + 1, Ordering::Release);
        }
        collector.join().unwrap()
    });
    assert!(found.is_superset(&pages(0..PAGES)));
}

#[test]
fn c02_a_page_written_after_a_collect_is_reported_by_the_next() {
    let Some((mut guest, mut source, mut ledger)) = started(SMALL) else { return };
    let cursor = ledger.open(Start::Copied);
    let harvester = source.harvester();
    for _ in 0..50 {
        guest.write(pages([7]), || {});
        harvester.harvest().unwrap();
        guest.write(pages([7]), || {});
        collect(&mut source, &mut ledger);
        assert_eq!(taken(&mut ledger, cursor), pages([7]));
        guest.write(pages([7]), || {});
        collect(&mut source, &mut ledger);
        assert_eq!(taken(&mut ledger, cursor), pages([7]));
    }
}

#[test]
fn a_ring_can_be_started_again_after_a_stop_and_starts_clean() {
    let Some((mut guest, mut source, mut ledger)) = started(SMALL) else { return };
    let cursor = ledger.open(Start::Copied);
    guest.write(pages([1, 2]), || {});
    source.stop().unwrap();
    guest.write(pages([3]), || {});
    source.start(&guest.layout(), &IovaMap::Identity).unwrap();
    guest.write(pages([4]), || {});
    collect(&mut source, &mut ledger);
    assert_eq!(taken(&mut ledger, cursor), pages([4]));
}

#[test]
fn rings_come_before_vcpus_and_in_sizes_that_kvm_allows() {
    let Some(guest) = Guest::new(&[(START, PAGE)], None) else { return };
    for bytes in [0, 2048, 12288, 2 << 20] {
        let refused = RingSize::enable(&guest.vm, bytes);
        assert!(matches!(refused, Err(KvmRingError::Size { .. } | KvmRingError::Absent)), "{refused:?}");
    }
    let late = RingSize::enable(&guest.vm, SMALL);
    assert!(matches!(late, Err(KvmRingError::Enable { .. } | KvmRingError::Absent)), "{late:?}");
    let slots = guest.slots();
    let Ok(size) = RingSize::enabled_elsewhere(&guest.vm, SMALL) else { return };
    let mut source = KvmRing::new(Arc::clone(&guest.vm), slots, size);
    assert!(matches!(source.add_vcpu(&guest.vcpu), Err(KvmRingError::Map(_)) | Ok(())));
}
