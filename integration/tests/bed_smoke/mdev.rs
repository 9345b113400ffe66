// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! `dirty_mdev`: see resources/modules/dirty_mdev.h.

use std::io::{self, Read, Write};
use std::os::unix::fs::FileExt;
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

/// A region as a VMM sees it for its guest.
struct Region<'a> {
    device: &'a Device,
    bytes: u64,
    offset: u64,
}

impl<'a> Region<'a> {
    fn new(device: &'a Device, index: u64) -> Self {
        let (bytes, offset) = device.region(index);
        Self { device, bytes, offset }
    }

    fn read<const N: usize>(&self, at: u64) -> io::Result<[u8; N]> {
        let mut bytes = [0; N];
        self.device.file.read_exact_at(&mut bytes, self.offset + at)?;
        Ok(bytes)
    }

    fn write(&self, at: u64, bytes: &[u8]) -> io::Result<()> {
        self.device.file.write_all_at(bytes, self.offset + at)
    }
}

const BAR0: u64 = 0;
const CONFIG: u64 = 7;
const COMMAND: u64 = 0x04;
const BASE_ADDRESS_0: u64 = 0x10;
const MEMORY: u16 = 2;

#[test]
fn c69_a_guest_finds_the_mdev_sizes_its_bar_and_enables_it() {
    let Some([name, _]) = two("mdev configuration space", "dirty_mdev") else { return };
    let device = Device::open("mdev", &name);
    let config = Region::new(&device, CONFIG);
    assert_eq!(config.bytes, 256);
    assert_eq!(config.read(0).unwrap(), [0x34, 0x12, 0xd1, 0xd1]);
    assert_eq!(config.read::<1>(0x0e).unwrap(), [0], "an ordinary header");

    config.write(BASE_ADDRESS_0, &[0xff; 4]).unwrap();
    let size = u32::from_le_bytes(config.read(BASE_ADDRESS_0).unwrap());
    assert_eq!(size & 0xf, 0, "32-bit memory");
    assert_eq!(u64::from(!size) + 1, Region::new(&device, BAR0).bytes);
    config.write(BASE_ADDRESS_0, &0xfe12_3000u32.to_le_bytes()).unwrap();
    assert_eq!(u32::from_le_bytes(config.read(BASE_ADDRESS_0).unwrap()), 0xfe12_3000);
    for bar in 1..6 {
        config.write(BASE_ADDRESS_0 + 4 * bar, &[0xff; 4]).unwrap();
        assert_eq!(config.read(BASE_ADDRESS_0 + 4 * bar).unwrap(), [0; 4], "there is no BAR {bar}");
    }
    config.write(0, &[0xff; 4]).unwrap();
    assert_eq!(config.read(0).unwrap(), [0x34, 0x12, 0xd1, 0xd1], "what a guest may not write stays");

    config.write(COMMAND, &u16::MAX.to_le_bytes()).unwrap();
    assert_eq!(u16::from_le_bytes(config.read(COMMAND).unwrap()), 0x406, "memory, bus master, no INTx");
    config.write(COMMAND + 1, &[0]).unwrap();
    assert_eq!(u16::from_le_bytes(config.read(COMMAND).unwrap()), 6, "a byte at a time");
    config.read::<1>(256).unwrap_err();
    config.write(256, &[0]).unwrap_err();
}

#[test]
fn c69_the_bar_drives_the_mdev_while_memory_is_enabled() {
    let Some([name, _]) = two("mdev BAR", "dirty_mdev") else { return };
    let device = Device::open("mdev", &name);
    let (bar, config) = (Region::new(&device, BAR0), Region::new(&device, CONFIG));
    let doorbell = |page: u64| (IOVA + page * PAGE as u64).to_le_bytes();
    device.start_log();

    config.write(COMMAND, &[0, 0]).unwrap();
    for access in [bar.write(WRITE_AT, &doorbell(3)), bar.read::<8>(POSITION).map(drop)] {
        assert_eq!(access.unwrap_err().raw_os_error(), Some(libc::EIO));
    }
    assert!(device.log().is_empty(), "a device that does not answer does nothing");

    config.write(COMMAND, &MEMORY.to_le_bytes()).unwrap();
    assert_eq!(bar.read(0).map(u64::from_le_bytes).unwrap(), 0x5644_4d59_5452_4944, "ID");
    bar.write(WRITE_AT, &doorbell(3)).unwrap();
    assert_eq!(device.log(), [3]);
    assert_eq!(device.memory()[3 * PAGE / 8], !(IOVA + 3 * PAGE as u64));
    device.stop_log();
}

#[test]
fn c69_a_guest_without_64_bit_accesses_drives_the_mdev_by_halves() {
    let Some([name, _]) = two("mdev BAR, halves", "dirty_mdev") else { return };
    let device = Device::open("mdev", &name);
    let bar = Region::new(&device, BAR0);
    let write = |register: u64, value: u32| bar.write(register, &value.to_le_bytes());
    let read = |register: u64| bar.read(register).map(u32::from_le_bytes).unwrap();
    write(SEED + 4, 7).unwrap();
    assert_eq!(device.read(SEED), 0, "half a register is none");
    write(SEED, 5).unwrap();
    assert_eq!(device.read(SEED), 7 << 32 | 5);
    assert_eq!((read(SEED), read(SEED + 4)), (5, 7));
    write(SEED, 9).unwrap();
    assert_eq!(device.read(SEED), 9, "a low half alone is extended with zeros");

    device.start_log();
    write(WRITE_AT, u32::try_from(IOVA).unwrap() + 7 * 4096).unwrap();
    assert_eq!(device.log(), [7]);
    device.stop_log();
    for (register, bytes) in [(SEED + 2, 4), (SEED, 2), (SEED + 4, 8), (0x1000, 8)] {
        let error = bar.write(register, &[0; 8][..bytes]).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EINVAL), "{bytes} bytes at {register:#x}");
    }
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
