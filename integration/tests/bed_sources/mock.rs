// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The mock domain of the own kernel: a page table without a device, of which the kernel pretends that pages were written.

use std::fs::{File, OpenOptions};
use std::os::fd::{AsFd, BorrowedFd};

use crate::bed::BYTES;
use crate::kernel::{IOAS_ALLOC, IOAS_MAP, IOVA, PAGE, PAGES, anonymous_memory, bed, iommufd};
use vfio_migration::source::HwptLog;
use vfio_migration_integration::skipped;

const HWPT_ALLOC: u64 = 0x89;
const TEST_CMD: u64 = 0xa0;
const TEST_OP_MOCK_DOMAIN: u64 = 2;
const TEST_OP_MOCK_DOMAIN_REPLACE: u64 = 10;
const TEST_OP_DIRTY: u64 = 13;

/// The mock domain's pages are half as large as the machine's.
const MOCK_PAGE: u64 = PAGE as u64 / 2;

pub(crate) struct Mock {
    pub(crate) iommu: File,
    pub(crate) hwpt: u32,
}

impl Mock {
    /// A page table with the devices' memory mapped, allocated for dirty tracking if `tracking`.
    pub(crate) fn new(test: &str, tracking: bool) -> Option<Self> {
        let bed = bed(test)?;
        if bed["kernel"] != "own" || bed["iommu"] != "none" || bed["scenario"] == "no-vfio" {
            skipped(test, "only the own kernel has the mock domain, and only without an IOMMU");
            return None;
        }
        let iommu = OpenOptions::new().read(true).write(true).open("/dev/iommu").unwrap();
        let ioas = iommufd(&iommu, IOAS_ALLOC, [0; 2])[1];
        let mock = iommufd(&iommu, TEST_CMD, [TEST_OP_MOCK_DOMAIN << 32, ioas, 0, 0, 0, 0, 0, 0, 0]);
        let (mock_device, device) = (mock[2] & 0xffff_ffff, mock[3] & 0xffff_ffff);
        let flags = if tracking { 2 << 32 } else { 0 };
        let hwpt = iommufd(&iommu, HWPT_ALLOC, [flags, device | ioas << 32, 0, 0, 0, 0])[2];
        let replace = [TEST_OP_MOCK_DOMAIN_REPLACE << 32, mock_device, hwpt, 0, 0, 0, 0, 0, 0];
        iommufd(&iommu, TEST_CMD, replace);
        let memory = anonymous_memory().addr() as u64;
        iommufd(&iommu, IOAS_MAP, [7 << 32, ioas, memory, BYTES, IOVA]);
        Some(Self { iommu, hwpt: u32::try_from(hwpt).unwrap() })
    }

    pub(crate) fn log(&self) -> HwptLog<BorrowedFd<'_>> {
        HwptLog::new("page-table", self.iommu.as_fd(), self.hwpt)
    }

    /// Pretends that these of the mock domain's pages were written.
    pub(crate) fn write(&self, mock_pages: &[usize]) {
        let mut written = [0u64; PAGES / 32];
        for page in mock_pages {
            written[page / 64] |= 1 << (page % 64);
        }
        let pointer = written.as_mut_ptr().addr() as u64;
        let dirty = [TEST_OP_DIRTY << 32, self.hwpt.into(), 0, IOVA, BYTES, MOCK_PAGE, pointer, 0, 0];
        iommufd(&self.iommu, TEST_CMD, dirty);
    }
}
