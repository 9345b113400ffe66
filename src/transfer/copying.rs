// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Passes over memory: chunks out, acknowledgements in, and the decision after each pass.

use std::time::{Duration, Instant};

use super::control::Switchover;
use super::exchange::PeerError;
use super::lanes::{Content, Event, Lanes};
use super::phases::Session;
use super::progress::Phase;
use super::send::{SendError, SendStep};
use crate::ledger::{Chunk, ChunkLimits};
use crate::precopy::{CancelReason, Decision, TimeoutStrategy};
use crate::vm::Vm;

/// How often a waiting engine looks whether it was cancelled or its time is up.
const TICK: Duration = Duration::from_millis(20);

/// Ranges in one chunk's table.
const CHUNK_RANGES: usize = 1 << 16;

/// Chunks a bandwidth cap is spread over in a second.
const PACED_CHUNKS_PER_SECOND: u64 = 20;

/// Dirty bytes under which another round at once would be a waste.
const IDLE_BYTES: u64 = 1 << 20;

/// The pause between two rounds when there is next to nothing to send and the switchover waits for something else.
const IDLE_PAUSE: Duration = Duration::from_millis(10);

impl<V: Vm> Session<'_, V> {
    /// Makes passes over memory while the VM runs, until it may be stopped.
    pub(super) fn precopy(&mut self, lanes: &mut Lanes) -> Result<(), SendError> {
        self.migration.enter(Phase::Precopy);
        loop {
            self.round(lanes)?;
            let seen = self.take_stock()?;
            if self.options.complete_paused {
                return Ok(());
            }
            match self.policy.decide(&seen) {
                Decision::SwitchOver { .. } => return Ok(()),
                Decision::Cancel { reason } => return Err(SendError::GivenUp(reason)),
                Decision::ContinueThrottled(percent) => self.throttle(percent),
                Decision::Continue if seen.pending_bytes < IDLE_BYTES => self.heed(lanes, IDLE_PAUSE)?,
                Decision::Continue => {}
            }
        }
    }

    /// Makes one pass: sends every page pending now, and waits for the last acknowledgement.
    pub(super) fn round(&mut self, lanes: &mut Lanes) -> Result<(), SendError> {
        let Some(cursor) = self.undo.cursor else { return Ok(()) };
        self.begin_round();
        self.machine.begin_round(cursor);
        while !self.is_cut_short() {
            self.await_room(lanes)?;
            let Some(chunk) = self.machine.take(cursor, self.chunk_limits())? else { break };
            let content = self.content_of(&chunk, lanes)?;
            self.dispatch(lanes, chunk, content);
        }
        self.drain(lanes)?;
        self.measured.end_round();
        Ok(())
    }

    fn drain(&mut self, lanes: &mut Lanes) -> Result<(), SendError> {
        while !lanes.is_drained() {
            self.heed(lanes, TICK)?;
        }
        Ok(())
    }

    pub(super) fn chunk_limits(&self) -> ChunkLimits {
        let paced = self.options.bandwidth.filter(|_| self.undo.vm_paused.is_none());
        let slice = paced.map_or(u64::MAX, |cap| cap / PACED_CHUNKS_PER_SECOND);
        ChunkLimits { bytes: self.options.chunk_bytes.min(slice), ranges: CHUNK_RANGES }
    }

    /// Says whether pages of a chunk may be left out: in the first pass only, in which no page was sent before (C36).
    ///
    /// The last chunk of a pass that sent nothing goes over whole, so that there is a bandwidth to plan the switchover with.
    fn content_of(&mut self, chunk: &Chunk, lanes: &mut Lanes) -> Result<Content, SendError> {
        if self.measured.rounds > 1 {
            return Ok(Content::Whole);
        }
        if self.measured.round_bytes == 0 && self.reaches_end_of_ram(chunk) {
            self.drain(lanes)?;
            if self.measured.round_bytes == 0 {
                return Ok(Content::Whole);
            }
        }
        Ok(Content::NonZero)
    }

    fn reaches_end_of_ram(&self, chunk: &Chunk) -> bool {
        let last_region = self.machine.layout().regions().last();
        chunk.ranges().last().map(|range| range.end()) == last_region.map(|region| region.range().end())
    }

    fn dispatch(&mut self, lanes: &mut Lanes, chunk: Chunk, content: Content) {
        if let Some(pace) = &mut self.measured.pace {
            pace.spend(chunk.bytes(), Instant::now());
        }
        lanes.send(chunk, content);
    }

    /// Waits until another chunk may be taken: for the window, and while the VM runs for the bandwidth cap.
    fn await_room(&mut self, lanes: &mut Lanes) -> Result<(), SendError> {
        loop {
            let pace = self.measured.pace.as_ref().filter(|_| self.undo.vm_paused.is_none());
            let wait = pace.map_or(Duration::ZERO, |pace| pace.wait(Instant::now()));
            match lanes.has_room() {
                true if wait.is_zero() => return self.heed(lanes, Duration::ZERO),
                true => self.heed(lanes, wait.min(TICK))?,
                false => self.heed(lanes, TICK)?,
            }
        }
    }

    /// Takes in what the connections have to tell, waiting no longer than `patience`, and looks whether to go on at all.
    fn heed(&mut self, lanes: &mut Lanes, patience: Duration) -> Result<(), SendError> {
        let mut event = lanes.next_event(patience);
        while let Some(told) = event {
            match told {
                Event::Acknowledged { chunk, sent_bytes } => {
                    self.measured.acknowledged(sent_bytes, chunk.bytes() - sent_bytes);
                    self.machine.commit(chunk);
                }
                Event::Failed(source) => return Err(self.peer_failed(source)),
                Event::Died => return Err(SendError::ThreadDied),
            }
            event = lanes.next_event(Duration::ZERO);
        }
        self.show_left();
        self.migration.check()?;
        self.check_time()
    }

    fn peer_failed(&self, source: PeerError) -> SendError {
        match self.migration.check() {
            Err(cancelled) => cancelled.into(),
            Ok(()) => SendError::Peer { step: SendStep::Memory, source },
        }
    }

    /// Gives up in the middle of a round when the time is up: for precopy while the VM runs, for the switchover afterwards.
    fn check_time(&self) -> Result<(), SendError> {
        self.switchover().map_or(Ok(()), Switchover::check)?;
        match self.time_is_up() && self.policy.timeout_strategy == TimeoutStrategy::Cancel {
            true => {
                let timeout_ms = self.policy.timeout_ms;
                Err(SendError::GivenUp(CancelReason::TimedOut { timeout_ms }))
            }
            false => Ok(()),
        }
    }

    fn time_is_up(&self) -> bool {
        self.undo.vm_paused.is_none() && self.elapsed_ms() >= self.policy.timeout_ms
    }

    /// Whether to end a round early, because the switchover comes whatever is left.
    fn is_cut_short(&self) -> bool {
        self.policy.timeout_strategy == TimeoutStrategy::Ignore && self.time_is_up()
    }

    fn throttle(&mut self, percent: u8) {
        self.undo.throttle_percent = percent;
        self.vm.throttle(percent);
    }
}
