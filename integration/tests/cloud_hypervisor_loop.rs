// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A migration driven through the `vm-migration` traits alone, by a loop of the VMM's own as Cloud Hypervisor's: it copies all
//! RAM, asks for a table a round, reads the pages with no further call, and concatenates tables.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::thread;
use std::time::{Duration, Instant};

use vfio_migration::migratable::MigratableDevice;
use vfio_migration::source::KvmLogMode;
use vfio_migration_integration::demo::{MachineSetup, Side, compare};
use vfio_migration_integration::skip;
use vfio_migration_integration::vmm::{Memory, probe_kvm};
use vm_memory::{Bytes, GuestAddress};
use vm_migration::protocol::{MemoryRange, MemoryRangeTable};
use vm_migration::{Migratable, Pausable, Snapshot, Snapshottable};

const MEMORY_BYTES: u64 = 64 << 20;

/// Makes a machine, and returns a second handle on its RAM.
fn machine(kvm: bool, device_rate: u32) -> (Side, Memory) {
    let setup = MachineSetup {
        memory_bytes: MEMORY_BYTES,
        kvm,
        guest_rate: 20_000,
        device_rate,
        seed: 7,
        forget: None,
    };
    Side::in_process(setup).unwrap()
}

/// Copies the bytes of a table, as a connection would.
fn copy(table: &MemoryRangeTable, from: &Memory, to: &Memory) -> u64 {
    let mut buffer = Vec::new();
    for range in table.regions() {
        buffer.resize(usize::try_from(range.length).unwrap(), 0);
        from.guest().read_slice(&mut buffer, GuestAddress(range.gpa)).unwrap();
        to.guest().write_slice(&buffer, GuestAddress(range.gpa)).unwrap();
    }
    table.effective_size()
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

/// Cloud Hypervisor's loop, on one thread.
fn migrate(source: &Side, from: &Memory, devices: &mut MigratableDevice, to: &Memory) -> Snapshot {
    devices.start_migration().unwrap();
    devices.start_dirty_log().unwrap();
    copy(&all_ram(from), from, to);
    let mut dirty_bytes = 0;
    for _ in 0..5 {
        thread::sleep(Duration::from_millis(30));
        let table = devices.dirty_log().unwrap();
        assert_sorted_disjoint_coalesced(&table);
        let tables = MemoryRangeTable::new_from_tables(vec![MemoryRangeTable::default(), table]);
        dirty_bytes += copy(&tables, from, to);
    }
    assert!(dirty_bytes > 0, "guest and device were at work");
    assert!(dirty_bytes < 5 * MEMORY_BYTES, "a round is less than all RAM");
    source.machine.pause().unwrap();
    devices.pause().unwrap();
    copy(&devices.dirty_log().unwrap(), from, to);
    let snapshot = devices.snapshot().unwrap();
    copy(&devices.dirty_log().unwrap(), from, to);
    devices.stop_dirty_log().unwrap();
    devices.complete_migration().unwrap();
    snapshot
}

fn loses_nothing(kvm: bool, mode: KvmLogMode) {
    let (source, from) = machine(kvm, 5_000);
    let (destination, to) = machine(kvm, 5_000);
    source.start().unwrap();
    let mut devices = source.migratable(mode).unwrap();
    let snapshot = migrate(&source, &from, &mut devices, &to);
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
}

/// Whether there is KVM; says so loudly when a test has to do without.
fn kvm(test: &str) -> bool {
    match probe_kvm() {
        Ok(()) => true,
        Err(error) => {
            skip(test, error);
            false
        }
    }
}

#[test]
fn a_kvm_guest_survives_with_a_log_that_get_clears() {
    if kvm("a_kvm_guest_survives_with_a_log_that_get_clears") {
        loses_nothing(true, KvmLogMode::AtReport);
    }
}

#[test]
fn a_kvm_guest_survives_with_manual_protection() {
    if kvm("a_kvm_guest_survives_with_manual_protection") {
        loses_nothing(true, KvmLogMode::ManualAtReport);
    }
}

#[test]
fn a_guest_on_a_software_vcpu_survives() {
    loses_nothing(false, KvmLogMode::AtReport);
}

#[test]
fn a_session_that_was_stopped_counts_for_nothing_with_the_next_one() {
    let (source, from) = machine(false, 5_000);
    let (_destination, to) = machine(false, 0);
    source.start().unwrap();
    let mut devices = source.migratable(KvmLogMode::AtReport).unwrap();
    devices.start_dirty_log().unwrap();
    let begun = Instant::now();
    while devices.dirty_log().unwrap().is_empty() {
        assert!(begun.elapsed() < Duration::from_secs(10), "the failed attempt was told of no page");
        thread::sleep(Duration::from_millis(10));
    }
    devices.stop_dirty_log().unwrap();
    assert!(devices.dirty_log().is_err(), "no log runs");
    migrate(&source, &from, &mut devices, &to);
    assert_eq!(compare(&from, &to).unwrap().wrong_pages, 0);
}
