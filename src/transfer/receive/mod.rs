// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The receiving end of a migration: takes a VM from any source that speaks the protocol, and trusts none.
//!
//! ```text
//!              acceptor ── hears every caller on a thread of its own
//!                 │  Start                                 │ role, once Config is answered
//!                 ▼                                        ▼
//!  main thread: session                               additional × 1..=128
//!   Start → Devices? → Config → Memory* → State → Complete   Memory*
//!                                 │         │                  │
//!                                 └─────── phase gate ─────────┘   Memory between Config and State; State when none is under way
//! ```
//!
//! With a source of this crate that has devices, Devices lists them and their states come between Config and State too, as DeviceState.
//!
//! Every request is answered with one Response. Whatever fails, anywhere, is answered with Error where a request waits for
//! an answer, ends the migration and comes back as one [`ReceiveError`].

mod acceptor;
mod additional;
mod ahead;
mod connections;
mod context;
mod destination;
mod device_streams;
mod error;
mod message;
mod phase_gate;
mod piece_error;
mod rejections;
mod session;
mod store;
mod tables;
mod through_file;

use std::sync::mpsc::{Receiver as Callers, RecvTimeoutError, channel};
use std::thread;
use std::time::Instant;

use super::connection::{Connection, ConnectionError, Head, Listener};
use super::limits::PeerLimits;
use super::tls::ServerTls;
use super::url::Endpoint;
use crate::threads::ThreadStart;
use acceptor::Acceptor;
use context::{Context, Source, TICK};
use phase_gate::PhaseGate;
use rejections::Rejections;

pub use super::prefault::asks_for_prefault;
pub use connections::ReceiverHandle;
pub use destination::{Completion, Destination, Received};
pub use error::{Part, ReceiveError, Step};
pub use piece_error::PieceError;
pub use store::{GuestPages, PageStore, Pages};

/// Receives VMs.
///
/// ```
/// use std::sync::Arc;
/// use std::thread;
/// use vfio_migration::transfer::connection::{Connection, Listener};
/// use vfio_migration::transfer::frame::{Command, Request, Response};
/// use vfio_migration::transfer::limits::PeerLimits;
/// use vfio_migration::transfer::receive::{Completion, Destination, GuestPages, PageStore, ReceiveError, Receiver};
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
///     fn complete(&mut self, _paused: bool) -> Result<Completion, VmError> {
///         Ok(Completion::Moved)
///     }
///     fn abandoned(&mut self) {}
/// }
///
/// let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 1 << 20)])?;
/// let listener = Listener::bind(&"tcp:127.0.0.1:0".parse()?)?;
/// let url = listener.url().clone();
/// let source = thread::spawn(move || {
///     use std::io::{Read, Write};
///     let mut connection = Connection::connect(&url, None, &PeerLimits::default()).unwrap();
///     for request in [Request::start(), Request::new(Command::Abandon, 0)] {
///         connection.write_all(&request.to_bytes()).unwrap();
///         connection.read_exact(&mut [0; 16]).unwrap();
///     }
/// });
/// let received = Receiver::new(PeerLimits::default(), None).receive(&listener, &mut Vmm(Arc::new(memory)));
/// assert!(matches!(received, Err(ReceiveError::Abandoned { .. })));
/// # source.join().unwrap();
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct Receiver {
    limits: PeerLimits,
    tls: Option<ServerTls>,
    thread_start: ThreadStart,
    connections: ReceiverHandle,
}

impl Receiver {
    /// Makes a receiver that holds every peer to `limits`, and to TLS where `tls` is given.
    pub fn new(limits: PeerLimits, tls: Option<ServerTls>) -> Self {
        Self { limits, tls, thread_start: ThreadStart::NOTHING, connections: ReceiverHandle::default() }
    }

    /// Has each thread of the receiver do `thread_start` first.
    #[must_use]
    pub fn thread_start(self, thread_start: ThreadStart) -> Self {
        Self { thread_start, ..self }
    }

    /// Returns what stops and measures the receiver from any thread.
    pub fn handle(&self) -> ReceiverHandle {
        self.connections.clone()
    }

    /// Waits on `listener` for a source, and receives its VM into `destination`.
    ///
    /// The first caller to say Start is the source, and its failure is the receiver's. All others are strangers, be they
    /// silent, slow, many or without a certificate: they are rejected and counted, and never keep the source out.
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
            let rejections = Rejections::default();
            let received = thread::scope(|scope| {
                let ending = Ending(context);
                let (first, callers) = channel();
                let acceptor = Acceptor::new(listener, self.tls.as_ref(), &rejections, context);
                context.spawn(scope, "migration-accept", move || acceptor.run(scope, &first))?;
                // And one to hear a caller on: else no source could ever be heard.
                context.spawn(scope, "migration-in", || {})?;
                let source = self.await_source(&callers, &rejections, context)?;
                drop(callers);
                let received = session::receive(source, destination, context);
                drop(ending);
                received
            });
            received.map_err(|error| rejections.explain(error))
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
            let entry = self.connections.enter(&connection);
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
        let gate = PhaseGate::default();
        self.connections.begin();
        let threads = self.thread_start;
        let context = Context { gate: &gate, connections: &self.connections, limits: &self.limits, threads };
        let outcome = migrate(context, destination);
        if let (Err(error), Some(devices)) = (&outcome, gate.devices()) {
            devices.abandon(error.is_of_completing());
        }
        if outcome.as_ref().is_err_and(|error| !error.is_of_completing()) {
            destination.abandoned();
        }
        outcome
    }

    /// Waits until a caller says Start.
    fn await_source(
        &self,
        callers: &Callers<Source>,
        rejections: &Rejections,
        context: Context<'_>,
    ) -> Result<Source, ReceiveError> {
        let begun = Instant::now();
        while !self.connections.is_stopped() {
            context.gate.check()?;
            match callers.recv_timeout(TICK) {
                Ok(source) => return Ok(source),
                Err(RecvTimeoutError::Timeout) => {}
                // The acceptor has ended, and the phase gate holds the reason.
                Err(RecvTimeoutError::Disconnected) => thread::sleep(TICK),
            }
            let waited = begun.elapsed();
            if waited >= self.limits.source_wait {
                return Err(ReceiveError::NoSource { waited, rejected: rejections.callers() });
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
        self.0.connections.close_all();
    }
}
