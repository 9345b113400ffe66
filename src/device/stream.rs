// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A device's state as a stream of bytes: read in bounded pieces, written back in order.
//!
//! How a device cuts its stream into reads means nothing; only the order of the bytes does.

use std::time::{Duration, Instant};

use thiserror::Error;

use super::blob::Blob;
use super::changes::{Changes, Turn};
use super::pace::{LEAST_BYTES_PER_SECOND, PATIENCE, Pace};
use super::{DataRead, DeviceError, DeviceIo};

use crate::units::Count;

/// Most bytes asked of a device, or given to it, at once.
pub const CHUNK_BYTES: usize = 1 << 20;

/// Most bytes asked of a device as long as little is known of its state; then as many as it handed over before.
const FIRST_CHUNK_BYTES: usize = 1 << 16;

/// How long a device in PRE_COPY is listened to that hands out less than a useful rate. What it has left follows in STOP_COPY.
const PRECOPY_PATIENCE: Duration = Duration::from_secs(1);

/// Why a device's state could not be read or written.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum StreamError {
    /// The device failed.
    #[error("Cannot read the device's state beyond byte {read_bytes}")]
    Read {
        /// Bytes read before.
        read_bytes: usize,
        /// The device's own error.
        source: DeviceError,
    },
    /// The stream ended in PRE_COPY, where only a pause may come: a reset has ended the session.
    #[error("Device ended its state in PRE_COPY after {}", Count(.read_bytes, "byte"))]
    EarlyEnd {
        /// Bytes read before.
        read_bytes: usize,
    },
    /// The stream paused in STOP_COPY, where only its end may come.
    #[error("Device paused its state in STOP_COPY after {}", Count(.read_bytes, "byte"))]
    Pause {
        /// Bytes read before.
        read_bytes: usize,
    },
    /// The interface says it brought a number of bytes that it cannot have brought.
    #[error("Device claims to have read {claimed_bytes} bytes into {offered_bytes}")]
    Miscounted {
        /// Bytes it says it brought.
        claimed_bytes: usize,
        /// Bytes there was room for.
        offered_bytes: usize,
    },
    /// The stream is slower than any that is worth waiting for, as one that never ends.
    #[error(
        "Device moves its state too slowly: after {} it fell {} s behind {LEAST_BYTES_PER_SECOND} bytes a second",
        Count(.moved_bytes, "byte"),
        .patience.as_secs()
    )]
    Slow {
        /// Bytes read of it, or written to it, before.
        moved_bytes: usize,
        /// How far it may fall behind.
        patience: Duration,
    },
    /// The state is longer than allowed.
    #[error("Device state is longer than {}, which is what Device::state_limit allows", Count(.limit_bytes, "byte"))]
    TooLong {
        /// Most bytes allowed.
        limit_bytes: usize,
    },
    /// The device refused a part of a saved state.
    #[error("Cannot write the device's state beyond byte {written_bytes}")]
    Write {
        /// Bytes it took before.
        written_bytes: usize,
        /// The device's own error.
        source: DeviceError,
    },
}

/// What one turn of reading in PRE_COPY brought.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct PrecopyRead {
    /// Bytes read.
    pub(super) bytes: u64,
    /// Whether the device has no more for now.
    pub(super) drained: bool,
}

/// The state of one device as far as it was read in one session.
#[derive(Debug)]
pub(super) struct StateStream {
    /// What was read.
    blob: Blob,
    /// Bytes that were read and sent away, and are not here.
    streamed: usize,
    /// Where a read goes.
    room: Vec<u8>,
    limit: usize,
    complete: bool,
    taken: bool,
    precopy_bytes: usize,
    state_bytes: usize,
    /// How long a stream may lag, in PRE_COPY and in STOP_COPY.
    patience: [Duration; 2],
    /// Bytes since the device last paused, between the two pauses before, and between the two before those.
    since_pause: usize,
    last_batch: Option<usize>,
    batch_before: Option<usize>,
    changes: Changes,
}

