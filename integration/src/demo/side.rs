// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What a source and a destination process have in common: a machine, its device, and the library over both.

use std::fs::File;
use std::ops::Range;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};
use std::thread::Builder;
use std::time::{Duration, Instant};

use anyhow::Context;
use vfio_migration::device::{Device, DeviceSet, VfioUserDevice};
use vfio_migration::migratable::MigratableDevice;
use vfio_migration::range::{GpaRange, IovaRange};
use vfio_migration::source::{
    DirtySource, GuestMemoryLog, KvmLog, KvmLogMode, KvmSlot, Reports, VfioUserSource,
};
use vfio_migration::tracker::{DeviceMappings, SpaceId, Tracker, TrackerBuilder};
use vfio_migration::vfio_user::{Client, DmaRegion, Options, SharedClient};
use vfio_migration::vm::Vm;
use vm_memory::{Bytes, GuestAddress};

use super::child::Hosted;
use super::control::{Health, MachineSetup};
use super::forget::Forgetful;
use super::vm::{PASS_THROUGH, SourceVm, layout_of, mappings_of};
use crate::device::control as device;
use crate::device::{DeviceConfig, DmaDevice, PAGE_BYTES as STREAM_PAGE_BYTES, Stream, Window};
use crate::vmm::{AreaKind, CpuKind, Machine, MachineConfig, Memory, Rate, RegionBacking};

/// Name of the one device.
const DEVICE: &str = "dma0";
/// Name of its DMA log among the sources.
pub(super) const DEVICE_LOG: &str = "device-log";

/// Name of the guest's dirty log among them.
pub(super) const KVM_LOG: &str = "kvm-log";

/// Names of the sources a machine has, in the order of the report.
pub(super) const SOURCES: [&str; 3] = [KVM_LOG, "vmm-writes", DEVICE_LOG];

/// Those of a machine with or without KVM.
pub(super) fn source_names(kvm: bool) -> &'static [&'static str] {
    if kvm { &SOURCES } else { &SOURCES[1..] }
}

/// How long the guest may take over one of the passes it is asked for.
const PASS_PATIENCE: Duration = Duration::from_secs(30);

/// A machine and its device, connected.
pub struct Side {
    /// The machine.
    pub machine: Arc<Machine>,
    /// The device's client.
    pub client: SharedClient,
    stream: Stream,
    setup: MachineSetup,
}

impl Side {
    /// Makes the machine over `files`, one memfd a region, and connects its device behind `socket`.
    ///
    /// # Errors
    /// RAM, KVM or the device refuse.
    pub fn new(setup: MachineSetup, socket: UnixStream, files: Vec<File>) -> anyhow::Result<Self> {
        let layout = setup.layout()?;
        let cpu = if setup.kvm { CpuKind::Kvm { dirty_ring_bytes: None } } else { CpuKind::Software };
        let mut config = MachineConfig::new(Memory::adopt(&layout, files)?, cpu);
        config.guest_rate = Rate::PagesPerSecond(setup.guest_rate);
        config.seed = setup.seed;
        let machine = Arc::new(Machine::new(config)?);
        let reached = if setup.sparse { &machine.regions()[..1] } else { machine.regions() };
        let client = connect(socket, reached).context("Cannot connect the device")?;
        let is_reached =
            |range: &Range<u64>| reached.iter().any(|region| range.end <= region.gpa + region.len);
        let windows: Option<Vec<_>> = machine
            .map()
            .ranges(AreaKind::Device)
            .filter(is_reached)
            .map(|range| Window::new(range.start, range.end - range.start))
            .collect();
        let stream = Stream { seed: setup.seed, windows: windows.context("Device areas are whole pages")? };
        Ok(Self { machine, client, stream, setup })
    }

