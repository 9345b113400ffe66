// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Reads a file block by block, holes aside.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use crate::granule::Granule;
use crate::snapshot::disk::files::{expect_length, next_data};
use crate::snapshot::format::blocks::{BlockTable, block_bytes_for};
use crate::snapshot::reserve::{list_of, resize};
use crate::snapshot::write::memory_file::LEAST_BLOCK_BYTES;

/// Bytes read at once.
const READ_BYTES: u64 = 1 << 20;

/// A block of a file.
pub(crate) struct Block<'a> {
    pub(crate) index: usize,
    pub(crate) offset: u64,
    /// Bytes in the block: fewer than in the others at the end of the file.
    pub(crate) length: u64,
    /// `None` for a hole.
    pub(crate) bytes: Option<&'a [u8]>,
}

/// Yields all blocks of a file in order.
pub(crate) struct BlockReader<'a> {
    file: &'a File,
    file_bytes: u64,
    block_bytes: u64,
    next: u64,
    /// The data part that the next block lies in or before; empty at the end of the file when there is none.
    data: std::ops::Range<u64>,
    buffer: Vec<u8>,
    /// Offset of the bytes in `buffer`.
    loaded_at: u64,
}

impl<'a> BlockReader<'a> {
    /// Reads the first `file_bytes` bytes of `file` in blocks of `block_bytes`.
    pub(crate) fn new(file: &'a File, file_bytes: u64, block_bytes: u64) -> Self {
        Self { file, file_bytes, block_bytes, next: 0, data: 0..0, buffer: Vec::new(), loaded_at: 0 }
    }

    /// Reads the next block; `None` behind the last one, of a file that was not cut off meanwhile.
    ///
    /// # Errors
    /// The file cannot be read, or was cut off. The block is passed over.
    pub(crate) fn next_block(&mut self) -> io::Result<Option<Block<'_>>> {
        let offset = self.next;
        if offset >= self.file_bytes {
            expect_length(self.file, self.file_bytes)?;
            return Ok(None);
        }
        let length = self.block_bytes.min(self.file_bytes - offset);
        self.next += length;
        let index = index(offset / self.block_bytes);
        if self.is_hole(offset, length)? {
            return Ok(Some(Block { index, offset, length, bytes: None }));
        }
        let bytes = Some(self.load(offset, length)?);
        Ok(Some(Block { index, offset, length, bytes }))
    }

    fn is_hole(&mut self, offset: u64, length: u64) -> io::Result<bool> {
        if offset >= self.data.end {
            let end = self.file_bytes..self.file_bytes;
            self.data = next_data(self.file, offset, self.file_bytes)?.unwrap_or(end);
        }
        Ok(offset + length <= self.data.start)
    }

    fn load(&mut self, offset: u64, length: u64) -> io::Result<&[u8]> {
        let loaded_end = self.loaded_at + self.buffer.len() as u64;
        if offset < self.loaded_at || offset + length > loaded_end {
            let ahead = READ_BYTES.min(self.data.end.saturating_sub(offset)).max(length);
            resize(&mut self.buffer, index(ahead))?;
            self.loaded_at = offset;
            if let Err(error) = self.file.read_exact_at(&mut self.buffer, offset) {
                self.buffer.clear();
                return Err(error);
            }
        }
        let from = index(offset - self.loaded_at);
        Ok(&self.buffer[from..from + index(length)])
    }
}

/// Digests the blocks of a file of memory.
pub(crate) fn hash_memory(file: &File, file_bytes: u64, page: Granule) -> io::Result<BlockTable> {
    let block_bytes = block_bytes_for(file_bytes, LEAST_BLOCK_BYTES.max(page.bytes()));
    let mut blocks = BlockReader::new(file, file_bytes, block_bytes);
    let mut digests = list_of(index(file_bytes.div_ceil(block_bytes)), std::iter::empty())?;
    while let Some(block) = blocks.next_block()? {
        digests.push(block.bytes.and_then(BlockTable::entry));
    }
    Ok(BlockTable { block_bytes, digests })
}

fn index(number: u64) -> usize {
    usize::try_from(number).expect("blocks fit memory")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_come_in_order_with_holes_named_and_a_short_one_at_the_end() {
        let file = tempfile::tempfile().unwrap();
        let block = 64 << 10;
        let bytes = 40 * block + 100;
        file.set_len(bytes).unwrap();
        for at in [0, 17, 18, 40] {
            file.write_all_at(&[at + 1; 100], u64::from(at) * block).unwrap();
        }
        let mut reader = BlockReader::new(&file, bytes, block);
        let mut data = Vec::new();
        let mut count = 0;
        while let Some(found) = reader.next_block().unwrap() {
            assert_eq!((found.index, found.offset), (count, count as u64 * block));
            assert_eq!(found.length, if count == 40 { 100 } else { block });
            if let Some(bytes) = found.bytes {
                assert_eq!(bytes.len() as u64, found.length);
                data.push((found.index, bytes[99]));
            }
            count += 1;
        }
        assert_eq!(count, 41);
        assert_eq!(data, [(0, 1), (17, 18), (18, 19), (40, 41)]);
    }

    #[test]
    fn a_file_cut_off_while_it_is_read_is_an_error() {
        let file = tempfile::tempfile().unwrap();
        file.write_all_at(&[1; 100], 0).unwrap();
        assert!(BlockReader::new(&file, 101, 4096).next_block().is_err());

        let bytes = 1 << 20;
        file.set_len(bytes).unwrap();
        let mut reader = BlockReader::new(&file, bytes, 4096);
        reader.next_block().unwrap();
        file.set_len(100).unwrap();
        let outcome = (1..=bytes / 4096).find_map(|_| reader.next_block().err());
        assert_eq!(outcome.unwrap().kind(), io::ErrorKind::UnexpectedEof);
    }
}
