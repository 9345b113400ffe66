// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! An IOMMU page table as a source, on the mock domain of the own kernel.
//!
//! The mock domain has no device: the kernel pretends that pages were written. So what it does not show is DMA that races a read.

use std::os::fd::AsFd;

use crate::bed::*;
use crate::kernel::*;
use crate::mock::Mock;
use vfio_migration::granule::Granule;
use vfio_migration::iova::{IovaMap, Mapping};
use vfio_migration::range::GpaRange;
use vfio_migration::source::{DirtySource, HwptLog};

const HWPT_GET_DIRTY_BITMAP: u64 = 0x8c;

#[test]
fn c19_writes_are_reported_widened_to_host_pages_and_once() {
    let Some(mock) = Mock::new("page table", true) else { return };
    let mut tracked = Tracked::new(mock.log());
    assert_eq!(tracked.pages(), set([]));
    mock.write(&[0, 1, 6, 100, 511]);
    assert_eq!(tracked.pages(), set([0, 3, 50, 255]));
    assert_eq!(tracked.pages(), set([]));
    tracked.source.stop().unwrap();
    tracked.source.stop().unwrap();
}

#[test]
fn c41_a_second_start_clears_nothing() {
    let Some(mock) = Mock::new("page table, START twice", true) else { return };
    let mut tracked = Tracked::new(mock.log());
    mock.write(&[20]);
    tracked.source.start(&layout(), &IovaMap::Identity).unwrap();
    assert_eq!(tracked.pages(), set([10]));
}

#[test]
fn c01_what_was_written_before_the_start_is_not_reported() {
    let Some(mock) = Mock::new("page table, before START", true) else { return };
    let mut tracked = Tracked::new(mock.log());
    mock.write(&[20]);
    tracked.source.stop().unwrap();
    tracked.source.start(&layout(), &IovaMap::Identity).unwrap();
    assert_eq!(tracked.pages(), set([]));
}

#[test]
fn c13_the_bits_of_a_mapping_about_to_go_are_read_and_left() {
    let Some(mock) = Mock::new("page table, unmap", true) else { return };
    let mut tracked = Tracked::new(mock.log());
    mock.write(&[4, 60]);
    let whole = Mapping::identity(GpaRange::new(IOVA, BYTES).unwrap());
    let Tracked { source, ledger, iova, .. } = &mut tracked;
    source.unmapped(&whole, &mut ledger.sink(0, iova)).unwrap();
    assert_eq!(tracked.taken(), set([2, 30]));
    tracked.source.mapped(&whole).unwrap();
    assert_eq!(tracked.pages(), set([2, 30]), "they were not cleared");
}

#[test]
fn a_coarser_granule_widens() {
    let Some(mock) = Mock::new("page table, granule", true) else { return };
    let mut tracked = Tracked::new(mock.log().with_granule(Granule::new(16 * PAGE as u64).unwrap()));
    mock.write(&[70]);
    assert_eq!(tracked.pages(), set(32..48));
}

#[test]
fn a_page_table_not_allocated_for_tracking_is_refused_at_the_start() {
    let Some(mock) = Mock::new("page table without tracking", false) else { return };
    let mut source = mock.log();
    source.start(&layout(), &IovaMap::Identity).unwrap_err();
    source.stop().unwrap();
    let mut none = HwptLog::new("page-table", mock.iommu.as_fd(), u32::MAX);
    none.start(&layout(), &IovaMap::Identity).unwrap_err();
}

#[test]
fn a_hole_passes_for_clean_memory_and_hides_what_lies_behind_it() {
    let Some(mock) = Mock::new("page table with a hole", true) else { return };
    let mut tracked = Tracked::new(mock.log());
    mock.write(&[4]);
    let nothing = Mapping::identity(GpaRange::new(at(256), 3 * PAGE as u64).unwrap());
    tracked.source.mapped(&nothing).unwrap();
    assert_eq!(tracked.pages(), set([2]), "no error, so the source asks for one mapping at a time");
    mock.write(&[4]);
    let mut words = [0u64; 2 * PAGES / 64];
    let before = IOVA - BYTES;
    let pointer = words.as_mut_ptr().addr() as u64;
    let get = [u64::from(mock.hwpt) << 32, 0, before, 2 * BYTES, PAGE as u64, pointer];
    iommufd(&mock.iommu, HWPT_GET_DIRTY_BITMAP, get);
    assert_eq!(set_bits(&words), [0usize; 0], "success, and nothing of the page that was written");
    assert_eq!(tracked.pages(), set([2]), "its bit was not cleared either");
}
