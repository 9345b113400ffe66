// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The questions that were asked of `VFIO_IOMMU_DIRTY_PAGES` when it was reviewed, each answered by the kernel itself.
//!
//! Error numbers were left out of the contract on purpose: a refusal is any error.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::ptr;

use crate::bed::*;
use crate::kernel::*;
use vfio_migration::source::{ContainerLog, ContainerLogError, Meaning};

const START: u64 = 1;
const STOP_FLAG: u64 = 2;
const GET: u64 = 4;

/// `VFIO_IOMMU_DIRTY_PAGES` with these flags and no data.
fn switch(device: &Device, flags: u64) -> io::Result<i32> {
    let mut argument = 8 | flags << 32;
    vfio(&device.container, IOMMU_DIRTY_PAGES, &raw mut argument)
}

/// What a GET asks for.
#[derive(Clone, Copy)]
struct Get {
    argsz: u64,
    flags: u64,
    iova: u64,
    bytes: u64,
    page_bytes: u64,
    bitmap_bytes: u64,
}

/// The GET that is right for the devices' memory.
const RIGHT: Get = Get {
    argsz: 48,
    flags: GET,
    iova: IOVA,
    bytes: BYTES,
    page_bytes: PAGE as u64,
    bitmap_bytes: (PAGES / 8) as u64,
};

fn get_into(device: &Device, get: Get, bitmap: &mut [u64]) -> io::Result<i32> {
    let Get { argsz, flags, iova, bytes, page_bytes, bitmap_bytes } = get;
    let pointer = bitmap.as_mut_ptr().addr() as u64;
    let mut argument = [argsz | flags << 32, iova, bytes, page_bytes, bitmap_bytes, pointer];
    vfio(&device.container, IOMMU_DIRTY_PAGES, &raw mut argument)
}

fn get(device: &Device, get: Get) -> io::Result<Vec<usize>> {
    let mut bitmap = [0; 2 * PAGES / 64];
    get_into(device, get, &mut bitmap).map(|_| set_bits(&bitmap))
}

pub(crate) fn map(device: &Device, iova: u64, offset: usize, bytes: usize) {
    let vaddr = device.memory.addr() + offset;
    let mut map = [32 | 3 << 32, vaddr as u64, iova, bytes as u64];
    vfio(&device.container, IOMMU_MAP_DMA, &raw mut map).unwrap();
}

/// An mdev in a container whose log is on.
fn logging(test: &str) -> Option<Device> {
    let [name, _] = two(test, "dirty_mdev")?;
    let device = open_mdev(&name);
    switch(&device, START).unwrap();
    Some(device)
}

#[test]
fn get_before_start_fails() {
    let Some([name, _]) = two("GET before START", "dirty_mdev") else { return };
    get(&open_mdev(&name), RIGHT).unwrap_err();
}

#[test]
fn get_after_stop_fails() {
    let Some(device) = logging("GET after STOP") else { return };
    get(&device, RIGHT).unwrap();
    switch(&device, STOP_FLAG).unwrap();
    get(&device, RIGHT).unwrap_err();
}

#[test]
fn get_clears_what_was_written_and_not_what_is_pinned() {
    let Some(device) = logging("what GET clears") else { return };
    write(&device, [3, 70]);
    device.write(PIN, at(9)).unwrap();
    assert_eq!(get(&device, RIGHT).unwrap(), [3, 9, 70]);
    assert_eq!(get(&device, RIGHT).unwrap(), [9]);
    device.write(UNPIN, at(9)).unwrap();
}

#[test]
fn smallest_page_size_is_discovered_in_the_capability_chain_and_no_other_will_do() {
    let Some(device) = logging("smallest page size") else { return };
    let log = ContainerLog::new("container", device.container.as_fd(), 3, Meaning::Written).unwrap();
    assert_eq!(log.granule().bytes(), PAGE as u64);
    for page_bytes in [0, 2048, 8192, 2 << 20] {
        get(&device, Get { page_bytes, ..RIGHT }).unwrap_err();
    }
    get(&device, Get { page_bytes: log.granule().bytes(), ..RIGHT }).unwrap();
}

#[test]
fn zeroing_is_the_users_part_words_of_holes_stay_as_they_were() {
    let Some(device) = logging("who zeroes") else { return };
    let mut bitmap = [u64::MAX; 2 * PAGES / 64];
    let twice = Get { bytes: 2 * BYTES, bitmap_bytes: 2 * PAGES as u64 / 8, ..RIGHT };
    get_into(&device, twice, &mut bitmap).unwrap();
    let (mapped, hole) = bitmap.split_at(PAGES / 64);
    assert!(mapped.iter().all(|&word| word == 0), "c08: words of a mapping are overwritten");
    assert!(hole.iter().all(|&word| word == u64::MAX), "words of a hole are left alone");
}

