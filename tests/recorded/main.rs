// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What our sender and our receiver say to each other, written down on the way and read by a decoder that is not ours.

#![expect(clippy::unwrap_used, clippy::cast_possible_truncation, reason = "tests, on a 64-bit host")]

#[path = "../transfer/bare_tls.rs"]
mod bare_tls;
#[path = "../transfer/certificates.rs"]
#[expect(dead_code, reason = "certificates that fail are for the tests of TLS")]
mod certificates;
mod encrypted;
#[path = "../frames/mod.rs"]
#[expect(dead_code, reason = "sources in bytes are for the other tests")]
mod frames;
mod relay;
#[path = "../../integration/src/skip.rs"]
#[expect(dead_code, unreachable_pub, reason = "other crates' tests use the rest")]
mod skip;
mod stored;
#[path = "../send/vm.rs"]
#[expect(dead_code, reason = "sources and devices that fail are for the tests of the sender")]
mod vm;
mod wire;

use std::sync::Arc;
use std::thread;
use std::time::Duration;

use certificates::Files;
use frames::{ABANDON, COMPLETE, COMPLETE_PAUSED, CONFIG, ERROR, MEMORY, OK, START, STATE};
use relay::{Relay, Route};
use tempfile::TempDir;
use vfio_migration::precopy::TimeoutStrategy;
use vfio_migration::transfer::connection::Listener;
use vfio_migration::transfer::limits::{ConnectionCount, PeerLimits};
use vfio_migration::transfer::receive::{
    Completion, Destination, GuestPages, PageStore, ReceiveError, Received, Receiver,
};
use vfio_migration::transfer::tls::{ClientTls, ServerTls};
use vfio_migration::transfer::url::{Endpoint, Url};
use vfio_migration::transfer::{SendError, SendOptions, Sender, Sent};
use vfio_migration::vm::VmError;
use vm::{FakeVm, HIGH, LOW, Memory, PAGE, PAGES, empty_memory, page_gpa, read_page};
use wire::Exchange;

/// A VMM that keeps what it is told, and refuses one thing if it has to.
struct Vmm {
    memory: Arc<Memory>,
    config: Vec<u8>,
    state: Vec<u8>,
    paused: Option<bool>,
    refuses: u16,
}

impl Vmm {
    fn refusing(command: u16) -> Self {
        let memory = Arc::new(empty_memory());
        Self { memory, config: Vec::new(), state: Vec::new(), paused: None, refuses: command }
    }

    fn new() -> Self {
        Self::refusing(0)
    }

    fn take(&self, command: u16) -> Result<(), VmError> {
        if command == self.refuses { Err("not today".into()) } else { Ok(()) }
    }
}

impl Destination for Vmm {
    fn config(&mut self, json: &[u8]) -> Result<Arc<dyn PageStore>, VmError> {
        self.config = json.to_vec();
        self.take(CONFIG)?;
        Ok(Arc::new(GuestPages::new(Arc::clone(&self.memory))?))
    }

    fn state(&mut self, json: Vec<u8>) -> Result<(), VmError> {
        self.state = json;
        self.take(STATE)
    }

    fn complete(&mut self, paused: bool) -> Result<Completion, VmError> {
        self.paused = Some(paused);
        self.take(COMPLETE)?;
        Ok(Completion::Moved)
    }

    fn abandoned(&mut self) {}
}

/// A way from a source to a receiver, past a relay.
pub(crate) struct Way {
    pub(crate) listener: Listener,
    /// Where the source goes.
    pub(crate) url: Url,
    pub(crate) relay: Relay,
    connections: usize,
    tls: Option<(ClientTls, ServerTls)>,
    _directory: TempDir,
}

