// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Says what a directory holds.

use std::io;
use std::path::Path;

use serde::Serialize;

use crate::range::GpaRange;
use crate::snapshot::disk::ReadError;
use crate::snapshot::format::{Changes, Digest, Elsewhere, MEMORY_FILE, PassThrough, SnapshotLimits};
use crate::snapshot::read::{Configuration, MemoryReader, Stored, open_manifest};

/// What a snapshot holds of the memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case", tag = "kind")]
#[non_exhaustive]
pub enum SnapshotKind {
    /// All of it.
    Full {
        /// Bytes that are not in holes of the file.
        populated_bytes: u64,
    },
    /// What differs from another snapshot.
    Differential {
        /// Names the other one.
        base: Digest,
        /// Bytes of pages that differ.
        changed_bytes: u64,
        /// Bytes of pages that became zero.
        zeroed_bytes: u64,
        /// Runs of pages.
        runs: usize,
    },
}

/// What a directory holds.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct Description {
    /// Full or differential.
    #[serde(flatten)]
    pub kind: SnapshotKind,
    /// What names the snapshot; `None` without a manifest.
    pub digest: Option<Digest>,
    /// Why [`seal`](crate::snapshot::seal()) can give it no manifest.
    pub obstacle: Option<String>,
    /// Names of differentials that this full snapshot equals.
    pub aliases: Vec<Digest>,
    /// Bytes of the VM's memory.
    pub memory_bytes: u64,
    /// Ranges of the VM's memory.
    pub memory_ranges: usize,
    /// Bytes of guest memory or pages that one digest covers.
    pub block_bytes: Option<u64>,
    /// Bytes of `config.json`.
    pub config_bytes: u64,
    /// Bytes of `state.json`.
    pub state_bytes: u64,
    /// Whether `config.json` is not the one that the manifest was made for.
    pub config_edited: bool,
    /// Memory of the VM that is not in the snapshot, because it is in files outside it.
    pub elsewhere: Elsewhere,
    /// The pass-through devices.
    pub devices: Vec<PassThrough>,
}

/// Opens the snapshot at `path`, of either kind, and says what it holds. The memory's bytes are not checked.
///
/// An edited `config.json` is described as it is now.
///
/// # Errors
/// As [`FullSnapshot::open`](crate::snapshot::FullSnapshot::open).
pub fn describe(path: &Path, limits: &SnapshotLimits) -> Result<Description, ReadError> {
    let stored = Stored::open(path, open_manifest(path, limits)?, Configuration::AsItStands, limits)?;
    let (kind, obstacle) = match stored.changes() {
        None => (kind_of_full(&stored)?, stored.obstacle()),
        Some(changes) => (kind_of_differential(changes), None),
    };
    let Stored { config, state, manifest, .. } = &stored;
    let wrong = |source| ReadError::Format { path: path.to_owned(), source };
    Ok(Description {
        kind,
        digest: stored.digest(),
        obstacle: obstacle.map(|obstacle| obstacle.to_string()),
        aliases: manifest.as_ref().map_or_else(Vec::new, |manifest| manifest.aliases.clone()),
        memory_bytes: state.memory().bytes(),
        memory_ranges: state.memory().ascending().len(),
        block_bytes: manifest.as_ref().map(|manifest| manifest.blocks.block_bytes),
        config_bytes: config.text().len() as u64,
        state_bytes: state.text().len() as u64,
        config_edited: stored.is_edited(),
        elsewhere: stored.elsewhere(),
        devices: state.devices(config).map_err(wrong)?,
    })
}

fn kind_of_full(full: &Stored) -> Result<SnapshotKind, ReadError> {
    let populated = full.reader().into_iter().flat_map(MemoryReader::populated);
    let populated_bytes = populated.map(|range| range.map(GpaRange::len)).sum::<io::Result<u64>>();
    let populated_bytes = populated_bytes.map_err(|source| {
        let unnamed = |source| ReadError::Read { path: full.path.join(MEMORY_FILE), source };
        source.downcast().unwrap_or_else(unnamed)
    })?;
    Ok(SnapshotKind::Full { populated_bytes })
}

fn kind_of_differential(changes: &Changes) -> SnapshotKind {
    let Changes { base, runs, zero_runs } = changes;
    SnapshotKind::Differential {
        base: *base,
        changed_bytes: runs.bytes(),
        zeroed_bytes: zero_runs.bytes(),
        runs: runs.ascending().len() + zero_runs.ascending().len(),
    }
}
