// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The states of devices as they come: pieces on any connection, in any order, written to each device in order.
//!
//! A piece that comes before its turn waits in a queue, which is bounded in pieces: a source sends none that is further ahead. All that
//! are held, those that come in or are being written among them, are bounded in bytes, and so are the buffers that are kept for the next
//! ones. Pieces of several devices are written at the same time, those of one device one after the other.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use super::error::ReceiveError;
use super::piece_error::PieceError;
use crate::device::{DeviceFailure, DeviceSet, Piece, StateSink, StreamError, StreamIdentity};
use crate::error::Chain;
use crate::sync::lock;
use crate::transfer::frame::PIECE_HEAD_BYTES;
use crate::transfer::limits::{PIECES_AHEAD, PeerLimits};

/// Bytes of buffers that are kept for the next pieces.
const SPARE_BYTES: usize = 8 << 20;

/// A piece's bytes, its head before them, until its turn comes.
struct Waiting {
    payload: Vec<u8>,
    position: u64,
    last: bool,
}

/// One device's state.
struct Stream {
    sink: StateSink,
    session: u32,
    /// Sessions so far.
    sessions: u32,
    /// The piece whose turn it is.
    next: u64,
    waiting: BTreeMap<u64, Waiting>,
    complete: bool,
}

/// The states of all devices, for every connection.
pub(super) struct DeviceStreams {
    set: Arc<Mutex<DeviceSet>>,
    /// By the numbers the source gave them.
    streams: Vec<Mutex<Stream>>,
    /// Bytes of all pieces that come in, are being written or wait.
    held_bytes: AtomicU64,
    /// Buffers for the next pieces, of [`SPARE_BYTES`] in all.
    spare: Mutex<Vec<Vec<u8>>>,
    limits: PeerLimits,
}

impl DeviceStreams {
    /// Readies the devices of `set`, which the source lists as `listed`, to take their states in.
    ///
    /// # Errors
    /// A device fails; none is left in a session.
    pub(super) fn begin(
        set: Arc<Mutex<DeviceSet>>,
        listed: &[StreamIdentity],
        limits: &PeerLimits,
    ) -> Result<Self, ReceiveError> {
        let sinks = lock(&set).begin_loading();
        let sinks = sinks.map_err(|source| ReceiveError::Devices { source: source.into() })?;
        let number = |sink: &StateSink| listed.iter().position(|device| device.name == sink.name());
        let mut streams: Vec<_> = sinks.into_iter().map(|sink| (number(&sink), Stream::new(sink))).collect();
        streams.sort_by_key(|&(number, _)| number);
        let streams = streams.into_iter().map(|(_, stream)| Mutex::new(stream)).collect();
        let (held_bytes, spare) = (AtomicU64::new(0), Mutex::default());
        Ok(Self { set, streams, held_bytes, spare, limits: limits.clone() })
    }

    /// Returns a buffer for a piece that announces so many bytes, its head among them.
    ///
    /// # Errors
    /// More are held than may be.
    pub(super) fn admit(&self, bytes: u64) -> Result<Vec<u8>, ReceiveError> {
        let held = self.held_bytes.fetch_add(bytes, Ordering::Relaxed).saturating_add(bytes);
        let limit_bytes = self.limits.device_queue_bytes;
        if held > limit_bytes {
            return Err(PieceError::QueueFull { limit_bytes }.into());
        }
        Ok(lock(&self.spare).pop().unwrap_or_default())
    }

    /// Takes a piece in, whose bytes follow its head in `payload`, a buffer of [`DeviceStreams::admit`].
    ///
    /// # Errors
    /// It is not a piece that can come now, or the device refuses it.
    pub(super) fn take(&self, piece: Piece, payload: Vec<u8>) -> Result<(), ReceiveError> {
        let missing = PieceError::NoSuchDevice { device: piece.device, devices: self.streams.len() };
        let stream = self.streams.get(usize::from(piece.device)).ok_or(missing)?;
        let mut stream = lock(stream);
        stream.check(piece)?;
        if piece.session > stream.session {
            let dropped = stream.begin_session(piece.session, self.limits.device_sessions)?;
            dropped.into_values().for_each(|waiting| self.release(waiting.payload));
        }
        let Piece { index, position, last, .. } = piece;
        if index > stream.next {
            stream.queue(index, Waiting { payload, position, last });
            return Ok(());
        }
        self.write(&mut stream, (index, position, last), payload)?;
        while let Some(Waiting { payload, position, last }) = stream.take_next() {
            let index = stream.next;
            self.write(&mut stream, (index, position, last), payload)?;
        }
        Ok(())
    }

