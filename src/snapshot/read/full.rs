// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Reads a full snapshot.

use std::io;
use std::path::Path;

use super::reader::MemoryReader;
use super::stored::{Configuration, Stored, open_manifest};
use crate::range::GpaRange;
use crate::snapshot::disk::ReadError;
use crate::snapshot::format::{Digest, Elsewhere, FormatError, Placement, SnapshotLimits, VmConfig, VmState};

/// A full snapshot on disk: a directory that Cloud Hypervisor restores, with or without a manifest.
#[derive(Debug)]
pub struct FullSnapshot(Stored);

impl FullSnapshot {
    /// Opens the snapshot at `path` and checks that its parts fit together; the memory's bytes are not read.
    ///
    /// # Errors
    /// A file is missing, damaged, exceeds `limits` or is of another version, or one does not fit the others.
    pub fn open(path: &Path, limits: &SnapshotLimits) -> Result<Self, ReadError> {
        Self::open_as(path, Configuration::AsSealed, limits)
    }

    /// Opens the snapshot at `path` with the configuration `config`, a text like that of `config.json`, instead of its own, which is not
    /// read: for a host where disks, taps and files have other names.
    ///
    /// The state and the memory have to be as the manifest says, if there is one.
    ///
    /// # Errors
    /// As [`FullSnapshot::open`], or `config` is not the configuration of a VM.
    pub fn open_with_config(path: &Path, config: &[u8], limits: &SnapshotLimits) -> Result<Self, ReadError> {
        Self::open_as(path, Configuration::Given(config), limits)
    }

    fn open_as(path: &Path, config: Configuration<'_>, limits: &SnapshotLimits) -> Result<Self, ReadError> {
        let manifest = open_manifest(path, limits)?;
        if manifest.as_ref().is_some_and(|manifest| manifest.changes.is_some()) {
            return Err(ReadError::Differential { path: path.to_owned() });
        }
        Stored::open(path, manifest, config, limits).map(Self)
    }

    pub(crate) fn stored(&self) -> &Stored {
        &self.0
    }

    /// The directory.
    pub fn path(&self) -> &Path {
        &self.0.path
    }

    /// `config.json`.
    pub fn config(&self) -> &VmConfig {
        &self.0.config
    }

    /// Memory of the VM that is not in the snapshot, because it is in files outside it.
    pub fn elsewhere(&self) -> Elsewhere {
        self.0.elsewhere()
    }

    /// `state.json`.
    pub fn state(&self) -> &VmState {
        &self.0.state
    }

    /// Where the VM's memory lies in `memory-ranges`.
    pub fn placement(&self) -> &Placement {
        self.0.placement()
    }

    /// What names the snapshot; `None` where it has no manifest, as a VMM leaves it.
    pub fn digest(&self) -> Option<Digest> {
        self.0.digest()
    }

    /// Makes the payload of the Config message that sends this snapshot to a waiting VMM.
    ///
    /// # Errors
    /// The state lacks what the message needs.
    pub fn config_message(&self) -> Result<Vec<u8>, FormatError> {
        self.0.state.config_message(&self.0.config)
    }

    /// Reads the memory of `range`; parts the VM does not have are left as they are in `buffer`.
    ///
    /// # Errors
    /// The file cannot be read, or was cut off since it was opened.
    ///
    /// # Panics
    /// `buffer` is shorter than `range`.
    pub fn read(&self, range: GpaRange, buffer: &mut [u8]) -> io::Result<()> {
        self.0.reader().map_or(Ok(()), |memory| memory.read(range, buffer))
    }

    /// Returns the memory that is not a hole of the file, in the order of the file. Everything else reads as zero.
    pub fn populated(&self) -> impl Iterator<Item = io::Result<GpaRange>> {
        self.0.reader().into_iter().flat_map(MemoryReader::populated)
    }

    /// Reads `memory-ranges`.
    ///
    /// # Errors
    /// [`ReadError::NoMemory`]: no memory is in it.
    pub(crate) fn memory(&self) -> Result<MemoryReader<'_>, ReadError> {
        let none = || ReadError::NoMemory { path: self.path().to_owned(), elsewhere: self.elsewhere() };
        self.0.reader().ok_or_else(none)
    }
}
