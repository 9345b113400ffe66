// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The memory that the device is given, and its own requests for it.

use std::os::fd::BorrowedFd;

use zerocopy::IntoBytes;

use super::{Client, echoed, size_u32};
use crate::range::IovaRange;
use crate::vfio_user::decode::DecodeError;
use crate::vfio_user::dma::DmaRegion;
use crate::vfio_user::error::Error;
use crate::vfio_user::message::{DMA_MAP_READABLE, DMA_MAP_WRITEABLE, DmaMap, DmaUnmap, VfioUserCommand};

impl Client {
    /// Gives the device `region`. Without `fd` the server cannot map it and asks for each access by message; what it writes
    /// then is in no log of its own.
    ///
    /// # Errors
    ///
    /// As every request: see [`Error`]; [`Error::NotWholePages`] for a region that no dirty bitmap could tell of,
    /// [`Error::AlreadyMapped`] where the device has a part of it already.
    pub fn dma_map(&mut self, region: &DmaRegion, fd: Option<BorrowedFd<'_>>) -> Result<(), Error> {
        self.check_region(region)?;
        let writeable = if region.writeable { DMA_MAP_WRITEABLE } else { 0 };
        let request = DmaMap {
            argsz: size_u32::<DmaMap>().into(),
            flags: (DMA_MAP_READABLE | writeable).into(),
            offset: region.file_offset.into(),
            iova: region.iova.start().into(),
            size: region.iova.len().into(),
        };
        // The server may use the memory from the moment on that it reads of it, and so before its answer is read here.
        self.channel.dma.mappings.insert(region, fd.is_some());
        let mapped = self.channel.exchange(VfioUserCommand::DmaMap, &[request.as_bytes()], fd, 0).map(drop);
        mapped.inspect_err(|_| self.channel.dma.mappings.remove(region.iova))
    }

    /// Checks what not every server does.
    fn check_region(&self, region: &DmaRegion) -> Result<(), Error> {
        let (iova, page_size) = (region.iova, self.page_size);
        let device = || self.device().to_owned();
        if !page_size.is_aligned(iova.start() | iova.len() | region.file_offset) {
            return Err(Error::NotWholePages { device: device(), iova, page_bytes: page_size.bytes() });
        }
        match self.channel.dma.mappings.overlap(iova) {
            Some(mapped) => Err(Error::AlreadyMapped { device: device(), iova, mapped }),
            None => Ok(()),
        }
    }

    /// Returns what the device can write to by itself: each range as it was mapped, in no order.
    pub fn writeable_ranges(&self) -> &[IovaRange] {
        self.channel.dma.mappings.writeable_by_itself()
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
        let reply = self.channel.exchange(VfioUserCommand::DmaUnmap, &[request.as_bytes()], None, 0)?;
        let unmapped = unmapped(self.channel.payload(reply), iova);
        self.channel.checked(VfioUserCommand::DmaUnmap, unmapped)?;
        self.channel.dma.mappings.remove(iova);
        Ok(())
    }

    /// Returns the descriptor to poll for requests of the server: whenever it can be read, call [`Client::serve_requests`].
    ///
    /// It stays the same as long as the client lives. Without a socket of their own the server's requests share that of the
    /// replies, so that it can be read, too, while another thread waits for one.
    pub fn requests_fd(&self) -> BorrowedFd<'_> {
        self.channel.requests_fd()
    }

    /// Serves the requests of the server that wait, never waits for one, and returns how many there were, a few dozen at
    /// most.
    ///
    /// Requests for memory that the client has not been given, or that is not mapped, are refused.
    ///
    /// # Errors
    ///
    /// [`Error::Serve`]: the server is gone, or sent something else than a whole request in the time of one. The connection is
    /// dropped; do not poll any further.
    pub fn serve_requests(&mut self) -> Result<usize, Error> {
        self.channel.serve_pending()
    }
}

/// Checks the reply to DMA_UNMAP. Servers that keep no mappings of their own answer without payload.
fn unmapped(payload: &[u8], iova: IovaRange) -> Result<(), DecodeError> {
    if payload.is_empty() {
        return Ok(());
    }
    let unmapped = DmaUnmap::decode(payload)?;
    echoed("unmapped IOVA", unmapped.iova.get(), iova.start())?;
    echoed("unmapped size", unmapped.size.get(), iova.len())
}
