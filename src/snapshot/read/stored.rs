// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What is read of a snapshot of either kind: manifest, configuration, state, and one file of memory.

use std::borrow::Cow;
use std::fs::File;
use std::path::{Path, PathBuf};

use super::reader::{CheckedBits, MemoryReader};
use crate::granule::Granule;
use crate::snapshot::disk::{ManifestUse, ReadError, open_sized, read_bounded};
use crate::snapshot::format::{
    CHANGES_FILE, CONFIG_FILE, Changes, Covered, Digest, Elsewhere, MANIFEST_FILE, MEMORY_FILE, Manifest,
    Placement, PlacementError, STATE_FILE, SnapshotLimits, VmConfig, VmState,
};
use crate::threads::ThreadStart;

/// Which configuration a snapshot is read with.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Configuration<'a> {
    /// That of `config.json`, which has to be the one that the manifest was made for.
    AsSealed,
    /// That of `config.json`, edited or not.
    AsItStands,
    /// This text; `config.json` is not read.
    Given(&'a [u8]),
}

/// A directory with a snapshot, whose parts fit together.
#[derive(Debug)]
pub(crate) struct Stored {
    pub(crate) path: PathBuf,
    pub(crate) config: VmConfig,
    /// The whole file that `config` was read from, with the blanks around it.
    pub(crate) config_file: Covered,
    pub(crate) state: VmState,
    /// `None` where a VMM wrote the snapshot.
    pub(crate) manifest: Option<Manifest>,
    /// `memory-ranges` or `memory-changes`; `None` for a full snapshot without memory.
    memory: Option<File>,
    checked: Option<CheckedBits>,
    /// What each thread that works on the snapshot does first.
    pub(crate) thread_start: ThreadStart,
}

impl Stored {
    /// Reads the directory at `path`, which has `manifest`, and checks all but the memory's bytes against it.
    pub(crate) fn open(
        path: &Path,
        manifest: Option<Manifest>,
        configuration: Configuration<'_>,
        limits: &SnapshotLimits,
    ) -> Result<Self, ReadError> {
        let sealed = manifest.as_ref();
        let text = match configuration {
            Configuration::Given(text) => Cow::Borrowed(text),
            _ => Cow::Owned(read_bounded(&path.join(CONFIG_FILE), limits.config_bytes)?),
        };
        let state = read_bounded(&path.join(STATE_FILE), limits.state_bytes)?;
        let altered = |name| ReadError::Altered { path: path.to_owned(), name };
        let wrong = |source| ReadError::Format { path: path.to_owned(), source };
        if sealed.is_some_and(|manifest| Covered::of(&state) != manifest.state) {
            return Err(altered(STATE_FILE));
        }
        let config_file = Covered::of(&text);
        let is_sealed = sealed.is_none_or(|manifest| config_file == manifest.config);
        let config = match VmConfig::parse(&text, limits) {
            Ok(_) if !is_sealed && matches!(configuration, Configuration::AsSealed) => {
                return Err(ReadError::EditedConfig { path: path.to_owned() });
            }
            // A configuration that cannot be parsed was never sealed.
            Err(_) if !is_sealed && !matches!(configuration, Configuration::Given(_)) => {
                return Err(altered(CONFIG_FILE));
            }
            parsed => parsed.map_err(wrong)?,
        };
        let state = VmState::parse(state, limits).map_err(wrong)?;
        if sealed.is_some_and(|manifest| !manifest.memory.ranges().eq(state.memory().ranges())) {
            return Err(altered(STATE_FILE));
        }
        let checked = sealed.map(|manifest| CheckedBits::none(&manifest.blocks));
        let (path, thread_start) = (path.to_owned(), limits.thread_start);
        let mut stored =
            Self { path, config, config_file, state, manifest, memory: None, checked, thread_start };
        // Cloud Hypervisor makes no file if all zones are shared mappings of files.
        let bytes = stored.placement().bytes();
        if bytes > 0 || stored.changes().is_some() {
            stored.memory = Some(open_sized(&stored.path.join(stored.memory_name()), bytes)?);
        }
        Ok(stored)
    }

    /// What a differential holds of the memory; `None` for a full snapshot.
    pub(crate) fn changes(&self) -> Option<&Changes> {
        self.manifest.as_ref()?.changes.as_ref()
    }

    fn memory_name(&self) -> &'static str {
        if self.changes().is_some() { CHANGES_FILE } else { MEMORY_FILE }
    }

    /// Where memory lies in the file of memory.
    pub(crate) fn placement(&self) -> &Placement {
        self.changes().map_or(self.state.memory(), |changes| &changes.runs)
    }

    /// Reads the file of memory; `None` where there is none.
    pub(crate) fn reader(&self) -> Option<MemoryReader<'_>> {
        let table = self.manifest.as_ref().map(|manifest| &manifest.blocks);
        Some(MemoryReader {
            dir: &self.path,
            name: self.memory_name(),
            file: self.memory.as_ref()?,
            placement: self.placement(),
            digests: table.zip(self.checked.as_ref()),
        })
    }

    /// Whether the configuration is not the one that the manifest was made for.
    pub(crate) fn is_edited(&self) -> bool {
        self.manifest.as_ref().is_some_and(|manifest| self.config_file != manifest.config)
    }

    /// What names the snapshot.
    pub(crate) fn digest(&self) -> Option<Digest> {
        self.manifest.as_ref().map(Manifest::digest)
    }

    /// Memory of the VM that is not in the snapshot, because it is in files outside it.
    pub(crate) fn elsewhere(&self) -> Elsewhere {
        Elsewhere::of(&self.config, &self.state)
    }

    /// Why no manifest can be made of the snapshot: its memory is not of whole pages.
    pub(crate) fn obstacle(&self) -> Option<PlacementError> {
        self.state.memory().page(Granule::host_page()).err()
    }

    /// The manifest.
    ///
    /// # Errors
    /// [`ReadError::NoManifest`]: a VMM wrote the snapshot, and nobody has sealed it since.
    pub(crate) fn expect_manifest(&self, needed: ManifestUse) -> Result<&Manifest, ReadError> {
        let none = || ReadError::NoManifest { path: self.path.clone(), needed, source: self.obstacle() };
        self.manifest.as_ref().ok_or_else(none)
    }
}

/// Reads the text of a configuration out of the file at `path`, to be given to
/// [`FullSnapshot::open_with_config`](crate::snapshot::FullSnapshot::open_with_config).
///
/// # Errors
/// It is not a regular file, cannot be read, or is longer than `limits` say.
pub fn read_config(path: &Path, limits: &SnapshotLimits) -> Result<Vec<u8>, ReadError> {
    read_bounded(path, limits.config_bytes)
}

/// Reads the manifest of the snapshot at `path`, if it has one.
pub(crate) fn open_manifest(path: &Path, limits: &SnapshotLimits) -> Result<Option<Manifest>, ReadError> {
    let bytes = match read_bounded(&path.join(MANIFEST_FILE), limits.manifest_bytes) {
        Err(error) if error.is_absent() => return Ok(None),
        read => read?,
    };
    let wrong = |source| ReadError::Format { path: path.join(MANIFEST_FILE), source };
    Manifest::parse(&bytes, limits).map(Some).map_err(wrong)
}
