// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Whole machines: the guest runs, notices what is wrong, stops promptly, and goes on elsewhere.
#![cfg(target_arch = "x86_64")]
#![expect(clippy::unwrap_used, reason = "a test may end at any surprise")]

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use kvm_bindings::{KVM_MEM_LOG_DIRTY_PAGES, kvm_userspace_memory_region};
use proptest::prelude::*;
use vfio_migration::source::TakeDirtyWords;
use vfio_migration_integration::skip;
use vfio_migration_integration::vmm::{
    AreaKind, CpuKind, HOLE_END, HOLE_START, KvmError, Machine, MachineConfig, MachineError, MachineState,
    Map, Memory, MemoryError, PAGE_BYTES, PAGE_LEN, Phase, RamLayout, Rate, SHARED_BYTES, Split,
    VcpuExitKind, probe_kvm,
};
use vm_memory::bitmap::Bitmap;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

const MIB: u64 = 1 << 20;
const KVM: CpuKind = CpuKind::Kvm { dirty_ring_bytes: None };

const NONE: [u64; 0] = [];

/// Runs `test` for the software vCPU, and for KVM where it is usable.
fn on_each_cpu(test: impl Fn(CpuKind)) {
    test(CpuKind::Software);
    match probe_kvm() {
        Ok(()) => test(KVM),
        Err(error) => skip(format!("its half on KVM: {error}")),
    }
}

fn memory() -> Memory {
    Memory::create(&RamLayout::new(16 * MIB, Split::default()).unwrap()).unwrap()
}

fn fast_config(memory: Memory, cpu: CpuKind) -> MachineConfig {
    let mut config = MachineConfig::new(memory, cpu);
    config.guest_rate = Rate::Unlimited;
    config.vmm_rate = Rate::PagesPerSecond(2000);
    config.seed = 0xfeed_5eed;
    config
}

fn booted(cpu: CpuKind) -> Machine {
    let machine = Machine::new(fast_config(memory(), cpu)).unwrap();
    machine.boot().unwrap();
    machine
}

/// A page in the middle of a range that the guest walks. A guest that was paused just after a pass began is not there: one
/// paused between checking a page and stamping it does not notice what is done to that page.
fn far_from_the_guest(range: &std::ops::Range<u64>) -> u64 {
    (range.start + (range.end - range.start) / 2) & !(PAGE_BYTES - 1)
}

#[track_caller]
fn wait_for_pass(machine: &Machine, pass: u64) {
    wait_until(&format!("pass {pass}"), || {
        machine.health().unwrap();
        machine.passes().unwrap() >= pass
    });
}

#[track_caller]
fn wait_until(what: &str, done: impl Fn() -> bool) {
    let start = Instant::now();
    while !done() {
        assert!(start.elapsed() < Duration::from_secs(60), "no {what} after a minute");
        std::thread::sleep(Duration::from_millis(2));
    }
}

fn flip_a_bit(machine: &Machine, gpa: u64) {
    let old: u8 = machine.memory().read_obj(GuestAddress(gpa)).unwrap();
    machine.memory().write_obj(old ^ 0x10, GuestAddress(gpa)).unwrap();
}

/// What the VMM's clock page says: its next sequence number.
fn clock_sequence(machine: &Machine) -> u64 {
    let gpa = machine.map().ranges(AreaKind::Vmm).next().unwrap().start;
    machine.memory().read_obj(GuestAddress(gpa + SHARED_BYTES.start)).unwrap()
}

fn contents(memory: &Memory) -> Vec<Vec<u8>> {
    let read = |region: &vfio_migration_integration::vmm::RegionBacking| {
        let mut bytes = vec![0; usize::try_from(region.len).unwrap()];
        memory.guest().read_slice(&mut bytes, GuestAddress(region.gpa)).unwrap();
        bytes
    };
    memory.regions().iter().map(read).collect()
}

fn copy(from: &Memory, to: &Memory) {
    for (region, bytes) in from.regions().iter().zip(contents(from)) {
        to.guest().write_slice(&bytes, GuestAddress(region.gpa)).unwrap();
    }
}

