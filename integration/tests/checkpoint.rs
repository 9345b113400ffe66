// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A checkpoint of a running machine: it is received into a snapshot directory, whose answer to Complete is an error, and runs
//! on; from the directory a second machine comes to life.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]
#![expect(clippy::print_stdout, reason = "figures are shown where they are asked for")]

mod restoring;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use vfio_migration::migratable::MigratableDevice;
use vfio_migration::snapshot::{DestinationOptions, SnapshotDestination, SnapshotLimits, verify};
use vfio_migration::source::KvmLogMode;
use vfio_migration::transfer::limits::ConnectionCount;
use vfio_migration::transfer::receive::Completion;
use vfio_migration::transfer::{SendError, SendStep, SourceVm as Left};
use vfio_migration_integration::demo::{MachineSetup, Side, SourceVm};
use vfio_migration_integration::skipped;
use vfio_migration_integration::vmm::{Machine, Phase, probe_kvm};

use restoring::{assert_well, restore, transfer};

const MEMORY_BYTES: u64 = 64 << 20;
const DOWNTIME_LIMIT_MS: u64 = 300;

/// Checkpoints of which one has to keep the limit: whoever else writes to this disk can hold up any one.
const ATTEMPTS: u32 = 5;

fn setup(kvm: bool) -> MachineSetup {
    MachineSetup {
        memory_bytes: MEMORY_BYTES,
        sparse: false,
        kvm,
        guest_rate: 20_000,
        device_rate: 5_000,
        seed: 11,
        forget: None,
    }
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

/// Takes a checkpoint of the running machine into `target`; returns how long the guest stood still.
fn checkpoint(side: &Side, devices: &MigratableDevice, target: &Path, connections: u64) -> Duration {
    let options = DestinationOptions { checkpoint: true, ..DestinationOptions::default() };
    let mut directory = SnapshotDestination::create(target, options).unwrap();
    let mut vm = SourceVm::new(Arc::clone(&side.machine));
    let watch = Watch::start(&side.machine);
    let (sent, received) = transfer(&mut vm, devices, &mut directory, |options| {
        let options = options.connections(ConnectionCount::new(connections).unwrap()).unwrap();
        options.downtime(Duration::from_millis(DOWNTIME_LIMIT_MS))
    });
    thread::sleep(Duration::from_millis(50));
    let gap = watch.longest_gap();

    let failure = sent.unwrap_err();
    assert!(matches!(failure, SendError::Peer { step: SendStep::Complete, .. }), "{failure}");
    assert_eq!(failure.source_vm(), Left::AsBefore);
    assert_eq!(received.unwrap().completion, Completion::Checkpointed);
    assert!(directory.kept().is_some());
    assert_eq!(side.machine.phase(), Phase::Running);
    assert!(verify(target, &SnapshotLimits::default()).unwrap().is_clean());
    gap
}

/// Takes a checkpoint that keeps the downtime limit; returns where it is.
fn checkpoint_in_time(side: &Side, devices: &MigratableDevice, folder: &Path, connections: u64) -> PathBuf {
    let mut gaps = Vec::new();
    for attempt in 1..=ATTEMPTS {
        let target = folder.join(format!("checkpoint-{connections}-{attempt}"));
        let gap = checkpoint(side, devices, &target, connections);
        println!("x{connections}: the guest stood still for {gap:.1?}");
        if gap <= Duration::from_millis(DOWNTIME_LIMIT_MS) {
            return target;
        }
        gaps.push(gap);
    }
    panic!("the guest stood still for {gaps:?}");
}

fn a_checkpoint_is_whole_and_its_machine_runs_on(kvm: bool) {
    let folder = tempfile::tempdir().unwrap();
    let (side, _) = Side::in_process(setup(kvm)).unwrap();
    side.start().unwrap();
    let devices = side.migratable(KvmLogMode::ManualAtRead).unwrap();
    let mut before = side.check(1).unwrap();
    for connections in [1, 4] {
        let target = checkpoint_in_time(&side, &devices, folder.path(), connections);
        let after = side.check(2).unwrap();
        assert_well(&after);
        assert!(after.device_position > before.device_position, "the device goes on");

        let restored = restore(setup(kvm), &target);
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
        Err(error) => skipped("a_checkpoint_of_a_kvm_guest_is_whole_and_the_guest_runs_on", error),
    }
}

#[test]
fn a_checkpoint_of_a_guest_on_a_software_vcpu_is_whole_and_the_guest_runs_on() {
    a_checkpoint_is_whole_and_its_machine_runs_on(false);
}
