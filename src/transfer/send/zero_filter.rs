// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The zero-page filter: the first pass leaves out holes, pages nobody ever wrote, and zero pages, which read zero.
//!
//! A receiver whose memory reads zero has them already. Whoever looks has cleared the pages' standing bits before, so that a
//! write during or after the look makes the page dirty and has it sent in a later pass, which leaves nothing out. That pages
//! were written is remembered from one look to the next, that they were not never is.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::{Arc, Mutex};

use rustix::fs::SeekFrom;
use rustix::io::Errno;
use vm_memory::{GuestAddress, GuestMemoryBackend, VolatileSlice};

use crate::granule::Granule;
use crate::range::GpaRange;
use crate::sync;
use crate::sys::guest::is_zero;
use crate::vm::{Backing, Behind, bytes_without_hole, has_address, read_memory};

/// Bytes that were left out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Skipped {
    /// Of pages nobody ever wrote.
    pub(super) hole_bytes: u64,
    /// Of pages that read zero.
    pub(super) zero_bytes: u64,
}

/// Finds the pages that have to be sent to a receiver whose memory reads zero.
#[derive(Debug)]
pub(super) struct ZeroFilter {
    /// Ascending.
    parts: Vec<(GpaRange, Pages)>,
    host_page: Granule,
}

/// Tells the written pages of a part.
#[derive(Debug)]
enum Pages {
    File(SparseFile),
    Table(PageTable),
}

impl ZeroFilter {
    /// Makes the zero-page filter of a VM's memory, whose ranges are made of `host_page`s.
    ///
    /// Without access to the page table, anonymous memory counts as written.
    pub(super) fn new(backing: Backing, host_page: Granule) -> Self {
        let page_table = PageTable::open().map_err(|error| {
            log::debug!("Anonymous memory counts as written: cannot open the page map: {error}");
        });
        let mut parts: Vec<_> = backing
            .into_parts()
            .into_iter()
            .filter_map(|(gpa, behind)| {
                let pages = match behind {
                    Behind::SharedFile { file, offset } => {
                        let known = Mutex::new(0..bytes_without_hole(&file));
                        Pages::File(SparseFile { file, offset, known })
                    }
                    Behind::Anonymous { hva } => {
                        Pages::Table(PageTable { file: Arc::clone(page_table.as_ref().ok()?), hva })
                    }
                };
                Some((gpa, pages))
            })
            .collect();
        parts.sort_unstable_by_key(|(gpa, _)| gpa.start());
        Self { parts, host_page }
    }

    /// Puts those pages of `ranges` into `kept` that have to be sent: sorted, disjoint, coalesced, as the ranges are.
    pub(super) fn keep_nonzero<M: GuestMemoryBackend>(
        &self,
        memory: &M,
        ranges: &[GpaRange],
        kept: &mut Vec<GpaRange>,
    ) -> Skipped {
        kept.clear();
        let mut written_bytes = 0;
        for &range in ranges {
            self.written(range, &mut |part| {
                written_bytes += part.len();
                append_nonzero(memory, part, self.host_page, kept);
            });
        }
        let bytes = |ranges: &[GpaRange]| ranges.iter().map(|range| range.len()).sum::<u64>();
        Skipped { hole_bytes: bytes(ranges) - written_bytes, zero_bytes: written_bytes - bytes(kept) }
    }

    /// Reports the pages of `range` that may have been written, ascending.
    fn written(&self, range: GpaRange, report: &mut dyn FnMut(GpaRange)) {
        let first = self.parts.partition_point(|(gpa, _)| gpa.end() <= range.start());
        let mut at = range.start();
        for (gpa, pages) in &self.parts[first..] {
            let Some(inside) = gpa.intersection(range) else { break };
            between(at, inside.start()).into_iter().for_each(&mut *report);
            pages.written(*gpa, inside, self.host_page, report);
            at = inside.end();
        }
        between(at, range.end()).into_iter().for_each(report);
    }
}

