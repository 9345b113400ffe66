// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A source that says what it is told to, in bytes spelled out here, and a destination that keeps what it gets.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use vfio_migration::transfer::connection::{Connection, Listener};
use vfio_migration::transfer::limits::PeerLimits;
use vfio_migration::transfer::receive::{
    Completion, Destination, GuestPages, PageStore, ReceiveError, Received, Receiver,
};
use vfio_migration::transfer::url::Endpoint;
use vfio_migration::vm::VmError;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

pub(crate) const START: u16 = 1;
pub(crate) const CONFIG: u16 = 2;
pub(crate) const STATE: u16 = 3;
pub(crate) const MEMORY: u16 = 4;
pub(crate) const COMPLETE: u16 = 5;
pub(crate) const ABANDON: u16 = 6;
pub(crate) const MEMORY_FD: u16 = 7;
pub(crate) const COMPLETE_PAUSED: u16 = 8;
pub(crate) const PAGE_FAULT: u16 = 9;

/// Bytes of RAM of the VM that is received, in two regions with a hole between them.
pub(crate) const REGION: u64 = 1 << 20;
pub(crate) const HIGH: u64 = 4 << 30;

/// Encodes a request.
pub(crate) fn request(command: u16, length: u64) -> Vec<u8> {
    [&command.to_le_bytes()[..], &[0; 6], &length.to_le_bytes()].concat()
}

/// Encodes a request with its payload.
pub(crate) fn message(command: u16, payload: &[u8]) -> Vec<u8> {
    [&request(command, payload.len() as u64)[..], payload].concat()
}

/// Encodes a Memory with `ranges` and the bytes that go there.
pub(crate) fn memory(ranges: &[(u64, &[u8])]) -> Vec<u8> {
    let table: Vec<u8> = ranges
        .iter()
        .flat_map(|(gpa, bytes)| [gpa.to_le_bytes(), (bytes.len() as u64).to_le_bytes()])
        .flatten()
        .collect();
    let pages = ranges.iter().flat_map(|(_, bytes)| bytes.iter().copied());
    message(MEMORY, &table).into_iter().chain(pages).collect()
}

/// Makes `connection` an additional one.
pub(crate) fn announce(connection: &mut Peer) {
    connection.send(&[1, 0]);
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
    thread::scope(|scope| {
        let source = scope.spawn(|| source(&listener));
        let received = Receiver::new(limits, None).receive(&listener, vmm);
        (received, source.join().unwrap())
    })
}
