// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A sparse file that guest memory is written to, from any number of threads: what full snapshots and differentials share.

use std::fs::File;
use std::io::{self, ErrorKind, Read};
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard};

use thiserror::Error;
use vm_memory::GuestMemoryBackend;

use crate::range::GpaRange;
use crate::snapshot::disk::{WriteBack, WriteError, data_parts, extend};
use crate::snapshot::format::{Extent, Placement};
use crate::snapshot::reserve::{index, push, resize};
use crate::sync;
use crate::threads::ThreadStart;
use crate::vm::read_memory;

/// Bytes were supplied for guest memory that the snapshot does not have.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[error("{range} is not all memory of the VM")]
struct NotMemory {
    range: GpaRange,
}

/// Why bytes are not in their place.
#[derive(Debug, Error)]
pub(super) enum FillError {
    /// The file does not take them, or what they come from, or are compared with, cannot be read.
    #[error(transparent)]
    Read(io::Error),
    /// They could not be written.
    #[error(transparent)]
    Write(io::Error),
}

impl FillError {
    /// Returns the error to report, in which `named` names the file.
    pub(super) fn into_io(self, named: impl FnOnce(io::Error) -> WriteError) -> io::Error {
        match self {
            Self::Read(error) => error,
            Self::Write(error) => io::Error::new(error.kind(), named(error)),
        }
    }
}

/// The file. Ranges are cut into pieces that lie in one cell of it each; each thread borrows a buffer for them.
#[derive(Debug)]
pub(super) struct SparseFile {
    file: File,
    placement: Placement,
    cell_bytes: u64,
    buffers: Mutex<Vec<Vec<u8>>>,
    pub(super) write_back: WriteBack,
    failed: AtomicBool,
}

impl SparseFile {
    /// Takes an empty file and makes it one hole, for memory placed as in `placement`.
    pub(super) fn new(
        file: File,
        placement: Placement,
        cell_bytes: u64,
        threads: ThreadStart,
    ) -> io::Result<Self> {
        extend(&file, placement.bytes())?;
        let write_back = WriteBack::start(&file, threads)?;
        let (buffers, failed) = (Mutex::default(), AtomicBool::new(false));
        Ok(Self { file, placement, cell_bytes, buffers, write_back, failed })
    }

    pub(super) fn file(&self) -> &File {
        &self.file
    }

    pub(super) fn placement(&self) -> &Placement {
        &self.placement
    }

    /// Cuts the file off where `placement` ends, which the file's bytes agree with.
    pub(super) fn cut_off(&mut self, placement: Placement) -> io::Result<()> {
        self.file.set_len(placement.bytes())?;
        self.placement = placement;
        Ok(())
    }

    pub(super) fn cell_bytes(&self) -> u64 {
        self.cell_bytes
    }

    pub(super) fn cells(&self) -> u64 {
        self.placement.bytes().div_ceil(self.cell_bytes)
    }

    /// Index of the cell that holds `piece`.
    pub(super) fn cell_of(&self, piece: Extent) -> usize {
        index(piece.offset / self.cell_bytes)
    }

    /// Hands the bytes of `range`, which `read` supplies piece by piece in order, to `store`, which returns how many it wrote.
    ///
    /// # Errors
    /// `range` is not all memory, and nothing was read; or the first error of `read` or `store`, or of an earlier write-back.
    pub(super) fn fill(
        &self,
        range: GpaRange,
        mut read: impl FnMut(GpaRange, &mut [u8]) -> io::Result<()>,
        mut store: impl FnMut(Extent, &[u8]) -> Result<u64, FillError>,
    ) -> Result<(), FillError> {
        if !self.placement.holds(range) {
            let refused = io::Error::new(ErrorKind::InvalidInput, NotMemory { range });
            return Err(FillError::Read(refused));
        }
        let mut buffer = self.buffers().pop().unwrap_or_default();
        let mut pieces = self.placement.locate(range).flat_map(|extent| extent.cut(self.cell_bytes));
        let filled = pieces.try_for_each(|piece| {
            let length = index(piece.range.len());
            if buffer.len() < length {
                resize(&mut buffer, length).map_err(FillError::Read)?;
            }
            read(piece.range, &mut buffer[..length]).map_err(FillError::Read)?;
            let stored = store(piece, &buffer[..length]);
            // Back-pressure: waiting for the disk comes after, with no cell locked.
            let stored = stored.and_then(|written| self.write_back.wrote(written).map_err(FillError::Write));
            stored.inspect_err(|_| self.fail())
        });
        self.buffers().push(buffer);
        filled
    }

