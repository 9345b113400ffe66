// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The connections that carry memory: one worker thread each, with a queue before it and several chunks in flight.
//!
//! The engine hands chunks in and gets each back when its acknowledgement has been read. A chunk goes to the connection that
//! has the fewest, by turns where several have as few: a connection that has none is never passed over, however late its
//! worker wakes up. Each holds only so many: that is the back-pressure on who takes chunks from the tracker. A worker that fails
//! keeps its chunks: the migration ends, and with it the cursor they belong to.

use std::collections::VecDeque;
use std::io;
use std::sync::mpsc::{self, Receiver, Sender};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use vm_memory::GuestMemoryBackend;

use super::exchange::{PeerError, expect_silence, read_answer, send, send_memory};
use super::piece::DevicePiece;
use super::progress::SenderHandle;
use super::zero_filter::ZeroFilter;
use crate::device::StateRead;
use crate::ledger::Chunk;
use crate::range::GpaRange;
use crate::sync::lock;
use crate::threads::ThreadStart;
use crate::transfer::connection::{Connection, ConnectionHandle};
use crate::transfer::frame::{Command, HEADER_BYTES, RANGE_BYTES, Request};

/// What a worker tells the engine.
#[derive(Debug)]
pub(super) enum Event {
    /// The receiver holds this chunk, of which so many bytes of guest memory were sent.
    Acknowledged { chunk: Chunk, sent_bytes: u64 },
    /// A piece of a device's state is there to be sent.
    Piece(DevicePiece),
    /// The receiver holds a piece of so many bytes of a device's state.
    PieceAcknowledged { state_bytes: u64 },
    /// A device was read as far as it goes in this turn.
    Read(StateRead),
    /// A connection failed.
    Failed(PeerError),
    /// A worker ended without a word.
    Died,
}

/// How a chunk is sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Content {
    /// All of it.
    Whole,
    /// Without pages that a receiver whose memory reads zero has already: not one of its pages was sent before.
    NonZero,
}

/// How much a connection may have on its way, and for how long.
#[derive(Debug, Clone, Copy)]
pub(super) struct Pipeline {
    /// Chunks without an acknowledgement on one connection.
    pub(super) window: usize,
    /// How long the next acknowledgement may take.
    pub(super) answer_timeout: Duration,
}

/// What a worker is to send.
enum Order<M> {
    /// A chunk, how to send it, and the memory its bytes are in: RAM that is plugged or unplugged later changes nothing of it.
    Memory { chunk: Chunk, content: Content, memory: Arc<M> },
    /// A piece of a device's state.
    Piece(DevicePiece),
}

/// One connection and what waits for it.
struct MemoryConnection<M> {
    queue: Arc<Queue<M>>,
    worker: JoinHandle<Option<Connection>>,
    handle: ConnectionHandle,
    /// Chunks and pieces handed in that did not come back.
    load: usize,
}

/// The workers and what is on its way through them.
pub(super) struct MemoryConnections<M> {
    connections: Vec<MemoryConnection<M>>,
    /// What the worker of the connection with this index tells.
    events: Receiver<(usize, Event)>,
    report: Sender<(usize, Event)>,
    /// Chunks that one connection may hold: those on their way, and one to follow them.
    most_load: usize,
    /// The connection whose turn it is.
    turn: usize,
}

