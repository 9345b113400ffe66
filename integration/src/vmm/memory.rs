// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Guest RAM: where its regions lie and the memfds behind them.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd, FromRawFd};
use std::sync::Arc;

use thiserror::Error;
use vfio_migration::source::SummaryBitmap;
use vm_memory::mmap::FromRangesError;
use vm_memory::{FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryError, GuestMemoryMmap};

/// Bytes of one page of an x86-64 guest, which is also the host page: KVM's dirty bits stand for it.
pub const PAGE_BYTES: u64 = PAGE_LEN as u64;
/// The same, as the length of a buffer.
pub const PAGE_LEN: usize = 4096;
/// First address of the x86 hole, where no RAM may lie (3 GiB).
pub const HOLE_START: u64 = 0xC000_0000;
/// First address above the x86 hole (4 GiB).
pub const HOLE_END: u64 = 0x1_0000_0000;
/// Least RAM of a machine.
pub const MIN_RAM_BYTES: u64 = 16 << 20;
/// Most RAM of a machine: what the page tables that fit below 1 MiB can map.
pub const MAX_RAM_BYTES: u64 = 128 << 30;

/// Most RAM of a machine that leaves most of it unpopulated, for which no guest's page tables have to be made.
pub const MAX_SPARSE_BYTES: u64 = 16 << 40;

/// What the guest page tables map with one entry; regions start at a multiple of it.
const LARGE_PAGE_BYTES: u64 = 2 << 20;

/// What can go wrong when guest RAM is laid out, created or adopted.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum MemoryError {
    /// The size is no whole number of pages, or outside the limits.
    #[error(
        "RAM of {total_bytes} bytes is not a whole number of {PAGE_BYTES}-byte pages between {} MiB and {} GiB",
        MIN_RAM_BYTES >> 20, .most_bytes >> 30
    )]
    Size {
        /// The size that was asked for.
        total_bytes: u64,
        /// The most that there can be.
        most_bytes: u64,
    },
    /// The host has less memory to give than was asked for.
    #[error(
        "RAM of {total_bytes:#x} bytes exceeds the {available_bytes:#x} bytes that the host has available"
    )]
    HostTooSmall {
        /// The size that was asked for.
        total_bytes: u64,
        /// What the host can still give.
        available_bytes: u64,
    },
    /// A memfd could not be created or sized.
    #[error("Cannot create a memfd of {len:#x} bytes for the region at {gpa:#x}")]
    Memfd {
        /// First address of the region.
        gpa: u64,
        /// Bytes of the region.
        len: u64,
        /// What the kernel answered.
        source: io::Error,
    },
    /// The number of adopted files is not the number of regions.
    #[error("Number of memory files, {files}, is not that of the regions, {regions}")]
    FileCount {
        /// Files passed in.
        files: usize,
        /// Regions of the layout.
        regions: usize,
    },
    /// An adopted file does not have its region's size.
    #[error("The memory file for the region at {gpa:#x} has {found:#x} bytes, not {expected:#x}")]
    FileSize {
        /// First address of the region.
        gpa: u64,
        /// Bytes of the file.
        found: u64,
        /// Bytes of the region.
        expected: u64,
    },
    /// An adopted file could not be examined.
    #[error("Cannot read the size of the memory file for the region at {gpa:#x}")]
    FileStat {
        /// First address of the region.
        gpa: u64,
        /// What the kernel answered.
        source: io::Error,
    },
    /// The regions could not be mapped.
    #[error("Cannot map guest memory")]
    Map(#[from] FromRangesError),
    /// A region's host address could not be found.
    #[error("Cannot find the host address of the region at {gpa:#x}")]
    HostAddress {
        /// First address of the region.
        gpa: u64,
        /// Why not.
        source: GuestMemoryError,
    },
}

/// Where RAM is cut in two.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Split {
    /// The last quarter lies at 4 GiB whatever the size, so that small machines have two regions as well.
    #[default]
    QuarterAbove,
    /// As real machines have it: only what does not fit below 3 GiB lies at 4 GiB.
    AtTheHole,
}