#[test]
fn the_guest_makes_passes_over_both_regions_and_finds_no_fault() {
    on_each_cpu(|cpu| {
        let machine = booted(cpu);
        machine.start().unwrap();
        wait_for_pass(&machine, 3);
        machine.pause().unwrap();
        assert_eq!(machine.faults(), NONE);
        assert_eq!(machine.writer_faults(), NONE);
        let walk = machine.map().guest_walk();
        assert_eq!(walk.len(), 2);
        let pages: u64 = walk.iter().map(|range| (range.end - range.start) / PAGE_BYTES).sum();
        assert!(machine.pages_written().unwrap() >= 3 * pages);
        for range in walk {
            let [pass, page]: [u64; 2] = machine.memory().read_obj(GuestAddress(range.start)).unwrap();
            assert!(pass >= 3);
            assert_eq!(page, range.start / PAGE_BYTES);
        }
    });
}

#[test]
fn the_guest_names_each_page_that_was_spoilt() {
    on_each_cpu(|cpu| {
        let machine = booted(cpu);
        machine.start().unwrap();
        wait_for_pass(&machine, 1);
        machine.pause().unwrap();
        // The pass word, the page number and the check word, in both regions.
        let walk = machine.map().guest_walk();
        let far = far_from_the_guest(&walk[0]);
        let spoilt = [far, far + 7 * PAGE_BYTES, walk[1].end - PAGE_BYTES];
        for (gpa, offset) in spoilt.iter().zip([0, 9, PAGE_BYTES - 1]) {
            flip_a_bit(&machine, gpa + offset);
        }
        let pass = machine.passes().unwrap();
        machine.resume().unwrap();
        wait_for_pass(&machine, pass + 2);
        machine.pause().unwrap();
        let mut faults = machine.faults();
        faults.sort_unstable();
        assert_eq!(faults, spoilt);
        assert_eq!(machine.wrong_pages().unwrap(), 3);
    });
}

#[test]
fn the_guest_notices_a_page_that_is_one_pass_old() {
    on_each_cpu(|cpu| {
        let machine = booted(cpu);
        machine.start().unwrap();
        wait_for_pass(&machine, 1);
        machine.pause().unwrap();
        let gpa = far_from_the_guest(&machine.map().ranges(AreaKind::Guest).next().unwrap());
        let mut stale = vec![0; PAGE_LEN];
        machine.memory().read_slice(&mut stale, GuestAddress(gpa)).unwrap();
        let pass = machine.passes().unwrap();
        machine.resume().unwrap();
        wait_for_pass(&machine, pass + 2);
        machine.pause().unwrap();
        machine.memory().write_slice(&stale, GuestAddress(gpa)).unwrap();
        let pass = machine.passes().unwrap();
        machine.resume().unwrap();
        wait_for_pass(&machine, pass + 3);
        assert_eq!(machine.faults(), [gpa]);
    });
}

#[test]
fn the_vmm_notices_a_record_of_its_own_that_was_lost() {
    let machine = booted(CpuKind::Software);
    machine.start().unwrap();
    let gpa = machine.map().ranges(AreaKind::GuestAndVmm).next().unwrap().start;
    let record = GuestAddress(gpa + SHARED_BYTES.start);
    wait_until("record", || machine.memory().read_obj::<u64>(GuestAddress(record.0 + 8)).unwrap() == gpa);
    machine.pause().unwrap();
    machine.memory().write_obj([0u64; 4], record).unwrap();
    machine.resume().unwrap();
    wait_until("fault", || !machine.writer_faults().is_empty());
    assert_eq!(machine.writer_faults(), [gpa]);
    assert_eq!(machine.faults(), NONE);
}

#[test]
fn a_pause_is_prompt_and_nothing_is_written_after_it() {
    on_each_cpu(|cpu| {
        // With and without a limit: the vCPU is caught in the guest and waiting for its next grant.
        for rate in [Rate::Unlimited, Rate::PagesPerSecond(20), Rate::PagesPerSecond(0)] {
            let memory = memory();
            let mut config = fast_config(memory.clone(), cpu);
            config.guest_rate = rate;
            let machine = Machine::new(config).unwrap();
            machine.boot().unwrap();
            let mut latencies = Vec::new();
            for turn in 0..20 {
                machine.resume().unwrap();
                std::thread::sleep(Duration::from_millis(turn));
                let asked = Instant::now();
                machine.pause().unwrap();
                latencies.push(asked.elapsed());
            }
            let before = contents(&memory);
            std::thread::sleep(Duration::from_millis(20));
            assert!(before == contents(&memory), "{cpu:?} wrote while paused");
            latencies.sort_unstable();
            eprintln!("{cpu:?} {rate:?}: pause median {:?}, worst {:?}", latencies[10], latencies[19]);
            assert!(latencies[10] < Duration::from_millis(10), "{cpu:?} {rate:?}: {latencies:?}");
        }
    });
}