impl StateStream {
    /// Makes an empty stream that will hold at most `limit` bytes.
    pub(super) fn new(limit: usize) -> Self {
        Self {
            blob: Blob::new(),
            streamed: 0,
            room: Vec::new(),
            limit,
            complete: false,
            taken: false,
            precopy_bytes: 0,
            state_bytes: 0,
            patience: [PRECOPY_PATIENCE, PATIENCE],
            since_pause: 0,
            last_batch: None,
            batch_before: None,
            changes: Changes::default(),
        }
    }

    /// Sets the most bytes that the stream will hold.
    pub(super) fn set_limit(&mut self, limit: usize) {
        self.limit = limit;
    }

    /// Most bytes that the stream will hold.
    pub(super) fn limit(&self) -> usize {
        self.limit
    }

    /// Begins anew for a new session.
    pub(super) fn restart(&mut self) {
        let room = std::mem::take(&mut self.room);
        *self = Self { room, patience: self.patience, ..Self::new(self.limit) };
    }

    /// Frees the bytes of a session that is over; how many there were is still known.
    pub(super) fn release(&mut self) {
        self.room.truncate(FIRST_CHUNK_BYTES);
        self.room.shrink_to_fit();
        (self.blob, self.streamed) = (Blob::new(), 0);
        (self.complete, self.taken) = (false, false);
    }

    /// Hands out what was read, in order, once: it may be large.
    pub(super) fn take(&mut self) -> Blob {
        self.taken = true;
        std::mem::replace(&mut self.blob, Blob::new())
    }

    fn filled(&self) -> usize {
        self.blob.bytes() + self.streamed
    }

    /// Whether any of the session was read.
    pub(super) fn has_begun(&self) -> bool {
        self.filled() > 0 || self.complete || self.taken
    }

    /// Has a session of which a part was sent away count as one to read again.
    pub(super) fn keep_whole(&mut self) {
        self.taken |= self.streamed > 0;
    }

    /// Bytes that were read and sent away.
    pub(super) fn streamed(&self) -> usize {
        self.streamed
    }

    /// Takes in what a turn in PRE_COPY brought, all of which was sent away.
    pub(super) fn streamed_in_precopy(&mut self, turn: Turn) {
        self.count_streamed(turn.bytes);
        self.precopy_bytes = self.filled();
        self.changes.read(turn);
    }

    /// How the device changes what was read of it and sent away.
    pub(super) fn changes(&self) -> &Changes {
        &self.changes
    }

    /// Takes in that so many bytes, the last ones, were read in STOP_COPY and sent away.
    pub(super) fn streamed_to_end(&mut self, bytes: u64) {
        self.count_streamed(bytes);
        self.complete = true;
    }

    fn count_streamed(&mut self, bytes: u64) {
        self.streamed = self.streamed.saturating_add(usize::try_from(bytes).unwrap_or(usize::MAX));
        self.state_bytes = self.filled();
    }

    /// Whether the device said that this is all.
    pub(super) fn is_complete(&self) -> bool {
        self.complete
    }

    /// Whether what was read is here no more.
    pub(super) fn is_taken(&self) -> bool {
        self.taken
    }

    /// Bytes of the latest session that came in PRE_COPY.
    pub(super) fn precopy_bytes(&self) -> usize {
        self.precopy_bytes
    }

    /// Bytes of the latest session.
    pub(super) fn state_bytes(&self) -> usize {
        self.state_bytes
    }

    /// Bytes that came between the last two pauses in PRE_COPY, the session's begin counted as one.
    pub(super) fn last_batch(&self) -> Option<usize> {
        self.last_batch
    }

    /// Whether the device has more in PRE_COPY than it could be asked for yet: it never paused, and there is room.
    pub(super) fn is_short_of_first_pause(&self) -> bool {
        self.last_batch.is_none() && self.filled() < self.limit / 2
    }

