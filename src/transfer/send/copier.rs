// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Passes over memory: chunks out onto the connections, under the rate limit and their back-pressure, and acknowledgements in.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use super::connections::{Content, Event, MemoryConnections, Pipeline};
use super::device_streams::{DeviceReads, PieceLimits};
use super::downtime::Switchover;
use super::error::SendError;
use super::exchange::PeerError;
use super::meter::Meter;
use super::options::SendOptions;
use super::piece::DevicePiece;
use super::progress::SenderHandle;
use super::rate_limit::RateLimit;
use super::restorable_vm::RestorableVm;
use super::tracking::Tracking;
use super::zero_filter::ZeroFilter;
use crate::device::{StateRead, StateReader};
use crate::ledger::{Chunk, ChunkLimits};
use crate::precopy::{TimeoutStrategy, millis};
use crate::transfer::connection::Connection;
use crate::transfer::frame::ReceiverLimits;
use crate::transfer::limits::PeerLimits;
use crate::vm::{Backing, HoleWatch, UserfaultError, Vm};

/// How often a waiting engine looks whether it was cancelled or its time is up.
const TICK: Duration = Duration::from_millis(20);

/// How long chunks on their way may still be acknowledged after a failure or a cancellation.
const GRACE: Duration = Duration::from_millis(400);

/// Guest memory in a chunk below which one more message costs more than one more connection gains, in bytes.
const LEAST_CHUNK_BYTES: u64 = 64 << 10;

/// Ranges in one chunk's table.
const CHUNK_RANGES: usize = 1 << 16;

/// Chunks, or pieces of devices' states, a rate limit is spread over in a second.
const PACED_CHUNKS_PER_SECOND: u64 = 20;

/// What a pass copies, from where, and what counts it.
pub(super) struct Pass<'p, 'a, V: Vm> {
    pub(super) vm: &'p RestorableVm<'a, V>,
    pub(super) tracking: &'p Tracking<'a>,
    pub(super) meter: &'p mut Meter<'a>,
}

/// Copies memory, one pass after the other.
pub(super) struct Copier<'a, V: Vm> {
    options: &'a SendOptions,
    migration: &'a SenderHandle,
    connections: MemoryConnections<V::Memory>,
    devices: DeviceReads,
    hole_watch: HoleWatch,
    /// What the receiver takes of devices' states.
    receiver_limits: ReceiverLimits,
    rate_limit: Option<RateLimit>,
    /// Pieces of devices' states that wait for the rate limit: no more than their windows let be on their way.
    held: VecDeque<DevicePiece>,
    /// Whether a piece that waits goes before the next chunk.
    is_pieces_turn: bool,
    /// End of the highest chunk sent so far: chunks of a round ascend, so no page from here on was sent yet.
    unsent_from: u64,
}

impl<'a, V: Vm> Copier<'a, V> {
    /// Starts a worker on each connection; with a zero-page filter before them where the sender `may_leave_out` pages.
    pub(super) fn start(
        connections: Vec<Connection>,
        options: &'a SendOptions,
        may_leave_out: bool,
        vm: &RestorableVm<'a, V>,
        tracking: &Tracking<'a>,
        migration: &'a SenderHandle,
    ) -> Result<Self, SendError> {
        let (hole_watch, backing) = watch_holes(vm, migration)?;
        let host_page = tracking.look().layout().host_page();
        let zero_filter = may_leave_out.then(|| ZeroFilter::new(backing, host_page));
        let pipeline =
            Pipeline { window: options.pipelined_chunks(), answer_timeout: options.limits.answer_timeout };
        let connections =
            MemoryConnections::start(connections, zero_filter, pipeline, migration, options.thread_start);
        Ok(Self {
            options,
            migration,
            connections: connections.map_err(SendError::Thread)?,
            devices: DeviceReads::default(),
            hole_watch,
            receiver_limits: ReceiverLimits::from(&PeerLimits::default()),
            rate_limit: options.rate_limit.map(RateLimit::new),
            held: VecDeque::new(),
            is_pieces_turn: false,
            unsent_from: 0,
        })
    }

    /// Keeps to what the receiver says that it takes.
    pub(super) fn keeping_to(self, limits: Option<ReceiverLimits>) -> Self {
        let receiver_limits = limits.unwrap_or(self.receiver_limits);
        Self { receiver_limits, ..self }
    }