    /// Writes a piece, of such an index, position and end, whose turn it is.
    fn write(
        &self,
        stream: &mut Stream,
        (index, position, last): (u64, u64, bool),
        payload: Vec<u8>,
    ) -> Result<(), ReceiveError> {
        let data = &payload[PIECE_HEAD_BYTES..];
        let limit_bytes = self.limits.device_stream_bytes;
        if stream.sink.bytes().saturating_add(data.len() as u64) > limit_bytes {
            let name = stream.sink.name().to_owned();
            return Err(PieceError::TooLong { name, limit_bytes }.into());
        }
        stream.write(index, position, last, data)?;
        self.release(payload);
        Ok(())
    }

    /// Takes in that a piece is held no longer; keeps its buffer where few are kept.
    fn release(&self, payload: Vec<u8>) {
        self.held_bytes.fetch_sub(payload.len() as u64, Ordering::Relaxed);
        let mut spare = lock(&self.spare);
        let spare_bytes: usize = spare.iter().map(Vec::capacity).sum();
        if spare_bytes.saturating_add(payload.capacity()) <= SPARE_BYTES {
            spare.push(payload);
        }
    }

    /// Returns, once no piece is under way, the bytes of all states that came whole.
    pub(super) fn bytes(&self) -> u64 {
        let streams = self.streams.iter().map(lock);
        streams.filter(|stream| stream.complete).map(|stream| stream.sink.bytes()).sum()
    }

    /// Checks that State was taken, and with it every state that came ahead. State itself has the state of each device whose stream has
    /// no end, as of one that was unplugged and plugged in again.
    ///
    /// # Errors
    /// A piece never came, or the destination took State without the devices that were to load with it.
    pub(super) fn check_taken(&self, taken: Result<(), ReceiveError>) -> Result<(), ReceiveError> {
        let unloaded = lock(&self.set).loading_names().next().map(str::to_owned);
        if taken.is_ok() && unloaded.is_none() {
            return Ok(());
        }
        let cut = self.streams.iter().map(lock).find(|stream| stream.session > 0 && !stream.complete);
        if let Some(stream) = cut {
            taken.unwrap_or_else(|error| log::debug!("State was refused: {}", Chain(&error)));
            let name = stream.sink.name().to_owned();
            return Err(PieceError::Missing { name, next: stream.next }.into());
        }
        taken.and(unloaded.map_or(Ok(()), |name| Err(ReceiveError::NotLoaded { name })))
    }

    /// Drops what came. No piece is under way any more. What was loaded is kept where `completing` failed: only the VMM knows whether
    /// its VM runs.
    pub(super) fn abandon(&self, completing: bool) {
        let mut set = lock(&self.set);
        set.abandon_loading();
        if !completing {
            set.abandon_loaded();
        }
    }
}

impl Stream {
    fn new(sink: StateSink) -> Self {
        Self { sink, session: 0, sessions: 0, next: 0, waiting: BTreeMap::new(), complete: false }
    }

    /// Checks that a piece can come now.
    fn check(&self, piece: Piece) -> Result<(), PieceError> {
        let (name, index) = (|| self.sink.name().to_owned(), piece.index);
        if piece.version != self.sink.version() {
            let (version, expected) = (piece.version, self.sink.version());
            return Err(PieceError::Version { name: name(), version, expected });
        }
        if piece.session < self.session || piece.session == 0 {
            return Err(PieceError::OldSession { name: name(), session: piece.session, now: self.session });
        }
        let next = if piece.session > self.session { 0 } else { self.next };
        if piece.session == self.session && (index < next || self.waiting.contains_key(&index)) {
            return Err(PieceError::Twice { name: name(), index });
        }
        if piece.session == self.session && self.complete {
            return Err(PieceError::AfterEnd { name: name(), index });
        }
        if index - next > PIECES_AHEAD {
            return Err(PieceError::TooFarAhead { name: name(), index, next });
        }
        Ok(())
    }

