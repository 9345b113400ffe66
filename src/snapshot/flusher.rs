// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Brings a file to disk while it is being written, so that little is left to do when the VM is paused.

use std::fs::File;
use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::thread::JoinHandle;

/// Bytes written between two syncs.
const FLUSH_BYTES: u64 = 256 << 20;

/// A thread that syncs a file each time [`FLUSH_BYTES`] were written to it.
#[derive(Debug)]
pub(super) struct Flusher {
    unsynced: AtomicU64,
    wake: SyncSender<()>,
    thread: JoinHandle<io::Result<()>>,
}

impl Flusher {
    /// Starts the thread.
    ///
    /// # Errors
    /// The system has no descriptor or thread left.
    pub(super) fn start(file: &File) -> io::Result<Self> {
        let file = file.try_clone()?;
        let (wake, woken) = sync_channel(1);
        let thread = std::thread::Builder::new()
            .name("snapshot-flush".to_owned())
            .spawn(move || sync_whenever(&file, &woken))?;
        Ok(Self { unsynced: AtomicU64::new(0), wake, thread })
    }

    /// Tells that `bytes` more were written; never waits.
    ///
    /// # Errors
    /// A sync failed; [`Flusher::finish`] says why.
    pub(super) fn wrote(&self, bytes: u64) -> io::Result<()> {
        if self.unsynced.fetch_add(bytes, Ordering::Relaxed) + bytes < FLUSH_BYTES {
            return Ok(());
        }
        self.unsynced.store(0, Ordering::Relaxed);
        match self.wake.try_send(()) {
            Ok(()) | Err(TrySendError::Full(())) => Ok(()),
            Err(TrySendError::Disconnected(())) => Err(io::Error::other("Cannot bring the pages to disk")),
        }
    }

    /// Ends the thread. What was written since its last sync is the caller's to sync.
    ///
    /// # Errors
    /// A sync failed: bytes written before it may be lost for good.
    pub(super) fn finish(self) -> io::Result<()> {
        drop(self.wake);
        self.thread.join().unwrap_or_else(|_| Err(io::Error::other("The syncing thread panicked")))
    }
}

fn sync_whenever(file: &File, woken: &Receiver<()>) -> io::Result<()> {
    woken.iter().try_for_each(|()| file.sync_data())
}
