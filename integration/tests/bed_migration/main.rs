// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The whole job on real interfaces: a KVM guest, a device with DMA logging and a mediated device on a container of its own move
//! over TCP to a second VMM process, and go on there.
//!
//! Runs inside the test bed: `integration/testbed/run --test bed_migration`. Elsewhere each test says that it was skipped.

#![expect(clippy::unwrap_used, reason = "a test's own steps must succeed")]

use std::collections::BTreeSet;

use vfio_migration_integration::bed::{Bed, BedSetup, Moving, Pair, Parameter, process_main};
use vfio_migration_integration::demo::{Health, MigrationFigures};
use vfio_migration_integration::skipped;
use vfio_migration_integration::vmm::MIN_RAM_BYTES;

const NONE: [u64; 0] = [];

/// A source or destination process, started by the tests below.
#[test]
#[ignore = "not a test: a process of the other tests"]
fn process() {
    process_main().unwrap();
}

/// A source and its destination, each with devices of its own.
fn setups(mdevs: [String; 2], edus: Option<[String; 2]>) -> [BedSetup; 2] {
    let [first, second] = edus.map_or([None, None], |edus| edus.map(Some));
    let [source, destination] = mdevs;
    let setup = |mdev, edu| BedSetup {
        memory_bytes: MIN_RAM_BYTES,
        dirty_ring_bytes: None,
        vcpu_harvests: true,
        guest_rate: Some(400),
        engine_rate: 200,
        seed: 0x5eed,
        mdev,
        edu,
        served_state_bytes: None,
    };
    [setup(source, first), setup(destination, second)]
}

/// Moves a VM and checks that nothing is lost; returns what was measured.
fn move_vm(setups: &[BedSetup; 2]) -> MigrationFigures {
    move_with(setups, Moving::default()).0
}

/// As [`move_vm`]; returns the memory that each end took to itself for it, too.
fn move_with([source, destination]: &[BedSetup; 2], moving: Moving) -> (MigrationFigures, [u64; 2]) {
    let mut pair = Pair::start(source, destination).unwrap();
    let before = pair.check_source(1).unwrap();
    assert_well(&before);
    let held = pair.own_bytes().unwrap();
    let (figures, most) = pair.watch(|pair| pair.migrate(moving)).unwrap();
    let figures = figures.unwrap();
    eprintln!("moved: {figures:?}");
    let taken = [0, 1].map(|end: usize| most[end].saturating_sub(held[end]));
    assert_eq!(pair.differing().unwrap(), BTreeSet::new(), "pages differ at the switchover");

    pair.run().unwrap();
    let after = pair.check_destination(2).unwrap();
    assert_well(&after);
    assert!(after.passes >= before.passes + 2, "the guest goes on");
    assert!(after.device_position > before.device_position, "the engine's stream goes on");
    (figures, taken)
}

fn assert_well(health: &Health) {
    assert_eq!(health.wrong_pages, NONE, "the guest found wrong pages");
    assert_eq!(health.wrong_records, NONE, "the VMM found wrong records");
    assert_eq!(health.wrong_device_pages, NONE, "the engine's stream does not stand in memory");
}

/// Each of the sources reported something, and they are these.
fn assert_all_reported(figures: &MigrationFigures, ids: [&str; 4]) {
    assert_eq!(figures.sources.iter().map(|source| source.id.as_str()).collect::<Vec<_>>(), ids);
    for source in &figures.sources {
        assert!(source.pages > 0, "{} reported nothing", source.id);
    }
    // On a busy host the emulated machine may stand still for longer than it should. The mdev's driver keeps pages pinned, which
    // shows after some rounds.
    let pinned = "Pages that container:mdev0 reports stay pinned: ";
    let expected =
        |degradation: &&String| degradation.contains("stood still") || degradation.starts_with(pinned);
    let failed: Vec<_> = figures.degradations.iter().filter(|degradation| !expected(degradation)).collect();
    assert!(failed.is_empty(), "{failed:?}");
    assert!(figures.rounds >= 2);
}

