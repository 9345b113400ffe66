// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The DEVICE_FEATURE payloads: migration support, device state and DMA logging.
//!
//! They mirror the structures of `linux/vfio.h`, except that what the kernel passes by pointer (the ranges to log, the
//! bitmap) follows inline.

use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::decode::DecodeError;
use super::message::{MAX_BITMAP_BYTES, MAX_REQUEST_DATA_BYTES, split};

/// `VFIO_DEVICE_FEATURE_GET`: the request asks for the feature's data.
pub const FEATURE_GET: u32 = 1 << 16;
/// `VFIO_DEVICE_FEATURE_SET`: the request carries the feature's data.
pub const FEATURE_SET: u32 = 1 << 17;
/// `VFIO_DEVICE_FEATURE_PROBE`: the request asks whether the methods beside it are supported.
pub const FEATURE_PROBE: u32 = 1 << 18;

/// `VFIO_MIGRATION_STOP_COPY`: the device can be stopped and its state read.
pub const MIGRATION_STOP_COPY: u64 = 1 << 0;
/// `VFIO_MIGRATION_P2P`: the device can be made quiescent towards its peers.
pub const MIGRATION_P2P: u64 = 1 << 1;
/// `VFIO_MIGRATION_PRE_COPY`: the state can be read while the device runs.
pub const MIGRATION_PRE_COPY: u64 = 1 << 2;

/// Most ranges one DMA_LOGGING_START may name: as many as [`MAX_REQUEST_DATA_BYTES`] hold.
pub const MAX_LOGGING_RANGES: u32 = 2048;

const _: () = assert!(MAX_LOGGING_RANGES as usize * size_of::<LoggingRange>() <= MAX_REQUEST_DATA_BYTES);

const FEATURE_MASK: u32 = 0xffff;

/// Names the features this library uses.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u16)]
pub enum Feature {
    /// `VFIO_DEVICE_FEATURE_MIGRATION`: what of the migration protocol is supported.
    Migration = 1,
    /// `VFIO_DEVICE_FEATURE_MIG_DEVICE_STATE`: the device's migration state.
    MigDeviceState = 2,
    /// `VFIO_DEVICE_FEATURE_DMA_LOGGING_START`: begins to log DMA writes.
    DmaLoggingStart = 6,
    /// `VFIO_DEVICE_FEATURE_DMA_LOGGING_STOP`: ends it and drops the log.
    DmaLoggingStop = 7,
    /// `VFIO_DEVICE_FEATURE_DMA_LOGGING_REPORT`: reads and clears a part of the log.
    DmaLoggingReport = 8,
}

impl Feature {
    /// Returns the feature named in the flags of a request, or `None` for one this library does not know.
    pub fn from_flags(flags: u32) -> Option<Self> {
        use Feature::*;
        [Migration, MigDeviceState, DmaLoggingStart, DmaLoggingStop, DmaLoggingReport]
            .into_iter()
            .find(|feature| *feature as u32 == flags & FEATURE_MASK)
    }
}

/// Is the fixed part of every DEVICE_FEATURE payload: `struct vfio_device_feature`.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, Default, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned,
)]
#[repr(C)]
pub struct FeatureHeader {
    /// Largest payload of the reply; in a reply, the size it needs.
    pub argsz: U32,
    /// The feature and any of [`FEATURE_GET`], [`FEATURE_SET`], [`FEATURE_PROBE`].
    pub flags: U32,
}

impl FeatureHeader {
    /// Returns the header of a request for `feature`.
    pub fn new(feature: Feature, methods: u32, argsz: u32) -> Self {
        FeatureHeader { argsz: argsz.into(), flags: (feature as u32 | methods).into() }
    }

    /// Decodes a request or a reply and returns the feature's data.
    pub fn decode(payload: &[u8]) -> Result<(Self, &[u8]), DecodeError> {
        split("device feature", payload).map(|(header, rest)| (*header, rest))
    }
}

/// Is the data of MIGRATION: `struct vfio_device_feature_migration`.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, Default, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned,
)]
#[repr(C)]
pub struct MigrationFeature {
    /// [`MIGRATION_STOP_COPY`], [`MIGRATION_P2P`] and [`MIGRATION_PRE_COPY`].
    pub flags: U64,
}

impl MigrationFeature {
    /// Decodes the data of a reply.
    pub fn decode(data: &[u8]) -> Result<Self, DecodeError> {
        split("migration support", data).map(|(migration, _)| *migration)
    }
}

/// Is the data of MIG_DEVICE_STATE: `struct vfio_device_feature_mig_state`.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, Default, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned,
)]
#[repr(C)]
pub struct MigState {
    /// A `VFIO_DEVICE_STATE_*` value.
    pub device_state: U32,
    /// Unused: the data moves over the socket.
    pub data_fd: U32,
}

impl MigState {
    /// Decodes the data of a request or a reply.
    pub fn decode(data: &[u8]) -> Result<Self, DecodeError> {
        split("device state", data).map(|(state, _)| *state)
    }
}

