// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Copies memory out of the descriptors of a running VM, and finds what changed meanwhile once it is paused.

use std::fmt;
use std::io::{self, Read};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use thiserror::Error;

use super::seen::Seen;
use super::slots::SlotFiles;
use crate::range::GpaRange;
use crate::snapshot::parallel;
use crate::snapshot::reserve::{index, resize};
use crate::snapshot::write::SnapshotWriter;
use crate::sync;
use crate::threads::ThreadStart;
use crate::transfer::receive::ReceiverHandle;

/// Memory that one thread copies at a time.
const PIECE_BYTES: u64 = 1 << 20;

/// Why copying ended early.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[error("Source closed the connection, or the migration was given up here")]
pub(crate) struct Ended;

impl Ended {
    /// Whether that is what `error` says.
    pub(crate) fn is(error: &io::Error) -> bool {
        error.get_ref().is_some_and(|inner| inner.is::<Self>())
    }
}

/// How a source that passes its memory as descriptors is treated.
#[derive(Default)]
pub struct LocalOptions {
    /// How long memory may be copied while the VM runs, before Config is answered; `None`: not at all.
    ///
    /// A Cloud Hypervisor source takes no other API call meanwhile, and ends when its guest reboots.
    pub warm_timeout: Option<Duration>,
    /// Tells whether anybody waits for the copy, which ends early where nobody does: [`ReceiverHandle::stop`] cancels it.
    pub receiver: Option<ReceiverHandle>,
    /// Where to see how far it is.
    pub progress: CopyProgress,
    /// Told how it goes, on the thread that the source waits for: it may not wait itself.
    pub observer: Option<Box<dyn FnMut(LocalEvent) + Send>>,
}

impl fmt::Debug for LocalOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LocalOptions")
            .field("warm_timeout", &self.warm_timeout)
            .field("receiver", &self.receiver)
            .field("progress", &self.progress)
            .field("observer", &self.observer.is_some())
            .finish()
    }
}

/// What happens to memory that came as descriptors.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum LocalEvent {
    /// The source passed all its memory as descriptors.
    Passed {
        /// Bytes of RAM.
        ram_bytes: u64,
        /// How long it is copied while the VM runs, at most; `None`: it is copied when the VM is paused.
        warm_timeout: Option<Duration>,
    },
    /// The copy of the running VM is over, and it is paused next.
    Copied {
        /// Bytes that were copied; holes are none, but where a base has something.
        bytes: u64,
        /// Whether that is all there was.
        whole: bool,
        /// How long it took.
        took: Duration,
    },
    /// Memory was moved within the snapshot while the VM was paused, because its state left out memory that it had announced.
    Moved {
        /// Bytes that were moved.
        bytes: u64,
    },
    /// The memory of the paused VM is stored.
    Stored {
        /// Bytes that were looked at while the VM was paused.
        read_bytes: u64,
        /// Bytes that were written of them while the VM was paused.
        written_bytes: u64,
        /// How long it took.
        took: Duration,
    },
}

impl LocalOptions {
    pub(crate) fn tell(&mut self, event: LocalEvent) {
        log::info!("Memory in descriptors: {event:?}");
        if let Some(observer) = &mut self.observer {
            observer(event);
        }
    }
}

/// How far the copy of memory is that came as descriptors, for any thread to look at.
#[derive(Debug, Clone, Default)]
pub struct CopyProgress(Arc<CopyCounters>);

#[derive(Debug, Default)]
struct CopyCounters {
    total: AtomicU64,
    done: AtomicU64,
    failed: AtomicBool,
}

impl CopyProgress {
    /// Bytes that the pass over memory which is under way, or was the last, looks at; 0 before the first.
    pub fn total_bytes(&self) -> u64 {
        self.0.total.load(Ordering::Relaxed)
    }

    /// Bytes that it has looked at.
    pub fn done_bytes(&self) -> u64 {
        self.0.done.load(Ordering::Relaxed)
    }

    /// Whether the memory of the paused VM could not be stored: a hook that runs beside it need not go on.
    pub fn has_failed(&self) -> bool {
        self.0.failed.load(Ordering::Relaxed)
    }

    pub(crate) fn fail(&self) {
        self.0.failed.store(true, Ordering::Relaxed);
    }

    fn begin(&self, total: u64) {
        self.0.done.store(0, Ordering::Relaxed);
        self.0.total.store(total, Ordering::Relaxed);
    }

    fn advance(&self, bytes: u64) {
        self.0.done.fetch_add(bytes, Ordering::Relaxed);
    }
}

/// Who waits for a copy, and sees how far it is.
#[derive(Clone, Copy)]
pub(crate) struct Watch<'a> {
    pub(crate) receiver: Option<&'a ReceiverHandle>,
    pub(crate) progress: &'a CopyProgress,
    /// Raised where something else has failed.
    pub(crate) ended: &'a AtomicBool,
}

