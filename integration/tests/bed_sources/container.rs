// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The type1 container as a source.

use std::os::fd::{AsFd, BorrowedFd};

use crate::bed::*;
use crate::kernel::*;
use vfio_migration::iova::{IovaMap, Mapping};
use vfio_migration::range::{GpaRange, IovaRange};
use vfio_migration::source::{ContainerLog, DirtySource, Meaning};

fn log(device: &Device, meaning: Meaning) -> ContainerLog<BorrowedFd<'_>> {
    ContainerLog::new("container", device.container.as_fd(), 3, meaning).unwrap()
}

fn mapping(iova_page: u64, gpa_page: u64, pages: u64) -> Mapping {
    let bytes = pages * PAGE as u64;
    let iova = IovaRange::new(at(iova_page), bytes).unwrap();
    Mapping::new(iova, GpaRange::new(at(gpa_page), bytes).unwrap()).unwrap()
}

#[test]
fn c08_an_mdevs_writes_are_reported_exactly_and_once() {
    let Some([name, _]) = two("container source", "dirty_mdev") else { return };
    let device = open_mdev(&name);
    let mut tracked = Tracked::new(log(&device, Meaning::Written));
    assert!(tracked.source.cover().precise);
    assert_eq!(tracked.pages(), set([]));
    for round in 0..20 {
        let pages = || (0..5).map(|index| (round * 37 + index * 51) % 256);
        write(&device, pages());
        assert_eq!(tracked.pages(), set(pages()));
        assert_eq!(tracked.pages(), set([]));
    }
}

#[test]
fn c41_a_second_start_loses_nothing() {
    let Some([name, _]) = two("container source, START twice", "dirty_mdev") else { return };
    let device = open_mdev(&name);
    let mut tracked = Tracked::new(log(&device, Meaning::Written));
    write(&device, [4]);
    tracked.source.start(&layout(), &IovaMap::Identity).unwrap();
    assert_eq!(tracked.pages(), set([4]));
}

#[test]
fn a_pass_through_device_makes_every_mapped_page_dirty_at_every_read() {
    let Some([name, _]) = two("imprecise container", "edu_vfio") else { return };
    let device = open_edu(&name);
    let mut tracked = Tracked::new(log(&device, Meaning::Mapped));
    assert!(!tracked.source.cover().precise);
    for _ in 0..3 {
        assert_eq!(tracked.pages(), set(0..256));
    }
}

#[test]
fn c12_c13_a_mappings_bits_are_read_before_it_goes_and_translated_as_it_was() {
    let Some([name, _]) = two("container source, unmap", "dirty_mdev") else { return };
    let device = open_mdev(&name);
    let mut map = IovaMap::journal();
    map.map(mapping(0, 0, 256)).unwrap();
    let mut source = log(&device, Meaning::Written);
    source.start(&layout(), &map).unwrap();
    let mut tracked = Tracked::started(source);

    let mut raw = [32 | 3 << 32, device.memory.addr() as u64, at(1000), 16 * PAGE as u64];
    vfio(&device.container, IOMMU_MAP_DMA, &raw mut raw).unwrap();
    let window = mapping(1000, 40, 16);
    map.map(window).unwrap();
    tracked.source.mapped(&window).unwrap();
    tracked.iova = map;
    write(&device, [1003, 7]);
    assert_eq!(tracked.pages(), set([7, 43]), "c18: translated by the mapping, not taken for a GPA");

    write(&device, [1015]);
    let Tracked { source, ledger, iova, .. } = &mut tracked;
    source.unmapped(&window, &mut ledger.sink(0, iova)).unwrap();
    source.forget(&window);
    iova.forget(&window);
    assert_eq!(tracked.taken(), set([55]));
    write(&device, [9]);
    assert_eq!(tracked.pages(), set([9]));
}

#[test]
fn c07_a_read_that_fails_is_an_error_and_the_next_one_is_exact_again() {
    let Some([name, _]) = two("container source, failed read", "dirty_mdev") else { return };
    let device = open_mdev(&name);
    let mut tracked = Tracked::new(log(&device, Meaning::Written));
    write(&device, [4]);
    // Somebody else stops the log: the kernel refuses the read, and what was logged is gone.
    device.container_dirty(2);
    tracked.collect().unwrap_err();
    assert_eq!(tracked.taken(), set(0..256), "all that it covers counts as dirty");
    write(&device, [6]);
    assert_eq!(tracked.pages(), set([6]), "the log was started anew");
}

#[test]
fn a_source_can_be_stopped_and_started_again() {
    let Some([name, _]) = two("container source, restart", "dirty_mdev") else { return };
    let device = open_mdev(&name);
    let mut tracked = Tracked::new(log(&device, Meaning::Written));
    write(&device, [4]);
    tracked.source.stop().unwrap();
    tracked.source.stop().unwrap();
    write(&device, [5]);
    tracked.source.start(&layout(), &IovaMap::Identity).unwrap();
    write(&device, [6]);
    assert_eq!(tracked.pages(), set([6]));
}
