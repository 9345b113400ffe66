// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The device's features: migration states and data, and the log of its DMA.

use zerocopy::IntoBytes;

use super::{Client, chunk_u32, echoed};
use crate::granule::Granule;
use crate::range::IovaRange;
use crate::vfio_user::decode::DecodeError;
use crate::vfio_user::error::Error;
use crate::vfio_user::feature::{
    FEATURE_GET, FEATURE_PROBE, FEATURE_SET, Feature, FeatureHeader, LoggingControl, LoggingRange,
    LoggingReport, MAX_LOGGING_RANGES, MigState, MigrationFeature,
};
use crate::vfio_user::message::{MigData, VfioUserCommand};

/// Bytes before the bitmap in the reply to DMA_LOGGING_REPORT; whole words, so that the bitmap can be lent as words.
const BITMAP_OFFSET: usize = size_of::<FeatureHeader>() + size_of::<LoggingReport>();

impl Client {
    /// Tells whether the device supports `feature` with all of `methods` ([`FEATURE_GET`], [`FEATURE_SET`]).
    ///
    /// # Errors
    ///
    /// As every request: see [`Error`]; an errno that means "no such feature" is an answer, not an error.
    pub fn supports(&mut self, feature: Feature, methods: u32) -> Result<bool, Error> {
        let probed = self.feature(feature, FEATURE_PROBE | methods, &[], 0);
        Ok(absent_is_none(probed)?.is_some())
    }

    /// Returns the `VFIO_MIGRATION_*` flags, or `None` when the device cannot be migrated.
    ///
    /// # Errors
    ///
    /// As every request: see [`Error`].
    pub fn migration_flags(&mut self) -> Result<Option<u64>, Error> {
        let answer = self.feature(Feature::Migration, FEATURE_GET, &[], size_of::<MigrationFeature>());
        let Some(reply) = absent_is_none(answer)? else { return Ok(None) };
        let migration = self.feature_data(reply).and_then(MigrationFeature::decode);
        self.channel
            .checked(VfioUserCommand::DeviceFeature, migration.map(|migration| Some(migration.flags.get())))
    }

    /// Returns the device's migration state, a `VFIO_DEVICE_STATE_*` value.
    ///
    /// # Errors
    ///
    /// As every request: see [`Error`].
    pub fn device_state(&mut self) -> Result<u32, Error> {
        let reply = self.feature(Feature::MigDeviceState, FEATURE_GET, &[], size_of::<MigState>())?;
        let state = self.feature_data(reply).and_then(MigState::decode);
        self.channel.checked(VfioUserCommand::DeviceFeature, state.map(|state| state.device_state.get()))
    }

    /// Moves the device to `state`, a `VFIO_DEVICE_STATE_*` value; it is there once this returns.
    ///
    /// # Errors
    ///
    /// As every request: see [`Error`]; after a refusal the device may be in any state on the way.
    pub fn set_device_state(&mut self, state: u32) -> Result<(), Error> {
        let wanted = MigState { device_state: state.into(), data_fd: 0.into() };
        let reply = self.feature(Feature::MigDeviceState, FEATURE_SET, &[wanted.as_bytes()], 0)?;
        let reached = self.feature_data(reply).and_then(MigState::decode);
        let reached = reached.and_then(|now| echoed("device state", now.device_state.get(), state));
        self.channel.checked(VfioUserCommand::DeviceFeature, reached)
    }

    /// Begins to log DMA writes to `ranges` (all, when there are none) and returns the granule the device chose.
    ///
    /// # Errors
    ///
    /// As every request: see [`Error`]; [`Error::TooLarge`] for more than [`MAX_LOGGING_RANGES`].
    pub fn start_dma_logging(&mut self, wish: Granule, ranges: &[IovaRange]) -> Result<Granule, Error> {
        let num_ranges = u32::try_from(ranges.len()).unwrap_or(u32::MAX);
        if num_ranges > MAX_LOGGING_RANGES {
            return Err(self.channel.too_large(
                "number of DMA logging ranges",
                ranges.len() as u64,
                MAX_LOGGING_RANGES,
            ));
        }
        let control = LoggingControl {
            page_size: wish.bytes().into(),
            num_ranges: num_ranges.into(),
            reserved: 0.into(),
        };
        let wire: Vec<_> = ranges
            .iter()
            .map(|range| LoggingRange { iova: range.start().into(), length: range.len().into() })
            .collect();
        let reply = self.feature(
            Feature::DmaLoggingStart,
            FEATURE_SET,
            &[control.as_bytes(), wire.as_bytes()],
            wire.as_bytes().len(),
        )?;
        let chosen = self.feature_data(reply).and_then(|data| {
            let page_size = LoggingControl::decode(data)?.0.page_size.get();
            Granule::new(page_size)
                .map_err(|_| DecodeError::Invalid { what: "DMA log page size", value: page_size })
        });
        self.channel.checked(VfioUserCommand::DeviceFeature, chosen)
    }

    /// Ends DMA logging; what was not reported is lost.
    ///
    /// # Errors
    ///
    /// As every request: see [`Error`].
    pub fn stop_dma_logging(&mut self) -> Result<(), Error> {
        self.feature(Feature::DmaLoggingStop, FEATURE_SET, &[], 0).map(drop)
    }

