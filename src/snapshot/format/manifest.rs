// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! `snapshot-manifest`: what a snapshot holds, block by block, and the digest that names it.
//!
//! `docs/snapshot-format.md` describes the bytes. Pure: no file is touched here.

use std::collections::TryReserveError;

use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::blocks::{BlockTable, block_bytes_for, block_bytes_of_full};
use super::config::VmConfig;
use super::digest::{Digest, Hasher};
use super::error::{FormatError, MANIFEST, VERSION, lists};
use super::limits::SnapshotLimits;
use super::placement::Placement;
use super::state::VmState;
use crate::granule::Granule;
use crate::range::GpaRange;
use crate::snapshot::reserve::reserve;

/// Begins every manifest. Its bytes 0x89, CR LF, 0x1a and LF show what a text-mode transfer does to a file.
pub(crate) const MAGIC: [u8; 8] = *b"\x89VMS\r\n\x1a\n";

/// No host has larger pages; a block has at least one.
const MOST_PAGE_BYTES: u64 = 1 << 20;

const FULL: u16 = 1;
const DIFFERENTIAL: u16 = 2;

/// The header, as it is in the file.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct Header {
    magic: [u8; 8],
    version: U16,
    kind: U16,
    page_bytes: U32,
    block_bytes: U32,
    ranges: U32,
    runs: U64,
    zero_runs: U64,
    content_bytes: U64,
    config_bytes: U64,
    state_bytes: U64,
    config: Digest,
    state: Digest,
    base: Digest,
}

/// A text file that the manifest covers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Covered {
    pub(crate) bytes: u64,
    pub(crate) digest: Digest,
}

impl Covered {
    pub(crate) fn of(text: &[u8]) -> Self {
        Self { bytes: text.len() as u64, digest: Digest::of(text) }
    }
}

/// What a differential holds of the memory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Changes {
    /// Names the snapshot whose other pages count.
    pub(crate) base: Digest,
    /// Pages whose bytes are in `memory-changes`, in its order: those that came late are behind the others.
    pub(crate) runs: Placement,
    /// Pages that became zero, ascending.
    pub(crate) zero_runs: Placement,
}

/// The content of a manifest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Manifest {
    pub(crate) page: Granule,
    pub(crate) memory: Placement,
    pub(crate) config: Covered,
    pub(crate) state: Covered,
    /// `None` in a full snapshot.
    pub(crate) changes: Option<Changes>,
    /// Of `memory-ranges`, or of `memory-changes`.
    pub(crate) blocks: BlockTable,
    /// Names of differentials that this full snapshot equals.
    pub(crate) aliases: Vec<Digest>,
}

impl Manifest {
    /// Makes the manifest of a full snapshot that answers to no other name.
    pub(crate) fn of_full(page: Granule, config: &VmConfig, state: &VmState, blocks: BlockTable) -> Self {
        Self {
            page,
            memory: state.memory().clone(),
            config: Covered::of(config.text().as_bytes()),
            state: Covered::of(state.text()),
            changes: None,
            blocks,
            aliases: Vec::new(),
        }
    }

    /// Bytes of the file that the blocks cover.
    pub(crate) fn content_bytes(&self) -> u64 {
        self.changes.as_ref().map_or(self.memory.bytes(), |changes| changes.runs.bytes())
    }

    /// The name of the snapshot: digests everything but the aliases.
    pub fn digest(&self) -> Digest {
        let mut hasher = Hasher::default();
        self.body(&mut |bytes| hasher.update(bytes));
        hasher.finish()
    }

    /// Whether a differential made on top of `digest` fits this snapshot.
    pub fn answers_to(&self, digest: Digest) -> bool {
        self.digest() == digest || self.aliases.contains(&digest)
    }

    /// Returns the bytes of the manifest's file, and the digest. Its own name is not written as an alias.
    ///
    /// # Errors
    /// There is no memory for the bytes.
    pub fn encode(&self) -> Result<(Vec<u8>, Digest), TryReserveError> {
        let mut length = size_of::<u64>() + Digest::BYTES * (self.aliases.len() + 2);
        self.body(&mut |bytes| length += bytes.len());
        let mut bytes = Vec::new();
        reserve(&mut bytes, length)?;
        self.body(&mut |part| bytes.extend_from_slice(part));
        let digest = Digest::of(&bytes);
        bytes.extend_from_slice(digest.as_bytes());
        let aliases: Vec<_> = self.aliases.iter().copied().filter(|&alias| alias != digest).collect();
        bytes.extend_from_slice(&(aliases.len() as u64).to_le_bytes());
        bytes.extend_from_slice(aliases.as_bytes());
        let checksum = Digest::of(&bytes);
        bytes.extend_from_slice(checksum.as_bytes());
        Ok((bytes, digest))
    }

