// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The sender and the receiver, over a UNIX socket, over TCP on two connections, and under TLS; the other side is not confined.
//!
//! One VM has a device, one migration is cancelled, strangers call, and this process holds a userfaultfd.

use std::fs::File;
use std::io::Write;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};
use std::thread;

use rustix::fs::{MemfdFlags, memfd_create};
use vfio_migration::device::{Device, DeviceSet, VfioUserDevice};
use vfio_migration::layout::Layout;
use vfio_migration::source::GuestMemoryLog;
use vfio_migration::syscalls;
use vfio_migration::tracker::{Tracker, VmMappings};
use vfio_migration::transfer::connection::{Connection, Listener};
use vfio_migration::transfer::limits::{ConnectionCount, PeerLimits};
use vfio_migration::transfer::receive::{
    Completion, Destination, GuestPages, PageStore, Receiver, ReceiverHandle,
};
use vfio_migration::transfer::url::Url;
use vfio_migration::transfer::{SendOptions, Sender, SenderHandle};
use vfio_migration::vm::{Backing, Captured, Vm, VmError};
use vfio_migration_integration::confined::check;
use vfio_migration_integration::device::{DeviceConfig, DmaDevice};
use vm_memory::bitmap::AtomicBitmap;
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};
use vm_migration::Snapshot;

use crate::certificates::Files;
use crate::userfault::Handler;
use crate::vfio_user;

type Memory = GuestMemoryMmap<AtomicBitmap>;

const BYTES: usize = 4 << 20;
const HIGH: GuestAddress = GuestAddress(4 << 30);

/// RAM in a memfd and in anonymous memory, which nobody ever wrote.
fn fresh_memory() -> Arc<Memory> {
    let file = File::from(memfd_create("guest-ram", MemfdFlags::CLOEXEC).unwrap());
    file.set_len(BYTES as u64).unwrap();
    let low = (GuestAddress(0), BYTES, Some(FileOffset::new(file, 0)));
    Arc::new(Memory::from_ranges_with_files(&[low, (HIGH, BYTES, None)]).unwrap())
}

/// RAM in both, of which some pages were written.
fn memory() -> Arc<Memory> {
    let memory = fresh_memory();
    for start in [GuestAddress(0), HIGH] {
        memory.write_slice(&[7; 1 << 20], start).unwrap();
    }
    memory
}

/// A VM that gives a migration up when it is paused, where it has one to give up.
struct Guest {
    memory: Arc<Memory>,
    gives_up: Option<SenderHandle>,
}

impl Vm for Guest {
    type Memory = Memory;

    fn memory(&self) -> Arc<Memory> {
        Arc::clone(&self.memory)
    }

    fn backing(&self) -> Backing {
        Backing::of_mmap(&self.memory)
    }

    fn config(&mut self) -> Result<Vec<u8>, VmError> {
        Ok(b"{}".to_vec())
    }

