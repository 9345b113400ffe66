// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A device's stream as it will be saved, made piece by piece while it is read.
//!
//! What comes while the device still runs is in base64 and summed up before the VM stands still.

use std::fmt;
use std::io::{self, Write};

use base64::engine::GeneralPurpose;
use base64::engine::general_purpose::STANDARD as BASE64;
use base64::write::EncoderStringWriter;
use versionize::crc::CRC64Writer;

/// What stands before the base64, in Cloud Hypervisor's shape.
const BEGIN: &str = "{\"blob\":\"";
/// What stands behind it.
const END: &str = "\"}";

/// A stream of which no end is known yet.
pub(super) struct Blob {
    text: EncoderStringWriter<'static, GeneralPurpose, String>,
    checksum: CRC64Writer<io::Sink>,
    bytes: usize,
}

impl Blob {
    /// Begins a stream.
    pub(super) fn new() -> Self {
        Self {
            text: EncoderStringWriter::from_consumer(BEGIN.to_owned(), &BASE64),
            checksum: CRC64Writer::new(io::sink()),
            bytes: 0,
        }
    }

    /// Makes the whole of a stream.
    pub(super) fn of(stream: &[u8]) -> Self {
        let mut blob = Self::new();
        blob.push(stream);
        blob
    }

    /// Takes the bytes that come next.
    pub(super) fn push(&mut self, bytes: &[u8]) {
        self.text.write_all(bytes).expect("a string takes everything");
        self.checksum.write_all(bytes).expect("a sink takes everything");
        self.bytes += bytes.len();
    }

    /// Bytes of the stream so far.
    pub(super) fn bytes(&self) -> usize {
        self.bytes
    }

    /// Checksum of the stream so far.
    pub(super) fn checksum(&self) -> u64 {
        self.checksum.checksum()
    }

    /// Ends the stream: the JSON text that holds it.
    pub(super) fn into_text(self) -> String {
        let mut text = self.text.into_inner();
        text.push_str(END);
        text
    }
}

impl fmt::Debug for Blob {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Blob").field("bytes", &self.bytes).finish_non_exhaustive()
    }
}

/// Returns what tells a stream from others of its length: CRC-64.
pub(super) fn checksum(stream: &[u8]) -> u64 {
    let mut writer = CRC64Writer::new(io::sink());
    writer.write_all(stream).expect("a sink takes everything");
    writer.checksum()
}

#[cfg(test)]
mod tests {
    use base64::Engine;
    use proptest::prelude::*;
    use serde_json::{Value, json};

    use super::*;

    proptest! {
        #[test]
        fn a_stream_in_pieces_is_the_stream(pieces in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..2000), 0..8)) {
            let mut blob = Blob::new();
            pieces.iter().for_each(|piece| blob.push(piece));
            let stream = pieces.concat();
            prop_assert_eq!((blob.bytes(), blob.checksum()), (stream.len(), checksum(&stream)));
            let text: Value = serde_json::from_str(&blob.into_text()).unwrap();
            prop_assert_eq!(text, json!({"blob": BASE64.encode(stream)}));
        }
    }
}
