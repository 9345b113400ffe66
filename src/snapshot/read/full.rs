// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Reads a full snapshot.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};

use super::documents::{Configuration, Documents, open_manifest};
use super::reader::{CheckedBits, MemoryReader};
use crate::granule::Granule;
use crate::range::GpaRange;
use crate::snapshot::disk::{ManifestUse, ReadError, open_sized};
use crate::snapshot::format::{
    Digest, Elsewhere, FormatError, MEMORY_FILE, Manifest, Placement, PlacementError, SnapshotLimits,
    VmConfig, VmState,
};
use crate::threads::ThreadStart;

/// A full snapshot on disk: a directory that Cloud Hypervisor restores, with or without a manifest.
#[derive(Debug)]
pub struct FullSnapshot {
    path: PathBuf,
    documents: Documents,
    /// `None` where a VMM wrote the snapshot.
    manifest: Option<Manifest>,
    /// `memory-ranges`; `None` where no memory is in it.
    memory: Option<File>,
    checked: Option<CheckedBits>,
    thread_start: ThreadStart,
}

impl FullSnapshot {
    /// Opens the snapshot at `path` and checks that its parts fit together; the memory's bytes are not read.
    ///
    /// # Errors
    /// A file is missing, damaged, exceeds `limits` or is of another version, or one does not fit the others.
    pub fn open(path: &Path, limits: &SnapshotLimits) -> Result<Self, ReadError> {
        Self::of(path, open_manifest(path, limits)?, Configuration::AsSealed, limits)
    }

    /// Opens the snapshot at `path` with the configuration `config`, a text like that of `config.json`, in place of its own,
    /// which is not looked at: for a host where disks, taps and files have other names.
    ///
    /// The state and the memory have to be as the manifest says, if there is one.
    ///
    /// # Errors
    /// As [`FullSnapshot::open`], or `config` is not the configuration of a VM.
    pub fn open_with_config(path: &Path, config: &[u8], limits: &SnapshotLimits) -> Result<Self, ReadError> {
        Self::of(path, open_manifest(path, limits)?, Configuration::Given(config), limits)
    }

    pub(crate) fn of(
        path: &Path,
        manifest: Option<Manifest>,
        configuration: Configuration<'_>,
        limits: &SnapshotLimits,
    ) -> Result<Self, ReadError> {
        if manifest.as_ref().is_some_and(|manifest| manifest.changes.is_some()) {
            return Err(ReadError::Differential { path: path.to_owned() });
        }
        let documents = Documents::open(path, manifest.as_ref(), configuration, limits)?;
        // Cloud Hypervisor makes no file where all zones share files of their own.
        let memory = match documents.state.memory().bytes() {
            0 => None,
            bytes => Some(open_sized(&path.join(MEMORY_FILE), bytes)?),
        };
        let checked = manifest.as_ref().map(|manifest| CheckedBits::none(&manifest.blocks));
        let thread_start = limits.thread_start;
        Ok(Self { path: path.to_owned(), documents, manifest, memory, checked, thread_start })
    }

    /// The directory.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// What each thread that works on the snapshot does first.
    pub(crate) fn thread_start(&self) -> ThreadStart {
        self.thread_start
    }

    /// Configuration and state.
    pub(crate) fn documents(&self) -> &Documents {
        &self.documents
    }

    /// `config.json`.
    pub fn config(&self) -> &VmConfig {
        &self.documents.config
    }

    /// Memory of the VM that is not in the snapshot, because it is in files of its own.
    pub fn elsewhere(&self) -> Elsewhere {
        Elsewhere::of(self.config(), self.state())
    }

    /// `state.json`.
    pub fn state(&self) -> &VmState {
        &self.documents.state
    }

    /// Where the VM's memory lies in `memory-ranges`.
    pub fn placement(&self) -> &Placement {
        self.documents.state.memory()
    }

    /// Why no manifest can be made of the snapshot: its memory is not of whole pages.
    pub(crate) fn obstacle(&self) -> Option<PlacementError> {
        self.placement().page(Granule::host_page()).err()
    }

    /// The manifest, if it has one.
    pub(crate) fn manifest(&self) -> Option<&Manifest> {
        self.manifest.as_ref()
    }

    /// The manifest.
    ///
    /// # Errors
    /// [`ReadError::NoManifest`]: a VMM wrote the snapshot, and nobody has sealed it since.
    pub(crate) fn expect_manifest(&self, needed: ManifestUse) -> Result<&Manifest, ReadError> {
        let none = || ReadError::NoManifest { path: self.path().to_owned(), needed, source: self.obstacle() };
        self.manifest.as_ref().ok_or_else(none)
    }

    /// What names the snapshot; `None` where it has no manifest, as a VMM leaves it.
    pub fn digest(&self) -> Option<Digest> {
        self.manifest.as_ref().map(Manifest::digest)
    }

    /// Makes the payload of the Config message that sends this snapshot to a waiting VMM.
    ///
    /// # Errors
    /// The state lacks what the message needs.
    pub fn config_message(&self) -> Result<Vec<u8>, FormatError> {
        self.documents.state.config_message(&self.documents.config)
    }

    /// Reads the memory of `range`; parts the VM does not have are left as they are in `buffer`.
    ///
    /// # Errors
    /// The file cannot be read, or was cut off since it was opened.
    ///
    /// # Panics
    /// `buffer` is shorter than `range`.
    pub fn read(&self, range: GpaRange, buffer: &mut [u8]) -> io::Result<()> {
        self.reader().map_or(Ok(()), |memory| memory.read(range, buffer))
    }

    /// Returns the memory that is not a hole of the file, in the order of the file. Everything else reads as zero.
    pub fn populated(&self) -> impl Iterator<Item = io::Result<GpaRange>> {
        self.reader().into_iter().flat_map(MemoryReader::populated)
    }

    /// Reads `memory-ranges`; `None` where no memory is in it.
    pub(crate) fn reader(&self) -> Option<MemoryReader<'_>> {
        let table = self.manifest.as_ref().map(|manifest| &manifest.blocks);
        Some(MemoryReader {
            dir: self.path(),
            name: MEMORY_FILE,
            file: self.memory.as_ref()?,
            placement: self.placement(),
            digests: table.zip(self.checked.as_ref()),
        })
    }

    /// Reads `memory-ranges`.
    ///
    /// # Errors
    /// [`ReadError::NoMemory`]: no memory is in it.
    pub(crate) fn memory(&self) -> Result<MemoryReader<'_>, ReadError> {
        let none = || ReadError::NoMemory { path: self.path().to_owned(), elsewhere: self.elsewhere() };
        self.reader().ok_or_else(none)
    }
}
