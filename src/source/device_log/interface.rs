// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The interface of a device's DMA log.

use std::io;
use std::os::fd::AsRawFd;

use crate::granule::Granule;
use crate::range::IovaRange;
use crate::sys::vfio::device as sys;

/// A device's DMA log, reached through a VFIO device descriptor.
pub trait DmaLogging {
    /// Starts logging writes to `ranges`, at `granule` if it can; returns the bytes per bit it chose.
    ///
    /// # Errors
    /// The log is on already, or the device refuses.
    fn start(&self, granule: Granule, ranges: &[IovaRange]) -> io::Result<u64>;

    /// Adds the writes to `range` since its last report to `words`, and clears them in the log.
    ///
    /// # Errors
    /// The log is off or corrupt.
    fn report(&self, range: IovaRange, granule: Granule, words: &mut [u64]) -> io::Result<()>;

    /// Stops logging; what was not reported is lost.
    ///
    /// # Errors
    /// The device refuses.
    fn stop(&self) -> io::Result<()>;
}

impl<F: AsRawFd> DmaLogging for F {
    fn start(&self, granule: Granule, ranges: &[IovaRange]) -> io::Result<u64> {
        sys::dma_logging_start(self, granule, ranges)
    }

    fn report(&self, range: IovaRange, granule: Granule, words: &mut [u64]) -> io::Result<()> {
        sys::dma_logging_report(self, range, granule, words)
    }

    fn stop(&self) -> io::Result<()> {
        sys::dma_logging_stop(self)
    }
}