    /// Ends the workers, and returns the connections that can be used on.
    pub(super) fn stop(self) -> Vec<Connection> {
        drop(self.devices);
        self.connections.stop(GRACE)
    }

    /// Makes one pass: sends every page pending now, beside it what `readers` bring of devices' states, and waits for the last
    /// acknowledgement. Returns what the readers brought.
    pub(super) fn round(
        &mut self,
        mut pass: Pass<'_, 'a, V>,
        readers: Vec<StateReader>,
    ) -> Result<Vec<StateRead>, SendError> {
        let pass = &mut pass;
        let threads = self.options.thread_start;
        let limits = self.piece_limits(pass);
        let started = self.devices.start(readers, limits, self.connections.events(), threads);
        started.map_err(SendError::Thread)?;
        pass.meter.begin_round();
        pass.tracking.begin_round()?;
        let limits = self.chunk_limits(pass);
        while !self.is_cut_short(pass) {
            self.await_room(pass)?;
            let Some((chunk, memory)) = pass.tracking.take(limits, || pass.vm.memory())? else { break };
            let content = self.content_of(&chunk, pass)?;
            if let Some(limit) = &mut self.rate_limit {
                limit.spend(chunk.bytes(), Instant::now());
            }
            self.is_pieces_turn = true;
            self.connections.send(chunk, content, memory);
        }
        self.drain(pass)?;
        self.check_holes(pass)?;
        pass.meter.end_round();
        let read = self.devices.take();
        pass.meter.read_devices(&read);
        Ok(read)
    }

    /// Waits between two passes.
    pub(super) fn pause(&mut self, mut pass: Pass<'_, 'a, V>, time: Duration) -> Result<(), SendError> {
        self.heed(&mut pass, time)
    }

    fn drain(&mut self, pass: &mut Pass<'_, 'a, V>) -> Result<(), SendError> {
        // Devices first: what they have told before their end is held here then, or in the connections' hands.
        while !(self.devices.are_over() && self.held.is_empty() && self.connections.is_drained()) {
            let patience = if self.held.is_empty() { TICK } else { self.wait(pass).min(TICK) };
            self.heed(pass, patience)?;
            if self.wait(pass).is_zero() {
                self.send_held();
            }
        }
        Ok(())
    }

    /// Makes sure that what was left out of a round as holes were some.
    fn check_holes(&mut self, pass: &Pass<'_, 'a, V>) -> Result<(), SendError> {
        let hole_bytes = self.migration.progress().skipped_hole_bytes;
        let plugs = pass.tracking.plugs();
        if let Some(unknown) = self.hole_watch.check(&*pass.vm.memory(), hole_bytes, plugs)? {
            self.migration.degrade(unknown);
        }
        Ok(())
    }

    /// The chunks of a round that begins now.
    fn chunk_limits(&self, pass: &Pass<'_, 'a, V>) -> ChunkLimits {
        let limits = chunk_limits(self.options, pass.tracking, self.connections.count());
        ChunkLimits { bytes: limits.bytes.min(self.slice_bytes(pass)), ..limits }
    }

    /// The pieces of devices' states in a round that begins now.
    fn piece_limits(&self, pass: &Pass<'_, 'a, V>) -> PieceLimits {
        let slice_bytes = self.slice_bytes(pass).max(LEAST_CHUNK_BYTES);
        let ReceiverLimits { device_piece_bytes, device_queue_bytes, .. } = self.receiver_limits;
        PieceLimits { piece_bytes: device_piece_bytes.min(slice_bytes), queue_bytes: device_queue_bytes }
    }

    /// Bytes that go at once under the rate limit, while that holds.
    fn slice_bytes(&self, pass: &Pass<'_, 'a, V>) -> u64 {
        let limit = self.options.rate_limit.filter(|_| !pass.vm.is_paused());
        limit.map_or(u64::MAX, |limit| limit.get() / PACED_CHUNKS_PER_SECOND)
    }

    /// Says whether the zero-page filter may look at a chunk: where no page of it was sent before (C36). That is all of the first
    /// pass, and what lies behind its end if it was cut short; but RAM that was plugged in meanwhile is sent whole.
    ///
    /// The last chunk of a pass that sent nothing goes over whole, so that there is a bandwidth to plan the switchover with.
    fn content_of(&mut self, chunk: &Chunk, pass: &mut Pass<'_, 'a, V>) -> Result<Content, SendError> {
        if !self.is_first_copy(chunk) || pass.tracking.is_plugged_in(chunk) {
            return Ok(Content::Whole);
        }
        if pass.meter.round_bytes() == 0 && pass.tracking.reaches_end_of_ram(chunk) {
            self.drain(pass)?;
            if pass.meter.round_bytes() == 0 {
                return Ok(Content::Whole);
            }
        }
        Ok(Content::NonZero)
    }