/// The guest-physical ranges that are RAM: sorted, disjoint, outside the x86 hole.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RamLayout {
    regions: Vec<Range<u64>>,
    sparse: bool,
}

impl RamLayout {
    /// Lays out `total_bytes` of RAM.
    ///
    /// # Errors
    /// [`MemoryError::Size`] for a size that is no multiple of a page or outside
    /// [`MIN_RAM_BYTES`]`..=`[`MAX_RAM_BYTES`].
    pub fn new(total_bytes: u64, split: Split) -> Result<Self, MemoryError> {
        Self::lay_out(total_bytes, split, false)
    }

    /// Lays out `total_bytes` of RAM that stays unpopulated but for the pages that somebody writes, and a few MiB that nobody does:
    /// it may be more than the host has.
    ///
    /// # Errors
    /// As [`RamLayout::new`], with the most at [`MAX_SPARSE_BYTES`].
    pub fn sparse(total_bytes: u64, split: Split) -> Result<Self, MemoryError> {
        Self::lay_out(total_bytes, split, true)
    }

    fn lay_out(total_bytes: u64, split: Split, sparse: bool) -> Result<Self, MemoryError> {
        let most_bytes = if sparse { MAX_SPARSE_BYTES } else { MAX_RAM_BYTES };
        if !(MIN_RAM_BYTES..=most_bytes).contains(&total_bytes) || !total_bytes.is_multiple_of(PAGE_BYTES) {
            return Err(MemoryError::Size { total_bytes, most_bytes });
        }
        let wanted_below = match split {
            Split::QuarterAbove => (total_bytes - total_bytes / 4).next_multiple_of(LARGE_PAGE_BYTES),
            Split::AtTheHole => total_bytes,
        };
        let below = wanted_below.min(HOLE_START);
        let above = total_bytes - below;
        let mut regions = Vec::with_capacity(2);
        regions.push(0..below);
        if above > 0 {
            regions.push(HOLE_END..HOLE_END + above);
        }
        Ok(Self { regions, sparse })
    }

    /// Whether most of it stays unpopulated.
    pub fn is_sparse(&self) -> bool {
        self.sparse
    }

    /// The regions in ascending order.
    pub fn regions(&self) -> &[Range<u64>] {
        &self.regions
    }

    /// Bytes of all regions together.
    pub fn total_bytes(&self) -> u64 {
        self.regions.iter().map(|region| region.end - region.start).sum()
    }
}

/// One region of guest RAM and the file behind it.
#[derive(Debug, Clone)]
pub struct RegionBacking {
    /// First guest-physical address.
    pub gpa: u64,
    /// Bytes.
    pub len: u64,
    /// The memfd: another process that maps it sees the same memory.
    pub file: Arc<File>,
    /// Where in the file the region starts.
    pub offset: u64,
    /// The KVM memory slot of the region.
    pub slot: u32,
    /// Where this process has the region mapped.
    pub userspace_addr: u64,
}

impl AsFd for RegionBacking {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

/// Guest RAM in memfds, mapped shared, with a bitmap of what this process writes to it.
///
/// A clone is another handle on the same memory.
#[derive(Debug, Clone)]
pub struct Memory {
    layout: RamLayout,
    guest: GuestMemoryMmap<SummaryBitmap>,
    regions: Vec<RegionBacking>,
}

impl Memory {
    /// Creates RAM that reads zero, one close-on-exec memfd a region.
    ///
    /// # Errors
    /// [`MemoryError::HostTooSmall`] when the host has less memory available; otherwise what the kernel answered.
    pub fn create(layout: &RamLayout) -> Result<Self, MemoryError> {
        let total_bytes = layout.total_bytes();
        if let Some(available_bytes) = host_available_bytes()
            && total_bytes > available_bytes
            && !layout.sparse
        {
            return Err(MemoryError::HostTooSmall { total_bytes, available_bytes });
        }
        let files = layout.regions.iter().map(create_memfd).collect::<Result<Vec<_>, _>>()?;
        Self::adopt(layout, files)
    }

