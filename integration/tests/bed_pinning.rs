// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A VM with a pass-through device, most of whose RAM nobody ever touched, moves to a receiver that pins all RAM while it takes State.
//!
//! Runs inside the test bed: `integration/testbed/run --test bed_pinning`, where the VM has 256 MiB; with `--memory 6144` it has 1 GiB.
//! Elsewhere the test says that it was skipped. `edu`, which is behind an IOMMU, is what the RAM is pinned for.

#![expect(clippy::unwrap_used, reason = "a test's own steps must succeed")]

use std::collections::BTreeSet;
use std::fs;
use std::ops::Range;
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use serde_json::json;
use vfio_migration::device::DeviceSet;
use vfio_migration::layout::Layout;
use vfio_migration::source::GuestMemoryLog;
use vfio_migration::source::SummaryBitmap;
use vfio_migration::tracker::{DeviceMappings, SpaceId, Tracker, VmMappings};
use vfio_migration::transfer::connection::Listener;
use vfio_migration::transfer::limits::PeerLimits;
use vfio_migration::transfer::receive::{
    Completion, Destination, GuestPages, PageStore, Receiver, asks_for_prefault,
};
use vfio_migration::transfer::{PinningReceiver, Populated, SendOptions, Sender, Sent};
use vfio_migration::vm::{Backing, Captured, Vm, VmError, read_tree};
use vfio_migration_integration::bed::{Bed, Bus, Engine, EngineStream, PassThrough, differing};
use vfio_migration_integration::vmm::{Memory, PAGE_LEN, RamLayout, Split};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vm_migration::{Snapshot, snapshot_from_id};

/// Where the engine writes, within what is populated.
const WINDOW: Range<u64> = 0x10_0000..0x14_0000;
const MDEV: &str = "mdev0";
const DEVICES: &str = "device-manager";

/// RAM of the VM, and how much of it was ever written.
#[derive(Debug, Clone, Copy)]
struct Size {
    ram_bytes: u64,
    populated_bytes: u64,
}

impl Size {
    /// As large as the emulated machine allows: both sides are in it, with all their RAM in the end.
    fn that_fits() -> Self {
        let total_kib: u64 = fs::read_to_string("/proc/meminfo")
            .unwrap()
            .lines()
            .find_map(|line| line.strip_prefix("MemTotal:")?.trim().strip_suffix(" kB")?.parse().ok())
            .unwrap();
        let ram_bytes = if total_kib > 5 << 20 { 1 << 30 } else { 256 << 20 };
        Self { ram_bytes, populated_bytes: ram_bytes / 16 }
    }
}

/// One side: RAM and a device that does DMA to it.
struct Machine {
    memory: Memory,
    engine: Engine,
    devices: Mutex<DeviceSet>,
}

impl Machine {
    fn new(size: Size, mdev: &str) -> Self {
        let memory = Memory::create(&RamLayout::new(size.ram_bytes, Split::default()).unwrap()).unwrap();
        let engine = Engine::open(mdev, &memory).unwrap();
        let devices = DeviceSet::new(vec![engine.device(MDEV).unwrap()]).unwrap();
        Self { memory, engine, devices: Mutex::new(devices) }
    }

    /// Writes the part of the RAM that is to be populated, and has the engine go on writing a little of it.
    fn start(&self, size: Size) {
        for gpa in (0..size.populated_bytes).step_by(PAGE_LEN) {
            self.memory.guest().write_obj(gpa | 1, GuestAddress(gpa)).unwrap();
        }
        self.engine.program(&EngineStream { seed: 67, windows: vec![WINDOW] }, 100).unwrap();
        self.engine.run(true).unwrap();
    }

    fn tracker(&self) -> Mutex<Tracker> {
        let layout = Layout::from_guest_memory(self.memory.guest()).unwrap();
        let ram: Vec<_> = layout.regions().iter().map(|region| region.range()).collect();
        let devices = vec![DeviceMappings { device: MDEV.to_owned(), gpa: ram.clone() }];
        let mappings = VmMappings { ram, devices, ..VmMappings::default() };
        let builder = Tracker::builder(layout)
            .mappings(move || mappings.clone())
            .source_of(SpaceId::IDENTITY, [MDEV], self.engine.source("container:mdev0").unwrap())
            .source(Box::new(GuestMemoryLog::new(Arc::new(self.memory.guest().clone()))));
        Mutex::new(builder.build().unwrap())
    }
}

/// A VM without vCPUs as its sender sees it.
struct Source<'a>(&'a Machine);

impl Vm for Source<'_> {
    type Memory = GuestMemoryMmap<SummaryBitmap>;

    fn memory(&self) -> Arc<Self::Memory> {
        Arc::new(self.0.memory.guest().clone())
    }

    fn backing(&self) -> Backing {
        Backing::of_mmap(self.0.memory.guest())
    }

    fn config(&mut self) -> Result<Vec<u8>, VmError> {
        let bytes = self.0.memory.layout().total_bytes();
        Ok(serde_json::to_vec(&json!({ "vm_config": { "memory": { "size": bytes, "shared": true } } }))?)
    }

    fn pause(&mut self) -> Result<(), VmError> {
        Ok(())
    }

    fn resume(&mut self) -> Result<(), VmError> {
        Ok(())
    }

    fn state(&mut self, devices: Snapshot) -> Result<Captured, VmError> {
        let mut root = Snapshot::default();
        root.add_snapshot(DEVICES.to_owned(), devices);
        Ok(root.into())
    }

    fn can_throttle(&self) -> bool {
        false
    }

    fn throttle(&mut self, _percent: u8) {}
}

