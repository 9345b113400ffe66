// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The stream the device's state travels in: records, each with a check, in any segmentation.
//!
//! ```text
//! HEAD  version, state size          once, first
//! BLOCK index in the header, generation and bytes   each block at least once; again when it changed meanwhile
//! CORE  the registers                once, after the device stopped
//! END   digest over all of it        once, last
//! ```

use std::collections::{BTreeSet, VecDeque};

use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::internals::{BLOCK_BYTES, Blocks, GENERATION_BYTES, REGISTER_WORDS, Registers, digest};

const VERSION: u32 = 2;
const HEAD: u32 = 1;
const BLOCK: u32 = 2;
const CORE: u32 = 3;
const END: u32 = 4;

#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RecordHeader {
    kind: U32,
    /// Number of the block; the version in HEAD.
    index: U32,
    length: U32,
    reserved: U32,
    check: U64,
}

impl RecordHeader {
    fn new(kind: u32, index: u32, payload: &[u8]) -> Self {
        let length = u32::try_from(payload.len()).expect("records are small");
        let check = check(kind, index, digest(payload));
        RecordHeader {
            kind: kind.into(),
            index: index.into(),
            length: length.into(),
            reserved: 0.into(),
            check: check.into(),
        }
    }
}

fn check(kind: u32, index: u32, digest: u64) -> u64 {
    digest ^ u64::from(kind) << 32 ^ u64::from(index)
}

/// Produces the stream of one saving session.
#[derive(Debug)]
pub(super) struct Saver {
    pending: BTreeSet<usize>,
    /// Encoded and not yet read.
    ready: VecDeque<u8>,
    finished: bool,
    read: u64,
}

impl Saver {
    /// Begins a session: everything is still to be sent.
    pub(super) fn new(blocks: &Blocks) -> Self {
        let mut saver = Saver {
            pending: (0..blocks.count()).collect(),
            ready: VecDeque::new(),
            finished: false,
            read: 0,
        };
        saver.record(HEAD, VERSION, &(blocks.bytes() as u64).to_le_bytes());
        saver
    }

    /// Notes that a block changed after it was, perhaps, sent.
    pub(super) fn changed(&mut self, block: usize) {
        self.pending.insert(block);
    }

    /// Returns how many bytes the session has handed out.
    pub(super) fn read_bytes(&self) -> u64 {
        self.read
    }

    /// Returns up to `size` bytes; fewer mean that there is no more for now, or at all once the device is `stopped`.
    pub(super) fn read(
        &mut self,
        size: usize,
        registers: &Registers,
        blocks: &Blocks,
        stopped: bool,
    ) -> Vec<u8> {
        while self.ready.len() < size {
            if let Some(block) = self.pending.pop_first() {
                let index = u32::try_from(block).expect("blocks are counted in u32");
                self.record(BLOCK, index, &blocks.block(block));
            } else if stopped && !self.finished {
                self.record(CORE, 0, registers.to_words().map(U64::new).as_bytes());
                self.record(END, 0, &blocks.digest_with(registers).to_le_bytes());
                self.finished = true;
            } else {
                break;
            }
        }
        let data: Vec<u8> = self.ready.drain(..size.min(self.ready.len())).collect();
        self.read += data.len() as u64;
        data
    }

    fn record(&mut self, kind: u32, index: u32, payload: &[u8]) {
        self.ready.extend(RecordHeader::new(kind, index, payload).as_bytes());
        self.ready.extend(payload);
    }
}

/// Says what is wrong with an image.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(super) enum BadImage {
    #[error("The image does not begin with its head, or has two")]
    Head,
    #[error("The image is of another version or of a device with another state size")]
    Other,
    #[error("A record is of unknown kind, of impossible size or fails its check")]
    Record,
    #[error("The registers hold impossible values")]
    Registers,
    #[error("The image ends early, lacks blocks or continues after its end")]
    Incomplete,
    #[error("The loaded state does not have the digest of the saved one")]
    Digest,
}

/// Takes the stream of one resuming session and builds the state beside the device's own.
#[derive(Debug)]
pub(super) struct Loader {
    unparsed: Vec<u8>,
    blocks: Blocks,
    missing: BTreeSet<usize>,
    head: bool,
    registers: Option<Registers>,
    digest: Option<u64>,
    /// The first thing wrong; what follows is not looked at.
    bad: Option<BadImage>,
}

impl Loader {
    /// Begins to load into a device with `state_bytes` of internal state.
    pub(super) fn new(state_bytes: usize) -> Self {
        let blocks = Blocks::new(state_bytes);
        let missing = (0..blocks.count()).collect();
        Loader {
            unparsed: Vec::new(),
            blocks,
            missing,
            head: false,
            registers: None,
            digest: None,
            bad: None,
        }
    }

    /// Takes the next bytes of the stream, cut anywhere; what is wrong with them shows in [`Loader::finish`].
    pub(super) fn write(&mut self, data: &[u8]) {
        if self.bad.is_some() {
            return;
        }
        self.unparsed.extend_from_slice(data);
        let unparsed = std::mem::take(&mut self.unparsed);
        let mut rest = unparsed.as_slice();
        loop {
            match self.take_record(rest) {
                Ok(Some(after)) => rest = after,
                Ok(None) => break,
                Err(bad) => {
                    self.bad = Some(bad);
                    return;
                }
            }
        }
        self.unparsed = rest.to_vec();
    }

