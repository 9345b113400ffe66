// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Why Cloud Hypervisor's JSON cannot be read.

use thiserror::Error;

use crate::layout::LayoutError;
use crate::range::RangeError;
use crate::snapshot::format::placement::PlacementError;
use crate::units::Count;

/// Most devices of a kind, memory zones and RAM mappings that are read.
pub(crate) const ENTRIES: usize = 1 << 16;

/// Why a JSON document is not one that Cloud Hypervisor wrote.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum DocumentError {
    /// The text is no JSON, or lacks a field.
    #[error("Cannot read {document}, which another version may have written")]
    Json {
        /// `config.json`, `state.json` or `Config message`.
        document: &'static str,
        /// Where and why.
        source: serde_json::Error,
    },
    /// The document is no text at all.
    #[error("{document} is not in UTF-8")]
    Utf8 {
        /// The document.
        document: &'static str,
        /// Where.
        source: std::str::Utf8Error,
    },
    /// The document, or the state of a component in it, is larger than anything expected.
    #[error("{document} has {}, the limit is {limit}", Count(.bytes, "byte"))]
    TooLarge {
        /// The document.
        document: &'static str,
        /// Bytes it has.
        bytes: u64,
        /// The limit.
        limit: u64,
    },
    /// The state of a component is of another shape.
    #[error("Cannot read state of {component} in state.json, which another version may have written")]
    State {
        /// The component.
        component: &'static str,
        /// Where and why.
        source: serde_json::Error,
    },
    /// The state tree has no such component, or no state of it.
    #[error("state.json holds no state of {component}")]
    NoState {
        /// The component.
        component: &'static str,
    },
    /// The memory ranges are impossible.
    #[error("{document} lists impossible memory ranges")]
    Ranges {
        /// The document.
        document: &'static str,
        /// What is wrong with them.
        source: PlacementError,
    },
    /// There is more memory, or it is in more pieces, than is read.
    #[error("{document} lists more memory than is read")]
    OverLimit {
        /// The document.
        document: &'static str,
        /// The limit.
        source: PlacementError,
    },
    /// A RAM mapping that is no range.
    #[error("RAM mapping {index} of the Config message is no range")]
    Mapping {
        /// Position in `guest_ram_mappings`.
        index: usize,
        /// What is wrong with it.
        source: RangeError,
    },
    /// The RAM mappings are no layout.
    #[error("RAM mappings of the Config message are impossible")]
    Layout(#[from] LayoutError),
}

pub(crate) fn json(document: &'static str) -> impl FnOnce(serde_json::Error) -> DocumentError {
    move |source| DocumentError::Json { document, source }
}

pub(crate) fn ranges(document: &'static str) -> impl FnOnce(PlacementError) -> DocumentError {
    move |source| match source.is_limit() {
        true => DocumentError::OverLimit { document, source },
        false => DocumentError::Ranges { document, source },
    }
}

/// Checks that `document`, of `bytes` bytes, is not too large to look into.
pub(crate) fn within(document: &'static str, bytes: usize, limit: u64) -> Result<(), DocumentError> {
    let bytes = bytes as u64;
    if bytes <= limit { Ok(()) } else { Err(DocumentError::TooLarge { document, bytes, limit }) }
}
