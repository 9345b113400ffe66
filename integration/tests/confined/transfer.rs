// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The sender and the receiver, over a UNIX socket, over TCP on two connections, and under TLS; the other side is not confined.

use std::fs::File;
use std::sync::{Arc, Mutex};
use std::thread;

use rustix::fs::{MemfdFlags, memfd_create};
use vfio_migration::layout::Layout;
use vfio_migration::source::GuestMemoryLog;
use vfio_migration::syscalls;
use vfio_migration::tracker::Tracker;
use vfio_migration::transfer::connection::Listener;
use vfio_migration::transfer::limits::{ConnectionCount, Limits};
use vfio_migration::transfer::receive::{Destination, GuestPages, PageStore, Receiver};
use vfio_migration::transfer::url::Url;
use vfio_migration::transfer::{Migration, SendOptions, Sender};
use vfio_migration::vm::{Backing, Captured, Vm, VmError};
use vfio_migration_integration::confined::check;
use vm_memory::bitmap::AtomicBitmap;
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryMmap};
use vm_migration::Snapshot;

use crate::certificates::Files;

type Memory = GuestMemoryMmap<AtomicBitmap>;

const BYTES: usize = 4 << 20;
const HIGH: GuestAddress = GuestAddress(4 << 30);

/// RAM in a memfd and in anonymous memory, both with pages that nobody ever wrote.
fn memory() -> Arc<Memory> {
    let file = File::from(memfd_create("guest-ram", MemfdFlags::CLOEXEC).unwrap());
    file.set_len(BYTES as u64).unwrap();
    let low = (GuestAddress(0), BYTES, Some(FileOffset::new(file, 0)));
    let memory = Memory::from_ranges_with_files(&[low, (HIGH, BYTES, None)]).unwrap();
    for start in [GuestAddress(0), HIGH] {
        memory.write_slice(&[7; 1 << 20], start).unwrap();
    }
    Arc::new(memory)
}

struct Guest(Arc<Memory>);

impl Vm for Guest {
    type Memory = Memory;

    fn memory(&self) -> Arc<Memory> {
        Arc::clone(&self.0)
    }

    fn backing(&self) -> Backing {
        Backing::of_mmap(&self.0)
    }

    fn config(&mut self) -> Result<Vec<u8>, VmError> {
        Ok(b"{}".to_vec())
    }

    fn pause(&mut self) -> Result<(), VmError> {
        Ok(())
    }

    fn resume(&mut self) -> Result<(), VmError> {
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

struct Vmm(Arc<Memory>);

impl Destination for Vmm {
    fn config(&mut self, _json: &[u8]) -> Result<Arc<dyn PageStore>, VmError> {
        Ok(Arc::new(GuestPages::new(Arc::clone(&self.0))?))
    }

    fn state(&mut self, _json: Vec<u8>) -> Result<(), VmError> {
        Ok(())
    }

    fn complete(&mut self, _paused: bool) -> Result<(), VmError> {
        Ok(())
    }

    fn abandoned(&mut self) {}
}

/// Moves a VM each way, `sending` and `receiving` where the test wants each side done.
fn each_way(
    sending: impl Fn(&mut (dyn FnMut() + Send)) + Sync,
    receiving: impl Fn(&mut (dyn FnMut() + Send)) + Sync,
) {
    let directory = tempfile::tempdir().unwrap();
    let certificates = Files::good();
    let unix = Url::unix(directory.path().join("socket")).unwrap();
    let tcp = || Url::tcp("127.0.0.1", 0).unwrap();
    for (url, connections, is_secure) in [(unix, 1, false), (tcp(), 2, false), (tcp(), 1, true)] {
        let listener = Listener::bind(&url).unwrap();
        let mut options = SendOptions::new(listener.url().clone());
        options.connections = ConnectionCount::new(connections).unwrap();
        options.tls = is_secure.then(|| certificates.client());
        let receiver = Receiver::new(Limits::default(), is_secure.then(|| certificates.server()));
        let mut vm = Guest(memory());
        let layout = Layout::from_guest_memory(&*vm.0).unwrap();
        let source = Box::new(GuestMemoryLog::new(Arc::clone(&vm.0)));
        let tracker = Mutex::new(Tracker::builder(layout).source(source).build().unwrap());
        let mut vmm = Vmm(memory());
        thread::scope(|scope| {
            scope.spawn(|| receiving(&mut || assert!(receiver.receive(&listener, &mut vmm).is_ok())));
            sending(&mut || {
                let migration = Migration::new();
                Sender::new(options.clone()).send(&mut vm, &tracker, &Mutex::default(), &migration).unwrap();
            });
        });
    }
}

#[test]
fn sender() {
    check("transfer::sender", syscalls::SENDER, syscalls::GUEST_MEMORY_LOG, |confinement| {
        each_way(|work| confinement.run(work), |work| work());
    });
}

#[test]
fn receiver() {
    check("transfer::receiver", syscalls::RECEIVER, &[], |confinement| {
        each_way(|work| work(), |work| confinement.run(work));
    });
}
