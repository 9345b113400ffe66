// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A round over the real log of a real VM against one over a log that is fed with the same bits, without the time in ioctls; and
//! what it takes to switch six sources on.
//!
//! The VM has 64 GiB whose every 256 MiB are the same memory: a guest can dirty pages anywhere, and they cost little.

use std::cell::Cell;
use std::ffi::{c_int, c_ulong};
use std::sync::Arc;
use std::time::{Duration, Instant};

use kvm_bindings::{KVM_MAX_CPUID_ENTRIES, kvm_segment, kvm_userspace_memory_region};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};
use vfio_migration::ledger::Start;
use vfio_migration::range::GpaRange;
use vfio_migration::source::{KvmLog, KvmLogMode, KvmSlot};

use crate::contenders::floor;
use crate::ours::Ours;
use crate::pattern::{Bits, Pattern};
use crate::report::{Line, median};

const RAM: u64 = 64 << 30;
/// Where RAM begins in the guest.
const BASE: u64 = 4 << 30;
/// Memory behind the RAM, again and again.
const PIECE: usize = 256 << 20;
/// Code, page tables and the list of what to write, at address 0.
const LOW: usize = 32 << 20;
const CODE: usize = 0x1000;
const TABLES: usize = 0x10_000;
const LIST: usize = 1 << 20;
const RAM_SLOT: u32 = 1;

/// Writes to each address of the list at RSI, of RCX entries, then halts.
const PROGRAM: [u8; 15] = [
    0x48, 0x8b, 0x06, // next: mov rax, [rsi]
    0x88, 0x18, //       mov [rax], bl
    0x48, 0x83, 0xc6, 0x08, // add rsi, 8
    0x48, 0xff, 0xc9, // dec rcx
    0x75, 0xf2, //       jnz next
    0xf4, //             hlt
];

const MODES: [KvmLogMode; 3] = [KvmLogMode::AtReport, KvmLogMode::ManualAtReport, KvmLogMode::ManualAtRead];

thread_local! {
    static IN_IOCTLS: Cell<Duration> = const { Cell::new(Duration::ZERO) };
}

/// Stands before libc's function in this program, to time it.
#[unsafe(no_mangle)]
extern "C" fn ioctl(fd: c_int, request: c_ulong, argument: c_ulong) -> c_int {
    let start = Instant::now();
    // SAFETY: the caller's promises are passed on.
    let result = unsafe { libc::syscall(libc::SYS_ioctl, fd, request, argument) };
    IN_IOCTLS.set(IN_IOCTLS.get() + start.elapsed());
    result as c_int
}

/// Returns the milliseconds that `work` took, and of these the ones in ioctls.
fn timed(work: impl FnOnce()) -> (f64, f64) {
    let (before, start) = (IN_IOCTLS.get(), Instant::now());
    work();
    let spent = start.elapsed();
    (milliseconds_of(spent), milliseconds_of(IN_IOCTLS.get() - before))
}