    /// Takes one record and returns what follows it, or `None` when it is not complete yet.
    fn take_record<'a>(&mut self, stream: &'a [u8]) -> Result<Option<&'a [u8]>, BadImage> {
        let Ok((header, rest)) = RecordHeader::ref_from_prefix(stream) else { return Ok(None) };
        let (kind, index) = (header.kind.get(), header.index.get());
        let length = header.length.get() as usize;
        if length > GENERATION_BYTES + BLOCK_BYTES || header.reserved.get() != 0 {
            return Err(BadImage::Record);
        }
        let Some((payload, rest)) = rest.split_at_checked(length) else { return Ok(None) };
        if check(kind, index, digest(payload)) != header.check.get() {
            return Err(BadImage::Record);
        }
        self.apply(kind, index, payload)?;
        Ok(Some(rest))
    }

    fn apply(&mut self, kind: u32, index: u32, payload: &[u8]) -> Result<(), BadImage> {
        if self.head == (kind == HEAD) {
            return Err(BadImage::Head);
        }
        if self.digest.is_some() {
            return Err(BadImage::Incomplete);
        }
        match kind {
            HEAD => {
                let state_bytes = u64::from_le_bytes(payload.try_into().map_err(|_| BadImage::Record)?);
                if index != VERSION || state_bytes != self.blocks.bytes() as u64 {
                    return Err(BadImage::Other);
                }
                self.head = true;
            }
            BLOCK => {
                let block = index as usize;
                if !self.blocks.replace(block, payload) {
                    return Err(BadImage::Record);
                }
                self.missing.remove(&block);
            }
            CORE => {
                let words =
                    <[U64; REGISTER_WORDS]>::read_from_bytes(payload).map_err(|_| BadImage::Record)?;
                let registers = Registers::from_words(&words.map(U64::get)).ok_or(BadImage::Registers)?;
                self.registers = Some(registers);
            }
            END => {
                let digest = payload.try_into().map_err(|_| BadImage::Record)?;
                self.digest = Some(u64::from_le_bytes(digest));
            }
            _ => return Err(BadImage::Record),
        }
        Ok(())
    }

    /// Returns the loaded state if the image was complete and intact.
    pub(super) fn finish(self) -> Result<(Registers, Blocks), BadImage> {
        if let Some(bad) = self.bad {
            return Err(bad);
        }
        let (Some(registers), Some(digest)) = (self.registers, self.digest) else {
            return Err(BadImage::Incomplete);
        };
        if !self.unparsed.is_empty() || !self.missing.is_empty() {
            return Err(BadImage::Incomplete);
        }
        if self.blocks.digest_with(&registers) != digest {
            return Err(BadImage::Digest);
        }
        Ok((registers, self.blocks))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const STATE_BYTES: usize = 3 * BLOCK_BYTES + 17;

    fn image() -> (Registers, Vec<u8>) {
        let registers = Registers { seed: 3, position: 99, ..Registers::default() };
        let blocks = Blocks::new(STATE_BYTES);
        let image = Saver::new(&blocks).read(1 << 20, &registers, &blocks, true);
        (registers, image)
    }

    fn load(image: &[u8]) -> Result<(Registers, Blocks), BadImage> {
        let mut loader = Loader::new(STATE_BYTES);
        loader.write(image);
        loader.finish()
    }

    #[test]
    fn blocks_that_change_while_the_device_runs_are_sent_again() {
        let registers = Registers { seed: 5, ..Registers::default() };
        let mut blocks = Blocks::new(STATE_BYTES);
        let (mut saver, mut loader) = (Saver::new(&blocks), Loader::new(STATE_BYTES));
        let initial = saver.read(1 << 20, &registers, &blocks, false);
        assert!(initial.len() > STATE_BYTES);
        assert!(saver.read(1 << 20, &registers, &blocks, false).is_empty(), "no more for now");
        let block = blocks.pass(registers.seed, 0).unwrap();
        saver.changed(block);
        let dirty = saver.read(1 << 20, &registers, &blocks, false);
        assert_eq!(dirty.len(), size_of::<RecordHeader>() + blocks.block(block).len());
        let last = saver.read(1 << 20, &registers, &blocks, true);
        assert!(saver.read(1 << 20, &registers, &blocks, true).is_empty(), "the end");
        for part in [initial, dirty, last] {
            loader.write(&part);
        }
        let (loaded, loaded_blocks) = loader.finish().unwrap();
        assert_eq!(loaded_blocks.digest_with(&loaded), blocks.digest_with(&registers));
    }

    #[test]
    fn image_of_another_device_is_refused() {
        let (_, image) = image();
        let mut loader = Loader::new(STATE_BYTES + 1);
        loader.write(&image);
        assert_eq!(loader.finish().unwrap_err(), BadImage::Other);
    }

    #[test]
    fn truncated_and_extended_images_are_refused() {
        let (_, mut image) = image();
        for cut in [0, 10, 24, 100, image.len() - 33, image.len() - 1] {
            assert_eq!(load(&image[..cut]).unwrap_err(), BadImage::Incomplete, "cut at {cut}");
        }
        image.push(0);
        assert_eq!(load(&image).unwrap_err(), BadImage::Incomplete);
        assert_eq!(load(&image[32..]).unwrap_err(), BadImage::Head);
    }

    proptest! {
        #[test]
        fn image_cut_anywhere_loads_the_same(cuts in proptest::collection::vec(1_usize..5000, 1..10)) {
            let (registers, image) = image();
            let mut loader = Loader::new(STATE_BYTES);
            let mut rest = image.as_slice();
            for cut in cuts.into_iter().cycle() {
                let (part, after) = rest.split_at(cut.min(rest.len()));
                loader.write(part);
                rest = after;
                if rest.is_empty() {
                    break;
                }
            }
            prop_assert_eq!(loader.finish().unwrap().0, registers);
        }

        #[test]
        fn image_with_any_bit_flipped_is_refused(byte in 0_usize..STATE_BYTES, bit in 0..8) {
            let (_, mut image) = image();
            image[byte] ^= 1_u8 << bit;
            prop_assert!(load(&image).is_err());
        }
    }
}
