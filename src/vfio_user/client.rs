// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The client: one request at a time, each answered, refused or failed in bounded time.

use std::os::fd::BorrowedFd;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use zerocopy::IntoBytes;

use super::channel::{Channel, echoed};
use super::error::{DecodeError, Error};
use super::feature::{
    FEATURE_GET, FEATURE_PROBE, FEATURE_SET, Feature, FeatureHeader, LoggingControl, LoggingRange,
    LoggingReport, MAX_LOGGING_RANGES, MigState, Migration,
};
use super::message::{
    Command, DMA_MAP_READABLE, DMA_MAP_WRITEABLE, DeviceInfo, DmaMap, DmaUnmap, MigData, RegionAccess,
    RegionInfo,
};
use super::version::{
    Capabilities, MAX_DATA_XFER_BYTES, MAX_VERSION_DATA_BYTES, MIN_BITMAP_BYTES, MigrationCapability, Version,
};
use crate::granule::Granule;
use crate::range::IovaRange;

/// Bytes before the bitmap in the reply to DMA_LOGGING_REPORT; whole words, so that the bitmap can be lent as words.
const BITMAP_OFFSET: usize = size_of::<FeatureHeader>() + size_of::<LoggingReport>();

/// Holds what a [`Client`] asks of its server and how long it waits.
#[derive(Debug, Clone)]
pub struct Options {
    /// Time for one request from its first byte to its reply's last.
    pub request_timeout: Duration,
    /// Most bytes of data in one message, either way.
    pub max_data_xfer_bytes: u64,
    /// The page size of dirty bitmaps to propose.
    pub page_size: Granule,
}

impl Default for Options {
    fn default() -> Self {
        Options {
            request_timeout: Duration::from_secs(10),
            max_data_xfer_bytes: 1 << 20,
            page_size: Granule::KIB_4,
        }
    }
}

/// Describes memory given to the device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DmaRegion {
    /// Where the device sees it.
    pub iova: IovaRange,
    /// Where it begins in its file.
    pub file_offset: u64,
    /// Whether the device may write it.
    pub writeable: bool,
}

/// Speaks to one vfio-user device.
///
/// Requests are made one at a time. A refusal leaves the client usable; a timeout, a closed socket or a malformed reply
/// leaves it out of step, and every later request fails at once with [`Error::Broken`].
#[derive(Debug)]
pub struct Client {
    channel: Channel,
    server: Version,
    data_xfer_bytes: usize,
    writeable: Vec<IovaRange>,
}

impl Client {
    /// Negotiates version and capabilities over a connected socket; `device` names it in errors.
    ///
    /// # Errors
    ///
    /// The server does not answer, refuses, speaks another major version, or allows no data transfer at all, or dirty
    /// bitmaps under [`MIN_BITMAP_BYTES`] only.
    pub fn connect(stream: UnixStream, device: impl Into<String>, options: &Options) -> Result<Self, Error> {
        let limit = options.max_data_xfer_bytes.clamp(1, MAX_DATA_XFER_BYTES);
        let proposal = Version::current(Capabilities {
            max_msg_fds: Some(8),
            max_data_xfer_size: Some(limit),
            pgsizes: Some(options.page_size.bytes()),
            migration: Some(MigrationCapability {
                pgsize: Some(options.page_size.bytes()),
                max_bitmap_size: None,
            }),
            ..Capabilities::default()
        });
        let mut channel = Channel::new(stream, device.into(), options.request_timeout);
        let request = proposal.encode();
        let reply = channel.exchange(Command::Version, &[&request], None, MAX_VERSION_DATA_BYTES)?;
        let server = Version::decode(channel.payload(reply)).and_then(|server| accept(&proposal, server));
        let server = channel.checked(Command::Version, server)?;
        let allowed = limit.min(server.capabilities.data_xfer_bytes());
        let data_xfer_bytes = usize::try_from(allowed).unwrap_or(usize::MAX);
        Ok(Client { channel, server, data_xfer_bytes, writeable: Vec::new() })
    }

    /// Returns the name given at connection.
    pub fn device(&self) -> &str {
        self.channel.device()
    }

    /// Returns what the server said it can do.
    pub fn capabilities(&self) -> &Capabilities {
        &self.server.capabilities
    }

    /// Returns the most bytes of data both sides take in one message.
    pub fn data_xfer_bytes(&self) -> usize {
        self.data_xfer_bytes
    }

    /// Returns flags and counts.
    ///
    /// # Errors
    ///
    /// As every request: see [`Error`].
    pub fn device_info(&mut self) -> Result<DeviceInfo, Error> {
        let request = DeviceInfo { argsz: size_u32::<DeviceInfo>().into(), ..DeviceInfo::default() };
        let reply = self.channel.exchange(Command::DeviceGetInfo, &[request.as_bytes()], None, 0)?;
        self.channel.checked(Command::DeviceGetInfo, DeviceInfo::decode(self.channel.payload(reply)))
    }