    /// Returns the most bytes of IOVA space one [`Client::report_dma_log`] may cover: whole words of the bitmap.
    pub fn report_bytes(&self, granule: Granule) -> u64 {
        let words = (self.server.capabilities.bitmap_bytes() / size_of::<u64>() as u64).max(1);
        words.saturating_mul(64).saturating_mul(granule.bytes())
    }

    /// Reads and clears the log of `iova`: bit `n` of the words stands for its `n`th granule.
    ///
    /// The words are the client's own buffer, valid until the next request. Some servers report only exactly what one
    /// DMA_MAP gave them.
    ///
    /// # Errors
    ///
    /// As every request: see [`Error`]; the log is then to be taken as lost. [`Error::TooLarge`] when `iova` is over
    /// [`Client::report_bytes`].
    pub fn report_dma_log(&mut self, iova: IovaRange, granule: Granule) -> Result<&[u64], Error> {
        if iova.len() > self.report_bytes(granule) {
            let limit = self.report_bytes(granule);
            return Err(self.channel.too_large("range of a DMA log report", iova.len(), limit));
        }
        let request = LoggingReport {
            iova: iova.start().into(),
            length: iova.len().into(),
            page_size: granule.bytes().into(),
        };
        let words = usize::try_from(granule.bits_for(iova.len()).div_ceil(64)).unwrap_or(usize::MAX);
        let reply = self.feature(
            Feature::DmaLoggingReport,
            FEATURE_GET,
            &[request.as_bytes()],
            words.saturating_mul(size_of::<u64>()),
        )?;
        let checked = self.feature_data(reply).and_then(|data| {
            let (report, _) = LoggingReport::decode_with_bitmap(data)?;
            echoed("reported IOVA", report.iova.get(), iova.start())?;
            echoed("reported length", report.length.get(), iova.len())?;
            echoed("reported page size", report.page_size.get(), granule.bytes())
        });
        self.channel.checked(VfioUserCommand::DeviceFeature, checked)?;
        let first = BITMAP_OFFSET / size_of::<u64>();
        Ok(self.channel.words(first, words))
    }

    /// Reads the next piece of migration data into `buf` and returns its size, 0 when there is none.
    ///
    /// A piece may be shorter than `buf` for any reason. 0 is the end of the state in STOP_COPY; in PRE_COPY it means that
    /// there is nothing now.
    ///
    /// # Errors
    ///
    /// As every request: see [`Error`]; what was read before is gone from the device.
    pub fn read_migration_data(&mut self, buf: &mut [u8]) -> Result<usize, Error> {
        let asked = buf.len().min(self.data_xfer_bytes);
        let buf = &mut buf[..asked];
        let request = mig_data(asked);
        let reply =
            self.channel.exchange(VfioUserCommand::MigDataRead, &[request.as_bytes()], None, asked)?;
        let copied = MigData::decode_with_data(self.channel.payload(reply)).and_then(|data| {
            let (value, limit) = (data.len() as u64, asked as u64);
            let target = buf.get_mut(..data.len()).ok_or(DecodeError::OverLimit {
                what: "migration data",
                value,
                limit,
            })?;
            target.copy_from_slice(data);
            Ok(data.len())
        });
        self.channel.checked(VfioUserCommand::MigDataRead, copied)
    }

    /// Writes all of `data` as migration data, in as many messages as it takes.
    ///
    /// # Errors
    ///
    /// As every request: see [`Error`]; a part of `data` may have been taken.
    pub fn write_migration_data(&mut self, data: &[u8]) -> Result<(), Error> {
        let deadline = self.channel.deadline(data.len());
        for chunk in data.chunks(self.request_data_bytes()) {
            let request = mig_data(chunk.len());
            let parts = [request.as_bytes(), chunk];
            self.channel.exchange_before(deadline, VfioUserCommand::MigDataWrite, &parts, 0)?;
        }
        Ok(())
    }

    /// Makes a DEVICE_FEATURE request and returns the size of the reply's payload.
    fn feature(
        &mut self,
        feature: Feature,
        methods: u32,
        data: &[&[u8]],
        reply_data_bytes: usize,
    ) -> Result<usize, Error> {
        let [first, second] = [data.first(), data.get(1)].map(|part| part.copied().unwrap_or_default());
        let sent = first.len() + second.len();
        let argsz = size_of::<FeatureHeader>() + sent + reply_data_bytes;
        let header = FeatureHeader::new(feature, methods, u32::try_from(argsz).unwrap_or(u32::MAX));
        let parts = [header.as_bytes(), first, second];
        self.channel.exchange(VfioUserCommand::DeviceFeature, &parts, None, reply_data_bytes)
    }

    fn feature_data(&self, reply: usize) -> Result<&[u8], DecodeError> {
        FeatureHeader::decode(self.channel.payload(reply)).map(|(_, data)| data)
    }
}

/// Turns the errnos that servers and kernels answer for an unknown feature into `None`.
fn absent_is_none<T>(answer: Result<T, Error>) -> Result<Option<T>, Error> {
    match answer {
        Ok(value) => Ok(Some(value)),
        Err(Error::Refused { errno: libc::ENOTTY | libc::EINVAL | libc::EOPNOTSUPP, .. }) => Ok(None),
        Err(error) => Err(error),
    }
}

pub(super) fn mig_data(size: usize) -> MigData {
    let argsz = chunk_u32(size_of::<MigData>() + size);
    MigData { argsz: argsz.into(), size: chunk_u32(size).into() }
}