impl Way {
    pub(crate) fn unix() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let (near, far) = (directory.path().join("near"), directory.path().join("far"));
        let listener = Listener::bind(&Url::unix(&far).unwrap()).unwrap();
        let relay = Relay::start(Route::unix(&near, &far));
        let url = Url::unix(near).unwrap();
        Self { listener, url, relay, connections: 1, tls: None, _directory: directory }
    }

    pub(crate) fn tcp(connections: usize) -> Self {
        Self::over_tcp(connections, None)
    }

    fn tls(connections: usize) -> Self {
        Self::over_tcp(connections, Some(Files::good()))
    }

    fn over_tcp(connections: usize, files: Option<Files>) -> Self {
        let listener = Listener::bind(&Url::tcp("127.0.0.1", 0).unwrap()).unwrap();
        let Endpoint::Tcp { port, .. } = listener.url().endpoint() else { unreachable!() };
        let (route, port) = match &files {
            Some(files) => Route::wrapped(port, encrypted::between(files)),
            None => Route::tcp(port),
        };
        let url = Url::tcp("127.0.0.1", port).unwrap();
        let tls = files.map(|files| (files.client(), files.server()));
        let directory = tempfile::tempdir().unwrap();
        Self { listener, url, relay: Relay::start(route), connections, tls, _directory: directory }
    }

    /// Additional connections that a source opens on the way.
    fn lanes(&self) -> usize {
        if self.connections == 1 { 0 } else { self.connections }
    }

    /// Options of a source that goes this way.
    pub(crate) fn options(&self) -> SendOptions {
        SendOptions::new(self.url.clone())
            .connections(ConnectionCount::new(self.connections as u64).unwrap())
            .unwrap()
            .tls(self.tls.as_ref().map(|(client, _)| client.clone()))
    }

    /// Receives into `destination` while `source` does what it does, and returns what both came to and what went over the way.
    pub(crate) fn go<T: Send>(
        self,
        destination: &mut (dyn Destination + Send),
        source: impl FnOnce() -> T + Send,
    ) -> (T, Result<Received, ReceiveError>, Exchange) {
        let Self { listener, relay, tls, .. } = self;
        let receiver = Receiver::new(PeerLimits::default(), tls.map(|(_, server)| server));
        let (sent, received) = thread::scope(|scope| {
            let receiving = scope.spawn(|| receiver.receive(&listener, destination));
            (source(), receiving.join().unwrap())
        });
        (sent, received, Exchange::decode(&relay.end()))
    }
}

/// Moves `vm` to `vmm`, with options that make passes many and chunks small.
fn moved(
    way: Way,
    vm: &mut FakeVm,
    vmm: &mut Vmm,
    set: impl FnOnce(SendOptions) -> SendOptions,
) -> (Result<Sent, SendError>, Result<Received, ReceiveError>, Exchange) {
    let options = way
        .options()
        .chunk_bytes(256 << 10)
        .unwrap()
        .downtime(Duration::from_millis(2))
        .max_rounds(Some(4))
        .timeout_strategy(TimeoutStrategy::Ignore);
    let options = set(options);
    let machine = vm.machine();
    way.go(vmm, || Sender::new(options).send(vm, &machine.tracker, &machine.devices))
}

/// Checks that the pages that went over the wire, put where their tables say, are the VM's memory.
fn assert_memory_of(exchange: &Exchange, vm: &FakeVm) {
    let mut page = 0;
    for (start, length) in [LOW, HIGH] {
        let mut image = vec![0; length as usize];
        exchange.replay(start, &mut image);
        for bytes in image.chunks_exact(PAGE as usize) {
            assert!(bytes == vm.page(page), "page {page} differs");
            page += 1;
        }
    }
    assert_eq!(page, PAGES);
}

