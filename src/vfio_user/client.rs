// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The client: one request at a time, each answered, refused or failed in bounded time.

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use vm_memory::GuestAddressSpace;
use zerocopy::IntoBytes;

use super::channel::{Channel, echoed};
use super::decode::DecodeError;
use super::dma::DmaServer;
use super::error::Error;
use super::message::{DeviceInfo, MAX_REQUEST_DATA_BYTES, RegionAccess, RegionInfo, VfioUserCommand};
use super::version::{
    MAX_DATA_XFER_BYTES, MAX_VERSION_DATA_BYTES, MIN_BITMAP_BYTES, MIN_DATA_XFER_BYTES, MigrationCapability,
    PeerCapabilities, TwinSocketCapability, Version,
};
use crate::granule::Granule;

mod dma;
mod migration;

/// Holds what a [`Client`] asks of its server and how long it waits.
#[derive(Debug, Clone)]
pub struct Options {
    /// Time for one request from its first byte to its reply's last. A transfer that takes several has a second more for each
    /// MiB, all together.
    pub request_timeout: Duration,
    /// Most bytes of data in one message of the server. Those of the client have 32 KiB at most.
    pub max_data_xfer_bytes: u64,
    /// The page size of dirty bitmaps to propose, and what memory given to the device is made of.
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

/// Speaks to one vfio-user device.
///
/// Requests are made one at a time. A refusal leaves the client usable; a timeout, a closed socket or a malformed reply
/// leaves it out of step: it drops the connection, and every later request fails at once with [`Error::Broken`], which says
/// why.
///
/// A server may make requests of its own, DMA_READ and DMA_WRITE, for memory that it cannot map. A client made by
/// [`Client::connect_with_memory`] serves them while it waits for a reply, and whenever [`Client::serve_requests`] is called.
#[derive(Debug)]
pub struct Client {
    channel: Channel,
    server: Version,
    data_xfer_bytes: usize,
    page_size: Granule,
}

impl Client {
    /// Negotiates version and capabilities over a connected socket; `device` names it in errors.
    ///
    /// # Errors
    ///
    /// The server does not answer, refuses, speaks another major version, or allows only data transfers under
    /// [`MIN_DATA_XFER_BYTES`] or dirty bitmaps under [`MIN_BITMAP_BYTES`].
    pub fn connect(stream: UnixStream, device: impl Into<String>, options: &Options) -> Result<Self, Error> {
        Self::negotiate(Self::channel(stream, device.into(), options), options, None)
    }

    /// Connects as [`Client::connect`] does, and lets the device read and write `memory` by message as far as it is mapped.
    ///
    /// `memory` is addressed by IOVA: the guest's memory where IOVAs are GPAs, else an
    /// `IommuMemory` of vm-memory. What the device writes is marked in its dirty bitmap as the VMM's own
    /// writes are. A socket of its own for the server's requests is proposed, and used where the server has one.
    ///
    /// A server that gets no answer stands still: add [`Client::requests_fd`] to the VMM's event loop, and call
    /// [`Client::serve_requests`] whenever it can be read.
    ///
    /// # Errors
    ///
    /// As [`Client::connect`]; the server says that it passes a socket along, and does not.
    pub fn connect_with_memory<A>(
        stream: UnixStream,
        device: impl Into<String>,
        options: &Options,
        memory: A,
    ) -> Result<Self, Error>
    where
        A: GuestAddressSpace + Send + 'static,
    {
        let mut channel = Self::channel(stream, device.into(), options);
        channel.dma.serve_from(memory);
        Self::negotiate(channel, options, Some(TwinSocketCapability { supported: true, fd_index: None }))
    }

    fn channel(stream: UnixStream, device: String, options: &Options) -> Channel {
        let max_bytes = usize::try_from(data_xfer_limit(options)).unwrap_or(usize::MAX);
        Channel::new(stream, device, options.request_timeout, DmaServer::new(max_bytes))
    }

    fn negotiate(
        mut channel: Channel,
        options: &Options,
        twin_socket: Option<TwinSocketCapability>,
    ) -> Result<Self, Error> {
        let limit = data_xfer_limit(options);
        let proposal = Version::current(PeerCapabilities {
            max_msg_fds: Some(1),
            max_data_xfer_size: Some(limit),
            pgsizes: Some(options.page_size.bytes()),
            migration: Some(MigrationCapability {
                pgsize: Some(options.page_size.bytes()),
                max_bitmap_size: None,
            }),
            twin_socket,
            ..PeerCapabilities::default()
        });
        let request = proposal.encode();
        let reply = channel.exchange(VfioUserCommand::Version, &[&request], None, MAX_VERSION_DATA_BYTES)?;
        let server = Version::decode(channel.payload(reply)).and_then(|server| accept(&proposal, server));
        let server = channel.checked(VfioUserCommand::Version, server)?;
        let passed = channel.take_passed();
        let twin = channel.checked(VfioUserCommand::Version, twin_socket_of(&proposal, &server, passed))?;
        twin.into_iter().for_each(|twin| channel.serve_over(twin));
        let allowed = limit.min(server.capabilities.data_xfer_bytes());
        let data_xfer_bytes = usize::try_from(allowed).unwrap_or(usize::MAX);
        Ok(Client { channel, server, data_xfer_bytes, page_size: options.page_size })
    }

