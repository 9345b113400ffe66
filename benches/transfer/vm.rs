// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A VM that stands where it is put, and where it goes.

use std::fs::File;
use std::sync::Arc;

use rustix::fs::{MemfdFlags, memfd_create};
use serde_json::{Value, json};
use vfio_migration::transfer::receive::{Completion, Destination, GuestPages, PageStore};
use vfio_migration::vm::{Backing, Captured, Vm, VmError};
use vm_memory::bitmap::AtomicBitmap;
use vm_memory::{
    Bytes, FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion as _,
};
use vm_migration::Snapshot;

pub(crate) type Memory = GuestMemoryMmap<AtomicBitmap>;

pub(crate) const PAGE: u64 = 4096;

/// Memory of these ranges, start and length, in a memfd each that is one hole.
pub(crate) fn memory(ranges: &[(u64, u64)]) -> Arc<Memory> {
    let regions = ranges.iter().map(|&(start, bytes)| {
        let file = File::from(memfd_create("guest-ram", MemfdFlags::CLOEXEC).unwrap());
        file.set_len(bytes).unwrap();
        (GuestAddress(start), usize::try_from(bytes).unwrap(), Some(FileOffset::new(file, 0)))
    });
    Arc::new(Memory::from_ranges_with_files(regions.collect::<Vec<_>>()).unwrap())
}

/// The ranges of memory, start and length.
pub(crate) fn ranges_of(memory: &Memory) -> Vec<(u64, u64)> {
    memory.iter().map(|region| (region.start_addr().0, region.len())).collect()
}

/// Numbers that no page repeats.
pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    /// Fills a page with random bytes.
    pub(crate) fn fill(&mut self, memory: &Memory, gpa: u64) {
        let mut page = [0; PAGE as usize];
        page.chunks_exact_mut(8).for_each(|word| word.copy_from_slice(&self.next().to_ne_bytes()));
        memory.write_slice(&page, GuestAddress(gpa)).unwrap();
    }
}

/// Memory from GPA 0 on that is full of random bytes.
pub(crate) fn populated(bytes: u64) -> Arc<Memory> {
    let (memory, mut random) = (memory(&[(0, bytes)]), Random(0x9e37_79b9_7f4a_7c15));
    (0..bytes).step_by(PAGE as usize).for_each(|gpa| random.fill(&memory, gpa));
    memory
}

/// A VM with this memory that does nothing.
pub(crate) struct StillVm(pub(crate) Arc<Memory>);

impl StillVm {
    fn memory_manager(&self) -> Value {
        let ranges = ranges_of(&self.0);
        let listed = ranges.iter().map(|(gpa, length)| json!({ "gpa": gpa, "length": length }));
        let mapped = ranges.iter().zip(0..).map(
            |((gpa, size), slot)| json!({ "slot": slot, "gpa": gpa, "size": size, "virtio_mem": false }),
        );
        json!({
            "memory_ranges": { "data": listed.collect::<Vec<_>>() },
            "guest_ram_mappings": mapped.collect::<Vec<_>>(),
        })
    }
}

impl Vm for StillVm {
    type Memory = Memory;

    fn memory(&self) -> Arc<Memory> {
        Arc::clone(&self.0)
    }

    fn backing(&self) -> Backing {
        Backing::of_mmap(&self.0)
    }

    fn config(&mut self) -> Result<Vec<u8>, VmError> {
        let bytes: u64 = ranges_of(&self.0).iter().map(|range| range.1).sum();
        let config = json!({
            "vm_config": { "memory": { "size": bytes }, "disks": null },
            "memory_manager_data": self.memory_manager(),
        });
        Ok(serde_json::to_vec(&config)?)
    }

    fn pause(&mut self) -> Result<(), VmError> {
        Ok(())
    }

    fn resume(&mut self) -> Result<(), VmError> {
        Ok(())
    }

    fn state(&mut self, _devices: Snapshot) -> Result<Captured, VmError> {
        let mut root = Snapshot::new_from_state(&json!({ "common_cpuid": [] }))?;
        let memory_manager = Snapshot::new_from_state(&self.memory_manager())?;
        root.add_snapshot("memory-manager".to_owned(), memory_manager);
        Ok(root.into())
    }

    fn can_throttle(&self) -> bool {
        false
    }

    fn throttle(&mut self, _percent: u8) {}
}

/// Memory that takes a VM in.
pub(crate) struct Vmm {
    memory: Arc<Memory>,
    by_faults: bool,
}

impl Vmm {
    pub(crate) fn new(memory: Arc<Memory>) -> Self {
        Self { memory, by_faults: false }
    }

    /// As [`Vmm::new`], with nothing allocated ahead of its bytes.
    pub(crate) fn by_faults(memory: Arc<Memory>) -> Self {
        Self { memory, by_faults: true }
    }
}

impl Destination for Vmm {
    fn config(&mut self, _json: &[u8]) -> Result<Arc<dyn PageStore>, VmError> {
        let pages = GuestPages::new(Arc::clone(&self.memory))?.backed_by(Backing::of_mmap(&self.memory));
        Ok(Arc::new(if self.by_faults { pages.by_faults() } else { pages }))
    }

    fn state(&mut self, _json: Vec<u8>) -> Result<(), VmError> {
        Ok(())
    }

    fn complete(&mut self, _paused: bool) -> Result<Completion, VmError> {
        Ok(Completion::Moved)
    }

    fn abandoned(&mut self) {}
}