/// Is the fixed part of DMA_LOGGING_START's data: `struct vfio_device_feature_dma_logging_control`.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, Default, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned,
)]
#[repr(C)]
pub struct LoggingControl {
    /// The granule wished for; in a reply, the one chosen. In bytes.
    pub page_size: U64,
    /// How many ranges follow; zero logs everything.
    pub num_ranges: U32,
    /// Zero.
    pub reserved: U32,
}

/// Is one range of DMA_LOGGING_START: `struct vfio_device_feature_dma_logging_range`.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, Default, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned,
)]
#[repr(C)]
pub struct LoggingRange {
    /// First IOVA to log.
    pub iova: U64,
    /// Bytes to log.
    pub length: U64,
}

impl LoggingControl {
    /// Decodes the data of a request or a reply with its ranges.
    ///
    /// # Errors
    ///
    /// More than [`MAX_LOGGING_RANGES`] are announced, or fewer are there than announced.
    pub fn decode(data: &[u8]) -> Result<(Self, &[LoggingRange]), DecodeError> {
        let (control, rest) = split::<Self>("DMA logging control", data)?;
        let num_ranges = control.num_ranges.get();
        if num_ranges > MAX_LOGGING_RANGES {
            let (value, limit) = (num_ranges.into(), MAX_LOGGING_RANGES.into());
            return Err(DecodeError::OverLimit { what: "number of DMA logging ranges", value, limit });
        }
        let count = num_ranges as usize;
        let (ranges, _) = <[LoggingRange]>::ref_from_prefix_with_elems(rest, count).map_err(|_| {
            let needed = count * size_of::<LoggingRange>();
            DecodeError::TooShort { what: "DMA logging ranges", needed, have: rest.len() }
        })?;
        Ok((*control, ranges))
    }
}

/// Is the fixed part of DMA_LOGGING_REPORT's data: `struct vfio_device_feature_dma_logging_report`.
///
/// In a reply the bitmap follows: `u64` words, bit `n` for the page at `iova + n * page_size`.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, Default, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned,
)]
#[repr(C)]
pub struct LoggingReport {
    /// First IOVA to report.
    pub iova: U64,
    /// Bytes to report.
    pub length: U64,
    /// Bytes for each bit of the bitmap.
    pub page_size: U64,
}

impl LoggingReport {
    /// Decodes the data of a request, which carries no bitmap.
    pub fn decode(data: &[u8]) -> Result<Self, DecodeError> {
        split("DMA log report", data).map(|(report, _)| *report)
    }

    /// Decodes the data of a reply and returns the bitmap's bytes.
    ///
    /// # Errors
    ///
    /// The bitmap is shorter than the range needs.
    pub fn decode_with_bitmap(data: &[u8]) -> Result<(Self, &[u8]), DecodeError> {
        let (report, rest) = split::<Self>("DMA log report", data)?;
        let needed = report.bitmap_bytes()?;
        let bitmap = rest.get(..needed).ok_or(DecodeError::TooShort {
            what: "DMA log bitmap",
            needed,
            have: rest.len(),
        })?;
        Ok((*report, bitmap))
    }

    /// Returns how many pages the range has.
    ///
    /// # Errors
    ///
    /// The page size is no power of two, or the range is empty or not made of whole pages.
    pub fn pages(&self) -> Result<u64, DecodeError> {
        let (length, page_size) = (self.length.get(), self.page_size.get());
        if !page_size.is_power_of_two() {
            return Err(DecodeError::Invalid { what: "DMA log page size", value: page_size });
        }
        if length == 0 || !length.is_multiple_of(page_size) {
            return Err(DecodeError::Invalid { what: "DMA log range length", value: length });
        }
        Ok(length / page_size)
    }