impl<M: GuestMemoryBackend + Send + Sync + 'static> MemoryConnections<M> {
    /// Starts a worker for each connection; as many chunks as `pipeline` says may be unacknowledged on each. Without a
    /// `zero_filter` every chunk is sent whole.
    pub(super) fn start(
        connections: Vec<Connection>,
        zero_filter: Option<ZeroFilter>,
        pipeline: Pipeline,
        migration: &SenderHandle,
        threads: ThreadStart,
    ) -> io::Result<Self> {
        let (report, events) = mpsc::channel();
        let zero_filter = Arc::new(zero_filter);
        let mut started = Self {
            connections: Vec::with_capacity(connections.len()),
            events,
            report: report.clone(),
            most_load: pipeline.window + 1,
            turn: 0,
        };
        for (index, connection) in connections.into_iter().enumerate() {
            let (queue, handle) = (Arc::new(Queue::new()), connection.handle());
            let worker = Worker {
                connection,
                zero_filter: Arc::clone(&zero_filter),
                queue: Arc::clone(&queue),
                report: Report { index, events: report.clone() },
                migration: migration.clone(),
                pipeline,
                in_flight: VecDeque::with_capacity(pipeline.window),
                kept: Vec::new(),
                table: Vec::new(),
            };
            let worker = threads.spawn(format!("migrate-{index}"), move || worker.run())?;
            started.connections.push(MemoryConnection { queue, worker, handle, load: 0 });
        }
        Ok(started)
    }

    /// How many connections there are.
    pub(super) fn count(&self) -> usize {
        self.connections.len()
    }

    /// Whether another chunk may be sent without an event before it: no back-pressure.
    pub(super) fn has_room(&self) -> bool {
        self.connections.iter().any(|connection| connection.load < self.most_load)
    }

    /// Whether every chunk has been acknowledged.
    pub(super) fn is_drained(&self) -> bool {
        self.connections.iter().all(|connection| connection.load == 0)
    }

    /// Where others tell the engine what happens.
    pub(super) fn events(&self) -> &Sender<(usize, Event)> {
        &self.report
    }

    /// Hands a chunk to the connection that has the fewest.
    pub(super) fn send(&mut self, chunk: Chunk, content: Content, memory: Arc<M>) {
        self.order(Order::Memory { chunk, content, memory });
    }

    /// Hands a piece of a device's state to the connection that has the fewest, whatever it has.
    pub(super) fn send_piece(&mut self, piece: DevicePiece) {
        self.order(Order::Piece(piece));
    }

    fn order(&mut self, order: Order<M>) {
        let count = self.connections.len();
        let by_turns = (self.turn..count).chain(0..self.turn);
        let index =
            by_turns.min_by_key(|&index| self.connections[index].load).expect("there is a connection");
        self.turn = (index + 1) % count;
        self.connections[index].load += 1;
        self.connections[index].queue.push(order);
    }

    /// Waits for the next event, but no longer than `patience`.
    pub(super) fn next_event(&mut self, patience: Duration) -> Option<Event> {
        let ended = self.connections.iter().any(|connection| connection.worker.is_finished());
        match self.events.recv_timeout(patience) {
            Ok((index, event)) => {
                if matches!(event, Event::Acknowledged { .. } | Event::PieceAcknowledged { .. }) {
                    self.connections[index].load -= 1;
                }
                Some(event)
            }
            Err(_) => ended.then_some(Event::Died),
        }
    }

    /// Ends the workers and returns the connections that are between two requests.
    ///
    /// What is queued is dropped; what is on its way has `grace` to be acknowledged, then its connection is cut.
    pub(super) fn stop(mut self, grace: Duration) -> Vec<Connection> {
        self.close_queues();
        let deadline = Instant::now() + grace;
        while Instant::now() < deadline
            && !self.connections.iter().all(|connection| connection.worker.is_finished())
        {
            let _late = self.events.recv_timeout(Duration::from_millis(1));
        }
        let connections = std::mem::take(&mut self.connections);
        for connection in &connections {
            if !connection.worker.is_finished() {
                connection.handle.close();
            }
        }
        connections.into_iter().filter_map(|connection| connection.worker.join().ok().flatten()).collect()
    }
}

impl<M> MemoryConnections<M> {
    fn close_queues(&self) {
        self.connections.iter().for_each(|connection| connection.queue.close());
    }
}

/// Ends the workers of connections that were not stopped in order.
impl<M> Drop for MemoryConnections<M> {
    fn drop(&mut self) {
        self.close_queues();
        self.connections.iter().for_each(|connection| connection.handle.close());
        for connection in self.connections.drain(..) {
            let _ended = connection.worker.join();
        }
    }
}

struct Waiting<M> {
    chunks: VecDeque<Order<M>>,
    closed: bool,
}

/// Chunks a worker has not taken yet.
struct Queue<M> {
    waiting: Mutex<Waiting<M>>,
    changed: Condvar,
}

impl<M> Queue<M> {
    fn new() -> Self {
        let waiting = Waiting { chunks: VecDeque::new(), closed: false };
        Self { waiting: Mutex::new(waiting), changed: Condvar::new() }
    }

    fn waiting(&self) -> MutexGuard<'_, Waiting<M>> {
        lock(&self.waiting)
    }

    fn push(&self, order: Order<M>) {
        self.waiting().chunks.push_back(order);
        self.changed.notify_one();
    }

    fn close(&self) {
        let mut waiting = self.waiting();
        waiting.closed = true;
        waiting.chunks.clear();
        drop(waiting);
        self.changed.notify_one();
    }

    fn try_pop(&self) -> Option<Order<M>> {
        self.waiting().chunks.pop_front()
    }

    /// Waits for a chunk; `None` once the queue is closed.
    fn pop(&self) -> Option<Order<M>> {
        let waiting = self.waiting();
        let idle = |waiting: &mut Waiting<M>| waiting.chunks.is_empty() && !waiting.closed;
        let mut waiting = self.changed.wait_while(waiting, idle).unwrap_or_else(PoisonError::into_inner);
        waiting.chunks.pop_front()
    }
}

