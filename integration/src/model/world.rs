// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What lies below the library: logs as kernels and devices keep them, and the sources that read them.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vfio_migration::granule::Granule;
use vfio_migration::iova::{IovaMap, Mapping};
use vfio_migration::layout::Layout;
use vfio_migration::range::{GpaRange, IovaRange};
use vfio_migration::source::{
    Cover, DirtySource, Harvest, Operation, PluggedRam, Reports, Sink, SourceError,
};
use vfio_migration::tracker::{DeviceMappings, VmMappings};

use super::{Mutation, Scenario};

/// Names of the two devices.
pub(super) const DEVICES: [&str; 2] = ["a", "b"];

/// Who fails when it is none of the devices' sources.
pub(super) const KVM: usize = DEVICES.len();

/// IOVAs of slot 0; the others follow.
const FIRST_IOVA: u64 = 1 << 32;

/// A set of pages or of IOVA slots, by number.
pub(super) type Set = u8;

/// The logs of one VM, and what maps its memory.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct World {
    pub(super) mutation: Option<Mutation>,
    /// Pages of RAM.
    pub(super) ram: Set,
    /// The page that each IOVA slot leads to, as the hardware walks it.
    pub(super) table: Vec<Option<u8>>,
    kvm: KvmState,
    a: TableState,
    b: LogState,
    /// Device A is behind a container that reports all that is mapped.
    imprecise: bool,
    /// KVM begins with every page's bit set.
    initially_set: bool,
    /// The one whose log cannot be read this time.
    pub(super) failing: Option<usize>,
}

/// KVM's dirty log, cleared before each read.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash)]
struct KvmState {
    on: bool,
    bits: Set,
    /// Bits that a report held and nobody cleared since.
    standing: Set,
}

/// A page table that tracks: bits go with their mapping.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash)]
struct TableState {
    on: bool,
    bits: Set,
}

/// A device's own log, which covers what it was started over.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash)]
struct LogState {
    on: bool,
    covered: Set,
    bits: Set,
    /// Slots that may have been written while the log was off.
    gap: Set,
    /// Its content is lost until it is started anew.
    lost: bool,
}

impl World {
    pub(super) fn new(
        ram: Set,
        table: Vec<Option<u8>>,
        scenario: &Scenario,
        mutation: Option<Mutation>,
    ) -> Self {
        Self {
            mutation,
            ram,
            table,
            kvm: KvmState::default(),
            a: TableState::default(),
            b: LogState::default(),
            imprecise: scenario.imprecise,
            initially_set: scenario.initially_set,
            failing: None,
        }
    }

    /// Whether this place does it wrong.
    pub(super) fn mutated(&self, mutation: Mutation) -> bool {
        self.mutation == Some(mutation)
    }

    /// A vCPU, or the VMM, wrote `page`.
    pub(super) fn vcpu_wrote(&mut self, page: u8) {
        if self.kvm.on {
            self.kvm.bits |= 1 << page;
        }
    }

    /// A device wrote through `slot`.
    pub(super) fn device_wrote(&mut self, device: usize, slot: u8) {
        if device == 0 && self.a.on && !self.imprecise {
            self.a.bits |= 1 << slot;
        }
        if device == 1 && self.b.on {
            self.b.bits |= self.b.covered & (1 << slot);
        }
    }

    /// Takes `slot` out of the hardware's table, and with it the bits that the table holds.
    pub(super) fn unmap(&mut self, slot: u8) {
        self.table[usize::from(slot)] = None;
        self.a.bits &= !(1 << slot);
    }

    /// Clears KVM's bits of pages whose bytes were sent.
    pub(super) fn clear_late(&mut self, pages: Set) {
        self.kvm.bits &= !pages;
    }

    /// Clears what device B logged, reported or not.
    pub(super) fn drain_late(&mut self) {
        self.b.bits = 0;
    }

