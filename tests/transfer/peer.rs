// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A source that says what it is told to, and a destination that keeps what it gets.

use std::error::Error;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use vfio_migration::transfer::connection::{Connection, Listener};
use vfio_migration::transfer::limits::PeerLimits;
use vfio_migration::transfer::receive::{
    Completion, Destination, GuestPages, PageStore, ReceiveError, Received, Receiver, ReceiverHandle,
};
use vfio_migration::transfer::url::Endpoint;
use vfio_migration::vm::VmError;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use crate::frames::{COMPLETE, CONFIG, FOR_MEMORY, START, STATE, message};

/// Bytes of RAM of the VM that is received, in two regions with a hole between them.
pub(crate) const REGION: u64 = 1 << 20;
pub(crate) const HIGH: u64 = 4 << 30;

/// Makes `connection` an additional one.
pub(crate) fn announce(connection: &mut Peer) {
    connection.send(&FOR_MEMORY);
}

/// Begins a migration on a main connection and one additional one.
pub(crate) fn begun_on_two(listener: &Listener) -> (Peer, Peer) {
    let mut main = Peer::to(listener);
    main.begin();
    let mut additional = Peer::to(listener);
    announce(&mut additional);
    (main, additional)
}

/// The whole of an error, its sources after it.
pub(crate) fn text_of(error: &dyn Error) -> String {
    let causes = std::iter::successors(error.source(), |&error| error.source());
    causes.fold(error.to_string(), |text, cause| format!("{text}: {cause}"))
}

/// What can carry a raw source's bytes.
pub(crate) trait Wire: Read + Write + Send {}

impl<T: Read + Write + Send> Wire for T {}

/// A source on one connection.
pub(crate) struct Peer(pub(crate) Box<dyn Wire>);

impl Peer {
    /// Connects a plain socket to `listener`.
    pub(crate) fn to(listener: &Listener) -> Self {
        let wire: Box<dyn Wire> = match listener.url().endpoint() {
            Endpoint::Unix(path) => Box::new(UnixStream::connect(path).unwrap()),
            Endpoint::Tcp { host, port } => Box::new(TcpStream::connect((host, port)).unwrap()),
        };
        Self(wire)
    }

    pub(crate) fn send(&mut self, bytes: &[u8]) {
        self.0.write_all(bytes).unwrap();
        self.0.flush().unwrap();
    }

    /// Reads one answer: its status, or `None` where the connection ended.
    pub(crate) fn answer(&mut self) -> Option<u16> {
        let mut answer = [0; 16];
        self.0.read_exact(&mut answer).ok()?;
        assert_eq!(answer[2..], [0; 14], "a plain source gets a plain answer");
        Some(u16::from_le_bytes([answer[0], answer[1]]))
    }

    /// Sends a message and reads its answer.
    pub(crate) fn ask(&mut self, message: &[u8]) -> Option<u16> {
        self.send(message);
        self.answer()
    }

    /// Sends messages that are all answered with Ok.
    pub(crate) fn say(&mut self, messages: &[Vec<u8>]) {
        for (index, message) in messages.iter().enumerate() {
            assert_eq!(self.ask(message), Some(1), "answer {index}");
        }
    }

    /// Begins a migration, up to where memory may come.
    pub(crate) fn begin(&mut self) {
        self.say(&[message(START, &[]), message(CONFIG, b"{}")]);
    }

    /// Ends a migration after its memory.
    pub(crate) fn end(&mut self) {
        self.say(&[message(STATE, b"{}"), message(COMPLETE, &[])]);
    }
}

/// A VMM that keeps what it gets and fails where it is told to.
pub(crate) struct Vmm {
    pub(crate) memory: Arc<GuestMemoryMmap>,
    pub(crate) calls: Vec<String>,
    pub(crate) fails_at: &'static str,
    pub(crate) store: Option<Arc<dyn PageStore>>,
}

impl Vmm {
    pub(crate) fn new() -> Self {
        let region = usize::try_from(REGION).unwrap();
        let memory =
            GuestMemoryMmap::from_ranges(&[(GuestAddress(0), region), (GuestAddress(HIGH), region)]).unwrap();
        Self { memory: Arc::new(memory), calls: Vec::new(), fails_at: "", store: None }
    }

    pub(crate) fn failing_at(call: &'static str) -> Self {
        Self { fails_at: call, ..Self::new() }
    }

    pub(crate) fn bytes(&self, gpa: u64, length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        self.memory.read_slice(&mut bytes, GuestAddress(gpa)).unwrap();
        bytes
    }

    fn call(&mut self, name: &str, text: &str) -> Result<(), VmError> {
        self.calls.push(format!("{name} {text}").trim_end().to_owned());
        if name == self.fails_at { Err(format!("no {name} today").into()) } else { Ok(()) }
    }
}

impl Destination for Vmm {
    fn config(&mut self, json: &[u8]) -> Result<Arc<dyn PageStore>, VmError> {
        self.call("config", std::str::from_utf8(json)?)?;
        let own = || GuestPages::new(Arc::clone(&self.memory)).map(|pages| Arc::new(pages) as _);
        self.store.clone().map_or_else(|| Ok(own()?), Ok)
    }

    fn state(&mut self, json: Vec<u8>) -> Result<(), VmError> {
        self.call("state", std::str::from_utf8(&json)?)
    }

    fn complete(&mut self, paused: bool) -> Result<Completion, VmError> {
        self.call("complete", if paused { "paused" } else { "" }).map(|()| Completion::Moved)
    }

    fn abandoned(&mut self) {
        self.calls.push("abandoned".into());
    }
}

/// PeerLimits under which nothing that goes wrong takes long.
pub(crate) fn quick() -> PeerLimits {
    PeerLimits { linger: Duration::from_millis(100), ..PeerLimits::default() }
}

/// Receives from what `source` does on the other end of a socket pair.
pub(crate) fn receive_on_pair<T: Send>(
    limits: PeerLimits,
    vmm: &mut dyn Destination,
    source: impl FnOnce(Peer) -> T + Send,
) -> (Result<Received, ReceiveError>, T) {
    let (near, far) = UnixStream::pair().unwrap();
    let connection = Connection::from_unix(near, &limits).unwrap();
    thread::scope(|scope| {
        let source = scope.spawn(|| source(Peer(Box::new(far))));
        let received = Receiver::new(limits, None).receive_from(connection, vmm);
        (received, source.join().unwrap())
    })
}

/// Receives from what `source` does with a listener on TCP.
pub(crate) fn receive_on_tcp<T: Send>(
    limits: PeerLimits,
    vmm: &mut Vmm,
    source: impl FnOnce(&Listener) -> T + Send,
) -> (Result<Received, ReceiveError>, T) {
    let listener = Listener::bind(&"tcp:127.0.0.1:0".parse().unwrap()).unwrap();
    let receiver = Receiver::new(limits, None);
    let ending = StopOnPanic(receiver.handle());
    thread::scope(|scope| {
        let source = scope.spawn(|| {
            let _ending = ending;
            source(&listener)
        });
        let received = receiver.receive(&listener, vmm);
        (received, source.join().unwrap())
    })
}

/// Ends a receiver that would wait for a source which has panicked.
struct StopOnPanic(ReceiverHandle);

impl Drop for StopOnPanic {
    fn drop(&mut self) {
        if thread::panicking() {
            let _it_may_be_too_late = self.0.stop();
        }
    }
}
