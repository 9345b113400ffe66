// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A VFIO device in a container of its own, with a machine's RAM mapped one to one.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::Arc;

use anyhow::Context;
use vfio_bindings::bindings::vfio::{VFIO_PCI_BAR0_REGION_INDEX, VFIO_PCI_CONFIG_REGION_INDEX};
use vfio_ioctls::{VfioContainer, VfioDevice};

use crate::vmm::Memory;

/// Which bus of sysfs a device is on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Bus {
    /// A PCI device, by its address.
    Pci,
    /// A mediated device, by its UUID.
    Mdev,
}

impl Bus {
    pub(super) fn path(self, name: &str) -> PathBuf {
        let bus = match self {
            Self::Pci => "pci",
            Self::Mdev => "mdev",
        };
        ["/sys/bus", bus, "devices", name].iter().collect()
    }
}

/// An open device and its container.
pub struct PassThrough {
    // Closed before the device, whose group is only free when nobody holds it.
    registers: File,
    device: Arc<VfioDevice>,
    container: Arc<VfioContainer>,
    bar: u64,
    _memory: Memory,
}

impl PassThrough {
    /// Opens a device and maps `memory` for it.
    ///
    /// # Errors
    /// The device is not there or in use, or the kernel refuses.
    pub fn open(bus: Bus, name: &str, memory: &Memory) -> anyhow::Result<Self> {
        let container = Arc::new(VfioContainer::new(None).context("Cannot open a VFIO container")?);
        let device = VfioDevice::new(&bus.path(name), Arc::clone(&container) as _, false);
        let device = Arc::new(device.with_context(|| format!("Cannot open VFIO device {name}"))?);
        map_memory(&container, memory)?;
        let registers = registers(&device)?;
        let bar = device.get_region_offset(VFIO_PCI_BAR0_REGION_INDEX);
        Ok(Self { registers, device, container, bar, _memory: memory.clone() })
    }

    /// The device, for what the library does with its descriptor.
    pub fn device(&self) -> &Arc<VfioDevice> {
        &self.device
    }

    /// Its container, likewise.
    pub fn container(&self) -> &Arc<VfioContainer> {
        &self.container
    }

    /// Reads a 64-bit register of BAR0.
    ///
    /// # Errors
    /// The device's errno.
    pub fn read(&self, register: u64) -> io::Result<u64> {
        let mut bytes = [0; 8];
        self.registers.read_exact_at(&mut bytes, self.bar + register)?;
        Ok(u64::from_le_bytes(bytes))
    }

    /// Writes a 64-bit register of BAR0.
    ///
    /// # Errors
    /// The device's errno.
    pub fn write(&self, register: u64, value: u64) -> io::Result<()> {
        self.registers.write_all_at(&value.to_le_bytes(), self.bar + register)
    }

    /// Reads a 32-bit register of BAR0.
    ///
    /// # Errors
    /// The device's errno.
    pub fn read_u32(&self, register: u64) -> io::Result<u32> {
        let mut bytes = [0; 4];
        self.registers.read_exact_at(&mut bytes, self.bar + register)?;
        Ok(u32::from_le_bytes(bytes))
    }

    /// Writes a 32-bit register of BAR0.
    ///
    /// # Errors
    /// The device's errno.
    pub fn write_u32(&self, register: u64, value: u32) -> io::Result<()> {
        self.registers.write_all_at(&value.to_le_bytes(), self.bar + register)
    }

    /// Lets a PCI device answer and reach memory, as a guest's driver does.
    ///
    /// # Errors
    /// The device's errno.
    pub fn enable_dma(&self) -> io::Result<()> {
        const COMMAND: u64 = 4;
        const MEMORY_AND_MASTER: u16 = 6;
        let config = self.device.get_region_offset(VFIO_PCI_CONFIG_REGION_INDEX);
        self.registers.write_all_at(&MEMORY_AND_MASTER.to_le_bytes(), config + COMMAND)
    }
}

#[expect(unsafe_code, reason = "the kernel trusts us about where the memory is mapped")]
fn map_memory(container: &VfioContainer, memory: &Memory) -> anyhow::Result<()> {
    // SAFETY: this process reaches the memory only through vm-memory's volatile accesses; the mapping outlives the container,
    // which is closed with the device that holds a handle on the memory too.
    unsafe { container.vfio_map_guest_memory(memory.guest()) }.context("Cannot map RAM for DMA")
}

/// A second descriptor of the device: the crate's own accesses do not tell when the device refuses one.
#[expect(unsafe_code, reason = "the device lends its descriptor as a number only")]
fn registers(device: &VfioDevice) -> io::Result<File> {
    // SAFETY: the device is open, and stays so while the descriptor is duplicated.
    let borrowed = unsafe { BorrowedFd::borrow_raw(device.as_raw_fd()) };
    Ok(File::from(borrowed.try_clone_to_owned()?))
}
