// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Real devices under one [`Tracker`]: what is sent is what was written, and the copy ends up equal.

use std::collections::BTreeSet;

use crate::bed::*;
use crate::kernel::*;
use vfio_migration::iova::IovaMap;
use vfio_migration::ledger::{ChunkLimits, CursorId, Start};
use vfio_migration::source::choose::{Imprecise, Writer};
use vfio_migration::source::{ContainerLog, DeviceLog, Meaning};
use vfio_migration::tracker::{
    AddressSpace, DeviceMappings, SpaceDevice, SpaceId, SpaceTable, Tracker, VmMappings,
};

/// Random schedules to run, of which each is known by its seed.
const SCHEDULES: u64 = 20;

/// A stream of numbers that a seed determines.
struct Random(u64);

impl Random {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % limit
    }
}

/// What these devices reach: all RAM.
fn mappings<const N: usize>(devices: [&str; N]) -> VmMappings {
    let ram: Vec<_> = layout().regions().iter().map(|region| region.range()).collect();
    let reached = devices.map(|device| DeviceMappings { device: device.to_owned(), gpa: ram.clone() });
    VmMappings { ram, devices: reached.into(), ..VmMappings::default() }
}

/// Sends a round: copies the pages that `cursor` lacks; returns which.
fn send(vm: &mut Tracker, cursor: CursorId, memory: &Device, copy: &mut [u64]) -> BTreeSet<u64> {
    let mut pages = BTreeSet::new();
    vm.begin_round(cursor);
    while let Some(chunk) = vm.take(cursor, ChunkLimits { bytes: 7 * PAGE as u64, ranges: 3 }).unwrap() {
        let now = memory.memory();
        for piece in chunk.ranges().iter().flat_map(|range| range.pieces(PAGE as u64)) {
            let page = (piece.start() - IOVA) / PAGE as u64;
            let words =
                usize::try_from(page).unwrap() * PAGE / 8..(usize::try_from(page).unwrap() + 1) * PAGE / 8;
            copy[words.clone()].copy_from_slice(&now[words]);
            assert!(pages.insert(page), "page {page} twice in one round");
        }
        vm.commit(chunk);
    }
    pages
}

#[test]
fn an_mdev_on_two_logs_is_sent_exactly_under_random_schedules() {
    let Some([name, _]) = two("exactness of an mdev", "dirty_mdev") else { return };
    for seed in 1..=SCHEDULES {
        let device = open_mdev(&name);
        let container =
            ContainerLog::new("container", clone(&device.container), 3, Meaning::Written).unwrap();
        let own = DeviceLog::new("device-log", clone(&device.file)).unwrap();
        let mut vm = Tracker::builder(layout())
            .mappings(|| mappings(["mdev0"]))
            .source_of(SpaceId::IDENTITY, ["mdev0"], Box::new(container))
            .source_of(SpaceId::IDENTITY, ["mdev0"], Box::new(own))
            .build()
            .unwrap();
        let (mut random, mut copy) = (Random(seed), vec![0; PAGES * PAGE / 8]);
        let cursor = vm.begin(Start::Empty).unwrap();
        assert_eq!(send(&mut vm, cursor, &device, &mut copy), set(0..256));
        for _ in 0..1 + random.below(6) {
            let written: Vec<_> = (0..random.below(40)).map(|_| random.below(256)).collect();
            write(&device, written.iter().copied());
            assert!(vm.collect().is_empty());
            assert_eq!(send(&mut vm, cursor, &device, &mut copy), set(written), "seed {seed}");
        }
        assert!(vm.collect_final().is_empty());
        assert_eq!(send(&mut vm, cursor, &device, &mut copy), set([]));
        assert!(device.memory() == copy, "seed {seed}: every byte is equal");
        vm.end(cursor).unwrap();
    }
}

