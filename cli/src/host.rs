// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What this host refuses the tool itself, as opposed to what the library asks of it.

use std::io;
use std::path::PathBuf;

use thiserror::Error;

/// Why a command cannot even begin.
#[derive(Debug, Error)]
#[non_exhaustive]
pub(crate) enum HostError {
    /// The system gives no more threads.
    #[error("Cannot start the thread that {purpose}")]
    Thread {
        /// What it is for.
        purpose: &'static str,
        /// Why.
        source: io::Error,
    },
    /// Signals cannot be heeded.
    #[error("Cannot heed signals")]
    Signals(#[source] io::Error),
    /// A relative path leads nowhere: the current directory is gone.
    #[error("Cannot tell where {path} is", path = .path.display())]
    Path {
        /// The path.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}