    /// Makes the machine in RAM of its own, with a device that serves on a thread of this process.
    ///
    /// Returns another handle on the RAM with it.
    ///
    /// # Errors
    /// RAM, KVM or the device refuse.
    pub fn in_process(setup: MachineSetup) -> anyhow::Result<(Self, Memory)> {
        let memory = Memory::create(&setup.layout()?)?;
        let (ours, theirs) = UnixStream::pair()?;
        Builder::new()
            .name("device".into())
            .spawn(move || DmaDevice::serve(theirs, DeviceConfig::default()))?;
        let files =
            memory.regions().iter().map(|region| region.file.try_clone()).collect::<Result<_, _>>()?;
        Ok((Self::new(setup, ours, files)?, memory))
    }

    /// Boots the guest, programs the device, and lets both run.
    ///
    /// # Errors
    /// The guest or the device do not start.
    pub fn start(&self) -> anyhow::Result<()> {
        self.machine.boot()?;
        let mut client = self.client();
        device::program(&mut client, &self.stream, self.setup.device_rate.into())?;
        self.machine.start()?;
        device::run(&mut client, true)?;
        Ok(())
    }

    /// Puts the `vm-migration` traits over the machine's sources of dirty pages and its device; `mode` says how KVM's log is driven.
    ///
    /// # Errors
    /// A source or the device lacks something, or the source to forget is not there.
    pub fn migratable(&self, mode: KvmLogMode) -> anyhow::Result<MigratableDevice> {
        self.migratable_with(mode, Vec::new())
    }

    /// As [`Side::migratable`], with `more` sources beside the machine's own.
    ///
    /// # Errors
    /// As [`Side::migratable`].
    pub fn migratable_with(
        &self,
        mode: KvmLogMode,
        more: Vec<Box<dyn DirtySource>>,
    ) -> anyhow::Result<MigratableDevice> {
        let client = self.client();
        let reached = client.writeable_ranges().iter().map(|iova| GpaRange::new(iova.start(), iova.len()));
        let gpa = reached.collect::<Result<_, _>>()?;
        drop(client);
        let mappings = mappings_of(&self.machine, vec![DeviceMappings { device: DEVICE.to_owned(), gpa }])?;
        let mut builder = Tracker::builder(layout_of(&self.machine)?).mappings(move || mappings.clone());
        for source in self.sources(mode)?.into_iter().chain(more) {
            let devices = (source.reports() == Reports::Devices).then_some(DEVICE);
            let forgotten = self.setup.forget.as_deref() == Some(source.id());
            let source = if forgotten { Box::new(Forgetful::new(source)) } else { source };
            builder = builder.source_of(SpaceId::IDENTITY, devices, source);
        }
        let device = Device::new(DEVICE, Box::new(VfioUserDevice::new(Arc::clone(&self.client))?));
        migratable(builder, vec![device])
    }

    fn sources(&self, mode: KvmLogMode) -> anyhow::Result<Vec<Box<dyn DirtySource>>> {
        let mut sources: Vec<Box<dyn DirtySource>> = Vec::new();
        if let Some(vm) = self.machine.vm_fd() {
            sources.push(Box::new(KvmLog::new(Arc::clone(vm), slots(&self.machine)?, mode)));
        }
        sources.push(Box::new(GuestMemoryLog::new(Arc::new(self.machine.memory().clone()))));
        sources.push(Box::new(VfioUserSource::new(DEVICE_LOG, Arc::clone(&self.client))?));
        Ok(sources)
    }

    /// Lets the guest make `passes` more passes at full speed, then looks at what guest, VMM and device wrote.
    ///
    /// # Errors
    /// The guest makes no progress, or the device does not answer.
    pub fn check(&self, passes: u64) -> anyhow::Result<Health> {
        make_passes(&self.machine, passes)?;
        self.machine.limit_guest(Rate::PagesPerSecond(self.setup.guest_rate));
        let (device_position, wrong_device_pages) = self.check_device()?;
        Ok(Health {
            passes: self.machine.passes()?,
            wrong_pages: self.machine.faults(),
            wrong_records: self.machine.writer_faults(),
            device_position,
            wrong_device_pages,
        })
    }

