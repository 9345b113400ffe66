// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Memory that was altered.

use std::io::{self, ErrorKind};
use std::path::PathBuf;

use crate::range::GpaRange;

/// Bytes of memory that do not match their digest.
///
/// [`io::Error`]s hold it where memory is read to be copied or compared.
#[derive(Debug, thiserror::Error)]
#[error("Memory at GPA {} in {file} was altered", listed(.ranges), file = .file.display())]
pub struct Altered {
    file: PathBuf,
    pub(crate) ranges: Vec<GpaRange>,
}

impl Altered {
    pub(crate) fn new(file: PathBuf, ranges: impl IntoIterator<Item = GpaRange>) -> Self {
        Self { file, ranges: ranges.into_iter().collect() }
    }

    /// Returns what `error` says was altered, if it is that.
    pub fn of(error: &io::Error) -> Option<&Self> {
        error.get_ref()?.downcast_ref()
    }
}

impl From<Altered> for io::Error {
    fn from(altered: Altered) -> Self {
        Self::new(ErrorKind::InvalidData, altered)
    }
}

fn listed(ranges: &[GpaRange]) -> String {
    ranges.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
}
