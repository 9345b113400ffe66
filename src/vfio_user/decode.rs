// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What can be wrong with the bytes of a message.

use crate::units::Count;

/// Describes bytes that are not the message they should be.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DecodeError {
    /// The message ends before its fixed part or its announced data does.
    #[error("{what} needs {}, and has {have}", Count(.needed, "byte"))]
    TooShort {
        /// The structure that was being read.
        what: &'static str,
        /// Bytes it needs.
        needed: usize,
        /// Bytes there were.
        have: usize,
    },
    /// A number in the message is larger than this side accepts.
    #[error("{what} is {value}, the limit is {limit}")]
    OverLimit {
        /// The field.
        what: &'static str,
        /// Its value.
        value: u64,
        /// The limit it exceeds.
        limit: u64,
    },
    /// A field does not hold the one value it may have here.
    #[error("{what} is {value:#x} where {expected:#x} is due")]
    Unexpected {
        /// The field.
        what: &'static str,
        /// Its value.
        value: u64,
        /// The value it should have.
        expected: u64,
    },
    /// A field holds a value that means nothing.
    #[error("{what} {value:#x} is not valid")]
    Invalid {
        /// The field.
        what: &'static str,
        /// Its value.
        value: u64,
    },
    /// The version data is not a JSON object of capabilities.
    #[error("Version data is not a JSON object of capabilities")]
    Capabilities(#[source] serde_json::Error),
}
