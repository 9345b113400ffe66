// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Reads the memory that a full snapshot and differentials on top of it make up.

use std::io;
use std::path::Path;

use super::differential::Differential;
use super::full::FullSnapshot;
use super::reader::MemoryReader;
use super::stored::Stored;
use crate::range::{GpaRange, united};
use crate::snapshot::disk::{ManifestUse, ReadError};
use crate::snapshot::format::{Digest, Elsewhere, SnapshotLimits, VmConfig, VmState};

/// A full snapshot with differentials on top, each made on what lies below it.
#[derive(Debug)]
pub struct SnapshotChain {
    full: FullSnapshot,
    differentials: Vec<Differential>,
}

impl SnapshotChain {
    /// Opens the full snapshot that `paths` begins with and the differentials that follow it, lowest first.
    ///
    /// # Errors
    /// No snapshot is named, one cannot be read, or one was made on top of something else.
    pub fn open<P: AsRef<Path>>(
        paths: impl IntoIterator<Item = P>,
        limits: &SnapshotLimits,
    ) -> Result<Self, ReadError> {
        let mut paths = paths.into_iter();
        let first = paths.next().ok_or(ReadError::Empty)?;
        let mut chain = Self::of(FullSnapshot::open(first.as_ref(), limits)?);
        for path in paths {
            chain = chain.with(Differential::open(path.as_ref(), limits)?)?;
        }
        Ok(chain)
    }

    /// Makes a chain of a full snapshot alone.
    pub fn of(full: FullSnapshot) -> Self {
        Self { full, differentials: Vec::new() }
    }

    /// Lays `differential` on top.
    ///
    /// # Errors
    /// It was made on top of something else.
    pub fn with(mut self, differential: Differential) -> Result<Self, ReadError> {
        if !self.top().expect_manifest(ManifestUse::Name)?.answers_to(differential.base()) {
            return Err(ReadError::WrongBase {
                path: differential.path().to_owned(),
                base: differential.base(),
                below: self.path().to_owned(),
            });
        }
        self.differentials.push(differential);
        Ok(self)
    }

    /// The lowest snapshot.
    pub fn full(&self) -> &FullSnapshot {
        &self.full
    }

    /// The differentials, lowest first.
    pub fn differentials(&self) -> &[Differential] {
        &self.differentials
    }

    /// The snapshot on top.
    pub(crate) fn top(&self) -> &Stored {
        self.differentials.last().map_or(self.full.stored(), Differential::stored)
    }

    /// The directory on top.
    pub fn path(&self) -> &Path {
        &self.top().path
    }

    /// What names the snapshot on top; `None` for a full snapshot with no manifest.
    pub fn digest(&self) -> Option<Digest> {
        self.top().digest()
    }

    /// `config.json` of the snapshot on top.
    pub fn config(&self) -> &VmConfig {
        &self.top().config
    }

    /// `state.json` of the snapshot on top, which lists the VM's memory.
    pub fn state(&self) -> &VmState {
        &self.top().state
    }

    /// Memory of the VM that is in none of the snapshots, because it is in files outside them.
    pub fn elsewhere(&self) -> Elsewhere {
        self.top().elsewhere()
    }

    /// Reads the memory of `range` as the snapshot on top has it; what the VM does not have reads as zero.
    ///
    /// The bytes are not checked; [`verify`](crate::snapshot::verify()) does that.
    ///
    /// # Errors
    /// A file cannot be read, or was cut off since it was opened.
    ///
    /// # Panics
    /// `buffer` is shorter than `range`.
    pub fn read(&self, range: GpaRange, buffer: &mut [u8]) -> io::Result<()> {
        self.read_as(range, buffer, false)
    }

    /// Reads as [`SnapshotChain::read`] does, and checks every block against its digest; a full snapshot with no manifest is not checked.
    ///
    /// # Errors
    /// A file cannot be read, or was cut off; or a block was altered, then the error holds [`Altered`](crate::snapshot::Altered).
    pub(crate) fn read_checked(&self, range: GpaRange, buffer: &mut [u8]) -> io::Result<()> {
        self.read_as(range, buffer, true)
    }

    fn read_as(&self, range: GpaRange, buffer: &mut [u8], is_checked: bool) -> io::Result<()> {
        buffer.fill(0);
        let read = |stored: &Stored, buffer: &mut [u8]| match stored.reader() {
            Some(memory) if is_checked => memory.read_checked(range, buffer),
            Some(memory) => memory.read(range, buffer),
            None => Ok(()),
        };
        read(self.full.stored(), buffer)?;
        self.differentials.iter().try_for_each(|differential| {
            differential.overlay_zeros(range, buffer);
            read(differential.stored(), buffer)
        })
    }

    /// Checks the blocks of the full snapshot that hold any of `range` and were not read before.
    ///
    /// # Errors
    /// As [`SnapshotChain::read_checked`].
    pub(crate) fn check(&self, range: GpaRange) -> io::Result<()> {
        self.full.stored().reader().map_or(Ok(()), |memory| memory.check_range(range))
    }

    /// Returns memory outside which everything reads as zero: sorted and disjoint.
    ///
    /// # Errors
    /// A file cannot be read.
    pub fn populated(&self) -> io::Result<Vec<GpaRange>> {
        let ranges = self.full.populated().collect::<io::Result<Vec<_>>>()?;
        Ok(self.with_changed(ranges))
    }

    /// Returns memory outside which everything was zero when it was written, even if the files' holes have changed since.
    ///
    /// # Errors
    /// A full snapshot with no manifest cannot be read.
    pub(crate) fn populated_as_written(&self) -> io::Result<Vec<GpaRange>> {
        match self.full.stored().reader().and_then(MemoryReader::populated_as_written) {
            Some(written) => Ok(self.with_changed(written.collect())),
            None => self.populated(),
        }
    }

    fn with_changed(&self, mut ranges: Vec<GpaRange>) -> Vec<GpaRange> {
        ranges.extend(self.differentials.iter().flat_map(|differential| differential.changed().ranges()));
        united(ranges)
    }
}
