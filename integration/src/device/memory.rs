// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The memory the client gave the device, mapped where it came with a file descriptor.

use std::fs::File;

use vfio_migration::vfio_user::message::{DMA_MAP_WRITEABLE, DmaMap};
use vm_memory::{FileOffset, MmapRegion, VolatileMemory};

use super::Errno;
use super::stream::PAGE_BYTES;

/// Most regions the device keeps at once.
pub(super) const MAX_DMA_MAPS: usize = 128;

/// Holds the mapped regions, in no order.
#[derive(Debug, Default)]
pub(super) struct DmaMemory {
    regions: Vec<DmaRegion>,
}

/// Is one region of IOVA space.
#[derive(Debug)]
pub(super) struct DmaRegion {
    iova: u64,
    size: u64,
    writeable: bool,
    mapping: Option<MmapRegion>,
}

impl DmaRegion {
    pub(super) fn iova(&self) -> u64 {
        self.iova
    }

    pub(super) fn size(&self) -> u64 {
        self.size
    }

    /// Tells whether the device can reach the region's bytes.
    pub(super) fn is_mapped(&self) -> bool {
        self.mapping.is_some()
    }
}

impl DmaMemory {
    /// Adds a region; without `file` the device knows it and cannot reach it.
    pub(super) fn map(&mut self, request: &DmaMap, file: Option<File>) -> Result<(), Errno> {
        let (iova, size) = (request.iova.get(), request.size.get());
        let end = iova.checked_add(size).ok_or(Errno(libc::EOVERFLOW))?;
        let page = PAGE_BYTES as u64;
        if size == 0 || !iova.is_multiple_of(page) || !size.is_multiple_of(page) {
            return Err(Errno(libc::EINVAL));
        }
        if self.regions.iter().any(|region| iova < region.iova + region.size && region.iova < end) {
            return Err(Errno(libc::EEXIST));
        }
        if self.regions.len() == MAX_DMA_MAPS {
            return Err(Errno(libc::ENOSPC));
        }
        let mapping = file.map(|file| map_file(file, request.offset.get(), size)).transpose()?;
        let writeable = request.flags.get() & DMA_MAP_WRITEABLE != 0;
        self.regions.push(DmaRegion { iova, size, writeable, mapping });
        Ok(())
    }

    /// Removes the region that is exactly `size` bytes at `iova`.
    pub(super) fn unmap(&mut self, iova: u64, size: u64) -> Result<(), Errno> {
        let index = self.regions.iter().position(|region| region.iova == iova && region.size == size);
        self.regions.swap_remove(index.ok_or(Errno(libc::ENOENT))?);
        Ok(())
    }

    pub(super) fn regions(&self) -> &[DmaRegion] {
        &self.regions
    }

    /// Writes one page; `false` when no writeable region holds it.
    pub(super) fn write_page(&self, iova: u64, page: &[u8; PAGE_BYTES]) -> bool {
        let holds = |region: &&DmaRegion| iova >= region.iova && iova - region.iova < region.size;
        let Some(region) = self.regions.iter().find(holds).filter(|region| region.writeable) else {
            return false;
        };
        let Ok(offset) = usize::try_from(iova - region.iova) else { return false };
        let Some(mapping) = &region.mapping else { return false };
        let Ok(slice) = mapping.get_slice(offset, PAGE_BYTES) else { return false };
        slice.copy_from(page);
        true
    }
}

/// Maps a part of `file`; one that reaches past its end would kill the device at the first write.
fn map_file(file: File, offset: u64, size: u64) -> Result<MmapRegion, Errno> {
    let file_bytes = file.metadata().map_err(|_| Errno(libc::EINVAL))?.len();
    if offset.checked_add(size).is_none_or(|end| end > file_bytes) {
        return Err(Errno(libc::EINVAL));
    }
    let size = usize::try_from(size).map_err(|_| Errno(libc::ENOMEM))?;
    MmapRegion::from_file(FileOffset::new(file, offset), size).map_err(|_| Errno(libc::EINVAL))
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Seek, SeekFrom};

    use super::*;

    fn request(iova: u64, size: u64) -> DmaMap {
        DmaMap { flags: 3.into(), iova: iova.into(), size: size.into(), ..DmaMap::default() }
    }

    #[test]
    fn page_lands_at_its_place_in_the_file() {
        let mut file = tempfile::tempfile().unwrap();
        file.set_len(0x4000).unwrap();
        let mut memory = DmaMemory::default();
        let mut at = request(0x10_0000, 0x2000);
        at.offset = 0x2000.into();
        memory.map(&at, Some(file.try_clone().unwrap())).unwrap();
        assert!(memory.write_page(0x10_1000, &[7; PAGE_BYTES]));
        assert!(!memory.write_page(0x10_2000, &[7; PAGE_BYTES]));
        file.seek(SeekFrom::Start(0x2fff)).unwrap();
        let mut bytes = [1; 2];
        file.read_exact(&mut bytes).unwrap();
        assert_eq!(bytes, [0, 7]);
    }

    #[test]
    fn overlaps_lies_and_partial_unmaps_are_refused() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(0x1000).unwrap();
        let mut memory = DmaMemory::default();
        let beyond = memory.map(&request(0, 0x2000), Some(file.try_clone().unwrap()));
        assert_eq!(beyond, Err(Errno(libc::EINVAL)), "past the end of the file");
        memory.map(&request(0, 0x2000), None).unwrap();
        assert_eq!(memory.map(&request(0x1000, 0x1000), Some(file)), Err(Errno(libc::EEXIST)));
        assert_eq!(memory.unmap(0, 0x1000), Err(Errno(libc::ENOENT)));
        assert!(!memory.write_page(0, &[0; PAGE_BYTES]), "no descriptor, no bytes");
        memory.unmap(0, 0x2000).unwrap();
    }
}
