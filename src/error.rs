// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Errors as text.

use std::error::Error;
use std::fmt;

/// An error and all its sources on one line, causes last: what a log or a terminal shows of it.
///
/// ```
/// # use vfio_migration::error::Chain;
/// let cause = std::io::Error::from_raw_os_error(2);
/// assert_eq!(Chain(&cause).to_string(), "No such file or directory (os error 2)");
/// ```
#[derive(Debug)]
pub struct Chain<'a>(
    /// The error.
    pub &'a dyn Error,
);

impl fmt::Display for Chain<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)?;
        match self.0.source() {
            Some(source) => write!(f, ": {}", Chain(source)),
            None => Ok(()),
        }
    }
}
