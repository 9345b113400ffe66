// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A device that writes guest memory by DMA, and what the library has of it: its dirty log and its state.

use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use vfio_migration::device::{
    Capabilities, DataRead, DeviceError, DeviceIo, DeviceOperation, DeviceState, PrecopyInfo,
};
use vfio_migration::iova::IovaMap;
use vfio_migration::layout::Layout;
use vfio_migration::range::GpaRange;
use vfio_migration::source::{Cover, DirtySource, Operation, Reports, Sink, SourceError};
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use crate::machine::{Machine, Memory, PAGES, RAM_BYTES, Stamper, lock, wait_until};

/// The device: the upper half of RAM is its.
pub(crate) struct Nic {
    /// Its own way to the VM's RAM, with its own log beside.
    view: Memory,
    registers: Mutex<Registers>,
}

struct Registers {
    state: DeviceState,
    /// Whether the guest's driver has set it to work.
    programmed: bool,
    stamper: Stamper,
}

impl Nic {
    pub(crate) fn new(machine: &Machine) -> Result<Arc<Self>, Box<dyn std::error::Error + Send + Sync>> {
        let ram = machine.memory.iter().next().and_then(|region| region.file_offset().cloned());
        let view = Memory::from_ranges_with_files([(GuestAddress(0), RAM_BYTES, ram)])?;
        let stamper = Stamper::new(RAM_BYTES as u64 / 2);
        let registers = Mutex::new(Registers { state: DeviceState::Running, programmed: false, stamper });
        let nic = Arc::new(Self { view, registers });
        let weak = Arc::downgrade(&nic);
        thread::spawn(move || {
            while let Some(nic) = weak.upgrade() {
                nic.write_some();
                thread::sleep(Duration::from_millis(1));
            }
        });
        Ok(nic)
    }

    fn write_some(&self) {
        let mut registers = lock(&self.registers);
        let writes = registers.programmed && !registers.state.is_stopped();
        for _ in 0..if writes { 8 } else { 0 } {
            registers.stamper.stamp(&self.view);
        }
    }

    /// Sets it to work, as a driver in the guest would.
    pub(crate) fn program(&self) {
        lock(&self.registers).programmed = true;
    }

    /// Has it go once through all its pages: each must be as it was left, here or at the VM's source.
    pub(crate) fn check(&self) {
        let until = lock(&self.registers).stamper.step + PAGES;
        wait_until(|| lock(&self.registers).stamper.step >= until);
        assert_eq!(lock(&self.registers).stamper.wrong_gpa, None, "a page is not as the device left it");
    }
}

/// The device's dirty log.
pub(crate) struct NicLog(pub(crate) Arc<Nic>);

impl NicLog {
    fn ram() -> GpaRange {
        GpaRange::new(0, RAM_BYTES as u64).expect("RAM is a range")
    }
}

impl DirtySource for NicLog {
    fn id(&self) -> &str {
        "net0-dma"
    }

    fn reports(&self) -> Reports {
        Reports::Devices
    }

    fn cover(&self) -> Cover {
        Cover { ranges: vec![Self::ram()], precise: true }
    }

    fn start(&mut self, _layout: &Layout, _iova: &IovaMap) -> Result<(), SourceError> {
        self.0.view.iter().for_each(|region| (**region).bitmap().reset());
        Ok(())
    }

    fn collect(&mut self, sink: &mut Sink<'_>) -> Result<(), SourceError> {
        for region in self.0.view.iter() {
            let words = (**region).bitmap().get_and_reset();
            let page = sink.layout().host_page();
            let marked = sink.gpa_words(Self::ram(), page, &words);
            marked.map_err(|cause| SourceError::new("net0-dma", Operation::Collect, cause))?;
        }
        Ok(())
    }

    fn stop(&mut self) -> Result<(), SourceError> {
        Ok(())
    }
}

/// The device's migration interface: its state is one number.
pub(crate) struct NicState {
    nic: Arc<Nic>,
    /// Bytes of the state that were read, or written so far.
    read: usize,
    written: Vec<u8>,
}

impl NicState {
    pub(crate) fn new(nic: Arc<Nic>) -> Self {
        Self { nic, read: 0, written: Vec::new() }
    }

    /// Takes over what was written in RESUMING.
    fn load(&mut self, registers: &mut Registers) -> Result<(), DeviceError> {
        let malformed = |cause| DeviceError::new(DeviceOperation::WriteData, cause);
        let bytes = std::mem::take(&mut self.written).try_into();
        registers.stamper.step =
            u64::from_le_bytes(bytes.map_err(|_: Vec<u8>| malformed("the state is not of 8 bytes"))?);
        registers.programmed = true;
        Ok(())
    }
}

impl DeviceIo for NicState {
    fn capabilities(&self) -> Capabilities {
        Capabilities { p2p: false, pre_copy: false }
    }

    fn state(&mut self) -> Result<DeviceState, DeviceError> {
        Ok(lock(&self.nic.registers).state)
    }

    fn set_state(&mut self, state: DeviceState) -> Result<(), DeviceError> {
        let nic = Arc::clone(&self.nic);
        let mut registers = lock(&nic.registers);
        if registers.state == DeviceState::Resuming {
            self.load(&mut registers)?;
        }
        self.read = 0;
        registers.state = state;
        Ok(())
    }

    fn read_data(&mut self, buffer: &mut [u8]) -> Result<DataRead, DeviceError> {
        let state = lock(&self.nic.registers).stamper.step.to_le_bytes();
        let bytes = buffer.len().min(state.len() - self.read);
        buffer[..bytes].copy_from_slice(&state[self.read..self.read + bytes]);
        self.read += bytes;
        Ok(if bytes == 0 { DataRead::End } else { DataRead::Bytes(bytes) })
    }

    fn write_data(&mut self, data: &[u8]) -> Result<(), DeviceError> {
        self.written.extend_from_slice(data);
        Ok(())
    }

    fn precopy_info(&mut self) -> Result<Option<PrecopyInfo>, DeviceError> {
        Ok(None)
    }

    fn data_size(&mut self) -> Result<Option<u64>, DeviceError> {
        Ok(Some(8))
    }

    fn reset(&mut self) -> Result<(), DeviceError> {
        let mut registers = lock(&self.nic.registers);
        registers.state = DeviceState::Running;
        registers.programmed = false;
        Ok(())
    }
}
