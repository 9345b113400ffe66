// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The VM of the examples: RAM in a memfd, and a vCPU that is a thread and notices when a page is not as it left it.

use std::error::Error;
use std::fs::File;
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread;
use std::time::{Duration, Instant};

use rustix::fs::{MemfdFlags, memfd_create};
use vm_memory::bitmap::AtomicBitmap;
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryMmap};

/// Guest memory that notes what the VMM writes.
pub(crate) type Memory = GuestMemoryMmap<AtomicBitmap>;

/// Bytes of RAM.
pub(crate) const RAM_BYTES: usize = 16 << 20;

/// Bytes of a page.
pub(crate) const PAGE_BYTES: u64 = 4096;

/// Pages that a writer goes through: the lower half of RAM is the vCPU's.
pub(crate) const PAGES: u64 = RAM_BYTES as u64 / PAGE_BYTES / 2;

/// Writes its pages in an order that jumps about, and finds out on each pass whether one went back or was lost in between.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Stamper {
    /// Where its pages begin.
    pub(crate) start: u64,
    /// Pages written so far: all there is to know of it.
    pub(crate) step: u64,
    /// The first page that was not as it was left.
    pub(crate) wrong_gpa: Option<u64>,
}

impl Stamper {
    pub(crate) fn new(start: u64) -> Self {
        Self { start, step: 0, wrong_gpa: None }
    }

    /// Checks and writes the next page.
    pub(crate) fn stamp(&mut self, memory: &impl Bytes<GuestAddress>) {
        let gpa = self.start + self.step * 1237 % PAGES * PAGE_BYTES;
        let next = self.step + 1;
        let expected = next.saturating_sub(PAGES);
        if memory.read_obj::<u64>(GuestAddress(gpa)).ok() != Some(expected) {
            self.wrong_gpa.get_or_insert(gpa);
        }
        if memory.write_obj(next, GuestAddress(gpa)).is_ok() {
            self.step = next;
        }
    }
}

/// A vCPU: its one register, and whether it runs.
struct Vcpu {
    register: Stamper,
    running: bool,
}

/// A VM. Clones are the same one.
#[derive(Clone)]
pub(crate) struct Machine {
    pub(crate) memory: Arc<Memory>,
    vcpu: Arc<Mutex<Vcpu>>,
}

impl Machine {
    /// Makes a VM whose memory reads zero and whose vCPU is paused.
    pub(crate) fn new() -> Result<Self, Box<dyn Error + Send + Sync>> {
        let file = File::from(memfd_create("guest-ram", MemfdFlags::CLOEXEC)?);
        file.set_len(RAM_BYTES as u64)?;
        let region = (GuestAddress(0), RAM_BYTES, Some(FileOffset::new(file, 0)));
        let memory = Arc::new(Memory::from_ranges_with_files([region])?);
        let vcpu = Arc::new(Mutex::new(Vcpu { register: Stamper::new(0), running: false }));
        let machine = Self { memory, vcpu };
        machine.start_vcpu();
        Ok(machine)
    }

    /// The vCPU's thread, which ends with the VM.
    fn start_vcpu(&self) {
        let (memory, vcpu) = (Arc::clone(&self.memory), Arc::downgrade(&self.vcpu));
        thread::spawn(move || {
            while let Some(vcpu) = vcpu.upgrade() {
                let mut vcpu = lock(&vcpu);
                for _ in 0..if vcpu.running { 8 } else { 0 } {
                    vcpu.register.stamp(&*memory);
                }
                drop(vcpu);
                thread::sleep(Duration::from_millis(1));
            }
        });
    }

    /// Lets the vCPU run.
    pub(crate) fn resume(&self) {
        lock(&self.vcpu).running = true;
    }

    /// Stops the vCPU. When this returns, its last write is over.
    pub(crate) fn pause(&self) {
        lock(&self.vcpu).running = false;
    }

    /// The VM's state.
    pub(crate) fn save(&self) -> u64 {
        lock(&self.vcpu).register.step
    }

    /// Puts a saved state into the paused VM.
    pub(crate) fn restore(&self, step: u64) {
        lock(&self.vcpu).register.step = step;
    }

    /// Waits until the running vCPU has made so many steps more.
    pub(crate) fn work(&self, steps: u64) {
        let until = lock(&self.vcpu).register.step + steps;
        wait_until(|| lock(&self.vcpu).register.step >= until);
    }

    /// Has the running vCPU go once through all its pages: each must be as it was left, here or at the VM's source.
    pub(crate) fn check(&self) {
        self.work(PAGES);
        assert_eq!(lock(&self.vcpu).register.wrong_gpa, None, "a page is not as the vCPU left it");
    }
}

/// Waits for something that takes a moment.
pub(crate) fn wait_until(happened: impl Fn() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(60);
    while !happened() {
        assert!(Instant::now() < deadline, "nothing happens");
        thread::sleep(Duration::from_millis(1));
    }
}

/// Locks what no thread can leave half done.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().expect("no thread panics while it holds this lock")
}
