// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What a source and a destination process in the bed have in common: a KVM machine, kernel devices, and the library over them.

use std::fs::File;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::thread;
use std::time::Duration;

use anyhow::{Context, ensure};
use kvm_ioctls::VmFd;
use serde::{Deserialize, Serialize};
use vfio_bindings::bindings::vfio::VFIO_TYPE1v2_IOMMU;
use vfio_migration::device::{Device, KernelDevice};
use vfio_migration::migratable::MigratableDevice;
use vfio_migration::range::GpaRange;
use vfio_migration::source::SummaryBitmap;
use vfio_migration::source::{
    ContainerLog, DeviceLog, DirtySource, GuestMemoryLog, Harvester, HwptLog, KvmLog, KvmLogMode, KvmRing,
    Meaning, RingSize,
};
use vfio_migration::tracker::{DeviceMappings, SpaceId, Tracker, TrackerBuilder};
use vfio_migration::vm::{Backing, Captured, Vm, VmError};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vm_migration::Snapshot;

use super::driver::Driver;
use super::edu::{Edu, EduDma};
use super::engine::{Engine, EngineStream};
use super::mock::MockDomain;
use super::served::Served;
use super::territory::Territory;
use crate::demo::Health;
use crate::demo::child::Hosted;
use crate::demo::side::{make_passes, migratable, slots};
use crate::demo::vm::{SourceVm, layout_of, mappings_of};
use crate::device::stream_word;
use crate::vmm::{
    CpuKind, ExitHook, Machine, MachineConfig, Memory, PAGE_BYTES, PAGE_LEN, RamLayout, Rate, Split,
    VcpuExitKind,
};

/// What a process in the bed is to make.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct BedSetup {
    /// Guest RAM.
    pub memory_bytes: u64,
    /// Bytes of the vCPU's dirty ring; `None`: KVM's dirty log.
    pub dirty_ring_bytes: Option<u32>,
    /// Whether the vCPU's thread empties a full ring; else the collector must.
    pub vcpu_harvests: bool,
    /// Pages a second that the guest stamps; `None`: as many as it can.
    pub guest_rate: Option<u32>,
    /// Words a second that the engine writes.
    pub engine_rate: u64,
    /// What all content depends on.
    pub seed: u64,
    /// The `dirty_mdev`.
    pub mdev: String,
    /// The `edu`; `None`: the mock domain and a thread in the place of a device, or a vfio-user device.
    pub edu: Option<String>,
    /// Bytes of state of a vfio-user device in the place of the `edu`, in a process of its own.
    pub served_state_bytes: Option<u64>,
}

/// The second device: one that logs its own DMA, the kernel's or another process's, or what stands for one behind a page table that tracks.
enum Second {
    Edu(Arc<Edu>),
    Mock(Arc<MockDomain>),
    Served(Served),
}

/// What the vCPU's thread does about its dirty ring when that is full.
#[derive(Default)]
struct FullRing {
    /// What empties it, where the vCPU's thread is to do so.
    harvester: OnceLock<Harvester<Arc<VmFd>>>,
    /// How often KVM did not let the vCPU go on.
    exits: AtomicU64,
}

/// The names of the devices.
const MDEV: &str = "mdev0";
const EDU: &str = "edu0";
const MOCK: &str = "mock0";
const SERVED: &str = "served0";

/// A machine and its devices.
pub struct BedSide {
    // The driver goes before the device that it drives.
    driver: Driver,
    second: Second,
    engine: Engine,
    stream: EngineStream,
    territory: Territory,
    full_ring: Arc<FullRing>,
    machine: Arc<Machine>,
    setup: BedSetup,
}

impl BedSide {
    /// Makes the machine over `files`, one memfd a region, and opens its devices.
    ///
    /// # Errors
    /// RAM, KVM or a device refuse.
    pub fn new(setup: BedSetup, files: Vec<File>) -> anyhow::Result<Self> {
        let layout = RamLayout::new(setup.memory_bytes, Split::default())?;
        let memory = Memory::adopt(&layout, files)?;
        let full_ring = Arc::new(FullRing::default());
        let machine = Arc::new(machine(&setup, memory.clone(), &full_ring)?);
        let territory = Territory::new(machine.map());
        let engine = Engine::open(&setup.mdev, &memory)?;
        let stream = EngineStream { seed: setup.seed, windows: territory.engine.clone() };
        let second = match (&setup.edu, setup.served_state_bytes) {
            (Some(address), _) => Second::Edu(Arc::new(Edu::open(address, &memory)?)),
            (None, Some(bytes)) => {
                Second::Served(Served::start(bytes, &machine, setup.seed, territory.second())?)
            }
            (None, None) => Second::Mock(Arc::new(MockDomain::open(&memory)?)),
        };
        let driver = second.driver(&territory, setup.seed);
        Ok(Self { driver, second, engine, stream, territory, full_ring, machine, setup })
    }

