// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A device in another process, here on another thread: its log and its state.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};
use std::thread;

use vfio_migration::device::{Device, DeviceSet, VfioUserDevice};
use vfio_migration::granule::Granule;
use vfio_migration::iova::{IovaMap, Mapping};
use vfio_migration::layout::Layout;
use vfio_migration::ledger::{Ledger, Start};
use vfio_migration::range::{GpaRange, IovaRange};
use vfio_migration::source::{DirtySource, VfioUserSource};
use vfio_migration::syscalls;
use vfio_migration::vfio_user::message::{DmaAccess, HEADER_BYTES, Header, MessageKind};
use vfio_migration::vfio_user::version::{PeerCapabilities, TwinSocketCapability, Version};
use vfio_migration::vfio_user::{Client, DmaRegion, Options, SharedClient};
use vfio_migration_integration::confined::check;
use vfio_migration_integration::device::control;
use vfio_migration_integration::device::{DeviceConfig, DmaDevice, Stream, Window};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::sock_ctrl_msg::ScmSocket;
use zerocopy::IntoBytes;

pub(crate) const BYTES: u64 = 1 << 20;

/// A client of a device that may write to all of `ram` and steps where it is told to.
pub(crate) fn client(socket: UnixStream, ram: &File) -> SharedClient {
    let mut client = Client::connect(socket, "dma0", &Options::default()).unwrap();
    let iova = IovaRange::new(0, BYTES).unwrap();
    client.dma_map(&DmaRegion { iova, file_offset: 0, writeable: true }, Some(ram.as_fd())).unwrap();
    let stream = Stream { seed: 1, windows: vec![Window::new(0, BYTES).unwrap()] };
    control::program(&mut client, &stream, 1000).unwrap();
    Arc::new(Mutex::new(client))
}

/// Everything a session does with the device's log.
fn log(client: &SharedClient) {
    let ram = GpaRange::new(0, BYTES).unwrap();
    let layout = Layout::new([ram], Granule::host_page()).unwrap();
    let mut source = VfioUserSource::new("dma0", Arc::clone(client)).unwrap();
    source.start(&layout, &IovaMap::Identity).unwrap();
    control::step(&mut client.lock().unwrap(), 3).unwrap();
    let mut ledger = Ledger::new(layout, 1);
    let cursor = ledger.open(Start::Copied);
    source.collect(&mut ledger.sink(0, &IovaMap::Identity)).unwrap();
    ledger.absorb();
    assert!(ledger.outstanding(cursor).unwrap().pending_bytes > 0);
    source.unmapped(&Mapping::identity(ram), &mut ledger.sink(0, &IovaMap::Identity)).unwrap();
    source.stop().unwrap();
}

/// Everything a migration does with the device's state.
fn state(client: SharedClient) {
    let device = Device::new("dma0", Box::new(VfioUserDevice::new(client).unwrap()));
    let mut devices = DeviceSet::new(vec![device]).unwrap();
    devices.start_precopy().unwrap();
    devices.precopy_step(1 << 20).unwrap();
    devices.stop_for_copy().unwrap();
    let tree = devices.save().unwrap();
    devices.load(&tree).unwrap();
    devices.run().unwrap();
}

#[test]
fn vfio_user() {
    check("vfio_user::vfio_user", syscalls::VFIO_USER, &[], |confinement| {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let server = thread::spawn(move || DmaDevice::serve(theirs, DeviceConfig::default()));
        let ram = tempfile::tempfile().unwrap();
        ram.set_len(BYTES).unwrap();
        let (lost, other_end) = UnixStream::pair().unwrap();
        drop(other_end);
        confinement.run(|| {
            let client = client(ours, &ram);
            log(&client);
            state(client);
            // The client gives a connection up whose other end is gone.
            Client::connect(lost, "dma1", &Options::default()).unwrap_err();
        });
        server.join().unwrap().unwrap();
    });
}

/// Answers a request of `client` with `payload` and, perhaps, a descriptor.
fn answer(client: &mut UnixStream, payload: &[u8], passed: Option<&UnixStream>) {
    let mut header = [0; HEADER_BYTES];
    client.read_exact(&mut header).unwrap();
    let request = Header::decode(&header).unwrap();
    client.read_exact(&mut vec![0; request.payload_bytes()]).unwrap();
    let reply = Header::new(request.id(), request.command(), MessageKind::Reply, payload.len()).unwrap();
    let descriptors: Vec<_> = passed.iter().map(|passed| passed.as_raw_fd()).collect();
    client.send_with_fds(&[&[&reply.encode()[..], payload].concat()[..]], &descriptors).unwrap();
}

/// Is a server that passes a socket along for its own requests, and writes a page over it before it answers a reset.
fn serve_by_message(mut client: UnixStream) {
    let (mut line, passed) = UnixStream::pair().unwrap();
    let twin_socket = Some(TwinSocketCapability { supported: true, fd_index: Some(0) });
    let version = Version::current(PeerCapabilities { twin_socket, ..PeerCapabilities::default() });
    answer(&mut client, &version.encode(), Some(&passed));
    answer(&mut client, &[], None);
    let access = DmaAccess { iova: 0.into(), count: 4096.into() };
    let write = Header::new(1, 12, MessageKind::Command { no_reply: true }, 16 + 4096).unwrap();
    line.write_all(&[&write.encode()[..], access.as_bytes(), &[7; 4096]].concat()).unwrap();
    answer(&mut client, &[], None);
}

#[test]
fn vfio_user_memory() {
    check("vfio_user::vfio_user_memory", syscalls::VFIO_USER_MEMORY, syscalls::VFIO_USER, |confinement| {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let server = thread::spawn(move || serve_by_message(theirs));
        let memory = Arc::new(GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), 4096)]).unwrap());
        confinement.run(|| {
            let shared = Arc::clone(&memory);
            let mut client = Client::connect_with_memory(ours, "dma0", &Options::default(), shared).unwrap();
            let iova = IovaRange::new(0, 4096).unwrap();
            client.dma_map(&DmaRegion { iova, file_offset: 0, writeable: true }, None).unwrap();
            client.reset().unwrap();
        });
        assert_eq!(memory.read_obj::<u8>(GuestAddress(4095)).unwrap(), 7);
        server.join().unwrap();
    });
}