#[test]
fn a_machine_goes_on_elsewhere_from_its_saved_state() {
    on_each_cpu(|cpu| {
        let source = memory();
        let machine = Machine::new(fast_config(source.clone(), cpu)).unwrap();
        machine.boot().unwrap();
        machine.start().unwrap();
        wait_for_pass(&machine, 2);
        // The writer has been round its ring, so it has old records to look at.
        wait_until("record 500", || clock_sequence(&machine) > 500);
        machine.pause().unwrap();
        let json = serde_json::to_vec(&machine.save().unwrap()).unwrap();
        let passes = machine.passes().unwrap();
        drop(machine);

        let destination = memory();
        copy(&source, &destination);
        let state: MachineState = serde_json::from_slice(&json).unwrap();
        let mut config = fast_config(destination, cpu);
        config.seed = 0;
        let machine = Machine::new(config).unwrap();
        machine.restore(&state).unwrap();
        assert_eq!(machine.passes().unwrap(), passes);
        machine.start().unwrap();
        wait_for_pass(&machine, passes + 3);
        wait_until("next round", || clock_sequence(&machine) > state.writer.sequence + 500);
        machine.pause().unwrap();
        assert_eq!(machine.faults(), NONE);
        assert_eq!(machine.writer_faults(), NONE);
    });
}

#[test]
fn a_page_left_behind_is_found_by_the_restored_guest() {
    on_each_cpu(|cpu| {
        let source = memory();
        let machine = Machine::new(fast_config(source.clone(), cpu)).unwrap();
        machine.boot().unwrap();
        let destination = memory();
        copy(&source, &destination);
        machine.start().unwrap();
        wait_for_pass(&machine, 2);
        machine.pause().unwrap();
        let forgotten = machine.map().ranges(AreaKind::Guest).last().unwrap().end - PAGE_BYTES;
        let mut old = vec![0; PAGE_LEN];
        destination.guest().read_slice(&mut old, GuestAddress(forgotten)).unwrap();
        copy(&source, &destination);
        destination.guest().write_slice(&old, GuestAddress(forgotten)).unwrap();

        let restored = Machine::new(fast_config(destination, cpu)).unwrap();
        restored.restore(&machine.save().unwrap()).unwrap();
        let passes = restored.passes().unwrap();
        restored.start().unwrap();
        wait_for_pass(&restored, passes + 2);
        assert_eq!(restored.faults(), [forgotten]);
    });
}

#[test]
fn adopted_files_are_the_same_memory() {
    let layout = RamLayout::new(16 * MIB, Split::default()).unwrap();
    let ours = Memory::create(&layout).unwrap();
    let files = ours.regions().iter().map(|region| region.file.try_clone().unwrap()).collect();
    let theirs = Memory::adopt(&layout, files).unwrap();
    ours.guest().write_obj(0x1234_5678u32, GuestAddress(HOLE_END + 16)).unwrap();
    assert_eq!(theirs.guest().read_obj::<u32>(GuestAddress(HOLE_END + 16)).unwrap(), 0x1234_5678);
}

#[test]
fn files_that_do_not_fit_the_layout_are_refused() {
    let layout = RamLayout::new(16 * MIB, Split::default()).unwrap();
    let files = |layout: &RamLayout| -> Vec<std::fs::File> {
        let memory = Memory::create(layout).unwrap();
        memory.regions().iter().map(|region| region.file.try_clone().unwrap()).collect()
    };
    let one = files(&RamLayout::new(16 * MIB, Split::AtTheHole).unwrap());
    assert!(matches!(Memory::adopt(&layout, one), Err(MemoryError::FileCount { files: 1, regions: 2 })));
    let mut swapped = files(&layout);
    swapped.swap(0, 1);
    assert!(matches!(
        Memory::adopt(&layout, swapped),
        Err(MemoryError::FileSize { gpa: 0, found, expected }) if found == 4 * MIB && expected == 12 * MIB
    ));
}

