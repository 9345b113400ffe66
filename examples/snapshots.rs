// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A VMM that takes one snapshot after another, each a differential to the one before: `cargo run --example snapshots`.
//!
//! The directories are Cloud Hypervisor's: `vfio-migrate snapshot` reads them, too.
#![expect(clippy::print_stdout, reason = "an example tells what it does")]

mod machine;

use std::error::Error;
use std::fs::{self, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;

use serde_json::json;
use vfio_migration::layout::Layout;
use vfio_migration::ledger::{CursorId, Start};
use vfio_migration::range::GpaRange;
use vfio_migration::snapshot::{
    AnnouncedRam, Base, CHANGES_FILE, Digest, FullSnapshot, SnapshotChain, SnapshotLimits, SnapshotWriter,
    apply, verify,
};
use vfio_migration::source::GuestMemoryLog;
use vfio_migration::tracker::{Tracker, VmMappings};
use vm_memory::{Bytes, GuestAddress};
use vm_migration::{Snapshot, state_from_id};

use machine::{Machine, RAM_BYTES};

type Failure = Box<dyn Error + Send + Sync>;

/// Where the vCPU's state is in the tree.
const CPU: &str = "cpu-manager";

/// A VM of which snapshots are taken.
struct Subject {
    machine: Machine,
    tracker: Tracker,
    /// Stands for the last snapshot: knows each page that was written since.
    cursor: CursorId,
    last: Option<Digest>,
}

impl Subject {
    fn new() -> Result<Self, Failure> {
        let machine = Machine::new()?;
        let memory = Arc::clone(&machine.memory);
        let mut tracker = Tracker::builder(Layout::from_guest_memory(&*machine.memory)?)
            .mappings(move || VmMappings::of_memory(&*memory))
            .source(Box::new(GuestMemoryLog::new(Arc::clone(&machine.memory))))
            .build()?;
        let cursor = tracker.begin(Start::Empty)?;
        Ok(Self { machine, tracker, cursor, last: None })
    }

    /// Takes a snapshot of the running VM. It stands still meanwhile.
    fn take(&mut self, target: &Path) -> Result<(), Failure> {
        self.machine.pause();
        let taken = self.write(target);
        self.machine.resume();
        self.last = Some(taken?);
        Ok(())
    }

    /// Writes what is pending. If that fails, these pages are part of the next snapshot.
    fn write(&mut self, target: &Path) -> Result<Digest, Failure> {
        let config = serde_json::to_vec(&json!({ "memory": { "size": RAM_BYTES } }))?;
        let state = serde_json::to_vec(&state_of(&self.machine)?)?;
        for degradation in self.tracker.collect_final() {
            println!("{degradation}; all it covers is saved");
        }
        let (ram, memory) = (AnnouncedRam::all(self.tracker.layout().clone()), &*self.machine.memory);
        self.tracker.save_pending(self.cursor, |pages| match self.last {
            None => {
                let writer = SnapshotWriter::create(target, ram, None, SnapshotLimits::default())?;
                writer.copy_from(pages.iter().copied(), memory)?;
                Ok(writer.finish(&config, &state)?)
            }
            Some(base) => {
                let writer =
                    SnapshotWriter::create(target, ram, Some(Base::Named(base)), SnapshotLimits::default())?;
                writer.copy_from(pages.iter().copied(), memory)?;
                Ok(writer.finish(&config, &state)?)
            }
        })
    }
}

/// The tree of the VM's state: what Cloud Hypervisor's has of memory, and what this VMM wants to keep.
fn state_of(machine: &Machine) -> Result<Snapshot, Failure> {
    let memory = json!({ "memory_ranges": { "data": [{ "gpa": 0, "length": RAM_BYTES }] } });
    let mut state = Snapshot::default();
    state.add_snapshot("memory-manager".to_owned(), Snapshot::new_from_state(&memory)?);
    state.add_snapshot(CPU.to_owned(), Snapshot::new_from_state(&machine.save())?);
    Ok(state)
}

/// Makes a VM of a full snapshot.
fn restore(path: &Path) -> Result<Machine, Failure> {
    let directory = FullSnapshot::open(path, &SnapshotLimits::default())?;
    let mut bytes = vec![0; RAM_BYTES];
    directory.read(GpaRange::new(0, RAM_BYTES as u64)?, &mut bytes)?;
    let machine = Machine::new()?;
    machine.memory.write_slice(&bytes, GuestAddress(0))?;
    let state: Snapshot = serde_json::from_slice(directory.state().text())?;
    machine.restore(state_from_id(Some(&state), CPU)?.ok_or("The vCPU's state is missing")?);
    Ok(machine)
}

fn main() -> Result<(), Failure> {
    let directory = tempfile::tempdir()?;
    let path = |name: &str| directory.path().join(name);
    let mut subject = Subject::new()?;
    subject.machine.resume();
    let names = ["sunday", "monday", "tuesday"];
    for name in names {
        subject.machine.work(300);
        subject.take(&path(name))?;
        let checked = verify(&path(name), &SnapshotLimits::default())?;
        assert!(checked.is_clean(), "{:?}", checked.findings);
        println!("Took {name} and verified {} bytes", checked.bytes);
    }
    let changes = fs::metadata(path("tuesday").join(CHANGES_FILE))?.len();
    assert!(changes > 0 && changes < RAM_BYTES as u64 / 2, "a differential has what changed, and no more");

    let chain = SnapshotChain::open(names.map(path), &SnapshotLimits::default())?;
    apply(&chain, &path("whole"), &SnapshotLimits::default())?;
    let restored = restore(&path("whole"))?;
    restored.resume();
    restored.check();
    println!("Applied all three: a VM made of them goes on and finds each page as it had left it");

    let file = OpenOptions::new().write(true).open(path("monday").join(CHANGES_FILE))?;
    file.write_all_at(b"!", 5000)?;
    let checked = verify(&path("monday"), &SnapshotLimits::default())?;
    assert_eq!(checked.findings.len(), 1);
    println!("One byte altered: {}", checked.findings[0]);
    Ok(())
}