    /// What maps the VM's memory, as its VMM says.
    pub(super) fn mappings(&self, with_devices: bool) -> VmMappings {
        let ram = ranges(self.ram);
        let reached: Vec<_> = self.table.iter().flatten().map(|&page| gpa_of(page)).collect();
        let devices =
            DEVICES.map(|device| DeviceMappings { device: device.to_owned(), gpa: reached.clone() });
        VmMappings {
            vcpu_slots: ram.clone(),
            ram,
            absent: Vec::new(),
            devices: devices.into_iter().filter(|_| with_devices).collect(),
        }
    }

    fn mapped(&self) -> Set {
        (0..).zip(&self.table).filter(|(_, page)| page.is_some()).fold(0, |all, (slot, _)| all | 1 << slot)
    }

    fn reached(&self) -> Vec<GpaRange> {
        self.table.iter().flatten().map(|&page| gpa_of(page)).collect()
    }

    /// Fails a read whose turn it is to fail; a failing source that is mutated says that all went well.
    fn failure(&mut self, device: usize, id: &str, operation: Operation) -> Option<Result<(), SourceError>> {
        if self.failing != Some(device) {
            return None;
        }
        match self.mutated(Mutation::NoWidenAfterFailedRead) {
            true => Some(Ok(())),
            false => Some(Err(SourceError::new(id, operation, "the log cannot be read"))),
        }
    }
}

/// The world, as its sources and the driver share it.
pub(super) type Shared = Arc<Mutex<World>>;

/// Locks the world.
pub(super) fn lock(world: &Shared) -> MutexGuard<'_, World> {
    world.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The guest memory of `page`.
pub(super) fn gpa_of(page: u8) -> GpaRange {
    let bytes = Granule::KIB_4.bytes();
    GpaRange::new(u64::from(page) * bytes, bytes).expect("a page is a range")
}

/// The IOVAs of `slot`.
pub(super) fn iova_of(slot: u8) -> IovaRange {
    let bytes = Granule::KIB_4.bytes();
    IovaRange::new(FIRST_IOVA + u64::from(slot) * bytes, bytes).expect("a page is a range")
}

/// The mapping of `slot` to `page`.
pub(super) fn mapping_of(slot: u8, page: u8) -> Mapping {
    Mapping::new(iova_of(slot), gpa_of(page)).expect("both sides are a page")
}

fn slot_of(mapping: &Mapping) -> u8 {
    members(u8::MAX).find(|&slot| iova_of(slot) == mapping.iova()).expect("a slot's mapping")
}

/// The members of `set`, ascending.
pub(super) fn members(set: Set) -> impl Iterator<Item = u8> {
    (0..8).filter(move |member| set >> member & 1 == 1)
}

fn ranges(pages: Set) -> Vec<GpaRange> {
    members(pages).map(gpa_of).collect()
}

/// The pages of `ranges`.
pub(super) fn pages_of(ranges: &[GpaRange]) -> Set {
    let held = |page: &u8| ranges.iter().any(|range| range.covers(gpa_of(*page)));
    members(u8::MAX).filter(held).fold(0, |all, page| all | 1 << page)
}

/// KVM's log with manual protection: bits stand until their page's bytes are about to be read.
pub(super) struct KvmSource(pub(super) Shared);

