// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Moving machines from and to snapshots: what several tests do with them.

use std::path::Path;
use std::sync::{Arc, Mutex};
use std::thread;

use vfio_migration::migratable::MigratableDevice;
use vfio_migration::snapshot::{FullSnapshot, SnapshotLimits, SnapshotSource};
use vfio_migration::source::KvmLogMode;
use vfio_migration::tracker::Tracker;
use vfio_migration::transfer::connection::Listener;
use vfio_migration::transfer::limits::PeerLimits;
use vfio_migration::transfer::receive::{Destination, ReceiveError, Received, Receiver};
use vfio_migration::transfer::url::Url;
use vfio_migration::transfer::{SendError, SendOptions, Sender, Sent};
use vfio_migration::vm::Vm;
use vfio_migration_integration::demo::{DestinationVm, Health, MachineSetup, Side};
use vm_migration::Pausable;

/// Sends `vm` to `destination` over a socket.
pub(crate) fn transfer(
    vm: &mut impl Vm,
    devices: &MigratableDevice,
    destination: &mut (dyn Destination + Send),
    adjust: impl FnOnce(SendOptions) -> SendOptions,
) -> (Result<Sent, SendError>, Result<Received, ReceiveError>) {
    let listener = Listener::bind(&Url::tcp("127.0.0.1", 0).unwrap()).unwrap();
    let options = adjust(SendOptions::new(listener.url().clone()));
    thread::scope(|scope| {
        let receiving =
            scope.spawn(|| Receiver::new(PeerLimits::default(), None).receive(&listener, destination));
        let sent = Sender::new(options).send(vm, devices.tracker(), devices.devices());
        (sent, receiving.join().unwrap())
    })
}

/// Brings the full snapshot `target` to life; returns how the machine fares, and how far it is.
pub(crate) fn restore(setup: MachineSetup, target: &Path) -> Health {
    let (side, _) = Side::in_process(setup).unwrap();
    let mut devices = side.migratable(KvmLogMode::ManualAtRead).unwrap();
    let directory = FullSnapshot::open(target, &SnapshotLimits::default()).unwrap();
    let mut snapshot = SnapshotSource::new(directory).unwrap();
    let layout = snapshot.layout().clone();
    let tracker = Arc::new(Mutex::new(Tracker::builder(layout).build().unwrap()));
    let nothing = MigratableDevice::new("pass-through", tracker, Arc::default());
    let mut vm = DestinationVm::new(&side.machine, &mut devices);
    let (sent, received) =
        transfer(&mut snapshot, &nothing, &mut vm, |options| options.complete_paused(true));
    received.unwrap();
    let sent = sent.unwrap();
    assert!(sent.progress.skipped_hole_bytes > 0, "holes of the file stay holes");
    devices.resume().unwrap();
    side.machine.start().unwrap();
    side.check(2).unwrap()
}

/// Guest, VMM and device found every page as they had written it.
pub(crate) fn assert_well(health: &Health) {
    assert!(health.wrong_pages.is_empty(), "the guest found {:#x?}", health.wrong_pages);
    assert!(health.wrong_records.is_empty(), "the VMM found {:#x?}", health.wrong_records);
    assert!(health.wrong_device_pages.is_empty(), "the device's pages {:#x?}", health.wrong_device_pages);
}
