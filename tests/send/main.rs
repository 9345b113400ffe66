// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The sender against a receiver that is not ours: what goes over the wire, and what is left when it breaks off.

#![expect(clippy::unwrap_used, clippy::cast_possible_truncation, reason = "tests, on a 64-bit host")]

#[path = "../transfer/bare_tls.rs"]
#[expect(dead_code, reason = "the source is ours")]
mod bare_tls;
mod both_ends;
mod cancelling;
#[path = "../transfer/certificates.rs"]
#[expect(dead_code, reason = "certificates that fail are for the tests of TLS")]
mod certificates;
mod devices;
mod failures;
#[path = "../frames/mod.rs"]
#[expect(dead_code, reason = "other tests use the rest")]
mod frames;
mod initial_bytes;
mod logs;
mod moving;
mod pacing;
mod peer;
mod pieces;
mod plugging;
mod polled;
mod replugging;
#[path = "../../integration/src/skip.rs"]
#[expect(dead_code, unreachable_pub, reason = "other crates' tests use the rest")]
mod skip;
mod skipping;
mod sources;
mod spreading;
mod stopping;
mod stream_ends;
mod stream_faults;
mod stream_limits;
mod stream_order;
mod stream_policy;
mod streams;
mod userfault;
mod vm;

use peer::{Fault, Peer};
use vfio_migration::device::Device;
use vfio_migration::transfer::{SendError, SendOptions, Sender, Sent};
use vm::{FakeDevice, FakeVm, Log, Machine};

fn options(peer: &Peer) -> SendOptions {
    SendOptions::new(peer.url.clone()).chunk_bytes(256 << 10).unwrap()
}

fn send(peer: &Peer, vm: &mut FakeVm, machine: &Machine) -> Result<Sent, SendError> {
    Sender::new(options(peer)).send(vm, &machine.tracker, &machine.devices)
}

/// A second attempt, to a fresh receiver, that has to bring everything.
fn assert_retry_loses_nothing(vm: &mut FakeVm, machine: &Machine) {
    assert!(vm.is_running(), "VM runs on after a failure");
    let peer = Peer::unix(Fault::None);
    send(&peer, vm, machine).unwrap();
    let (transcript, outcome) = peer.end();
    outcome.unwrap();
    transcript.assert_equals(vm);
}

/// A device whose log is the VM's.
fn with_device(vm: &FakeVm, adjust: impl FnOnce(&mut FakeDevice)) -> Machine {
    let mut io = FakeDevice::new(&vm.log, b"sixteen bytes, a");
    adjust(&mut io);
    let device = Device::new("net0", Box::new(io));
    vm.machine().with_device(device)
}

fn log_of(log: &Log) -> Vec<String> {
    log.lock().unwrap().clone()
}
