// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Our sender and our receiver.

use std::sync::Arc;
use std::thread;
use std::time::Duration;

use vfio_migration::transfer::connection::Listener;
use vfio_migration::transfer::limits::{ConnectionCount, PeerLimits};
use vfio_migration::transfer::receive::{
    Completion, Destination, GuestPages, PageStore, ReceiveError, Received, Receiver,
};
use vfio_migration::transfer::tls::{ClientTls, ServerTls};
use vfio_migration::transfer::url::Url;
use vfio_migration::transfer::{SendError, SendOptions, Sender, Sent, SourceVm};
use vfio_migration::vm::VmError;

use crate::certificates::Files;
use crate::vm::{FakeVm, Memory, PAGES, empty_memory, read_page};

/// A VMM that takes the pages in and answers Complete as it is told.
pub(crate) struct Vmm {
    memory: Arc<Memory>,
    state: Vec<u8>,
    runs_on_complete: bool,
}

impl Vmm {
    pub(crate) fn new(runs_on_complete: bool) -> Self {
        Self { memory: Arc::new(empty_memory()), state: Vec::new(), runs_on_complete }
    }

    pub(crate) fn assert_equals(&self, vm: &FakeVm) {
        let wrong = (0..PAGES).filter(|&page| read_page(&self.memory, page) != vm.page(page));
        assert_eq!(wrong.collect::<Vec<_>>(), Vec::<u64>::new(), "pages that differ");
    }
}

impl Destination for Vmm {
    fn config(&mut self, _json: &[u8]) -> Result<Arc<dyn PageStore>, VmError> {
        Ok(Arc::new(GuestPages::new(Arc::clone(&self.memory))?))
    }

    fn state(&mut self, json: Vec<u8>) -> Result<(), VmError> {
        self.state = json;
        Ok(())
    }

    fn complete(&mut self, _paused: bool) -> Result<Completion, VmError> {
        if self.runs_on_complete { Ok(Completion::Moved) } else { Err("kept, not run".into()) }
    }

    fn abandoned(&mut self) {}
}

/// Moves a busy VM; the receiver runs beside the sender.
pub(crate) fn moves(
    vm: &mut FakeVm,
    vmm: &mut Vmm,
    url: &Url,
    connections: u64,
    tls: Option<(ClientTls, ServerTls)>,
) -> (Result<Sent, SendError>, Result<Received, ReceiveError>) {
    let listener = Listener::bind(url).unwrap();
    let options = SendOptions::new(listener.url().clone())
        .connections(ConnectionCount::new(connections).unwrap())
        .unwrap()
        .chunk_bytes(128 << 10)
        .unwrap()
        .downtime(Duration::from_millis(20))
        .max_rounds(Some(10))
        .timeout_strategy(vfio_migration::precopy::TimeoutStrategy::Ignore);
    let (client, server) = tls.unzip();
    let options = options.tls(client);
    let machine = vm.machine();
    thread::scope(|scope| {
        let receiver = scope.spawn(|| Receiver::new(PeerLimits::default(), server).receive(&listener, vmm));
        let sent = Sender::new(options).send(vm, &machine.tracker, &machine.devices);
        (sent, receiver.join().unwrap())
    })
}

fn a_busy_vm_arrives(url: &Url, connections: u64, tls: Option<(ClientTls, ServerTls)>) {
    let (mut vm, mut vmm) = (FakeVm::new(20), Vmm::new(true));
    let encrypted = tls.is_some();
    let (sent, received) = moves(&mut vm, &mut vmm, url, connections, tls);
    let (sent, received) = (sent.unwrap(), received.unwrap());
    vmm.assert_equals(&vm);
    assert!(vmm.state.starts_with(b"{"), "the State is there");
    assert!(!vm.is_running());
    assert!(received.confirmed && !received.paused);
    if !encrypted {
        let roles = if connections > 1 { 2 * connections } else { 0 };
        assert_eq!(sent.progress.sent_bytes + roles, received.received_bytes);
    }
}

pub(crate) fn loopback() -> Url {
    Url::tcp("127.0.0.1", 0).unwrap()
}

#[test]
fn a_busy_vm_arrives_over_unix() {
    let directory = tempfile::tempdir().unwrap();
    a_busy_vm_arrives(&Url::unix(directory.path().join("socket")).unwrap(), 1, None);
}

#[test]
fn a_busy_vm_arrives_over_one_and_over_four_tcp_connections() {
    for connections in [1, 4] {
        a_busy_vm_arrives(&loopback(), connections, None);
    }
}

#[test]
fn a_busy_vm_arrives_over_tls() {
    for connections in [1, 4] {
        let files = Files::good();
        a_busy_vm_arrives(&loopback(), connections, Some((files.client(), files.server())));
    }
}

#[test]
fn a_receiver_that_keeps_a_checkpoint_has_every_page_and_the_source_runs_on() {
    let (mut vm, mut vmm) = (FakeVm::new(20), Vmm::new(false));
    let (sent, received) = moves(&mut vm, &mut vmm, &loopback(), 1, None);
    assert_eq!(sent.unwrap_err().source_vm(), SourceVm::AsBefore);
    assert!(received.is_err());
    assert!(vm.makes_progress());
    let wrong = (0..PAGES).filter(|&page| read_page(&vmm.memory, page) == vec![0; 4096]);
    assert_eq!(wrong.count(), 0, "every page arrived");
}

#[test]
fn a_receiver_stopped_at_any_time_leaves_a_vm_that_can_be_sent_again() {
    let mut vm = FakeVm::new(20);
    for delay_ms in [0, 5, 10, 20, 40] {
        let listener = Listener::bind(&loopback()).unwrap();
        // A receiver that is stopped before it accepts leaves this connection without an answer.
        let limits = PeerLimits { handshake_timeout: Duration::from_secs(1), ..PeerLimits::default() };
        let options = SendOptions::new(listener.url().clone()).limits(limits);
        let options = options.rate_limit(Some(100 << 20)).unwrap();
        let machine = vm.machine();
        let mut vmm = Vmm::new(true);
        let receiver = Receiver::new(PeerLimits::default(), None);
        let handle = receiver.handle();
        let sent = thread::scope(|scope| {
            let receiving = scope.spawn(|| receiver.receive(&listener, &mut vmm));
            scope.spawn(|| {
                thread::sleep(Duration::from_millis(delay_ms));
                let _too_late = handle.stop();
            });
            let sent = Sender::new(options).send(&mut vm, &machine.tracker, &machine.devices);
            let _stopped = receiving.join().unwrap();
            sent
        });
        match sent.as_ref().map_err(SendError::source_vm) {
            Err(SourceVm::AsBefore) => assert!(vm.is_running()),
            Err(SourceVm::PausedForSafety) | Ok(_) => assert!(!vm.is_running()),
            Err(SourceVm::Stuck) => panic!("{sent:?}"),
        }
        vfio_migration::vm::Vm::resume(&mut vm).unwrap();
    }
    let mut vmm = Vmm::new(true);
    let (sent, received) = moves(&mut vm, &mut vmm, &loopback(), 4, None);
    sent.unwrap();
    received.unwrap();
    vmm.assert_equals(&vm);
}