impl DirtySource for KvmSource {
    fn id(&self) -> &'static str {
        "kvm-log"
    }

    fn reports(&self) -> Reports {
        Reports::Vcpus
    }

    fn cover(&self) -> Cover {
        Cover { ranges: ranges(lock(&self.0).ram), precise: true }
    }

    fn start(&mut self, _layout: &Layout, _iova: &IovaMap) -> Result<(), SourceError> {
        let mut world = lock(&self.0);
        if !world.kvm.on && !world.mutated(Mutation::ArmLate) {
            let bits = if world.initially_set { world.ram } else { 0 };
            world.kvm = KvmState { on: true, bits, standing: bits };
        }
        Ok(())
    }

    fn collect(&mut self, sink: &mut Sink<'_>) -> Result<(), SourceError> {
        let mut world = lock(&self.0);
        world.kvm.on = true;
        members(world.kvm.bits & world.ram).for_each(|page| sink.gpa_range(gpa_of(page)));
        world.kvm.standing = world.kvm.bits;
        Ok(())
    }

    fn before_read(&mut self, chunk: &[GpaRange]) -> Result<(), SourceError> {
        let mut world = lock(&self.0);
        if world.failing == Some(KVM) {
            return Err(SourceError::new("kvm-log", Operation::BeforeRead, "KVM does not clear"));
        }
        let clearable = match world.mutation {
            Some(Mutation::ClearAfterRead) => 0,
            Some(Mutation::ClearUnreported) => Set::MAX,
            _ => world.kvm.standing,
        };
        let cleared = pages_of(chunk) & clearable;
        world.kvm.bits &= !cleared;
        world.kvm.standing &= !cleared;
        Ok(())
    }

    fn plugged(&mut self, ram: &PluggedRam) -> Result<(), SourceError> {
        let mut world = lock(&self.0);
        if world.kvm.on && world.initially_set {
            let pages = pages_of(&[ram.gpa]);
            world.kvm.bits |= pages;
            world.kvm.standing |= pages;
        }
        Ok(())
    }

    fn unplugged(&mut self, gpa: GpaRange) {
        let mut world = lock(&self.0);
        world.kvm.bits &= !pages_of(&[gpa]);
        world.kvm.standing &= !pages_of(&[gpa]);
    }

    fn stop(&mut self) -> Result<(), SourceError> {
        lock(&self.0).kvm = KvmState::default();
        Ok(())
    }
}

/// The log of a VMM whose own threads write nothing.
pub(super) struct QuietVmm(pub(super) Shared);

impl DirtySource for QuietVmm {
    fn id(&self) -> &'static str {
        "vmm-writes"
    }

    fn reports(&self) -> Reports {
        Reports::Vmm
    }

    fn cover(&self) -> Cover {
        Cover { ranges: ranges(lock(&self.0).ram), precise: true }
    }

    fn start(&mut self, _layout: &Layout, _iova: &IovaMap) -> Result<(), SourceError> {
        Ok(())
    }

    fn collect(&mut self, _sink: &mut Sink<'_>) -> Result<(), SourceError> {
        Ok(())
    }

    fn stop(&mut self) -> Result<(), SourceError> {
        Ok(())
    }
}

/// Device A's page table, read before an unmapping; or its container, which unmaps itself and calls all written.
pub(super) struct TableSource(pub(super) Shared);

impl DirtySource for TableSource {
    fn id(&self) -> &'static str {
        "page-table:a"
    }

    fn reports(&self) -> Reports {
        Reports::Devices
    }

    fn cover(&self) -> Cover {
        let world = lock(&self.0);
        Cover { ranges: world.reached(), precise: !world.imprecise }
    }

    fn start(&mut self, _layout: &Layout, _iova: &IovaMap) -> Result<(), SourceError> {
        let mut world = lock(&self.0);
        if !world.a.on {
            world.a = TableState { on: true, bits: 0 };
        }
        Ok(())
    }

    fn collect(&mut self, sink: &mut Sink<'_>) -> Result<(), SourceError> {
        let mut world = lock(&self.0);
        let bits = if world.imprecise { world.mapped() } else { std::mem::take(&mut world.a.bits) };
        if let Some(failure) = world.failure(0, self.id(), Operation::Collect) {
            return failure;
        }
        members(bits).for_each(|slot| sink.iova_range(iova_of(slot)));
        Ok(())
    }

    fn harvest(&self) -> Harvest {
        if lock(&self.0).imprecise { Harvest::ByUnmapping } else { Harvest::BeforeUnmap }
    }

    fn unmapped(&mut self, mapping: &Mapping, sink: &mut Sink<'_>) -> Result<(), SourceError> {
        let mut world = lock(&self.0);
        let slot = slot_of(mapping);
        let is_dirty = world.imprecise || world.a.bits >> slot & 1 == 1;
        if world.imprecise {
            world.unmap(slot);
        }
        if let Some(failure) = world.failure(0, self.id(), Operation::Unmapped) {
            return failure;
        }
        if is_dirty && !world.mutated(Mutation::SkipHarvest) {
            sink.iova_range(mapping.iova());
        }
        Ok(())
    }

    fn stop(&mut self) -> Result<(), SourceError> {
        lock(&self.0).a = TableState::default();
        Ok(())
    }
}