    /// Writes those `parts` of `bytes`, ascending, that are wanted; returns how many bytes that are.
    pub(super) fn write_parts(
        &self,
        offset: u64,
        bytes: &[u8],
        parts: impl Iterator<Item = (Range<usize>, bool)>,
    ) -> io::Result<u64> {
        let (mut written, mut run) = (0, 0..0);
        for (part, wanted) in parts.chain([(bytes.len()..bytes.len(), false)]) {
            if wanted {
                run.end = part.end;
                continue;
            }
            if !run.is_empty() {
                self.file.write_all_at(&bytes[run.clone()], offset + run.start as u64)?;
                written += run.len() as u64;
            }
            run = part.end..part.end;
        }
        Ok(written)
    }

    /// The memory that is data of the file, not a hole.
    pub(super) fn stored(&self) -> io::Result<Vec<GpaRange>> {
        let mut ranges = Vec::new();
        for part in data_parts(&self.file, self.placement.bytes()) {
            let part = part?;
            for range in self.placement.gpas(part.start, part.end - part.start) {
                push(&mut ranges, range)?;
            }
        }
        Ok(ranges)
    }

    /// Begins to bring to disk what was written until now; does not wait for it.
    pub(super) fn hurry(&self) {
        self.write_back.hurry();
    }

    /// Fails if bytes that were to be stored could not be written.
    pub(super) fn check_written(&self) -> io::Result<()> {
        match self.failed.load(Ordering::Relaxed) {
            true => Err(io::Error::other("Some pages could not be written")),
            false => Ok(()),
        }
    }

    /// Notes that bytes could not be written.
    pub(super) fn fail(&self) {
        self.failed.store(true, Ordering::Relaxed);
    }

    /// Ends the file with `sync`, after everything that is needed was read back.
    ///
    /// Pages that the disk did not take may be dropped from memory and read back as zeros; only a sync after the last read
    /// tells. It takes no longer than the throttle lets writers be ahead of the disk.
    ///
    /// # Errors
    /// Bytes could not be written, so what was read back may be wrong.
    pub(super) fn finish(self, sync: impl FnOnce(&File) -> io::Result<()>) -> io::Result<()> {
        self.write_back.finish()?;
        sync(&self.file)
    }

    fn buffers(&self) -> MutexGuard<'_, Vec<Vec<u8>>> {
        sync::lock(&self.buffers)
    }
}

/// Joins those `parts`, ascending, that are wanted and touch.
pub(super) fn wanted_runs(parts: impl Iterator<Item = (Range<usize>, bool)>) -> Vec<Range<usize>> {
    let mut runs: Vec<Range<usize>> = Vec::new();
    for (part, _) in parts.filter(|(_, wanted)| *wanted) {
        match runs.last_mut() {
            Some(last) if last.end == part.start => last.end = part.end,
            _ => runs.push(part),
        }
    }
    runs
}

/// Reads pieces from a stream.
pub(super) fn from_stream(from: &mut dyn Read) -> impl FnMut(GpaRange, &mut [u8]) -> io::Result<()> {
    move |_, buffer| from.read_exact(buffer)
}

/// Reads pieces from guest memory.
pub(super) fn from_memory<M: GuestMemoryBackend>(
    memory: &M,
) -> impl FnMut(GpaRange, &mut [u8]) -> io::Result<()> {
    move |range, buffer| {
        read_memory(memory, range, buffer).map_err(|error| io::Error::new(error.source.kind(), error))
    }
}
