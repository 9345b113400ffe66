// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Gives a manifest to a snapshot that has none, and takes an edited configuration into one.

use std::collections::TryReserveError;
use std::io;
use std::path::{Path, PathBuf};

use thiserror::Error;

use crate::granule::Granule;
use crate::snapshot::disk::files::MANIFEST_FILE;
use crate::snapshot::disk::staging::{StagingError, add_file, clear_added};
use crate::snapshot::format::blocks::{BlockTable, block_bytes_for};
use crate::snapshot::format::digest::Digest;
use crate::snapshot::format::limits::Limits;
use crate::snapshot::format::manifest::Manifest;
use crate::snapshot::format::placement::PlacementError;
use crate::snapshot::read::block_reader::hash_memory;
use crate::snapshot::read::differential::Differential;
use crate::snapshot::read::dir::{Configuration, OpenError, SnapshotDir, open_manifest};
use crate::snapshot::write::memory_file::LEAST_BLOCK_BYTES;

/// Why a snapshot was given no manifest. It is as it was, but for [`StagingError::Unsynced`].
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum SealError {
    /// There is no snapshot to seal.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// Its memory is not of whole pages, as every manifest's is.
    #[error("Cannot seal the memory of {path}", path = .path.display())]
    Pages {
        /// The snapshot.
        path: PathBuf,
        /// Which part.
        source: PlacementError,
    },
    /// Its memory could not be read.
    #[error("Cannot read the memory of {path}", path = .path.display())]
    Read {
        /// The snapshot.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// There is no manifest to take a configuration into.
    #[error("{path} has no manifest to take an edited configuration into", path = .path.display())]
    NoManifest {
        /// The snapshot.
        path: PathBuf,
    },
    /// The manifest could not be written.
    #[error(transparent)]
    Write(#[from] StagingError),
}

/// Gives the full snapshot at `path`, as a VMM wrote it, a manifest, and returns what names it from now on.
///
/// A snapshot that has one keeps it. Memory that is in no snapshot, because it is in files of its own, is in no manifest.
///
/// # Errors
/// The snapshot is as it was.
pub fn seal(path: &Path, limits: &Limits) -> Result<Digest, SealError> {
    seal_opened(&SnapshotDir::open(path, limits)?)
}

/// Gives a snapshot a manifest of what it was when it was opened: should a text change since, it no longer fits.
pub(crate) fn seal_opened(dir: &SnapshotDir) -> Result<Digest, SealError> {
    let path = dir.path();
    if let Some(digest) = dir.digest() {
        clear_added(path, MANIFEST_FILE);
        return Ok(digest);
    }
    let page = dir.placement().page(Granule::host_page());
    let page = page.map_err(|source| SealError::Pages { path: path.to_owned(), source })?;
    let blocks = hash(dir, page).map_err(|source| SealError::Read { path: path.to_owned(), source })?;
    // The file, and not the configuration in it: somebody may have edited it, and left blanks around it.
    let config = dir.config_file();
    let manifest = Manifest { config, ..Manifest::of_full(page, dir.config(), dir.state(), blocks) };
    write(path, &manifest)
}

fn hash(dir: &SnapshotDir, page: Granule) -> io::Result<BlockTable> {
    let bytes = dir.placement().bytes();
    match dir.memory() {
        Ok(file) => hash_memory(file, bytes, page),
        Err(_) => {
            let block_bytes = block_bytes_for(bytes, LEAST_BLOCK_BYTES.max(page.bytes()));
            Ok(BlockTable { block_bytes, digests: Vec::new() })
        }
    }
}

/// Takes `config.json` of the snapshot at `path`, of either kind, as it stands into the manifest, and returns what names the
/// snapshot from now on.
///
/// The state has to be as the manifest says; of the memory the manifest says what it said. Differentials to the snapshot still
/// fit: it answers to its old name, too.
///
/// # Errors
/// The snapshot is as it was; but it has the new manifest after [`StagingError::Unsynced`].
pub fn reseal(path: &Path, limits: &Limits) -> Result<Digest, SealError> {
    let sealed = open_manifest(path, limits)?;
    let sealed = sealed.ok_or_else(|| SealError::NoManifest { path: path.to_owned() })?;
    let as_it_stands = Configuration::AsItStands;
    let config = match &sealed.changes {
        Some(_) => Differential::open_as(path, as_it_stands, limits)?.config_file(),
        None => SnapshotDir::open_as(path, as_it_stands, limits)?.config_file(),
    };
    let old = sealed.digest();
    if config == sealed.config {
        return Ok(old);
    }
    let mut aliases = sealed.aliases.clone();
    aliases.push(old);
    write(path, &Manifest { config, aliases, ..sealed })
}

fn write(path: &Path, manifest: &Manifest) -> Result<Digest, SealError> {
    let unwritten = |source: TryReserveError| StagingError::Write {
        name: MANIFEST_FILE,
        path: path.to_owned(),
        source: source.into(),
    };
    let (bytes, digest) = manifest.encode().map_err(unwritten)?;
    add_file(path, MANIFEST_FILE, &bytes)?;
    Ok(digest)
}
