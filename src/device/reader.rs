// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Reads one device's state piece by piece, on its own thread, for the sender.

use std::time::{Duration, Instant};

use super::changes::rate;
use super::pace::{LEAST_BYTES_PER_SECOND, PATIENCE, Pace};
use super::shared::SharedIo;
use super::{DataRead, StreamError};

/// How long a device in PRE_COPY is read in one turn; then memory has its turn, and the device goes on in the next one.
const TURN: Duration = Duration::from_millis(250);

/// Reads in a row that bring a small part of what one read brings at most, after which a device in PRE_COPY counts as having no more for
/// now: one that changes its state all the time always has a little.
const SHORT_READS: u32 = 16;

/// Which part of it they do not reach.
const SHORT_SHARE: usize = 4;

/// Bytes that a read brings on average, below which a device in PRE_COPY that is slow as well counts as having no more for now: it always
/// has a little. One that hands out more at a time is slow, or its receiver is.
const TINY_READ_BYTES: u64 = 4096;

/// Bytes of state whose time says how fast a device hands it out.
const TELLING_BYTES: u64 = 8 << 20;

/// How far a reader goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Until {
    /// In PRE_COPY: to the next pause, or as far as it comes in one turn, but no more than so many bytes.
    Pause { budget: u64 },
    /// In STOP_COPY: to the end.
    End,
}

/// Where a piece of a device's state belongs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Piece {
    /// Which of the devices it is of.
    pub(crate) device: u16,
    /// The version of the device's stream.
    pub(crate) version: u32,
    /// Which of the device's saving sessions it comes from, from 1.
    pub(crate) session: u32,
    /// Which of the session's pieces it is, from 0.
    pub(crate) index: u64,
    /// Bytes of the session before it.
    pub(crate) position: u64,
    /// Whether it is the last one.
    pub(crate) last: bool,
}

/// What a turn of reading brought.
#[derive(Debug)]
pub(crate) struct StateRead {
    pub(super) device: u16,
    pub(super) session: u32,
    pub(super) pieces: u64,
    pub(super) bytes: u64,
    /// Reads that brought them.
    reads: u64,
    /// Whether the device has no more for now.
    pub(super) drained: bool,
    /// Whether the state is complete.
    pub(super) complete: bool,
    pub(super) failure: Option<StreamError>,
    pub(crate) took: Duration,
    /// From the turn's begin until the receiver had all of it; no shorter than `took`.
    pub(crate) arrived_after: Duration,
    /// When the turn ended.
    pub(super) ended: Instant,
    /// Bytes that one read brought at most, in all turns of the session.
    pub(super) largest: usize,
}

impl StateRead {
    /// Bytes read.
    pub(crate) fn bytes(&self) -> u64 {
        self.bytes
    }

    /// The device's number.
    pub(crate) fn device(&self) -> u16 {
        self.device
    }

    /// Takes in when the receiver had all of it.
    pub(crate) fn arrived(&mut self, at: Instant) {
        self.arrived_after = self.took + at.saturating_duration_since(self.ended);
    }

    /// Bytes per second that the device, or the receiver, gets done, never 0, if the turn tells: it is long, or the device had more than it
    /// could be read of it. A turn in which there was no room for a single piece says nothing of the device.
    pub(crate) fn telling_rate(&self) -> Option<u64> {
        let was_cut_short = self.took >= TURN && !self.drained && !self.complete;
        let tells = self.bytes >= TELLING_BYTES || (was_cut_short && self.bytes > 0);
        tells.then(|| rate(self.bytes, self.arrived_after).max(1))
    }
}

/// Reads one device's state for one turn.
pub(crate) struct StateReader {
    io: SharedIo,
    until: Until,
    next: Piece,
    read: StateRead,
    begun: Instant,
    pace: Pace,
    short_reads: u32,
}

impl StateReader {
    /// Reads on at `next`; one read of the session brought `largest` bytes at most.
    pub(super) fn new(io: SharedIo, until: Until, next: Piece, largest: usize) -> Self {
        let (begun, Piece { device, session, .. }) = (Instant::now(), next);
        let read = StateRead {
            device,
            session,
            pieces: 0,
            bytes: 0,
            reads: 0,
            drained: false,
            complete: false,
            failure: None,
            took: Duration::ZERO,
            arrived_after: Duration::ZERO,
            ended: begun,
            largest,
        };
        Self { io, until, next, read, begun, pace: Pace::new(PATIENCE, begun), short_reads: 0 }
    }

    /// The device's number.
    pub(crate) fn device(&self) -> u16 {
        self.next.device
    }

    /// The index of the piece that comes next.
    pub(crate) fn next_index(&self) -> u64 {
        self.next.index
    }

    /// Appends up to `most` bytes, the next piece, to `buffer`; `None` at the end of the turn.
    pub(crate) fn read(&mut self, buffer: &mut Vec<u8>, most: usize) -> Option<Piece> {
        if self.is_over() {
            return None;
        }
        // The time until there was room for it is the receiver's.
        self.pace.go_on(Instant::now());
        let begin = buffer.len();
        let most = usize::try_from(self.left()).unwrap_or(usize::MAX).min(most);
        buffer.resize(begin + most, 0);
        let filled = self.fill(&mut buffer[begin..]);
        let filled = filled.unwrap_or_else(|failure| {
            self.read.failure = Some(failure);
            0
        });
        buffer.truncate(begin + filled);
        if self.read.failure.is_some() || (filled == 0 && !self.read.complete) {
            return None;
        }
        let piece = Piece { last: self.read.complete, ..self.next };
        self.next.index += 1;
        self.next.position += filled as u64;
        self.read.pieces += 1;
        Some(piece)
    }