    /// Returns the size and access flags of region `index`.
    ///
    /// # Errors
    ///
    /// As every request: see [`Error`].
    pub fn region_info(&mut self, index: u32) -> Result<RegionInfo, Error> {
        let argsz = size_u32::<RegionInfo>().into();
        let request = RegionInfo { argsz, index: index.into(), ..RegionInfo::default() };
        let reply = self.channel.exchange(Command::DeviceGetRegionInfo, &[request.as_bytes()], None, 0)?;
        let info = RegionInfo::decode(self.channel.payload(reply)).and_then(|info| {
            echoed("region index", info.index.get(), index)?;
            Ok(info)
        });
        self.channel.checked(Command::DeviceGetRegionInfo, info)
    }

    /// Fills `buf` from `offset` of region `region`, in as many messages as it takes.
    ///
    /// # Errors
    ///
    /// As every request: see [`Error`]; a part of `buf` may have been filled.
    pub fn region_read(&mut self, region: u32, offset: u64, buf: &mut [u8]) -> Result<(), Error> {
        let mut at = offset;
        for chunk in buf.chunks_mut(self.data_xfer_bytes) {
            let access = region_access(region, at, chunk.len());
            let reply =
                self.channel.exchange(Command::RegionRead, &[access.as_bytes()], None, chunk.len())?;
            let copied =
                RegionAccess::decode_with_data(self.channel.payload(reply)).and_then(|(done, data)| {
                    access_echoed(&access, &done)?;
                    chunk.copy_from_slice(data);
                    Ok(())
                });
            self.channel.checked(Command::RegionRead, copied)?;
            at = at.wrapping_add(chunk.len() as u64);
        }
        Ok(())
    }

    /// Writes `data` to `offset` of region `region`, in as many messages as it takes.
    ///
    /// # Errors
    ///
    /// As every request: see [`Error`]; a part of `data` may have been written.
    pub fn region_write(&mut self, region: u32, offset: u64, data: &[u8]) -> Result<(), Error> {
        let mut at = offset;
        for chunk in data.chunks(self.data_xfer_bytes) {
            let access = region_access(region, at, chunk.len());
            let reply = self.channel.exchange(Command::RegionWrite, &[access.as_bytes(), chunk], None, 0)?;
            let done = RegionAccess::decode(self.channel.payload(reply));
            self.channel
                .checked(Command::RegionWrite, done.and_then(|done| access_echoed(&access, &done)))?;
            at = at.wrapping_add(chunk.len() as u64);
        }
        Ok(())
    }

    /// Gives the device `region`; without `fd` it cannot be mapped by the server, nor its log be reported by some.
    ///
    /// # Errors
    ///
    /// As every request: see [`Error`]; EEXIST when part of the range is mapped already.
    pub fn dma_map(&mut self, region: &DmaRegion, fd: Option<BorrowedFd<'_>>) -> Result<(), Error> {
        let writeable = if region.writeable { DMA_MAP_WRITEABLE } else { 0 };
        let request = DmaMap {
            argsz: size_u32::<DmaMap>().into(),
            flags: (DMA_MAP_READABLE | writeable).into(),
            offset: region.file_offset.into(),
            iova: region.iova.start().into(),
            size: region.iova.len().into(),
        };
        self.channel.exchange(Command::DmaMap, &[request.as_bytes()], fd, 0)?;
        if region.writeable && fd.is_some() {
            self.writeable.push(region.iova);
        }
        Ok(())
    }

    /// Returns what the device can write to by itself: each range as it was mapped, in no order.
    pub fn writeable_ranges(&self) -> &[IovaRange] {
        &self.writeable
    }

    /// Takes a mapped range back; the device no longer touches it once this returns.
    ///
    /// # Errors
    ///
    /// As every request: see [`Error`]; `iova` must be exactly what was mapped.
    pub fn dma_unmap(&mut self, iova: IovaRange) -> Result<(), Error> {
        let request = DmaUnmap {
            argsz: size_u32::<DmaUnmap>().into(),
            flags: 0.into(),
            iova: iova.start().into(),
            size: iova.len().into(),
        };
        let reply = self.channel.exchange(Command::DmaUnmap, &[request.as_bytes()], None, 0)?;
        let echo = DmaUnmap::decode(self.channel.payload(reply)).and_then(|unmapped| {
            echoed("unmapped IOVA", unmapped.iova.get(), iova.start())?;
            echoed("unmapped size", unmapped.size.get(), iova.len())
        });
        self.channel.checked(Command::DmaUnmap, echo)?;
        self.writeable.retain(|range| *range != iova);
        Ok(())
    }

