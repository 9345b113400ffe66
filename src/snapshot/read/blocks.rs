// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The blocks of a chain's files that hold memory of the snapshot on top, and which of their bytes count.

use std::io;
use std::ops::Range;

use super::chain::SnapshotChain;
use super::reader::MemoryReader;
use super::stored::Stored;
use crate::range::{GpaRange, united};
use crate::snapshot::disk::data_parts;
use crate::snapshot::reserve::index;

/// Most zeros in one block of them.
const ZEROS_BYTES: u64 = 1 << 20;

/// Memory that a block holds, and where in the block it begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct BlockPart {
    pub(crate) range: GpaRange,
    pub(crate) at: u64,
}

/// Where the bytes of a block are: the place of its file in the chain, and its number in the file; `None`: it is zeros.
type Place = Option<(usize, u64)>;

#[derive(Debug)]
struct ChainBlock {
    place: Place,
    parts: Range<usize>,
}

/// The blocks that hold all of a VM's RAM as the snapshot on top has it: every byte of it is in one part of one block.
///
/// A block of a file is there if any byte of it counts, because no differential above has another or a zero in its place. What is zero,
/// in all the files, is in blocks without a file. Ascending by the first address.
#[derive(Debug)]
pub(crate) struct ChainBlocks<'a> {
    readers: Vec<Option<MemoryReader<'a>>>,
    blocks: Vec<ChainBlock>,
    parts: Vec<BlockPart>,
    /// Every part with the number of its block, ascending by address.
    by_gpa: Vec<(GpaRange, usize)>,
}

impl<'a> ChainBlocks<'a> {
    /// Finds the blocks that hold `ram`, which is all or more of the memory of `chain`.
    ///
    /// # Errors
    /// A file cannot be read.
    pub(crate) fn of(chain: &'a SnapshotChain, ram: impl IntoIterator<Item = GpaRange>) -> io::Result<Self> {
        let mut layers = vec![chain.full().stored()];
        layers.extend(chain.differentials().iter().map(|differential| differential.stored()));
        let readers: Vec<_> = layers.iter().map(|layer| layer.reader()).collect();
        let mut pieces = Vec::new();
        let mut hidden = Vec::new();
        for (number, layer) in layers.iter().enumerate().rev() {
            if let Some(reader) = &readers[number] {
                visible_pieces(chain, reader, number, &hidden, &mut pieces)?;
            }
            hidden = hidden_by(chain, layer, hidden);
        }
        let known = united(pieces.iter().map(|(_, part)| part.range));
        let zeros = united(ram).into_iter().flat_map(|range| parts_outside(range, &known));
        let zeros = zeros.flat_map(|range| range.pieces(ZEROS_BYTES));
        pieces.extend(zeros.map(|range| (None, BlockPart { range, at: 0 })));
        Ok(Self::group(readers, pieces))
    }

    /// Puts parts of one block together.
    fn group(readers: Vec<Option<MemoryReader<'a>>>, mut pieces: Vec<(Place, BlockPart)>) -> Self {
        // Zeros sort first, each a block of its own.
        pieces.sort_unstable_by_key(|(place, part)| (*place, part.range));
        let mut blocks: Vec<ChainBlock> = Vec::new();
        for (number, (place, _)) in pieces.iter().enumerate() {
            match blocks.last_mut() {
                Some(last) if place.is_some() && last.place == *place => last.parts.end = number + 1,
                _ => blocks.push(ChainBlock { place: *place, parts: number..number + 1 }),
            }
        }
        let parts: Vec<_> = pieces.into_iter().map(|(_, part)| part).collect();
        blocks.sort_unstable_by_key(|block| parts[block.parts.start].range);
        let numbered = blocks.iter().enumerate();
        let of_block = |(number, block): (usize, &ChainBlock)| {
            parts[block.parts.clone()].iter().map(move |part| (part.range, number)).collect::<Vec<_>>()
        };
        let mut by_gpa: Vec<_> = numbered.flat_map(of_block).collect();
        by_gpa.sort_unstable();
        Self { readers, blocks, parts, by_gpa }
    }

    /// How many blocks there are.
    pub(crate) fn count(&self) -> usize {
        self.blocks.len()
    }

    /// Whether a block is zeros that no file holds.
    pub(crate) fn is_zeros(&self, number: usize) -> bool {
        self.blocks[number].place.is_none()
    }

    /// The memory in a block.
    pub(crate) fn parts(&self, number: usize) -> &[BlockPart] {
        &self.parts[self.blocks[number].parts.clone()]
    }