    /// Ends the turn, whether all was read or not.
    pub(crate) fn end(mut self) -> StateRead {
        self.read.ended = Instant::now();
        self.read.took = self.read.ended.saturating_duration_since(self.begun);
        self.read.arrived_after = self.read.took;
        let crawls = self.read.took >= TURN && (self.read.bytes as f64) < self.least_bytes();
        let is_tiny = self.read.bytes < self.read.reads.saturating_mul(TINY_READ_BYTES);
        self.read.drained |= crawls && is_tiny && self.until != Until::End;
        self.read
    }

    /// Takes in that a read that had room for `room` bytes brought `count`.
    fn look_at(&mut self, count: usize, room: usize) {
        let is_short = count < self.read.largest.min(room) / SHORT_SHARE;
        self.short_reads = if is_short { self.short_reads + 1 } else { 0 };
        self.read.largest = self.read.largest.max(count);
        self.read.drained |= self.until != Until::End && self.short_reads >= SHORT_READS;
    }

    fn least_bytes(&self) -> f64 {
        self.read.took.as_secs_f64() * LEAST_BYTES_PER_SECOND as f64
    }

    fn is_over(&self) -> bool {
        let StateRead { drained, complete, failure, .. } = &self.read;
        let turn_is_over = self.until != Until::End && self.begun.elapsed() >= TURN;
        *drained || *complete || failure.is_some() || self.left() == 0 || turn_is_over
    }

    fn left(&self) -> u64 {
        match self.until {
            Until::Pause { budget } => budget - self.read.bytes,
            Until::End => u64::MAX,
        }
    }

    /// Reads until `room` is full or the device has no more, and returns how much came.
    fn fill(&mut self, room: &mut [u8]) -> Result<usize, StreamError> {
        let mut filled = 0;
        while filled < room.len() && !self.is_over() {
            let read_bytes = usize::try_from(self.next.position).unwrap_or(usize::MAX).saturating_add(filled);
            let room = &mut room[filled..];
            let read = self.io.lock().read_data(room);
            match read.map_err(|source| StreamError::Read { read_bytes, source })? {
                DataRead::Bytes(count) if count == 0 || count > room.len() => {
                    return Err(StreamError::Miscounted { claimed_bytes: count, offered_bytes: room.len() });
                }
                DataRead::Bytes(count) => {
                    self.look_at(count, room.len());
                    filled += count;
                    self.read.reads += 1;
                    self.read.bytes += count as u64;
                    if self.until == Until::End && !self.pace.keeps_up(count, Instant::now()) {
                        return Err(StreamError::Slow { moved_bytes: read_bytes, patience: PATIENCE });
                    }
                }
                DataRead::NothingNow if self.until == Until::End => {
                    return Err(StreamError::Pause { read_bytes });
                }
                DataRead::End if self.until != Until::End => {
                    return Err(StreamError::EarlyEnd { read_bytes });
                }
                DataRead::NothingNow => self.read.drained = true,
                DataRead::End => self.read.complete = true,
            }
        }
        Ok(filled)
    }
}

#[cfg(test)]
mod tests {
    use std::thread;

    use super::*;
    use crate::device::tests::{ALL, script, set};

    /// A turn of 300 ms in PRE_COPY, in which so many reads brought so many bytes.
    fn turn(reads: u64, bytes: u64) -> StateRead {
        let (mut set, _world) = set(vec![script(ALL)]);
        set.begin_streaming(&set.stream_identities());
        set.start_precopy().unwrap();
        let (mut readers, _) = set.precopy_readers();
        let mut reader = readers.remove(0);
        (reader.read.reads, reader.read.bytes) = (reads, bytes);
        reader.begun = Instant::now() - Duration::from_millis(300);
        reader.end()
    }

    #[test]
    fn a_slow_device_has_more_and_one_that_trickles_has_no_more_for_now() {
        assert!(!turn(1, 64 << 10).drained && turn(1, 64 << 10).telling_rate().is_some());
        assert!(turn(1000, 1000).drained && turn(1000, 1000).telling_rate().is_none());
        assert!(!turn(1000, 1 << 20).drained, "small reads, but many");
    }

    #[test]
    fn a_turn_that_brought_nothing_tells_no_rate_and_no_rate_is_nought() {
        assert!(!turn(0, 0).drained && turn(0, 0).telling_rate().is_none());
        let mut slow = turn(1, 64 << 10);
        slow.arrived_after = Duration::from_secs(1 << 20);
        assert_eq!(slow.telling_rate(), Some(1));
    }

    #[test]
    fn what_the_receiver_has_not_taken_in_yet_was_not_handed_over() {
        let mut read = turn(16, 16 << 20);
        let at_once = read.telling_rate().unwrap();
        read.arrived(read.ended + read.took * 3);
        let rate = read.telling_rate().unwrap();
        assert!(rate.abs_diff(at_once / 4) < at_once / 100, "{rate} {at_once}");
    }

    #[test]
    fn the_time_until_a_piece_has_room_is_not_the_devices() {
        let (mut set, _world) = set(vec![script(ALL)]);
        set.begin_streaming(&set.stream_identities());
        set.start_precopy().unwrap();
        set.stop_for_copy().unwrap();
        let mut reader = set.final_readers().unwrap().remove(0);
        reader.pace = Pace::new(Duration::from_secs(1), Instant::now());
        let mut buffer = Vec::new();
        for _ in 0..3 {
            thread::sleep(Duration::from_millis(600));
            assert!(reader.read(&mut buffer, 7).is_some());
        }
        assert!(reader.end().failure.is_none());
        assert_eq!(buffer.len(), 21);
    }
}
