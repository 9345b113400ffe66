// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! iommufd's mock domain: a page table whose dirty bits work on any machine, on a kernel built for it.
//!
//! What it is not: there is no device behind it, so nothing writes by itself and there is no device state. Whoever writes tells
//! the domain which page was written, and only while tracking is on. Its IOVA space begins at 16 MiB and ends at 2 GiB, so RAM
//! cannot be mapped one to one.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use anyhow::Context;
use vfio_migration::iova::{IovaMap, Mapping};
use vfio_migration::range::{GpaRange, IovaRange};

use crate::vmm::{Memory, PAGE_BYTES, PAGE_LEN, RegionBacking};

const IOAS_ALLOC: u64 = 0x81;
const IOAS_MAP: u64 = 0x85;
const HWPT_ALLOC: u64 = 0x89;
const TEST_CMD: u64 = 0xa0;
const TEST_OP_MOCK_DOMAIN: u64 = 2;
const TEST_OP_MOCK_DOMAIN_REPLACE: u64 = 10;
const TEST_OP_DIRTY: u64 = 13;
const HWPT_DIRTY_TRACKING: u64 = 2;
const MAP_FIXED_WRITEABLE_READABLE: u64 = 7;

/// First IOVA of the domain's aperture.
const APERTURE_START: u64 = 16 << 20;
/// Its pages are half as large as the machine's.
const MOCK_PAGE_BYTES: u64 = PAGE_BYTES / 2;

/// A mock domain with a machine's RAM mapped, region after region, with a gap between them.
pub struct MockDomain {
    iommufd: Arc<File>,
    hwpt_id: u32,
    mapped: Vec<(u64, RegionBacking)>,
    _memory: Memory,
}

impl MockDomain {
    /// Makes the domain.
    ///
    /// # Errors
    /// The kernel has none, or refuses.
    pub fn open(memory: &Memory) -> anyhow::Result<Self> {
        let iommufd = OpenOptions::new().read(true).write(true).open("/dev/iommu");
        let iommufd = Arc::new(iommufd.context("Cannot open /dev/iommu")?);
        let ioas = call(&iommufd, IOAS_ALLOC, [0; 2])?[1];
        let mock = call(&iommufd, TEST_CMD, [TEST_OP_MOCK_DOMAIN << 32, ioas, 0, 0, 0, 0, 0, 0, 0]);
        let mock = mock.context("Cannot make a mock domain")?;
        let (standin, device) = (mock[2] & 0xffff_ffff, mock[3] & 0xffff_ffff);
        let allocate = [HWPT_DIRTY_TRACKING << 32, device | ioas << 32, 0, 0, 0, 0];
        let hwpt = call(&iommufd, HWPT_ALLOC, allocate)?[2] & 0xffff_ffff;
        let replace = [TEST_OP_MOCK_DOMAIN_REPLACE << 32, standin, hwpt, 0, 0, 0, 0, 0, 0];
        call(&iommufd, TEST_CMD, replace)?;

        let (mut next, mut mapped) = (APERTURE_START, Vec::new());
        for region in memory.regions() {
            let map = [MAP_FIXED_WRITEABLE_READABLE << 32, ioas, region.userspace_addr, region.len, next];
            call(&iommufd, IOAS_MAP, map).context("Cannot map RAM in the mock domain")?;
            mapped.push((next, region.clone()));
            next += region.len + (1 << 20);
        }
        Ok(Self { iommufd, hwpt_id: u32::try_from(hwpt)?, mapped, _memory: memory.clone() })
    }

    /// The iommufd.
    pub fn iommufd(&self) -> &Arc<File> {
        &self.iommufd
    }

    /// The page table's object number.
    pub fn hwpt_id(&self) -> u32 {
        self.hwpt_id
    }

    /// Where its IOVAs lead.
    ///
    /// # Errors
    /// None, for mappings that the kernel took.
    pub fn iova_map(&self) -> anyhow::Result<IovaMap> {
        let mut map = IovaMap::journal();
        for (iova, region) in &self.mapped {
            let gpa = GpaRange::new(region.gpa, region.len)?;
            map.map(Mapping::new(IovaRange::new(*iova, region.len)?, gpa)?)?;
        }
        Ok(map)
    }

    /// Writes a page as a device would: past everyone's bitmap but the domain's.
    ///
    /// # Errors
    /// The address is not RAM, or the kernel refuses.
    pub fn write_page(&self, gpa: u64, page: &[u8; PAGE_LEN]) -> io::Result<()> {
        let holds = |region: &RegionBacking| (region.gpa..region.gpa + region.len).contains(&gpa);
        let (iova, region) =
            self.mapped.iter().find(|(_, region)| holds(region)).ok_or(io::ErrorKind::InvalidInput)?;
        let offset = gpa - region.gpa;
        region.file.write_all_at(page, region.offset + offset)?;
        match self.tell_dirty(iova + offset) {
            // Tracking is off.
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => Ok(()),
            told => told,
        }
    }

    fn tell_dirty(&self, iova: u64) -> io::Result<()> {
        let both_halves = 0b11u64;
        let pointer = (&raw const both_halves).addr() as u64;
        let hwpt = u64::from(self.hwpt_id);
        let dirty = [TEST_OP_DIRTY << 32, hwpt, 0, iova, PAGE_BYTES, MOCK_PAGE_BYTES, pointer, 0, 0];
        call(&self.iommufd, TEST_CMD, dirty).map(drop)
    }
}

/// A call of iommufd, whose structures all begin with their size; returns the structure it wrote.
#[expect(unsafe_code, reason = "the mock domain's calls are in no crate")]
fn call<const N: usize>(iommufd: &File, number: u64, mut words: [u64; N]) -> io::Result<[u64; N]> {
    words[0] |= 8 * N as u64;
    // SAFETY: `words` is the structure of this call, as long as it says; what it points to is alive for the call, or is guest
    // memory that is mapped as long as the domain.
    let ret = unsafe { libc::ioctl(iommufd.as_raw_fd(), 0x3b00 + number, words.as_mut_ptr()) };
    if ret < 0 { Err(io::Error::last_os_error()) } else { Ok(words) }
}
