// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The 16 bytes that requests and responses have in common.

/// Mirrors `struct { u16 code; u8 extra[6]; u64 length; }`, little-endian.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Header {
    pub(super) code: u16,
    pub(super) extra: [u8; 6],
    pub(super) length: u64,
}

impl Header {
    pub(super) const BYTES: usize = 16;

    pub(super) fn to_bytes(self) -> [u8; Self::BYTES] {
        let mut bytes = [0; Self::BYTES];
        bytes[..2].copy_from_slice(&self.code.to_le_bytes());
        bytes[2..8].copy_from_slice(&self.extra);
        bytes[8..].copy_from_slice(&self.length.to_le_bytes());
        bytes
    }

    pub(super) fn from_bytes(bytes: [u8; Self::BYTES]) -> Self {
        let [c0, c1, extra @ .., l0, l1, l2, l3, l4, l5, l6, l7] = bytes;
        Self {
            code: u16::from_le_bytes([c0, c1]),
            extra,
            length: u64::from_le_bytes([l0, l1, l2, l3, l4, l5, l6, l7]),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_field_has_its_place() {
        let header = Header { code: 0x0201, extra: [3, 4, 5, 6, 7, 8], length: 0x100f_0e0d_0c0b_0a09 };
        let bytes = [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16];
        assert_eq!(header.to_bytes(), bytes);
        assert_eq!(Header::from_bytes(bytes), header);
    }
}