fn milliseconds_of(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

/// Memory of this process, to its end.
fn map(at: Option<u64>, bytes: usize, protection: c_int, flags: c_int, fd: c_int) -> u64 {
    let hint = at.unwrap_or(0) as *mut libc::c_void;
    // SAFETY: fixed addresses are in a mapping made here before, which nobody uses yet.
    let mapped = unsafe { libc::mmap(hint, bytes, protection, flags, fd, 0) };
    assert_ne!(mapped, libc::MAP_FAILED, "{}", std::io::Error::last_os_error());
    mapped as u64
}

struct Guest {
    vm: Arc<VmFd>,
    vcpu: VcpuFd,
    low: u64,
    ram: u64,
}

impl Guest {
    fn new() -> Option<Self> {
        let kvm = Kvm::new().ok()?;
        let vm = kvm.create_vm().ok()?;
        vm.set_tss_address(0xfffb_d000).ok()?;
        let (anonymous, rw) = (
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
            libc::PROT_READ | libc::PROT_WRITE,
        );
        let low = map(None, LOW, rw, anonymous, -1);
        let ram = map(None, RAM as usize, libc::PROT_NONE, anonymous, -1);
        // SAFETY: the name is a string.
        let piece = unsafe { libc::memfd_create(c"bench".as_ptr(), libc::MFD_CLOEXEC) };
        // SAFETY: no memory of ours.
        assert_eq!(unsafe { libc::ftruncate(piece, PIECE as i64) }, 0);
        for at in (0..RAM).step_by(PIECE) {
            map(Some(ram + at), PIECE, rw, libc::MAP_SHARED | libc::MAP_FIXED, piece);
        }
        for (slot, gpa, size, hva) in [(0, 0, LOW as u64, low), (RAM_SLOT, BASE, RAM, ram)] {
            let region = kvm_userspace_memory_region {
                slot,
                flags: 0,
                guest_phys_addr: gpa,
                memory_size: size,
                userspace_addr: hva,
            };
            // SAFETY: the memory stays to the end of the process.
            unsafe { vm.set_user_memory_region(region) }.ok()?;
        }
        let vcpu = vm.create_vcpu(0).ok()?;
        vcpu.set_cpuid2(&kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).ok()?).ok()?;
        let guest = Self { vm: Arc::new(vm), vcpu, low, ram };
        guest.enter_long_mode()?;
        Some(guest)
    }

    fn poke(&self, at: usize, value: u64) {
        // SAFETY: within the low memory, which the guest does not use now.
        unsafe { ((self.low as usize + at) as *mut u64).write(value) };
    }

    /// Maps all memory at its own address, in pages of 2 MiB.
    fn enter_long_mode(&self) -> Option<()> {
        let gibs = ((BASE + RAM) >> 30) as usize;
        self.poke(TABLES, (TABLES + 0x1000) as u64 | 3);
        for gib in 0..gibs {
            let table = TABLES + 0x2000 + (gib << 12);
            self.poke(TABLES + 0x1000 + 8 * gib, table as u64 | 3);
            (0..512)
                .for_each(|entry| self.poke(table + 8 * entry, ((gib << 30) + (entry << 21)) as u64 | 0x83));
        }
        PROGRAM.chunks(8).enumerate().for_each(|(index, code)| {
            let mut word = [0; 8];
            word[..code.len()].copy_from_slice(code);
            self.poke(CODE + 8 * index, u64::from_le_bytes(word));
        });
        let mut sregs = self.vcpu.get_sregs().ok()?;
        let flat = kvm_segment {
            limit: u32::MAX,
            selector: 16,
            type_: 3,
            present: 1,
            s: 1,
            g: 1,
            ..Default::default()
        };
        sregs.cs = kvm_segment { selector: 8, type_: 11, l: 1, ..flat };
        (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (flat, flat, flat, flat, flat);
        (sregs.cr0, sregs.cr3, sregs.cr4, sregs.efer) = (0x8005_0033, TABLES as u64, 0x20, 0x500);
        self.vcpu.set_sregs(&sregs).ok()
    }

    /// Has the guest write to these pages of RAM.
    fn write(&mut self, pages: &[u64]) {
        if pages.is_empty() {
            return;
        }
        assert!(8 * pages.len() <= LOW - LIST);
        pages.iter().enumerate().for_each(|(index, page)| self.poke(LIST + 8 * index, BASE + (page << 12)));
        let mut regs = self.vcpu.get_regs().unwrap();
        (regs.rip, regs.rsi, regs.rcx) = (CODE as u64, LIST as u64, pages.len() as u64);
        (regs.rbx, regs.rflags) = (regs.rbx + 1, 2);
        self.vcpu.set_regs(&regs).unwrap();
        loop {
            match self.vcpu.run() {
                Ok(VcpuExit::Hlt) => return,
                Ok(VcpuExit::Intr) => {}
                Ok(other) => panic!("unexpected exit {other:?}"),
                Err(error) if error.errno() == libc::EINTR => {}
                Err(error) => panic!("the guest does not run: {error}"),
            }
        }
    }

    fn log(&self, mode: KvmLogMode) -> Box<KvmLog<Arc<VmFd>>> {
        let gpa = GpaRange::new(BASE, RAM).unwrap();
        // SAFETY: the slot is as it was set, to the end.
        let slot = unsafe { KvmSlot::new(RAM_SLOT, gpa, self.ram, 0) };
        Box::new(KvmLog::new(Arc::clone(&self.vm), [slot], mode))
    }
}

/// Compares the two in all modes, idle and at shares of random pages; says nothing where there is no KVM.
pub(crate) fn measure(runs: usize) -> Vec<Line> {
    let Some(mut guest) = Guest::new() else {
        eprintln!("no KVM here, or none that runs a guest of 64 GiB");
        return Vec::new();
    };
    let mut lines = Vec::new();
    for share in [Pattern::Idle, Pattern::Random(10), Pattern::Random(100), Pattern::Random(1000)] {
        let bits = Bits::new(share, RAM);
        // Ten in a hundred are written once a run and more: the guest needs seconds for that.
        let runs = if share == Pattern::Random(1000) { runs.min(3) } else { runs };
        for mode in MODES {
            lines.push(compare(&mut guest, share, &bits, mode, runs));
        }
    }
    lines.extend(MODES.map(|mode| arming(&guest, mode, runs)));
    lines
}

fn compare(guest: &mut Guest, share: Pattern, bits: &Bits, mode: KvmLogMode, runs: usize) -> Line {
    let mut fed = Ours::new(bits);
    let mut real = Ours::over(bits, BASE, guest.log(mode));
    let pages = bits.pages_of_first();
    // The first round has what the log begins with.
    guest.write(&pages);
    real.round(bits);
    fed.round(bits);
    let times: Vec<_> = (0..runs)
        .map(|_| {
            guest.write(&pages);
            floor(bits);
            let before = IN_IOCTLS.get();
            let spent = real.round(bits);
            let in_ioctls = milliseconds_of(IN_IOCTLS.get() - before);
            assert_eq!(
                spent.pages,
                bits.pages(),
                "a round brings the pages that the guest and the device wrote"
            );
            floor(bits);
            let fed = fed.round(bits);
            (spent.collect + spent.drain - in_ioctls, fed.collect + fed.drain, in_ioctls)
        })
        .collect();
    let (real, fed) = (median(times.iter().map(|time| time.0)), median(times.iter().map(|time| time.1)));
    Line::new(format!("KVM {mode:?}, 64 GiB, {}", share.name()), real / fed, 1.3)
        .with("real_ms", real)
        .with("fed_ms", fed)
        .with("ioctls_ms", median(times.iter().map(|time| time.2)))
}

/// Times what it takes to switch on KVM's log, the VMM's writes and four devices' logs, for a receiver that has nothing yet.
fn arming(guest: &Guest, mode: KvmLogMode, runs: usize) -> Line {
    let bits = Bits::new(Pattern::Idle, RAM);
    let mut tracker = Ours::six_sources(&bits, BASE, guest.log(mode));
    let times: Vec<_> = (0..runs.max(5))
        .map(|_| {
            let mut cursor = None;
            let spent = timed(|| cursor = Some(tracker.begin(Start::Empty).unwrap()));
            tracker.end(cursor.unwrap()).unwrap();
            spent
        })
        .collect();
    Line::new(
        format!("arming six sources, 64 GiB, {mode:?}, ms"),
        median(times.iter().map(|time| time.0)),
        5.0,
    )
    .with("ioctls_ms", median(times.iter().map(|time| time.1)))
}