    /// Begins another session, of `limit` at most, and returns what waits no longer.
    fn begin_session(&mut self, session: u32, limit: u32) -> Result<BTreeMap<u64, Waiting>, ReceiveError> {
        if self.sessions >= limit {
            return Err(PieceError::TooManySessions { name: self.sink.name().to_owned(), limit }.into());
        }
        self.sessions += 1;
        let dropped = std::mem::take(&mut self.waiting);
        if self.session > 0 {
            self.sink.begin_anew().map_err(|source| self.failed(source))?;
        }
        (self.session, self.next, self.complete) = (session, 0, false);
        Ok(dropped)
    }

    /// Has a piece wait for its turn.
    fn queue(&mut self, index: u64, mut waiting: Waiting) {
        // The buffer may have room for the largest piece, and only the bytes are counted.
        waiting.payload.shrink_to_fit();
        self.waiting.insert(index, waiting);
    }

    fn take_next(&mut self) -> Option<Waiting> {
        self.waiting.remove(&self.next)
    }

    fn write(&mut self, index: u64, position: u64, last: bool, data: &[u8]) -> Result<(), ReceiveError> {
        let (name, expected) = (|| self.sink.name().to_owned(), self.sink.bytes());
        if position != expected {
            return Err(PieceError::Position { name: name(), index, position, expected }.into());
        }
        if self.complete {
            return Err(PieceError::AfterEnd { name: name(), index }.into());
        }
        let written = self.sink.write(data);
        written.map_err(|source: StreamError| self.failed(source.into()))?;
        self.next += 1;
        if last {
            self.complete = true;
            self.sink.complete();
        }
        Ok(())
    }

    fn failed(&self, source: DeviceFailure) -> ReceiveError {
        ReceiveError::DeviceState { name: self.sink.name().to_owned(), source: source.into() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::tests::{ALL, script, set};

    fn streams(limits: &PeerLimits) -> DeviceStreams {
        let (set, _world) = set(vec![script(ALL)]);
        let listed = set.stream_identities();
        DeviceStreams::begin(Arc::new(Mutex::new(set)), &listed, limits).unwrap()
    }

    fn piece(index: u64, position: u64) -> Piece {
        Piece { device: 0, version: 0, session: 1, index, position, last: false }
    }

    #[test]
    fn a_piece_that_waits_holds_no_more_than_is_counted() {
        let streams = streams(&PeerLimits::default());
        let bytes = PIECE_HEAD_BYTES + 1;
        let mut buffer = streams.admit(bytes as u64).unwrap();
        buffer.reserve_exact(1 << 20);
        buffer.resize(bytes, 0);
        streams.take(piece(1, 1), buffer).unwrap();
        let stream = lock(&streams.streams[0]);
        let held: usize = stream.waiting.values().map(|waiting| waiting.payload.capacity()).sum();
        assert!(held < 64, "{held} bytes");
        assert_eq!(streams.held_bytes.load(Ordering::Relaxed), bytes as u64);
    }

    #[test]
    fn pieces_that_come_in_on_all_connections_are_bounded_together() {
        let limits = PeerLimits { device_queue_bytes: 100, ..PeerLimits::default() };
        let streams = streams(&limits);
        let mut first = streams.admit(60).unwrap();
        assert!(streams.admit(41).is_err(), "another connection announces more than is left");
        assert!(streams.admit(u64::MAX).is_err());
        streams.held_bytes.store(60, Ordering::Relaxed);
        first.resize(60, 0);
        streams.take(piece(0, 0), first).unwrap();
        assert_eq!(streams.held_bytes.load(Ordering::Relaxed), 0, "it was written");
        streams.admit(100).unwrap();
    }

    #[test]
    fn few_buffers_are_kept_for_the_next_pieces() {
        let streams = streams(&PeerLimits::default());
        let bytes = 1 << 20;
        let buffers: Vec<_> = (0..32).map(|_| streams.admit(bytes).unwrap()).collect();
        for (index, mut buffer) in (0..).zip(buffers) {
            buffer.resize(1 << 20, 0);
            streams.take(piece(index, index * (bytes - PIECE_HEAD_BYTES as u64)), buffer).unwrap();
        }
        let kept: usize = lock(&streams.spare).iter().map(Vec::capacity).sum();
        assert!((1..=SPARE_BYTES).contains(&kept), "{kept} bytes");
    }
}