    /// Maps RAM that another process created: one file a region, in the order of the layout.
    ///
    /// # Errors
    /// A wrong number of files, a file that does not have its region's size, or a mapping that failed.
    pub fn adopt(layout: &RamLayout, files: Vec<File>) -> Result<Self, MemoryError> {
        if files.len() != layout.regions.len() {
            return Err(MemoryError::FileCount { files: files.len(), regions: layout.regions.len() });
        }
        let files: Vec<Arc<File>> = files.into_iter().map(Arc::new).collect();
        let mut mappings = Vec::with_capacity(files.len());
        for (range, file) in layout.regions.iter().zip(&files) {
            check_file_size(range, file)?;
            let backing = FileOffset::from_arc(Arc::clone(file), 0);
            mappings.push((GuestAddress(range.start), host_len(range), Some(backing)));
        }
        let guest = GuestMemoryMmap::from_ranges_with_files(&mappings)?;
        let regions = (0u32..)
            .zip(layout.regions.iter().zip(files))
            .map(|(slot, (range, file))| describe_region(&guest, slot, range, file))
            .collect::<Result<Vec<_>, _>>()?;
        Ok(Self { layout: layout.clone(), guest, regions })
    }

    /// The layout this memory was made for.
    pub fn layout(&self) -> &RamLayout {
        &self.layout
    }

    /// The memory as vm-memory sees it. Writes through it are recorded in its bitmap.
    pub fn guest(&self) -> &GuestMemoryMmap<SummaryBitmap> {
        &self.guest
    }

    /// The regions in ascending order, with their files.
    pub fn regions(&self) -> &[RegionBacking] {
        &self.regions
    }
}

fn host_len(range: &Range<u64>) -> usize {
    usize::try_from(range.end - range.start).expect("RAM is limited to far less than a 64-bit address space")
}

fn describe_region(
    guest: &GuestMemoryMmap<SummaryBitmap>,
    slot: u32,
    range: &Range<u64>,
    file: Arc<File>,
) -> Result<RegionBacking, MemoryError> {
    let gpa = range.start;
    let hva = guest
        .get_host_address(GuestAddress(gpa))
        .map_err(|source| MemoryError::HostAddress { gpa, source })?;
    Ok(RegionBacking { gpa, len: range.end - gpa, file, offset: 0, slot, userspace_addr: hva as u64 })
}

fn check_file_size(range: &Range<u64>, file: &File) -> Result<(), MemoryError> {
    let (gpa, expected) = (range.start, range.end - range.start);
    let found = file.metadata().map_err(|source| MemoryError::FileStat { gpa, source })?.len();
    if found == expected { Ok(()) } else { Err(MemoryError::FileSize { gpa, found, expected }) }
}

#[expect(unsafe_code, reason = "memfd_create has no safe wrapper among our dependencies")]
fn create_memfd(range: &Range<u64>) -> Result<File, MemoryError> {
    let (gpa, len) = (range.start, range.end - range.start);
    let failed = |source| MemoryError::Memfd { gpa, len, source };
    // SAFETY: The name is a NUL-terminated literal; the call takes nothing else of ours.
    let fd = unsafe { libc::memfd_create(c"guest-ram".as_ptr(), libc::MFD_CLOEXEC) };
    if fd < 0 {
        return Err(failed(io::Error::last_os_error()));
    }
    // SAFETY: The kernel just made this descriptor for us and nobody else knows it.
    let file = unsafe { File::from_raw_fd(fd) };
    file.set_len(len).map_err(failed)?;
    Ok(file)
}

/// Bytes that the host can give without swapping, if it says so.
pub(crate) fn host_available_bytes() -> Option<u64> {
    let report = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = report.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    kib.checked_mul(1024)
}
