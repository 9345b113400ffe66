// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! One digest for each block of a file.

use super::digest::Digest;
use crate::granule::Granule;

/// The most blocks a file is cut into: beyond that, blocks grow.
pub(crate) const MAX_BLOCKS: u64 = 1 << 20;
/// The largest block.
const MAX_BLOCK_BYTES: u64 = 1 << 30;

/// The smallest block of a full snapshot that gets a digest: as little as is hashed at full speed.
pub(crate) const LEAST_BLOCK_BYTES: u64 = 16 << 10;

const ZERO_BYTES: usize = 1 << 16;
static ZEROS: [u8; ZERO_BYTES] = [0; ZERO_BYTES];

/// Whether every byte is zero.
pub(crate) fn is_zero(bytes: &[u8]) -> bool {
    bytes.chunks(ZERO_BYTES).all(|chunk| chunk == &ZEROS[..chunk.len()])
}

/// Returns the bytes per block of a full snapshot with `bytes` bytes of memory in pages of `page`.
pub(crate) fn block_bytes_of_full(bytes: u64, page: Granule) -> u64 {
    block_bytes_for(bytes, LEAST_BLOCK_BYTES.max(page.bytes()))
}

/// Returns the bytes per block of a file of `bytes` bytes: the smallest doubling of `least_bytes` that makes at most
/// [`MAX_BLOCKS`] blocks, or [`MAX_BLOCK_BYTES`].
pub(crate) fn block_bytes_for(bytes: u64, least_bytes: u64) -> u64 {
    let mut block_bytes = least_bytes;
    while bytes.div_ceil(block_bytes) > MAX_BLOCKS && block_bytes < MAX_BLOCK_BYTES {
        block_bytes *= 2;
    }
    block_bytes
}

/// The digests of a file's blocks; `None` for a block of zeros.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct BlockTable {
    pub(crate) block_bytes: u64,
    pub(crate) digests: Vec<Option<Digest>>,
}

impl BlockTable {
    /// The entry for a block that holds `bytes`.
    pub(crate) fn entry(bytes: &[u8]) -> Option<Digest> {
        if is_zero(bytes) { None } else { Some(Digest::of(bytes)) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_grow_with_the_file_and_stay_countable() {
        assert_eq!(block_bytes_for(0, 16384), 16384);
        assert_eq!(block_bytes_for(16 << 30, 16384), 16384);
        assert_eq!(block_bytes_for((16 << 30) + 1, 16384), 32768);
        assert_eq!(block_bytes_for(4 << 40, 16384), 4 << 20);
    }

    #[test]
    fn zero_is_told_at_every_length() {
        for length in [0, 1, 7, ZERO_BYTES - 1, ZERO_BYTES, ZERO_BYTES + 1] {
            let mut bytes = vec![0; length];
            assert!(is_zero(&bytes));
            if let Some(last) = bytes.last_mut() {
                *last = 1;
                assert!(!is_zero(&bytes), "{length}");
            }
        }
    }
}
