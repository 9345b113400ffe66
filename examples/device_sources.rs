// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A VMM that keeps its own migration loop and its own dirty log, and takes the library for its pass-through devices alone:
//! `cargo run --example device_sources`.
//!
//! The loop is shaped like Cloud Hypervisor's. The device is a thread that writes guest memory through a mapping of its own, as
//! DMA does: the VMM's log sees nothing of it. With a VFIO device, `DeviceLog` stands in the place of [`NicLog`] and
//! `KernelDevice` in that of [`NicState`]; the rest stays.
#![expect(clippy::print_stdout, reason = "an example tells what it does")]

mod machine;
mod nic;

use std::error::Error;
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use vfio_migration::device::{Device, DeviceSet};
use vfio_migration::layout::Layout;
use vfio_migration::migratable::MigratableDevice;
use vfio_migration::range::GpaRange;
use vfio_migration::tracker::{DeviceMappings, SpaceId, Tracker, VmMappings};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};
use vm_migration::protocol::{MemoryRange, MemoryRangeTable};
use vm_migration::{Migratable, Pausable, Snapshottable};

use machine::{Machine, PAGE_BYTES, RAM_BYTES};
use nic::{Nic, NicLog, NicState};

type Failure = Box<dyn Error + Send + Sync>;

/// A VM with one pass-through device, and the library's part in it.
struct Vmm {
    machine: Machine,
    nic: Arc<Nic>,
    pass_through: MigratableDevice,
}

impl Vmm {
    fn new() -> Result<Self, Failure> {
        let machine = Machine::new()?;
        let nic = Nic::new(&machine)?;
        let ram = GpaRange::new(0, RAM_BYTES as u64)?;
        // What really maps the memory. A VMM looks it up in what it registered, and does not derive it from the layout.
        let mappings = move || VmMappings {
            ram: vec![ram],
            devices: vec![DeviceMappings { device: "net0".to_owned(), gpa: vec![ram] }],
            ..VmMappings::default()
        };
        let tracker = Tracker::builder(Layout::from_guest_memory(&*machine.memory)?)
            .mappings(mappings)
            .source_of(SpaceId::IDENTITY, ["net0"], Box::new(NicLog(Arc::clone(&nic))))
            .build()?;
        let devices = DeviceSet::new(vec![Device::new("net0", Box::new(NicState::new(Arc::clone(&nic))))])?;
        let shared = (Arc::new(Mutex::new(tracker)), Arc::new(Mutex::new(devices)));
        Ok(Self { machine, nic, pass_through: MigratableDevice::new("pass-through", shared.0, shared.1) })
    }

    /// The VMM's own log: what it reported since the last call.
    fn own_dirty_log(&self) -> MemoryRangeTable {
        let region = self.machine.memory.iter().next().expect("RAM is one region");
        MemoryRangeTable::from_dirty_bitmap((**region).bitmap().get_and_reset(), 0, PAGE_BYTES)
    }

    /// Copies the bytes of a table, as its connections would.
    fn copy(&self, table: &MemoryRangeTable, to: &Self) -> Result<u64, Failure> {
        for range in table.regions() {
            let mut bytes = vec![0; usize::try_from(range.length)?];
            self.machine.memory.read_slice(&mut bytes, GuestAddress(range.gpa))?;
            to.machine.memory.write_slice(&bytes, GuestAddress(range.gpa))?;
        }
        Ok(table.effective_size())
    }

    /// Copies memory while vCPU and device run; returns the VMM's own part of the table in hand when it is time to stop.
    fn precopy(&mut self, to: &Self) -> Result<MemoryRangeTable, Failure> {
        self.own_dirty_log();
        self.pass_through.start_dirty_log()?;
        let mut table = MemoryRangeTable::default();
        table.push(MemoryRange { gpa: 0, length: RAM_BYTES as u64 });
        for round in 0.. {
            let bytes = self.copy(&table, to)?;
            println!("Round {round}: {bytes} bytes");
            thread::sleep(Duration::from_millis(20));
            let (own, devices) = (self.own_dirty_log(), self.pass_through.dirty_log()?);
            if round == 3 {
                // The devices' part of the table in hand: its pages are in the final table, once.
                drop(devices);
                self.pass_through.hand_back()?;
                return Ok(own);
            }
            table = MemoryRangeTable::new_from_tables(vec![own, devices]);
        }
        unreachable!("precopy ends in round 3")
    }

    /// Moves the VM into `to`, which has all of it then and does not run yet. On an error it is to run on here.
    fn migrate(&mut self, to: &mut Self) -> Result<(), Failure> {
        self.pass_through.start_migration()?;
        let in_hand = self.precopy(to)?;
        // vCPUs stop first and run last.
        self.machine.pause();
        self.pass_through.pause()?;
        let last = vec![in_hand, self.own_dirty_log(), self.pass_through.dirty_log()?];
        let bytes = self.copy(&MemoryRangeTable::new_from_tables(last), to)?;
        println!("Final round: {bytes} bytes");
        let devices = self.pass_through.snapshot()?;
        // Reading a device's state may write memory.
        let written = self.pass_through.dirty_log()?;
        self.copy(&written, to)?;
        // From here on the destination may be told to run the VM.
        self.pass_through.check_all_sent()?;
        to.machine.restore(self.machine.save());
        Ok(to.pass_through.restore(&devices)?)
    }

    /// Lets the moved VM run.
    fn run(&mut self) -> Result<(), Failure> {
        self.pass_through.resume()?;
        self.machine.resume();
        Ok(())
    }

    /// Ends the sessions of a VM that has moved. It stays paused whatever fails: it may run at its destination.
    fn retire(&mut self) {
        if let Err(error) = self.pass_through.complete_migration() {
            println!("Sessions of the VM that moved did not end well: {error}");
        }
    }

    /// Sets everything going again after a migration that failed before its destination had the VM.
    fn run_on(&mut self) -> Result<(), Failure> {
        self.pass_through.stop_dirty_log()?;
        self.pass_through.resume()?;
        self.machine.resume();
        Ok(())
    }
}

fn main() -> Result<(), Failure> {
    let (mut source, mut destination) = (Vmm::new()?, Vmm::new()?);
    source.machine.resume();
    source.nic.program();
    if let Err(error) = source.migrate(&mut destination) {
        source.run_on()?;
        return Err(error);
    }
    // The point of no return: once the destination is told to run the VM, no failure on either side sets it going here.
    let ran = destination.run();
    source.retire();
    ran?;
    let tracker = source.pass_through.tracker().lock().expect("no thread panics while it tracks");
    let (source_id, reported) = tracker.attribution().next().expect("there is a source");
    println!("{source_id} reported {} pages", reported.pages);
    assert!(reported.pages > 0, "the device was at work");
    destination.machine.check();
    destination.nic.check();
    println!("vCPU and device went on and found each page as they had left it");
    Ok(())
}