    /// The machine.
    pub fn machine(&self) -> &Arc<Machine> {
        &self.machine
    }

    /// The mediated device.
    pub fn engine(&self) -> &Engine {
        &self.engine
    }

    /// Puts the machine's sources of dirty pages and its devices under one roof. Once, before the guest runs.
    ///
    /// # Errors
    /// A source or a device lacks something.
    pub fn migratable(&self) -> anyhow::Result<MigratableDevice> {
        let mappings = mappings_of(&self.machine, self.reached()?)?;
        let builder = Tracker::builder(layout_of(&self.machine)?)
            .mappings(move || mappings.clone())
            .source(self.kvm_source()?)
            .source(Box::new(GuestMemoryLog::new(Arc::new(self.machine.memory().clone()))))
            .source_of(SpaceId::IDENTITY, [MDEV], self.engine.source("container:mdev0")?);
        let mut devices = vec![self.engine.device(MDEV)?];
        migratable(self.second.join(builder, &mut devices)?, devices)
    }

    /// Each device has all RAM mapped.
    fn reached(&self) -> anyhow::Result<Vec<DeviceMappings>> {
        let ram = self.machine.regions().iter().map(|region| GpaRange::new(region.gpa, region.len));
        let gpa: Vec<_> = ram.collect::<Result<_, _>>()?;
        let devices = [MDEV, self.second.name()];
        Ok(devices.map(|device| DeviceMappings { device: device.to_owned(), gpa: gpa.clone() }).into())
    }

    /// KVM's dirty log, or its dirty ring where the machine has one.
    ///
    /// # Errors
    /// The ring cannot be mapped.
    pub fn kvm_source(&self) -> anyhow::Result<Box<dyn DirtySource>> {
        let vm = self.machine.vm_fd().context("A software machine has no log")?;
        let slots = slots(&self.machine)?;
        let Some(bytes) = self.setup.dirty_ring_bytes else {
            return Ok(Box::new(KvmLog::new(Arc::clone(vm), slots, KvmLogMode::ManualAtRead)));
        };
        let mut ring = KvmRing::new(Arc::clone(vm), slots, RingSize::enabled_elsewhere(vm, bytes)?);
        ring.add_vcpu(&self.machine.vcpu_fd().context("A software machine has no ring")?)?;
        if self.setup.vcpu_harvests {
            let _only_the_first_is_harvested = self.full_ring.harvester.set(ring.harvester());
        }
        Ok(Box::new(ring))
    }

    /// How often the vCPU could not go on because its dirty ring was full.
    pub fn full_ring_exits(&self) -> u64 {
        self.full_ring.exits.load(Ordering::Relaxed)
    }

    /// What the mediated device writes, and where.
    pub fn stream(&self) -> &EngineStream {
        &self.stream
    }

    /// The device that logs its own DMA, where there is one.
    pub fn edu(&self) -> Option<&Arc<Edu>> {
        match &self.second {
            Second::Edu(edu) => Some(edu),
            Second::Mock(_) | Second::Served(_) => None,
        }
    }

    /// Which device writes where.
    pub fn territory(&self) -> &Territory {
        &self.territory
    }

    /// Boots the guest and programs the devices; nothing runs yet.
    ///
    /// # Errors
    /// The guest does not boot, or a device refuses.
    pub fn boot(&self) -> anyhow::Result<()> {
        self.machine.boot()?;
        self.engine.program(&self.stream, self.setup.engine_rate)?;
        if let Some(edu) = self.edu() {
            edu.mark(self.liveness(), FACTORIAL_OF)?;
        }
        Ok(())
    }

    /// Boots the guest, programs the devices, and lets all run.
    ///
    /// # Errors
    /// The guest or a device do not start.
    pub fn start(&self) -> anyhow::Result<()> {
        self.boot()?;
        self.machine.start()?;
        self.engine.run(true)?;
        if let Second::Served(served) = &self.second {
            served.begin()?;
        }
        self.driver.run(true);
        Ok(())
    }

    /// Lets the guest make `passes` more passes at full speed, then looks at what guest, VMM and engine wrote.
    ///
    /// # Errors
    /// The guest makes no progress, or the engine does not answer.
    pub fn check_all(&self, passes: u64) -> anyhow::Result<Health> {
        make_passes(&self.machine, passes)?;
        self.machine.limit_guest(self.guest_rate());
        self.engine.run(false)?;
        let device_position = self.engine.position()?;
        let refused = self.engine.errors()?;
        ensure!(refused == 0, "{refused} of the engine's words were refused");
        let mut wrong_device_pages = self.wrong_engine_pages(device_position)?;
        if let Second::Served(served) = &self.second {
            wrong_device_pages.extend(served.wrong_pages(&self.machine)?);
        }
        self.engine.run(true)?;
        Ok(Health {
            passes: self.machine.passes()?,
            wrong_pages: self.machine.faults(),
            wrong_records: self.machine.writer_faults(),
            device_position,
            wrong_device_pages,
        })
    }