/// Device B's own log, read after an unmapping, and started anew over a mapping that it does not cover.
pub(super) struct LogSource(pub(super) Shared);

impl LogSource {
    /// Starts the log of a world over what is mapped and what it covered, unread.
    fn arm(world: &mut World, gap: Set) {
        let covered = world.b.covered | world.mapped();
        let gap = world.b.gap | gap;
        world.b = LogState { on: true, covered, gap, ..LogState::default() };
    }
}

impl DirtySource for LogSource {
    fn id(&self) -> &'static str {
        "device-log:b"
    }

    fn reports(&self) -> Reports {
        Reports::Devices
    }

    fn cover(&self) -> Cover {
        Cover { ranges: lock(&self.0).reached(), precise: true }
    }

    fn start(&mut self, _layout: &Layout, _iova: &IovaMap) -> Result<(), SourceError> {
        let mut world = lock(&self.0);
        if !world.b.on {
            world.b = LogState::default();
            Self::arm(&mut world, 0);
        }
        Ok(())
    }

    fn collect(&mut self, sink: &mut Sink<'_>) -> Result<(), SourceError> {
        let mut world = lock(&self.0);
        let dirty = world.b.bits | world.b.gap;
        if !world.mutated(Mutation::DrainAfterRead) {
            world.b.bits = 0;
        }
        world.b.gap = 0;
        let was_lost = std::mem::take(&mut world.b.lost);
        let failure = world.failure(1, self.id(), Operation::Collect);
        if failure.is_some() || was_lost {
            Self::arm(&mut world, 0);
            let lost = || Err(SourceError::new(self.id(), Operation::Collect, "the log is lost"));
            return failure.unwrap_or_else(lost);
        }
        members(dirty & world.mapped()).for_each(|slot| sink.iova_range(iova_of(slot)));
        Ok(())
    }

    fn mapped(&mut self, mapping: &Mapping) -> Result<(), SourceError> {
        let mut world = lock(&self.0);
        let slot = slot_of(mapping);
        if world.b.covered >> slot & 1 == 0 {
            let may_be_written = match world.mutated(Mutation::MarkOnlyNewAfterRearm) {
                true => 1 << slot,
                false => world.mapped(),
            };
            Self::arm(&mut world, may_be_written);
        }
        Ok(())
    }

    fn harvest(&self) -> Harvest {
        Harvest::AfterUnmap
    }

    fn unmapped(&mut self, mapping: &Mapping, sink: &mut Sink<'_>) -> Result<(), SourceError> {
        let mut world = lock(&self.0);
        let bit = 1 << slot_of(mapping);
        let is_dirty = (world.b.bits | world.b.gap) & bit != 0;
        world.b.bits &= !bit;
        world.b.gap &= !bit;
        if world.b.lost {
            return Err(SourceError::new(self.id(), Operation::Unmapped, "the log is lost"));
        }
        if let Some(failure) = world.failure(1, self.id(), Operation::Unmapped) {
            world.b.bits = 0;
            world.b.lost = failure.is_err();
            return failure;
        }
        if is_dirty && !world.mutated(Mutation::SkipHarvest) {
            sink.iova_range(mapping.iova());
        }
        Ok(())
    }

    fn stop(&mut self) -> Result<(), SourceError> {
        lock(&self.0).b = LogState::default();
        Ok(())
    }
}