impl Pages {
    /// Reports the pages of `range`, a part of `gpa`, that may have been written; all that are left where that fails.
    fn written(&self, gpa: GpaRange, range: GpaRange, host_page: Granule, report: &mut dyn FnMut(GpaRange)) {
        let (start, end) = (range.start() - gpa.start(), range.end() - gpa.start());
        let mut at = start;
        while at < end {
            let found = match self {
                Self::File(file) => file.next_written(at..end, host_page),
                Self::Table(table) => table.next_written(at..end, host_page),
            };
            let found = found.unwrap_or_else(|error| {
                log::debug!("All of {range} counts as written: {error}");
                at..end
            });
            between(gpa.start() + found.start, gpa.start() + found.end).into_iter().for_each(&mut *report);
            at = found.end;
        }
    }
}

/// A file that memory is a shared mapping of.
#[derive(Debug)]
struct SparseFile {
    file: Arc<File>,
    offset: u64,
    /// Bytes of the file that hold data: finding out where data ends takes the kernel as long as it is.
    known: Mutex<Range<u64>>,
}

impl SparseFile {
    /// Returns the first pages of `range`, counted from the mapping's start, that are no hole; none, at its end, if all are.
    fn next_written(&self, range: Range<u64>, host_page: Granule) -> io::Result<Range<u64>> {
        let wanted = range.start + self.offset..range.end + self.offset;
        let found = self.next_data(&wanted)?;
        let page_mask = host_page.bytes() - 1;
        let start = (found.start & !page_mask).max(wanted.start);
        let end = (found.end.saturating_add(page_mask) & !page_mask).clamp(start, wanted.end);
        Ok(start - self.offset..end - self.offset)
    }

    fn next_data(&self, wanted: &Range<u64>) -> io::Result<Range<u64>> {
        let mut known = sync::lock(&self.known);
        if known.contains(&wanted.start) {
            return Ok(wanted.start..known.end);
        }
        let start = match rustix::fs::seek(&*self.file, SeekFrom::Data(wanted.start)) {
            Ok(start) if start < wanted.end => start,
            Ok(_) | Err(Errno::NXIO) => return Ok(wanted.end..wanted.end),
            Err(error) => return Err(error.into()),
        };
        if !known.contains(&start) {
            let end = rustix::fs::seek(&*self.file, SeekFrom::Hole(start))?;
            // The data may be gone again; it counts as written all the same.
            *known = start..end.max(start + 1);
        }
        Ok(start..known.end)
    }
}

/// Bit 63 of a page map's entry: present; bit 62: swapped.
const PRESENT_OR_SWAPPED: u64 = 0b11 << 62;
const ENTRY_BYTES: usize = size_of::<u64>();
/// Entries read at once.
const ENTRIES: usize = 512;

/// Bytes read at once of memory that has no address.
const READ_BYTES: u64 = 64 << 10;

/// This process's page table, where it maps memory from `hva` on.
#[derive(Debug)]
struct PageTable {
    file: Arc<File>,
    hva: u64,
}

impl PageTable {
    fn open() -> io::Result<Arc<File>> {
        File::open("/proc/self/pagemap").map(Arc::new)
    }

    /// Returns the first pages of `range`, counted from the mapping's start, that are present or swapped; none, where the
    /// look ended, if none of the first [`ENTRIES`] are.
    fn next_written(&self, range: Range<u64>, host_page: Granule) -> io::Result<Range<u64>> {
        let mut buffer = [0; ENTRIES * ENTRY_BYTES];
        let pages =
            usize::try_from(host_page.bits_for(range.end - range.start)).unwrap_or(ENTRIES).min(ENTRIES);
        let entries = &mut buffer[..pages * ENTRY_BYTES];
        let first = (self.hva + range.start) >> host_page.shift();
        self.file.read_exact_at(entries, first * ENTRY_BYTES as u64)?;
        let (entries, _) = entries.as_chunks();
        let is_written = |entry: &[u8; ENTRY_BYTES]| u64::from_ne_bytes(*entry) & PRESENT_OR_SWAPPED != 0;
        let start = entries.iter().position(is_written).unwrap_or(pages);
        let length = entries[start..].iter().take_while(|entry| is_written(entry)).count();
        let offset = |page: usize| (range.start + ((page as u64) << host_page.shift())).min(range.end);
        Ok(offset(start)..offset(start + length))
    }
}

