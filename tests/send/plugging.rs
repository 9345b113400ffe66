// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A VM that changes while it is sent: RAM, a source and a device are plugged in and out, a virtual IOMMU maps and unmaps.

use std::collections::BTreeSet;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use vfio_migration::device::{Device, DeviceSet};
use vfio_migration::iova::{IovaMap, Mapping};
use vfio_migration::layout::Layout;
use vfio_migration::range::{GpaRange, IovaRange};
use vfio_migration::source::{
    Cover, DirtySource, GuestMemoryLog, Harvest, PluggedRam, Reports, Sink, SourceError,
};
use vfio_migration::tracker::{DeviceMappings, SpaceId, Tracker, TrackerError, VmMappings};
use vfio_migration::transfer::Sender;
use vfio_migration::vm::{Backing, Captured, Vm, VmError};
use vm_memory::bitmap::AtomicBitmap;
use vm_memory::{
    Bytes, FileOffset, GuestAddress, GuestAddressSpace, GuestMemoryAtomic, GuestMemoryBackend,
    GuestMemoryRegion, GuestRegionMmap, MmapRegion,
};
use vm_migration::Snapshot;

use crate::frames::STATE;
use crate::peer::{Fault, Peer, Transcript};
use crate::vm::{FakeDevice, Log, Memory, PAGE};

pub(crate) const BASE: (u64, u64) = (0, 8 << 20);
const PLUGGED: (u64, u64) = (1 << 30, 2 << 20);
pub(crate) const UNPLUGGED: (u64, u64) = (2 << 30, 2 << 20);

/// RAM in a memfd: a device writes the file, which no bitmap of the VMM sees.
pub(crate) fn region((start, bytes): (u64, u64)) -> (Arc<GuestRegionMmap<AtomicBitmap>>, File) {
    let file = File::from(rustix::fs::memfd_create("ram", rustix::fs::MemfdFlags::CLOEXEC).unwrap());
    file.set_len(bytes).unwrap();
    let offset = FileOffset::new(file.try_clone().unwrap(), 0);
    let mapping = MmapRegion::from_file(offset, usize::try_from(bytes).unwrap()).unwrap();
    (Arc::new(GuestRegionMmap::new(mapping, GuestAddress(start)).unwrap()), file)
}

/// The VM as the sender sees it; whoever writes its memory holds `running` meanwhile.
pub(crate) struct ChangingVm {
    memory: GuestMemoryAtomic<Memory>,
    running: Arc<Mutex<bool>>,
    /// Called before the memory is handed out.
    pub(crate) on_memory: Box<dyn Fn() + Send>,
}

impl Vm for ChangingVm {
    type Memory = Memory;

    fn memory(&self) -> Arc<Memory> {
        (self.on_memory)();
        self.memory.memory().into_inner()
    }

    fn backing(&self) -> Backing {
        Backing::of_mmap(&*self.memory.memory())
    }

    fn config(&mut self) -> Result<Vec<u8>, VmError> {
        Ok(br#"{"vm_config":{}}"#.to_vec())
    }

    fn pause(&mut self) -> Result<(), VmError> {
        *self.running.lock().unwrap() = false;
        Ok(())
    }

    fn resume(&mut self) -> Result<(), VmError> {
        *self.running.lock().unwrap() = true;
        Ok(())
    }

    fn state(&mut self, devices: Snapshot) -> Result<Captured, VmError> {
        Ok(devices.into())
    }

    fn can_throttle(&self) -> bool {
        false
    }

    fn throttle(&mut self, _percent: u8) {}
}

/// The DMA log of a device: the IOVAs of pages that it wrote.
#[derive(Clone)]
struct DmaLog {
    id: &'static str,
    harvest: Harvest,
    written: Arc<Mutex<BTreeSet<u64>>>,
}

impl DmaLog {
    fn new(id: &'static str, harvest: Harvest) -> Self {
        Self { id, harvest, written: Arc::default() }
    }

    fn wrote(&self, iova: u64) {
        self.written.lock().unwrap().insert(iova);
    }
}

impl DirtySource for DmaLog {
    fn id(&self) -> &str {
        self.id
    }

    fn reports(&self) -> Reports {
        Reports::Devices
    }

    fn cover(&self) -> Cover {
        Cover { ranges: vec![GpaRange::new(0, 1 << 40).unwrap()], precise: true }
    }

    fn start(&mut self, _layout: &Layout, _iova: &IovaMap) -> Result<(), SourceError> {
        Ok(())
    }

    fn collect(&mut self, sink: &mut Sink<'_>) -> Result<(), SourceError> {
        let written = std::mem::take(&mut *self.written.lock().unwrap());
        written.into_iter().for_each(|iova| sink.iova_range(IovaRange::new(iova, PAGE).unwrap()));
        Ok(())
    }

    fn harvest(&self) -> Harvest {
        self.harvest
    }

