// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Why something could not be done with a snapshot on disk.

use std::io;
use std::path::{Path, PathBuf};

use thiserror::Error;
use vm_memory::GuestRegionCollectionError;

use crate::granule::Granule;
use crate::layout::{Layout, LayoutError};
use crate::range::GpaRange;
use crate::snapshot::disk::{ReadError, WriteError};
use crate::snapshot::format::{Elsewhere, Placement, PlacementError};

/// Why a snapshot was not applied, subtracted, compared, sealed or sent.
///
/// Nothing was written, and nothing was changed, except after [`WriteError::Stands`] and [`WriteError::Unsynced`].
///
/// Where memory is read, the source of an error may be an [`Altered`](crate::snapshot::Altered), which lists the memory that does not
/// match its digest.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum OperationError {
    /// A snapshot cannot be read, or lacks what the operation needs of it.
    #[error(transparent)]
    Read(#[from] ReadError),
    /// The new snapshot, or the new manifest, could not be written.
    #[error(transparent)]
    Write(#[from] WriteError),
    /// The memory is not of whole pages.
    #[error("Cannot divide the memory of {path} into pages", path = .path.display())]
    Pages {
        /// The snapshot.
        path: PathBuf,
        /// Which part.
        source: PlacementError,
    },
    /// The memory is not of whole pages, so that it cannot have a manifest.
    #[error("Cannot seal the memory of {path}", path = .path.display())]
    Seal {
        /// The snapshot.
        path: PathBuf,
        /// Which part.
        source: PlacementError,
    },
    /// The memory cannot be laid out on this host.
    #[error("Cannot lay out the memory of {path}", path = .path.display())]
    Layout {
        /// The snapshot.
        path: PathBuf,
        /// Why.
        source: LayoutError,
    },
    /// The holes of a snapshot's memory cannot be found.
    #[error("Cannot find the memory of {path}", path = .path.display())]
    Find {
        /// The snapshot.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The memory could not be read to be hashed.
    #[error("Cannot read the memory of {path}", path = .path.display())]
    Hash {
        /// The snapshot.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The memory of two snapshots could not be compared.
    #[error("Cannot read memory {range}")]
    Compare {
        /// What was being read.
        range: GpaRange,
        /// Why.
        source: io::Error,
    },
    /// The pages of a snapshot could not be read or written.
    #[error("Cannot copy the pages of {path}", path = .path.display())]
    Copy {
        /// The snapshot they come from.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A range of pages could not be read or written.
    #[error("Cannot copy memory {range} of {path}", path = .path.display())]
    CopyRange {
        /// The snapshot it comes from.
        path: PathBuf,
        /// What was being copied.
        range: GpaRange,
        /// Why.
        source: io::Error,
    },
    /// Part of the memory is not in the snapshot: a receiver would run the VM without it.
    #[error("{path} lacks memory that the VM has: {elsewhere}", path = .path.display())]
    Elsewhere {
        /// The snapshot.
        path: PathBuf,
        /// Where the memory is.
        elsewhere: Elsewhere,
    },
    /// The file cannot be opened a second time.
    #[error("Cannot share {path}", path = .path.display())]
    Share {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The ranges do not make up a guest's memory.
    #[error("Cannot gather the memory of {path}", path = .path.display())]
    Gather {
        /// The snapshot.
        path: PathBuf,
        /// Why.
        source: GuestRegionCollectionError,
    },
    /// The memory of a snapshot that is being sent cannot be read, was cut off, or was altered.
    #[error("Cannot send {path}", path = .path.display())]
    Send {
        /// The snapshot.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

/// Lays out the memory of the snapshot at `path` in the largest pages that it and this host have.
pub(crate) fn lay_out(path: &Path, memory: &Placement) -> Result<Layout, OperationError> {
    let page = memory.page(Granule::host_page());
    let page = page.map_err(|source| OperationError::Pages { path: path.to_owned(), source })?;
    let layout = Layout::new(memory.ranges(), page);
    layout.map_err(|source| OperationError::Layout { path: path.to_owned(), source })
}
