// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What the tables of all connections may take together.

use std::sync::atomic::{AtomicU64, Ordering};

use super::error::ReceiveError;

/// Bytes of a table's buffer that a connection keeps for the next one.
///
/// A table of single pages for as much memory as a source puts in one Memory is not larger.
const KEPT_BYTES: usize = 256 << 10;

/// Bytes that the tables under way announce, on all connections of a migration.
#[derive(Debug, Default)]
pub(super) struct Tables(AtomicU64);

impl Tables {
    /// Takes `bytes` of `limit` for a table, until what is returned is dropped.
    ///
    /// # Errors
    /// The tables under way leave less.
    pub(super) fn take(&self, bytes: u64, limit: u64) -> Result<Share<'_>, ReceiveError> {
        let with = |taken: u64| taken.checked_add(bytes).filter(|&taken| taken <= limit);
        match self.0.fetch_update(Ordering::Relaxed, Ordering::Relaxed, with) {
            Ok(_) => Ok(Share { tables: self, bytes }),
            Err(taken) => Err(ReceiveError::Tables { length: bytes, taken, limit }),
        }
    }
}

/// What one table may take.
#[derive(Debug)]
pub(super) struct Share<'a> {
    tables: &'a Tables,
    bytes: u64,
}

impl Drop for Share<'_> {
    fn drop(&mut self) {
        self.tables.0.fetch_sub(self.bytes, Ordering::Relaxed);
    }
}

/// Returns `buffer`, or a new one where it has become too large to keep.
pub(super) fn kept(buffer: Vec<u8>) -> Vec<u8> {
    if buffer.capacity() <= KEPT_BYTES { buffer } else { Vec::new() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tables_under_way_share_what_one_may_have() {
        let tables = Tables::default();
        let first = tables.take(600, 1000).unwrap();
        let second = tables.take(400, 1000).unwrap();
        let error = tables.take(1, 1000).unwrap_err();
        assert_eq!(
            error.to_string(),
            "Memory announces a table of 1 byte, and those under way take 1000 of the limit table_bytes = 1000"
        );
        drop(first);
        drop(tables.take(600, 1000).unwrap());
        assert!(tables.take(601, 1000).is_err());
        assert!(tables.take(u64::MAX, 1000).is_err());
        drop(second);
        drop(tables.take(1000, 1000).unwrap());
    }

    #[test]
    fn a_large_buffer_is_not_kept() {
        assert_eq!(kept(Vec::with_capacity(KEPT_BYTES)).capacity(), KEPT_BYTES);
        assert_eq!(kept(Vec::with_capacity(KEPT_BYTES + 1)).capacity(), 0);
    }
}
