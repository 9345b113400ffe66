// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Turns a chain of snapshots into one full snapshot.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Instant;

use thiserror::Error;

use crate::layout::{Layout, LayoutError};
use crate::range::GpaRange;
use crate::snapshot::disk::files::{CHANGES_FILE, MEMORY_FILE};
use crate::snapshot::format::digest::Digest;
use crate::snapshot::format::limits::Limits;
use crate::snapshot::format::manifest::Manifest;
use crate::snapshot::format::placement::{Placement, PlacementError};
use crate::snapshot::ops::verify::CheckedBlocks;
use crate::snapshot::read::differential::{Chain, Differential};
use crate::snapshot::read::dir::OpenError;
use crate::snapshot::write::writer::{Announced, SnapshotWriter, WriteError};
use crate::units::Millis;

/// Why a chain was not turned into a full snapshot. Nothing lies under the new name.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum ApplyError {
    /// The memory is not laid out as this host needs it.
    #[error("Cannot lay out the memory of {path}", path = .path.display())]
    Layout {
        /// The snapshot on top.
        path: PathBuf,
        /// Why.
        source: LayoutError,
    },
    /// There is no memory to copy.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// The snapshot that the chain begins with has no manifest, so altered bytes would pass unseen.
    #[error("{path} has no manifest to check its memory against", path = .path.display())]
    NoManifest {
        /// The snapshot.
        path: PathBuf,
        /// Why [`seal`](crate::snapshot::seal()) gives it none, if that is so.
        source: Option<PlacementError>,
    },
    /// Pages could not be read or written.
    #[error("Cannot copy the pages of {path}", path = .path.display())]
    Copy {
        /// The snapshot they come from.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The new snapshot could not be made.
    #[error(transparent)]
    Write(#[from] WriteError),
}

/// Writes the snapshot that `chain` amounts to as a full one, the directory `target`.
///
/// Every block that is read is checked against its digest. The new snapshot also answers to all names of the snapshot on
/// top, so that the next differential of the chain fits it too. Returns what names the new snapshot.
///
/// # Errors
/// Nothing lies under the new name.
pub fn apply(chain: &Chain, target: &Path, limits: &Limits) -> Result<Digest, ApplyError> {
    let full = chain.full();
    let manifest = full
        .manifest()
        .ok_or_else(|| ApplyError::NoManifest { path: full.path().to_owned(), source: full.obstacle() })?;
    let top = chain.differentials().last().map_or(manifest, Differential::manifest);
    let memory = full.memory()?;
    let layout = Layout::new(chain.state().memory().ranges(), top.page)
        .map_err(|source| ApplyError::Layout { path: chain.path().to_owned(), source })?;
    let began = Instant::now();
    let writer = SnapshotWriter::create(target, Announced::all(layout), *limits)?;
    let copy = |path: &Path, source| ApplyError::Copy { path: path.to_owned(), source };
    copy_checked(&writer, memory, MEMORY_FILE, manifest, full.placement())
        .map_err(|source| copy(full.path(), source))?;
    log::info!("Copied {} after {}", full.path().display(), Millis(began.elapsed()));
    for differential in chain.differentials() {
        lay_over(&writer, differential).map_err(|source| copy(differential.path(), source))?;
        log::info!("Laid {} over it after {}", differential.path().display(), Millis(began.elapsed()));
    }
    let aliases = top.aliases.iter().copied().chain([top.digest()]).collect();
    Ok(writer.complete(chain.config(), chain.state().clone(), aliases)?)
}

/// Copies what the new snapshot keeps of a file that holds memory as `placement` says.
fn copy_checked(
    writer: &SnapshotWriter,
    file: &File,
    name: &'static str,
    manifest: &Manifest,
    placement: &Placement,
) -> io::Result<()> {
    let mut blocks = CheckedBlocks::new(file, name, manifest, placement);
    while let Some(block) = blocks.next_block()? {
        let Some(mut rest) = block.bytes else { continue };
        for range in placement.gpas(block.offset, block.length) {
            let (bytes, after) = rest.split_at(index(range.len()));
            write_kept(writer, range, bytes)?;
            rest = after;
        }
    }
    Ok(())
}

/// Writes the parts of `range`, whose bytes are `bytes`, that the new snapshot has.
fn write_kept(writer: &SnapshotWriter, range: GpaRange, bytes: &[u8]) -> io::Result<()> {
    for (_, part) in writer.layout().parts(range) {
        let from = index(part.start() - range.start());
        writer.fill(part, &mut &bytes[from..from + index(part.len())])?;
    }
    Ok(())
}

fn lay_over(writer: &SnapshotWriter, differential: &Differential) -> io::Result<()> {
    // Memory that was gone in between comes back as zeros, not as it was before.
    let memory = differential.state().memory();
    let gone = writer.layout().regions().iter().flat_map(|region| memory.missing(region.range()));
    for range in gone.chain(differential.zeroed()) {
        for (_, part) in writer.layout().parts(range) {
            writer.fill(part, &mut io::repeat(0))?;
        }
    }
    copy_checked(writer, differential.pages(), CHANGES_FILE, differential.manifest(), differential.changed())
}

fn index(number: u64) -> usize {
    usize::try_from(number).expect("a block fits memory")
}
