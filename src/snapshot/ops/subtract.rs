// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Turns a snapshot into a differential to another one: what [`apply`](crate::snapshot::apply()) undoes.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use thiserror::Error;

use crate::granule::Granule;
use crate::layout::{Layout, LayoutError};
use crate::range::GpaRange;
use crate::snapshot::format::digest::Digest;
use crate::snapshot::format::limits::Limits;
use crate::snapshot::format::placement::PlacementError;
use crate::snapshot::read::differential::{Chain, united};
use crate::snapshot::read::dir::OpenError;
use crate::snapshot::reserve::resize;
use crate::snapshot::write::differential_writer::{Base, DifferentialWriter};
use crate::snapshot::write::writer::{Announced, WriteError};

/// Bytes copied at once.
const COPY_BYTES: u64 = 1 << 20;

/// Why no differential was made. Nothing lies under the new name.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum SubtractError {
    /// The memory is not of whole pages.
    #[error("Cannot divide the memory of {path} into pages", path = .path.display())]
    Pages {
        /// The snapshot.
        path: PathBuf,
        /// Which part.
        source: PlacementError,
    },
    /// There is no memory, or it cannot be laid out.
    #[error("Cannot lay out the memory of {path}", path = .path.display())]
    Layout {
        /// The snapshot.
        path: PathBuf,
        /// Why.
        source: LayoutError,
    },
    /// There is no memory that could differ.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// It cannot be told where a snapshot has memory that is no hole.
    #[error("Cannot find the memory of {path}", path = .path.display())]
    Find {
        /// The snapshot.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Pages could not be read or written.
    #[error("Cannot copy memory {range} of {path}", path = .path.display())]
    Copy {
        /// The snapshot.
        path: PathBuf,
        /// What was being copied.
        range: GpaRange,
        /// Why.
        source: io::Error,
    },
    /// The new differential could not be made.
    #[error(transparent)]
    Write(#[from] WriteError),
}

/// Writes what `chain` amounts to as a differential to `base`, the directory `target`; returns what names it.
///
/// Every block that is read is checked against its digest; a `chain` of a full snapshot with no manifest is taken as it is.
///
/// # Errors
/// Nothing lies under the new name.
pub fn subtract(
    chain: &Chain,
    base: Arc<Chain>,
    target: &Path,
    limits: &Limits,
) -> Result<Digest, SubtractError> {
    for full in [chain.full(), base.full()] {
        full.memory()?;
    }
    let page = chain.state().memory().page(Granule::host_page());
    let page = page.map_err(|source| SubtractError::Pages { path: chain.path().to_owned(), source })?;
    let layout = Layout::new(chain.state().memory().ranges(), page)
        .map_err(|source| SubtractError::Layout { path: chain.path().to_owned(), source })?;
    // Where both have nothing but holes, nothing differs.
    let populated = united([populated(chain, page)?, populated(&base, page)?].concat());
    let writer = DifferentialWriter::create(target, Announced::all(layout), Base::Compared(base), *limits)?;
    let mut buffer = Vec::new();
    for range in populated {
        for (_, part) in writer.layout().parts(range) {
            for piece in part.pieces(COPY_BYTES) {
                copy(chain, &writer, piece, &mut buffer).map_err(|source| SubtractError::Copy {
                    path: chain.path().to_owned(),
                    range: piece,
                    source,
                })?;
            }
        }
    }
    Ok(writer.complete(chain.config(), chain.state().clone())?)
}

/// Returns the whole pages of `chain` that may hold something.
fn populated(chain: &Chain, page: Granule) -> Result<Vec<GpaRange>, SubtractError> {
    let ranges = chain
        .populated_as_written()
        .map_err(|source| SubtractError::Find { path: chain.path().to_owned(), source })?;
    Ok(ranges.iter().filter_map(|range| range.align_outward(page.bytes())).collect())
}

fn copy(chain: &Chain, writer: &DifferentialWriter, piece: GpaRange, buffer: &mut Vec<u8>) -> io::Result<()> {
    resize(buffer, usize::try_from(piece.len()).unwrap_or(usize::MAX))?;
    chain.read_checked(piece, buffer)?;
    writer.fill(piece, &mut buffer.as_slice())
}
