// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Reads a differential.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};

use super::documents::{Configuration, Documents, open_manifest};
use super::reader::{CheckedBits, MemoryReader};
use crate::range::GpaRange;
use crate::snapshot::disk::{ReadError, open_sized};
use crate::snapshot::format::{
    CHANGES_FILE, Changes, Digest, MANIFEST_FILE, Manifest, Placement, SnapshotLimits, VmConfig, VmState,
};
use crate::snapshot::reserve::index;

/// A differential on disk: configuration, state, and the pages that differ from its base.
#[derive(Debug)]
pub struct Differential {
    path: PathBuf,
    documents: Documents,
    manifest: Manifest,
    changes: Changes,
    pages: File,
    checked: CheckedBits,
}

impl Differential {
    /// Opens the differential at `path` and checks that its parts fit together; the pages' bytes are not read.
    ///
    /// # Errors
    /// A file is missing, damaged, exceeds `limits` or is of another version, or one does not fit the others.
    pub fn open(path: &Path, limits: &SnapshotLimits) -> Result<Self, ReadError> {
        let manifest = open_manifest(path, limits)?.ok_or_else(|| {
            let source = io::ErrorKind::NotFound.into();
            ReadError::Open { path: path.join(MANIFEST_FILE), source }
        })?;
        Self::of(path, manifest, Configuration::AsSealed, limits)
    }

    pub(crate) fn of(
        path: &Path,
        manifest: Manifest,
        configuration: Configuration<'_>,
        limits: &SnapshotLimits,
    ) -> Result<Self, ReadError> {
        let full = || ReadError::Full { path: path.to_owned() };
        let changes = manifest.changes.clone().ok_or_else(full)?;
        let documents = Documents::open(path, Some(&manifest), configuration, limits)?;
        let pages = open_sized(&path.join(CHANGES_FILE), changes.runs.bytes())?;
        let checked = CheckedBits::none(&manifest.blocks);
        Ok(Self { path: path.to_owned(), documents, manifest, changes, pages, checked })
    }

    /// The directory.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// What names this differential on its base.
    pub fn digest(&self) -> Digest {
        self.manifest.digest()
    }

    /// What names the snapshot that this one differs from.
    pub fn base(&self) -> Digest {
        self.changes.base
    }

    /// `config.json`.
    pub fn config(&self) -> &VmConfig {
        &self.documents.config
    }

    /// `state.json`.
    pub fn state(&self) -> &VmState {
        &self.documents.state
    }

    /// Pages that differ from the base and are not zero, and where they lie in `memory-changes`; ascending.
    pub fn changed(&self) -> &Placement {
        &self.changes.runs
    }

    /// Pages that are zero and were not, or perhaps were not, in the base; ascending.
    pub fn zeroed(&self) -> impl Iterator<Item = GpaRange> + Clone {
        self.changes.zero_runs.ranges()
    }

    /// Configuration and state.
    pub(crate) fn documents(&self) -> &Documents {
        &self.documents
    }

    pub(crate) fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// Reads `memory-changes`.
    pub(crate) fn reader(&self) -> MemoryReader<'_> {
        MemoryReader {
            dir: &self.path,
            name: CHANGES_FILE,
            file: &self.pages,
            placement: &self.changes.runs,
            digests: Some((&self.manifest.blocks, &self.checked)),
        }
    }

    /// Zeroes those bytes of `buffer`, the memory of `range` as the base has it, that are zero in this differential.
    pub(crate) fn overlay_zeros(&self, range: GpaRange, buffer: &mut [u8]) {
        let zeroed = self.changes.zero_runs.locate(range).map(|extent| extent.range);
        let absent = self.documents.state.memory().missing(range);
        for zero in zeroed.chain(absent) {
            buffer[index(zero.start() - range.start())..index(zero.end() - range.start())].fill(0);
        }
    }
}
