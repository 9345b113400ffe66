// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A guest on this host's real KVM that writes to just the pages it is told to.

use std::collections::BTreeSet;
use std::sync::Arc;

use kvm_bindings::{KVM_EXIT_DIRTY_RING_FULL, kvm_segment, kvm_userspace_memory_region};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};
use vfio_migration::granule::Granule;
use vfio_migration::iova::IovaMap;
use vfio_migration::layout::Layout;
use vfio_migration::ledger::{ChunkLimits, CursorId, Ledger};
use vfio_migration::range::GpaRange;
use vfio_migration::source::{DirtySource, KvmSlot, RingSize};
use vm_memory::{Address, Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

#[path = "../../integration/src/skip.rs"]
#[expect(dead_code, unreachable_pub, reason = "other crates' tests use the rest")]
mod skip;

/// Where the code and the list of what to write stand: a slot that no test looks at.
const CODE: u64 = 0x1000;
const LIST: u64 = 0x2000;
const CODE_PAGES: u64 = 64;

/// Pages a list holds.
const LIST_LEN: usize = 1024 * 14;

/// Writes to each address of the list at ESI, of ECX entries, then halts.
const PROGRAM: &[u8] = &[
    0x8b, 0x06, // next: mov eax, [esi]
    0x88, 0x18, //       mov [eax], bl
    0x83, 0xc6, 0x04, // add esi, 4
    0x49, //             dec ecx
    0x75, 0xf6, //       jnz next
    0xf4, //             hlt
];

/// One page in bytes.
pub(crate) const PAGE: u64 = 4096;

/// A VM with one vCPU in flat 32-bit mode.
pub(crate) struct Guest {
    pub(crate) vm: Arc<VmFd>,
    pub(crate) vcpu: VcpuFd,
    pub(crate) ring: Option<RingSize>,
    /// The code, the list, and the RAM that is the guest's own.
    memory: GuestMemoryMmap<()>,
    ram: Vec<Ram>,
}

/// Guest RAM and where it is in this process, for as long as the guest is.
#[derive(Clone, Copy)]
pub(crate) struct Ram {
    pub(crate) gpa: GpaRange,
    pub(crate) userspace_addr: u64,
}

impl Ram {
    fn region(self, slot: usize) -> kvm_userspace_memory_region {
        kvm_userspace_memory_region {
            slot: u32::try_from(slot).unwrap(),
            flags: 0,
            guest_phys_addr: self.gpa.start(),
            memory_size: self.gpa.len(),
            userspace_addr: self.userspace_addr,
        }
    }
}

/// Says why the tests of this file test nothing here.
fn skipped<T>(reason: &str) -> Option<T> {
    skip::skip(reason);
    None
}

impl Guest {
    /// Makes a guest whose RAM beside its code is `ranges`, with a dirty ring of `ring_bytes` if asked; `None`, loudly, where KVM is
    /// not to be had.
    pub(crate) fn new(ranges: &[(u64, u64)], ring_bytes: Option<u32>) -> Option<Self> {
        Self::over(ranges, &[], ring_bytes)
    }

    /// As [`Guest::new`], with RAM that is somewhere already.
    pub(crate) fn over(ranges: &[(u64, u64)], foreign: &[Ram], ring_bytes: Option<u32>) -> Option<Self> {
        let kvm = match Kvm::new() {
            Ok(kvm) => kvm,
            Err(error) => return skipped(&format!("a guest: /dev/kvm does not open: {error}")),
        };
        if Granule::host_page() != Granule::KIB_4 {
            return skipped("a guest: the host's pages are not 4 KiB");
        }
        let vm = kvm.create_vm().unwrap();
        vm.set_tss_address(0xfffb_d000).unwrap();
        let ring = match ring_bytes.map(|bytes| RingSize::enable(&vm, bytes)) {
            Some(Err(error)) => return skipped(&format!("a guest with a dirty ring: {error}")),
            Some(Ok(ring)) => Some(ring),
            None => None,
        };
        let memory = memory(ranges);
        let own = memory.iter().map(|region| Ram {
            gpa: GpaRange::new(region.start_addr().raw_value(), region.len()).unwrap(),
            userspace_addr: region.as_ptr() as u64,
        });
        let ram: Vec<_> = own.chain(foreign.iter().copied()).collect();
        for (slot, ram) in ram.iter().enumerate() {
            // SAFETY: the memory is mapped as long as the VM is in use: it belongs to the guest, or the caller sees to it.
            unsafe { vm.set_user_memory_region(ram.region(slot)) }.unwrap();
        }
        let vcpu = vm.create_vcpu(0).unwrap();
        set_flat_32_bit_mode(&vcpu);
        Some(Self { vm: Arc::new(vm), vcpu, ring, memory, ram })
    }

    /// The slots of the RAM beside the code, as the sources want them.
    pub(crate) fn slots(&self) -> Vec<KvmSlot> {
        let slot = |(slot, ram): (usize, &Ram)| {
            let slot = u32::try_from(slot).unwrap();
            // SAFETY: the guest's slots are just these, and stay.
            unsafe { KvmSlot::new(slot, ram.gpa, ram.userspace_addr, 0) }
        };
        self.ram.iter().enumerate().skip(1).map(slot).collect()
    }

    /// The RAM beside the code.
    pub(crate) fn layout(&self) -> Layout {
        Layout::new(self.slots().iter().map(KvmSlot::gpa), Granule::host_page()).unwrap()
    }

    /// Has the guest write to the pages at these addresses; `ring_full` is called whenever its ring is full.
    pub(crate) fn write(&mut self, gpas: impl IntoIterator<Item = u64>, mut ring_full: impl FnMut()) {
        let gpas: Vec<_> = gpas.into_iter().map(|gpa| u32::try_from(gpa).unwrap()).collect();
        assert!(!gpas.is_empty() && gpas.len() <= LIST_LEN);
        for (index, gpa) in gpas.iter().enumerate() {
            self.memory.write_obj(*gpa, GuestAddress(LIST + 4 * index as u64)).unwrap();
        }
        let mut regs = self.vcpu.get_regs().unwrap();
        (regs.rip, regs.rsi, regs.rcx) = (CODE, LIST, gpas.len() as u64);
        (regs.rbx, regs.rflags) = (regs.rbx + 1, 2);
        self.vcpu.set_regs(&regs).unwrap();
        loop {
            match self.vcpu.run().unwrap() {
                VcpuExit::Hlt => return,
                VcpuExit::Unsupported(KVM_EXIT_DIRTY_RING_FULL) => ring_full(),
                other => panic!("unexpected exit {other:?}"),
            }
        }
    }
}

/// The code, and RAM at `ranges`.
fn memory(ranges: &[(u64, u64)]) -> GuestMemoryMmap<()> {
    let regions = [(0, CODE_PAGES * PAGE)].into_iter().chain(ranges.iter().copied());
    let regions: Vec<_> =
        regions.map(|(start, len)| (GuestAddress(start), usize::try_from(len).unwrap())).collect();
    let memory = GuestMemoryMmap::from_ranges(&regions).unwrap();
    memory.write_slice(PROGRAM, GuestAddress(CODE)).unwrap();
    memory
}

fn set_flat_32_bit_mode(vcpu: &VcpuFd) {
    let mut sregs = vcpu.get_sregs().unwrap();
    let flat = kvm_segment {
        base: 0,
        limit: u32::MAX,
        selector: 16,
        type_: 3,
        present: 1,
        dpl: 0,
        db: 1,
        s: 1,
        l: 0,
        g: 1,
        ..Default::default()
    };
    sregs.cs = kvm_segment { selector: 8, type_: 11, ..flat };
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (flat, flat, flat, flat, flat);
    sregs.cr0 |= 1;
    vcpu.set_sregs(&sregs).unwrap();
}

/// Collects the source as number 0 of the ledger.
pub(crate) fn collect(source: &mut dyn DirtySource, ledger: &mut Ledger) {
    source.collect(&mut ledger.sink(0, &IovaMap::Identity)).unwrap();
    ledger.absorb();
}

/// Takes all that is pending for `cursor`, as if it were sent and acknowledged; returns the pages' addresses.
pub(crate) fn taken(ledger: &mut Ledger, cursor: CursorId) -> BTreeSet<u64> {
    ledger.begin_round(cursor);
    let Some(chunk) = ledger.take(cursor, ChunkLimits::NONE) else { return BTreeSet::new() };
    let pages = chunk.ranges().iter().flat_map(|range| range.pieces(PAGE)).map(GpaRange::start).collect();
    ledger.commit(chunk);
    pages
}
