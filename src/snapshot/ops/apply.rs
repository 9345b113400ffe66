// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Turns a chain of snapshots into one full snapshot.

use std::io;
use std::path::Path;
use std::time::Instant;

use super::error::OperationError;
use crate::layout::Layout;
use crate::range::GpaRange;
use crate::snapshot::disk::ManifestUse;
use crate::snapshot::format::{Digest, Manifest, SnapshotLimits};
use crate::snapshot::read::{Differential, MemoryReader, SnapshotChain};
use crate::snapshot::reserve::index;
use crate::snapshot::write::{AnnouncedRam, SnapshotWriter};
use crate::units::Millis;

/// Writes the snapshot that `chain` amounts to as a full one, the directory `target`.
///
/// Every block that is read is checked against its digest. The new snapshot also answers to all names of the snapshot on
/// top, so that the next differential of the chain fits it too. Returns what names the new snapshot.
///
/// # Errors
/// Nothing lies under the new name.
pub fn apply(
    chain: &SnapshotChain,
    target: &Path,
    limits: &SnapshotLimits,
) -> Result<Digest, OperationError> {
    let full = chain.full();
    let manifest = full.stored().expect_manifest(ManifestUse::Copy)?;
    let top = chain.top().expect_manifest(ManifestUse::Copy)?;
    let memory = full.memory()?;
    let layout = Layout::new(chain.state().memory().ranges(), top.page)
        .map_err(|source| OperationError::Layout { path: chain.path().to_owned(), source })?;
    let began = Instant::now();
    let writer = SnapshotWriter::create(target, AnnouncedRam::all(layout), None, *limits)?;
    let copy = |path: &Path, source| OperationError::Copy { path: path.to_owned(), source };
    copy_checked(&writer, memory, manifest).map_err(|source| copy(full.path(), source))?;
    log::info!("Copied {} after {}", full.path().display(), Millis(began.elapsed()));
    for differential in chain.differentials() {
        lay_over(&writer, differential).map_err(|source| copy(differential.path(), source))?;
        log::info!("Laid {} over it after {}", differential.path().display(), Millis(began.elapsed()));
    }
    let aliases = top.aliases.iter().copied().chain([top.digest()]).collect();
    Ok(writer.complete(chain.config(), chain.state().clone(), aliases)?.digest)
}

/// Copies what the new snapshot keeps of a file of memory, of whose blocks `manifest` has the digests.
fn copy_checked(writer: &SnapshotWriter, memory: MemoryReader<'_>, manifest: &Manifest) -> io::Result<()> {
    let mut blocks = memory.blocks(manifest.blocks.block_bytes);
    while let Some(block) = blocks.next_block()? {
        let Some(mut rest) = block.bytes else { continue };
        for range in memory.placement.gpas(block.offset, block.length) {
            let (bytes, after) = rest.split_at(index(range.len()));
            write_kept(writer, range, bytes)?;
            rest = after;
        }
    }
    Ok(())
}

/// Writes those parts of `range`, whose bytes are `bytes`, that the new snapshot has.
fn write_kept(writer: &SnapshotWriter, range: GpaRange, bytes: &[u8]) -> io::Result<()> {
    for (_, part) in writer.layout().parts(range) {
        let from = index(part.start() - range.start());
        writer.fill(part, &mut &bytes[from..from + index(part.len())])?;
    }
    Ok(())
}

fn lay_over(writer: &SnapshotWriter, differential: &Differential) -> io::Result<()> {
    // Memory that was unplugged and plugged again in between is zeros, not what it was before.
    let memory = differential.state().memory();
    let gone = writer.layout().regions().iter().flat_map(|region| memory.missing(region.range()));
    for range in gone.chain(differential.zeroed()) {
        for (_, part) in writer.layout().parts(range) {
            writer.fill(part, &mut io::repeat(0))?;
        }
    }
    let memory = differential.stored().reader();
    memory.map_or(Ok(()), |memory| copy_checked(writer, memory, differential.manifest()))
}
