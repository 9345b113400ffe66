// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Reads a full snapshot.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};

use thiserror::Error;

use super::checked::{CheckedBits, CheckedMemory};
use super::digest::Digest;
use super::document::{DocumentError, VmConfig};
use super::files::{
    CONFIG_FILE, FileError, MANIFEST_FILE, MEMORY_FILE, STATE_FILE, data_parts, open_sized, read_bounded,
};
use super::limits::Limits;
use super::manifest::{Covered, Manifest, ManifestError};
use super::memory_file::read_placed;
use super::placement::Placement;
use super::state::VmState;
use crate::range::GpaRange;
use crate::threads::ThreadStart;

/// Why a directory is not a snapshot that can be read.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum OpenError {
    /// A file is missing, unreadable or of the wrong size.
    #[error(transparent)]
    File(#[from] FileError),
    /// Configuration or state are not what they should be.
    #[error("Cannot use {path}", path = .path.display())]
    Document {
        /// The directory.
        path: PathBuf,
        /// What is wrong, in which document.
        source: DocumentError,
    },
    /// The manifest is damaged or of another version.
    #[error("Cannot use {path}", path = .path.join(MANIFEST_FILE).display())]
    Manifest {
        /// The directory.
        path: PathBuf,
        /// What is wrong.
        source: ManifestError,
    },
    /// A file is not the one that the manifest was made for.
    #[error("{name} of {path} is not the file that its manifest describes", path = .path.display())]
    Altered {
        /// The directory.
        path: PathBuf,
        /// The file.
        name: &'static str,
    },
    /// A differential was given where a full snapshot is needed.
    #[error("{path} is a differential, not a full snapshot", path = .path.display())]
    Differential {
        /// The directory.
        path: PathBuf,
    },
    /// A full snapshot was given where a differential is needed.
    #[error("{path} is no differential", path = .path.display())]
    Full {
        /// The directory.
        path: PathBuf,
    },
}

/// Configuration and state of a snapshot of either kind.
#[derive(Debug, Clone)]
pub(super) struct Documents {
    pub(super) config: VmConfig,
    /// The file that `config` was read from, with whatever blanks somebody left around it.
    pub(super) config_file: Covered,
    pub(super) state: VmState,
}

impl Documents {
    /// Reads both, and checks them against the manifest where there is one.
    pub(super) fn open(path: &Path, manifest: Option<&Manifest>, limits: &Limits) -> Result<Self, OpenError> {
        let config = read_bounded(&path.join(CONFIG_FILE), limits.config_bytes)?;
        let state = read_bounded(&path.join(STATE_FILE), limits.state_bytes)?;
        let altered = |name| OpenError::Altered { path: path.to_owned(), name };
        let config_file = Covered::of(&config);
        if let Some(manifest) = manifest {
            if config_file != manifest.config {
                return Err(altered(CONFIG_FILE));
            }
            if Covered::of(&state) != manifest.state {
                return Err(altered(STATE_FILE));
            }
        }
        let wrong = |source| OpenError::Document { path: path.to_owned(), source };
        let config = VmConfig::parse(&config, limits).map_err(wrong)?;
        let state = VmState::parse(state, limits).map_err(wrong)?;
        if manifest.is_some_and(|manifest| !manifest.memory.ranges().eq(state.memory().ranges())) {
            return Err(altered(STATE_FILE));
        }
        Ok(Self { config, config_file, state })
    }
}

/// Reads the manifest of the snapshot at `path`, if it has one.
pub(super) fn open_manifest(path: &Path, limits: &Limits) -> Result<Option<Manifest>, OpenError> {
    let bytes = match read_bounded(&path.join(MANIFEST_FILE), limits.manifest_bytes) {
        Err(FileError::Open { source, .. }) if source.kind() == io::ErrorKind::NotFound => return Ok(None),
        read => read?,
    };
    let wrong = |source| OpenError::Manifest { path: path.to_owned(), source };
    Manifest::parse(&bytes, limits).map(Some).map_err(wrong)
}

/// A full snapshot on disk: a directory that Cloud Hypervisor restores, with or without a manifest.
#[derive(Debug)]
pub struct SnapshotDir {
    path: PathBuf,
    documents: Documents,
    memory: File,
    manifest: Option<Manifest>,
    checked: Option<CheckedBits>,
    thread_start: ThreadStart,
}

impl SnapshotDir {
    /// Opens the snapshot at `path` and checks that its parts fit together; the memory's bytes are not read.
    ///
    /// # Errors
    /// A file is missing, damaged, exceeds `limits` or is of another version, or one does not fit the others.
    pub fn open(path: &Path, limits: &Limits) -> Result<Self, OpenError> {
        let manifest = open_manifest(path, limits)?;
        if manifest.as_ref().is_some_and(|manifest| manifest.changes.is_some()) {
            return Err(OpenError::Differential { path: path.to_owned() });
        }
        let documents = Documents::open(path, manifest.as_ref(), limits)?;
        let memory = open_sized(&path.join(MEMORY_FILE), documents.state.memory().bytes())?;
        let checked = manifest.as_ref().map(|manifest| CheckedBits::none(&manifest.blocks));
        let thread_start = limits.thread_start;
        Ok(Self { path: path.to_owned(), documents, memory, manifest, checked, thread_start })
    }

    /// The directory.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// What each thread that works on the snapshot does first.
    pub(super) fn thread_start(&self) -> ThreadStart {
        self.thread_start
    }

    /// `config.json`.
    pub fn config(&self) -> &VmConfig {
        &self.documents.config
    }

    /// `config.json` as it was when it was read.
    pub(super) fn config_file(&self) -> Covered {
        self.documents.config_file
    }

    /// `state.json`.
    pub fn state(&self) -> &VmState {
        &self.documents.state
    }

    /// Where the VM's memory lies in `memory-ranges`.
    pub fn placement(&self) -> &Placement {
        self.documents.state.memory()
    }

    /// What names the snapshot; `None` where it has no manifest, as a VMM leaves it.
    pub fn digest(&self) -> Option<Digest> {
        self.manifest.as_ref().map(Manifest::digest)
    }

    /// Makes the payload of the Config message that sends this snapshot to a waiting VMM.
    ///
    /// # Errors
    /// The state lacks what the message needs.
    pub fn config_message(&self) -> Result<Vec<u8>, DocumentError> {
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
        read_placed(&self.memory, self.placement(), range, buffer)
    }

    /// Returns the memory that is no hole of the file, in the order of the file. Everything else reads as zero.
    pub fn populated(&self) -> impl Iterator<Item = io::Result<GpaRange>> {
        let placement = self.placement();
        data_parts(&self.memory, placement.bytes()).flat_map(|part| {
            let (ranges, failed) = match part {
                Ok(part) => (Some(placement.gpas(part.start, part.end - part.start)), None),
                Err(error) => (None, Some(Err(error))),
            };
            ranges.into_iter().flatten().map(Ok).chain(failed)
        })
    }

    /// The memory to be read with checks; `None` without a manifest.
    pub(super) fn checked(&self) -> Option<CheckedMemory<'_>> {
        Some(CheckedMemory {
            dir: &self.path,
            name: MEMORY_FILE,
            file: &self.memory,
            placement: self.placement(),
            manifest: self.manifest.as_ref()?,
            checked: self.checked.as_ref()?,
        })
    }

    pub(super) fn memory(&self) -> &File {
        &self.memory
    }

    pub(super) fn manifest(&self) -> Option<&Manifest> {
        self.manifest.as_ref()
    }
}
