// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! QEMU's `edu` on the variant driver: see resources/modules/edu_vfio.c.

use std::os::unix::fs::FileExt;
use std::thread::sleep;
use std::time::Duration;

use crate::kernel::*;
use crate::mdev::stream;

pub(crate) const DMA_SRC: u64 = 0x80;
pub(crate) const DMA_DST: u64 = 0x88;
pub(crate) const DMA_COUNT: u64 = 0x90;
pub(crate) const DMA_CMD: u64 = 0x98;
pub(crate) const TO_DEVICE: u64 = 1;
pub(crate) const TO_MEMORY: u64 = 3;
pub(crate) const BUFFER: u64 = 0x4_0000;
pub(crate) const BUFFER_BYTES: u64 = 4088;

pub(crate) fn open_edu(name: &str) -> Device {
    let device = Device::open("pci", name);
    device.enable_dma();
    device
}

impl Device {
    /// Sets the bits for memory and for bus mastering in the command register.
    pub(crate) fn enable_dma(&self) {
        self.file.write_all_at(&6u16.to_le_bytes(), (7 << 40) + 4).unwrap();
    }

    pub(crate) fn start_dma(&self, src: u64, dst: u64, count: u64, command: u64) {
        self.write(DMA_SRC, src).unwrap();
        self.write(DMA_DST, dst).unwrap();
        self.write(DMA_COUNT, count).unwrap();
        self.write(DMA_CMD, command).unwrap();
    }

    pub(crate) fn finish_dma(&self) {
        while self.read(DMA_CMD) & 1 == 1 {
            sleep(Duration::from_millis(5));
        }
    }

    pub(crate) fn dma(&self, src: u64, dst: u64, count: u64, command: u64) {
        self.start_dma(src, dst, count, command);
        self.finish_dma();
    }
}

#[test]
fn edu_page_stays_dirty_until_its_dma_has_landed() {
    let Some([name, _]) = two("edu log", "edu_vfio") else {
        return;
    };
    let device = open_edu(&name);
    device.fill(&[0x1234_5678_9abc_def0]);
    device.dma(IOVA, BUFFER, 64, TO_DEVICE);

    device.start_log();
    assert!(device.log().is_empty());
    device.start_dma(BUFFER, IOVA + 30 * PAGE as u64 - 32, 64, TO_MEMORY);
    if device.read(DMA_CMD) & 1 == 1 {
        assert_eq!(device.log(), [29, 30]);
    }
    device.finish_dma();
    assert_eq!(device.log(), [29, 30], "once more when it is done");
    assert!(device.log().is_empty());
    assert_eq!(device.memory()[30 * PAGE / 8 - 4], 0x1234_5678_9abc_def0, "the DMA is real");
}

#[test]
fn edu_is_not_quiescent_before_its_dma_has_landed() {
    let Some([name, _]) = two("edu quiescence", "edu_vfio") else {
        return;
    };
    let device = open_edu(&name);
    device.fill(&[42]);
    device.dma(IOVA, BUFFER, 8, TO_DEVICE);
    device.start_dma(BUFFER, IOVA + 8, 8, TO_MEMORY);
    device.set_state(RUNNING_P2P);
    assert_eq!(device.memory()[1], 42);
    device.write(DMA_CMD, TO_MEMORY).unwrap_err();
}

#[test]
fn edu_moves_with_its_registers_and_its_buffer() {
    let Some([source, destination]) = two("edu migration", "edu_vfio") else {
        return;
    };
    let (source, destination) = (open_edu(&source), open_edu(&destination));
    let buffer: Vec<u64> = stream(3, 0, BUFFER_BYTES / 8).map(|(_, word)| word).collect();
    source.fill(&buffer);
    source.dma(IOVA, BUFFER, BUFFER_BYTES, TO_DEVICE);
    source.file.write_all_at(&5u32.to_le_bytes(), 0x08).unwrap();

    destination.load(&source.save());
    assert_eq!(destination.read(DMA_SRC), IOVA);
    assert_eq!(destination.read(DMA_COUNT), BUFFER_BYTES);
    let mut factorial = [0; 4];
    destination.file.read_exact_at(&mut factorial, 0x08).unwrap();
    assert_eq!(u32::from_le_bytes(factorial), 120);
    destination.dma(BUFFER, IOVA, BUFFER_BYTES, TO_MEMORY);
    assert!(destination.memory()[..buffer.len()] == buffer);

    // The source, resumed after all, has lost nothing either.
    source.set_state(RUNNING);
    source.dma(BUFFER, IOVA + PAGE as u64, BUFFER_BYTES, TO_MEMORY);
    assert!(source.memory()[512..][..buffer.len()] == buffer);
}