    /// Takes in that a chunk is about to be sent; returns whether none of its pages was before.
    fn is_first_copy(&mut self, chunk: &Chunk) -> bool {
        let (Some(first), Some(last)) = (chunk.ranges().first(), chunk.ranges().last()) else { return true };
        let is_first = first.start() >= self.unsent_from;
        self.unsent_from = self.unsent_from.max(last.end());
        is_first
    }

    /// Waits until another chunk may be taken: for the connections' back-pressure, and while the VM runs for the rate limit, which
    /// chunks share by turns with pieces of devices' states.
    fn await_room(&mut self, pass: &mut Pass<'_, 'a, V>) -> Result<(), SendError> {
        loop {
            let wait = self.wait(pass);
            match self.connections.has_room() {
                true if wait.is_zero() && self.is_pieces_turn && !self.held.is_empty() => self.send_held(),
                true if wait.is_zero() => return self.heed(pass, Duration::ZERO),
                true => self.heed(pass, wait.min(TICK))?,
                false => self.heed(pass, TICK)?,
            }
        }
    }

    /// How long the rate limit, while it holds, lets nothing more go.
    fn wait(&self, pass: &Pass<'_, 'a, V>) -> Duration {
        let holds = !pass.vm.is_paused() && !self.is_cut_short(pass);
        let limit = self.rate_limit.as_ref().filter(|_| holds);
        limit.map_or(Duration::ZERO, |limit| limit.wait(Instant::now()))
    }

    /// Sends a piece at once, or holds it where there is a rate limit and the VM runs.
    fn send_piece(&mut self, piece: DevicePiece, pass: &Pass<'_, 'a, V>) {
        if self.rate_limit.is_some() && !pass.vm.is_paused() {
            self.held.push_back(piece);
        } else {
            self.connections.send_piece(piece);
        }
    }

    /// Sends the oldest piece that is held, if there is one, and charges it to the rate limit.
    fn send_held(&mut self) {
        let Some(piece) = self.held.pop_front() else { return };
        if let Some(limit) = &mut self.rate_limit {
            limit.spend(piece.state_bytes(), Instant::now());
        }
        self.connections.send_piece(piece);
        self.is_pieces_turn = false;
    }

    /// Takes in what the connections have to tell, waiting no longer than `patience`, and looks whether to go on at all.
    fn heed(&mut self, pass: &mut Pass<'_, 'a, V>, patience: Duration) -> Result<(), SendError> {
        let mut event = self.connections.next_event(patience);
        while let Some(told) = event {
            match told {
                Event::Acknowledged { chunk, sent_bytes } => self.acknowledged(chunk, sent_bytes, pass),
                Event::Piece(piece) => self.send_piece(piece, pass),
                Event::PieceAcknowledged { state_bytes } => pass.meter.piece_acknowledged(state_bytes),
                Event::Read(read) => self.devices.ended(read),
                // Its chunks stay in flight: the session ends, its cursor with it, and a new attempt sends all RAM.
                Event::Failed(source) => return Err(self.peer_failed(source)),
                Event::Died => return Err(SendError::ThreadDied),
            }
            event = self.connections.next_event(Duration::ZERO);
        }
        pass.meter.show_left(pass.tracking);
        self.migration.check()?;
        self.check_time(pass)
    }

    /// Takes in that the receiver has a chunk, and that so many bytes of it were sent.
    fn acknowledged(&mut self, chunk: Chunk, sent_bytes: u64, pass: &mut Pass<'_, 'a, V>) {
        let skipped_bytes = chunk.bytes() - sent_bytes;
        pass.meter.acknowledged(sent_bytes, skipped_bytes);
        if let Some(limit) = &mut self.rate_limit {
            limit.give_back(skipped_bytes);
        }
        pass.tracking.commit(chunk);
    }

    fn peer_failed(&self, source: PeerError) -> SendError {
        match self.migration.check() {
            Err(cancelled) => cancelled.into(),
            Ok(()) => SendError::of_memory(source),
        }
    }

