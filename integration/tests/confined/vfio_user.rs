// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A device in another process, here on another thread: its log and its state.

use std::fs::File;
use std::os::fd::AsFd;
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
use vfio_migration::vfio_user::{Client, DmaRegion, Options, SharedClient};
use vfio_migration_integration::confined::check;
use vfio_migration_integration::device::control;
use vfio_migration_integration::device::{DeviceConfig, DmaDevice, Stream, Window};

const BYTES: u64 = 1 << 20;

/// A client of a device that may write to all of `ram` and steps where it is told to.
fn client(socket: UnixStream, ram: &File) -> SharedClient {
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
        confinement.run(|| {
            let client = client(ours, &ram);
            log(&client);
            state(client);
        });
        server.join().unwrap().unwrap();
    });
}
