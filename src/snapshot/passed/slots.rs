// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Descriptors of memory slots, as a peer passes them, checked against what its Config says of them.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;

use rustix::fs::{FileType, OFlags, fcntl_get_seals, fcntl_getfl, fstat};
use thiserror::Error;

use crate::range::GpaRange;
use crate::snapshot::disk::next_data;
use crate::snapshot::format::RamSlot;

/// Most slots that a VM may pass memory in.
const SLOTS_LIMIT: usize = 4096;

/// Why the descriptors of a peer are not its VM's memory.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum SlotError {
    /// The descriptor cannot be looked at.
    #[error("Cannot look at the descriptor of slot {slot}")]
    Look {
        /// The slot.
        slot: u32,
        /// Why not.
        source: io::Error,
    },
    /// It is a pipe, a directory or the like.
    #[error("Descriptor of slot {slot} is a {kind}, not a memory file")]
    Kind {
        /// The slot.
        slot: u32,
        /// What it is.
        kind: &'static str,
    },
    /// It was opened for writing only, or as a path.
    #[error("Descriptor of slot {slot} cannot be read from")]
    Unreadable {
        /// The slot.
        slot: u32,
    },
    /// Two descriptors for one slot.
    #[error("Slot {slot} was passed twice")]
    Twice {
        /// The slot.
        slot: u32,
    },
    /// More slots than any VM has.
    #[error("More than {limit} memory slots were passed")]
    TooMany {
        /// The most there may be.
        limit: usize,
    },
    /// Config names a slot without a descriptor.
    #[error("Config names slot {slot}, for which no descriptor was passed")]
    Missing {
        /// The slot.
        slot: u32,
    },
    /// A descriptor came for a slot that Config does not name.
    #[error("A descriptor was passed for slot {slot}, which Config does not name")]
    Unknown {
        /// The slot.
        slot: u32,
    },
    /// Config names a slot twice.
    #[error("Config names slot {slot} twice")]
    NamedTwice {
        /// The slot.
        slot: u32,
    },
    /// The descriptor is shorter than Config claims.
    #[error("Descriptor of slot {slot} has {found} bytes; Config says that memory goes to {needed}")]
    Short {
        /// The slot.
        slot: u32,
        /// Its bytes.
        found: u64,
        /// Where the memory ends in it.
        needed: u128,
    },
    /// Two slots are the same bytes of one file.
    #[error("Slots {first} and {second} are the same bytes of one file")]
    Overlap {
        /// The one.
        first: u32,
        /// The other.
        second: u32,
    },
}

/// Descriptors that were passed, before Config says what is in them.
#[derive(Debug, Default)]
pub(crate) struct PassedSlots(BTreeMap<u32, File>);

impl PassedSlots {
    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Takes the descriptor of `slot`.
    ///
    /// # Errors
    /// It is not a readable file, the slot has one already, or there are too many.
    pub(crate) fn add(&mut self, slot: u32, memory: OwnedFd) -> Result<(), SlotError> {
        if self.0.len() >= SLOTS_LIMIT {
            return Err(SlotError::TooMany { limit: SLOTS_LIMIT });
        }
        let look = |source: rustix::io::Errno| SlotError::Look { slot, source: source.into() };
        let kind = match FileType::from_raw_mode(fstat(&memory).map_err(look)?.st_mode) {
            FileType::RegularFile => None,
            FileType::Directory => Some("directory"),
            FileType::Fifo => Some("pipe"),
            FileType::Socket => Some("socket"),
            FileType::CharacterDevice | FileType::BlockDevice => Some("device"),
            _ => Some("file of another kind"),
        };
        if let Some(kind) = kind {
            return Err(SlotError::Kind { slot, kind });
        }
        let flags = fcntl_getfl(&memory).map_err(look)?;
        if flags.contains(OFlags::PATH) || flags & OFlags::RWMODE == OFlags::WRONLY {
            return Err(SlotError::Unreadable { slot });
        }
        // Memory alone has seals to ask for; a read of any other file may wait for as long as its owner likes.
        if fcntl_get_seals(&memory).is_err() {
            return Err(SlotError::Kind { slot, kind: "file that is not in memory (a zone with `file`?)" });
        }
        match self.0.insert(slot, memory.into()) {
            Some(_) => Err(SlotError::Twice { slot }),
            None => Ok(()),
        }
    }

