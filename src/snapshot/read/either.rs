// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Reads a snapshot of either kind.

use std::path::Path;

use super::differential::Differential;
use super::documents::{Configuration, Documents, open_manifest};
use super::full::FullSnapshot;
use crate::snapshot::disk::ReadError;
use crate::snapshot::format::{Manifest, SnapshotLimits};

/// A snapshot of the kind that its manifest says; without one it is a full snapshot.
pub(crate) enum Snapshot {
    Full(FullSnapshot),
    Differential(Differential),
}

impl Snapshot {
    pub(crate) fn open(
        path: &Path,
        configuration: Configuration<'_>,
        limits: &SnapshotLimits,
    ) -> Result<Self, ReadError> {
        Self::of(path, open_manifest(path, limits)?, configuration, limits)
    }

    pub(crate) fn of(
        path: &Path,
        manifest: Option<Manifest>,
        configuration: Configuration<'_>,
        limits: &SnapshotLimits,
    ) -> Result<Self, ReadError> {
        match manifest {
            Some(manifest) if manifest.changes.is_some() => {
                Differential::of(path, manifest, configuration, limits).map(Self::Differential)
            }
            manifest => FullSnapshot::of(path, manifest, configuration, limits).map(Self::Full),
        }
    }

    pub(crate) fn documents(&self) -> &Documents {
        match self {
            Self::Full(full) => full.documents(),
            Self::Differential(differential) => differential.documents(),
        }
    }

    pub(crate) fn manifest(&self) -> Option<&Manifest> {
        match self {
            Self::Full(full) => full.manifest(),
            Self::Differential(differential) => Some(differential.manifest()),
        }
    }
}