#[test]
fn sizes_that_no_machine_can_have_are_refused() {
    for total_bytes in [0, 15 * MIB, 16 * MIB + 1, 129 << 30] {
        assert!(matches!(
            RamLayout::new(total_bytes, Split::default()),
            Err(MemoryError::Size { total_bytes: named, .. }) if named == total_bytes
        ));
    }
}

#[test]
fn more_memory_than_the_host_has_is_refused_before_it_is_taken() {
    let layout = RamLayout::new(128 << 30, Split::default()).unwrap();
    match Memory::create(&layout) {
        Err(MemoryError::HostTooSmall { total_bytes, available_bytes }) => {
            assert!(available_bytes < total_bytes);
        }
        Err(error) => panic!("{error}"),
        Ok(_) => skip("this host has 128 GiB to give"),
    }
}

#[test]
fn operations_out_of_turn_name_what_the_machine_is_doing() {
    let machine = Machine::new(fast_config(memory(), CpuKind::Software)).unwrap();
    let phase = |outcome: Result<(), MachineError>| match outcome {
        Err(MachineError::Phase { phase, .. }) => phase,
        other => panic!("{other:?}"),
    };
    assert_eq!(phase(machine.start()), Phase::Empty);
    assert_eq!(phase(machine.pause()), Phase::Empty);
    machine.boot().unwrap();
    assert_eq!(phase(machine.boot()), Phase::Paused);
    machine.pause().unwrap();
    machine.start().unwrap();
    machine.resume().unwrap();
    assert_eq!(phase(machine.save().map(drop)), Phase::Running);
    assert_eq!(machine.boot().unwrap_err().to_string(), "Cannot boot a machine that is running");
}

#[test]
fn a_state_of_the_other_kind_of_vcpu_is_refused() {
    if let Err(error) = probe_kvm() {
        skip(error);
        return;
    }
    let state = booted(CpuKind::Software).save().unwrap();
    let machine = Machine::new(fast_config(memory(), KVM)).unwrap();
    assert!(matches!(machine.restore(&state), Err(MachineError::Cpu { operation: "restore", .. })));
    assert_eq!(machine.phase(), Phase::Empty);
}

#[test]
fn a_limited_guest_keeps_to_its_rate_and_a_throttle_slows_it() {
    let mut config = fast_config(memory(), CpuKind::Software);
    config.guest_rate = Rate::PagesPerSecond(2000);
    let machine = Machine::new(config).unwrap();
    machine.boot().unwrap();
    machine.start().unwrap();
    let pages_in = |time: Duration| {
        let before = machine.pages_written().unwrap();
        std::thread::sleep(time);
        machine.pages_written().unwrap() - before
    };
    let full = pages_in(Duration::from_millis(500));
    machine.throttle(90);
    let throttled = pages_in(Duration::from_millis(500));
    assert!((100..=1100).contains(&full), "{full} pages in half a second at 2000 a second");
    assert!(throttled * 2 < full, "{throttled} pages throttled, {full} before");
}

#[test]
fn the_hook_sees_port_accesses_and_a_full_dirty_ring() {
    if let Err(error) = probe_kvm() {
        skip(error);
        return;
    }
    let [io, full] = [(); 2].map(|()| Arc::new(AtomicU64::new(0)));
    let counts = (Arc::clone(&io), Arc::clone(&full));
    let memory = Memory::create(&RamLayout::new(64 * MIB, Split::default()).unwrap()).unwrap();
    let mut config = fast_config(memory, CpuKind::Kvm { dirty_ring_bytes: Some(16384) });
    config.exit_hook = Some(Arc::new(move |kind| {
        counts.0.fetch_add(u64::from(kind == VcpuExitKind::Io), Ordering::Relaxed);
        counts.1.fetch_add(u64::from(kind == VcpuExitKind::DirtyRingFull), Ordering::Relaxed);
    }));
    let machine = match Machine::new(config) {
        Err(MachineError::Kvm(error @ KvmError::Lacks { .. })) => {
            skip(error);
            return;
        }
        other => other.unwrap(),
    };
    assert!(machine.vcpu_fd().is_some());
    machine.boot().unwrap();
    log_dirty_pages(&machine);
    machine.start().unwrap();
    wait_until("full ring", || full.load(Ordering::Relaxed) > 0);
    assert!(io.load(Ordering::Relaxed) > 0);
    // Nobody harvests, so the vCPU cannot go on; it still parks.
    machine.pause().unwrap();
}

