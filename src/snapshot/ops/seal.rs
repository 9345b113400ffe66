// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Gives a manifest to a snapshot that has none, and takes an edited configuration into one.

use std::collections::TryReserveError;
use std::path::Path;

use super::error::OperationError;
use crate::granule::Granule;
use crate::snapshot::disk::{ManifestUse, ReadError, WriteError, add_file, clear_added};
use crate::snapshot::format::{
    BlockTable, Digest, MANIFEST_FILE, Manifest, SnapshotLimits, block_bytes_of_full,
};
use crate::snapshot::read::{Configuration, FullSnapshot, Stored, open_manifest};

/// Gives the full snapshot at `path`, as a VMM wrote it, a manifest, and returns what names it from now on.
///
/// A snapshot that has a manifest keeps it. The manifest does not cover memory in files outside the snapshot.
///
/// # Errors
/// The snapshot is as it was.
pub fn seal(path: &Path, limits: &SnapshotLimits) -> Result<Digest, OperationError> {
    seal_opened(FullSnapshot::open(path, limits)?.stored())
}

/// Gives a snapshot a manifest of what it was when it was opened. If a text has changed since, the manifest does not match it.
pub(crate) fn seal_opened(full: &Stored) -> Result<Digest, OperationError> {
    let path = &full.path;
    if let Some(digest) = full.digest() {
        clear_added(path, MANIFEST_FILE);
        return Ok(digest);
    }
    let page = full.placement().page(Granule::host_page());
    let page = page.map_err(|source| OperationError::Seal { path: path.to_owned(), source })?;
    let no_memory = || {
        let block_bytes = block_bytes_of_full(full.placement().bytes(), page);
        Ok(BlockTable { block_bytes, digests: Vec::new() })
    };
    let blocks = full.reader().map_or_else(no_memory, |memory| memory.hash(page));
    let blocks = blocks.map_err(|source| OperationError::Hash { path: path.to_owned(), source })?;
    // The digest is that of the file, which may have blanks around the configuration.
    let config = full.config_file;
    let manifest = Manifest { config, ..Manifest::of_full(page, &full.config, &full.state, blocks) };
    write(path, &manifest)
}

/// Takes the present `config.json` of the snapshot at `path`, of either kind, into its manifest, and returns what names the snapshot
/// from now on.
///
/// The state has to match the manifest; the memory's digests stay as they were. Differentials to the snapshot still fit, because it
/// keeps its old name as an alias.
///
/// # Errors
/// The snapshot is as it was; but it has the new manifest after [`WriteError::Unsynced`].
pub fn reseal(path: &Path, limits: &SnapshotLimits) -> Result<Digest, OperationError> {
    let needed = ManifestUse::Reseal;
    let none = || ReadError::NoManifest { path: path.to_owned(), needed, source: None };
    let mut manifest = open_manifest(path, limits)?.ok_or_else(none)?;
    let stored = Stored::open(path, Some(manifest.clone()), Configuration::AsItStands, limits)?;
    let (old, config) = (manifest.digest(), stored.config_file);
    if config == manifest.config {
        return Ok(old);
    }
    manifest.config = config;
    manifest.aliases.push(old);
    write(path, &manifest)
}

fn write(path: &Path, manifest: &Manifest) -> Result<Digest, OperationError> {
    let unwritten = |source: TryReserveError| WriteError::File {
        name: MANIFEST_FILE,
        path: path.to_owned(),
        source: source.into(),
    };
    let (bytes, digest) = manifest.encode().map_err(unwritten)?;
    add_file(path, MANIFEST_FILE, &bytes)?;
    Ok(digest)
}
