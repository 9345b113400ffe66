// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Brings bytes from wherever they come to the pieces of a file they belong to.

use std::io::{self, ErrorKind, Read};
use std::sync::{Mutex, PoisonError};

use thiserror::Error;
use vm_memory::GuestMemoryBackend;

use crate::range::GpaRange;
use crate::snapshot::disk::staging::StagingError;
use crate::snapshot::format::placement::{Extent, Placement};
use crate::snapshot::reserve::resize;
use crate::vm::read_memory;

/// Bytes for guest memory that the snapshot does not have.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[error("{range} is not all memory of the VM")]
struct NotMemory {
    range: GpaRange,
}

/// Why bytes are not in their place.
#[derive(Debug, Error)]
pub(crate) enum FeedError {
    /// They are not what the file takes, or what they come from or are compared with cannot be read.
    #[error(transparent)]
    Read(io::Error),
    /// The file did not take them.
    #[error(transparent)]
    Write(io::Error),
}

impl FeedError {
    /// Returns the error to report, in which `named` names the file.
    pub(crate) fn into_io(self, named: impl FnOnce(io::Error) -> StagingError) -> io::Error {
        match self {
            Self::Read(error) => error,
            Self::Write(error) => io::Error::new(error.kind(), named(error)),
        }
    }
}

/// Cuts ranges into pieces that lie in one cell of a file each, and reads the bytes of each into a buffer.
///
/// Any number of threads may feed at once; each borrows a buffer of its own.
#[derive(Debug)]
pub(crate) struct Feed {
    placement: Placement,
    cell_bytes: u64,
    buffers: Mutex<Vec<Vec<u8>>>,
}

impl Feed {
    pub(crate) fn new(placement: Placement, cell_bytes: u64) -> Self {
        Self { placement, cell_bytes, buffers: Mutex::default() }
    }

    pub(crate) fn placement(&self) -> &Placement {
        &self.placement
    }

    pub(crate) fn cell_bytes(&self) -> u64 {
        self.cell_bytes
    }

    pub(crate) fn cells(&self) -> u64 {
        self.placement.bytes().div_ceil(self.cell_bytes)
    }

    /// Index of the cell that holds `piece`.
    pub(crate) fn cell_of(&self, piece: Extent) -> usize {
        usize::try_from(piece.offset / self.cell_bytes).expect("the cells are in memory")
    }

    /// Hands the bytes of `range`, which `read` supplies piece by piece in order, to `store`.
    ///
    /// # Errors
    /// `range` is not all memory, and nothing was read; or the first error of `read` or `store`.
    pub(crate) fn run(
        &self,
        range: GpaRange,
        mut read: impl FnMut(GpaRange, &mut [u8]) -> io::Result<()>,
        mut store: impl FnMut(Extent, &[u8]) -> Result<(), FeedError>,
    ) -> Result<(), FeedError> {
        if !self.placement.holds(range) {
            let refused = io::Error::new(ErrorKind::InvalidInput, NotMemory { range });
            return Err(FeedError::Read(refused));
        }
        let mut buffer = self.lock().pop().unwrap_or_default();
        let mut pieces = self.placement.locate(range).flat_map(|extent| extent.cut(self.cell_bytes));
        let fed = pieces.try_for_each(|piece| {
            let length = usize::try_from(piece.range.len()).expect("a piece fits its buffer");
            if buffer.len() < length {
                resize(&mut buffer, length).map_err(FeedError::Read)?;
            }
            read(piece.range, &mut buffer[..length]).map_err(FeedError::Read)?;
            store(piece, &buffer[..length])
        });
        self.lock().push(buffer);
        fed
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Vec<Vec<u8>>> {
        self.buffers.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Reads pieces from a stream.
pub(crate) fn from_stream(from: &mut dyn Read) -> impl FnMut(GpaRange, &mut [u8]) -> io::Result<()> {
    move |_, buffer| from.read_exact(buffer)
}

/// Reads pieces from guest memory.
pub(crate) fn from_memory<M: GuestMemoryBackend>(
    memory: &M,
) -> impl FnMut(GpaRange, &mut [u8]) -> io::Result<()> {
    move |range, buffer| {
        read_memory(memory, range, buffer).map_err(|error| io::Error::new(error.source.kind(), error))
    }
}
