// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! `memory-ranges` as guest memory: one mapping of the whole file, however many ranges of memory are in it.
//!
//! A process has 65,530 mappings as a rule (`vm.max_map_count`), and a VM whose memory was plugged piece by piece has more ranges.

use std::fs::File;
use std::sync::Arc;

use rustix::io::Errno;
use vm_memory::bitmap::BS;
use vm_memory::guest_memory::Error as GuestMemoryError;
use vm_memory::mmap::{MmapRegion, MmapRegionBuilder, MmapRegionError};
use vm_memory::{
    FileOffset, GuestAddress, GuestMemoryRegion, GuestMemoryRegionBytes, GuestRegionCollection, GuestUsize,
    MemoryRegionAddress, VolatileMemory, VolatileSlice,
};

use super::placement::{Extent, Placement};
use crate::range::GpaRange;

/// The memory of a snapshot, to be read.
pub type PlacedMemory = GuestRegionCollection<PlacedRegion>;

/// A range of guest memory, a part of a mapped file.
#[derive(Debug)]
pub struct PlacedRegion {
    whole: Arc<MmapRegion<()>>,
    /// Where in the mapping the range begins; it ends within it.
    offset: usize,
    range: GpaRange,
}

impl PlacedRegion {
    fn new(whole: &Arc<MmapRegion<()>>, extent: Extent) -> Option<Self> {
        let offset = usize::try_from(extent.offset).ok()?;
        let end = usize::try_from(extent.offset.checked_add(extent.range.len())?).ok()?;
        (end <= whole.size()).then(|| Self { whole: Arc::clone(whole), offset, range: extent.range })
    }
}

impl GuestMemoryRegion for PlacedRegion {
    type B = ();

    fn len(&self) -> GuestUsize {
        self.range.len()
    }

    fn start_addr(&self) -> GuestAddress {
        GuestAddress(self.range.start())
    }

    fn bitmap(&self) -> BS<'_, Self::B> {}

    fn get_host_address(&self, address: MemoryRegionAddress) -> Result<*mut u8, GuestMemoryError> {
        let inside = self.check_address(address).and_then(|inside| usize::try_from(inside.0).ok());
        let inside = inside.ok_or(GuestMemoryError::InvalidBackendAddress)?;
        Ok(self.whole.as_ptr().wrapping_add(self.offset + inside))
    }

    fn get_slice(
        &self,
        offset: MemoryRegionAddress,
        count: usize,
    ) -> Result<VolatileSlice<'_, BS<'_, Self::B>>, GuestMemoryError> {
        let outside = || GuestMemoryError::InvalidBackendAddress;
        let end = offset.0.checked_add(count as u64).filter(|&end| end <= self.range.len());
        let offset = end.and_then(|_| usize::try_from(offset.0).ok()).ok_or_else(outside)?;
        Ok(self.whole.get_slice(self.offset + offset, count)?)
    }
}

impl GuestMemoryRegionBytes for PlacedRegion {}

/// Maps `file`, which holds memory as `placement` says.
///
/// # Errors
/// There is no memory, or the file system maps no files.
pub(super) fn map(file: &Arc<File>, placement: &Placement) -> Result<Vec<PlacedRegion>, MmapRegionError> {
    let size = usize::try_from(placement.bytes()).map_err(|_| MmapRegionError::InvalidOffsetLength)?;
    let map = |flags| {
        MmapRegionBuilder::new(size)
            .with_file_offset(FileOffset::from_arc(Arc::clone(file), 0))
            .with_mmap_prot(libc::PROT_READ)
            .with_mmap_flags(flags | libc::MAP_NORESERVE)
            .build()
    };
    // Some file systems share no mappings; to read, a private one does as well.
    let whole = match map(libc::MAP_SHARED) {
        Err(MmapRegionError::Mmap(error)) if error.raw_os_error() == Some(Errno::NODEV.raw_os_error()) => {
            map(libc::MAP_PRIVATE)
        }
        mapped => mapped,
    };
    let whole = Arc::new(whole?);
    let regions = placement.ascending().iter().map(|&extent| PlacedRegion::new(&whole, extent));
    regions.map(|region| region.ok_or(MmapRegionError::InvalidOffsetLength)).collect()
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use vm_memory::{Bytes, GuestMemoryBackend};

    use super::*;
    use crate::snapshot::Limits;

    #[test]
    fn c53_ranges_are_parts_of_one_mapping_and_end_where_they_end() {
        let pairs = [(0x10000, 0x1000), (0, 0x2000), (0x20000, 0x1000)];
        let placement = Placement::from_pairs(pairs, &Limits::default()).unwrap();
        let file = tempfile::tempfile().unwrap();
        for page in 0..4u8 {
            file.write_all_at(&[page + 1; 0x1000], u64::from(page) * 0x1000).unwrap();
        }
        let regions = map(&Arc::new(file), &placement).unwrap();
        assert!(regions.iter().all(|region| Arc::ptr_eq(&region.whole, &regions[0].whole)));
        let memory = PlacedMemory::from_regions(regions).unwrap();
        for (gpa, byte) in [(0, 2), (0x1fff, 3), (0x10000, 1), (0x10fff, 1), (0x20000, 4)] {
            assert_eq!(memory.read_obj::<u8>(GuestAddress(gpa)).unwrap(), byte, "{gpa:#x}");
        }
        assert!(memory.read_obj::<u8>(GuestAddress(0x2000)).is_err());
        let region = memory.find_region(GuestAddress(0x10000)).unwrap();
        assert!(region.get_slice(MemoryRegionAddress(0xfff), 1).is_ok());
        assert!(region.get_slice(MemoryRegionAddress(0xfff), 2).is_err());
        assert!(region.get_slice(MemoryRegionAddress(u64::MAX), 2).is_err());
        let whole = region.whole.as_ptr() as usize;
        assert_eq!(region.get_host_address(MemoryRegionAddress(0xfff)).unwrap() as usize, whole + 0xfff);
        assert!(region.get_host_address(MemoryRegionAddress(0x1000)).is_err());
    }
}
