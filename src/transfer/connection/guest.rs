// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Guest memory to and from a connection, many ranges in one system call.

use std::io::{self, Read, Write};

use vm_memory::bitmap::{BitmapSlice, MS};
use vm_memory::{GuestAddress, GuestMemoryBackend, VolatileSlice};

use super::{Connection, Stream};
use crate::range::GpaRange;
use crate::sys::socket::SLICES;
use crate::vm::{UnreadableMemory, has_address, read_memory};

/// Bytes of guest memory that are copied in one piece, where they cannot go straight.
const BOUNCE_BYTES: usize = 64 << 10;

impl Connection {
    /// Sends the bytes of `ranges` from `memory`, in their order, and returns their number: straight from where they are, but
    /// for TLS, and for memory that has no address in this process.
    ///
    /// The guest may write them meanwhile: what it writes is dirty again and will be sent again.
    ///
    /// # Errors
    /// A range is not in `memory`, or the connection failed or stalled; part of the bytes may be gone. Memory that cannot be
    /// read is an [`UnreadableMemory`].
    pub fn send_guest<M: GuestMemoryBackend>(
        &mut self,
        memory: &M,
        ranges: impl IntoIterator<Item = GpaRange>,
    ) -> io::Result<u64> {
        let mut ranges = ranges.into_iter().peekable();
        let first = ranges.peek().map_or(0, |range| range.start());
        match &mut self.stream {
            Stream::Plain(line) if has_address(memory, first) => {
                in_batches(memory, ranges, |batch| line.send_slices(batch))
            }
            _ => self.send_copied(memory, ranges),
        }
    }

    /// Receives the bytes of `ranges` straight into `memory`, in their order, and returns their number.
    ///
    /// What is written is marked in the memory's own dirty bitmap.
    ///
    /// # Errors
    /// A range is not in `memory`, or the connection failed, stalled or ended ([`io::ErrorKind::UnexpectedEof`]); part of
    /// the bytes may be in place.
    pub fn receive_guest<M: GuestMemoryBackend>(
        &mut self,
        memory: &M,
        ranges: impl IntoIterator<Item = GpaRange>,
    ) -> io::Result<u64> {
        in_batches(memory, ranges, |batch| match self.receive_some(batch)? {
            0 => Err(io::ErrorKind::UnexpectedEof.into()),
            received => Ok(received),
        })
    }

    /// Sends the bytes of `ranges` by way of a buffer.
    fn send_copied<M: GuestMemoryBackend>(
        &mut self,
        memory: &M,
        ranges: impl Iterator<Item = GpaRange>,
    ) -> io::Result<u64> {
        let (mut bounce, mut filled, mut sent) = (self.take_bounce(), 0, 0);
        for piece in ranges.flat_map(|range| range.pieces(BOUNCE_BYTES as u64)) {
            let bytes = usize::try_from(piece.len()).unwrap_or(BOUNCE_BYTES);
            if filled + bytes > BOUNCE_BYTES {
                self.write_all(&bounce[..filled])?;
                filled = 0;
            }
            read_memory(memory, piece, &mut bounce[filled..filled + bytes])
                .map_err(|error: UnreadableMemory| io::Error::new(error.source.kind(), error))?;
            filled += bytes;
            sent += piece.len();
        }
        self.write_all(&bounce[..filled])?;
        self.bounce = bounce;
        Ok(sent)
    }

    /// Receives a first part of `slices`; 0 at the end of the stream.
    fn receive_some<B: BitmapSlice>(&mut self, slices: &[VolatileSlice<'_, B>]) -> io::Result<usize> {
        if let Stream::Plain(line) = &mut self.stream {
            return line.receive_slices(slices);
        }
        let mut bounce = self.take_bounce();
        let wanted = slices.iter().map(VolatileSlice::len).sum::<usize>().min(bounce.len());
        let outcome = self.read(&mut bounce[..wanted]);
        scatter(&bounce[..*outcome.as_ref().unwrap_or(&0)], slices);
        self.bounce = bounce;
        outcome
    }

    fn take_bounce(&mut self) -> Vec<u8> {
        let mut bounce = std::mem::take(&mut self.bounce);
        bounce.resize(BOUNCE_BYTES, 0);
        bounce
    }
}

/// Feeds the slices of `ranges` to `advance`, [`SLICES`] at a time, until it has moved all of their bytes.
fn in_batches<'a, M: GuestMemoryBackend>(
    memory: &'a M,
    ranges: impl IntoIterator<Item = GpaRange>,
    mut advance: impl FnMut(&[VolatileSlice<'a, MS<'a, M>>]) -> io::Result<usize>,
) -> io::Result<u64> {
    let mut slices = ranges.into_iter().flat_map(|range| {
        // A range that does not fit the address space is in no memory that does.
        let length = usize::try_from(range.len()).unwrap_or(usize::MAX);
        memory.get_slices(GuestAddress(range.start()), length)
    });
    let mut batch = Vec::with_capacity(SLICES);
    let mut moved = 0;
    loop {
        for slice in slices.by_ref().take(SLICES - batch.len()) {
            batch.push(slice.map_err(io::Error::other)?);
        }
        if batch.is_empty() {
            return Ok(moved);
        }
        let bytes = advance(&batch)?;
        moved += bytes as u64;
        drop_front(&mut batch, bytes)?;
    }
}

/// Takes the first `bytes` bytes off `batch`.
fn drop_front<B: BitmapSlice>(batch: &mut Vec<VolatileSlice<'_, B>>, bytes: usize) -> io::Result<()> {
    let mut left = bytes;
    let whole = batch
        .iter()
        .take_while(|slice| {
            let done = slice.len() <= left;
            left -= if done { slice.len() } else { 0 };
            done
        })
        .count();
    batch.drain(..whole);
    if let Some(first) = batch.first_mut() {
        *first = first.offset(left).map_err(io::Error::other)?;
    }
    Ok(())
}

/// Copies all of `bounce` into `slices`, which are at least as long.
fn scatter<B: BitmapSlice>(bounce: &[u8], slices: &[VolatileSlice<'_, B>]) {
    let mut rest = bounce;
    for slice in slices {
        let (now, later) = rest.split_at(rest.len().min(slice.len()));
        slice.copy_from(now);
        rest = later;
    }
}
