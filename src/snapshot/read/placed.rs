// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! `memory-ranges` as guest memory: read from the file, not mapped.
//!
//! Reading a mapping past the end of a file that was cut off, or where the disk fails, ends the process with a signal; reading the file
//! returns an error that says why.

use std::fs::File;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use rustix::io::Errno;
use vm_memory::bitmap::BS;
use vm_memory::guest_memory::{Error as GuestMemoryError, Result};
use vm_memory::{
    AtomicAccess, Bytes, FileOffset, GuestAddress, GuestMemoryRegion, GuestRegionCollection, GuestUsize,
    MemoryRegionAddress, ReadVolatile, VolatileSlice, WriteVolatile,
};

use crate::snapshot::disk::read_named;
use crate::snapshot::format::{Extent, Placement};

/// The memory of a snapshot, to be read.
pub type PlacedMemory = GuestRegionCollection<PlacedRegion>;

/// A file that holds memory.
#[derive(Debug)]
struct Stored {
    file: Arc<File>,
    path: PathBuf,
}

/// A range of guest memory, a part of a file. It has no address in this process, and is read through its [`Bytes`].
#[derive(Debug)]
pub struct PlacedRegion {
    stored: Arc<Stored>,
    place: FileOffset,
    extent: Extent,
}

impl GuestMemoryRegion for PlacedRegion {
    type B = ();

    fn len(&self) -> GuestUsize {
        self.extent.range.len()
    }

    fn start_addr(&self) -> GuestAddress {
        GuestAddress(self.extent.range.start())
    }

    fn bitmap(&self) -> BS<'_, Self::B> {}

    fn file_offset(&self) -> Option<&FileOffset> {
        Some(&self.place)
    }
}

/// What every attempt to write gets.
fn read_only<T>() -> Result<T> {
    Err(GuestMemoryError::IOError(Errno::ROFS.into()))
}

impl Bytes<MemoryRegionAddress> for PlacedRegion {
    type E = GuestMemoryError;

    fn read(&self, buffer: &mut [u8], at: MemoryRegionAddress) -> Result<usize> {
        let left = self.len().checked_sub(at.0).ok_or(GuestMemoryError::InvalidBackendAddress)?;
        let bytes = buffer.len().min(usize::try_from(left).unwrap_or(usize::MAX));
        let Stored { file, path } = &*self.stored;
        read_named(file, || path.clone(), &mut buffer[..bytes], self.extent.offset + at.0)
            .map_err(GuestMemoryError::IOError)?;
        Ok(bytes)
    }

    fn read_slice(&self, buffer: &mut [u8], at: MemoryRegionAddress) -> Result<()> {
        let expected = buffer.len();
        match self.read(buffer, at)? {
            completed if completed < expected => Err(GuestMemoryError::PartialBuffer { expected, completed }),
            _ => Ok(()),
        }
    }

    fn write_volatile_to<F: WriteVolatile>(
        &self,
        at: MemoryRegionAddress,
        to: &mut F,
        count: usize,
    ) -> Result<usize> {
        let left = self.len().saturating_sub(at.0);
        let mut buffer = vec![0; count.min(usize::try_from(left).unwrap_or(usize::MAX))];
        self.read_slice(&mut buffer, at)?;
        Ok(to.write_volatile(&VolatileSlice::from(&mut buffer[..]))?)
    }

    fn write_all_volatile_to<F: WriteVolatile>(
        &self,
        at: MemoryRegionAddress,
        to: &mut F,
        count: usize,
    ) -> Result<()> {
        let mut buffer = vec![0; count];
        self.read_slice(&mut buffer, at)?;
        Ok(to.write_all_volatile(&VolatileSlice::from(&mut buffer[..]))?)
    }

    fn load<T: AtomicAccess>(&self, at: MemoryRegionAddress, _: Ordering) -> Result<T> {
        self.read_obj(at)
    }

