// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A migration driven through the `vm-migration` traits alone, by a loop of the VMM's own as Cloud Hypervisor's: it copies all
//! RAM, asks for a table a round, reads the pages with no further call, and has a table in hand when it decides to stop the VM.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::collections::BTreeSet;
use std::thread;
use std::time::{Duration, Instant};

use vfio_migration::migratable::MigratableDevice;
use vfio_migration::source::{KvmLogMode, MigratableLog};
use vfio_migration_integration::demo::{MachineSetup, Side, compare};
use vfio_migration_integration::skipped;
use vfio_migration_integration::vmm::{Memory, PAGE_BYTES, probe_kvm};
use vm_memory::{Bytes, GuestAddress};
use vm_migration::protocol::{MemoryRange, MemoryRangeTable};
use vm_migration::{Migratable, Pausable, Snapshot, Snapshottable};

mod sharing;

use sharing::Sharer;

const MEMORY_BYTES: u64 = 64 << 20;

/// Bytes of guest memory that go at once.
const CHUNK_BYTES: u64 = 4 << 20;

/// Name of the component among the sources.
const SHARER: &str = "sharer";

/// Makes a machine, and returns a second handle on its RAM.
fn machine(kvm: bool, device_rate: u32) -> (Side, Memory) {
    let setup = MachineSetup {
        memory_bytes: MEMORY_BYTES,
        sparse: false,
        kvm,
        guest_rate: 20_000,
        device_rate,
        seed: 7,
        forget: None,
    };
    Side::in_process(setup).unwrap()
}

/// Copies the bytes of a table, chunk by chunk, as connections would.
fn copy(table: &MemoryRangeTable, from: &Memory, to: &Memory) -> u64 {
    let mut buffer = Vec::new();
    for chunk in table.clone().partition(CHUNK_BYTES) {
        for range in chunk.regions() {
            buffer.resize(usize::try_from(range.length).unwrap(), 0);
            from.guest().read_slice(&mut buffer, GuestAddress(range.gpa)).unwrap();
            to.guest().write_slice(&buffer, GuestAddress(range.gpa)).unwrap();
        }
    }
    table.effective_size()
}

/// The pages that a table names, and how many of them it names more than once.
fn pages_of(table: &MemoryRangeTable) -> (BTreeSet<u64>, u64) {
    let pages = table
        .regions()
        .iter()
        .flat_map(|range| range.gpa / PAGE_BYTES..(range.gpa + range.length) / PAGE_BYTES);
    let pages: BTreeSet<_> = pages.collect();
    let twice = table.effective_size() / PAGE_BYTES - pages.len() as u64;
    (pages, twice)
}

fn all_ram(memory: &Memory) -> MemoryRangeTable {
    let mut table = MemoryRangeTable::default();
    for region in memory.regions() {
        table.push(MemoryRange { gpa: region.gpa, length: region.len });
    }
    table
}

fn assert_sorted_disjoint_coalesced(table: &MemoryRangeTable) {
    for pair in table.regions().windows(2) {
        assert!(
            pair[0].gpa + pair[0].length < pair[1].gpa,
            "{:#x} and {:#x} touch",
            pair[0].gpa,
            pair[1].gpa
        );
    }
}

/// What becomes of the table that the loop has in hand when it decides to stop the VM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum InHand {
    /// It goes with the final table, as in Cloud Hypervisor.
    Concatenated,
    /// It is handed back, and the final table is all that goes.
    HandedBack,
}

/// What came of a migration.
struct Migrated {
    snapshot: Snapshot,
    /// Pages that the last transfer of memory before the state held twice.
    twice: u64,
}

/// Cloud Hypervisor's loop, on one thread.
fn migrate(
    source: &Side,
    from: &Memory,
    devices: &mut MigratableDevice,
    sharer: &mut Sharer,
    to: &Memory,
    in_hand: InHand,
) -> Migrated {
    devices.start_migration().unwrap();
    devices.start_dirty_log().unwrap();
    let remaining = precopy(from, devices, sharer, to);
    sharer.pass();
    source.machine.pause().unwrap();
    devices.pause().unwrap();
    sharer.stop();
    let (needed, _) = pages_of(&remaining);
    let last = match in_hand {
        InHand::HandedBack => {
            devices.hand_back().unwrap();
            devices.dirty_log().unwrap()
        }
        InHand::Concatenated => {
            let mut last = devices.dirty_log().unwrap();
            last.extend(remaining);
            last
        }
    };
    let (pages, twice) = pages_of(&last);
    assert!(pages.is_superset(&needed), "pages that were in hand are lost");
    copy(&last, from, to);
    let snapshot = devices.snapshot().unwrap();
    copy(&devices.dirty_log().unwrap(), from, to);
    devices.stop_dirty_log().unwrap();
    devices.complete_migration().unwrap();
    Migrated { snapshot, twice }
}