    /// Hands everything that the name covers to `take`, part by part.
    fn body(&self, take: &mut impl FnMut(&[u8])) {
        take(self.header().as_bytes());
        take_ranges(take, &self.memory);
        if let Some(changes) = &self.changes {
            take_ranges(take, &changes.runs);
            take_ranges(take, &changes.zero_runs);
        }
        for group in self.blocks.digests.chunks(64) {
            let word = group.iter().rev().fold(0u64, |word, digest| word << 1 | u64::from(digest.is_some()));
            take(&word.to_le_bytes());
        }
        for digest in self.blocks.digests.iter().flatten() {
            take(digest.as_bytes());
        }
    }

    fn header(&self) -> Header {
        let count = |ranges: &Placement| ranges.ascending().len() as u64;
        let changes = self.changes.as_ref();
        Header {
            magic: MAGIC,
            version: VERSION.into(),
            kind: if changes.is_some() { DIFFERENTIAL } else { FULL }.into(),
            page_bytes: narrow(self.page.bytes()),
            block_bytes: narrow(self.blocks.block_bytes),
            ranges: narrow(count(&self.memory)),
            runs: changes.map_or(0, |changes| count(&changes.runs)).into(),
            zero_runs: changes.map_or(0, |changes| count(&changes.zero_runs)).into(),
            content_bytes: self.content_bytes().into(),
            config_bytes: self.config.bytes.into(),
            state_bytes: self.state.bytes.into(),
            config: self.config.digest,
            state: self.state.digest,
            base: changes.map_or(Digest::ZERO, |changes| changes.base),
        }
    }

    /// Reads a manifest. No list is allocated before `bytes` is long enough to hold it.
    ///
    /// # Errors
    /// The bytes are not, to the last one, what [`Manifest::encode`] writes.
    pub fn parse(bytes: &[u8], limits: &SnapshotLimits) -> Result<Self, FormatError> {
        let length = || FormatError::Length { bytes: bytes.len() };
        let magic = bytes.get(..MAGIC.len()).ok_or_else(length)?;
        if magic != MAGIC {
            return Err(FormatError::Magic);
        }
        let (header, _) = Header::read_from_prefix(bytes).map_err(|_| length())?;
        if header.version != VERSION {
            return Err(FormatError::Version { version: header.version.get() });
        }
        let (covered, checksum) = bytes.split_last_chunk::<{ Digest::BYTES }>().ok_or_else(length)?;
        if Digest::of(covered).as_bytes() != checksum {
            return Err(FormatError::Checksum);
        }
        Parser { bytes: covered, at: size_of::<Header>() }.manifest(&header, limits)
    }
}

fn take_ranges(take: &mut impl FnMut(&[u8]), ranges: &Placement) {
    for range in ranges.ranges() {
        take(&range.start().to_le_bytes());
        take(&range.len().to_le_bytes());
    }
}

fn narrow(number: u64) -> U32 {
    U32::new(u32::try_from(number).expect("pages, blocks and range counts are bounded"))
}