    fn liveness(&self) -> u32 {
        u32::try_from(self.setup.seed % 1000).expect("less than a thousand")
    }

    fn guest_rate(&self) -> Rate {
        guest_rate(&self.setup)
    }

    /// Compares each word in the engine's windows with what its stream, from its first word on, says was written there last.
    fn wrong_engine_pages(&self, position: u64) -> anyhow::Result<Vec<u64>> {
        let expected = self.stream.last_words(position);
        let mut wrong = Vec::new();
        for window in &self.stream.windows {
            let mut bytes = vec![0; usize::try_from(window.end - window.start)?];
            self.machine.memory().read_slice(&mut bytes, GuestAddress(window.start))?;
            let mut right = vec![0; bytes.len()];
            for (iova, word) in expected.range(window.clone()) {
                let at = usize::try_from(iova - window.start)?;
                right[at..at + 8].copy_from_slice(&word.to_le_bytes());
            }
            let pages =
                bytes.chunks(PAGE_LEN).zip(right.chunks(PAGE_LEN)).zip((window.start..).step_by(PAGE_LEN));
            wrong.extend(pages.filter(|((found, right), _)| found != right).map(|(_, iova)| iova));
        }
        Ok(wrong)
    }

    /// Compares edu's registers with what the source wrote there, and its buffer with what its last DMA copied.
    fn check_edu(&self, edu: &Edu) -> anyhow::Result<()> {
        let expected = (!self.liveness(), (1..=FACTORIAL_OF).product());
        let found = edu.marks()?;
        ensure!(found == expected, "edu's registers hold {found:x?}, not {expected:x?}");
        let last = edu.last_dma()?;
        ensure!(last.bytes > 0, "edu has forgotten its last DMA");
        edu.dma(EduDma { iova: self.territory.scratch, bytes: last.bytes, to_memory: true })?;
        let read = |iova| {
            let mut bytes = vec![0; PAGE_LEN];
            bytes.truncate(usize::try_from(last.bytes).unwrap_or(PAGE_LEN));
            self.machine.memory().read_slice(&mut bytes, GuestAddress(iova)).map(|()| bytes)
        };
        ensure!(
            read(self.territory.scratch)? == read(last.iova)?,
            "edu's buffer does not hold what {last:x?} copied"
        );
        Ok(())
    }
}

const FACTORIAL_OF: u32 = 10;

fn guest_rate(setup: &BedSetup) -> Rate {
    setup.guest_rate.map_or(Rate::Unlimited, Rate::PagesPerSecond)
}

fn machine(setup: &BedSetup, memory: Memory, full_ring: &Arc<FullRing>) -> anyhow::Result<Machine> {
    let mut config = MachineConfig::new(memory, CpuKind::Kvm { dirty_ring_bytes: setup.dirty_ring_bytes });
    config.guest_rate = guest_rate(setup);
    config.vmm_rate = Rate::PagesPerSecond(50);
    config.seed = setup.seed;
    config.exit_hook = setup.dirty_ring_bytes.map(|_| harvest_when_full(full_ring));
    Ok(Machine::new(config)?)
}

fn harvest_when_full(full_ring: &Arc<FullRing>) -> ExitHook {
    let full_ring = Arc::clone(full_ring);
    Arc::new(move |exit| {
        if exit != VcpuExitKind::DirtyRingFull {
            return;
        }
        full_ring.exits.fetch_add(1, Ordering::Relaxed);
        if let Some(Err(error)) = full_ring.harvester.get().map(Harvester::harvest) {
            log::warn!("Cannot harvest the dirty ring: {error}");
        }
    })
}

impl Engine {
    /// The bitmap of the engine's container.
    ///
    /// # Errors
    /// The container has none.
    pub fn source(&self, id: &str) -> anyhow::Result<Box<dyn DirtySource>> {
        let container = Arc::clone(self.pass_through().container());
        Ok(Box::new(ContainerLog::new(id, container, VFIO_TYPE1v2_IOMMU, Meaning::Written)?))
    }

    /// The engine's state.
    ///
    /// # Errors
    /// It cannot be migrated.
    pub fn device(&self, name: &str) -> anyhow::Result<Device> {
        let device = KernelDevice::new(Arc::clone(self.pass_through().device()))?;
        Ok(Device::new(name, Box::new(device)).kind("dirty_mdev"))
    }
}