#[test]
fn guest_edu_and_mdev_move_by_the_dirty_log() {
    let Some(bed) = Bed::find("moving by the dirty log") else { return };
    let Some(mdevs) = bed.two("moving by the dirty log", "dirty_mdev") else { return };
    let Some(edus) = bed.two("moving by the dirty log", "edu_vfio") else { return };
    let figures = move_vm(&setups(mdevs, Some(edus)));
    assert_all_reported(&figures, ["kvm-log", "vmm-writes", "container:mdev0", "device-log:edu0"]);
    assert!(figures.device.precopy_bytes > 0 && figures.device.state_bytes > figures.device.precopy_bytes);
}

#[test]
fn guest_edu_and_mdev_move_by_the_dirty_ring() {
    let Some(bed) = Bed::find("moving by the dirty ring") else { return };
    let Some(mdevs) = bed.two("moving by the dirty ring", "dirty_mdev") else { return };
    let Some(edus) = bed.two("moving by the dirty ring", "edu_vfio") else { return };
    let mut setups = setups(mdevs, Some(edus));
    for setup in &mut setups {
        // 1024 pages: the guest fills it between two collects when it runs freely.
        setup.dirty_ring_bytes = Some(16 << 10);
    }
    let figures = move_vm(&setups);
    assert_all_reported(&figures, ["kvm-ring", "vmm-writes", "container:mdev0", "device-log:edu0"]);
}

/// A page table's dirty bits, as far as the kernel's mock domain goes. It has no device: a thread writes, past all other bitmaps,
/// and tells the domain which page. So there is neither real DMA nor device state behind it; but arming, reading, clearing, IOVAs
/// that are not guest-physical addresses, and pages half as large as the host's are the kernel's own.
#[test]
fn guest_and_mdev_move_beside_a_page_table_that_tracks() {
    let Some(bed) = Bed::find("moving beside a page table") else { return };
    if bed.fact("kernel") != "own" || bed.fact("iommu") != "none" || bed.fact("scenario") == "no-vfio" {
        skipped("moving beside a page table", "only the own kernel has the mock domain, without an IOMMU");
        return;
    }
    let Some(mdevs) = bed.two("moving beside a page table", "dirty_mdev") else { return };
    let figures = move_vm(&setups(mdevs, None));
    assert_all_reported(&figures, ["kvm-log", "vmm-writes", "container:mdev0", "hwpt:mock0"]);
}

/// Moves a VM with a device of the kernel and one of another process, each with so many MiB of state.
fn move_large_states(mib: u64) {
    let Some(bed) = Bed::find("states that go ahead") else { return };
    let Some(mdevs) = bed.two("states that go ahead", "dirty_mdev") else { return };
    let bytes = mib << 20;
    let _padding = Parameter::fixture("state_padding", &bytes.to_string()).unwrap();
    let moving = Moving { bytes_per_second: 1 << 30, timeout_s: 1200, ..Moving::default() };
    let setups = setups(mdevs, None).map(|setup| BedSetup { served_state_bytes: Some(bytes), ..setup });
    let (figures, taken) = move_with(&setups, moving);
    let device = &figures.device;
    let in_downtime = device.state_bytes - device.precopy_bytes;
    eprintln!("states of {mib} MiB: {in_downtime} bytes in the downtime, {taken:?} bytes of memory taken");
    assert!(device.state_bytes >= 2 * bytes, "{device:?}");
    assert_eq!(in_downtime, figures.late_bytes.values().sum::<u64>(), "{figures:?}");
    assert_eq!(figures.late_bytes.len(), 2, "both states stream: {:?}", figures.late_bytes);
    for (device, late) in &figures.late_bytes {
        assert!(late * 20 <= bytes, "{late} of {bytes} bytes of {device} moved in the downtime");
    }
    // Anonymous memory of each process, beyond what it had before. Guest RAM is in files that they share, and is none of it.
    assert!(taken.iter().all(|&taken| taken <= 32 << 20), "source and destination took {taken:?} bytes");
}

#[test]
fn states_of_a_mebibyte_of_a_kernel_and_a_vfio_user_device_go_ahead() {
    move_large_states(1);
}

#[test]
fn states_of_64_mib_of_a_kernel_and_a_vfio_user_device_go_ahead_in_little_memory() {
    move_large_states(64);
}

#[test]
#[ignore = "a gibibyte takes minutes"]
fn states_of_a_gibibyte_of_a_kernel_and_a_vfio_user_device_go_ahead_in_little_memory() {
    move_large_states(1024);
}