    /// Checks the descriptors against the `slots` of Config.
    ///
    /// # Errors
    /// A descriptor is missing, unknown, too short, or two slots overlap in one file.
    pub(crate) fn settle(mut self, slots: &[RamSlot]) -> Result<SlotFiles, SlotError> {
        let mut taken = BTreeMap::<_, Vec<(u64, u64, u32)>>::new();
        let mut files = Vec::new();
        for &RamSlot { slot, range, offset } in slots {
            let Some(file) = self.0.remove(&slot) else {
                let is_named = files.iter().any(|file: &SlotFile| file.slot == slot);
                return Err(if is_named {
                    SlotError::NamedTwice { slot }
                } else {
                    SlotError::Missing { slot }
                });
            };
            let stat = fstat(&file).map_err(|source| SlotError::Look { slot, source: source.into() })?;
            let found = u64::try_from(stat.st_size).unwrap_or(0);
            let needed = u128::from(offset) + u128::from(range.len());
            if u128::from(found) < needed {
                return Err(SlotError::Short { slot, found, needed });
            }
            let end = offset + range.len();
            let others = taken.entry((stat.st_dev, stat.st_ino)).or_default();
            if let Some(other) = others.iter().find(|other| other.0 < end && offset < other.1) {
                return Err(SlotError::Overlap { first: other.2, second: slot });
            }
            others.push((offset, end, slot));
            files.push(SlotFile { slot, range, offset, file });
        }
        match self.0.keys().next() {
            Some(&slot) => Err(SlotError::Unknown { slot }),
            None => Ok(SlotFiles(files)),
        }
    }
}

#[derive(Debug)]
struct SlotFile {
    slot: u32,
    range: GpaRange,
    offset: u64,
    file: File,
}

impl SlotFile {
    fn named(&self, error: &io::Error) -> io::Error {
        let slot = self.slot;
        io::Error::new(error.kind(), format!("Cannot read the descriptor of slot {slot}: {error}"))
    }
}

/// Guest memory in descriptors of a peer, which may cut them off at any time: then reads fail.
#[derive(Debug)]
pub(crate) struct SlotFiles(Vec<SlotFile>);

impl SlotFiles {
    /// The RAM, slot by slot.
    pub(crate) fn ranges(&self) -> impl Iterator<Item = GpaRange> {
        self.0.iter().map(|slot| slot.range)
    }

    /// Reads `range`, which is RAM.
    pub(crate) fn read(&self, range: GpaRange, buffer: &mut [u8]) -> io::Result<()> {
        for slot in &self.0 {
            let Some(part) = slot.range.intersection(range) else { continue };
            let at = usize::try_from(part.start() - range.start()).map_err(io::Error::other)?;
            let end = usize::try_from(part.end() - range.start()).map_err(io::Error::other)?;
            let offset = slot.offset + (part.start() - slot.range.start());
            slot.file.read_exact_at(&mut buffer[at..end], offset).map_err(|error| slot.named(&error))?;
        }
        Ok(())
    }

    /// The parts of the RAM that are no holes of the descriptors.
    pub(crate) fn data(&self) -> io::Result<Vec<GpaRange>> {
        let mut ranges = Vec::new();
        for slot in &self.0 {
            let (mut next, end) = (slot.offset, slot.offset + slot.range.len());
            while let Some(part) = next_data(&slot.file, next, end).map_err(|error| slot.named(&error))? {
                let gpa = |offset: u64| slot.range.start() + (offset - slot.offset);
                ranges.extend(GpaRange::from_bounds(gpa(part.start), gpa(part.end)));
                next = part.end;
            }
        }
        Ok(ranges)
    }
}
