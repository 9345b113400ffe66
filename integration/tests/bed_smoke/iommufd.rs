// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! iommufd: devices opened through it, and its mock domain, which the own kernel has.

use std::fs::OpenOptions;

use crate::edu::{self, BUFFER};
use crate::kernel::*;
use crate::mdev::{BURST, WRITE_AT};

const HWPT_ALLOC: u64 = 0x89;
const HWPT_SET_DIRTY_TRACKING: u64 = 0x8b;
const HWPT_GET_DIRTY_BITMAP: u64 = 0x8c;
const TEST_CMD: u64 = 0xa0;
const TEST_OP_MOCK_DOMAIN: u64 = 2;
const TEST_OP_MOCK_DOMAIN_REPLACE: u64 = 10;
const TEST_OP_DIRTY: u64 = 13;

#[test]
fn mdev_writes_through_iommufd_and_logs_it() {
    let Some([name, _]) = two("mdev on iommufd", "dirty_mdev") else { return };
    let device = Device::open_cdev("mdev", &name);
    device.start_log();
    device.write(WRITE_AT, IOVA + 3 * PAGE as u64).unwrap();
    assert_eq!(device.memory()[3 * PAGE / 8], !(IOVA + 3 * PAGE as u64));
    assert_eq!(device.log(), [3]);
    device.write(BURST, 1).unwrap_err();
}

#[test]
fn edu_moves_on_iommufd() {
    let Some([source, destination]) = two("edu on iommufd", "edu_vfio") else { return };
    let [source, destination] = [source, destination].map(|name| {
        let device = Device::open_cdev("pci", &name);
        device.enable_dma();
        device
    });
    source.fill(&[99; 8]);
    source.dma(IOVA, BUFFER, 64, edu::TO_DEVICE);
    destination.load(&source.save());
    destination.dma(BUFFER, IOVA, 64, edu::TO_MEMORY);
    assert_eq!(destination.memory()[..8], [99; 8]);
}

#[test]
fn mock_domain_tracks_what_the_kernel_pretends_was_written() {
    let Some(bed) = bed("mock domain") else { return };
    if bed["kernel"] != "own" || bed["iommu"] != "none" || bed["scenario"] == "no-vfio" {
        vfio_migration_integration::skipped(
            "mock domain",
            "only the own kernel has it, and only without an IOMMU",
        );
        return;
    }
    let iommu = OpenOptions::new().read(true).write(true).open("/dev/iommu").unwrap();
    let ioas = iommufd(&iommu, IOAS_ALLOC, [0; 2])[1];
    let mock = iommufd(&iommu, TEST_CMD, [TEST_OP_MOCK_DOMAIN << 32, ioas, 0, 0, 0, 0, 0, 0, 0]);
    let (mock_device, device) = (mock[2] & 0xffff_ffff, mock[3] & 0xffff_ffff);
    let hwpt = iommufd(&iommu, HWPT_ALLOC, [2 << 32, device | ioas << 32, 0, 0, 0, 0])[2];
    let replace = [TEST_OP_MOCK_DOMAIN_REPLACE << 32, mock_device, hwpt, 0, 0, 0, 0, 0, 0];
    iommufd(&iommu, TEST_CMD, replace);
    let (memory, size) = (anonymous_memory(), (PAGES * PAGE) as u64);
    iommufd(&iommu, IOAS_MAP, [7 << 32, ioas, memory.addr() as u64, size, IOVA]);
    iommufd(&iommu, HWPT_SET_DIRTY_TRACKING, [1 << 32, hwpt]);

    // The mock domain's pages are half as large as the machine's.
    let (half, mut written, mut dirty) = (PAGE as u64 / 2, [0u64; PAGES / 32], [0u64; PAGES / 64]);
    for page in [0, 1, 6, 100, 511] {
        written[page / 64] |= 1 << (page % 64);
    }
    let written = (&raw mut written).addr() as u64;
    iommufd(&iommu, TEST_CMD, [TEST_OP_DIRTY << 32, hwpt, 0, IOVA, size, half, written, 0, 0]);
    let get = [hwpt << 32, 0, IOVA, size, PAGE as u64, (&raw mut dirty).addr() as u64];
    iommufd(&iommu, HWPT_GET_DIRTY_BITMAP, get);
    assert_eq!(set_bits(&dirty), [0, 3, 50, 255]);
}