    fn write(&self, _: &[u8], _: MemoryRegionAddress) -> Result<usize> {
        read_only()
    }

    fn write_slice(&self, _: &[u8], _: MemoryRegionAddress) -> Result<()> {
        read_only()
    }

    fn read_volatile_from<F: ReadVolatile>(
        &self,
        _: MemoryRegionAddress,
        _: &mut F,
        _: usize,
    ) -> Result<usize> {
        read_only()
    }

    fn read_exact_volatile_from<F: ReadVolatile>(
        &self,
        _: MemoryRegionAddress,
        _: &mut F,
        _: usize,
    ) -> Result<()> {
        read_only()
    }

    fn store<T: AtomicAccess>(&self, _: T, _: MemoryRegionAddress, _: Ordering) -> Result<()> {
        read_only()
    }
}

/// The memory that `file`, which has the name `path`, holds as `placement` says.
pub(crate) fn regions(file: &Arc<File>, path: PathBuf, placement: &Placement) -> Vec<PlacedRegion> {
    let stored = Arc::new(Stored { file: Arc::clone(file), path });
    let region = |&extent: &Extent| {
        let place = FileOffset::from_arc(Arc::clone(file), extent.offset);
        PlacedRegion { stored: Arc::clone(&stored), place, extent }
    };
    placement.ascending().iter().map(region).collect()
}

#[cfg(test)]
mod tests {
    use std::error::Error;
    use std::os::unix::fs::FileExt;

    use vm_memory::GuestMemoryBackend;

    use super::*;
    use crate::range::GpaRange;
    use crate::snapshot::SnapshotLimits;
    use crate::vm::{has_address, read_memory};

    #[test]
    fn c53_ranges_are_parts_of_one_file_and_end_where_they_end() {
        let pairs = [(0x10000, 0x1000), (0, 0x2000), (0x20000, 0x1000)];
        let placement = Placement::from_pairs(pairs, &SnapshotLimits::default()).unwrap();
        let file = tempfile::tempfile().unwrap();
        for page in 0..4u8 {
            file.write_all_at(&[page + 1; 0x1000], u64::from(page) * 0x1000).unwrap();
        }
        let file = Arc::new(file);
        let memory = PlacedMemory::from_regions(regions(&file, "stored".into(), &placement)).unwrap();
        let byte = |gpa| {
            let mut byte = [0];
            read_memory(&memory, GpaRange::new(gpa, 1).unwrap(), &mut byte).map(|()| byte[0])
        };
        for (gpa, expected) in [(0, 2), (0x1fff, 3), (0x10000, 1), (0x10fff, 1), (0x20000, 4)] {
            assert_eq!(byte(gpa).unwrap(), expected, "{gpa:#x}");
            assert!(!has_address(&memory, gpa));
        }
        assert!(byte(0x2000).unwrap_err().source.to_string().contains("invalid guest address"));
        let region = memory.find_region(GuestAddress(0x10000)).unwrap();
        let mut copied = Vec::new();
        assert_eq!(region.write_volatile_to(MemoryRegionAddress(0xfff), &mut copied, 9).unwrap(), 1);
        assert!(region.write_all_volatile_to(MemoryRegionAddress(0xfff), &mut copied, 2).is_err());
        assert!(region.read_slice(&mut [0], MemoryRegionAddress(u64::MAX)).is_err());
        assert!(region.write_slice(&[1], MemoryRegionAddress(0)).is_err());
        assert_eq!(region.load::<u8>(MemoryRegionAddress(0), Ordering::Relaxed).unwrap(), 1);

        file.set_len(0x1800).unwrap();
        let error = byte(0x1000).unwrap_err();
        assert_eq!(error.to_string(), "Cannot read memory 0x1000..0x1001");
        assert_eq!(error.source.to_string(), "Cannot read stored");
        let cut_off = error.source.source().unwrap().to_string();
        assert_eq!(cut_off, "File was cut off at 6144 bytes of 8193");
    }
}
