// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A checkpoint of a running machine: it is received into a snapshot directory, whose answer to Complete is an error, and runs
//! on; from the directory a second machine comes to life.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use vfio_migration::migratable::MigratableDevice;
use vfio_migration::snapshot::{
    DestinationOptions, Limits as SnapshotLimits, SnapshotDestination, SnapshotDir, SnapshotSource, verify,
};
use vfio_migration::source::KvmLogMode;
use vfio_migration::transfer::connection::Listener;
use vfio_migration::transfer::limits::{ConnectionCount, Limits};
use vfio_migration::transfer::receive::{Destination, ReceiveError, Received, Receiver};
use vfio_migration::transfer::url::Url;
use vfio_migration::transfer::{Migration, SendError, SendOptions, SendStep, Sender, Sent, SourceVm as Left};
use vfio_migration::vm::Vm;
use vfio_migration_integration::demo::{DestinationVm, Health, MachineSetup, Side, SourceVm};
use vfio_migration_integration::device::{DeviceConfig, DmaDevice};
use vfio_migration_integration::skip;
use vfio_migration_integration::vmm::{Machine, Memory, Phase, RamLayout, Split, probe_kvm};
use vm_migration::Pausable;

const MEMORY_BYTES: u64 = 64 << 20;
const DOWNTIME_LIMIT_MS: u64 = 300;

/// Makes a machine whose device serves on a thread.
fn machine(kvm: bool) -> Side {
    let layout = RamLayout::new(MEMORY_BYTES, Split::default()).unwrap();
    let memory = Memory::create(&layout).unwrap();
    let (ours, theirs) = UnixStream::pair().unwrap();
    thread::spawn(move || DmaDevice::serve(theirs, DeviceConfig::default()));
    let files = memory.regions().iter().map(|region| region.file.try_clone().unwrap()).collect();
    let setup = MachineSetup {
        memory_bytes: MEMORY_BYTES,
        kvm,
        guest_rate: 20_000,
        device_rate: 5_000,
        seed: 11,
        forget: None,
    };
    Side::new(setup, ours, files).unwrap()
}

fn transfer(
    vm: &mut impl Vm,
    devices: &mut MigratableDevice,
    destination: &mut (dyn Destination + Send),
    adjust: impl FnOnce(&mut SendOptions),
) -> (Result<Sent, SendError>, Result<Received, ReceiveError>) {
    let listener = Listener::bind(&Url::tcp("127.0.0.1", 0).unwrap()).unwrap();
    let mut options = SendOptions::new(listener.url().clone());
    options.downtime_ms = DOWNTIME_LIMIT_MS;
    adjust(&mut options);
    thread::scope(|scope| {
        let receiving =
            scope.spawn(|| Receiver::new(Limits::default(), None).receive(&listener, destination));
        let sent = Sender::new(options).send(vm, devices, &Migration::new());
        (sent, receiving.join().unwrap())
    })
}

/// Watches a guest's own counter of pages from outside.
struct Watch {
    over: Arc<AtomicBool>,
    thread: thread::JoinHandle<Duration>,
}

impl Watch {
    fn start(machine: &Arc<Machine>) -> Self {
        let (machine, over) = (Arc::clone(machine), Arc::new(AtomicBool::new(false)));
        let stop = Arc::clone(&over);
        let thread = thread::spawn(move || {
            let (mut longest, mut last, mut since) = (Duration::ZERO, 0, Instant::now());
            while !stop.load(Ordering::Relaxed) {
                let pages = machine.pages_written().unwrap();
                let now = Instant::now();
                if pages != last {
                    longest = longest.max(now - since);
                    (last, since) = (pages, now);
                }
                thread::sleep(Duration::from_micros(200));
            }
            longest.max(since.elapsed())
        });
        Self { over, thread }
    }

    /// The longest time for which the guest stood still.
    fn longest_gap(self) -> Duration {
        self.over.store(true, Ordering::Relaxed);
        self.thread.join().unwrap()
    }
}

