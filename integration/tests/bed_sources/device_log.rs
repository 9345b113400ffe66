// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A device's own DMA log as a source.

use std::os::fd::{AsFd, BorrowedFd};

use crate::bed::*;
use crate::kernel::*;
use vfio_migration::granule::Granule;
use vfio_migration::iova::{IovaMap, Mapping};
use vfio_migration::layout::Layout;
use vfio_migration::range::{GpaRange, IovaRange};
use vfio_migration::source::{Coverage, DeviceLog, DeviceLogError, DirtySource};

fn log(device: &Device) -> DeviceLog<BorrowedFd<'_>> {
    DeviceLog::new("device-log", device.file.as_fd()).unwrap()
}

fn range(page: u64, pages: u64) -> IovaRange {
    IovaRange::new(at(page), pages * PAGE as u64).unwrap()
}

fn mapping(page: u64, pages: u64) -> Mapping {
    Mapping::identity(GpaRange::new(at(page), pages * PAGE as u64).unwrap())
}

/// RAM in four pieces, with holes of different size between; of the devices' memory are the first two.
fn pieces() -> Layout {
    let pieces = [mapping(0, 16), mapping(128, 16), mapping(320, 4), mapping(448, 100)];
    Layout::new(pieces.map(|piece| piece.gpa()), Granule::host_page()).unwrap()
}

#[test]
fn a_devices_writes_are_reported_exactly_and_once() {
    let Some([mdev, _]) = two("device log", "dirty_mdev") else { return };
    let device = open_mdev(&mdev);
    let mut tracked = Tracked::new(log(&device));
    assert_eq!(tracked.source.granule(), Some(Granule::host_page()));
    for round in 0..20 {
        let pages = || (0..5).map(|index| (round * 37 + index * 51) % 256);
        write(&device, pages());
        assert_eq!(tracked.pages(), set(pages()));
        assert_eq!(tracked.pages(), set([]));
    }
}

#[test]
fn real_dma_through_a_real_iommu_is_reported_exactly() {
    let Some([edu, _]) = two("device log of edu", "edu_vfio") else { return };
    let device = open_edu(&edu);
    let mut tracked = Tracked::new(log(&device));
    for page in [0, 77, 255] {
        dma(&device, page);
        assert_eq!(tracked.pages(), set([page]));
        assert_eq!(tracked.pages(), set([]));
    }
}

#[test]
fn c19_a_granule_coarser_than_asked_widens() {
    let Some([mdev, _]) = two("device log, granule", "dirty_mdev") else { return };
    let device = open_mdev(&mdev);
    let _granule = Parameter::fixture("log_granule", 16 * PAGE as u64);
    let mut tracked = Tracked::new(log(&device));
    assert_eq!(tracked.source.granule().unwrap().bytes(), 16 * PAGE as u64);
    write(&device, [17, 255]);
    assert_eq!(tracked.pages(), set((16..32).chain(240..256)));
    assert_eq!(tracked.pages(), set([]));
}

#[test]
fn c43_ranges_that_fit_no_coarse_page_are_asked_for_at_a_finer_one() {
    let Some([mdev, _]) = two("device log, alignment", "dirty_mdev") else { return };
    let device = open_mdev(&mdev);
    let mut source = log(&device).with_granule(Granule::new(2 << 20).unwrap());
    source.start(&pieces(), &IovaMap::Identity).unwrap();
    assert_eq!(source.granule().unwrap().bytes(), 4 * PAGE as u64);
    source.stop().unwrap();
}

#[test]
fn c10_ranges_are_merged_until_the_device_takes_them_and_nothing_of_them_is_lost() {
    let Some([mdev, _]) = two("device log, few ranges", "dirty_mdev") else { return };
    let device = open_mdev(&mdev);
    for (most, expected) in [
        (4, vec![range(0, 16), range(128, 16), range(320, 4), range(448, 100)]),
        (2, vec![range(0, 144), range(320, 228)]),
        (1, vec![range(0, 548)]),
    ] {
        let _most = Parameter::fixture("log_max_ranges", most);
        let mut source = log(&device);
        source.start(&pieces(), &IovaMap::Identity).unwrap();
        assert_eq!(source.covered(), expected);
        let mut tracked = Tracked::started(source);
        write(&device, [0, 15, 128, 143]);
        assert_eq!(tracked.pages(), set([0, 15, 128, 143]));
        tracked.source.stop().unwrap();
    }
}