    fn pause(&mut self) -> Result<(), VmError> {
        let in_time = self.gives_up.as_ref().is_none_or(SenderHandle::cancel);
        if in_time { Ok(()) } else { Err("It is too late".into()) }
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

/// A VMM that asks while it takes State whether anybody waits for it.
struct Vmm {
    memory: Arc<Memory>,
    receiver: ReceiverHandle,
}

impl Destination for Vmm {
    fn config(&mut self, _json: &[u8]) -> Result<Arc<dyn PageStore>, VmError> {
        let backing = Backing::of_mmap(&self.memory);
        Ok(Arc::new(GuestPages::new(Arc::clone(&self.memory))?.backed_by(backing)))
    }

    fn state(&mut self, _json: Vec<u8>) -> Result<(), VmError> {
        if self.receiver.source_has_gone() { Err("The source has gone".into()) } else { Ok(()) }
    }

    fn complete(&mut self, _paused: bool) -> Result<Completion, VmError> {
        Ok(Completion::Moved)
    }

    fn abandoned(&mut self) {}
}

/// A VM to move, and how.
struct Case {
    url: Url,
    connections: u64,
    is_secure: bool,
    gives_up: bool,
    has_device: bool,
}

impl Case {
    fn plain(url: Url) -> Self {
        Self { url, connections: 1, is_secure: false, gives_up: false, has_device: false }
    }
}

/// A device in another process, here on another thread.
fn device() -> (DeviceSet, File) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    thread::spawn(move || DmaDevice::serve(theirs, DeviceConfig::default()));
    let ram = tempfile::tempfile().unwrap();
    ram.set_len(vfio_user::BYTES).unwrap();
    let io = VfioUserDevice::new(vfio_user::client(ours, &ram)).unwrap();
    (DeviceSet::new(vec![Device::new("dma0", Box::new(io))]).unwrap(), ram)
}

/// Calls, and leaves: without a word, and in the middle of one.
fn strangers(url: &Url) {
    for word in [&[][..], &[0]] {
        let mut stranger = Connection::connect(url, None, &PeerLimits::default()).unwrap();
        stranger.write_all(word).unwrap();
    }
}

/// Moves a VM, `sending` and `receiving` where the test wants each side done.
fn migrate(
    case: Case,
    sending: impl Fn(&mut (dyn FnMut() + Send)) + Sync,
    receiving: impl Fn(&mut (dyn FnMut() + Send)) + Sync,
) {
    let Case { url, connections, is_secure, gives_up, has_device } = case;
    let certificates = Files::good();
    let listener = Listener::bind(&url).unwrap();
    let options = SendOptions::new(listener.url().clone())
        .connections(ConnectionCount::new(connections).unwrap())
        .unwrap()
        .tls(is_secure.then(|| certificates.client()));
    let receiver = Receiver::new(PeerLimits::default(), is_secure.then(|| certificates.server()));
    let mut sender = Some(Sender::new(options));
    let migration = sender.as_ref().map(Sender::handle);
    let mut vm = Guest { memory: memory(), gives_up: migration.filter(|_| gives_up) };
    let layout = Layout::from_guest_memory(&*vm.memory).unwrap();
    let source = Box::new(GuestMemoryLog::new(Arc::clone(&vm.memory)));
    let maps = Arc::clone(&vm.memory);
    let builder = Tracker::builder(layout).mappings(move || VmMappings::of_memory(&*maps));
    let tracker = Mutex::new(builder.source(source).build().unwrap());
    let (devices, _ram) = has_device.then(device).unzip();
    let devices = Mutex::new(devices.unwrap_or_default());
    let mut vmm = Vmm { memory: fresh_memory(), receiver: receiver.handle() };
    strangers(listener.url());
    thread::scope(|scope| {
        scope.spawn(|| {
            receiving(&mut || assert_eq!(receiver.receive(&listener, &mut vmm).is_ok(), !gives_up));
        });
        sending(&mut || {
            let sender = sender.take().unwrap();
            let sent = sender.send(&mut vm, &tracker, &devices);
            assert_eq!(sent.is_ok(), !gives_up);
        });
    });
}

/// Moves VMs each way there is.
fn each_way(
    sending: impl Fn(&mut (dyn FnMut() + Send)) + Sync,
    receiving: impl Fn(&mut (dyn FnMut() + Send)) + Sync,
) {
    let directory = tempfile::tempdir().unwrap();
    let unix = |name| Url::unix(directory.path().join(name)).unwrap();
    let tcp = || Url::tcp("127.0.0.1", 0).unwrap();
    for case in [
        Case { has_device: true, ..Case::plain(unix("moved")) },
        Case { gives_up: true, ..Case::plain(unix("cancelled")) },
        Case { connections: 2, ..Case::plain(tcp()) },
        Case { is_secure: true, ..Case::plain(tcp()) },
    ] {
        migrate(case, &sending, &receiving);
    }
}

#[test]
fn sender() {
    let given = [syscalls::GUEST_MEMORY_LOG, syscalls::VFIO_USER].concat();
    check("transfer::sender", syscalls::SENDER, &given, |confinement| {
        // Of memory that is not the VM's: whether it is has to be found out.
        let registered = memory();
        let hva = registered.get_host_address(HIGH).unwrap() as u64;
        let Some(_handler) = Handler::serve(&[(hva, BYTES as u64)], 1) else { return };
        each_way(|work| confinement.run(work), |work| work());
    });
}

#[test]
fn receiver() {
    check("transfer::receiver", syscalls::RECEIVER, &[], |confinement| {
        each_way(|work| work(), |work| confinement.run(work));
    });
}