    /// The blocks that hold any of `range`; one may come several times.
    pub(crate) fn holding(&self, range: GpaRange) -> impl Iterator<Item = usize> + '_ {
        let first = self.by_gpa.partition_point(|(part, _)| part.end() <= range.start());
        let parts = self.by_gpa[first..].iter().take_while(move |(part, _)| part.start() < range.end());
        parts.map(|&(_, number)| number)
    }

    /// Reads blocks that are not zeros, in any order, and checks each as [`ChainBlocks::read`] does; what lies in a row in a file is read at once.
    /// Returns the memory that they hold with its bytes, which are in `buffer`, ascending by address.
    ///
    /// # Errors
    /// As [`ChainBlocks::read`].
    pub(crate) fn read_many<'b>(
        &self,
        numbers: &[usize],
        buffer: &'b mut Vec<u8>,
    ) -> io::Result<Vec<(GpaRange, &'b [u8])>> {
        let mut placed: Vec<_> =
            numbers.iter().filter_map(|&number| Some((self.blocks[number].place?, number))).collect();
        placed.sort_unstable();
        let mut found = Vec::new();
        let mut end = 0;
        for row in placed.chunk_by(|((layer, block), _), (next, _)| *next == (*layer, block + 1)) {
            let Some(((layer, first), _)) = row.first() else { continue };
            let Some(reader) = &self.readers[*layer] else { continue };
            let begin = end;
            end += reader.read_blocks(*first..first + row.len() as u64, buffer, begin)?;
            let at = |nth: usize, at: u64| begin + nth * index(reader.block_bytes()) + index(at);
            let parts = row.iter().enumerate().flat_map(|(nth, (_, number))| {
                self.parts(*number).iter().map(move |part| (part.range, at(nth, part.at)))
            });
            found.extend(parts);
        }
        found.sort_unstable_by_key(|(range, _)| *range);
        Ok(found.into_iter().map(|(range, at)| (range, &buffer[at..at + index(range.len())])).collect())
    }

    /// Reads a whole block that is not zeros into `bytes`, and checks it against its digest, however often it was read before.
    ///
    /// # Errors
    /// The file cannot be read or was cut off; or the block was altered, then the error holds [`Altered`](super::altered::Altered).
    pub(crate) fn read(&self, number: usize, bytes: &mut Vec<u8>) -> io::Result<()> {
        let Some((layer, block)) = self.blocks[number].place else { return Ok(()) };
        self.readers[layer].as_ref().map_or(Ok(()), |reader| reader.read_block(block, bytes))
    }
}

/// Adds what counts of the file of layer `number`.
fn visible_pieces(
    chain: &SnapshotChain,
    reader: &MemoryReader<'_>,
    number: usize,
    hidden: &[GpaRange],
    pieces: &mut Vec<(Place, BlockPart)>,
) -> io::Result<()> {
    let block_bytes = reader.block_bytes();
    let counts = blocks_with_data(reader)?;
    let top = chain.state().memory();
    for extent in reader.placement.ascending() {
        for piece in extent.cut(block_bytes) {
            let block = piece.offset / block_bytes;
            if !counts[index(block)] {
                continue;
            }
            for range in parts_outside(piece.range, hidden) {
                pieces.extend(top.locate(range).map(|held| {
                    let at = piece.offset % block_bytes + (held.range.start() - piece.range.start());
                    (Some((number, block)), BlockPart { range: held.range, at })
                }));
            }
        }
    }
    Ok(())
}

/// Tells of each block whether it was written with data, or has data now: then it has to be checked.
fn blocks_with_data(reader: &MemoryReader<'_>) -> io::Result<Vec<bool>> {
    let (bytes, block_bytes) = (reader.placement.bytes(), reader.block_bytes());
    let mut found: Vec<_> = (0..bytes.div_ceil(block_bytes)).map(|block| reader.has_digest(block)).collect();
    for part in data_parts(reader.file, bytes) {
        let part = part?;
        found[index(part.start / block_bytes)..index(part.end.div_ceil(block_bytes))].fill(true);
    }
    Ok(found)
}

/// Adds to `hidden` the memory whose bytes in lower layers do not count because of `layer`.
fn hidden_by(chain: &SnapshotChain, layer: &Stored, hidden: Vec<GpaRange>) -> Vec<GpaRange> {
    let Some(changes) = layer.changes() else { return hidden };
    let memory = layer.state.memory();
    let absent = chain.state().memory().ranges().flat_map(|range| memory.missing(range));
    united(hidden.into_iter().chain(changes.runs.ranges()).chain(changes.zero_runs.ranges()).chain(absent))
}

/// Returns the parts of `range` that are in none of `gone`, which are ascending and disjoint.
fn parts_outside(range: GpaRange, gone: &[GpaRange]) -> Vec<GpaRange> {
    let first = gone.partition_point(|part| part.end() <= range.start());
    let (mut parts, mut next) = (Vec::new(), range.start());
    for part in gone[first..].iter().take_while(|part| part.start() < range.end()) {
        parts.extend(GpaRange::from_bounds(next, part.start()));
        next = part.end();
    }
    parts.extend(GpaRange::from_bounds(next, range.end()));
    parts
}