/// Adds the pages of `part` to `kept` that do not read zero, and what is not in `memory`, which whoever sends it will find.
fn append_nonzero<M: GuestMemoryBackend>(
    memory: &M,
    part: GpaRange,
    host_page: Granule,
    kept: &mut Vec<GpaRange>,
) {
    if !has_address(memory, part.start()) {
        return append_nonzero_read(memory, part, host_page, kept);
    }
    let page_bytes = usize::try_from(host_page.bytes()).unwrap_or(usize::MAX);
    let mut gpa = part.start();
    let bytes = usize::try_from(part.len()).unwrap_or(usize::MAX);
    for slice in memory.get_slices(GuestAddress(part.start()), bytes).map_while(Result::ok) {
        for offset in (0..slice.len()).step_by(page_bytes) {
            let bytes = page_bytes.min(slice.len() - offset);
            if !slice.subslice(offset, bytes).is_ok_and(|page| is_zero(&page)) {
                append(kept, gpa, gpa + bytes as u64);
            }
            gpa += bytes as u64;
        }
    }
    append(kept, gpa, part.end());
}

/// As [`append_nonzero`], of memory that has no address in this process. What cannot be read is kept.
fn append_nonzero_read<M: GuestMemoryBackend>(
    memory: &M,
    part: GpaRange,
    host_page: Granule,
    kept: &mut Vec<GpaRange>,
) {
    let mut buffer = Vec::new();
    for piece in part.pieces(READ_BYTES.max(host_page.bytes())) {
        buffer.resize(usize::try_from(piece.len()).unwrap_or(usize::MAX), 0);
        let unread = read_memory(memory, piece, &mut buffer).is_err();
        let mut rest = &mut buffer[..];
        for page in piece.pieces(host_page.bytes()) {
            let (bytes, after) = rest.split_at_mut(usize::try_from(page.len()).unwrap_or(usize::MAX));
            rest = after;
            if unread || !is_zero(&VolatileSlice::from(bytes)) {
                append(kept, page.start(), page.end());
            }
        }
    }
}

/// Appends `start..end`, unless it is empty, to sorted ranges, to the last one where they touch.
fn append(ranges: &mut Vec<GpaRange>, start: u64, end: u64) {
    let Some(range) = between(start, end) else { return };
    match ranges.last_mut() {
        Some(last) if last.end() == start => {
            *last = between(last.start(), end).expect("it grows");
        }
        _ => ranges.push(range),
    }
}