    fn unmapped(&mut self, mapping: &Mapping, sink: &mut Sink<'_>) -> Result<(), SourceError> {
        let mut written = self.written.lock().unwrap();
        written.retain(|&iova| {
            let goes = mapping.iova().contains(iova);
            if goes {
                sink.iova_range(IovaRange::new(iova, PAGE).unwrap());
            }
            !goes
        });
        Ok(())
    }

    fn stop(&mut self) -> Result<(), SourceError> {
        Ok(())
    }
}

/// The VMM's side of the VM: what changes it while the sender runs.
pub(crate) struct Vmm {
    pub(crate) memory: GuestMemoryAtomic<Memory>,
    running: Arc<Mutex<bool>>,
    base: File,
    pub(crate) tracker: Arc<Mutex<Tracker>>,
    pub(crate) devices: Mutex<DeviceSet>,
    space: SpaceId,
    dma: DmaLog,
    plugged_dma: DmaLog,
}

fn ranges(memory: &GuestMemoryAtomic<Memory>) -> Vec<GpaRange> {
    let memory = memory.memory();
    memory.iter().map(|region| GpaRange::new(region.start_addr().0, region.len()).unwrap()).collect()
}

impl Vmm {
    pub(crate) fn new() -> Self {
        let ((base, file), (unplugged, _)) = (region(BASE), region(UNPLUGGED));
        let memory = Memory::from_arc_regions(vec![base, unplugged]).unwrap();
        let memory = GuestMemoryAtomic::new(memory);
        for page in 0..BASE.1 / PAGE {
            memory.memory().write_obj(page ^ 0x5eed, GuestAddress(page * PAGE)).unwrap();
        }
        let (seen, dma) = (memory.clone(), DmaLog::new("dma0", Harvest::AfterUnmap));
        let mut builder = Tracker::builder(Layout::from_guest_memory(&*memory.memory()).unwrap())
            .mappings(move || {
                // Behind a virtual IOMMU that maps nothing yet.
                let devices = vec![DeviceMappings { device: "net0".to_owned(), gpa: Vec::new() }];
                VmMappings { ram: ranges(&seen), devices, ..VmMappings::default() }
            })
            .source(Box::new(GuestMemoryLog::new(memory.clone())));
        let space = builder.space(IovaMap::journal());
        let tracker = builder.source_of(space, ["net0"], Box::new(dma.clone())).build().unwrap();
        let plugged_dma = DmaLog::new("dma1", Harvest::BeforeUnmap);
        let (running, devices) = (Arc::new(Mutex::new(true)), Mutex::default());
        let tracker = Arc::new(Mutex::new(tracker));
        Self { memory, running, base: file, tracker, devices, space, dma, plugged_dma }
    }

    /// The VM as the sender sees it.
    pub(crate) fn vm(&self) -> ChangingVm {
        let (memory, running) = (self.memory.clone(), Arc::clone(&self.running));
        ChangingVm { memory, running, on_memory: Box::new(|| {}) }
    }

    /// Does something unless the VM is paused, and stays so meanwhile.
    pub(crate) fn while_running(&self, act: impl FnOnce()) {
        let running = self.running.lock().unwrap();
        if *running {
            act();
        }
    }

    /// A device writes a page of the base RAM, at the IOVA by which it knows it.
    fn dma(&self, log: &DmaLog, iova: u64, gpa: u64, value: u64) {
        self.base.write_all_at(&value.to_le_bytes(), gpa).unwrap();
        log.wrote(iova);
    }

    fn plug_ram(&self) {
        self.plug(region(PLUGGED).0);
    }

    pub(crate) fn plug(&self, new: Arc<GuestRegionMmap<AtomicBitmap>>) {
        let gpa = GpaRange::new(new.start_addr().0, new.len()).unwrap();
        let mut tracker = self.tracker.lock().unwrap();
        let grown = self.memory.memory().insert_region(new).unwrap();
        self.memory.lock().unwrap().replace(grown);
        tracker.add_ram(&PluggedRam { gpa, kvm_slot: None }).unwrap();
    }

    pub(crate) fn unplug_ram(&self) {
        let mut tracker = self.tracker.lock().unwrap();
        self.unplug_from(&mut tracker);
    }

    pub(crate) fn unplug_from(&self, tracker: &mut Tracker) {
        let gpa = GpaRange::new(UNPLUGGED.0, UNPLUGGED.1).unwrap();
        let remove = || {
            let (rest, _) =
                self.memory.memory().remove_region(GuestAddress(UNPLUGGED.0), UNPLUGGED.1).unwrap();
            self.memory.lock().unwrap().replace(rest);
            Ok::<_, TrackerError>(())
        };
        tracker.remove_ram(gpa, remove).unwrap();
    }

