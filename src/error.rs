// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Errors as text.

use std::error::Error;
use std::fmt;

/// An error and all its sources on one line, causes last.
pub(crate) struct Chain<'a>(pub(crate) &'a dyn Error);

impl fmt::Display for Chain<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)?;
        match self.0.source() {
            Some(source) => write!(f, ": {}", Chain(source)),
            None => Ok(()),
        }
    }
}
