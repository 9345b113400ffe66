// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The receiving end of a migration: takes a VM from any source that speaks the protocol, and trusts none.
//!
//! ```text
//!                door ── hears every caller on a thread of its own
//!                 │  Start                      │ role, once Config is answered
//!                 ▼                             ▼
//!  main thread: session                    additional × 1..=128
//!   Start → Config → Memory* → State → Complete   Memory*
//!                      │         │                  │
//!                      └─────────┴── gate ──────────┘   Memory between Config and State; State when none is under way
//! ```
//!
//! Every request is answered with one Response. Whatever fails, anywhere, is answered with Error where a request waits for
//! an answer, ends the migration and comes back as one [`ReceiveError`].

mod additional;
mod door;
mod error;
mod gate;
mod message;
mod roster;
mod session;
mod store;
mod tables;
mod turned_away;

use std::sync::Arc;
use std::sync::mpsc::{Receiver as Callers, RecvTimeoutError, channel};
use std::thread;
use std::time::Instant;

use super::connection::{Connection, ConnectionError, Head, Listener};
use super::frame::Features;
use super::limits::Limits;
use super::tls::ServerTls;
use super::url::Endpoint;
use crate::threads::ThreadStart;
use crate::vm::VmError;
use door::Door;
use gate::Gate;
use session::{Context, Source, TICK};
use turned_away::TurnedAway;

pub use super::prefault::asks_for_prefault;
pub use error::{Part, ReceiveError, Step};
pub use roster::ReceiverHandle;
pub use store::{GuestPages, PageStore, Pages};

/// What becomes of a VM that is received: a VMM, or a directory on disk.
///
/// The calls come in this order, each at most once, on the thread that receives; an error ends the migration, and the
/// source hears of it.
pub trait Destination {
    /// Takes the JSON text of the Config, and tells where the pages go.
    ///
    /// # Errors
    /// This VM cannot be had here.
    fn config(&mut self, json: &[u8]) -> Result<Arc<dyn PageStore>, VmError>;

    /// Takes the JSON text of the State; every page is in place. Nobody else keeps the text, which may be large.
    ///
    /// # Errors
    /// The state does not fit.
    fn state(&mut self, json: Vec<u8>) -> Result<(), VmError>;

    /// Runs the VM, or keeps it paused as it was at its source. The source gives its VM up when this succeeds, and runs it
    /// again when it does not.
    ///
    /// # Errors
    /// The VM does not run here. A checkpoint that wants the source to run on fails here, with everything kept.
    fn complete(&mut self, paused: bool) -> Result<(), VmError>;

    /// Learns that the migration ended before [`Destination::complete`]: no more is coming.
    fn abandoned(&mut self);
}

/// A VM that was received.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Received {
    /// Bytes that came from the source's sockets, those of TLS included; no strangers', nor those of an additional connection
    /// that brought no memory.
    pub received_bytes: u64,
    /// Memory messages.
    pub memory_messages: u64,
    /// Ranges in their tables.
    pub memory_ranges: u64,
    /// Bytes of guest memory in them, repeated ones counted each time.
    pub memory_bytes: u64,
    /// Additional connections that brought memory.
    pub connections: usize,
    /// What a source of ours agreed to; `None` with any other.
    pub features: Option<Features>,
    /// Whether the VM stays paused.
    pub paused: bool,
    /// Whether the source was told that the VM is here. Where it was not, it stays paused, and the VM here is the one to
    /// keep.
    pub confirmed: bool,
}

/// Receives VMs.
///
/// ```
/// use std::sync::Arc;
/// use std::thread;
/// use vfio_migration::transfer::connection::{Connection, Listener};
/// use vfio_migration::transfer::frame::{Command, Request, Response};
/// use vfio_migration::transfer::limits::Limits;
/// use vfio_migration::transfer::receive::{Destination, GuestPages, PageStore, ReceiveError, Receiver};
/// use vfio_migration::vm::VmError;
/// use vm_memory::{GuestAddress, GuestMemoryMmap};
///
/// struct Vmm(Arc<GuestMemoryMmap>);
///
/// impl Destination for Vmm {
///     fn config(&mut self, _json: &[u8]) -> Result<Arc<dyn PageStore>, VmError> {
///         Ok(Arc::new(GuestPages::new(Arc::clone(&self.0))?))
///     }
///     fn state(&mut self, _json: Vec<u8>) -> Result<(), VmError> {
///         Ok(())
///     }
///     fn complete(&mut self, _paused: bool) -> Result<(), VmError> {
///         Ok(())
///     }
///     fn abandoned(&mut self) {}
/// }
///
/// let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 1 << 20)])?;
/// let listener = Listener::bind(&"tcp:127.0.0.1:0".parse()?)?;
/// let url = listener.url().clone();
/// let source = thread::spawn(move || {
///     use std::io::{Read, Write};
///     let mut connection = Connection::connect(&url, None, &Limits::default()).unwrap();
///     for request in [Request::start(), Request::new(Command::Abandon, 0)] {
///         connection.write_all(&request.to_bytes()).unwrap();
///         connection.read_exact(&mut [0; 16]).unwrap();
///     }
/// });
/// let received = Receiver::new(Limits::default(), None).receive(&listener, &mut Vmm(Arc::new(memory)));
/// assert!(matches!(received, Err(ReceiveError::Abandoned { .. })));
/// # source.join().unwrap();
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct Receiver {
    limits: Limits,
    tls: Option<ServerTls>,
    thread_start: ThreadStart,
    roster: ReceiverHandle,
}