fn a_running_vm_is_recorded(way: Way) {
    let (lanes, encrypted) = (way.lanes(), way.tls.is_some());
    let (mut vm, mut vmm) = (FakeVm::new(20), Vmm::new());
    let (sent, received, exchange) = moved(way, &mut vm, &mut vmm, |options| options);
    let (sent, received) = (sent.unwrap(), received.unwrap());
    exchange.assert_whole(lanes, COMPLETE);
    let main = exchange.main();
    assert!(main.statuses().iter().all(|&status| status == OK));
    assert_eq!(main.sole(START).headers, [0; 6]);
    assert_eq!(main.sole(CONFIG).payload, br#"{"vm_config":{"memory":{}}}"#);
    assert_eq!((&main.sole(CONFIG).payload, &main.sole(STATE).payload), (&vmm.config, &vmm.state));
    assert_memory_of(&exchange, &vm);
    assert!((0..PAGES).all(|page| read_page(&vmm.memory, page) == vm.page(page)));

    // All passes over the connections meant for them, but for the page that capturing the state wrote.
    let [.., rest, state, _complete] = &main.requests[..] else { panic!("{:?}", main.commands()) };
    assert_eq!((rest.command, state.command), (MEMORY, STATE));
    assert_eq!(rest.table, [(page_gpa(3), PAGE)]);
    let answers = exchange.connections.iter().map(|connection| connection.answers.len()).sum::<usize>();
    let others = [START, CONFIG, STATE, COMPLETE].len();
    assert_eq!(answers as u64, received.memory_messages + others as u64);
    let first_pass: u64 = PAGES * PAGE;
    let bytes = exchange.memory().iter().map(|request| request.pages.len() as u64).sum::<u64>();
    assert_eq!(bytes, received.memory_bytes);
    assert!(bytes > first_pass && sent.progress.round > 1);
    if encrypted {
        exchange.assert_one_chunk_at_a_time();
    }
}

#[test]
fn a_running_vm_over_unix() {
    a_running_vm_is_recorded(Way::unix());
}

#[test]
fn a_running_vm_over_tcp() {
    a_running_vm_is_recorded(Way::tcp(1));
}

#[test]
fn a_running_vm_over_four_tcp_connections() {
    a_running_vm_is_recorded(Way::tcp(4));
}

#[test]
fn a_running_vm_over_one_and_over_four_tls_connections() {
    a_running_vm_is_recorded(Way::tls(1));
    a_running_vm_is_recorded(Way::tls(4));
}

#[test]
fn a_paused_vm_is_to_stay_paused() {
    for way in [Way::unix(), Way::tcp(4)] {
        let lanes = way.lanes();
        let (mut vm, mut vmm) = (FakeVm::new(20), Vmm::new());
        vfio_migration::vm::Vm::pause(&mut vm).unwrap();
        let (sent, received, exchange) =
            moved(way, &mut vm, &mut vmm, |options| options.complete_paused(true));
        sent.unwrap();
        assert!(received.unwrap().paused && vmm.paused == Some(true));
        exchange.assert_whole(lanes, COMPLETE_PAUSED);
        assert_memory_of(&exchange, &vm);
    }
}

#[test]
fn a_complete_that_is_refused_is_the_last_word() {
    for way in [Way::unix(), Way::tcp(4)] {
        let lanes = way.lanes();
        let (mut vm, mut vmm) = (FakeVm::new(20), Vmm::refusing(COMPLETE));
        let (sent, received, exchange) = moved(way, &mut vm, &mut vmm, |options| options);
        assert!(matches!(sent, Err(SendError::Peer { .. })), "{sent:?}");
        received.unwrap_err();
        assert!(vm.makes_progress(), "the source's VM runs on");
        exchange.assert_whole(lanes, COMPLETE);
        assert_eq!(exchange.main().statuses().last(), Some(&ERROR));
        assert_eq!(exchange.main().sole(STATE).payload, vmm.state);
    }
}

#[test]
fn a_config_or_state_that_is_refused_is_the_last_word() {
    for (refused, last) in [(CONFIG, &[START, CONFIG][..]), (STATE, &[MEMORY, STATE])] {
        for way in [Way::unix(), Way::tcp(4)] {
            let (mut vm, mut vmm) = (FakeVm::new(20), Vmm::refusing(refused));
            let (sent, received, exchange) = moved(way, &mut vm, &mut vmm, |options| options);
            sent.unwrap_err();
            received.unwrap_err();
            assert!(exchange.main().commands().ends_with(last), "{:?}", exchange.main().commands());
            assert_eq!(exchange.main().statuses().last(), Some(&ERROR));
            assert!(vm.makes_progress());
        }
    }
}

#[test]
fn a_migration_that_is_given_up_ends_with_abandon() {
    for way in [Way::unix(), Way::tcp(1), Way::tcp(4)] {
        let (mut vm, mut vmm) = (FakeVm::new(20), Vmm::new());
        let options = way.options().chunk_bytes(64 << 10).unwrap().rate_limit(Some(4 << 20)).unwrap();
        let sender = Sender::new(options);
        let canceller = sender.handle();
        let machine = vm.machine();
        let (sent, received, exchange) = way.go(&mut vmm, || {
            thread::scope(|scope| {
                let sending = scope.spawn(|| sender.send(&mut vm, &machine.tracker, &machine.devices));
                while canceller.progress().acknowledged_bytes < 256 << 10 {
                    thread::sleep(Duration::from_millis(5));
                }
                assert!(canceller.cancel());
                sending.join().unwrap()
            })
        });
        assert!(matches!(sent, Err(SendError::Cancelled)), "{sent:?}");
        assert!(matches!(received, Err(ReceiveError::Abandoned { .. })), "{received:?}");
        let main = exchange.main();
        assert_eq!(main.commands().last(), Some(&ABANDON));
        assert!(main.statuses().iter().all(|&status| status == OK));
        assert!(!exchange.memory().is_empty() && !main.commands().contains(&STATE));
    }
}