#[test]
fn an_edu_and_an_mdev_in_spaces_of_their_own_are_sent_exactly() {
    let Some([mdev, _]) = two("exactness of edu and mdev", "dirty_mdev") else { return };
    let Some([edu, _]) = two("exactness of edu and mdev", "edu_vfio") else { return };
    let (mdev, edu) = (open_mdev(&mdev), open_edu(&edu));
    let container = ContainerLog::new("container", clone(&mdev.container), 3, Meaning::Written).unwrap();
    let own = DeviceLog::new("device-log", clone(&edu.file)).unwrap();
    let mut vm = Tracker::builder(layout())
        .mappings(|| mappings(["mdev0", "edu0"]))
        .source_of(SpaceId::IDENTITY, ["mdev0"], Box::new(container))
        .source_of(SpaceId::IDENTITY, ["edu0"], Box::new(own))
        .build()
        .unwrap();
    let cursor = vm.begin(Start::Copied).unwrap();
    let (mut random, mut unused) = (Random(5), vec![0; PAGES * PAGE / 8]);
    for _ in 0..5 {
        let (by_mdev, by_edu) = ([random.below(256), random.below(256)], random.below(256));
        write(&mdev, by_mdev);
        dma(&edu, by_edu);
        assert!(vm.collect().is_empty());
        let expected = by_mdev.into_iter().chain([by_edu]);
        assert_eq!(send(&mut vm, cursor, &mdev, &mut unused), set(expected));
    }
    vm.end(cursor).unwrap();
}

#[test]
fn an_imprecise_container_is_left_to_the_final_round() {
    let Some([edu, _]) = two("imprecise container, final round", "edu_vfio") else { return };
    let edu = open_edu(&edu);
    let container = ContainerLog::new("container", clone(&edu.container), 3, Meaning::Mapped).unwrap();
    let builder = Tracker::builder(layout()).mappings(|| mappings(["edu0"])).allow_imprecise();
    let mut vm = builder.source_of(SpaceId::IDENTITY, ["edu0"], Box::new(container)).build().unwrap();
    let cursor = vm.begin(Start::Empty).unwrap();
    let mut copy = vec![0; PAGES * PAGE / 8];
    assert_eq!(send(&mut vm, cursor, &edu, &mut copy), set(0..256));
    assert!(vm.collect().is_empty());
    assert_eq!(send(&mut vm, cursor, &edu, &mut copy), set([]), "not in a round while the VM runs");
    dma(&edu, 9);
    assert!(vm.collect_final().is_empty());
    assert_eq!(send(&mut vm, cursor, &edu, &mut copy), set(0..256));
    assert!(edu.memory() == copy);
    vm.end(cursor).unwrap();
}

fn clone(file: &std::fs::File) -> std::fs::File {
    file.try_clone().unwrap()
}

/// The address space of one device, over its container.
fn space_of(name: &str, device: &Device, writer: Writer, imprecise: Imprecise) -> AddressSpace {
    let devices = vec![SpaceDevice { name: name.to_owned(), file: clone(&device.file).into(), writer }];
    let below = SpaceTable::Container { file: clone(&device.container).into(), model: 3 };
    AddressSpace { map: IovaMap::Identity, devices, below, imprecise }
}

#[test]
fn the_way_in_chooses_what_reports_exactly() {
    let Some([mdev, _]) = two("the way in", "dirty_mdev") else { return };
    let Some([edu, _]) = two("the way in", "edu_vfio") else { return };
    let (mdev, edu) = (open_mdev(&mdev), open_edu(&edu));
    let mut builder = Tracker::builder(layout()).mappings(|| mappings(["mdev0", "edu0"]));
    builder.address_space(space_of("mdev0", &mdev, Writer::Kernel, Imprecise::Refused)).unwrap();
    builder.address_space(space_of("edu0", &edu, Writer::Hardware, Imprecise::Refused)).unwrap();
    let mut vm = builder.build().unwrap();
    let chosen: Vec<_> = vm.attribution().map(|(id, _)| id.to_owned()).collect();
    assert_eq!(chosen, ["device-log:mdev0", "device-log:edu0"]);
    assert!(vm.space_degradations().is_empty());
    let cursor = vm.begin(Start::Copied).unwrap();
    write(&mdev, [3, 200]);
    dma(&edu, 77);
    assert!(vm.collect().is_empty());
    let mut unused = vec![0; PAGES * PAGE / 8];
    assert_eq!(send(&mut vm, cursor, &mdev, &mut unused), set([3, 77, 200]));
    vm.end(cursor).unwrap();
}
