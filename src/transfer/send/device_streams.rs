// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Devices' states on their way to a receiver of this crate: a thread for each device reads pieces, which go over any connection.
//!
//! Of one device's pieces none is further ahead of one that was not acknowledged than the receiver's queue allows. That bounds the
//! memory at both ends: what a device hands out is never held as a whole.

use std::io;
use std::sync::Arc;
use std::sync::mpsc::Sender;
use std::thread::{JoinHandle, panicking};

use super::connections::Event;
use super::piece::{DevicePiece, Pool, Window};
use crate::device::{StateRead, StateReader};
use crate::threads::ThreadStart;
use crate::transfer::frame::{PIECE_HEAD_BYTES, seal_piece};
use crate::transfer::limits::PIECES_AHEAD;

/// Most bytes of a device's state in one piece.
pub(super) const PIECE_BYTES: usize = 512 << 10;

/// Pieces of all devices that may be on their way, as far as each device may have one.
const MOST_PIECES: u64 = 64;

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
}

impl DeviceReads {
    /// Begins a turn. Each piece, of `piece_bytes` at most, and each end is told to `events`.
    ///
    /// # Errors
    /// A thread cannot be had; the turn is over.
    pub(super) fn start(
        &mut self,
        readers: Vec<StateReader>,
        piece_bytes: usize,
        events: &Sender<(usize, Event)>,
        threads: ThreadStart,
    ) -> io::Result<()> {
        self.stop();
        let pieces = (MOST_PIECES / readers.len().max(1) as u64).clamp(1, PIECES_AHEAD);
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
