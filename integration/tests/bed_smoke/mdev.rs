// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! `dirty_mdev`: see resources/modules/dirty_mdev.h.

use std::io::{Read, Write};
use std::thread::sleep;
use std::time::Duration;

use crate::kernel::*;

pub(crate) const CONTROL: u64 = 0x08;
pub(crate) const SEED: u64 = 0x10;
pub(crate) const POSITION: u64 = 0x18;
pub(crate) const COUNT: u64 = 0x20;
pub(crate) const RATE: u64 = 0x30;
pub(crate) const BURST: u64 = 0x38;
pub(crate) const WRITE_AT: u64 = 0x40;
pub(crate) const PIN: u64 = 0x48;
pub(crate) const UNPIN: u64 = 0x50;
pub(crate) const WINDOW: u64 = 0x100;

/// The words dirty_mdev writes to one window over all memory, from `first` on: index and word.
pub(crate) fn stream(seed: u64, first: u64, count: u64) -> impl Iterator<Item = (usize, u64)> {
    let random = move |n: u64| {
        let z = seed.wrapping_add((n + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15));
        let z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    };
    let slots = (PAGES * PAGE / 8) as u64;
    (first..first + count).map(move |p| (usize::try_from(random(2 * p) % slots).unwrap(), random(2 * p + 1)))
}

/// The pages a part of the stream dirties, in order.
pub(crate) fn stream_pages(seed: u64, first: u64, count: u64) -> Vec<usize> {
    let mut pages: Vec<usize> = stream(seed, first, count).map(|(word, _)| word * 8 / PAGE).collect();
    pages.sort_unstable();
    pages.dedup();
    pages
}

pub(crate) fn open_mdev(name: &str, seed: u64) -> Device {
    let device = Device::open("mdev", name);
    device.write(WINDOW, IOVA).unwrap();
    device.write(WINDOW + 8, (PAGES * PAGE) as u64).unwrap();
    device.write(SEED, seed).unwrap();
    device
}

#[test]
fn container_bitmap_names_exactly_what_an_mdev_wrote() {
    let Some([name, _]) = two("container bitmap", "dirty_mdev") else {
        return;
    };
    let device = open_mdev(&name, 7);
    device.container_dirty(1);
    assert!(device.container_bitmap().is_empty());

    device.write(BURST, 40).unwrap();
    device.write(WRITE_AT, IOVA + 200 * PAGE as u64).unwrap();
    let mut pages = stream_pages(7, 0, 40);
    pages.push(200);
    pages.sort_unstable();
    pages.dedup();
    assert_eq!(device.container_bitmap(), pages);
    assert!(device.container_bitmap().is_empty(), "reading clears");

    device.write(PIN, IOVA + 5 * PAGE as u64).unwrap();
    assert_eq!(device.container_bitmap(), [5]);
    assert_eq!(device.container_bitmap(), [5], "a pinned page stays dirty");
    device.write(UNPIN, IOVA + 5 * PAGE as u64).unwrap();
    device.container_dirty(2);
}

#[test]
fn mdev_log_names_exactly_what_it_wrote() {
    let Some([name, _]) = two("mdev log", "dirty_mdev") else {
        return;
    };
    let device = open_mdev(&name, 11);
    device.write(BURST, 10).unwrap();
    device.start_log();
    assert!(device.log().is_empty());
    device.write(BURST, 30).unwrap();
    assert_eq!(device.log(), stream_pages(11, 10, 30));
    assert!(device.log().is_empty(), "reporting clears");
    device.stop_log();
}

#[test]
fn mdev_moves_and_its_stream_continues() {
    let Some([source, destination]) = two("mdev migration", "dirty_mdev") else {
        return;
    };
    let (source, destination) = (open_mdev(&source, 23), open_mdev(&destination, 0));
    source.write(RATE, 20_000).unwrap();
    source.write(CONTROL, 1).unwrap();
    sleep(Duration::from_millis(200));
    let image = source.save();
    let written = source.read(POSITION);
    assert!(written > 0 && source.read(COUNT) == written, "{written} writes");
    sleep(Duration::from_millis(50));
    assert_eq!(source.read(POSITION), written, "the stopped engine is silent");

    let mut expected = vec![0; PAGES * PAGE / 8];
    stream(23, 0, written).for_each(|(word, value)| expected[word] = value);
    assert!(source.memory() == expected, "the source wrote its stream and nothing else");

    destination.fill(&expected);
    destination.load(&image);
    sleep(Duration::from_millis(100));
    destination.write(CONTROL, 0).unwrap();
    destination.write(BURST, 100).unwrap();
    let more = destination.read(POSITION) - written;
    assert!(more > 100, "{more} writes: the engine ran on by itself");
    stream(23, written, more).for_each(|(word, value)| expected[word] = value);
    assert!(destination.memory() == expected, "the destination continued the stream");
}

#[test]
fn damaged_image_does_not_leave_resuming() {
    let Some([source, destination]) = two("damaged image", "dirty_mdev") else {
        return;
    };
    let (source, destination) = (open_mdev(&source, 1), open_mdev(&destination, 0));
    let mut image = source.save();
    let middle = image.len() / 2;
    image[middle] ^= 1;
    destination.set_state(RESUMING).unwrap().write_all(&image).unwrap();
    destination.try_set_state(STOP).unwrap_err();
}

#[test]
fn mtty_moves_too() {
    let Some([source, destination]) = two("mtty", "mtty") else { return };
    let (source, destination) = (Device::open("mdev", &source), Device::open("mdev", &destination));
    let mut image = Vec::new();
    source.set_state(STOP_COPY).unwrap().read_to_end(&mut image).unwrap();
    assert_eq!(image.len() as u64, source.data_size());
    destination.load(&image);
    assert_eq!(destination.state(), RUNNING);
}