#[expect(unsafe_code, reason = "KVM trusts us about where the memory is mapped")]
fn log_dirty_pages(machine: &Machine) {
    for region in machine.regions() {
        let slot = kvm_userspace_memory_region {
            slot: region.slot,
            flags: KVM_MEM_LOG_DIRTY_PAGES,
            guest_phys_addr: region.gpa,
            memory_size: region.len,
            userspace_addr: region.userspace_addr,
        };
        // SAFETY: The slot stays where the machine put it; only its flags change.
        unsafe { machine.vm_fd().unwrap().set_user_memory_region(slot) }.unwrap();
    }
}

#[test]
fn what_the_vmm_writes_is_in_the_bitmap_and_what_kvm_writes_is_not() {
    if let Err(error) = probe_kvm() {
        skip(error);
        return;
    }
    let machine = booted(KVM);
    let dirty = |gpa: u64| {
        let region = machine.memory().find_region(GuestAddress(gpa)).unwrap();
        let offset = usize::try_from(gpa - region.start_addr().0).unwrap();
        region.get_mmap().bitmap().dirty_at(offset)
    };
    for region in machine.memory().iter() {
        region.get_mmap().bitmap().take_dirty_words(&mut |_, _| {});
    }
    machine.start().unwrap();
    wait_for_pass(&machine, 2);
    machine.pause().unwrap();
    let first = |kind| machine.map().ranges(kind).next().unwrap().start;
    assert!(dirty(first(AreaKind::Vmm)));
    assert!(!dirty(first(AreaKind::Guest)));
    assert!(!dirty(first(AreaKind::Cold)));
}

fn layouts() -> impl Strategy<Value = RamLayout> {
    let pages = prop_oneof![4096u64..16384, 4096u64..(128 << 18)];
    (pages, prop_oneof![Just(Split::QuarterAbove), Just(Split::AtTheHole)])
        .prop_map(|(pages, split)| RamLayout::new(pages * PAGE_BYTES, split).unwrap())
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn the_layout_has_all_bytes_and_leaves_the_hole_out(pages in 4096u64..(128 << 18), above: bool) {
        let split = if above { Split::QuarterAbove } else { Split::AtTheHole };
        let layout = RamLayout::new(pages * PAGE_BYTES, split).unwrap();
        prop_assert_eq!(layout.total_bytes(), pages * PAGE_BYTES);
        prop_assert_eq!(layout.regions()[0].start, 0);
        for region in layout.regions() {
            prop_assert!(region.start < region.end);
            prop_assert!(region.end <= HOLE_START || region.start >= HOLE_END);
        }
        prop_assert!(!above || layout.regions().len() == 2);
    }

    #[test]
    fn areas_tile_ram_exactly_and_none_is_empty(layout in layouts()) {
        let map = Map::new(&layout);
        let mut next = map.areas().iter();
        for region in layout.regions() {
            let mut at = region.start;
            while at < region.end {
                let area = next.next().unwrap();
                prop_assert_eq!(area.range.start, at);
                prop_assert!(area.range.end > at);
                prop_assert!(area.range.start.is_multiple_of(PAGE_BYTES));
                at = area.range.end;
            }
            prop_assert_eq!(at, region.end);
        }
        prop_assert!(next.next().is_none());
    }

    #[test]
    fn each_writer_has_pages_of_its_own_and_shares_some_in_every_region(layout in layouts()) {
        let map = Map::new(&layout);
        let windows = [map.guest_walk(), map.device_window(), map.vmm_window()];
        for (index, region) in layout.regions().iter().enumerate() {
            for window in &windows {
                prop_assert_eq!(window.len(), layout.regions().len());
                prop_assert!(region.start <= window[index].start && window[index].end <= region.end);
            }
            let [guest, device, vmm] = windows.clone().map(|window| window[index].clone());
            prop_assert!(device.start < guest.start && guest.start < device.end);
            prop_assert!(device.end < vmm.start);
            prop_assert!(vmm.start < guest.end && guest.end < vmm.end);
        }
    }
}
