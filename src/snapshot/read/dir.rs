// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Reads a full snapshot.

use std::borrow::Cow;
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};

use thiserror::Error;

use crate::granule::Granule;
use crate::range::GpaRange;
use crate::snapshot::disk::files::{
    CONFIG_FILE, FileError, MANIFEST_FILE, MEMORY_FILE, STATE_FILE, data_parts, named, open_sized,
    read_bounded, read_named,
};
use crate::snapshot::format::digest::Digest;
use crate::snapshot::format::document::VmConfig;
use crate::snapshot::format::document_error::DocumentError;
use crate::snapshot::format::elsewhere::Elsewhere;
use crate::snapshot::format::limits::Limits;
use crate::snapshot::format::manifest::{Covered, Manifest, ManifestError};
use crate::snapshot::format::placement::{Placement, PlacementError};
use crate::snapshot::format::state::VmState;
use crate::snapshot::read::checked::{CheckedBits, CheckedMemory};
use crate::snapshot::write::memory_file::read_placed;
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
    /// `config.json` is not the one that the manifest was made for. It still is the configuration of a VM: disks, taps and files
    /// have other names on other hosts.
    #[error("{CONFIG_FILE} of {path} was edited since its manifest was made", path = .path.display())]
    EditedConfig {
        /// The directory.
        path: PathBuf,
    },
    /// There is no `memory-ranges`, and the state lists no memory: none of it is in the snapshot.
    #[error("{path} holds no memory{elsewhere}", path = .path.display(), elsewhere = .elsewhere.as_reason())]
    NoMemory {
        /// The directory.
        path: PathBuf,
        /// Where the memory is.
        elsewhere: Elsewhere,
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

/// Which configuration a snapshot is read with.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Configuration<'a> {
    /// That of `config.json`, if it is the one that the manifest was made for.
    AsSealed,
    /// That of `config.json`, edited or not.
    AsItStands,
    /// This text; `config.json` is not looked at.
    Given(&'a [u8]),
}

/// Configuration and state of a snapshot of either kind.
#[derive(Debug, Clone)]
pub(crate) struct Documents {
    pub(crate) config: VmConfig,
    /// The text that `config` was read from, with whatever blanks somebody left around it.
    pub(crate) config_file: Covered,
    pub(crate) state: VmState,
}

impl Documents {
    /// Reads both, and checks them against the manifest where there is one.
    pub(crate) fn open(
        path: &Path,
        manifest: Option<&Manifest>,
        configuration: Configuration<'_>,
        limits: &Limits,
    ) -> Result<Self, OpenError> {
        let text = match configuration {
            Configuration::Given(text) => Cow::Borrowed(text),
            _ => Cow::Owned(read_bounded(&path.join(CONFIG_FILE), limits.config_bytes)?),
        };
        let state = read_bounded(&path.join(STATE_FILE), limits.state_bytes)?;
        let altered = |name| OpenError::Altered { path: path.to_owned(), name };
        let wrong = |source| OpenError::Document { path: path.to_owned(), source };
        if manifest.is_some_and(|manifest| Covered::of(&state) != manifest.state) {
            return Err(altered(STATE_FILE));
        }
        let config_file = Covered::of(&text);
        let is_sealed = manifest.is_none_or(|manifest| config_file == manifest.config);
        let config = match VmConfig::parse(&text, limits) {
            Ok(_) if !is_sealed && matches!(configuration, Configuration::AsSealed) => {
                return Err(OpenError::EditedConfig { path: path.to_owned() });
            }
            // It was sealed as something that can be read.
            Err(_) if !is_sealed && !matches!(configuration, Configuration::Given(_)) => {
                return Err(altered(CONFIG_FILE));
            }
            parsed => parsed.map_err(wrong)?,
        };
        let state = VmState::parse(state, limits).map_err(wrong)?;
        if manifest.is_some_and(|manifest| !manifest.memory.ranges().eq(state.memory().ranges())) {
            return Err(altered(STATE_FILE));
        }
        Ok(Self { config, config_file, state })
    }

    /// Whether the configuration is another than the one that `manifest` was made for.
    pub(crate) fn is_edited(&self, manifest: &Manifest) -> bool {
        self.config_file != manifest.config
    }
}

/// Reads the text of a configuration out of the file at `path`, to be given to [`SnapshotDir::open_with_config`].
///
/// # Errors
/// It is no regular file, cannot be read, or is longer than `limits` say.
pub fn read_config(path: &Path, limits: &Limits) -> Result<Vec<u8>, FileError> {
    read_bounded(path, limits.config_bytes)
}

/// Reads the manifest of the snapshot at `path`, if it has one.
pub(crate) fn open_manifest(path: &Path, limits: &Limits) -> Result<Option<Manifest>, OpenError> {
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
    /// `memory-ranges`; `None` where no memory is in it.
    memory: Option<File>,
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
        Self::open_as(path, Configuration::AsSealed, limits)
    }

    /// Opens the snapshot at `path` with the configuration `config`, a text as that of `config.json`, in place of its own,
    /// which is not looked at: for a host where disks, taps and files have other names.
    ///
    /// The state and the memory have to be as the manifest says, if there is one.
    ///
    /// # Errors
    /// As [`SnapshotDir::open`], or `config` is not the configuration of a VM.
    pub fn open_with_config(path: &Path, config: &[u8], limits: &Limits) -> Result<Self, OpenError> {
        Self::open_as(path, Configuration::Given(config), limits)
    }

    pub(crate) fn open_as(
        path: &Path,
        configuration: Configuration<'_>,
        limits: &Limits,
    ) -> Result<Self, OpenError> {
        let manifest = open_manifest(path, limits)?;
        if manifest.as_ref().is_some_and(|manifest| manifest.changes.is_some()) {
            return Err(OpenError::Differential { path: path.to_owned() });
        }
        let documents = Documents::open(path, manifest.as_ref(), configuration, limits)?;
        // Cloud Hypervisor makes no file where all zones share files of their own.
        let memory = match documents.state.memory().bytes() {
            0 => None,
            bytes => Some(open_sized(&path.join(MEMORY_FILE), bytes)?),
        };
        let checked = manifest.as_ref().map(|manifest| CheckedBits::none(&manifest.blocks));
        let thread_start = limits.thread_start;
        Ok(Self { path: path.to_owned(), documents, memory, manifest, checked, thread_start })
    }

    /// The directory.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// `memory-ranges`, for messages.
    pub(crate) fn memory_path(&self) -> PathBuf {
        self.path.join(MEMORY_FILE)
    }

    /// What each thread that works on the snapshot does first.
    pub(crate) fn thread_start(&self) -> ThreadStart {
        self.thread_start
    }

    /// `config.json`.
    pub fn config(&self) -> &VmConfig {
        &self.documents.config
    }

    /// `config.json` as it was when it was read.
    pub(crate) fn config_file(&self) -> Covered {
        self.documents.config_file
    }

    /// Whether `config.json` is another than the one that the manifest was made for.
    pub(crate) fn is_edited(&self) -> bool {
        self.manifest.as_ref().is_some_and(|manifest| self.documents.is_edited(manifest))
    }

    /// Memory of the VM that is not in the snapshot, because it is in files of its own.
    pub fn elsewhere(&self) -> Elsewhere {
        Elsewhere::of(self.config(), self.state())
    }

    /// `memory-ranges`.
    ///
    /// # Errors
    /// [`OpenError::NoMemory`]: no memory is in it.
    pub(crate) fn memory(&self) -> Result<&File, OpenError> {
        let none = || OpenError::NoMemory { path: self.path.clone(), elsewhere: self.elsewhere() };
        self.memory.as_ref().ok_or_else(none)
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
        let Some(memory) = &self.memory else { return Ok(()) };
        let read = |bytes: &mut [u8], offset| read_named(memory, || self.memory_path(), bytes, offset);
        read_placed(self.placement(), range, buffer, read)
    }

    /// Returns the memory that is no hole of the file, in the order of the file. Everything else reads as zero.
    pub fn populated(&self) -> impl Iterator<Item = io::Result<GpaRange>> {
        let placement = self.placement();
        let parts = self.memory.iter().flat_map(|memory| data_parts(memory, placement.bytes()));
        parts.flat_map(|part| {
            let (ranges, failed) = match part {
                Ok(part) => (Some(placement.gpas(part.start, part.end - part.start)), None),
                Err(error) => (None, Some(Err(named(|| self.memory_path())(error)))),
            };
            ranges.into_iter().flatten().map(Ok).chain(failed)
        })
    }

    /// The memory to be read with checks; `None` without a manifest, or without memory.
    pub(crate) fn checked(&self) -> Option<CheckedMemory<'_>> {
        Some(CheckedMemory {
            dir: &self.path,
            name: MEMORY_FILE,
            file: self.memory.as_ref()?,
            placement: self.placement(),
            manifest: self.manifest.as_ref()?,
            checked: self.checked.as_ref()?,
        })
    }

    pub(crate) fn manifest(&self) -> Option<&Manifest> {
        self.manifest.as_ref()
    }
}