fn between(start: u64, end: u64) -> Option<GpaRange> {
    GpaRange::from_bounds(start, end).ok()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use rustix::fs::{MemfdFlags, memfd_create};
    use vm_memory::mmap::MmapRegionBuilder;
    use vm_memory::{Bytes, FileOffset, GuestMemoryMmap, GuestRegionMmap};

    use super::*;

    const PAGES: u64 = 96;

    /// What is done to a page before it is looked at.
    #[derive(Debug, Clone, Copy, PartialEq)]
    enum Page {
        Untouched,
        Zeroed,
        Written(u16),
    }

    fn page() -> impl Strategy<Value = Page> {
        prop_oneof![3 => Just(Page::Untouched), 2 => Just(Page::Zeroed), 2 => any::<u16>().prop_map(Page::Written)]
    }

    fn page_bytes() -> u64 {
        Granule::host_page().bytes()
    }

    fn range(pages: Range<u64>) -> GpaRange {
        GpaRange::from_bounds(pages.start * page_bytes(), pages.end * page_bytes()).unwrap()
    }

    /// Three regions of a third of the pages each, one after the other: anonymous, a memfd not from its start on, and private
    /// memory of a file that is a hole.
    fn memory() -> GuestMemoryMmap<()> {
        let third = PAGES / 3;
        let bytes = usize::try_from(third * page_bytes()).unwrap();
        let file = |flags| {
            let file = File::from(memfd_create("guest-ram", MemfdFlags::CLOEXEC).unwrap());
            file.set_len((third + 1) * page_bytes()).unwrap();
            (libc::MAP_NORESERVE | flags, Some(FileOffset::new(file, page_bytes())))
        };
        let anonymous = (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, None);
        let kinds = [anonymous, file(libc::MAP_SHARED), file(libc::MAP_PRIVATE)];
        let regions = kinds.into_iter().zip(0..).map(|((flags, file), index)| {
            let builder = MmapRegionBuilder::new(bytes)
                .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
                .with_mmap_flags(flags);
            let builder = match file {
                Some(file) => builder.with_file_offset(file),
                None => builder,
            };
            let start = GuestAddress(index * third * page_bytes());
            Arc::new(GuestRegionMmap::new(builder.build().unwrap(), start).unwrap())
        });
        GuestMemoryMmap::from_arc_regions(regions.collect()).unwrap()
    }

    fn touch(memory: &GuestMemoryMmap<()>, pages: &[Page]) {
        for (page, index) in pages.iter().zip(0..) {
            let gpa = index * page_bytes();
            match page {
                Page::Untouched => {}
                Page::Zeroed => memory.write_obj(0_u8, GuestAddress(gpa)).unwrap(),
                Page::Written(at) => {
                    memory.write_obj(1_u8, GuestAddress(gpa + u64::from(*at) % page_bytes())).unwrap();
                }
            }
        }
    }

    /// The pages in `ranges`.
    fn pages_of(ranges: &[GpaRange]) -> Vec<u64> {
        ranges.iter().flat_map(|range| range.start() / page_bytes()..range.end() / page_bytes()).collect()
    }

    proptest! {
        #[test]
        fn just_the_pages_that_do_not_read_zero_are_kept_whatever_is_behind_them(
            pages in prop::collection::vec(page(), 96),
            offered in prop::collection::btree_set(0..PAGES, 1..96),
            later in 0..PAGES,
        ) {
            let memory = memory();
            touch(&memory, &pages);
            let filter = ZeroFilter::new(Backing::of_mmap(&memory), Granule::host_page());
            let mut ranges = Vec::new();
            offered.iter().for_each(|&page| append(&mut ranges, page * page_bytes(), (page + 1) * page_bytes()));
            let mut kept = vec![range(0..1)];
            let skipped = filter.keep_nonzero(&memory, &ranges, &mut kept);
            let is_written = |&page: &u64| matches!(pages[usize::try_from(page).unwrap()], Page::Written(_));
            prop_assert_eq!(pages_of(&kept), offered.iter().copied().filter(is_written).collect::<Vec<_>>());
            prop_assert!(kept.windows(2).all(|pair| pair[0].end() < pair[1].start()), "coalesced");
            let left_out = (offered.len() - pages_of(&kept).len()) as u64 * page_bytes();
            prop_assert_eq!(skipped.hole_bytes + skipped.zero_bytes, left_out);

            // A hole is looked for every time.
            memory.write_obj(1_u8, GuestAddress(later * page_bytes())).unwrap();
            filter.keep_nonzero(&memory, &[range(later..later + 1)], &mut kept);
            prop_assert_eq!(pages_of(&kept), [later]);
        }
    }

    #[test]
    fn holes_are_found_without_touching_them_and_a_private_file_mapping_has_none() {
        let memory = memory();
        let filter = ZeroFilter::new(Backing::of_mmap(&memory), Granule::host_page());
        let third = PAGES / 3;
        let everything = [range(0..PAGES)];
        for _ in 0..2 {
            let skipped = filter.keep_nonzero(&memory, &everything, &mut Vec::new());
            let expected = Skipped { hole_bytes: 2 * third * page_bytes(), zero_bytes: third * page_bytes() };
            assert_eq!(skipped, expected);
        }
    }

    #[test]
    fn memory_nothing_is_said_about_is_looked_at_and_what_is_no_memory_is_kept() {
        let memory = memory();
        let filter = ZeroFilter::new(Backing::default(), Granule::host_page());
        let mut kept = Vec::new();
        let skipped = filter.keep_nonzero(&memory, &[range(PAGES - 2..PAGES + 3)], &mut kept);
        assert_eq!(skipped, Skipped { hole_bytes: 0, zero_bytes: 2 * page_bytes() });
        assert_eq!(pages_of(&kept), [PAGES, PAGES + 1, PAGES + 2]);
    }
}
