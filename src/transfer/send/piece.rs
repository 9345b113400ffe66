// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A piece of a device's state on its way, and how many there may be.

use std::collections::BTreeSet;
use std::fmt;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Instant;

use crate::sync::lock;
use crate::transfer::frame::PIECE_HEAD_BYTES;

/// Buffers that wait for their next piece.
pub(super) type Pool = Arc<Mutex<Vec<Vec<u8>>>>;

/// A piece of a device's state on its way, its head before its bytes; dropped, it makes room for another.
pub(super) struct DevicePiece {
    payload: Vec<u8>,
    index: u64,
    window: Arc<Window>,
}

impl DevicePiece {
    /// Takes a piece in that may be sent.
    pub(super) fn new(payload: Vec<u8>, index: u64, window: &Arc<Window>) -> Self {
        window.enter(index);
        Self { payload, index, window: Arc::clone(window) }
    }

    /// What goes over the wire.
    pub(super) fn payload(&self) -> &[u8] {
        &self.payload
    }

    /// Bytes of the state.
    pub(super) fn state_bytes(&self) -> u64 {
        (self.payload.len() - PIECE_HEAD_BYTES) as u64
    }
}

impl fmt::Debug for DevicePiece {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DevicePiece").field("index", &self.index).finish_non_exhaustive()
    }
}

impl Drop for DevicePiece {
    fn drop(&mut self) {
        self.window.release(self.index, std::mem::take(&mut self.payload));
    }
}

/// The pieces of one device that may be on their way.
pub(super) struct Window {
    ahead: Mutex<Ahead>,
    changed: Condvar,
    /// How many.
    pieces: u64,
    pool: Pool,
}

#[derive(Default)]
struct Ahead {
    on_their_way: BTreeSet<u64>,
    /// When one was last acknowledged.
    acknowledged: Option<Instant>,
    closed: bool,
}

impl Window {
    /// Lets so many pieces be on their way; buffers are of `pool`, and go back there.
    pub(super) fn new(pieces: u64, pool: Pool) -> Self {
        Self { ahead: Mutex::default(), changed: Condvar::new(), pieces, pool }
    }

    /// Waits until the piece `index` may be sent, and returns a buffer for it; `None` once nothing may.
    pub(super) fn await_room(&self, index: u64) -> Option<Vec<u8>> {
        let is_full = |ahead: &mut Ahead| {
            let first = ahead.on_their_way.first().copied().unwrap_or(index);
            !ahead.closed && index - first >= self.pieces
        };
        let ahead = self.changed.wait_while(lock(&self.ahead), is_full);
        let closed = ahead.unwrap_or_else(PoisonError::into_inner).closed;
        (!closed).then(|| lock(&self.pool).pop().unwrap_or_default())
    }

    fn enter(&self, index: u64) {
        lock(&self.ahead).on_their_way.insert(index);
    }

    fn release(&self, index: u64, buffer: Vec<u8>) {
        let mut ahead = lock(&self.ahead);
        ahead.on_their_way.remove(&index);
        ahead.acknowledged = Some(Instant::now());
        drop(ahead);
        self.changed.notify_one();
        self.give_back(buffer);
    }

    /// When a piece was last acknowledged.
    pub(super) fn acknowledged(&self) -> Option<Instant> {
        lock(&self.ahead).acknowledged
    }

    /// Takes a buffer back that nothing was read into.
    pub(super) fn give_back(&self, buffer: Vec<u8>) {
        lock(&self.pool).push(buffer);
    }

    /// Lets nothing more be sent.
    pub(super) fn close(&self) {
        lock(&self.ahead).closed = true;
        self.changed.notify_one();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn piece(window: &Arc<Window>, index: u64) -> DevicePiece {
        DevicePiece::new(window.await_room(index).unwrap(), index, window)
    }

    #[test]
    fn no_piece_is_further_ahead_of_an_unacknowledged_one_than_its_window() {
        let window = Arc::new(Window::new(3, Pool::default()));
        let first = piece(&window, 0);
        let others = [1, 2].map(|index| piece(&window, index));
        drop(others);
        let waiting = std::thread::spawn({
            let window = Arc::clone(&window);
            move || window.await_room(3).is_some()
        });
        std::thread::sleep(std::time::Duration::from_millis(50));
        assert!(!waiting.is_finished(), "two of three were acknowledged, but not the first");
        drop(first);
        assert!(waiting.join().unwrap());
        let kept = piece(&window, 3);
        window.close();
        assert!(window.await_room(9).is_none());
        drop(kept);
    }
}