#[test]
fn argsz_counts_the_structures_and_not_the_bitmap() {
    let Some(device) = logging("argsz") else { return };
    for argsz in [0, 8, 40, 47] {
        get(&device, Get { argsz, ..RIGHT }).unwrap_err();
    }
    get(&device, RIGHT).unwrap();
    get(&device, Get { argsz: 48 + RIGHT.bitmap_bytes, ..RIGHT }).unwrap();
}

#[test]
fn two_flags_at_once_and_unknown_ones_fail() {
    let Some([name, _]) = two("two flags", "dirty_mdev") else { return };
    let device = open_mdev(&name);
    for flags in [0, START | STOP_FLAG, START | GET, STOP_FLAG | GET, 8, START | 8] {
        switch(&device, flags).unwrap_err();
    }
    get(&device, RIGHT).unwrap_err();
}

/// A container of model `type1`, version 1.
fn type1_v1(name: &str) -> (File, File) {
    let group = fs::read_link(format!("/sys/bus/mdev/devices/{name}/iommu_group")).unwrap();
    let open = |path: &str| OpenOptions::new().read(true).write(true).open(path).unwrap();
    let group = open(&format!("/dev/vfio/{}", group.file_name().unwrap().to_str().unwrap()));
    let container = open("/dev/vfio/vfio");
    let mut fd: RawFd = container.as_raw_fd();
    vfio(&group, GROUP_SET_CONTAINER, &raw mut fd).unwrap();
    vfio(&container, SET_IOMMU, ptr::without_provenance_mut::<u8>(1)).unwrap();
    (group, container)
}

#[test]
fn type1_v1_is_refused_by_the_kernel_and_never_asked_by_the_library() {
    let Some([name, _]) = two("type1 v1", "dirty_mdev") else { return };
    let (_group, container) = type1_v1(&name);
    let mut argument = 8 | START << 32;
    vfio(&container, IOMMU_DIRTY_PAGES, &raw mut argument).unwrap_err();
    let log = ContainerLog::new("container", container.as_fd(), 1, Meaning::Written);
    assert!(matches!(log, Err(ContainerLogError::Model { model: 1 })));
}

#[test]
fn a_bitmap_too_small_fails_a_larger_one_will_do_and_one_over_the_limit_fails() {
    const MAX_BYTES: u64 = 256 << 20;
    let Some(device) = logging("sizes of the bitmap") else { return };
    for bitmap_bytes in [0, 8, RIGHT.bitmap_bytes - 8, MAX_BYTES + 8] {
        get(&device, Get { bitmap_bytes, ..RIGHT }).unwrap_err();
    }
    // Not on the stack: so many bytes from there would reach beyond user space.
    let mut bitmap = vec![0; 2 * PAGES / 64];
    for bitmap_bytes in [2 * RIGHT.bitmap_bytes, MAX_BYTES] {
        get_into(&device, Get { bitmap_bytes, ..RIGHT }, &mut bitmap).unwrap();
    }
}

#[test]
fn a_range_that_bisects_a_mapping_fails() {
    let Some(device) = logging("a bisected mapping") else { return };
    let page = PAGE as u64;
    get(&device, Get { iova: IOVA + page, bytes: BYTES - page, ..RIGHT }).unwrap_err();
    get(&device, Get { bytes: BYTES - page, ..RIGHT }).unwrap_err();
    get(&device, Get { iova: IOVA + page, bytes: page, ..RIGHT }).unwrap_err();
    get(&device, Get { iova: IOVA + 1, ..RIGHT }).unwrap_err();
}

#[test]
fn a_range_may_span_holes_and_mappings_and_even_nothing() {
    let Some(device) = logging("holes") else { return };
    map(&device, at(300), 0, 10 * PAGE);
    device.write(WRITE_AT, at(309)).unwrap();
    write(&device, [1]);
    let both = Get { bytes: 400 * PAGE as u64, bitmap_bytes: 64, ..RIGHT };
    assert_eq!(get(&device, both).unwrap(), [1, 309]);
    let nothing = Get { iova: at(1000), ..RIGHT };
    assert_eq!(get(&device, nothing).unwrap(), [0usize; 0]);
}

#[test]
fn a_second_start_succeeds_and_keeps_what_was_logged() {
    let Some(device) = logging("START twice") else { return };
    write(&device, [5]);
    switch(&device, START).unwrap();
    assert_eq!(get(&device, RIGHT).unwrap(), [5]);
}