    /// Bytes worth reading in PRE_COPY of a device that tells no sizes.
    ///
    /// Until it pauses, half the limit, which leaves room for the rest; then on as long as each batch is at most half of the
    /// one before. What comes in batches that do not shrink is only sent twice.
    pub(super) fn worth_reading_untold(&self) -> u64 {
        let settling = match (self.last_batch, self.batch_before) {
            (Some(last), Some(before)) => last <= before / 2,
            _ => true,
        };
        if settling { (self.limit / 2).saturating_sub(self.filled()) as u64 } else { 0 }
    }

    /// Reads what a device in PRE_COPY has now, at most `budget` bytes, and no more than the limit leaves room for.
    ///
    /// A device that hands out tiny pieces counts as having no more for now.
    ///
    /// # Errors
    /// The session is over, and what was read of it worthless.
    pub(super) fn read_precopy(
        &mut self,
        io: &mut dyn DeviceIo,
        budget: u64,
    ) -> Result<PrecopyRead, StreamError> {
        let room = self.limit.saturating_sub(self.filled());
        let mut left = usize::try_from(budget).unwrap_or(usize::MAX).min(room);
        let before = self.filled();
        let mut drained = false;
        let mut pace = Pace::new(self.patience[0], Instant::now());
        while left > 0 && !drained {
            match self.read(io, left)? {
                DataRead::Bytes(count) => {
                    left -= count;
                    drained = !pace.keeps_up(count, Instant::now());
                }
                DataRead::NothingNow => drained = true,
                DataRead::End => return Err(StreamError::EarlyEnd { read_bytes: self.filled() }),
            }
        }
        let bytes = self.filled() - before;
        self.precopy_bytes = self.filled();
        self.since_pause += bytes;
        if drained {
            self.batch_before = self.last_batch.replace(std::mem::take(&mut self.since_pause));
        }
        Ok(PrecopyRead { bytes: bytes as u64, drained })
    }

    /// Reads all that a device in STOP_COPY still has.
    ///
    /// # Errors
    /// The state is not complete and never will be.
    pub(super) fn read_to_end(&mut self, io: &mut dyn DeviceIo) -> Result<(), StreamError> {
        let patience = self.patience[1];
        let mut pace = Pace::new(patience, Instant::now());
        loop {
            let offered = self.limit.saturating_add(1) - self.filled();
            match self.read(io, offered)? {
                DataRead::Bytes(_) if self.filled() > self.limit => {
                    return Err(StreamError::TooLong { limit_bytes: self.limit });
                }
                DataRead::Bytes(count) if !pace.keeps_up(count, Instant::now()) => {
                    return Err(StreamError::Slow { moved_bytes: self.filled(), patience });
                }
                DataRead::Bytes(_) => {}
                DataRead::NothingNow => return Err(StreamError::Pause { read_bytes: self.filled() }),
                DataRead::End => break,
            }
        }
        self.complete = true;
        Ok(())
    }

    /// Reads once, at most `most` bytes, which is not 0.
    fn read(&mut self, io: &mut dyn DeviceIo, most: usize) -> Result<DataRead, StreamError> {
        let offered = most.min(self.filled().clamp(FIRST_CHUNK_BYTES, CHUNK_BYTES));
        if self.room.len() < offered {
            self.room.resize(offered, 0);
        }
        let room = &mut self.room[..offered];
        let read = io
            .read_data(room)
            .map_err(|source| StreamError::Read { read_bytes: self.blob.bytes(), source })?;
        if let DataRead::Bytes(count) = read {
            if count == 0 || count > offered {
                return Err(StreamError::Miscounted { claimed_bytes: count, offered_bytes: offered });
            }
            self.blob.push(&room[..count]);
            self.state_bytes = self.blob.bytes();
        }
        Ok(read)
    }
}

/// Writes a saved state to a device in RESUMING, piece by piece.
pub(super) struct StateWrite<'a> {
    io: &'a mut dyn DeviceIo,
    patience: Duration,
    pace: Pace,
    written_bytes: usize,
}

impl<'a> StateWrite<'a> {
    /// Begins with the first byte.
    pub(super) fn new(io: &'a mut dyn DeviceIo) -> Self {
        Self::within(io, PATIENCE)
    }

