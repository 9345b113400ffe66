// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Turns a snapshot into a differential to another one: what [`apply`](crate::snapshot::apply()) undoes.

use std::io;
use std::path::Path;
use std::sync::Arc;

use super::error::{OperationError, lay_out};
use crate::granule::Granule;
use crate::range::{GpaRange, united};
use crate::snapshot::format::{Digest, SnapshotLimits};
use crate::snapshot::read::SnapshotChain;
use crate::snapshot::reserve::{index, resize};
use crate::snapshot::write::{AnnouncedRam, Base, SnapshotWriter};

/// Bytes copied at once.
const COPY_BYTES: u64 = 1 << 20;

/// Writes what `chain` amounts to as a differential to `base`, the directory `target`; returns what names it.
///
/// Every block that is read is checked against its digest; a `chain` of a full snapshot with no manifest is taken as it is.
///
/// # Errors
/// Nothing lies under the new name.
pub fn subtract(
    chain: &SnapshotChain,
    base: Arc<SnapshotChain>,
    target: &Path,
    limits: &SnapshotLimits,
) -> Result<Digest, OperationError> {
    for full in [chain.full(), base.full()] {
        full.memory()?;
    }
    let layout = lay_out(chain.path(), chain.state().memory())?;
    let page = layout.host_page();
    // Where both have nothing but holes, nothing differs.
    let populated = united([populated(chain, page)?, populated(&base, page)?].concat());
    let writer =
        SnapshotWriter::create(target, AnnouncedRam::all(layout), Some(Base::Compared(base)), *limits)?;
    let mut buffer = Vec::new();
    for range in populated {
        for (_, part) in writer.layout().parts(range) {
            for piece in part.pieces(COPY_BYTES) {
                copy(chain, &writer, piece, &mut buffer).map_err(|source| OperationError::CopyRange {
                    path: chain.path().to_owned(),
                    range: piece,
                    source,
                })?;
            }
        }
    }
    Ok(writer.complete(chain.config(), chain.state().clone(), Vec::new())?.digest)
}

/// Returns the whole pages of `chain` that may hold something.
fn populated(chain: &SnapshotChain, page: Granule) -> Result<Vec<GpaRange>, OperationError> {
    let ranges = chain
        .populated_as_written()
        .map_err(|source| OperationError::Find { path: chain.path().to_owned(), source })?;
    Ok(ranges.iter().filter_map(|range| range.align_outward(page.bytes())).collect())
}

fn copy(
    chain: &SnapshotChain,
    writer: &SnapshotWriter,
    piece: GpaRange,
    buffer: &mut Vec<u8>,
) -> io::Result<()> {
    resize(buffer, index(piece.len()))?;
    chain.read_checked(piece, buffer)?;
    writer.fill(piece, &mut buffer.as_slice())
}