    fn map(&self, iova: u64, gpa: u64) {
        let (iova, gpa) = (IovaRange::new(iova, 16 * PAGE).unwrap(), GpaRange::new(gpa, 16 * PAGE).unwrap());
        self.tracker.lock().unwrap().map(self.space, Mapping::new(iova, gpa).unwrap()).unwrap();
    }

    /// Unmaps, while the device writes a last page before it cannot any more.
    fn unmap(&self, iova: u64, gpa: u64, value: u64) {
        let range = IovaRange::new(iova, 16 * PAGE).unwrap();
        let unmap = || {
            self.dma(&self.dma, iova + 7 * PAGE, gpa + 7 * PAGE, value);
            Ok::<_, TrackerError>(())
        };
        assert!(self.tracker.lock().unwrap().unmap(self.space, range, unmap).unwrap().is_empty());
    }

    fn plug_device(&self, log: &Log) {
        let source = Box::new(self.plugged_dma.clone());
        self.tracker.lock().unwrap().add_source(SpaceId::IDENTITY, ["net1"], source).unwrap();
        let device = Device::new("net1", Box::new(FakeDevice::new(log, b"plugged in late!")));
        self.devices.lock().unwrap().add(device).unwrap();
    }

    fn unplug_device(&self) {
        self.devices.lock().unwrap().remove("gone0").unwrap();
    }

    /// The receiver has what memory holds; a page that did not come is zeros there.
    pub(crate) fn assert_arrived(&self, transcript: &Transcript) {
        let memory = self.memory.memory();
        for range in ranges(&self.memory).into_iter().flat_map(|range| range.pieces(PAGE)) {
            let mut page = vec![0; PAGE as usize];
            memory.read_slice(&mut page, GuestAddress(range.start())).unwrap();
            let zero = || vec![0; PAGE as usize];
            let arrived = transcript.pages.get(&range.start()).cloned().unwrap_or_else(zero);
            assert!(arrived == page, "page {range} differs");
        }
    }

    /// What happens at one moment of a running VM.
    fn step(&self, step: u64, log: &Log) {
        let page = step % 512;
        match step {
            40 => self.plug_ram(),
            60 => self.unplug_ram(),
            80 => self.plug_device(log),
            100 => self.unplug_device(),
            _ if step % 20 == 5 => self.map(0x10_0000_0000 + step * (1 << 20), page * PAGE),
            _ if step % 20 == 15 => {
                let (iova, gpa) = (0x10_0000_0000 + (step - 10) * (1 << 20), (page - 10) * PAGE);
                self.unmap(iova, gpa, step);
            }
            _ if step % 20 > 5 && step % 20 < 15 => {
                let first = step - step % 20 + 5;
                let (iova, gpa) = (0x10_0000_0000 + first * (1 << 20), first % 512 * PAGE);
                self.dma(&self.dma, iova + (step % 5) * PAGE, gpa + (step % 5) * PAGE, step);
            }
            _ if step > 80 && step.is_multiple_of(3) => {
                self.dma(&self.plugged_dma, (1000 + page) * PAGE, (1000 + page) * PAGE, step);
            }
            _ if step > 40 => {
                self.memory.memory().write_obj(step, GuestAddress(PLUGGED.0 + page * PAGE)).unwrap();
            }
            _ => self.memory.memory().write_obj(step, GuestAddress((1500 + page) * PAGE)).unwrap(),
        }
    }
}

#[test]
fn nothing_is_lost_of_a_vm_that_changes_while_it_is_sent() {
    let (vmm, log) = (Vmm::new(), Log::default());
    let gone = Device::new("gone0", Box::new(FakeDevice::new(&log, b"goes before it ends")));
    vmm.devices.lock().unwrap().add(gone).unwrap();
    let mut vm = vmm.vm();
    let peer = Peer::unix(Fault::None);
    let options =
        crate::options(&peer).rate_limit(Some(16 << 20)).unwrap().downtime(Duration::from_millis(2000));
    let sender = Sender::new(options);
    let migration = sender.handle();
    let steps = thread::scope(|scope| {
        let sending = scope.spawn(|| sender.send(&mut vm, &vmm.tracker, &vmm.devices));
        while migration.progress().acknowledged_bytes == 0 {
            thread::sleep(Duration::from_millis(1));
        }
        let mut steps = 0;
        while !sending.is_finished() {
            let running = vmm.running.lock().unwrap();
            if *running && steps < 400 {
                vmm.step(steps, &log);
                steps += 1;
            }
            drop(running);
            thread::sleep(Duration::from_millis(1));
        }
        sending.join().unwrap().unwrap();
        steps
    });
    assert!(steps > 120, "all of it happened while the VM was sent: {steps} steps");
    let (transcript, outcome) = peer.end();
    outcome.unwrap();
    vmm.assert_arrived(&transcript);
    let state = String::from_utf8(transcript.of(STATE)[0].payload.clone()).unwrap();
    assert!(state.contains("net1") && !state.contains("gone0"), "{state}");
}