#[test]
fn c10_a_span_over_the_devices_limit_is_not_answered_with_a_longer_one() {
    let Some([mdev, _]) = two("device log, long span", "dirty_mdev") else { return };
    let device = open_mdev(&mdev);
    let _length = Parameter::fixture("log_max_length", 136 * PAGE as u64);
    let mut source = log(&device);
    source.start(&pieces(), &IovaMap::Identity).unwrap();
    assert_eq!(source.covered().len(), 4);
    source.stop().unwrap();
    let error = log(&device).start(&layout(), &IovaMap::Identity).unwrap_err();
    let cause = error.cause.downcast::<DeviceLogError>().unwrap();
    let DeviceLogError::Start { source: refusal, ranges: 1, .. } = *cause else { panic!("{cause:?}") };
    assert_eq!(refusal.raw_os_error(), Some(libc::EOPNOTSUPP));
}

#[test]
fn c07_a_sticky_report_error_makes_all_dirty_once_and_the_log_is_exact_again() {
    let Some([mdev, _]) = two("device log, sticky error", "dirty_mdev") else { return };
    let device = open_mdev(&mdev);
    let mut tracked = Tracked::new(log(&device));
    write(&device, [4]);
    assert_eq!(tracked.pages(), set([4]));
    let fault = Parameter::fixture("fault_log_report", 1);
    write(&device, [5]);
    let error = tracked.collect().unwrap_err();
    assert!(matches!(error.cause.downcast_ref(), Some(DeviceLogError::Report { .. })), "{:?}", error.cause);
    drop(fault);
    assert_eq!(tracked.taken(), set(0..256));
    write(&device, [6]);
    assert_eq!(tracked.pages(), set([6]));
}

#[test]
fn c07_a_log_that_cannot_be_started_anew_keeps_everything_dirty_until_it_can() {
    let Some([mdev, _]) = two("device log, failed restart", "dirty_mdev") else { return };
    let device = open_mdev(&mdev);
    let mut tracked = Tracked::new(log(&device));
    let report = Parameter::fixture("fault_log_report", 1);
    let start = Parameter::fixture("fault_log_start", 5);
    for _ in 0..3 {
        tracked.collect().unwrap_err();
        assert_eq!(tracked.taken(), set(0..256));
    }
    drop((report, start));
    tracked.collect().unwrap_err();
    assert_eq!(tracked.taken(), set(0..256), "the time before the restart is unknown too");
    write(&device, [8]);
    assert_eq!(tracked.pages(), set([8]));
}

/// A log of 128 pages, of which half are mapped.
fn half_mapped(device: &Device) -> Tracked<DeviceLog<BorrowedFd<'_>>> {
    let mut source = log(device).with_coverage(Coverage::Ranges(vec![range(0, 128)]));
    let mut map = IovaMap::journal();
    map.map(mapping(0, 64)).unwrap();
    source.start(&layout(), &map).unwrap();
    Tracked::started(source)
}

#[test]
fn c09_a_mapping_outside_has_the_log_widened_and_all_that_is_mapped_is_dirty_once() {
    let Some([mdev, _]) = two("device log, widened", "dirty_mdev") else { return };
    let device = open_mdev(&mdev);
    let mut tracked = half_mapped(&device);
    tracked.source.mapped(&mapping(64, 64)).unwrap();
    write(&device, [3, 100]);
    assert_eq!(tracked.pages(), set([3, 100]), "a mapping inside changes nothing");
    write(&device, [4]);
    tracked.source.mapped(&mapping(192, 4)).unwrap();
    assert_eq!(tracked.source.covered(), [range(0, 128), range(192, 4)]);
    write(&device, [193]);
    assert_eq!(tracked.pages(), set((0..128).chain(192..196)), "old and new");
    assert_eq!(tracked.pages(), set([]), "once");
    write(&device, [5, 127, 192, 195]);
    assert_eq!(tracked.pages(), set([5, 127, 192, 195]));
}

