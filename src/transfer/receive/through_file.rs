// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Bytes for memory that nobody has touched, by way of the file that the memory is a shared mapping of.
//!
//! A page that is written to its file as a whole is neither zeroed first nor faulted in: that takes the kernel about half the time.
//! Whoever touches the page later has it mapped then.

use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::FileExt;
use std::sync::{Arc, Mutex};

use rustix::fs::{OFlags, SealFlags, SeekFrom};
use rustix::io::Errno;
use vm_memory::bitmap::Bitmap;
use vm_memory::{GuestAddress, GuestMemoryBackend};

use crate::range::{GpaRange, subtract};
use crate::sync;
use crate::vm::{Backing, Behind};

/// Bytes that are on their way from the connection to the file: few enough to stay in a cache.
const BUFFER_BYTES: usize = 256 << 10;

/// The parts of a VM's memory that can be written through their files.
#[derive(Debug, Default)]
pub(super) struct MemoryFiles {
    parts: Vec<Part>,
}

#[derive(Debug)]
struct Part {
    gpa: GpaRange,
    file: Arc<File>,
    /// Where in the file the part begins.
    offset: u64,
    /// Held while it is written: the kernel has one write at a time, and those who wait for it there spin.
    turn: Mutex<()>,
    /// Memory that was a hole when it was looked at, and was not filled since: where a file is allocated but not written, the kernel
    /// takes long to find that out.
    holes: Mutex<Vec<GpaRange>>,
}

/// Most holes of a part that are remembered.
const MOST_HOLES: usize = 64;

impl Part {
    /// Whether all of `range` is a hole, which is about to be filled.
    fn takes_hole(&self, range: GpaRange) -> bool {
        let mut holes = sync::lock(&self.holes);
        if !holes.iter().any(|hole| hole.covers(range)) {
            let Some(found) = self.find_hole(range.start()).filter(|found| found.covers(range)) else {
                return false;
            };
            subtract(&mut holes, found);
            holes.push(found);
        }
        subtract(&mut holes, range);
        // The oldest are forgotten.
        let excess = holes.len().saturating_sub(MOST_HOLES);
        holes.drain(..excess);
        true
    }

    /// The hole that begins at `gpa`.
    fn find_hole(&self, gpa: u64) -> Option<GpaRange> {
        let offset = self.offset + (gpa - self.gpa.start());
        let end = match rustix::fs::seek(&*self.file, SeekFrom::Data(offset)) {
            Ok(data) => self.gpa.end().min(gpa.saturating_add(data.saturating_sub(offset))),
            Err(Errno::NXIO) => self.gpa.end(),
            Err(_) => return None,
        };
        GpaRange::from_bounds(gpa, end).ok()
    }
}

/// A stretch of a file that is one hole.
#[derive(Debug, Clone, Copy)]
pub(super) struct Hole<'a> {
    part: &'a Part,
    offset: u64,
    gpa: GpaRange,
}

impl MemoryFiles {
    /// Takes the files of `backing` that live in memory and may be written.
    pub(super) fn new(backing: Backing) -> Self {
        let parts = backing.into_parts().into_iter().filter_map(|(gpa, behind)| match behind {
            Behind::SharedFile { file, offset } if takes_bytes(&file) => {
                Some(Part { gpa, file, offset, turn: Mutex::default(), holes: Mutex::default() })
            }
            _ => None,
        });
        Self { parts: parts.collect() }
    }

    /// Whether all of `range` lies in one of them.
    pub(super) fn cover(&self, range: GpaRange) -> bool {
        self.part_of(range).is_some()
    }

    /// Returns where `range` lies in a file, if nothing of it was ever written, nor returned before.
    pub(super) fn hole(&self, range: GpaRange) -> Option<Hole<'_>> {
        let part = self.part_of(range)?;
        let offset = part.offset + (range.start() - part.gpa.start());
        part.takes_hole(range).then_some(Hole { part, offset, gpa: range })
    }

    fn part_of(&self, range: GpaRange) -> Option<&Part> {
        self.parts.iter().find(|part| part.gpa.covers(range))
    }
}

impl Hole<'_> {
    /// Fills it with bytes from `from`, and marks them in the dirty bitmap of `memory`, whose file it is in.
    ///
    /// `buffer` is kept for the next one.
    pub(super) fn fill<M: GuestMemoryBackend>(
        &self,
        memory: &M,
        from: &mut impl Read,
        buffer: &mut Vec<u8>,
    ) -> io::Result<()> {
        buffer.resize(BUFFER_BYTES, 0);
        let mut offset = self.offset;
        for piece in self.gpa.pieces(BUFFER_BYTES as u64) {
            let bytes = usize::try_from(piece.len()).unwrap_or(BUFFER_BYTES);
            from.read_exact(&mut buffer[..bytes])?;
            {
                let _turn = sync::lock(&self.part.turn);
                self.part.file.write_all_at(&buffer[..bytes], offset)?;
            }
            for slice in memory.get_slices(GuestAddress(piece.start()), bytes) {
                let slice = slice.map_err(io::Error::other)?;
                slice.bitmap().mark_dirty(0, slice.len());
            }
            offset += piece.len();
        }
        Ok(())
    }
}

