// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Reads a differential.

use std::io;
use std::path::Path;

use super::stored::{Configuration, Stored, open_manifest};
use crate::range::GpaRange;
use crate::snapshot::disk::ReadError;
use crate::snapshot::format::{
    Changes, Digest, MANIFEST_FILE, Manifest, Placement, SnapshotLimits, VmConfig, VmState,
};
use crate::snapshot::reserve::index;

/// A differential on disk: configuration, state, and the pages that differ from its base.
#[derive(Debug)]
pub struct Differential(Stored);

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
        if manifest.changes.is_none() {
            return Err(ReadError::Full { path: path.to_owned() });
        }
        Stored::open(path, Some(manifest), Configuration::AsSealed, limits).map(Self)
    }

    pub(crate) fn stored(&self) -> &Stored {
        &self.0
    }

    pub(crate) fn manifest(&self) -> &Manifest {
        self.0.manifest.as_ref().expect("a differential is opened with its manifest")
    }

    fn changes(&self) -> &Changes {
        self.0.changes().expect("the manifest of a differential has changes")
    }

    /// The directory.
    pub fn path(&self) -> &Path {
        &self.0.path
    }

    /// What names this differential on its base.
    pub fn digest(&self) -> Digest {
        self.manifest().digest()
    }

    /// What names the snapshot that this one differs from.
    pub fn base(&self) -> Digest {
        self.changes().base
    }

    /// `config.json`.
    pub fn config(&self) -> &VmConfig {
        &self.0.config
    }

    /// `state.json`.
    pub fn state(&self) -> &VmState {
        &self.0.state
    }

    /// Pages that differ from the base and are not zero, but for some that came to be so late, and where they lie in `memory-changes`.
    pub fn changed(&self) -> &Placement {
        &self.changes().runs
    }

    /// Pages that are zero and were not, or perhaps were not, in the base; ascending.
    pub fn zeroed(&self) -> impl Iterator<Item = GpaRange> + Clone {
        self.changes().zero_runs.ranges()
    }

    /// Zeroes those bytes of `buffer`, the memory of `range` as the base has it, that are zero in this differential.
    pub(super) fn overlay_zeros(&self, range: GpaRange, buffer: &mut [u8]) {
        let zeroed = self.changes().zero_runs.locate(range).map(|extent| extent.range);
        let absent = self.state().memory().missing(range);
        for zero in zeroed.chain(absent) {
            buffer[index(zero.start() - range.start())..index(zero.end() - range.start())].fill(0);
        }
    }
}