/// The way from a worker to the engine.
struct Report {
    /// Which connection it is.
    index: usize,
    events: Sender<(usize, Event)>,
}

impl Report {
    fn tell(&self, event: Event) {
        let _engine_gone = self.events.send((self.index, event));
    }
}

/// What was written to a connection.
struct Written {
    content: Sent,
    wire_bytes: u64,
}

enum Sent {
    Chunk { chunk: Chunk, sent_bytes: u64 },
    Piece(DevicePiece),
}

struct Worker<M> {
    connection: Connection,
    zero_filter: Arc<Option<ZeroFilter>>,
    queue: Arc<Queue<M>>,
    report: Report,
    migration: SenderHandle,
    pipeline: Pipeline,
    /// Written, oldest first: acknowledgements come in order.
    in_flight: VecDeque<Written>,
    kept: Vec<GpaRange>,
    table: Vec<u8>,
}

impl<M: GuestMemoryBackend> Worker<M> {
    /// Works until the queue is closed; returns the connection if it is between two requests.
    fn run(mut self) -> Option<Connection> {
        let outcome = self.work();
        match outcome {
            Ok(()) => Some(self.connection),
            Err(error) => {
                self.report.tell(Event::Failed(error));
                None
            }
        }
    }

    fn work(&mut self) -> Result<(), PeerError> {
        loop {
            let next = match self.in_flight.len() {
                0 => self.queue.pop(),
                sent if sent < self.pipeline.window => self.queue.try_pop(),
                _ => None,
            };
            match next {
                Some(Order::Memory { chunk, content, memory }) => self.write(chunk, content, &*memory)?,
                Some(Order::Piece(piece)) => self.write_piece(piece)?,
                None if self.in_flight.is_empty() => return Ok(()),
                None => self.read_acknowledgement()?,
            }
        }
    }

    /// Sends a chunk, or what the zero-page filter leaves of it; nothing left needs no acknowledgement.
    fn write(&mut self, chunk: Chunk, content: Content, memory: &M) -> Result<(), PeerError> {
        let ranges = match (&*self.zero_filter, content) {
            (Some(zero_filter), Content::NonZero) => {
                let skipped = zero_filter.keep_nonzero(memory, chunk.ranges(), &mut self.kept);
                self.migration.count_skipped(skipped);
                &self.kept
            }
            _ => chunk.ranges(),
        };
        if ranges.is_empty() {
            self.report.tell(Event::Acknowledged { chunk, sent_bytes: 0 });
            return Ok(());
        }
        if self.in_flight.is_empty() {
            expect_silence(&mut self.connection)?;
        }
        send_memory(&mut self.connection, memory, ranges, &mut self.table)?;
        let wire_bytes = wire_bytes(ranges);
        let sent_bytes = ranges.iter().map(|range| range.len()).sum();
        self.migration.count_sent(wire_bytes);
        self.in_flight.push_back(Written { content: Sent::Chunk { chunk, sent_bytes }, wire_bytes });
        Ok(())
    }

    fn write_piece(&mut self, piece: DevicePiece) -> Result<(), PeerError> {
        if self.in_flight.is_empty() {
            expect_silence(&mut self.connection)?;
        }
        let bytes = piece.payload().len() as u64;
        send(&mut self.connection, Request::new(Command::DeviceState, bytes), piece.payload())?;
        let wire_bytes = HEADER_BYTES as u64 + bytes;
        self.migration.count_sent(wire_bytes);
        self.in_flight.push_back(Written { content: Sent::Piece(piece), wire_bytes });
        Ok(())
    }

    fn read_acknowledgement(&mut self) -> Result<(), PeerError> {
        read_answer(&mut self.connection, self.pipeline.answer_timeout)?;
        if let Some(Written { content, wire_bytes }) = self.in_flight.pop_front() {
            self.migration.count_acknowledged(wire_bytes);
            self.report.tell(match content {
                Sent::Chunk { chunk, sent_bytes } => Event::Acknowledged { chunk, sent_bytes },
                Sent::Piece(piece) => Event::PieceAcknowledged { state_bytes: piece.state_bytes() },
            });
        }
        Ok(())
    }
}

/// Bytes that a Memory message with these ranges takes: header, table and pages.
pub(super) fn wire_bytes(ranges: &[GpaRange]) -> u64 {
    let pages: u64 = ranges.iter().map(|range| range.len()).sum();
    (HEADER_BYTES + RANGE_BYTES * ranges.len()) as u64 + pages
}