/// Copies all RAM, then five tables or as many as it takes until guest and component wrote the same page; returns the next one.
fn precopy(from: &Memory, devices: &mut MigratableDevice, sharer: &Sharer, to: &Memory) -> MemoryRangeTable {
    let begun = Instant::now();
    let mut table = all_ram(from);
    let (mut rounds, mut dirty_bytes) = (0, 0);
    while rounds <= 5 || !overlapping(devices) {
        assert!(begun.elapsed() < Duration::from_secs(60), "guest and component never write the same page");
        dirty_bytes += copy(&table, from, to);
        thread::sleep(Duration::from_millis(30));
        sharer.pass();
        table = devices.dirty_log().unwrap();
        assert_sorted_disjoint_coalesced(&table);
        rounds += 1;
    }
    assert!(dirty_bytes > MEMORY_BYTES, "guest and device were at work");
    assert!(dirty_bytes < rounds * MEMORY_BYTES, "a round is less than all RAM");
    table
}

/// Whether the component reported a page that another source reported in the same collect.
fn overlapping(devices: &MigratableDevice) -> bool {
    let tracker = devices.tracker().lock().unwrap();
    let mut attribution = tracker.attribution();
    attribution.any(|(id, figures)| id == SHARER && figures.pages > figures.exclusive_pages)
}

/// Puts the traits over a machine that runs and a component beside it.
fn running(source: &Side, from: &Memory, mode: KvmLogMode) -> (MigratableDevice, Sharer) {
    source.start().unwrap();
    let files = from.regions().iter().map(|region| region.file.try_clone().unwrap()).collect();
    let sharer = Sharer::new(&source.machine, Memory::adopt(from.layout(), files).unwrap());
    let log = MigratableLog::new(SHARER, sharer.component());
    (source.migratable_with(mode, vec![Box::new(log)]).unwrap(), sharer)
}

/// Migrates, and returns how many pages went twice in the downtime.
fn loses_nothing(kvm: bool, mode: KvmLogMode, in_hand: InHand) -> u64 {
    let (source, from) = machine(kvm, 5_000);
    let (destination, to) = machine(kvm, 5_000);
    let (mut devices, mut sharer) = running(&source, &from, mode);
    let Migrated { snapshot, twice } = migrate(&source, &from, &mut devices, &mut sharer, &to, in_hand);
    let found = compare(&from, &to).unwrap();
    assert_eq!(found.wrong_pages, 0, "pages differ, the first ones at {:#x?}", found.wrong);

    let mut arrived = destination.migratable(mode).unwrap();
    arrived.restore(&snapshot).unwrap();
    destination.machine.restore(&source.machine.save().unwrap()).unwrap();
    arrived.resume().unwrap();
    destination.machine.start().unwrap();
    let health = destination.check(2).unwrap();
    assert!(health.wrong_pages.is_empty(), "the guest found {:#x?}", health.wrong_pages);
    assert!(health.wrong_records.is_empty(), "the VMM found {:#x?}", health.wrong_records);
    assert!(health.wrong_device_pages.is_empty(), "the device's pages {:#x?}", health.wrong_device_pages);
    twice
}

/// Whether there is KVM; says so loudly when a test has to do without.
fn kvm(test: &str) -> bool {
    match probe_kvm() {
        Ok(()) => true,
        Err(error) => {
            skipped(test, error);
            false
        }
    }
}

#[test]
fn a_kvm_guest_survives_with_a_log_that_get_clears() {
    if kvm("a_kvm_guest_survives_with_a_log_that_get_clears") {
        assert_eq!(loses_nothing(true, KvmLogMode::AtReport, InHand::HandedBack), 0);
    }
}

#[test]
fn a_kvm_guest_survives_with_manual_protection() {
    if kvm("a_kvm_guest_survives_with_manual_protection") {
        assert_eq!(loses_nothing(true, KvmLogMode::ManualAtReport, InHand::HandedBack), 0);
    }
}

#[test]
fn a_guest_on_a_software_vcpu_survives() {
    assert_eq!(loses_nothing(false, KvmLogMode::AtReport, InHand::HandedBack), 0);
}

/// The control of the tests above: what they look for is there to be found.
#[test]
fn pages_go_twice_when_the_table_in_hand_is_concatenated_with_the_final_one() {
    let twice = loses_nothing(false, KvmLogMode::AtReport, InHand::Concatenated);
    assert!(twice > 0, "the component writes the same pages over and over");
}

#[test]
fn a_session_that_was_stopped_counts_for_nothing_with_the_next_one() {
    let (source, from) = machine(false, 5_000);
    let (_destination, to) = machine(false, 0);
    let (mut devices, mut sharer) = running(&source, &from, KvmLogMode::AtReport);
    devices.start_dirty_log().unwrap();
    let begun = Instant::now();
    while devices.dirty_log().unwrap().is_empty() {
        assert!(begun.elapsed() < Duration::from_secs(10), "the failed attempt was told of no page");
        thread::sleep(Duration::from_millis(10));
    }
    devices.stop_dirty_log().unwrap();
    assert!(devices.dirty_log().is_err(), "no log runs");
    migrate(&source, &from, &mut devices, &mut sharer, &to, InHand::HandedBack);
    assert_eq!(compare(&from, &to).unwrap().wrong_pages, 0);
}