#[test]
fn stop_succeeds_whether_or_not_the_log_is_on_and_loses_what_was_not_read() {
    let Some(device) = logging("STOP twice") else { return };
    write(&device, [5]);
    switch(&device, STOP_FLAG).unwrap();
    switch(&device, STOP_FLAG).unwrap();
    switch(&device, START).unwrap();
    assert_eq!(get(&device, RIGHT).unwrap(), [0usize; 0]);
}

#[test]
fn unmap_with_bitmap_reports_the_last_writes_and_takes_the_mapping_down() {
    let Some([name, _]) = two("unmap with bitmap", "dirty_mdev") else { return };
    let device = open_mdev(&name);
    let log = ContainerLog::new("container", device.container.as_fd(), 3, Meaning::Written).unwrap();
    let mut tracked = Tracked::new(log);
    write(&device, [0, 100, 255]);
    let iova = vfio_migration::range::IovaRange::new(IOVA, BYTES).unwrap();
    let Tracked { source, ledger, iova: map, .. } = &mut tracked;
    assert_eq!(source.unmap_with_bitmap(iova, &mut ledger.sink(0, map)).unwrap(), BYTES);
    assert_eq!(tracked.taken(), set([0, 100, 255]));
    device.write(WRITE_AT, at(0)).unwrap_err();
}

#[test]
fn unmap_with_bitmap_takes_one_of_a_regions_mappings_down() {
    let Some([name, _]) = two("unmap with bitmap, one of two mappings", "dirty_mdev") else { return };
    let device = open_mdev(&name);
    let half = BYTES / 2;
    let mut unmap = [24, IOVA, BYTES];
    vfio(&device.container, 114, &raw mut unmap).unwrap();
    map(&device, IOVA, 0, PAGES / 2 * PAGE);
    map(&device, IOVA + half, PAGES / 2 * PAGE, PAGES / 2 * PAGE);
    let log = ContainerLog::new("container", device.container.as_fd(), 3, Meaning::Written).unwrap();
    let mut tracked = Tracked::new(log);
    write(&device, [0, 127, 128]);
    let iova = vfio_migration::range::IovaRange::new(IOVA, half).unwrap();
    let Tracked { source, ledger, iova: map, .. } = &mut tracked;
    assert_eq!(source.unmap_with_bitmap(iova, &mut ledger.sink(0, map)).unwrap(), half);
    assert_eq!(tracked.taken(), set([0, 127]));
    device.write(WRITE_AT, at(0)).unwrap_err();
    assert_eq!(tracked.pages(), set([128]), "the other mapping stands, and so do its bits");
}

#[test]
fn unmap_with_bitmap_of_a_part_fails_and_changes_nothing() {
    let Some(device) = logging("unmap with bitmap, bisecting") else { return };
    write(&device, [7]);
    let mut bitmap = [0u64; PAGES / 64];
    let pointer = bitmap.as_mut_ptr().addr() as u64;
    let half = BYTES / 2;
    let mut unmap = [48 | 1 << 32, IOVA, half, PAGE as u64, half / PAGE as u64 / 8, pointer];
    vfio(&device.container, 114, &raw mut unmap).unwrap_err();
    assert_eq!(get(&device, RIGHT).unwrap(), [7]);
}

#[test]
fn a_buffer_that_cannot_be_written_fails_the_get_and_what_was_read_before_is_lost() {
    let Some(device) = logging("an unwritable bitmap") else { return };
    map(&device, at(PAGES as u64), 0, 10 * PAGE);
    write(&device, [7, 260]);
    // The words of the first mapping end where the writable page does; those of the second lie beyond it.
    let buffer = anonymous_memory();
    let beyond = buffer.wrapping_add(PAGE);
    // SAFETY: nobody else knows this memory.
    assert_eq!(unsafe { libc::mprotect(beyond.cast(), PAGE, libc::PROT_NONE) }, 0);
    let pointer = beyond.addr() as u64 - RIGHT.bitmap_bytes;
    let both = Get { bytes: BYTES + 10 * PAGE as u64, bitmap_bytes: RIGHT.bitmap_bytes + 8, ..RIGHT };
    let Get { argsz, flags, iova, bytes, page_bytes, bitmap_bytes } = both;
    let mut argument = [argsz | flags << 32, iova, bytes, page_bytes, bitmap_bytes, pointer];
    vfio(&device.container, IOMMU_DIRTY_PAGES, &raw mut argument).unwrap_err();
    assert_eq!(get(&device, both).unwrap(), [260], "page 7 was cleared with a read that failed");
}
