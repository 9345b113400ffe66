// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What backs guest memory, to find the pages that were never written.

use std::fs::File;
use std::sync::Arc;

use rustix::fs::fstat;
use vm_memory::bitmap::Bitmap;
use vm_memory::{Address, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

use crate::range::GpaRange;

/// Where the kernel can be asked for the pages that were never written, for parts of a VM's memory.
///
/// Such a page reads zero, and does not have to be sent to a receiver whose own memory reads zero. Memory that nothing is
/// said about counts as written, all of it: a private mapping of a file has to, because the file's holes say nothing of it.
///
/// A page that a userfaultfd has yet to fill looks the same, but does not read zero. A sender skips nothing in such
/// memory and reads it through its mapping, so that the handler fills it: keep the handler running until the
/// migration is over. The sender sees registrations of its own process only; for those of another one, see
/// [`Backing::shared_file`].
///
/// ```
/// use vfio_migration::vm::Backing;
/// use vm_memory::{GuestAddress, GuestMemoryMmap};
/// let memory = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), 1 << 20), (GuestAddress(4 << 30), 1 << 20)])?;
/// assert_eq!(Backing::of_mmap(&memory).parts(), 2);
/// # Ok::<(), vm_memory::mmap::FromRangesError>(())
/// ```
#[derive(Debug, Clone, Default)]
pub struct Backing {
    parts: Vec<(GpaRange, Behind)>,
}

/// How the untouched pages of a part are found.
#[derive(Debug, Clone)]
pub(crate) enum Behind {
    /// A file, by its holes.
    SharedFile { file: Arc<File>, offset: u64 },
    /// This process's page table.
    Anonymous { hva: u64 },
}

impl Behind {
    /// Returns what is behind the memory from `bytes` on.
    fn from(&self, bytes: u64) -> Self {
        match self {
            Self::SharedFile { file, offset } => {
                Self::SharedFile { file: Arc::clone(file), offset: offset + bytes }
            }
            Self::Anonymous { hva } => Self::Anonymous { hva: hva + bytes },
        }
    }
}

impl Backing {
    /// Adds a shared mapping of `file` (a memfd, as a rule) from `offset` on: its holes are the pages nobody wrote.
    ///
    /// The file's cursor moves.
    ///
    /// Do not use it for a file that another process registers with a userfaultfd: that cannot be detected here, and
    /// missing pages read zero through this mapping.
    #[must_use]
    pub fn shared_file(mut self, gpa: GpaRange, file: Arc<File>, offset: u64) -> Self {
        self.parts.push((gpa, Behind::SharedFile { file, offset }));
        self
    }

    /// Adds private anonymous memory of this process that begins at `hva`: what is neither present nor swapped was never
    /// written.
    ///
    /// Not for shared anonymous memory, whose pages come and go in the page table.
    #[must_use]
    pub fn anonymous(mut self, gpa: GpaRange, hva: u64) -> Self {
        self.parts.push((gpa, Behind::Anonymous { hva }));
        self
    }

    /// Tells from the mappings themselves: those vm-memory made, of files shared or of private anonymous memory.
    pub fn of_mmap<B: Bitmap>(memory: &GuestMemoryMmap<B>) -> Self {
        memory.iter().fold(Self::default(), |backing, region| {
            let (start, flags) = (region.start_addr().raw_value(), region.flags());
            let Ok(gpa) = GpaRange::new(start, region.len()) else { return backing };
            match GuestMemoryRegion::file_offset(region) {
                _ if !region.owned() => backing,
                Some(file) if flags & libc::MAP_SHARED != 0 => {
                    backing.shared_file(gpa, Arc::clone(file.arc()), file.start())
                }
                None if flags & libc::MAP_PRIVATE != 0 => backing.anonymous(gpa, region.as_ptr() as u64),
                _ => backing,
            }
        })
    }

    /// Parts that something is said about.
    pub fn parts(&self) -> usize {
        self.parts.len()
    }

    /// Says nothing about `ranges`, which are sorted and disjoint, any more.
    pub(crate) fn without(self, ranges: &[GpaRange]) -> Self {
        let parts = self.parts.into_iter().flat_map(|(gpa, behind)| {
            remainder(gpa, ranges)
                .into_iter()
                .map(move |rest| (rest, behind.from(rest.start() - gpa.start())))
        });
        Self { parts: parts.collect() }
    }

    /// Whether no page of `memory` is a hole: all of it is in files that have blocks for every byte.
    pub(crate) fn is_without_hole<M: GuestMemoryBackend>(&self, memory: &M) -> bool {
        memory.iter().all(|region| {
            let gpa = GpaRange::new(region.start_addr().raw_value(), region.len()).ok();
            let part = self.parts.iter().find(|(part, _)| gpa.is_some_and(|gpa| part.covers(gpa)));
            match (part, gpa) {
                (Some((part, Behind::SharedFile { file, offset })), Some(gpa)) => {
                    gpa.end() - part.start() <= bytes_without_hole(file).saturating_sub(*offset)
                }
                _ => false,
            }
        })
    }

    /// What something is said about.
    pub(crate) fn ranges(&self) -> impl Iterator<Item = GpaRange> {
        self.parts.iter().map(|(gpa, _)| *gpa)
    }

    pub(crate) fn into_parts(self) -> Vec<(GpaRange, Behind)> {
        self.parts
    }
}

/// Returns how long `file` is if it has blocks for all of that, which takes no walk through its pages to tell; else 0.
pub(crate) fn bytes_without_hole(file: &File) -> u64 {
    const BLOCK_BYTES: u64 = 512;
    let bytes = |number| u64::try_from(number).unwrap_or(0);
    let size = fstat(file).map(|stat| (bytes(stat.st_size), bytes(stat.st_blocks) * BLOCK_BYTES));
    size.ok().filter(|(length, allocated)| allocated >= length).map_or(0, |(length, _)| length)
}

/// Returns what of `whole` is in none of `ranges`, which are sorted and disjoint.
fn remainder(whole: GpaRange, ranges: &[GpaRange]) -> Vec<GpaRange> {
    let mut rest = Vec::new();
    let mut at = whole.start();
    for inside in ranges.iter().filter_map(|range| whole.intersection(*range)) {
        rest.extend(GpaRange::from_bounds(at, inside.start()));
        at = inside.end();
    }
    rest.extend(GpaRange::from_bounds(at, whole.end()));
    rest
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use vm_memory::mmap::MmapRegionBuilder;
    use vm_memory::{FileOffset, GuestAddress, GuestRegionMmap};

    use super::*;

    fn region(start: u64, flags: i32, file: Option<&Arc<File>>) -> Arc<GuestRegionMmap<()>> {
        let builder = MmapRegionBuilder::new(1 << 20).with_mmap_flags(flags).with_mmap_prot(libc::PROT_READ);
        let builder = match file {
            Some(file) => builder.with_file_offset(FileOffset::from_arc(Arc::clone(file), 0)),
            None => builder,
        };
        Arc::new(GuestRegionMmap::new(builder.build().unwrap(), GuestAddress(start)).unwrap())
    }

    #[test]
    fn private_file_mappings_count_as_written_and_the_rest_is_recognised() {
        let file = Arc::new(tempfile::tempfile().unwrap());
        file.set_len(1 << 20).unwrap();
        let memory = GuestMemoryMmap::from_arc_regions(vec![
            region(0, libc::MAP_SHARED, Some(&file)),
            region(1 << 20, libc::MAP_PRIVATE, Some(&file)),
            region(2 << 20, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, None),
            region(3 << 20, libc::MAP_SHARED | libc::MAP_ANONYMOUS, None),
        ])
        .unwrap();
        let parts = Backing::of_mmap(&memory).into_parts();
        let gpa = |start| GpaRange::new(start, 1 << 20).unwrap();
        assert!(matches!(&parts[0], (range, Behind::SharedFile { offset: 0, .. }) if *range == gpa(0)));
        assert!(matches!(&parts[1], (range, Behind::Anonymous { .. }) if *range == gpa(2 << 20)));
        assert_eq!(parts.len(), 2);
    }

    #[test]
    fn a_single_hole_is_one_and_anonymous_memory_counts_as_full_of_them() {
        let file = Arc::new(tempfile::tempfile().unwrap());
        file.set_len(2 << 20).unwrap();
        let part = FileOffset::from_arc(Arc::clone(&file), 1 << 20);
        let regions = [(GuestAddress(0), 1 << 20, Some(part))];
        let memory = GuestMemoryMmap::<()>::from_ranges_with_files(regions).unwrap();
        let is_without_hole = || Backing::of_mmap(&memory).is_without_hole(&memory);
        let (before, last) = (vec![1; (2 << 20) - 65536], vec![1; 65536]);
        file.write_all_at(&before, 0).unwrap();
        assert!(!is_without_hole());
        file.write_all_at(&last, before.len() as u64).unwrap();
        assert!(is_without_hole());
        assert!(!Backing::default().is_without_hole(&memory));
        let beyond =
            Backing::default().shared_file(GpaRange::new(0, 1 << 20).unwrap(), file, (1 << 20) + 4096);
        assert!(!beyond.is_without_hole(&memory));

        let anonymous = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap();
        assert!(!Backing::of_mmap(&anonymous).is_without_hole(&anonymous));
    }

    #[test]
    fn what_is_left_of_a_part_is_where_it_was() {
        let file = Arc::new(tempfile::tempfile().unwrap());
        let gpa = |start, end| GpaRange::from_bounds(start, end).unwrap();
        let backing = Backing::default()
            .shared_file(gpa(0x1000, 0x9000), file, 0x4000)
            .anonymous(gpa(0x9000, 0xb000), 0x7000);
        let parts = backing.without(&[gpa(0, 0x2000), gpa(0x4000, 0x5000), gpa(0x8000, 0xa000)]).into_parts();
        let told: Vec<_> = parts
            .iter()
            .map(|(range, behind)| match behind {
                Behind::SharedFile { offset, .. } => (*range, *offset),
                Behind::Anonymous { hva } => (*range, *hva),
            })
            .collect();
        assert_eq!(
            told,
            [(gpa(0x2000, 0x4000), 0x5000), (gpa(0x5000, 0x8000), 0x8000), (gpa(0xa000, 0xb000), 0x8000)]
        );
    }
}
