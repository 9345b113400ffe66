// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Checks the memory of a snapshot while it is sent.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use crate::snapshot::parallel;
use crate::snapshot::read::checked::CheckedMemory;
use crate::snapshot::read::differential::united;
use crate::snapshot::read::dir::SnapshotDir;
use crate::snapshot::reserve::{push, zeros};

/// Bytes checked at once.
const CHECK_BYTES: u64 = 1 << 20;

/// A check under way on threads of its own. Dropped, it ends early.
#[derive(Debug)]
pub(crate) struct Checking {
    given_up: Arc<AtomicBool>,
    thread: JoinHandle<io::Result<()>>,
}

impl Checking {
    /// Begins to check every byte of the memory of `dir` against its manifest; there is nothing to do without one.
    ///
    /// # Errors
    /// The system has no thread left.
    pub(crate) fn start(dir: &Arc<SnapshotDir>) -> io::Result<Self> {
        let (given_up, threads) = (Arc::<AtomicBool>::default(), dir.thread_start());
        let (dir, of_thread) = (Arc::clone(dir), Arc::clone(&given_up));
        let check = move || dir.checked().map_or(Ok(()), |memory| check(&dir, &memory, &of_thread));
        let thread = threads.spawn("snapshot-check", check)?;
        Ok(Self { given_up, thread })
    }

    /// Waits for the check to end.
    ///
    /// # Errors
    /// The file cannot be read or was cut off; or a block was altered, then the error holds [`Altered`](crate::snapshot::Altered).
    pub(crate) fn finish(self) -> io::Result<()> {
        let panicked = |_| Err(io::Error::other("The checking thread panicked"));
        self.thread.join().unwrap_or_else(panicked)
    }

    pub(crate) fn give_up(&self) {
        self.given_up.store(true, Ordering::Relaxed);
    }
}

fn check(dir: &SnapshotDir, memory: &CheckedMemory<'_>, given_up: &AtomicBool) -> io::Result<()> {
    // Where the file has a hole and is to have one, there is nothing to read.
    let mut ranges = Vec::new();
    for range in dir.populated().chain(memory.populated().map(Ok)) {
        push(&mut ranges, range?)?;
    }
    let mut pieces = Vec::new();
    for piece in united(ranges).into_iter().flat_map(|range| range.pieces(CHECK_BYTES)) {
        push(&mut pieces, piece)?;
    }
    parallel::for_each(&pieces, parallel::processors(), dir.thread_start(), |&piece| {
        if given_up.load(Ordering::Relaxed) {
            return Ok(());
        }
        memory.read(piece, &mut zeros(usize::try_from(piece.len()).unwrap_or(usize::MAX))?)
    })
}
