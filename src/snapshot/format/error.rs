// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Why bytes are not what a file of a snapshot holds.

use std::collections::TryReserveError;
use std::str::Utf8Error;

use thiserror::Error;

use super::placement::PlacementError;
use crate::granule::GranuleError;
use crate::layout::LayoutError;
use crate::range::{GpaRange, RangeError};
use crate::units::Count;

/// The version of a manifest that is written, and the only one read.
pub(crate) const VERSION: u16 = 1;

/// What errors call the manifest.
pub(crate) const MANIFEST: &str = "Manifest";

/// Most devices of a kind, memory zones and RAM mappings that are read.
pub(crate) const ENTRIES: usize = 1 << 16;

/// Why bytes are not a manifest, or a JSON document is not one that Cloud Hypervisor wrote.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum FormatError {
    /// The manifest is cut off, or something follows its end.
    #[error("Manifest has {}, which is not what its header says", Count(.bytes, "byte"))]
    Length {
        /// Bytes there are.
        bytes: usize,
    },
    /// The manifest is some other file.
    #[error("Manifest does not begin with the magic bytes of one")]
    Magic,
    /// A later or unknown version wrote the manifest.
    #[error("Manifest is of version {version}, only version {VERSION} is known")]
    Version {
        /// What the header says.
        version: u16,
    },
    /// A byte of the manifest was altered.
    #[error("Manifest does not match its checksum")]
    Checksum,
    /// A field of the manifest's header holds what no writer writes.
    #[error("Manifest field {field} holds {value:#x}")]
    Field {
        /// The field.
        field: &'static str,
        /// What it holds.
        value: u64,
    },
    /// The manifest's page size is not a page size.
    #[error("Manifest has a page size that is none")]
    Page(#[from] GranuleError),
    /// The manifest lists a run that is not whole pages of the memory, or out of order.
    #[error("Manifest lists run {run}, which is out of order or not of whole pages of the memory")]
    Run {
        /// The run.
        run: GpaRange,
    },
    /// This host has no memory for the digests: nothing is wrong with the manifest.
    #[error("Manifest has more digests than there is memory for")]
    Memory(#[from] TryReserveError),
    /// The memory ranges, or the runs of a differential, are impossible.
    #[error("{document} lists impossible {what}")]
    Ranges {
        /// The document.
        document: &'static str,
        /// `memory ranges`, `runs` or `zero runs`.
        what: &'static str,
        /// What is wrong with them.
        source: PlacementError,
    },
    /// There is more memory, or it is in more pieces, than the limits allow.
    #[error("{document} lists more {what} than {} read", if *.what == "memory" { "is" } else { "are" })]
    OverLimit {
        /// The document.
        document: &'static str,
        /// `memory`, `memory ranges`, `runs` or `zero runs`.
        what: &'static str,
        /// The limit.
        source: PlacementError,
    },
    /// The text is not JSON, or lacks a field.
    #[error("Cannot read {document}, which another version may have written")]
    Json {
        /// `config.json`, `state.json` or `Config message`.
        document: &'static str,
        /// Where and why.
        source: serde_json::Error,
    },
    /// The document is not a text at all.
    #[error("{document} is not in UTF-8")]
    Utf8 {
        /// The document.
        document: &'static str,
        /// Where.
        source: Utf8Error,
    },
    /// The document, or the state of a component in it, is larger than the limits allow.
    #[error("{document} has {}, the limit is {limit}", Count(.bytes, "byte"))]
    TooLarge {
        /// The document.
        document: &'static str,
        /// Bytes it has.
        bytes: u64,
        /// The limit.
        limit: u64,
    },
    /// The state of a component has another shape.
    #[error("Cannot read state of {component} in state.json, which another version may have written")]
    State {
        /// The component.
        component: &'static str,
        /// Where and why.
        source: serde_json::Error,
    },
    /// The state tree lacks the component, or the component has no state.
    #[error("state.json holds no state of {component}")]
    NoState {
        /// The component.
        component: &'static str,
    },
    /// A RAM mapping that is not a range.
    #[error("RAM mapping {index} of the Config message is not a valid range")]
    Mapping {
        /// Position in `guest_ram_mappings`.
        index: usize,
        /// What is wrong with it.
        source: RangeError,
    },
    /// The RAM mappings are not a layout.
    #[error("RAM mappings of the Config message are impossible")]
    Layout(#[from] LayoutError),
}

pub(crate) fn json(document: &'static str) -> impl FnOnce(serde_json::Error) -> FormatError {
    move |source| FormatError::Json { document, source }
}

/// Says which list of `document` is not a placement, or only exceeds the limits.
pub(crate) fn lists(
    document: &'static str,
    what: &'static str,
) -> impl FnOnce(PlacementError) -> FormatError {
    move |source| match source.is_limit() {
        true => FormatError::OverLimit { document, what, source },
        false => FormatError::Ranges { document, what, source },
    }
}

/// As [`lists`], of all memory.
pub(crate) fn ranges(document: &'static str) -> impl FnOnce(PlacementError) -> FormatError {
    move |source| lists(document, if source.is_limit() { "memory" } else { "memory ranges" })(source)
}

/// Checks that `document`, of `bytes` bytes, is within `limit` before it is looked into.
pub(crate) fn within(document: &'static str, bytes: usize, limit: u64) -> Result<(), FormatError> {
    let bytes = bytes as u64;
    if bytes <= limit { Ok(()) } else { Err(FormatError::TooLarge { document, bytes, limit }) }
}