    fn within(io: &'a mut dyn DeviceIo, patience: Duration) -> Self {
        Self { io, patience, pace: Pace::new(patience, Instant::now()), written_bytes: 0 }
    }

    /// Writes the bytes that come next.
    ///
    /// # Errors
    /// The device refused a part; only a reset leads out of RESUMING then.
    pub(super) fn write(&mut self, bytes: &[u8]) -> Result<(), StreamError> {
        let patience = self.patience;
        for chunk in bytes.chunks(CHUNK_BYTES) {
            let written_bytes = self.written_bytes;
            self.io.write_data(chunk).map_err(|source| StreamError::Write { written_bytes, source })?;
            self.written_bytes += chunk.len();
            if !self.pace.keeps_up(chunk.len(), Instant::now()) {
                return Err(StreamError::Slow { moved_bytes: self.written_bytes, patience });
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;

    use base64::Engine;
    use base64::engine::general_purpose::STANDARD as BASE64;

    use super::*;
    use crate::device::{Capabilities, DeviceOperation, DeviceState, PrecopyInfo, STATE_LIMIT_BYTES};

    /// An interface of which only the data counts: each read answers with the next of the list, filled with its number.
    struct Reads(VecDeque<DataRead>, u8, Vec<usize>);

    fn reads(answers: impl IntoIterator<Item = DataRead>) -> Reads {
        Reads(answers.into_iter().collect(), 0, Vec::new())
    }

    impl DeviceIo for Reads {
        fn capabilities(&self) -> Capabilities {
            Capabilities::default()
        }

        fn state(&mut self) -> Result<DeviceState, DeviceError> {
            unreachable!("a stream asks for data only")
        }

        fn set_state(&mut self, _: DeviceState) -> Result<(), DeviceError> {
            unreachable!("a stream asks for data only")
        }

        fn read_data(&mut self, buffer: &mut [u8]) -> Result<DataRead, DeviceError> {
            assert!(!buffer.is_empty() && buffer.len() <= CHUNK_BYTES);
            self.1 += 1;
            let answer = self
                .0
                .pop_front()
                .ok_or_else(|| DeviceError::new(DeviceOperation::ReadData, "session is over"))?;
            if let DataRead::Bytes(count) = answer {
                let count = count.min(buffer.len());
                buffer[..count].fill(self.1);
            }
            Ok(answer)
        }

        fn write_data(&mut self, data: &[u8]) -> Result<(), DeviceError> {
            self.2.push(data.len());
            match self.2.len() {
                0..4 => Ok(()),
                _ => Err(DeviceError::new(DeviceOperation::WriteData, "no more")),
            }
        }

        fn precopy_info(&mut self) -> Result<Option<PrecopyInfo>, DeviceError> {
            unreachable!("a stream asks for data only")
        }

        fn data_size(&mut self) -> Result<Option<u64>, DeviceError> {
            unreachable!("a stream asks for data only")
        }

        fn reset(&mut self) -> Result<(), DeviceError> {
            unreachable!("a stream asks for data only")
        }
    }

    use DataRead::{Bytes, End, NothingNow};

    /// Takes the bytes that were read.
    fn bytes(stream: &mut StateStream) -> Vec<u8> {
        let text: serde_json::Value = serde_json::from_str(&stream.take().into_text()).unwrap();
        BASE64.decode(text["blob"].as_str().unwrap()).unwrap()
    }

    #[test]
    fn c29_a_pause_is_no_end_and_an_end_is_no_pause() {
        let mut stream = StateStream::new(100);
        let mut io = reads([Bytes(3), NothingNow, Bytes(1), NothingNow, Bytes(2), End]);
        assert_eq!(stream.read_precopy(&mut io, 50).unwrap(), PrecopyRead { bytes: 3, drained: true });
        assert_eq!(stream.last_batch(), Some(3));
        assert_eq!(stream.read_precopy(&mut io, 1).unwrap(), PrecopyRead { bytes: 1, drained: false });
        assert_eq!(stream.last_batch(), Some(3));
        assert_eq!(stream.read_precopy(&mut io, 1).unwrap(), PrecopyRead { bytes: 0, drained: true });
        assert_eq!(stream.last_batch(), Some(1));
        assert!(!stream.is_complete());
        stream.read_to_end(&mut io).unwrap();
        assert!(stream.is_complete());
        assert_eq!(bytes(&mut stream), [1, 1, 1, 3, 5, 5]);
        assert!(stream.is_complete() && stream.is_taken());
        assert_eq!((stream.precopy_bytes(), stream.state_bytes()), (4, 6));

        let early = StateStream::new(100).read_precopy(&mut reads([Bytes(3), End]), 50);
        assert!(matches!(early, Err(StreamError::EarlyEnd { read_bytes: 3 })));
        let pause = StateStream::new(100).read_to_end(&mut reads([Bytes(3), NothingNow, Bytes(3), End]));
        assert!(matches!(pause, Err(StreamError::Pause { read_bytes: 3 })));
    }

    #[test]
    fn a_state_of_exactly_the_limit_is_taken_and_a_longer_one_is_not() {
        let mut stream = StateStream::new(10);
        stream.read_to_end(&mut reads([Bytes(4), Bytes(6), End])).unwrap();
        assert_eq!(bytes(&mut stream).len(), 10);
        let mut stream = StateStream::new(10);
        let long = stream.read_to_end(&mut reads([Bytes(4), Bytes(7), End]));
        assert!(matches!(long, Err(StreamError::TooLong { limit_bytes: 10 })));
    }

    #[test]
    fn c47_precopy_fills_the_limit_and_no_more() {
        let mut stream = StateStream::new(10);
        let mut io = reads([Bytes(5), Bytes(5), End]);
        assert_eq!(stream.read_precopy(&mut io, 50).unwrap(), PrecopyRead { bytes: 10, drained: false });
        assert_eq!(stream.read_precopy(&mut io, 50).unwrap(), PrecopyRead { bytes: 0, drained: false });
        stream.read_to_end(&mut io).unwrap();
        assert_eq!(bytes(&mut stream).len(), 10);
    }

    #[test]
    fn c46_a_device_that_tells_nothing_is_read_on_only_while_its_batches_shrink() {
        let worth = |batches: &[usize]| {
            let mut stream = StateStream::new(1000);
            let answers =
                batches.iter().flat_map(|&bytes| [(bytes > 0).then_some(Bytes(bytes)), Some(NothingNow)]);
            let mut io = reads(answers.flatten());
            for &bytes in batches {
                assert_eq!(stream.read_precopy(&mut io, 500).unwrap().bytes, bytes as u64);
            }
            stream.worth_reading_untold()
        };
        assert_eq!((worth(&[]), worth(&[100])), (500, 400));
        assert_eq!((worth(&[100, 50]), worth(&[100, 51])), (350, 0));
        assert_eq!((worth(&[5, 5]), worth(&[5, 0, 0]), worth(&[5, 0, 1])), (0, 495, 0));
        assert_eq!(worth(&[300, 210]), 0, "a device that never rests leaves room for its end");
    }

    #[test]
    fn an_interface_that_miscounts_is_neither_believed_nor_asked_forever() {
        for claimed in [0, 12, usize::MAX] {
            let answers = std::iter::repeat_n(Bytes(claimed), 3);
            let error = StateStream::new(10).read_to_end(&mut reads(answers)).unwrap_err();
            assert!(
                matches!(error, StreamError::Miscounted { claimed_bytes, offered_bytes: 11 } if claimed_bytes == claimed)
            );
        }
        let error = StateStream::new(10).read_precopy(&mut reads([Bytes(0)]), 5).unwrap_err();
        assert!(matches!(error, StreamError::Miscounted { .. }));
    }

    #[test]
    fn memory_grows_with_what_arrives_and_is_freed_with_the_session() {
        let mut stream = StateStream::new(STATE_LIMIT_BYTES);
        let pieces = (0..100).map(|_| Bytes(FIRST_CHUNK_BYTES));
        stream.read_to_end(&mut reads(pieces.chain([Bytes(1), End]))).unwrap();
        assert_eq!(stream.state_bytes(), 100 * FIRST_CHUNK_BYTES + 1);
        assert!(stream.room.len() <= CHUNK_BYTES);
        stream.release();
        assert!(!stream.is_complete() && bytes(&mut stream).is_empty());
        assert!(stream.room.capacity() <= FIRST_CHUNK_BYTES);
        assert_eq!(stream.state_bytes(), 100 * FIRST_CHUNK_BYTES + 1);
        let room = stream.room.as_ptr();
        stream.restart();
        stream.read_to_end(&mut reads([Bytes(2), End])).unwrap();
        assert_eq!(stream.room.as_ptr(), room);
        assert_eq!((bytes(&mut stream), stream.state_bytes()), (vec![1, 1], 2));
    }

    /// A device that hands out a byte each 20 ms and takes as long for each piece that it is given.
    struct Trickle;

    impl DeviceIo for Trickle {
        fn capabilities(&self) -> Capabilities {
            Capabilities::default()
        }

        fn state(&mut self) -> Result<DeviceState, DeviceError> {
            unreachable!("a stream asks for data only")
        }

        fn set_state(&mut self, _: DeviceState) -> Result<(), DeviceError> {
            unreachable!("a stream asks for data only")
        }

        fn read_data(&mut self, _: &mut [u8]) -> Result<DataRead, DeviceError> {
            std::thread::sleep(Duration::from_millis(20));
            Ok(Bytes(1))
        }

        fn write_data(&mut self, _: &[u8]) -> Result<(), DeviceError> {
            std::thread::sleep(Duration::from_millis(1_020));
            Ok(())
        }

        fn precopy_info(&mut self) -> Result<Option<PrecopyInfo>, DeviceError> {
            unreachable!("a stream asks for data only")
        }

        fn data_size(&mut self) -> Result<Option<u64>, DeviceError> {
            unreachable!("a stream asks for data only")
        }

        fn reset(&mut self) -> Result<(), DeviceError> {
            unreachable!("a stream asks for data only")
        }
    }

    #[test]
    fn c61_a_trickle_is_a_pause_in_precopy_and_a_failure_in_stop_copy() {
        let mut stream = StateStream::new(STATE_LIMIT_BYTES);
        stream.patience = [Duration::from_millis(100), Duration::from_millis(200)];
        let read = stream.read_precopy(&mut Trickle, u64::MAX).unwrap();
        assert!(read.drained && (1..=10).contains(&read.bytes), "{read:?}");
        stream.restart();
        let error = stream.read_to_end(&mut Trickle).unwrap_err();
        assert!(matches!(error, StreamError::Slow { moved_bytes: 1..=11, .. }), "{error}");
        let mut trickle = Trickle;
        let mut writing = StateWrite::within(&mut trickle, Duration::ZERO);
        let error = writing.write(&vec![0; 3 * CHUNK_BYTES]).unwrap_err();
        assert!(matches!(error, StreamError::Slow { moved_bytes: CHUNK_BYTES, .. }), "{error}");
    }

    #[test]
    fn c58_only_no_bytes_at_all_are_the_end_of_a_state() {
        let pieces = std::iter::repeat_n(Bytes(30_000), 8).chain([Bytes(22_192), End]);
        let mut stream = StateStream::new(STATE_LIMIT_BYTES);
        stream.read_to_end(&mut reads(pieces)).unwrap();
        assert_eq!(stream.state_bytes(), 262_192);
    }

    #[test]
    fn a_state_is_written_in_bounded_pieces_and_a_refusal_says_where() {
        let mut io = reads([]);
        StateWrite::new(&mut io).write(&vec![0; 2 * CHUNK_BYTES + 1]).unwrap();
        assert_eq!(io.2, [CHUNK_BYTES, CHUNK_BYTES, 1]);
        let refused = StateWrite::new(&mut io).write(b"more").unwrap_err();
        assert_eq!(refused.to_string(), "Cannot write the device's state beyond byte 0");
    }
}
