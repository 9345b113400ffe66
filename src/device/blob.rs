// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A device's stream as it will be saved, made piece by piece while it is read.
//!
//! What comes while the device still runs is in base64 and summed up before the VM stands still.

use std::fmt;
use std::io::{self, Write};

use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use versionize::crc::CRC64Writer;

/// What stands before the base64, in Cloud Hypervisor's shape.
const BEGIN: &str = "{\"blob\":\"";
/// What stands behind it.
const END: &str = "\"}";

/// The least by which the text grows. It grows by an eighth of itself, so that little of what it takes is empty.
const LEAST_STEP_BYTES: usize = 64 << 10;

/// A stream of which no end is known yet.
pub(super) struct Blob {
    text: String,
    /// Bytes at the end that do not make four characters yet, and how many: 0 to 2.
    rest: ([u8; 3], usize),
    checksum: Checksum,
    bytes: usize,
}

impl Blob {
    /// Begins a stream.
    pub(super) fn new() -> Self {
        Self { text: BEGIN.to_owned(), rest: ([0; 3], 0), checksum: Checksum::new(), bytes: 0 }
    }

    /// Makes the whole of a stream.
    pub(super) fn of(stream: &[u8]) -> Self {
        let mut blob = Self::new();
        blob.push(stream);
        blob
    }

    /// Takes the bytes that come next.
    pub(super) fn push(&mut self, bytes: &[u8]) {
        self.checksum.push(bytes);
        self.bytes += bytes.len();
        self.make_room(bytes.len());
        let (group, filled) = &mut self.rest;
        let (first, bytes) = bytes.split_at(bytes.len().min((3 - *filled) % 3));
        group[*filled..*filled + first.len()].copy_from_slice(first);
        *filled += first.len();
        if *filled == 3 {
            BASE64.encode_string(*group, &mut self.text);
            *filled = 0;
        }
        let (whole, rest) = bytes.split_at(bytes.len() / 3 * 3);
        BASE64.encode_string(whole, &mut self.text);
        if !rest.is_empty() {
            group[..rest.len()].copy_from_slice(rest);
            *filled = rest.len();
        }
    }

    fn make_room(&mut self, bytes: usize) {
        let needed = bytes.div_ceil(3) * 4 + END.len() + 4;
        if self.text.capacity() - self.text.len() < needed {
            self.text.reserve_exact(needed.max(self.text.len() / 8).max(LEAST_STEP_BYTES));
        }
    }

    /// Bytes of the stream so far.
    pub(super) fn bytes(&self) -> usize {
        self.bytes
    }

    /// Checksum of the stream so far.
    pub(super) fn checksum(&self) -> u64 {
        self.checksum.value()
    }

    /// Ends the stream: the JSON text that holds it.
    pub(super) fn into_text(self) -> String {
        let (mut text, (group, filled)) = (self.text, self.rest);
        BASE64.encode_string(&group[..filled], &mut text);
        text.push_str(END);
        text
    }
}

/// What tells a stream from others of its length: CRC-64.
pub(super) struct Checksum(CRC64Writer<io::Sink>);

impl Checksum {
    /// The checksum of nothing.
    pub(super) fn new() -> Self {
        Self(CRC64Writer::new(io::sink()))
    }

    /// Takes the bytes that come next.
    pub(super) fn push(&mut self, bytes: &[u8]) {
        self.0.write_all(bytes).expect("a sink takes everything");
    }

    /// The checksum of all bytes so far.
    pub(super) fn value(&self) -> u64 {
        self.0.checksum()
    }
}

impl fmt::Debug for Blob {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Blob").field("bytes", &self.bytes).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::{Value, json};

    use super::*;

    proptest! {
        #[test]
        fn a_stream_in_pieces_is_the_stream(pieces in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..2000), 0..8)) {
            let mut blob = Blob::new();
            pieces.iter().for_each(|piece| blob.push(piece));
            let stream = pieces.concat();
            let mut checksum = Checksum::new();
            checksum.push(&stream);
            prop_assert_eq!((blob.bytes(), blob.checksum()), (stream.len(), checksum.value()));
            let text: Value = serde_json::from_str(&blob.into_text()).unwrap();
            prop_assert_eq!(text, json!({"blob": BASE64.encode(stream)}));
        }
    }
}
