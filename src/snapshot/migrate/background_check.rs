// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Checks the memory of a snapshot while it is sent.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use crate::range::united;
use crate::snapshot::parallel;
use crate::snapshot::read::{FullSnapshot, Stored};
use crate::snapshot::reserve::{index, push, zeros};

/// Bytes checked at once.
const CHECK_BYTES: u64 = 1 << 20;

/// A check that runs on its own threads. Dropping it ends it early.
#[derive(Debug)]
pub(super) struct BackgroundCheck {
    given_up: Arc<AtomicBool>,
    thread: JoinHandle<io::Result<()>>,
}

impl BackgroundCheck {
    /// Begins to check every byte of the memory of `snapshot` against its manifest; there is nothing to do without one.
    ///
    /// # Errors
    /// The system has no thread left.
    pub(super) fn start(snapshot: &Arc<FullSnapshot>) -> io::Result<Self> {
        let (given_up, threads) = (Arc::<AtomicBool>::default(), snapshot.stored().thread_start);
        let (snapshot, of_thread) = (Arc::clone(snapshot), Arc::clone(&given_up));
        let thread = threads.spawn("snapshot-check", move || check(snapshot.stored(), &of_thread))?;
        Ok(Self { given_up, thread })
    }

    /// Waits for the check to end.
    ///
    /// # Errors
    /// The file cannot be read or was cut off; or a block was altered, then the error holds [`Altered`](crate::snapshot::Altered).
    pub(super) fn finish(self) -> io::Result<()> {
        let panicked = |_| Err(io::Error::other("The checking thread panicked"));
        self.thread.join().unwrap_or_else(panicked)
    }

    pub(super) fn give_up(&self) {
        self.given_up.store(true, Ordering::Relaxed);
    }
}

fn check(snapshot: &Stored, given_up: &AtomicBool) -> io::Result<()> {
    let Some(memory) = snapshot.reader() else { return Ok(()) };
    let Some(written) = memory.populated_as_written() else { return Ok(()) };
    // What is a hole of the file and was zero when it was written need not be read.
    let mut ranges = Vec::new();
    for range in memory.populated().chain(written.map(Ok)) {
        push(&mut ranges, range?)?;
    }
    let mut pieces = Vec::new();
    for piece in united(ranges).into_iter().flat_map(|range| range.pieces(CHECK_BYTES)) {
        push(&mut pieces, piece)?;
    }
    parallel::for_each(&pieces, parallel::processors(), snapshot.thread_start, |&piece| {
        if given_up.load(Ordering::Relaxed) {
            return Ok(());
        }
        memory.read_checked(piece, &mut zeros(index(piece.len()))?)
    })
}