/// A receiver that takes State as Cloud Hypervisor does: it maps all RAM for its devices, which pins it.
struct Pinning<'a> {
    machine: &'a Machine,
    edu: &'a str,
    pinned: Option<PassThrough>,
}

impl Destination for Pinning<'_> {
    fn config(&mut self, config: &[u8]) -> Result<Arc<dyn PageStore>, VmError> {
        let pages = GuestPages::new(Arc::new(self.machine.memory.guest().clone()))?;
        Ok(Arc::new(if asks_for_prefault(config) { pages.populated()? } else { pages }))
    }

    fn state(&mut self, state: Vec<u8>) -> Result<(), VmError> {
        let root = read_tree(state)?;
        self.pinned = Some(PassThrough::open(Bus::Pci, self.edu, &self.machine.memory)?);
        let devices = snapshot_from_id(Some(&root), DEVICES).expect("State has devices");
        Ok(self.machine.devices.lock().unwrap().load(devices)?)
    }

    fn complete(&mut self, _paused: bool) -> Result<Completion, VmError> {
        Ok(Completion::Moved)
    }

    fn abandoned(&mut self) {}
}

/// The devices that the migrations need.
struct Names {
    mdevs: [String; 2],
    edu: String,
}

/// Moves a fresh VM; every byte arrives.
fn moved(size: Size, names: &Names, pinning_receiver: PinningReceiver) -> Sent {
    let [source, destination] = names.mdevs.each_ref().map(|mdev| Machine::new(size, mdev));
    source.start(size);
    let listener = Listener::bind(&"tcp:127.0.0.1:0".parse().unwrap()).unwrap();
    let options = SendOptions::new(listener.url().clone())
        .pinning_receiver(pinning_receiver)
        .downtime(Duration::from_millis(10_000));
    let tracker = source.tracker();
    let sent = thread::scope(|scope| {
        let received = scope.spawn(|| {
            let mut vm = Pinning { machine: &destination, edu: &names.edu, pinned: None };
            Receiver::new(PeerLimits::default(), None)
                .receive(&listener, &mut vm)
                .map(|_| vm.pinned.is_some())
        });
        let sent = Sender::new(options).send(&mut Source(&source), &tracker, &source.devices);
        assert!(received.join().unwrap().unwrap(), "nothing was pinned");
        sent.unwrap()
    });
    assert_eq!(differing(&source.memory, &destination.memory).unwrap(), BTreeSet::new());
    eprintln!(
        "{pinning_receiver:?}: downtime {} ms, {} KiB sent, {} MiB left out",
        sent.downtime.as_millis(),
        sent.progress.sent_bytes >> 10,
        (sent.progress.skipped_bytes()) >> 20
    );
    sent
}

/// Times each way is tried; odd, so that there is a median.
const PAIRS: usize = 3;

/// Times that so many pairs are measured, at most.
const TRIES: usize = 3;

/// The median downtimes of all sent and of prefault, taken in turn.
fn medians(size: Size, names: &Names) -> [Duration; 2] {
    let mut downtimes = [Vec::new(), Vec::new()];
    for _ in 0..PAIRS {
        let all = moved(size, names, PinningReceiver::SendAll);
        let prefault = moved(size, names, PinningReceiver::Prefault);
        assert_eq!((all.populated, prefault.populated), (Populated::Sender, Populated::Receiver));
        let ratio = prefault.progress.sent_bytes as f64 / all.progress.sent_bytes as f64;
        assert!(ratio <= 0.3, "{ratio:.3} of the bytes were sent");
        downtimes[0].push(all.downtime);
        downtimes[1].push(prefault.downtime);
    }
    downtimes.map(|mut downtimes| {
        downtimes.sort_unstable();
        downtimes[PAIRS / 2]
    })
}

#[test]
fn c67_beside_a_real_iommu_prefault_costs_no_downtime_and_nothing_done_costs_much() {
    const TEST: &str = "moving to a receiver that pins";
    const BOUND: f64 = 1.2;
    let Some(bed) = Bed::find(TEST) else { return };
    let Some(mdevs) = bed.two(TEST, "dirty_mdev") else { return };
    let Some([edu, _]) = bed.two(TEST, "edu_vfio") else { return };
    let (size, names) = (Size::that_fits(), Names { mdevs, edu });
    // An emulated machine that was held up is measured anew.
    let kept =
        (0..TRIES).map(|_| medians(size, &names)).find(|[all, prefault]| *prefault <= all.mul_f64(BOUND));
    let [_, prefault] = kept.expect("one of the tries keeps the limit");
    let unheeded = moved(size, &names, PinningReceiver::Unheeded).downtime;
    assert!(unheeded > prefault * 2, "{unheeded:?} with nothing done, {prefault:?} with prefault");
}