    /// Resets the device: it runs, whatever its migration state was.
    ///
    /// # Errors
    ///
    /// As every request: see [`Error`].
    pub fn reset(&mut self) -> Result<(), Error> {
        self.channel.exchange(Command::DeviceReset, &[], None, 0).map(drop)
    }

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
        let answer = self.feature(Feature::Migration, FEATURE_GET, &[], size_of::<Migration>());
        let Some(reply) = absent_is_none(answer)? else { return Ok(None) };
        let migration = self.feature_data(reply).and_then(Migration::decode);
        self.channel.checked(Command::DeviceFeature, migration.map(|migration| Some(migration.flags.get())))
    }

    /// Returns the device's migration state, a `VFIO_DEVICE_STATE_*` value.
    ///
    /// # Errors
    ///
    /// As every request: see [`Error`].
    pub fn device_state(&mut self) -> Result<u32, Error> {
        let reply = self.feature(Feature::MigDeviceState, FEATURE_GET, &[], size_of::<MigState>())?;
        let state = self.feature_data(reply).and_then(MigState::decode);
        self.channel.checked(Command::DeviceFeature, state.map(|state| state.device_state.get()))
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
        self.channel.checked(Command::DeviceFeature, reached)
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
        self.channel.checked(Command::DeviceFeature, chosen)
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
        self.channel.checked(Command::DeviceFeature, checked)?;
        let first = BITMAP_OFFSET / size_of::<u64>();
        Ok(self.channel.words(first, words))
    }

    /// Reads migration data into `buf` and returns how much there was; less than `buf` holds means no more for now.
    ///
    /// # Errors
    ///
    /// As every request: see [`Error`]; what was read before is gone from the device.
    pub fn read_migration_data(&mut self, buf: &mut [u8]) -> Result<usize, Error> {
        let mut filled = 0;
        for chunk in buf.chunks_mut(self.data_xfer_bytes) {
            let read = self.read_migration_chunk(chunk)?;
            filled += read;
            if read < chunk.len() {
                break;
            }
        }
        Ok(filled)
    }

    fn read_migration_chunk(&mut self, chunk: &mut [u8]) -> Result<usize, Error> {
        let request = mig_data(chunk.len());
        let reply = self.channel.exchange(Command::MigDataRead, &[request.as_bytes()], None, chunk.len())?;
        let copied = MigData::decode_with_data(self.channel.payload(reply)).and_then(|data| {
            let (value, limit) = (data.len() as u64, chunk.len() as u64);
            let target = chunk.get_mut(..data.len()).ok_or(DecodeError::OverLimit {
                what: "migration data",
                value,
                limit,
            })?;
            target.copy_from_slice(data);
            Ok(data.len())
        });
        self.channel.checked(Command::MigDataRead, copied)
    }

    /// Writes all of `data` as migration data.
    ///
    /// # Errors
    ///
    /// As every request: see [`Error`]; a part of `data` may have been taken.
    pub fn write_migration_data(&mut self, data: &[u8]) -> Result<(), Error> {
        for chunk in data.chunks(self.data_xfer_bytes) {
            let request = mig_data(chunk.len());
            self.channel.exchange(Command::MigDataWrite, &[request.as_bytes(), chunk], None, 0)?;
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
        self.channel.exchange(Command::DeviceFeature, &parts, None, reply_data_bytes)
    }

    fn feature_data(&self, reply: usize) -> Result<&[u8], DecodeError> {
        FeatureHeader::decode(self.channel.payload(reply)).map(|(_, data)| data)
    }
}

/// Checks the server's version against what was proposed.
fn accept(proposal: &Version, server: Version) -> Result<Version, DecodeError> {
    echoed("major version", server.major, proposal.major)?;
    if server.minor > proposal.minor {
        let (value, limit) = (server.minor.into(), proposal.minor.into());
        return Err(DecodeError::OverLimit { what: "minor version", value, limit });
    }
    let bitmap_bytes = server.capabilities.bitmap_bytes();
    if bitmap_bytes < MIN_BITMAP_BYTES {
        return Err(DecodeError::Invalid { what: "max_bitmap_size", value: bitmap_bytes });
    }
    match server.capabilities.data_xfer_bytes() {
        0 => Err(DecodeError::Invalid { what: "max_data_xfer_size", value: 0 }),
        _ => Ok(server),
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

fn access_echoed(asked: &RegionAccess, done: &RegionAccess) -> Result<(), DecodeError> {
    echoed("region offset", done.offset.get(), asked.offset.get())?;
    echoed("region index", done.region.get(), asked.region.get())?;
    echoed("region access size", done.count.get(), asked.count.get())
}

fn region_access(region: u32, offset: u64, count: usize) -> RegionAccess {
    RegionAccess { offset: offset.into(), region: region.into(), count: chunk_u32(count).into() }
}

fn mig_data(size: usize) -> MigData {
    let argsz = chunk_u32(size_of::<MigData>() + size);
    MigData { argsz: argsz.into(), size: chunk_u32(size).into() }
}

fn chunk_u32(bytes: usize) -> u32 {
    u32::try_from(bytes).expect("a chunk is at most MAX_DATA_XFER_BYTES")
}

fn size_u32<T>() -> u32 {
    const { assert!(size_of::<T>() <= 64) };
    chunk_u32(size_of::<T>())
}

#[cfg(test)]
mod tests;
