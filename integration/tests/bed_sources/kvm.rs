// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A guest's writes beside its devices': all over the same memory, each seen by a source of its own.

use std::collections::BTreeSet;
use std::os::fd::AsFd;
use std::sync::Arc;

use crate::bed::*;
use crate::guest::{Guest, Ram};
use crate::kernel::{Device, IOMMU_MAP_DMA, IOVA, bed, two, vfio};
use vfio_migration::iova::IovaMap;
use vfio_migration::ledger::{ChunkLimits, CursorId, Ledger, Start};
use vfio_migration::range::GpaRange;
use vfio_migration::source::{ContainerLog, DeviceLog, DirtySource, KvmLog, KvmLogMode, KvmRing, Meaning};

const RING_BYTES: u32 = 16 << 10;

/// A guest whose RAM is the memory of `device`.
fn guest_over(device: &Device, ring_bytes: Option<u32>) -> Option<Guest> {
    let gpa = GpaRange::new(IOVA, BYTES).unwrap();
    Guest::over(&[], &[Ram { gpa, userspace_addr: device.memory.addr() as u64 }], ring_bytes)
}

/// The KVM source for `guest`: its rings if it has them, else its log.
fn kvm_source(guest: &Guest) -> Box<dyn DirtySource> {
    let (vm, slots) = (Arc::clone(&guest.vm), guest.slots());
    match guest.ring {
        Some(size) => {
            let mut rings = KvmRing::new(vm, slots, size);
            rings.add_vcpu(&guest.vcpu).unwrap();
            Box::new(rings)
        }
        None => Box::new(KvmLog::new(vm, slots, KvmLogMode::ManualAtReport)),
    }
}

/// Collects all sources into the ledger, and returns the pages that the receiver lacked.
fn union(sources: &mut [Box<dyn DirtySource + '_>], ledger: &mut Ledger, cursor: CursorId) -> BTreeSet<u64> {
    for (number, source) in sources.iter_mut().enumerate() {
        source.collect(&mut ledger.sink(number, &IovaMap::Identity)).unwrap();
    }
    ledger.absorb();
    ledger.begin_round(cursor);
    let Some(chunk) = ledger.take(cursor, ChunkLimits::NONE) else { return BTreeSet::new() };
    let pieces = chunk.ranges().iter().flat_map(|range| range.pieces(1 << 12));
    let pages = pieces.map(|piece| (piece.start() - IOVA) >> 12).collect();
    ledger.commit(chunk);
    pages
}

fn all_three(ring_bytes: Option<u32>) {
    let test = "a guest, an mdev and an edu over the same memory";
    let Some([mdev, _]) = two(test, "dirty_mdev") else { return };
    let Some([edu, _]) = two(test, "edu_vfio") else { return };
    let (mdev, edu) = (open_mdev(&mdev), open_edu(&edu));
    let Some(mut guest) = guest_over(&mdev, ring_bytes) else { return };
    // What the edu is given beside its own memory is the guest's.
    let beside = IOVA + 2 * BYTES;
    let mut map = [32 | 3 << 32, mdev.memory.addr() as u64, beside, BYTES];
    vfio(&edu.container, IOMMU_MAP_DMA, &raw mut map).unwrap();
    let mut sources: Vec<Box<dyn DirtySource + '_>> = vec![
        kvm_source(&guest),
        Box::new(ContainerLog::new("container", mdev.container.as_fd(), 3, Meaning::Written).unwrap()),
        Box::new(DeviceLog::new("device-log", edu.file.as_fd()).unwrap()),
    ];
    sources.iter_mut().for_each(|source| source.start(&layout(), &IovaMap::Identity).unwrap());
    let mut ledger = Ledger::new(layout(), sources.len());
    let cursor = ledger.open(Start::Copied);
    for round in 0..10 {
        let by_guest = [1, 3, 7, 9].map(|page| page + round);
        let by_mdev = [7, 20].map(|page| page + round);
        guest.write(by_guest.map(at), || panic!("four pages do not fill a ring"));
        write(&mdev, by_mdev);
        dma(&edu, 29 + round);
        let expected = set(by_guest.into_iter().chain(by_mdev).chain([29 + round]));
        assert_eq!(union(&mut sources, &mut ledger, cursor), expected, "round {round}");
    }
    let pages: Vec<_> = ledger.attribution().iter().map(|one| (one.pages, one.exclusive_pages)).collect();
    assert_eq!(pages, [(40, 30), (20, 10), (10, 10)]);
    sources.iter_mut().for_each(|source| source.stop().unwrap());
}

#[test]
fn c40_three_sources_over_the_same_memory_unite_to_just_what_was_written() {
    all_three(None);
}

#[test]
fn c22_three_sources_with_the_rings_in_place_of_the_log() {
    all_three(Some(RING_BYTES));
}

#[test]
fn every_mode_of_the_log_reports_what_the_guest_wrote() {
    if bed("KVM's log").is_none() {
        return;
    }
    for mode in [KvmLogMode::AtReport, KvmLogMode::ManualAtReport, KvmLogMode::ManualAtRead] {
        let Some(mut guest) = Guest::new(&[(IOVA, BYTES)], None) else { return };
        let mut tracked = Tracked::new(KvmLog::new(Arc::clone(&guest.vm), guest.slots(), mode));
        tracked.source.before_read(&[GpaRange::new(IOVA, BYTES).unwrap()]).unwrap();
        guest.write([0, 63, 64, 255].map(at), || {});
        assert_eq!(tracked.pages(), set([0, 63, 64, 255]), "{mode:?}");
    }
}

#[test]
fn c22_full_rings_lose_nothing() {
    if bed("full rings").is_none() {
        return;
    }
    const PAGES: u64 = 5000;
    let Some(mut guest) = Guest::new(&[(IOVA, PAGES << 12)], Some(RING_BYTES)) else { return };
    let mut rings = KvmRing::new(Arc::clone(&guest.vm), guest.slots(), guest.ring.unwrap());
    rings.add_vcpu(&guest.vcpu).unwrap();
    rings.start(&guest.layout(), &IovaMap::Identity).unwrap();
    let (harvester, mut exits) = (rings.harvester(), 0);
    guest.write((0..PAGES).map(at), || {
        exits += 1;
        harvester.harvest().unwrap();
    });
    assert!(exits > 0, "the rings were full now and then");
    let mut ledger = Ledger::new(guest.layout(), 1);
    let cursor = ledger.open(Start::Copied);
    let mut sources: Vec<Box<dyn DirtySource>> = vec![Box::new(rings)];
    assert_eq!(union(&mut sources, &mut ledger, cursor), set(0..PAGES));
}
