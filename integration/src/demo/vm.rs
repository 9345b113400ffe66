// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A [`Machine`] as a sender and as a receiver see it, in Cloud Hypervisor's message shapes.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use thiserror::Error;
use vfio_migration::device::DeviceSet;
use vfio_migration::layout::{Layout, LayoutError};
use vfio_migration::migratable::MigratableDevice;
use vfio_migration::range::{GpaRange, RangeError};
use vfio_migration::source::SummaryBitmap;
use vfio_migration::tracker::{DeviceMappings, VmMappings};
use vfio_migration::transfer::receive::{Completion, Destination, GuestPages, PageStore, asks_for_prefault};
use vfio_migration::vm::{Backing, Captured, Vm, VmError, read_tree};
use vm_memory::{Address, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};
use vm_migration::{Snapshot, snapshot_from_id, state_from_id};

use crate::vmm::{Machine, MachineState, RegionBacking};

const CPU_MANAGER: &str = "cpu-manager";
const DEVICE_MANAGER: &str = "device-manager";
const MEMORY_MANAGER: &str = "memory-manager";
/// Child of the device manager that holds the pass-through devices.
pub(crate) const PASS_THROUGH: &str = "pass-through";

/// Why a message does not fit this machine.
#[derive(Debug, Error)]
#[non_exhaustive]
pub(super) enum VmMessageError {
    #[error("Config describes RAM that is not this machine's")]
    OtherRam,
    #[error("State has no {0}")]
    Missing(&'static str),
    #[error("State was not received yet")]
    NoState,
}

/// The machine as its sender sees it.
pub struct SourceVm {
    machine: Arc<Machine>,
    memory: Arc<GuestMemoryMmap<SummaryBitmap>>,
}

impl SourceVm {
    /// Makes the sender's view of `machine`.
    pub fn new(machine: Arc<Machine>) -> Self {
        let memory = Arc::new(machine.memory().clone());
        Self { machine, memory }
    }
}

impl Vm for SourceVm {
    type Memory = GuestMemoryMmap<SummaryBitmap>;

    fn memory(&self) -> Arc<Self::Memory> {
        Arc::clone(&self.memory)
    }

    fn backing(&self) -> Backing {
        Backing::of_mmap(&self.memory)
    }

    fn config(&mut self) -> Result<Vec<u8>, VmError> {
        let regions = self.machine.regions();
        let config = json!({
            "vm_config": { "memory": { "size": ram_bytes(regions), "shared": true }, "cpus": { "boot_vcpus": 1, "max_vcpus": 1 } },
            "common_cpuid": [],
            "memory_manager_data": memory_manager(regions, &[]),
        });
        Ok(serde_json::to_vec(&config)?)
    }

    fn pause(&mut self) -> Result<(), VmError> {
        Ok(self.machine.pause()?)
    }

    fn resume(&mut self) -> Result<(), VmError> {
        Ok(self.machine.resume()?)
    }

    fn state(&mut self, devices: Snapshot) -> Result<Captured, VmError> {
        let regions = self.machine.regions();
        let mut device_manager = Snapshot::default();
        device_manager.add_snapshot(PASS_THROUGH.to_owned(), devices);
        let mut root = Snapshot::new_from_state(&json!({ "clock": null, "common_cpuid": [] }))?;
        root.add_snapshot(CPU_MANAGER.to_owned(), Snapshot::new_from_state(&self.machine.save()?)?);
        root.add_snapshot(
            MEMORY_MANAGER.to_owned(),
            Snapshot::new_from_state(&memory_manager(regions, regions))?,
        );
        root.add_snapshot(DEVICE_MANAGER.to_owned(), device_manager);
        Ok(root.into())
    }

    fn can_throttle(&self) -> bool {
        true
    }