impl Edu {
    /// The log of edu's DMA.
    ///
    /// # Errors
    /// It has none.
    pub fn source(&self, id: &str) -> anyhow::Result<Box<dyn DirtySource>> {
        Ok(Box::new(DeviceLog::new(id, Arc::clone(self.pass_through().device()))?))
    }

    /// edu's state.
    ///
    /// # Errors
    /// It cannot be migrated.
    pub fn device(&self, name: &str) -> anyhow::Result<Device> {
        let device = KernelDevice::new(Arc::clone(self.pass_through().device()))?;
        Ok(Device::new(name, Box::new(device)).kind("1234:11e8 edu"))
    }
}

impl Second {
    fn join(&self, mut tracker: TrackerBuilder, devices: &mut Vec<Device>) -> anyhow::Result<TrackerBuilder> {
        match self {
            Self::Edu(edu) => {
                devices.push(edu.device(EDU)?);
                Ok(tracker.source_of(SpaceId::IDENTITY, [EDU], edu.source("device-log:edu0")?))
            }
            Self::Served(served) => {
                devices.push(served.device(SERVED)?);
                Ok(tracker.source_of(SpaceId::IDENTITY, [SERVED], served.source("device-log:served0")?))
            }
            Self::Mock(mock) => {
                let space = tracker.space(mock.iova_map()?);
                let log = HwptLog::new("hwpt:mock0", Arc::clone(mock.iommufd()), mock.hwpt_id());
                Ok(tracker.source_of(space, [MOCK], Box::new(log)))
            }
        }
    }

    fn name(&self) -> &'static str {
        match self {
            Self::Edu(_) => EDU,
            Self::Mock(_) => MOCK,
            Self::Served(_) => SERVED,
        }
    }

    /// Makes what keeps the device busy.
    fn driver(&self, territory: &Territory, seed: u64) -> Driver {
        let (territory, mut step) = (territory.clone(), 0);
        match self {
            Self::Edu(edu) => {
                let edu = Arc::clone(edu);
                Driver::spawn(move || {
                    if !edu.is_busy()? {
                        edu.start(territory.edu_dma(seed, step))?;
                        step += 1;
                    }
                    Ok(())
                })
            }
            Self::Mock(mock) => {
                let mock = Arc::clone(mock);
                Driver::spawn(move || {
                    let dma = territory.edu_dma(seed, step);
                    step += 1;
                    let page = stream_word(seed, step).to_le_bytes().repeat(PAGE_LEN / 8);
                    let page: &[u8; PAGE_LEN] = page.as_slice().try_into().map_err(std::io::Error::other)?;
                    let whole_page = dma.to_memory && dma.bytes == Edu::BUFFER_BYTES;
                    if whole_page { mock.write_page(dma.iova & !(PAGE_BYTES - 1), page) } else { Ok(()) }
                })
            }
            // It has a stream of its own.
            Self::Served(_) => Driver::spawn(|| {
                thread::sleep(Duration::from_millis(50));
                Ok(())
            }),
        }
    }
}

impl Hosted for BedSide {
    fn machine(&self) -> &Arc<Machine> {
        &self.machine
    }

    fn source(&self) -> impl Vm {
        BedVm { vm: SourceVm::new(Arc::clone(&self.machine)), side: self }
    }

    fn start(&self) -> anyhow::Result<()> {
        Self::start(self)
    }

    fn go_on(&self) -> anyhow::Result<()> {
        if let Some(edu) = self.edu() {
            self.check_edu(edu)?;
        }
        self.driver.run(true);
        Ok(())
    }

    fn check(&self, passes: u64) -> anyhow::Result<Health> {
        self.check_all(passes)
    }
}

/// The machine as its sender sees it; the driver, which would be a part of the guest, pauses with it.
struct BedVm<'a> {
    vm: SourceVm,
    side: &'a BedSide,
}

impl Vm for BedVm<'_> {
    type Memory = GuestMemoryMmap<SummaryBitmap>;

    fn memory(&self) -> Arc<Self::Memory> {
        self.vm.memory()
    }

    fn backing(&self) -> Backing {
        self.vm.backing()
    }

    fn config(&mut self) -> Result<Vec<u8>, VmError> {
        self.vm.config()
    }

    fn pause(&mut self) -> Result<(), VmError> {
        self.side.driver.run(false);
        self.vm.pause()
    }

    fn resume(&mut self) -> Result<(), VmError> {
        self.vm.resume()?;
        self.side.driver.run(true);
        Ok(())
    }

    fn state(&mut self, devices: Snapshot) -> Result<Captured, VmError> {
        self.vm.state(devices)
    }

    fn can_throttle(&self) -> bool {
        self.vm.can_throttle()
    }

    fn throttle(&mut self, percent: u8) {
        self.vm.throttle(percent);
    }
}