    /// Gives up in the middle of a round when the time is up: for precopy while the VM runs, for the switchover afterwards.
    fn check_time(&self, pass: &Pass<'_, 'a, V>) -> Result<(), SendError> {
        let switchover = pass.vm.switchover(self.options.switchover_timeout());
        switchover.map_or(Ok(()), Switchover::check)?;
        let strict = self.options.policy.timeout_strategy == TimeoutStrategy::Cancel;
        let exhausted = self.options.policy.exhausted(&pass.meter.glance(pass.tracking));
        match exhausted.filter(|_| strict && self.time_is_up(pass)) {
            Some(reason) => Err(SendError::GivenUp(reason)),
            None => Ok(()),
        }
    }

    fn time_is_up(&self, pass: &Pass<'_, 'a, V>) -> bool {
        !pass.vm.is_paused() && pass.meter.elapsed_ms() >= millis(self.options.policy.timeout)
    }

    /// Whether to end a round early, because the switchover comes whatever is left.
    fn is_cut_short(&self, pass: &Pass<'_, 'a, V>) -> bool {
        self.options.policy.timeout_strategy == TimeoutStrategy::Ignore && self.time_is_up(pass)
    }
}

/// Tells what lies behind the memory, and begins to watch over its holes; memory that a userfaultfd fills has none.
fn watch_holes<V: Vm>(
    vm: &RestorableVm<'_, V>,
    migration: &SenderHandle,
) -> Result<(HoleWatch, Backing), SendError> {
    match HoleWatch::begin(&*vm.memory(), vm.backing()) {
        Ok(watched) => Ok(watched),
        Err(unknown @ UserfaultError::Smaps(_)) => {
            migration.degrade(unknown);
            Ok((HoleWatch::blind(), Backing::default()))
        }
        Err(unreadable) => Err(unreadable.into()),
    }
}

/// The chunks of what is pending now, on so many connections.
pub(super) fn chunk_limits(
    options: &SendOptions,
    tracking: &Tracking<'_>,
    connections: usize,
) -> ChunkLimits {
    let share = share_of_round(tracking.left().pending_bytes, connections);
    ChunkLimits { bytes: options.chunk_bytes.min(share), ranges: CHUNK_RANGES }
}

/// Bytes per chunk that give each of `connections` at least one chunk of a round of `bytes`, where that is worth a message.
fn share_of_round(bytes: u64, connections: usize) -> u64 {
    (bytes / connections.max(1) as u64).max(LEAST_CHUNK_BYTES)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Chunks of a round of `pages` pages, counted one by one.
    fn chunks(pages: u64, page_bytes: u64, connections: usize, chunk_bytes: u64) -> usize {
        let bytes = chunk_bytes.min(share_of_round(pages * page_bytes, connections));
        let chunk_pages = (bytes / page_bytes).max(1);
        (0..pages).step_by(usize::try_from(chunk_pages).unwrap()).count()
    }

    proptest! {
        #[test]
        fn every_connection_gets_a_chunk_of_any_round_with_64_kib_for_each(
            connections in 1..=128_usize,
            extra_pages in 0..1_000_000_u64,
            page_bytes in prop::sample::select(vec![4096_u64, 16384, 65536]),
        ) {
            let least = connections as u64 * LEAST_CHUNK_BYTES / page_bytes;
            prop_assert!(chunks(least + extra_pages, page_bytes, connections, 4 << 20) >= connections);
        }

        #[test]
        fn a_smaller_round_is_cut_no_finer_than_64_kib(connections in 1..=128_usize, pages in 1..2048_u64) {
            prop_assume!(pages * 4096 <= connections as u64 * LEAST_CHUNK_BYTES);
            let expected = usize::try_from((pages * 4096).div_ceil(LEAST_CHUNK_BYTES)).unwrap();
            prop_assert_eq!(chunks(pages, 4096, connections, 4 << 20), expected);
        }

        #[test]
        fn a_round_has_few_chunks_more_than_connections_or_than_it_needs(
            connections in 1..=128_usize,
            pages in 1..10_000_000_u64,
        ) {
            let needed = usize::try_from((pages * 4096).div_ceil(4 << 20)).unwrap();
            let most = needed.max(connections + connections / 16 + 1);
            prop_assert!(chunks(pages, 4096, connections, 4 << 20) <= most);
        }
    }
}