/// Reads the bytes after the header.
struct Parser<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Parser<'a> {
    fn manifest(mut self, header: &Header, limits: &SnapshotLimits) -> Result<Manifest, FormatError> {
        let page = Granule::new(header.page_bytes.get().into())?;
        if page.bytes() > MOST_PAGE_BYTES {
            return Err(FormatError::Field { field: "page_bytes", value: page.bytes() });
        }
        let memory = self.ranges(header.ranges.get().into(), "memory ranges", limits)?;
        memory.check_pages(page).map_err(lists(MANIFEST, "memory ranges"))?;
        let changes = self.changes(header, page, &memory, limits)?;
        let content_bytes = changes.as_ref().map_or(memory.bytes(), |changes| changes.runs.bytes());
        expect_field("content_bytes", header.content_bytes.get(), content_bytes)?;
        let blocks = self.blocks(header, page)?;
        let body = self.at;
        let digest = self.take(Digest::BYTES)?;
        let aliases = self.aliases()?;
        if self.at != self.bytes.len() {
            return Err(self.length());
        }
        let covered = |bytes: U64, digest| Covered { bytes: bytes.get(), digest };
        let manifest = Manifest {
            page,
            memory,
            config: covered(header.config_bytes, header.config),
            state: covered(header.state_bytes, header.state),
            changes,
            blocks,
            aliases,
        };
        if Digest::of(&self.bytes[..body]).as_bytes() != digest {
            return Err(FormatError::Checksum);
        }
        // No writer names a snapshot twice.
        match manifest.aliases.iter().filter(|alias| alias.as_bytes() == digest).count() as u64 {
            0 => Ok(manifest),
            value => Err(FormatError::Field { field: "aliases", value }),
        }
    }

    fn length(&self) -> FormatError {
        FormatError::Length { bytes: self.bytes.len() + Digest::BYTES }
    }

    fn take(&mut self, bytes: usize) -> Result<&'a [u8], FormatError> {
        let end = self.at.checked_add(bytes).filter(|&end| end <= self.bytes.len());
        let end = end.ok_or_else(|| self.length())?;
        let taken = &self.bytes[self.at..end];
        self.at = end;
        Ok(taken)
    }

    fn take_list(&mut self, count: u64, bytes_each: usize) -> Result<&'a [u8], FormatError> {
        let bytes = usize::try_from(count).ok().and_then(|count| count.checked_mul(bytes_each));
        self.take(bytes.ok_or_else(|| self.length())?)
    }

    fn ranges(
        &mut self,
        count: u64,
        what: &'static str,
        limits: &SnapshotLimits,
    ) -> Result<Placement, FormatError> {
        let pairs = self.take_list(count, 2 * size_of::<u64>())?;
        let pairs = pairs.chunks_exact(16).map(|pair| {
            let word = |at: usize| U64::read_from_bytes(&pair[at..at + 8]).map_or(0, U64::get);
            (word(0), word(8))
        });
        Placement::from_pairs(pairs, limits).map_err(lists(MANIFEST, what))
    }

    fn changes(
        &mut self,
        header: &Header,
        page: Granule,
        memory: &Placement,
        limits: &SnapshotLimits,
    ) -> Result<Option<Changes>, FormatError> {
        if header.kind == FULL {
            expect_field("runs", header.runs.get(), 0)?;
            expect_field("zero_runs", header.zero_runs.get(), 0)?;
            if header.base != Digest::ZERO {
                return Err(FormatError::Field { field: "base", value: 1 });
            }
            return Ok(None);
        }
        expect_field("kind", header.kind.get().into(), DIFFERENTIAL.into())?;
        // As many runs as the file holds, not as there may be ranges of memory.
        let limits = SnapshotLimits { ranges: usize::MAX, ..*limits };
        let runs = self.ranges(header.runs.get(), "runs", &limits)?;
        let zero_runs = self.ranges(header.zero_runs.get(), "zero runs", &limits)?;
        let is_sound =
            |run: GpaRange| page.is_aligned(run.start()) && page.is_aligned(run.end()) && memory.holds(run);
        if let Some(run) = runs.ranges().chain(zero_runs.ranges()).find(|&run| !is_sound(run)) {
            return Err(FormatError::Run { run });
        }
        // Runs are in the order of the file.
        if let Some((_, run)) =
            zero_runs.ranges().zip(zero_runs.ranges().skip(1)).find(|(one, next)| one > next)
        {
            return Err(FormatError::Run { run });
        }
        if let Some(run) = zero_runs.ranges().find(|&run| runs.locate(run).next().is_some()) {
            return Err(FormatError::Run { run });
        }
        Ok(Some(Changes { base: header.base, runs, zero_runs }))
    }

    fn blocks(&mut self, header: &Header, page: Granule) -> Result<BlockTable, FormatError> {
        let block_bytes = u64::from(header.block_bytes.get());
        let content_bytes = header.content_bytes.get();
        // A whole block is held in memory, so a file does not get to choose its size.
        let expected = match header.kind.get() {
            FULL => block_bytes_of_full(content_bytes, page),
            _ => block_bytes_for(content_bytes, page.bytes()),
        };
        expect_field("block_bytes", block_bytes, expected)?;
        let count = content_bytes.div_ceil(block_bytes);
        let words = self.take_list(count.div_ceil(64), size_of::<u64>())?;
        let is_set = |bit: usize| words[bit / 8] >> (bit % 8) & 1 == 1;
        let count = usize::try_from(count).map_err(|_| self.length())?;
        if (count..words.len() * 8).any(is_set) {
            return Err(FormatError::Field { field: "block bitmap", value: count as u64 });
        }
        let set: u64 = words.iter().map(|byte| u64::from(byte.count_ones())).sum();
        let mut digests = self.take_list(set, Digest::BYTES)?.chunks_exact(Digest::BYTES);
        let mut next = || digests.next().and_then(|bytes| Digest::read_from_bytes(bytes).ok());
        let mut digests = Vec::new();
        digests.try_reserve_exact(count)?;
        digests.extend((0..count).map(|block| if is_set(block) { next() } else { None }));
        Ok(BlockTable { block_bytes, digests })
    }

    fn aliases(&mut self) -> Result<Vec<Digest>, FormatError> {
        let count = U64::read_from_bytes(self.take(size_of::<u64>())?).map_or(0, U64::get);
        let aliases = self.take_list(count, Digest::BYTES)?.chunks_exact(Digest::BYTES);
        Ok(aliases.filter_map(|bytes| Digest::read_from_bytes(bytes).ok()).collect())
    }
}

fn expect_field(field: &'static str, value: u64, expected: u64) -> Result<(), FormatError> {
    if value == expected { Ok(()) } else { Err(FormatError::Field { field, value }) }
}