/// Takes a checkpoint of the running machine into `target`.
fn checkpoint(side: &Side, devices: &mut MigratableDevice, target: &Path, connections: u64) {
    let options = DestinationOptions { checkpoint: true, ..DestinationOptions::default() };
    let mut directory = SnapshotDestination::create(target, options).unwrap();
    let mut vm = SourceVm::new(Arc::clone(&side.machine));
    let watch = Watch::start(&side.machine);
    let (sent, received) = transfer(&mut vm, devices, &mut directory, |options| {
        options.connections = ConnectionCount::new(connections).unwrap();
    });
    thread::sleep(Duration::from_millis(50));
    let gap = watch.longest_gap();

    let failure = sent.unwrap_err();
    assert!(matches!(failure, SendError::Peer { step: SendStep::Complete, .. }), "{failure}");
    assert_eq!(failure.source_vm(), Left::AsBefore);
    assert!(received.is_err());
    assert!(directory.kept().is_some(), "{received:?}");
    assert_eq!(side.machine.phase(), Phase::Running);
    assert!(gap <= Duration::from_millis(DOWNTIME_LIMIT_MS), "the guest stood still for {gap:?}");
    assert!(verify(target, &SnapshotLimits::default()).unwrap().is_clean());
}

fn assert_well(health: &Health) {
    assert!(health.wrong_pages.is_empty(), "the guest found {:#x?}", health.wrong_pages);
    assert!(health.wrong_records.is_empty(), "the VMM found {:#x?}", health.wrong_records);
    assert!(health.wrong_device_pages.is_empty(), "the device's pages {:#x?}", health.wrong_device_pages);
}

/// Brings a checkpoint to life; returns how the machine fares, and how far it was in passes and in the device's stream.
fn restore(kvm: bool, target: &Path) -> Health {
    let side = machine(kvm);
    let mut devices = side.migratable(KvmLogMode::ManualAtRead).unwrap();
    let directory = SnapshotDir::open(target, &SnapshotLimits::default()).unwrap();
    let mut snapshot = SnapshotSource::new(directory).unwrap();
    let layout = snapshot.layout().clone();
    let mut nothing = MigratableDevice::builder("pass-through", layout).build().unwrap();
    let mut vm = DestinationVm::new(&side.machine, &mut devices);
    let (sent, received) =
        transfer(&mut snapshot, &mut nothing, &mut vm, |options| options.complete_paused = true);
    received.unwrap();
    let sent = sent.unwrap();
    assert!(sent.skipped_hole_bytes > 0, "holes of the file stay holes");
    devices.resume().unwrap();
    side.machine.start().unwrap();
    side.check(2).unwrap()
}

fn a_checkpoint_is_whole_and_its_machine_runs_on(kvm: bool) {
    let folder = tempfile::tempdir().unwrap();
    let side = machine(kvm);
    side.start().unwrap();
    let mut devices = side.migratable(KvmLogMode::ManualAtRead).unwrap();
    let mut before = side.check(1).unwrap();
    for connections in [1, 4] {
        let target = folder.path().join(format!("checkpoint-{connections}"));
        checkpoint(&side, &mut devices, &target, connections);
        let after = side.check(2).unwrap();
        assert_well(&after);
        assert!(after.device_position > before.device_position, "the device goes on");

        let restored = restore(kvm, &target);
        assert_well(&restored);
        assert!(restored.passes >= before.passes + 2, "it does not begin anew");
        assert!(restored.device_position > before.device_position, "nor does its device");
        before = after;
    }
}

#[test]
fn a_checkpoint_of_a_kvm_guest_is_whole_and_the_guest_runs_on() {
    match probe_kvm() {
        Ok(()) => a_checkpoint_is_whole_and_its_machine_runs_on(true),
        Err(error) => skip("a_checkpoint_of_a_kvm_guest_is_whole_and_the_guest_runs_on", error),
    }
}

#[test]
fn a_checkpoint_of_a_guest_on_a_software_vcpu_is_whole_and_the_guest_runs_on() {
    a_checkpoint_is_whole_and_its_machine_runs_on(false);
}
