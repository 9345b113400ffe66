// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! From one snapshot directory to another.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use vfio_migration::layout::Layout;
use vfio_migration::snapshot::{
    CONFIG_FILE, DestinationOptions, FullSnapshot, MEMORY_FILE, STATE_FILE, SnapshotDestination,
    SnapshotLimits, SnapshotSource,
};
use vfio_migration::tracker::Tracker;

use crate::vm::{Memory, PAGE, Random, StillVm, memory, populated};
use crate::way::Way;
use crate::{Race, gib_per_second};

const BYTES: u64 = 1 << 30;

/// RAM as Cloud Hypervisor lays 4 GiB of it out: below the hole for devices, and above 4 GiB.
const ROUND_TRIP_RANGES: [(u64, u64); 2] = [(0, 3 << 30), (4 << 30, 1 << 30)];
/// What the file system itself may need beside the populated pages, in 512-byte blocks: 1 MiB.
const SPARE_BLOCKS: u64 = (1 << 20) / 512;

pub(crate) fn holds() -> bool {
    let folder = tempfile::tempdir().unwrap();
    let original = folder.path().join("original");
    store(&populated(BYTES), &original);
    println!("directories: {} MiB of memory, send to receive against plain sockets", BYTES >> 20);
    let plain = |way| {
        let to = folder.path().join("plain");
        let took = copy_plainly(way, &original.join(MEMORY_FILE), &to);
        fs::remove_file(to).unwrap();
        took
    };
    let ours = |way| {
        let to = folder.path().join("copy");
        let took = send(way, &original, &to);
        fs::remove_dir_all(to).unwrap();
        took
    };
    Race { bytes: BYTES, plain: &plain, ours: &ours, encrypts: false }.is_won()
}

/// Sends a snapshot with holes each way, and compares every file with its original.
pub(crate) fn come_back_the_same() -> bool {
    let folder = tempfile::tempdir().unwrap();
    let original = folder.path().join("original");
    let (memory, populated_bytes) = patchy();
    store(&memory, &original);
    let bytes: u64 = ROUND_TRIP_RANGES.iter().map(|range| range.1).sum();
    println!(
        "round_trip: a snapshot of {} MiB, {} MiB of it populated, send to receive",
        bytes >> 20,
        populated_bytes >> 20
    );
    let misses = Way::ALL.map(|way| {
        let copy = folder.path().join("copy");
        let took = send(way, &original, &copy);
        let same = is_same_directory(&original, &copy);
        let (was, is) = (blocks(&original), blocks(&copy));
        println!(
            "  {way:<7}  {took:.1?}, {:.2} GiB/s of data  bytes {}  {} MiB on disk of {} MiB",
            gib_per_second(populated_bytes, took),
            if same { "the same" } else { "DIFFER" },
            is >> 11,
            was >> 11
        );
        fs::remove_dir_all(copy).unwrap();
        !same || was.max(is) > populated_bytes / 512 + SPARE_BLOCKS
    });
    !misses.contains(&true)
}

/// Memory with a run of one page to 1 MiB populated in each 4 MiB, and the bytes populated.
fn patchy() -> (Arc<Memory>, u64) {
    let (memory, mut random) = (memory(&ROUND_TRIP_RANGES), Random(0x0dd));
    let mut populated_bytes = 0;
    for (start, bytes) in ROUND_TRIP_RANGES {
        for stretch in (start..start + bytes).step_by(4 << 20) {
            let first = stretch + random.next() % 512 * PAGE;
            let pages = 1 + random.next() % 256;
            (0..pages).for_each(|page| random.fill(&memory, first + page * PAGE));
            populated_bytes += pages * PAGE;
        }
    }
    (memory, populated_bytes)
}

fn store(source: &Arc<Memory>, target: &Path) {
    let layout = Layout::from_guest_memory(&**source).unwrap();
    let tracker = Mutex::new(Tracker::builder(layout).build().unwrap());
    let mut directory = SnapshotDestination::create(target, DestinationOptions::default()).unwrap();
    Way::Tcp(1).send(&mut StillVm(Arc::clone(source)), &tracker, &mut directory);
}

fn send(way: Way, from: &Path, to: &Path) -> Duration {
    let mut source =
        SnapshotSource::new(FullSnapshot::open(from, &SnapshotLimits::default()).unwrap()).unwrap();
    let tracker = Mutex::new(Tracker::builder(source.layout().clone()).build().unwrap());
    let mut directory = SnapshotDestination::create(to, DestinationOptions::default()).unwrap();
    way.send(&mut source, &tracker, &mut directory).0
}

/// Copies a file through plain sockets until it is safe on disk, and tells how long that took.
fn copy_plainly(way: Way, from: &Path, to: &Path) -> Duration {
    let from = File::open(from).unwrap();
    let begun = Instant::now();
    let to = File::create(to).unwrap();
    to.set_len(BYTES).unwrap();
    let length = |piece: &std::ops::Range<u64>| usize::try_from(piece.end - piece.start).unwrap();
    way.copy_plainly(
        BYTES,
        |socket, piece, buffer| {
            let bytes = &mut buffer[..length(&piece)];
            from.read_exact_at(bytes, piece.start).unwrap();
            socket.write_all(bytes).unwrap();
        },
        |socket, piece, buffer| {
            let bytes = &mut buffer[..length(&piece)];
            socket.read_exact(bytes).unwrap();
            to.write_all_at(bytes, piece.start).unwrap();
        },
    );
    to.sync_all().unwrap();
    begun.elapsed()
}

/// Whether both have the same files, with the same bytes.
fn is_same_directory(one: &Path, other: &Path) -> bool {
    let names = |folder: &Path| {
        let entries = fs::read_dir(folder).unwrap();
        let mut names: Vec<_> = entries.map(|entry| entry.unwrap().file_name()).collect();
        names.sort_unstable();
        names
    };
    for wanted in [CONFIG_FILE, STATE_FILE, MEMORY_FILE] {
        assert!(one.join(wanted).exists(), "{wanted} is part of a snapshot");
    }
    let is_same = |name| is_same_file(&one.join(name), &other.join(name));
    names(one) == names(other) && names(one).iter().all(is_same)
}

fn is_same_file(one: &Path, other: &Path) -> bool {
    let (one, other) = (File::open(one).unwrap(), File::open(other).unwrap());
    let bytes = one.metadata().unwrap().len();
    let (mut left, mut right) = (vec![0; 1 << 20], vec![0; 1 << 20]);
    bytes == other.metadata().unwrap().len()
        && (0..bytes).step_by(left.len()).all(|offset| {
            let length = left.len().min(usize::try_from(bytes - offset).unwrap());
            one.read_exact_at(&mut left[..length], offset).unwrap();
            other.read_exact_at(&mut right[..length], offset).unwrap();
            left[..length] == right[..length]
        })
}

/// Blocks of 512 bytes that a snapshot's memory takes on disk.
fn blocks(snapshot: &Path) -> u64 {
    fs::metadata(snapshot.join(MEMORY_FILE)).unwrap().blocks()
}