    /// Returns the name given at connection.
    pub fn device(&self) -> &str {
        self.channel.device()
    }

    /// Returns what the server said it can do.
    pub fn capabilities(&self) -> &PeerCapabilities {
        &self.server.capabilities
    }

    /// Returns the most bytes of data both sides allow in one message.
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
        let reply = self.channel.exchange(VfioUserCommand::DeviceGetInfo, &[request.as_bytes()], None, 0)?;
        self.channel.checked(VfioUserCommand::DeviceGetInfo, DeviceInfo::decode(self.channel.payload(reply)))
    }

    /// Returns the size and access flags of region `index`.
    ///
    /// # Errors
    ///
    /// As every request: see [`Error`].
    pub fn region_info(&mut self, index: u32) -> Result<RegionInfo, Error> {
        let argsz = size_u32::<RegionInfo>().into();
        let request = RegionInfo { argsz, index: index.into(), ..RegionInfo::default() };
        let reply =
            self.channel.exchange(VfioUserCommand::DeviceGetRegionInfo, &[request.as_bytes()], None, 0)?;
        let info = RegionInfo::decode(self.channel.payload(reply)).and_then(|info| {
            echoed("region index", info.index.get(), index)?;
            Ok(info)
        });
        self.channel.checked(VfioUserCommand::DeviceGetRegionInfo, info)
    }

    /// Fills `buf` from `offset` of region `region`, in as many messages as it takes.
    ///
    /// # Errors
    ///
    /// As every request: see [`Error`]; a part of `buf` may have been filled.
    pub fn region_read(&mut self, region: u32, offset: u64, buf: &mut [u8]) -> Result<(), Error> {
        let deadline = self.channel.deadline(buf.len());
        let mut at = offset;
        for chunk in buf.chunks_mut(self.data_xfer_bytes) {
            let access = region_access(region, at, chunk.len());
            let parts = [access.as_bytes()];
            let reply =
                self.channel.exchange_before(deadline, VfioUserCommand::RegionRead, &parts, chunk.len())?;
            let copied =
                RegionAccess::decode_with_data(self.channel.payload(reply)).and_then(|(done, data)| {
                    access_echoed(&access, &done)?;
                    chunk.copy_from_slice(data);
                    Ok(())
                });
            self.channel.checked(VfioUserCommand::RegionRead, copied)?;
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
        let deadline = self.channel.deadline(data.len());
        let mut at = offset;
        for chunk in data.chunks(self.request_data_bytes()) {
            let access = region_access(region, at, chunk.len());
            let parts = [access.as_bytes(), chunk];
            let reply = self.channel.exchange_before(deadline, VfioUserCommand::RegionWrite, &parts, 0)?;
            let done = RegionAccess::decode(self.channel.payload(reply));
            self.channel
                .checked(VfioUserCommand::RegionWrite, done.and_then(|done| access_echoed(&access, &done)))?;
            at = at.wrapping_add(chunk.len() as u64);
        }
        Ok(())
    }

    /// Asks the device to reset itself.
    ///
    /// Its migration state may stay what it was: ask [`Client::device_state`].
    ///
    /// # Errors
    ///
    /// As every request: see [`Error`]; some servers refuse it while the device is stopped.
    pub fn reset(&mut self) -> Result<(), Error> {
        self.channel.exchange(VfioUserCommand::DeviceReset, &[], None, 0).map(drop)
    }

    /// Returns the most bytes of data in one request.
    fn request_data_bytes(&self) -> usize {
        self.data_xfer_bytes.min(MAX_REQUEST_DATA_BYTES)
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
        value @ ..MIN_DATA_XFER_BYTES => Err(DecodeError::Invalid { what: "max_data_xfer_size", value }),
        _ => Ok(server),
    }
}

/// Returns the socket for the server's own requests, if it passed one along.
fn twin_socket_of(
    proposal: &Version,
    server: &Version,
    passed: Option<OwnedFd>,
) -> Result<Option<OwnedFd>, DecodeError> {
    let offered = server.capabilities.twin_socket.as_ref().filter(|twin| twin.supported);
    match (offered, passed) {
        (None, _) => Ok(None),
        (Some(_), _) if proposal.capabilities.twin_socket.is_none() => {
            Err(DecodeError::Unexpected { what: "twin_socket.supported", value: 1, expected: 0 })
        }
        (Some(TwinSocketCapability { fd_index: Some(0), .. }), Some(socket)) => Ok(Some(socket)),
        (Some(twin), _) => {
            let value = twin.fd_index.map_or(u64::MAX, Into::into);
            Err(DecodeError::Invalid { what: "twin_socket.fd_index", value })
        }
    }
}

/// Returns the most bytes of data in one message of the server.
fn data_xfer_limit(options: &Options) -> u64 {
    options.max_data_xfer_bytes.clamp(MIN_DATA_XFER_BYTES, MAX_DATA_XFER_BYTES)
}

fn access_echoed(asked: &RegionAccess, done: &RegionAccess) -> Result<(), DecodeError> {
    echoed("region offset", done.offset.get(), asked.offset.get())?;
    echoed("region index", done.region.get(), asked.region.get())?;
    echoed("region access size", done.count.get(), asked.count.get())
}

fn region_access(region: u32, offset: u64, count: usize) -> RegionAccess {
    RegionAccess { offset: offset.into(), region: region.into(), count: chunk_u32(count).into() }
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
