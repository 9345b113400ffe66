// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Devices' states on their way to a receiver of this crate: a thread for each device reads pieces, which go over any connection.
//!
//! Of one device's pieces none is further ahead of one that was not acknowledged than the receiver's queue allows, and the pieces of all
//! devices that are on their way have a limit in bytes, however many devices there are. That bounds the memory at both ends: what a device
//! hands out is never held as a whole.

use std::io;
use std::sync::Arc;
use std::sync::mpsc::Sender;
use std::thread::{JoinHandle, panicking};

use super::connections::Event;
use super::piece::{DevicePiece, Pool, Window};
use crate::device::{StateRead, StateReader};
use crate::sync::lock;
use crate::threads::ThreadStart;
use crate::transfer::frame::{PIECE_HEAD_BYTES, seal_piece};
use crate::transfer::limits::{LEAST_PIECE_BYTES, PIECES_AHEAD};

/// Most bytes of a device's state in one piece.
const PIECE_BYTES: u64 = 512 << 10;

/// Bytes of all devices' pieces that may be on their way, with their heads.
const MOST_BYTES: u64 = 32 << 20;

/// What a round and its receiver allow pieces of devices' states.
#[derive(Debug, Clone, Copy)]
pub(super) struct PieceLimits {
    /// Bytes of the state in one piece.
    pub(super) piece_bytes: u64,
    /// Bytes of all that are on their way.
    pub(super) queue_bytes: u64,
}

/// What one device may have on its way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct DeviceShare {
    piece_bytes: usize,
    pieces: u64,
}

impl PieceLimits {
    /// The share of each of so many devices: small pieces rather than more than is allowed, but none below the least piece.
    fn share(self, devices: usize) -> DeviceShare {
        let head_bytes = PIECE_HEAD_BYTES as u64;
        let bytes = self.queue_bytes.min(MOST_BYTES) / devices.max(1) as u64;
        let piece_bytes = self.piece_bytes.min(PIECE_BYTES).min(bytes.saturating_sub(head_bytes));
        let piece_bytes = piece_bytes.max(LEAST_PIECE_BYTES);
        DeviceShare {
            piece_bytes: usize::try_from(piece_bytes).unwrap_or(usize::MAX),
            pieces: (bytes / (piece_bytes + head_bytes)).clamp(1, PIECES_AHEAD),
        }
    }
}

/// A device that is read.
struct Reading {
    device: u16,
    thread: JoinHandle<()>,
    window: Arc<Window>,
}

/// One turn of reading all devices that have something, each on a thread of its own.
#[derive(Default)]
pub(super) struct DeviceReads {
    threads: Vec<Reading>,
    done: Vec<StateRead>,
    pool: Pool,
    /// Bytes that the buffers in the pool have room for at least.
    pooled_piece_bytes: usize,
}

impl DeviceReads {
    /// Begins a turn within `limits`. Each piece, and each end, is told to `events`.
    ///
    /// # Errors
    /// A thread cannot be had; the turn is over.
    pub(super) fn start(
        &mut self,
        readers: Vec<StateReader>,
        limits: PieceLimits,
        events: &Sender<(usize, Event)>,
        threads: ThreadStart,
    ) -> io::Result<()> {
        self.stop();
        let DeviceShare { piece_bytes, pieces } = limits.share(readers.len());
        if piece_bytes < self.pooled_piece_bytes {
            lock(&self.pool).clear();
        }
        self.pooled_piece_bytes = piece_bytes;
        for reader in readers {
            let pool = Arc::clone(&self.pool);
            let window = Arc::new(Window::new(pieces, pool));
            let (device, events) = (reader.device(), events.clone());
            let work = {
                let window = Arc::clone(&window);
                move || read_on(reader, piece_bytes, &window, &Telling(events))
            };
            let thread = threads.spawn(format!("migrate-device-{device}"), work)?;
            self.threads.push(Reading { device, thread, window });
        }
        Ok(())
    }

    /// Takes in that the turn of one device is over.
    pub(super) fn ended(&mut self, read: StateRead) {
        self.done.push(read);
    }

    /// Whether the turn of every device is over.
    pub(super) fn are_over(&self) -> bool {
        self.done.len() == self.threads.len()
    }

    /// Returns what the turn brought, once it is over and all of it was acknowledged.
    pub(super) fn take(&mut self) -> Vec<StateRead> {
        let mut done = std::mem::take(&mut self.done);
        for read in &mut done {
            let reading = self.threads.iter().find(|reading| reading.device == read.device());
            let acknowledged = reading.and_then(|reading| reading.window.acknowledged());
            acknowledged.into_iter().for_each(|at| read.arrived(at));
        }
        self.stop();
        done
    }

    /// Ends the turn: each device is read to the end of its piece.
    fn stop(&mut self) {
        self.threads.iter().for_each(|reading| reading.window.close());
        for reading in self.threads.drain(..) {
            let _ended = reading.thread.join();
        }
        self.done.clear();
    }
}

impl Drop for DeviceReads {
    fn drop(&mut self) {
        self.stop();
    }
}

/// The way from a reading thread to the engine, which hears of a panic, too.
struct Telling(Sender<(usize, Event)>);

impl Telling {
    fn tell(&self, event: Event) {
        let _engine_gone = self.0.send((usize::MAX, event));
    }
}

impl Drop for Telling {
    fn drop(&mut self) {
        if panicking() {
            self.tell(Event::Died);
        }
    }
}

fn read_on(mut reader: StateReader, piece_bytes: usize, window: &Arc<Window>, telling: &Telling) {
    while let Some(mut payload) = window.await_room(reader.next_index()) {
        payload.clear();
        payload.resize(PIECE_HEAD_BYTES, 0);
        let Some(piece) = reader.read(&mut payload, piece_bytes) else {
            window.give_back(payload);
            break;
        };
        seal_piece(piece, &mut payload);
        telling.tell(Event::Piece(DevicePiece::new(payload, piece.index, window)));
    }
    telling.tell(Event::Read(reader.end()));
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn pieces_on_their_way_keep_to_both_limits_however_many_devices_there_are(
            devices in 1..=256_usize,
            piece_bytes in LEAST_PIECE_BYTES..1 << 21,
            queue_bytes in any::<u32>(),
        ) {
            let least_bytes = devices as u64 * (LEAST_PIECE_BYTES + PIECE_HEAD_BYTES as u64);
            let queue_bytes = u64::from(queue_bytes).max(least_bytes);
            let share = PieceLimits { piece_bytes, queue_bytes }.share(devices);
            let bytes = devices as u64 * share.pieces * (share.piece_bytes + PIECE_HEAD_BYTES) as u64;
            prop_assert!(bytes <= queue_bytes.min(MOST_BYTES), "{share:?}");
            prop_assert!(share.piece_bytes as u64 <= piece_bytes && share.pieces <= PIECES_AHEAD);
            prop_assert!(share.piece_bytes as u64 >= LEAST_PIECE_BYTES && share.pieces >= 1);
        }
    }

    #[test]
    fn few_devices_have_large_pieces_and_many_of_them_on_their_way() {
        let limits = PieceLimits { piece_bytes: 1 << 20, queue_bytes: 64 << 20 };
        assert_eq!(limits.share(1), DeviceShare { piece_bytes: 512 << 10, pieces: PIECES_AHEAD });
        assert_eq!(limits.share(4), DeviceShare { piece_bytes: 512 << 10, pieces: 15 });
        assert_eq!(limits.share(256).pieces, 1);
    }
}
