// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Passes over memory: chunks out, acknowledgements in, and the decision after each pass.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::connections::{Content, Event, Lanes};
use super::control::Switchover;
use super::error::SendError;
use super::exchange::PeerError;
use super::phases::Session;
use super::progress::Phase;
use crate::ledger::{Chunk, ChunkLimits, CursorId};
use crate::precopy::{Decision, TimeoutStrategy};
use crate::vm::Vm;

/// How often a waiting engine looks whether it was cancelled or its time is up.
const TICK: Duration = Duration::from_millis(20);

/// Guest memory in a chunk below which one more message costs more than one more connection gains, in bytes.
const LEAST_CHUNK_BYTES: u64 = 64 << 10;

/// Ranges in one chunk's table.
const CHUNK_RANGES: usize = 1 << 16;

/// Chunks a bandwidth cap is spread over in a second.
const PACED_CHUNKS_PER_SECOND: u64 = 20;

/// Dirty bytes under which another round at once would be a waste.
const IDLE_BYTES: u64 = 1 << 20;

/// The pause between two rounds when there is next to nothing to send and the switchover waits for something else.
const IDLE_PAUSE: Duration = Duration::from_millis(10);

/// Pages in flight, and the memory that their bytes are in.
type TakenFrom<M> = (Chunk, Arc<M>);

impl<V: Vm> Session<'_, V> {
    /// Makes passes over memory while the VM runs, until it may be stopped.
    pub(super) fn precopy(&mut self, lanes: &mut Lanes<V::Memory>) -> Result<(), SendError> {
        self.migration.enter(Phase::Precopy);
        loop {
            self.round(lanes)?;
            let seen = self.take_stock()?;
            self.log_round(&seen);
            if self.options.complete_paused {
                return Ok(());
            }
            let decision = match self.policy.decide(&seen) {
                // Devices may have begun another piece of their state that they want read first (C37).
                Decision::SwitchOver { .. } => self.decide_again()?,
                decision => decision,
            };
            log::debug!("After round {}: {decision:?}", seen.rounds);
            match decision {
                Decision::SwitchOver { .. } => return Ok(()),
                Decision::Cancel { reason } => return Err(SendError::GivenUp(reason)),
                Decision::ContinueThrottled(percent) => self.throttle(percent),
                Decision::Continue if seen.pending_bytes < IDLE_BYTES => self.heed(lanes, IDLE_PAUSE)?,
                Decision::Continue => {}
            }
        }
    }

    /// Decides on a switchover once more, with what devices have left when they are asked anew.
    fn decide_again(&mut self) -> Result<Decision, SendError> {
        let seen = self.look_again()?;
        Ok(self.policy.decide(&seen))
    }

    /// Makes one pass: sends every page pending now, and waits for the last acknowledgement.
    pub(super) fn round(&mut self, lanes: &mut Lanes<V::Memory>) -> Result<(), SendError> {
        let Some(cursor) = self.undo.cursor else { return Ok(()) };
        self.begin_round();
        self.tracker()?.begin_round(cursor);
        let limits = self.chunk_limits(lanes.count());
        while !self.is_cut_short() {
            self.await_room(lanes)?;
            let Some((chunk, memory)) = self.take(cursor, limits)? else { break };
            let content = self.content_of(&chunk, lanes)?;
            self.spend(&chunk);
            lanes.send(chunk, content, memory);
        }
        self.drain(lanes)?;
        self.check_holes()?;
        self.measured.end_round();
        Ok(())
    }

    /// Takes the round's next pages, and the memory that their bytes are in: RAM that goes now is in both or in neither.
    pub(super) fn take(
        &self,
        cursor: CursorId,
        limits: ChunkLimits,
    ) -> Result<Option<TakenFrom<V::Memory>>, SendError> {
        let mut tracker = self.tracker()?;
        let chunk = tracker.take(cursor, limits)?;
        Ok(chunk.map(|chunk| (chunk, self.vm.memory())))
    }

    fn drain(&mut self, lanes: &mut Lanes<V::Memory>) -> Result<(), SendError> {
        while !lanes.is_drained() {
            self.heed(lanes, TICK)?;
        }
        Ok(())
    }

    /// The chunks of a round that begins now, on so many connections.
    pub(super) fn chunk_limits(&self, connections: usize) -> ChunkLimits {
        let paced = self.options.bandwidth.filter(|_| self.undo.vm_paused.is_none());
        let slice = paced.map_or(u64::MAX, |cap| cap / PACED_CHUNKS_PER_SECOND);
        let share = share_of_round(self.left().pending_bytes, connections);
        ChunkLimits { bytes: self.options.chunk_bytes.min(share).min(slice), ranges: CHUNK_RANGES }
    }

    /// Says whether pages of a chunk may be left out: where no page of it was sent before (C36). That is all of the first pass,
    /// and what lies behind its end if it was cut short; but RAM that was plugged in meanwhile is sent whole.
    ///
    /// The last chunk of a pass that sent nothing goes over whole, so that there is a bandwidth to plan the switchover with.
    fn content_of(&mut self, chunk: &Chunk, lanes: &mut Lanes<V::Memory>) -> Result<Content, SendError> {
        if !self.measured.is_first_copy(chunk) || self.is_plugged_in(chunk) {
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
        let end_of_ram = self.look().layout().regions().last().map(|region| region.range().end());
        chunk.ranges().last().map(|range| range.end()) == end_of_ram
    }

    /// Whether a chunk holds RAM that was plugged in since the look at what lies behind the memory.
    fn is_plugged_in(&self, chunk: &Chunk) -> bool {
        let tracker = self.look();
        let plugged = self.undo.cursor.map_or(&[][..], |cursor| tracker.plugged(cursor));
        plugged.iter().any(|new| chunk.ranges().iter().any(|range| range.intersection(*new).is_some()))
    }

    fn spend(&mut self, chunk: &Chunk) {
        if let Some(pace) = &mut self.measured.pace {
            pace.spend(chunk.bytes(), Instant::now());
        }
    }

    /// Waits until another chunk may be taken: for the window, and while the VM runs for the bandwidth cap.
    fn await_room(&mut self, lanes: &mut Lanes<V::Memory>) -> Result<(), SendError> {
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
    fn heed(&mut self, lanes: &mut Lanes<V::Memory>, patience: Duration) -> Result<(), SendError> {
        let mut event = lanes.next_event(patience);
        while let Some(told) = event {
            match told {
                Event::Acknowledged { chunk, sent_bytes } => {
                    self.measured.acknowledged(sent_bytes, chunk.bytes() - sent_bytes);
                    self.look().commit(chunk);
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
            Ok(()) => SendError::of_memory(source),
        }
    }

    /// Gives up in the middle of a round when the time is up: for precopy while the VM runs, for the switchover afterwards.
    fn check_time(&self) -> Result<(), SendError> {
        self.switchover().map_or(Ok(()), Switchover::check)?;
        let strict = self.policy.timeout_strategy == TimeoutStrategy::Cancel;
        match self.policy.exhausted(&self.glance()).filter(|_| strict && self.time_is_up()) {
            Some(reason) => Err(SendError::GivenUp(reason)),
            None => Ok(()),
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
        log::info!("Taking {percent} % of the vCPUs' time away");
        self.undo.throttle_percent = percent;
        self.vm.throttle(percent);
    }
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