/// Whether `file` lives in memory, as a memfd does, and what is written to it gets there: huge pages take no write, nor does a
/// descriptor that was opened to be read, or a seal that leaves writing to the mappings there are.
fn takes_bytes(file: &File) -> bool {
    let in_memory = rustix::fs::fstatfs(file).is_ok_and(|stat| stat.f_type == libc::TMPFS_MAGIC);
    let writable = rustix::fs::fcntl_getfl(file)
        .is_ok_and(|flags| flags & OFlags::RWMODE != OFlags::RDONLY && !flags.contains(OFlags::APPEND));
    let sealed = rustix::fs::fcntl_get_seals(file)
        .is_ok_and(|seals| seals.intersects(SealFlags::WRITE | SealFlags::FUTURE_WRITE));
    in_memory && writable && !sealed
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsRawFd;

    use rustix::fs::{MemfdFlags, fcntl_add_seals, memfd_create};
    use vm_memory::bitmap::AtomicBitmap;
    use vm_memory::{Bytes, FileOffset, GuestMemoryMmap, GuestMemoryRegion};

    use super::*;

    const MIB: u64 = 1 << 20;

    fn memfd() -> File {
        let file =
            File::from(memfd_create("guest-ram", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).unwrap());
        file.set_len(4 * MIB).unwrap();
        file
    }

    fn range(start: u64, end: u64) -> GpaRange {
        GpaRange::from_bounds(start, end).unwrap()
    }

    fn files_of(file: File) -> MemoryFiles {
        MemoryFiles::new(Backing::default().shared_file(range(MIB, 4 * MIB), Arc::new(file), MIB))
    }

    #[test]
    fn bytes_go_where_the_mapping_shows_them_and_are_marked() {
        let file = Arc::new(memfd());
        let regions = [(GuestAddress(MIB), 3 << 20, Some(FileOffset::from_arc(Arc::clone(&file), MIB)))];
        let memory = GuestMemoryMmap::<AtomicBitmap>::from_ranges_with_files(regions).unwrap();
        let files = MemoryFiles::new(Backing::of_mmap(&memory));
        let bytes: Vec<u8> = (0..MIB + 4096).map(|at| (at % 251) as u8).collect();
        let wanted = range(2 * MIB - 4096, 3 * MIB);
        let hole = files.hole(wanted).unwrap();
        hole.fill(&memory, &mut &bytes[..], &mut Vec::new()).unwrap();
        let mut found = vec![0; bytes.len()];
        memory.read_slice(&mut found, GuestAddress(wanted.start())).unwrap();
        assert_eq!(found, bytes);
        let region = memory.iter().next().unwrap();
        let is_dirty = |gpa: u64| region.bitmap().dirty_at(usize::try_from(gpa - MIB).unwrap());
        assert!(is_dirty(wanted.start()) && is_dirty(wanted.end() - 1));
        assert!(!is_dirty(wanted.start() - 1) && !is_dirty(wanted.end()));
        assert!(files.hole(wanted).is_none() && files.hole(range(2 * MIB - 8192, 2 * MIB)).is_none());
        assert!(files.hole(range(3 * MIB, 4 * MIB)).is_some());
        hole.fill(&memory, &mut &bytes[1..], &mut Vec::new()).unwrap_err();
    }

    #[test]
    fn a_hole_is_looked_for_once_and_no_part_of_it_is_given_out_twice() {
        let file = memfd();
        let written = file.try_clone().unwrap();
        let files = files_of(file);
        assert!(files.hole(range(MIB, 2 * MIB)).is_some());
        // Whether that is noticed tells whether it was looked for again.
        written.write_all_at(&[1], 3 * MIB).unwrap();
        assert!(files.hole(range(3 * MIB, 3 * MIB + 4096)).is_some());
        assert!(files.hole(range(3 * MIB, 3 * MIB + 4096)).is_none());
        assert!(files.hole(range(2 * MIB, 3 * MIB)).is_some());
        for part in 0..2 * MOST_HOLES as u64 {
            let _each_is_apart_from_the_last =
                files.hole(range(3 * MIB + 8192 * (part + 1), 3 * MIB + 8192 * (part + 1) + 4096));
        }
        assert!(files.parts[0].holes.lock().unwrap().len() <= MOST_HOLES);
    }

    #[test]
    fn what_lies_elsewhere_or_takes_no_bytes_is_left_to_the_mapping() {
        let files = files_of(memfd());
        assert!(files.cover(range(MIB, 4 * MIB)) && !files.cover(range(0, 2 * MIB)));
        assert!(files.hole(range(3 * MIB, 5 * MIB)).is_none());

        let sealed = memfd();
        fcntl_add_seals(&sealed, SealFlags::FUTURE_WRITE).unwrap();
        let writable = memfd();
        let read_only = File::open(format!("/proc/self/fd/{}", writable.as_raw_fd())).unwrap();
        let on_disk = tempfile::tempfile_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        on_disk.set_len(4 * MIB).unwrap();
        for file in [sealed, read_only, on_disk] {
            assert!(!files_of(file).cover(range(MIB, 2 * MIB)));
        }
    }
}