#[test]
fn c09_c42_a_device_that_cannot_log_more_goes_on_and_the_mapping_is_always_dirty() {
    let Some([mdev, _]) = two("device log, not widened", "dirty_mdev") else { return };
    let device = open_mdev(&mdev);
    let mut tracked = half_mapped(&device);
    let _length = Parameter::fixture("log_max_length", 128 * PAGE as u64);
    write(&device, [3]);
    tracked.source.mapped(&mapping(192, 4)).unwrap_err();
    assert_eq!(tracked.source.covered(), [range(0, 128)]);
    assert_eq!(tracked.pages(), set((0..64).chain(192..196)), "the log was off for a moment");
    write(&device, [7, 193]);
    assert_eq!(tracked.pages(), set([7].into_iter().chain(192..196)));
    assert_eq!(tracked.pages(), set(192..196), "nothing is known of it");
}

#[test]
fn c12_a_mappings_writes_are_reported_before_it_goes() {
    let Some([mdev, _]) = two("device log, unmap", "dirty_mdev") else { return };
    let device = open_mdev(&mdev);
    let mut tracked = Tracked::new(log(&device));
    write(&device, [1, 2]);
    let Tracked { source, ledger, iova, .. } = &mut tracked;
    source.unmapped(&mapping(0, 256), &mut ledger.sink(0, iova)).unwrap();
    source.forget(&mapping(0, 256));
    assert_eq!(tracked.taken(), set([1, 2]));
    assert!(tracked.source.cover().ranges.is_empty());
}

#[test]
fn c55_a_driver_that_clears_whole_words_loses_nothing_beside_a_mapping_that_goes() {
    let Some([mdev, _]) = two("device log, whole words", "dirty_mdev") else { return };
    let device = open_mdev(&mdev);
    let _words = Parameter::fixture("log_whole_words", 1);
    let mut source = log(&device).with_coverage(Coverage::Ranges(vec![range(0, 256)]));
    let mut map = IovaMap::journal();
    for (page, pages) in [(0, 8), (10, 30), (100, 70), (201, 9)] {
        map.map(mapping(page, pages)).unwrap();
    }
    source.start(&layout(), &map).unwrap();
    let mut tracked = Tracked::started(source);
    tracked.iova = map;
    let written = [1, 10, 39, 100, 127, 128, 169, 209];
    write(&device, written);
    let Tracked { source, ledger, iova, .. } = &mut tracked;
    source.unmapped(&mapping(10, 30), &mut ledger.sink(0, iova)).unwrap();
    source.forget(&mapping(10, 30));
    tracked.iova.forget(&mapping(10, 30));
    tracked.collect().unwrap();
    assert_eq!(tracked.taken(), set(written));
}

#[test]
fn c55_ranges_that_begin_within_a_word_of_the_lowest_lose_nothing() {
    let Some([mdev, _]) = two("device log, odd ranges", "dirty_mdev") else { return };
    let device = open_mdev(&mdev);
    let _words = Parameter::fixture("log_whole_words", 1);
    let odd = [mapping(3, 7), mapping(20, 30), mapping(130, 1), mapping(200, 50)];
    let odd = Layout::new(odd.map(|piece| piece.gpa()), Granule::host_page()).unwrap();
    let mut source = log(&device);
    source.start(&odd, &IovaMap::Identity).unwrap();
    let mut tracked = Tracked::started(source);
    for written in [[3, 20, 49, 130, 200], [9, 49, 130, 210, 249]] {
        write(&device, written);
        assert_eq!(tracked.pages(), set(written));
    }
}

#[test]
fn a_second_log_of_one_device_is_refused_and_the_first_goes_on() {
    let Some([mdev, _]) = two("device log, twice", "dirty_mdev") else { return };
    let device = open_mdev(&mdev);
    let mut tracked = Tracked::new(log(&device));
    log(&device).start(&layout(), &IovaMap::Identity).unwrap_err();
    write(&device, [1]);
    assert_eq!(tracked.pages(), set([1]));
}