impl Watch<'_> {
    /// Fails where nobody waits for the copy.
    fn check(&self) -> io::Result<()> {
        let has_gone = |receiver: &ReceiverHandle| receiver.is_stopped() || receiver.source_has_gone();
        if self.ended.load(Ordering::Relaxed) || self.receiver.is_some_and(has_gone) {
            return Err(io::Error::new(io::ErrorKind::BrokenPipe, Ended));
        }
        Ok(())
    }
}

/// What a copy came to.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Copied {
    pub(crate) bytes: u64,
    pub(crate) written: u64,
    pub(crate) whole: bool,
}

/// Copies all of `files` that is no hole to `writer`, on all processors.
///
/// # Errors
/// A descriptor was cut off, the disk is full, or nobody waits any more ([`Ended`]).
pub(crate) fn copy(files: &SlotFiles, writer: &SnapshotWriter, watch: Watch<'_>) -> io::Result<Copied> {
    each_piece(files.data()?, PIECE_BYTES, None, watch, writer.threads(), |piece, _| {
        writer.fill_with(piece, |range, buffer| files.read(range, buffer)).map(|()| piece.len())
    })
}

/// Copies as [`copy`] does while the VM runs, `until` it takes too long, and notes in `seen` what was copied.
///
/// # Errors
/// As [`copy`].
pub(crate) fn copy_warm(
    files: &SlotFiles,
    seen: &Seen,
    writer: &SnapshotWriter,
    until: Option<Instant>,
    watch: Watch<'_>,
) -> io::Result<Copied> {
    each_seen(files, seen, writer, until, watch, |piece, bytes| {
        seen.note(piece, bytes);
        writer.fill(piece, &mut &*bytes).map(|()| piece.len())
    })
}

/// Stores what of `files` is not as it was when it was `seen`, on all processors.
///
/// # Errors
/// As [`copy`].
pub(crate) fn update(
    files: &SlotFiles,
    seen: &Seen,
    writer: &SnapshotWriter,
    watch: Watch<'_>,
) -> io::Result<Copied> {
    each_seen(files, seen, writer, None, watch, |piece, bytes| {
        seen.changed(piece, bytes).into_iter().try_fold(0, |written, run| {
            let mut rest = &bytes[index(run.start() - piece.start())..];
            Ok(written + writer.update_with(run, |_, buffer| rest.read_exact(buffer))?)
        })
    })
}

/// Does `work` for the bytes of each piece, of whole units, in which `files` or what is stored has something: a hole where something is
/// stored is zeros.
fn each_seen(
    files: &SlotFiles,
    seen: &Seen,
    writer: &SnapshotWriter,
    until: Option<Instant>,
    watch: Watch<'_>,
    work: impl Fn(GpaRange, &[u8]) -> io::Result<u64> + Sync,
) -> io::Result<Copied> {
    let ranges: Vec<_> = files.data()?.into_iter().chain(writer.stored()?).collect();
    let units = seen.units_of(&ranges);
    each_piece(units, seen.piece_bytes(), until, watch, writer.threads(), |piece, bytes| {
        resize(bytes, index(piece.len()))?;
        let bytes = &mut bytes[..index(piece.len())];
        files.read(piece, bytes)?;
        work(piece, bytes)
    })
}

/// Does `work` for each piece of `ranges`, with a buffer of the thread's.
fn each_piece(
    ranges: Vec<GpaRange>,
    piece_bytes: u64,
    until: Option<Instant>,
    watch: Watch<'_>,
    threads: ThreadStart,
    work: impl Fn(GpaRange, &mut Vec<u8>) -> io::Result<u64> + Sync,
) -> io::Result<Copied> {
    let pieces: Vec<_> = ranges.into_iter().flat_map(|range| range.pieces(piece_bytes)).collect();
    watch.progress.begin(pieces.iter().map(|piece| piece.len()).sum());
    let buffers = Mutex::<Vec<Vec<u8>>>::default();
    let (bytes, written, late) = (AtomicU64::new(0), AtomicU64::new(0), AtomicBool::new(false));
    parallel::for_each(&pieces, parallel::processors(), threads, |&piece| {
        watch.check()?;
        if late.load(Ordering::Relaxed) || until.is_some_and(|until| Instant::now() >= until) {
            late.store(true, Ordering::Relaxed);
            return Ok(());
        }
        let mut buffer = sync::lock(&buffers).pop().unwrap_or_default();
        written.fetch_add(work(piece, &mut buffer)?, Ordering::Relaxed);
        sync::lock(&buffers).push(buffer);
        bytes.fetch_add(piece.len(), Ordering::Relaxed);
        watch.progress.advance(piece.len());
        Ok::<_, io::Error>(())
    })?;
    let whole = !late.into_inner();
    Ok(Copied { bytes: bytes.into_inner(), written: written.into_inner(), whole })
}