impl Receiver {
    /// Makes a receiver that holds every peer to `limits`, and to TLS where `tls` is given.
    pub fn new(limits: Limits, tls: Option<ServerTls>) -> Self {
        Self { limits, tls, thread_start: ThreadStart::NOTHING, roster: ReceiverHandle::default() }
    }

    /// Has each thread of the receiver do `thread_start` first.
    #[must_use]
    pub fn thread_start(self, thread_start: ThreadStart) -> Self {
        Self { thread_start, ..self }
    }

    /// Returns what stops and measures the receiver from any thread.
    pub fn handle(&self) -> ReceiverHandle {
        self.roster.clone()
    }

    /// Waits on `listener` for a source, and receives its VM into `destination`.
    ///
    /// The first caller to say Start is the source, and its failure is the receiver's. All others are strangers, be they
    /// silent, slow, many or without a certificate: they are turned away and counted, and never keep the source out.
    ///
    /// # Errors
    /// No VM was received; `destination` was told, unless it is what failed to complete it. A process that could not open a
    /// file or start a thread for any source gets that error at once.
    pub fn receive(
        &self,
        listener: &Listener,
        destination: &mut dyn Destination,
    ) -> Result<Received, ReceiveError> {
        if let (Some(_), Endpoint::Unix(_)) = (&self.tls, listener.url().endpoint()) {
            return Err(ConnectionError::TlsOverUnix { url: listener.url().clone() }.into());
        }
        listener.check_descriptors().map_err(|source| ReceiveError::Descriptors { source })?;
        self.run(destination, |context, destination| {
            let turned_away = TurnedAway::default();
            let received = thread::scope(|scope| {
                let ending = Ending(context);
                let (first, callers) = channel();
                let door = Door::new(listener, self.tls.as_ref(), &turned_away, context);
                context.spawn(scope, "migration-door", move || door.keep(scope, &first))?;
                // And one to hear a caller on: else no source could ever be heard.
                context.spawn(scope, "migration-in", || {})?;
                let source = self.await_source(&callers, &turned_away, context)?;
                drop(callers);
                let received = session::receive(source, destination, context);
                drop(ending);
                received
            });
            received.map_err(|error| turned_away.explain(error))
        })
    }

    /// Receives a VM into `destination` from a source that is connected already, over that connection alone.
    ///
    /// # Errors
    /// As [`Receiver::receive`].
    pub fn receive_from(
        &self,
        mut connection: Connection,
        destination: &mut dyn Destination,
    ) -> Result<Received, ReceiveError> {
        self.run(destination, |context, destination| {
            let entry = self.roster.enter(&connection);
            let within = self.limits.idle_timeout;
            let first = match connection.await_head(within) {
                Ok(Head::Bytes(head)) => message::decode(head),
                Ok(Head::Silence) => return Err(ReceiveError::Silent { waited: within }),
                Ok(Head::End) => return Err(ReceiveError::Closed { step: Step::Nothing }),
                Err(source) => Err(ReceiveError::Read { part: Part::Head, source }),
            };
            match first {
                Ok(first) => session::receive(Source { connection, entry, first }, destination, context),
                Err(error) => {
                    message::refuse_and_close(connection, self.limits.linger);
                    Err(error)
                }
            }
        })
    }

    /// Runs one migration, and tells `destination` of its end where completing is not how it ended.
    fn run(
        &self,
        destination: &mut dyn Destination,
        migrate: impl FnOnce(Context<'_>, &mut dyn Destination) -> Result<Received, ReceiveError>,
    ) -> Result<Received, ReceiveError> {
        let gate = Gate::default();
        self.roster.begin();
        let threads = self.thread_start;
        let context = Context { gate: &gate, roster: &self.roster, limits: &self.limits, threads };
        let outcome = migrate(context, destination);
        if outcome.as_ref().is_err_and(|error| !error.is_of_completing()) {
            destination.abandoned();
        }
        outcome
    }

    /// Waits until a caller says Start.
    fn await_source(
        &self,
        callers: &Callers<Source>,
        turned_away: &TurnedAway,
        context: Context<'_>,
    ) -> Result<Source, ReceiveError> {
        let begun = Instant::now();
        while !self.roster.is_stopped() {
            context.gate.check()?;
            match callers.recv_timeout(TICK) {
                Ok(source) => return Ok(source),
                Err(RecvTimeoutError::Timeout) => {}
                // The door is closed, and why is at the gate.
                Err(RecvTimeoutError::Disconnected) => thread::sleep(TICK),
            }
            let waited = begun.elapsed();
            if waited >= self.limits.source_wait {
                return Err(ReceiveError::NoSource { waited, turned_away: turned_away.callers() });
            }
        }
        Err(ReceiveError::Stopped)
    }
}

/// Ends a migration when it is dropped, so that every thread of its scope ends, too.
struct Ending<'a>(Context<'a>);

impl Drop for Ending<'_> {
    fn drop(&mut self) {
        self.0.gate.end();
        self.0.roster.close_all();
    }
}
