// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The payload of State: measured first, then written as it is gone through, and never in memory as a whole.

use std::io::{self, Write};

use crate::vm::Captured;

/// A captured VM, of which it is known how long its JSON text is.
pub(super) struct StatePayload {
    captured: Captured,
    bytes: u64,
}

impl StatePayload {
    /// Measures what was captured.
    ///
    /// # Errors
    /// A tree has no JSON form.
    pub(super) fn new(captured: Captured) -> Result<Self, serde_json::Error> {
        let mut counted = Counted { to: io::sink(), bytes: 0 };
        match &captured {
            Captured::Tree(tree) => serde_json::to_writer(&mut counted, tree)?,
            Captured::Text(text) => counted.bytes = text.len() as u64,
        }
        Ok(Self { captured, bytes: counted.bytes })
    }

    /// Bytes of the JSON text.
    pub(super) fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Writes the JSON text, long strings of it in one piece and all else byte by byte.
    ///
    /// # Errors
    /// It cannot be written, or is not as long as it was before; part of it may be written.
    pub(super) fn write_to(&self, to: impl Write) -> io::Result<()> {
        let mut counted = Counted { to, bytes: 0 };
        match &self.captured {
            Captured::Tree(tree) => serde_json::to_writer(&mut counted, tree)?,
            Captured::Text(text) => counted.write_all(text.as_bytes())?,
        }
        if counted.bytes == self.bytes {
            Ok(())
        } else {
            Err(io::Error::other("State has another length each time it is written"))
        }
    }
}

/// Counts the bytes that go through.
struct Counted<W> {
    to: W,
    bytes: u64,
}

impl<W: Write> Write for Counted<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let written = self.to.write(bytes)?;
        self.bytes += written as u64;
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.to.flush()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use vm_migration::Snapshot;

    use super::*;

    #[test]
    fn a_tree_is_written_as_it_is_serialized_and_a_text_as_it_is() {
        let mut tree = Snapshot::new_from_state(&"\"quoted\"\n\u{1}é").unwrap();
        tree.add_snapshot("timer".to_owned(), Snapshot::default());
        let text = serde_json::to_string(&tree).unwrap();
        for captured in [Captured::Tree(tree), Captured::Text(Arc::new(text.clone()))] {
            let payload = StatePayload::new(captured).unwrap();
            let mut written = Vec::new();
            payload.write_to(&mut written).unwrap();
            assert_eq!(payload.bytes(), text.len() as u64);
            assert_eq!(written, text.as_bytes());
            assert_eq!(*payload.captured.into_text().unwrap(), text);
        }
    }
}