    /// Compares every page the device owns with what its stream says was written there last.
    fn check_device(&self) -> anyhow::Result<(u64, Vec<u64>)> {
        wrong_pages(&mut self.client(), &self.stream, &self.machine)
    }

    fn client(&self) -> std::sync::MutexGuard<'_, Client> {
        self.client.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

impl Hosted for Side {
    fn machine(&self) -> &Arc<Machine> {
        &self.machine
    }

    fn source(&self) -> impl Vm {
        SourceVm::new(Arc::clone(&self.machine))
    }

    fn start(&self) -> anyhow::Result<()> {
        Self::start(self)
    }

    fn go_on(&self) -> anyhow::Result<()> {
        Ok(())
    }

    fn check(&self, passes: u64) -> anyhow::Result<Health> {
        Self::check(self, passes)
    }
}

/// Describes the machine's memory slots to a source of KVM's.
#[expect(unsafe_code, reason = "the slots are described once more")]
pub(crate) fn slots(machine: &Machine) -> anyhow::Result<Vec<KvmSlot>> {
    let slots = machine.regions().iter().map(|region| {
        let gpa = GpaRange::new(region.gpa, region.len)?;
        // SAFETY: the machine registered its regions with these numbers and keeps them until it is dropped, and the log
        // does not outlive its VM descriptor.
        anyhow::Ok(unsafe { KvmSlot::new(region.slot, gpa, region.userspace_addr, 0) })
    });
    slots.collect()
}

/// Puts the `vm-migration` traits over sources and devices.
pub(crate) fn migratable(tracker: TrackerBuilder, devices: Vec<Device>) -> anyhow::Result<MigratableDevice> {
    let tracker = Arc::new(Mutex::new(tracker.build()?));
    let devices = Arc::new(Mutex::new(DeviceSet::new(devices)?));
    Ok(MigratableDevice::new(PASS_THROUGH, tracker, devices))
}

/// Lets the guest make `passes` more passes at full speed, or fewer where it finds a wrong page.
pub(crate) fn make_passes(machine: &Machine, passes: u64) -> anyhow::Result<()> {
    let until = machine.passes()? + passes;
    machine.limit_guest(Rate::Unlimited);
    let deadline = Instant::now() + PASS_PATIENCE * u32::try_from(passes)?;
    while machine.passes()? < until && machine.wrong_pages()? == 0 {
        machine.health()?;
        anyhow::ensure!(Instant::now() < deadline, "The guest makes no progress");
        std::thread::sleep(Duration::from_millis(5));
    }
    Ok(())
}

/// Compares every page in the device's windows with what its stream, from its first word on, says was written there last; returns the
/// stream's position and the pages that differ.
pub(crate) fn wrong_pages(
    client: &mut Client,
    stream: &Stream,
    machine: &Machine,
) -> anyhow::Result<(u64, Vec<u64>)> {
    device::run(client, false)?;
    let status = device::status(client)?;
    let expected = stream.last_writes(status.position);
    let mut wrong = Vec::new();
    for window in &stream.windows {
        for iova in (window.iova()..window.iova() + window.length()).step_by(STREAM_PAGE_BYTES) {
            let mut page = [0; STREAM_PAGE_BYTES];
            machine.memory().read_slice(&mut page, GuestAddress(iova))?;
            if stream.check_page(iova, &page) != Ok(expected.get(&iova).copied()) {
                wrong.push(iova);
            }
        }
    }
    device::run(client, true)?;
    Ok((status.position, wrong))
}

/// Connects a device that reaches `regions`.
pub(crate) fn connect(socket: UnixStream, regions: &[RegionBacking]) -> anyhow::Result<SharedClient> {
    let mut client = Client::connect(socket, DEVICE, &Options::default())?;
    for region in regions {
        let iova = IovaRange::new(region.gpa, region.len)?;
        let dma = DmaRegion { iova, file_offset: region.offset, writeable: true };
        client.dma_map(&dma, Some(region.as_fd()))?;
    }
    Ok(Arc::new(Mutex::new(client)))
}
