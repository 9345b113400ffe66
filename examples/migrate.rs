// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A VMM that migrates: `cargo run --example migrate`.
//!
//! Source and destination are in this process, a UNIX socket between them. The VM's vCPU is a thread that writes through
//! vm-memory, so [`GuestMemoryLog`] sees its writes. A VMM over KVM adds a `KvmLog`, and a source for each pass-through device.
#![expect(clippy::print_stdout, reason = "an example tells what it does")]

mod machine;

use std::error::Error;
use std::sync::{Arc, Mutex};
use std::thread;

use serde_json::{Value, json};
use vfio_migration::device::DeviceSet;
use vfio_migration::layout::Layout;
use vfio_migration::source::GuestMemoryLog;
use vfio_migration::tracker::{Tracker, VmMappings};
use vfio_migration::transfer::connection::Listener;
use vfio_migration::transfer::limits::PeerLimits;
use vfio_migration::transfer::receive::{Completion, Destination, GuestPages, PageStore, Receiver};
use vfio_migration::transfer::url::Url;
use vfio_migration::transfer::{SendError, SendOptions, Sender, Sent, SourceVm};
use vfio_migration::vm::{Backing, Captured, Vm, VmError};
use vm_migration::Snapshot;

use machine::{Machine, Memory, RAM_BYTES};

/// The VM as its sender sees it.
struct Source(Machine);

impl Vm for Source {
    type Memory = Memory;

    fn memory(&self) -> Arc<Memory> {
        Arc::clone(&self.0.memory)
    }

    fn backing(&self) -> Backing {
        Backing::of_mmap(&self.0.memory)
    }

    fn config(&mut self) -> Result<Vec<u8>, VmError> {
        Ok(serde_json::to_vec(&json!({ "ram_bytes": RAM_BYTES }))?)
    }

    fn pause(&mut self) -> Result<(), VmError> {
        self.0.pause();
        Ok(())
    }

    fn resume(&mut self) -> Result<(), VmError> {
        self.0.resume();
        Ok(())
    }

    fn state(&mut self, devices: Snapshot) -> Result<Captured, VmError> {
        let mut state = Snapshot::new_from_state(&self.0.save())?;
        state.add_snapshot("devices".to_owned(), devices);
        Ok(state.into())
    }

    fn can_throttle(&self) -> bool {
        false
    }

    fn throttle(&mut self, _percent: u8) {}
}

/// A VMM that waits for a VM.
#[derive(Default)]
struct Arrival {
    machine: Option<Machine>,
}

impl Arrival {
    fn machine(&self) -> Result<&Machine, VmError> {
        Ok(self.machine.as_ref().ok_or("Config comes first")?)
    }
}

impl Destination for Arrival {
    fn config(&mut self, json: &[u8]) -> Result<Arc<dyn PageStore>, VmError> {
        let config: Value = serde_json::from_slice(json)?;
        if config["ram_bytes"] != RAM_BYTES {
            return Err("VM has other RAM than this VMM offers".into());
        }
        let machine = self.machine.insert(Machine::new()?);
        let backing = Backing::of_mmap(&machine.memory);
        Ok(Arc::new(GuestPages::new(Arc::clone(&machine.memory))?.backed_by(backing)))
    }

    fn state(&mut self, json: Vec<u8>) -> Result<(), VmError> {
        let state: Snapshot = serde_json::from_slice(&json)?;
        self.machine()?.restore(state.to_state()?);
        Ok(())
    }

    fn complete(&mut self, paused: bool) -> Result<Completion, VmError> {
        if !paused {
            self.machine()?.resume();
        }
        Ok(Completion::Moved)
    }

    fn abandoned(&mut self) {
        self.machine = None;
    }
}

/// Sends the VM. Whatever happens, afterwards it runs in one place at most.
fn send(source: &mut Source, tracker: &Mutex<Tracker>, url: Url) -> Result<Sent, SendError> {
    let devices = Mutex::new(DeviceSet::default());
    let sent = Sender::new(SendOptions::new(url)).send(source, tracker, &devices);
    if let Err(error) = &sent {
        let left = match error.source_vm() {
            SourceVm::AsBefore => "runs on here, and may be sent again",
            // No VMM may resume it on its own: an operator, or whoever manages both hosts, looks there first.
            SourceVm::PausedForSafety => "stays paused here, because it may be running there",
            SourceVm::Stuck => "cannot be set going again: resume it by hand, or end it",
        };
        println!("{error}: the VM {left}");
    }
    sent
}

fn main() -> Result<(), Box<dyn Error + Send + Sync>> {
    let directory = tempfile::tempdir()?;
    let url = Url::unix(directory.path().join("vm.sock"))?;
    let mut source = Source(Machine::new()?);
    source.0.resume();
    source.0.work(1000);
    let memory = Arc::clone(&source.0.memory);
    let tracker = Tracker::builder(Layout::from_guest_memory(&*memory)?)
        .mappings({
            let memory = Arc::clone(&memory);
            move || VmMappings::of_memory(&*memory)
        })
        .source(Box::new(GuestMemoryLog::new(memory)))
        .build()?;
    let tracker = Mutex::new(tracker);

    let refused = send(&mut source, &tracker, url.clone()).expect_err("nobody listens yet");
    assert_eq!(refused.source_vm(), SourceVm::AsBefore);
    source.0.work(10);

    let listener = Listener::bind(&url)?;
    let receiver = thread::spawn(move || {
        let mut arrival = Arrival::default();
        Receiver::new(PeerLimits::default(), None).receive(&listener, &mut arrival).map(|_| arrival)
    });
    let sent = send(&mut source, &tracker, url)?;
    let arrival = receiver.join().expect("the receiver does not panic")?;
    let stopped_at = source.0.save();
    arrival.machine()?.check();
    assert_eq!(source.0.save(), stopped_at, "it runs at the destination alone");
    println!(
        "Moved in {} rounds with {:.1} ms of downtime; {} of {RAM_BYTES} bytes were never written and left out",
        sent.progress.round,
        sent.downtime.as_secs_f64() * 1e3,
        sent.progress.skipped_hole_bytes
    );
    println!("The vCPU went on at step {stopped_at} and found each page as it had left it");
    Ok(())
}
