// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Bytes per bit of a dirty bitmap.

use std::fmt;

use thiserror::Error;

use crate::units::Count;

/// A number of bytes that cannot be what one bit of a dirty bitmap stands for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[error("Granule of {} is not a power of two between 512 bytes and 1 TiB", Count(.bytes, "byte"))]
#[non_exhaustive]
pub struct GranuleError {
    /// What was asked for.
    pub bytes: u64,
}

/// Bytes that one bit of a dirty bitmap stands for: a power of two, 512 bytes to 1 TiB.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Granule {
    shift: u32,
}

impl Granule {
    /// What vhost logs and most DMA logs use, whatever the host's page size.
    pub const KIB_4: Self = Self { shift: 12 };

    const SHIFTS: std::ops::RangeInclusive<u32> = 9..=40;

    /// Makes a granule of `bytes`.
    ///
    /// # Errors
    /// `bytes` is not a power of two between 512 and 2^40.
    pub fn new(bytes: u64) -> Result<Self, GranuleError> {
        let shift = bytes.trailing_zeros();
        if bytes.is_power_of_two() && Self::SHIFTS.contains(&shift) {
            Ok(Self { shift })
        } else {
            Err(GranuleError { bytes })
        }
    }

    /// Returns the granule of this host's pages, which KVM and vm-memory log at.
    ///
    /// # Panics
    /// The system reports a page size that is no power of two, which no Linux does.
    pub fn host_page() -> Self {
        let bytes = crate::sys::host_page_bytes();
        Self::new(bytes).expect("Linux page sizes are powers of two")
    }

    /// Bytes per bit.
    pub const fn bytes(self) -> u64 {
        1 << self.shift
    }

    /// log2 of the bytes per bit.
    pub fn shift(self) -> u32 {
        self.shift
    }

    /// Bits that `bytes` bytes take, the last one perhaps only partly used.
    pub fn bits_for(self, bytes: u64) -> u64 {
        bytes.div_ceil(self.bytes())
    }

    /// Whether `address` is the first byte of a granule.
    pub fn is_aligned(self, address: u64) -> bool {
        address & (self.bytes() - 1) == 0
    }
}

impl fmt::Display for Granule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.shift {
            30.. => write!(f, "{} GiB", 1u64 << (self.shift - 30)),
            20.. => write!(f, "{} MiB", 1u64 << (self.shift - 20)),
            10.. => write!(f, "{} KiB", 1u64 << (self.shift - 10)),
            _ => write!(f, "{} B", self.bytes()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_powers_of_two_are_granules() {
        for bytes in [0, 1, 256, 4095, 12288, 1 << 41, u64::MAX] {
            assert_eq!(Granule::new(bytes), Err(GranuleError { bytes }));
        }
        assert_eq!(Granule::new(65536).map(Granule::shift), Ok(16));
    }

    #[test]
    fn bits_round_up() {
        assert_eq!(Granule::KIB_4.bits_for(0), 0);
        assert_eq!(Granule::KIB_4.bits_for(4096), 1);
        assert_eq!(Granule::KIB_4.bits_for(4097), 2);
    }

    #[test]
    fn names_are_short() {
        assert_eq!(Granule::KIB_4.to_string(), "4 KiB");
        assert_eq!(Granule::new(2 << 20).unwrap().to_string(), "2 MiB");
        assert_eq!(Granule::new(512).unwrap().to_string(), "512 B");
    }
}
