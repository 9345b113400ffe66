// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Lists where two snapshots differ.

use serde::{Serialize, Serializer};

use super::error::OperationError;
use crate::granule::Granule;
use crate::range::{GpaRange, united};
use crate::snapshot::format::Placement;
use crate::snapshot::read::SnapshotChain;
use crate::snapshot::reserve::{index, resize};

/// Bytes compared at once.
const COMPARE_BYTES: u64 = 1 << 20;

/// Where two snapshots differ.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct Differences {
    /// Whether the texts of `config.json` differ.
    pub config: bool,
    /// Whether the texts of `state.json` differ.
    pub state: bool,
    /// Whole pages that both have and that differ; ascending.
    #[serde(serialize_with = "as_texts")]
    pub memory: Vec<GpaRange>,
    /// Memory that only the first has; ascending.
    #[serde(serialize_with = "as_texts")]
    pub only_in_first: Vec<GpaRange>,
    /// Memory that only the second has; ascending.
    #[serde(serialize_with = "as_texts")]
    pub only_in_second: Vec<GpaRange>,
}

impl Differences {
    /// Whether the snapshots are the same.
    pub fn is_empty(&self) -> bool {
        let ranges = [&self.memory, &self.only_in_first, &self.only_in_second];
        !self.config && !self.state && ranges.iter().all(|ranges| ranges.is_empty())
    }
}

fn as_texts<S: Serializer>(ranges: &[GpaRange], serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_seq(ranges.iter().map(ToString::to_string))
}

/// Compares two snapshots, byte by byte where either has anything but holes.
///
/// # Errors
/// Memory of one cannot be read.
pub fn compare(first: &SnapshotChain, second: &SnapshotChain) -> Result<Differences, OperationError> {
    let (in_first, in_second) = (first.state().memory(), second.state().memory());
    Ok(Differences {
        config: first.config().text() != second.config().text(),
        state: first.state().text() != second.state().text(),
        memory: differing_pages(first, second)?,
        only_in_first: without(in_first, in_second),
        only_in_second: without(in_second, in_first),
    })
}

fn without(memory: &Placement, other: &Placement) -> Vec<GpaRange> {
    memory.ascending().iter().flat_map(|extent| other.missing(extent.range)).collect()
}

fn differing_pages(first: &SnapshotChain, second: &SnapshotChain) -> Result<Vec<GpaRange>, OperationError> {
    let mut populated = Vec::new();
    for chain in [first, second] {
        let ranges = chain.populated().map_err(|source| {
            let range = chain.state().memory().ranges().next();
            OperationError::Compare { range: range.unwrap_or_else(nothing), source }
        })?;
        populated.extend(ranges);
    }
    let page = Granule::host_page();
    let populated = populated.iter().filter_map(|range| range.align_outward(page.bytes()));
    let mut differing = Vec::new();
    let mut buffers = (Vec::new(), Vec::new());
    for range in united(populated) {
        for in_first in first.state().memory().locate(range) {
            for in_both in second.state().memory().locate(in_first.range) {
                for piece in in_both.range.pieces(COMPARE_BYTES) {
                    compare_piece(first, second, piece, page, &mut buffers, &mut differing)?;
                }
            }
        }
    }
    Ok(united(differing))
}

fn compare_piece(
    first: &SnapshotChain,
    second: &SnapshotChain,
    piece: GpaRange,
    page: Granule,
    (left, right): &mut (Vec<u8>, Vec<u8>),
    differing: &mut Vec<GpaRange>,
) -> Result<(), OperationError> {
    for (chain, buffer) in [(first, &mut *left), (second, &mut *right)] {
        let read = resize(buffer, index(piece.len()));
        read.and_then(|()| chain.read(piece, buffer))
            .map_err(|source| OperationError::Compare { range: piece, source })?;
    }
    if left == right {
        return Ok(());
    }
    let page_bytes = index(page.bytes());
    let pages = left.chunks(page_bytes).zip(right.chunks(page_bytes)).zip(piece.pieces(page.bytes()));
    differing.extend(pages.filter(|((left, right), _)| left != right).map(|(_, page)| page));
    Ok(())
}

fn nothing() -> GpaRange {
    GpaRange::from_bounds(0, 1).expect("one byte is a range")
}