    /// Returns the size of the range's bitmap, in bytes: whole words.
    ///
    /// # Errors
    ///
    /// Those of [`LoggingReport::pages`], or the bitmap would exceed [`MAX_BITMAP_BYTES`].
    pub fn bitmap_bytes(&self) -> Result<usize, DecodeError> {
        let bytes = self.pages()?.div_ceil(64) * size_of::<u64>() as u64;
        match usize::try_from(bytes) {
            Ok(size) if bytes <= MAX_BITMAP_BYTES => Ok(size),
            _ => Err(DecodeError::OverLimit {
                what: "DMA log bitmap size",
                value: bytes,
                limit: MAX_BITMAP_BYTES,
            }),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn state_request_has_the_specified_bytes() {
        let golden = [16, 0, 0, 0, 2, 0, 2, 0, 3, 0, 0, 0, 0, 0, 0, 0];
        let header = FeatureHeader::new(Feature::MigDeviceState, FEATURE_SET, 16);
        let state = MigState { device_state: 3.into(), data_fd: 0.into() };
        assert_eq!([header.as_bytes(), state.as_bytes()].concat(), golden);
        let (decoded, data) = FeatureHeader::decode(&golden).unwrap();
        assert_eq!(decoded, header);
        assert_eq!(Feature::from_flags(decoded.flags.get()), Some(Feature::MigDeviceState));
        assert_eq!(MigState::decode(data).unwrap(), state);
    }

    #[test]
    fn migration_support_has_the_specified_bytes() {
        let golden = [5, 0, 0, 0, 0, 0, 0, 0];
        let migration = MigrationFeature { flags: (MIGRATION_STOP_COPY | MIGRATION_PRE_COPY).into() };
        assert_eq!(migration.as_bytes(), golden);
        assert_eq!(MigrationFeature::decode(&golden).unwrap(), migration);
    }

    #[test]
    fn logging_start_has_the_specified_bytes() {
        let golden = [
            0, 0x10, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0x10, 0, 0, 0, 0, 0, 0, 0, 0x20, 0, 0,
            0, 0, 0,
        ];
        let control = LoggingControl { page_size: 4096.into(), num_ranges: 1.into(), reserved: 0.into() };
        let range = LoggingRange { iova: 0x10_0000.into(), length: 0x20_0000.into() };
        assert_eq!([control.as_bytes(), range.as_bytes()].concat(), golden);
        assert_eq!(LoggingControl::decode(&golden).unwrap(), (control, &[range][..]));
    }

    #[test]
    fn logging_report_has_the_specified_bytes() {
        let golden = [
            0, 0, 0x10, 0, 0, 0, 0, 0, 0, 0x30, 0, 0, 0, 0, 0, 0, 0, 0x10, 0, 0, 0, 0, 0, 0, 5, 0, 0, 0, 0,
            0, 0, 0,
        ];
        let report = LoggingReport { iova: 0x10_0000.into(), length: 0x3000.into(), page_size: 4096.into() };
        assert_eq!(report.as_bytes(), &golden[..24]);
        assert_eq!(LoggingReport::decode(&golden).unwrap(), report);
        let (decoded, bitmap) = LoggingReport::decode_with_bitmap(&golden).unwrap();
        assert_eq!(decoded, report);
        assert_eq!(bitmap, 5_u64.to_le_bytes());
    }

    #[test]
    fn range_count_beyond_the_limit_is_rejected_before_the_ranges_are_looked_at() {
        let control =
            LoggingControl { page_size: 4096.into(), num_ranges: u32::MAX.into(), reserved: 0.into() };
        let error = LoggingControl::decode(control.as_bytes()).unwrap_err();
        assert!(matches!(error, DecodeError::OverLimit { limit: 2048, .. }), "{error}");
    }

    #[test]
    fn report_that_would_need_too_large_a_bitmap_is_rejected() {
        let report = LoggingReport { iova: 0.into(), length: (1 << 63).into(), page_size: 4096.into() };
        assert!(matches!(report.bitmap_bytes(), Err(DecodeError::OverLimit { .. })));
        let odd = LoggingReport { iova: 0.into(), length: 4096.into(), page_size: 3000.into() };
        assert!(matches!(odd.bitmap_bytes(), Err(DecodeError::Invalid { .. })));
        let empty = LoggingReport { iova: 0.into(), length: 0.into(), page_size: 4096.into() };
        assert!(matches!(empty.bitmap_bytes(), Err(DecodeError::Invalid { .. })));
    }

    proptest! {
        #[test]
        fn any_bytes_decode_within_bounds_or_not_at_all(bytes in proptest::collection::vec(any::<u8>(), 0..96)) {
            prop_assert_eq!(FeatureHeader::decode(&bytes).is_ok(), bytes.len() >= 8);
            prop_assert_eq!(MigrationFeature::decode(&bytes).is_ok(), bytes.len() >= 8);
            prop_assert_eq!(MigState::decode(&bytes).is_ok(), bytes.len() >= 8);
            prop_assert_eq!(LoggingReport::decode(&bytes).is_ok(), bytes.len() >= 24);
            if let Ok((control, ranges)) = LoggingControl::decode(&bytes) {
                prop_assert_eq!(control.num_ranges.get() as usize, ranges.len());
            }
            if let Ok((report, bitmap)) = LoggingReport::decode_with_bitmap(&bytes) {
                prop_assert_eq!(report.bitmap_bytes().unwrap(), bitmap.len());
            }
        }

        #[test]
        fn logging_start_roundtrips(page_shift in 12..30_u32, ranges: Vec<(u64, u64)>) {
            let control = LoggingControl {
                page_size: (1_u64 << page_shift).into(),
                num_ranges: u32::try_from(ranges.len()).unwrap().into(),
                reserved: 0.into(),
            };
            let ranges: Vec<_> = ranges
                .into_iter()
                .map(|(iova, length)| LoggingRange { iova: iova.into(), length: length.into() })
                .collect();
            let bytes = [control.as_bytes(), ranges.as_bytes()].concat();
            prop_assert_eq!(LoggingControl::decode(&bytes).unwrap(), (control, &ranges[..]));
        }
    }
}