    fn throttle(&mut self, percent: u8) {
        self.machine.throttle(percent);
    }
}

/// The memory manager's state: all RAM mappings, and the ranges whose bytes a snapshot holds.
fn memory_manager(regions: &[RegionBacking], saved: &[RegionBacking]) -> Value {
    let mapping = |region: &RegionBacking| json!({ "slot": region.slot, "gpa": region.gpa, "size": region.len, "zone_id": "mem0", "virtio_mem": false, "file_offset": region.offset });
    let range = |region: &RegionBacking| json!({ "gpa": region.gpa, "length": region.len });
    let end = regions.last().map_or(0, |region| region.gpa + region.len);
    json!({
        "memory_ranges": { "data": saved.iter().map(range).collect::<Vec<_>>() },
        "guest_ram_mappings": regions.iter().map(mapping).collect::<Vec<_>>(),
        "start_of_device_area": end,
        "boot_ram": ram_bytes(regions),
        "current_ram": ram_bytes(regions),
        "arch_mem_regions": [],
        "hotplug_slots": [],
        "next_memory_slot": regions.len(),
        "selected_slot": 0,
        "next_hotplug_slot": 0,
    })
}

fn ram_bytes(regions: &[RegionBacking]) -> u64 {
    regions.iter().map(|region| region.len).sum()
}

/// The machine as its receiver sees it: filled, restored, and left paused.
pub struct DestinationVm<'a> {
    machine: &'a Machine,
    devices: &'a mut MigratableDevice,
    devices_load: Duration,
    restored: bool,
}

impl<'a> DestinationVm<'a> {
    /// Makes the receiver's view of an empty `machine` and its pass-through devices.
    pub fn new(machine: &'a Machine, devices: &'a mut MigratableDevice) -> Self {
        Self { machine, devices, devices_load: Duration::ZERO, restored: false }
    }

    /// How long the devices took to load their state.
    pub fn devices_load(&self) -> Duration {
        self.devices_load
    }
}

impl Destination for DestinationVm<'_> {
    fn device_streams(&mut self) -> Option<Arc<Mutex<DeviceSet>>> {
        Some(Arc::clone(self.devices.devices()))
    }

    fn config(&mut self, config: &[u8]) -> Result<Arc<dyn PageStore>, VmError> {
        let wants_memory_now = asks_for_prefault(config);
        let config: Value = serde_json::from_slice(config)?;
        let described: BTreeMap<u64, u64> = config["memory_manager_data"]["guest_ram_mappings"]
            .as_array()
            .into_iter()
            .flatten()
            .filter_map(|mapping| Some((mapping["gpa"].as_u64()?, mapping["size"].as_u64()?)))
            .collect();
        let ours: BTreeMap<u64, u64> =
            self.machine.regions().iter().map(|region| (region.gpa, region.len)).collect();
        if described != ours {
            return Err(VmMessageError::OtherRam.into());
        }
        let memory = self.machine.memory();
        let pages = GuestPages::new(Arc::new(memory.clone()))?.backed_by(Backing::of_mmap(memory));
        Ok(Arc::new(if wants_memory_now { pages.populated()? } else { pages }))
    }

    fn state(&mut self, state: Vec<u8>) -> Result<(), VmError> {
        let root = read_tree(state)?;
        let machine: MachineState =
            state_from_id(Some(&root), CPU_MANAGER)?.ok_or(VmMessageError::Missing(CPU_MANAGER))?;
        let device_manager =
            snapshot_from_id(Some(&root), DEVICE_MANAGER).ok_or(VmMessageError::Missing(DEVICE_MANAGER))?;
        let began = Instant::now();
        self.devices.restore_child(device_manager)?;
        self.devices_load = began.elapsed();
        self.machine.restore(&machine)?;
        self.restored = true;
        Ok(())
    }

    fn complete(&mut self, _paused: bool) -> Result<Completion, VmError> {
        if self.restored { Ok(Completion::Moved) } else { Err(VmMessageError::NoState.into()) }
    }

    fn abandoned(&mut self) {}
}

/// What maps a machine's RAM: KVM's slots where the vCPU is KVM's, and for each device what it was given.
pub(crate) fn mappings_of(machine: &Machine, devices: Vec<DeviceMappings>) -> Result<VmMappings, RangeError> {
    let ram = machine.memory().iter();
    let ram: Vec<_> = ram
        .map(|region| GpaRange::new(region.start_addr().raw_value(), region.len()))
        .collect::<Result<_, _>>()?;
    let slots = machine.vm_fd().map_or(&[][..], |_| machine.regions());
    let vcpu_slots = slots.iter().map(|region| GpaRange::new(region.gpa, region.len));
    Ok(VmMappings {
        ram,
        vcpu_slots: vcpu_slots.collect::<Result<_, _>>()?,
        devices,
        ..VmMappings::default()
    })
}

/// The layout of a machine's RAM.
pub(crate) fn layout_of(machine: &Machine) -> Result<Layout, LayoutError> {
    Layout::from_guest_memory(machine.memory())
}
