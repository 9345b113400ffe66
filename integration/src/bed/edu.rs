// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! QEMU's `edu` on its variant driver: real DMA through a real IOMMU. See `resources/modules/edu_vfio.c`.

use std::io;
use std::thread::sleep;
use std::time::Duration;

use super::pass_through::{Bus, PassThrough};
use crate::vmm::Memory;

const LIVENESS: u64 = 0x04;
const FACTORIAL: u64 = 0x08;
const DMA_SRC: u64 = 0x80;
const DMA_DST: u64 = 0x88;
const DMA_COUNT: u64 = 0x90;
const DMA_CMD: u64 = 0x98;
const RUN: u64 = 1;
const TO_MEMORY: u64 = 2;
const BUFFER: u64 = 0x4_0000;

/// One DMA between memory and the beginning of edu's buffer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct EduDma {
    /// Where in memory.
    pub iova: u64,
    /// Bytes, at most [`Edu::BUFFER_BYTES`].
    pub bytes: u64,
    /// From the buffer to memory.
    pub to_memory: bool,
}

/// An open `edu`.
pub struct Edu {
    device: PassThrough,
}

impl Edu {
    /// Bytes one DMA copies at most.
    pub const BUFFER_BYTES: u64 = 4088;

    /// Opens the device at a PCI address and lets it reach memory.
    ///
    /// # Errors
    /// As [`PassThrough::open`].
    pub fn open(address: &str, memory: &Memory) -> anyhow::Result<Self> {
        let device = PassThrough::open(Bus::Pci, address, memory)?;
        device.enable_dma()?;
        Ok(Self { device })
    }

    /// The device behind it.
    pub fn pass_through(&self) -> &PassThrough {
        &self.device
    }

    /// Starts a DMA and returns at once; edu does it about 100 ms later.
    ///
    /// # Errors
    /// The device's errno: EBUSY while it may not do DMA.
    pub fn start(&self, dma: EduDma) -> io::Result<()> {
        let EduDma { iova, bytes, to_memory } = dma;
        let (source, destination) = if to_memory { (BUFFER, iova) } else { (iova, BUFFER) };
        self.device.write(DMA_SRC, source)?;
        self.device.write(DMA_DST, destination)?;
        self.device.write(DMA_COUNT, bytes)?;
        self.device.write(DMA_CMD, RUN | if to_memory { TO_MEMORY } else { 0 })
    }

    /// Whether a DMA is in flight.
    ///
    /// # Errors
    /// The device's errno, as for all below.
    pub fn is_busy(&self) -> io::Result<bool> {
        Ok(self.device.read(DMA_CMD)? & RUN != 0)
    }

    /// Waits until no DMA is in flight.
    ///
    /// # Errors
    /// The device's errno.
    pub fn finish(&self) -> io::Result<()> {
        while self.is_busy()? {
            sleep(Duration::from_millis(2));
        }
        Ok(())
    }

    /// Does a DMA and waits for its end.
    ///
    /// # Errors
    /// The device's errno.
    pub fn dma(&self, dma: EduDma) -> io::Result<()> {
        self.start(dma)?;
        self.finish()
    }

    /// The DMA its registers describe: the last one done, on an idle device.
    ///
    /// # Errors
    /// The device's errno.
    pub fn last_dma(&self) -> io::Result<EduDma> {
        let (source, destination) = (self.device.read(DMA_SRC)?, self.device.read(DMA_DST)?);
        let to_memory = source == BUFFER;
        let iova = if to_memory { destination } else { source };
        Ok(EduDma { iova, bytes: self.device.read(DMA_COUNT)?, to_memory })
    }

    /// Writes the registers that have nothing to do with DMA.
    ///
    /// # Errors
    /// The device's errno.
    pub fn mark(&self, liveness: u32, factorial_of: u32) -> io::Result<()> {
        self.device.write_u32(LIVENESS, liveness)?;
        self.device.write_u32(FACTORIAL, factorial_of)
    }

    /// Reads them: the complement of the liveness written, and the factorial.
    ///
    /// # Errors
    /// The device's errno.
    pub fn marks(&self) -> io::Result<(u32, u32)> {
        Ok((self.device.read_u32(LIVENESS)?, self.device.read_u32(FACTORIAL)?))
    }
}
