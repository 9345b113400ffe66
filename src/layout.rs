// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The VM's RAM: which guest-physical ranges exist, and where each page's bit lives.
//!
//! Every bitmap of this crate that speaks of guest pages has the same shape: one bit per host page, region after
//! region in ascending order, each region beginning at a fresh block of words. So bitmaps of one layout are OR-ed word by
//! word, and a region's words start where a KVM slot's do.

use thiserror::Error;
use vm_memory::{Address, GuestMemoryBackend, GuestMemoryRegion};

use crate::bitmap::{BLOCK_WORDS, Bitmap, WORD_BITS, runs};
use crate::granule::Granule;
use crate::range::{GpaRange, RangeError};

/// Why a set of RAM regions is not a layout.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum LayoutError {
    /// A region that is no range.
    #[error("RAM region {index} is not a valid range")]
    Range {
        /// Position in the list given.
        index: usize,
        /// What is wrong with it.
        source: RangeError,
    },
    /// A region that begins or ends inside a host page.
    #[error("RAM region {region} is not aligned to the host page of {host_page}")]
    Unaligned {
        /// The region.
        region: GpaRange,
        /// The host's page size.
        host_page: Granule,
    },
    /// Two regions share bytes.
    #[error("RAM regions {first} and {second} overlap")]
    Overlap {
        /// The lower one.
        first: GpaRange,
        /// The higher one.
        second: GpaRange,
    },
    /// There is no RAM at all.
    #[error("VM has no RAM region")]
    Empty,
    /// RAM goes by whole regions, as it came.
    #[error("RAM at {gpa} is not one or more whole regions")]
    NotRegions {
        /// What was to go.
        gpa: GpaRange,
    },
}

/// One region of RAM and where its bits live.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Region {
    range: GpaRange,
    first_word: usize,
    words: usize,
}

impl Region {
    /// Guest-physical bytes of the region.
    pub fn range(&self) -> GpaRange {
        self.range
    }

    /// Indices of the words that hold the region's bits: its first page is bit 0 of the first one.
    pub fn words(&self) -> std::ops::Range<usize> {
        self.first_word..self.first_word + self.words
    }

    fn first_bit(&self) -> usize {
        self.first_word * WORD_BITS
    }
}

/// The VM's RAM regions, sorted and disjoint, with one bit per host page.
///
/// ```
/// use vfio_migration::{granule::Granule, layout::Layout, range::GpaRange};
/// let (low, high) = (GpaRange::new(0, 64 << 20)?, GpaRange::new(4 << 30, 64 << 20)?);
/// let layout = Layout::new([high, low], Granule::KIB_4)?;
/// assert_eq!(layout.pages(), 2 * 16384);
/// assert!(layout.region_of(1 << 30).is_none());
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Layout {
    regions: Vec<Region>,
    host_page: Granule,
    words: usize,
    pages: u64,
}

impl Layout {
    /// Lays out `regions`, given in any order, with one bit per `host_page`.
    ///
    /// # Errors
    /// There is no region, two overlap, or one is not aligned to `host_page`.
    pub fn new(regions: impl IntoIterator<Item = GpaRange>, host_page: Granule) -> Result<Self, LayoutError> {
        let mut ranges: Vec<_> = regions.into_iter().collect();
        ranges.sort_unstable();
        if ranges.is_empty() {
            return Err(LayoutError::Empty);
        }
        if let Some(pair) = ranges.windows(2).find(|pair| pair[0].end() > pair[1].start()) {
            return Err(LayoutError::Overlap { first: pair[0], second: pair[1] });
        }
        let mut layout = Self { regions: Vec::with_capacity(ranges.len()), host_page, words: 0, pages: 0 };
        for range in ranges {
            layout.append(range)?;
        }
        Ok(layout)
    }

    /// Lays out the regions of any vm-memory guest memory, with one bit per page of this host.
    ///
    /// # Errors
    /// As [`Layout::new`].
    pub fn from_guest_memory(memory: &impl GuestMemoryBackend) -> Result<Self, LayoutError> {
        let ranges: Result<Vec<_>, _> = memory
            .iter()
            .enumerate()
            .map(|(index, region)| {
                GpaRange::new(region.start_addr().raw_value(), region.len())
                    .map_err(|source| LayoutError::Range { index, source })
            })
            .collect();
        Self::new(ranges?, Granule::host_page())
    }

    /// Returns this layout with more RAM.
    ///
    /// # Errors
    /// `range` overlaps RAM that is there, or is not aligned to the host page.
    pub fn with(&self, range: GpaRange) -> Result<Self, LayoutError> {
        Self::new(self.regions.iter().map(Region::range).chain([range]), self.host_page)
    }

    /// Returns this layout without the RAM in `gpa`: one or more whole regions.
    ///
    /// # Errors
    /// `gpa` holds no region or a part of one, or nothing would be left.
    pub fn without(&self, gpa: GpaRange) -> Result<Self, LayoutError> {
        let (gone, rest): (Vec<_>, Vec<_>) =
            self.regions.iter().map(Region::range).partition(|region| gpa.covers(*region));
        if gone.is_empty() || rest.iter().any(|region| region.intersection(gpa).is_some()) {
            return Err(LayoutError::NotRegions { gpa });
        }
        Self::new(rest, self.host_page)
    }

    fn append(&mut self, range: GpaRange) -> Result<(), LayoutError> {
        let aligned = self.host_page.is_aligned(range.start()) && self.host_page.is_aligned(range.end());
        if !aligned {
            return Err(LayoutError::Unaligned { region: range, host_page: self.host_page });
        }
        let pages = range.len() >> self.host_page.shift();
        let words = to_index(pages.div_ceil(WORD_BITS as u64));
        self.regions.push(Region { range, first_word: self.words, words });
        self.words += words.next_multiple_of(BLOCK_WORDS);
        self.pages += pages;
        Ok(())
    }

    /// RAM regions in ascending order.
    pub fn regions(&self) -> &[Region] {
        &self.regions
    }

    /// Bytes per bit.
    pub fn host_page(&self) -> Granule {
        self.host_page
    }

    /// Pages of RAM.
    pub fn pages(&self) -> u64 {
        self.pages
    }

    /// Bytes of RAM.
    pub fn bytes(&self) -> u64 {
        self.pages << self.host_page.shift()
    }

    /// Words a bitmap of this layout takes, padding between regions included.
    pub fn words(&self) -> usize {
        self.words
    }

    /// Returns the region that holds `gpa`.
    pub fn region_of(&self, gpa: u64) -> Option<&Region> {
        let after = self.regions.partition_point(|region| region.range.start() <= gpa);
        self.regions[..after].last().filter(|region| region.range.contains(gpa))
    }

    /// Whether every byte of `range` is RAM.
    pub fn holds(&self, range: GpaRange) -> bool {
        self.parts(range).map(|(_, part)| part.len()).sum::<u64>() == range.len()
    }

    /// Returns the parts of `range` that are RAM, each with its region, in ascending order.
    pub fn parts(&self, range: GpaRange) -> impl Iterator<Item = (&Region, GpaRange)> {
        let first = self.regions.partition_point(|region| region.range.end() <= range.start());
        self.regions[first..]
            .iter()
            .map_while(move |region| Some((region, region.range.intersection(range)?)))
    }

    /// Returns the bits of the pages that hold a byte of `range`, a run for each region touched.
    pub(crate) fn bits_of(&self, range: GpaRange) -> impl Iterator<Item = std::ops::Range<usize>> {
        let shift = self.host_page.shift();
        self.parts(range).map(move |(region, part)| {
            let (start, end) = (part.start() - region.range.start(), part.end() - region.range.start());
            let bit = |bytes: u64| region.first_bit() + to_index(bytes >> shift);
            bit(start)..bit(end - 1) + 1
        })
    }

    /// Returns the index of the region whose words hold `word`, padding counted with the region before it.
    pub(crate) fn region_index_of_word(&self, word: usize) -> usize {
        self.regions.partition_point(|region| region.first_word <= word) - 1
    }

    /// Does the same, for a word that lies in region `index` or behind.
    pub(crate) fn region_index_from(&self, index: usize, word: usize) -> usize {
        let further = self.regions[index + 1..].iter().take_while(|region| region.first_word <= word);
        index + further.count()
    }

    /// Returns the address of the first page at or after `bit`; `None` behind the last one.
    pub(crate) fn gpa_from(&self, bit: usize) -> Option<u64> {
        let after = |region: &&Region| {
            bit < region.first_bit() + to_index(region.range.len() >> self.host_page.shift())
        };
        let index = self.regions.iter().position(|region| after(&region))?;
        Some(self.gpa_of(index, bit.max(self.regions[index].first_bit())))
    }

    /// Returns the bit of the first page at or after `gpa`; the number of bits behind the last one.
    pub(crate) fn bit_from(&self, gpa: u64) -> usize {
        let region = self.regions.iter().find(|region| region.range.end() > gpa);
        region.map_or(self.words * WORD_BITS, |region| {
            let inside = gpa.saturating_sub(region.range.start());
            region.first_bit() + to_index(inside >> self.host_page.shift())
        })
    }

    /// Returns the guest memory of the bits that `bitmap` has set, ascending.
    pub(crate) fn ranges_in<'a>(&'a self, bitmap: &'a Bitmap) -> impl Iterator<Item = GpaRange> + 'a {
        let shift = self.host_page.shift();
        self.regions.iter().flat_map(move |region| {
            let pages = to_index(region.range.len() >> shift);
            runs(bitmap.words(region.words()), pages).map(move |run| {
                let at = |page: usize| region.range.start() + ((page as u64) << shift);
                GpaRange::from_bounds(at(run.start), at(run.end)).expect("a run inside a region")
            })
        })
    }

    /// Returns the address of the page at `bit`, which must be a bit of region `index`.
    pub(crate) fn gpa_of(&self, index: usize, bit: usize) -> u64 {
        let region = &self.regions[index];
        region.range.start() + (((bit - region.first_bit()) as u64) << self.host_page.shift())
    }

    #[cfg(test)]
    /// The mask of bits in `word` that stand for pages.
    pub(crate) fn valid_bits(&self, word: usize) -> u64 {
        let region = &self.regions[self.region_index_of_word(word)];
        let pages = to_index(region.range.len() >> self.host_page.shift());
        let before = (word - region.first_word) * WORD_BITS;
        crate::bitmap::low_bits(pages.saturating_sub(before).min(WORD_BITS))
    }
}

/// Narrows a page or word number to an index; such numbers count bits this process holds in memory.
fn to_index(number: u64) -> usize {
    usize::try_from(number).expect("bitmaps of the VM fit the address space")
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use vm_memory::{GuestAddress, GuestMemoryMmap};

    use super::*;

    fn range(start: u64, len: u64) -> GpaRange {
        GpaRange::new(start, len).unwrap()
    }

    #[test]
    fn overlapping_unaligned_and_absent_regions_are_refused() {
        let layout = |ranges: &[GpaRange]| Layout::new(ranges.iter().copied(), Granule::KIB_4);
        assert_eq!(layout(&[]), Err(LayoutError::Empty));
        assert!(matches!(
            layout(&[range(0x2000, 0x2000), range(0, 0x3000)]),
            Err(LayoutError::Overlap { .. })
        ));
        assert!(matches!(layout(&[range(0x800, 0x1000)]), Err(LayoutError::Unaligned { .. })));
    }

    #[test]
    fn guest_memory_with_the_hole_below_4_gib_is_laid_out() {
        let memory = GuestMemoryMmap::<()>::from_ranges(&[
            (GuestAddress(0), 1 << 20),
            (GuestAddress(4 << 30), 2 << 20),
        ])
        .unwrap();
        let layout = Layout::from_guest_memory(&memory).unwrap();
        assert_eq!(layout.bytes(), 3 << 20);
        assert_eq!(layout.region_of((4 << 30) + 1).unwrap().range(), range(4 << 30, 2 << 20));
        assert!(layout.region_of(1 << 20).is_none());
        assert!(!layout.holds(range(0, 2 << 20)));
        assert!(layout.holds(range(4 << 30, 2 << 20)));
    }

    proptest! {
        #[test]
        fn bits_and_addresses_are_inverse(sizes in prop::collection::vec((1..200u64, 0..3u64), 1..5)) {
            let mut next = 0;
            let ranges: Vec<_> = sizes.iter().map(|&(pages, gap)| {
                let region = range((next + gap) << 12, pages << 12);
                next += gap + pages;
                region
            }).collect();
            let layout = Layout::new(ranges.iter().copied(), Granule::KIB_4).unwrap();
            let mut valid = 0;
            for word in 0..layout.words() {
                valid += u64::from(layout.valid_bits(word).count_ones());
            }
            prop_assert_eq!(valid, layout.pages());
            for region in &ranges {
                for page in region.pieces(1 << 12) {
                    let bits: Vec<_> = layout.bits_of(page).collect();
                    prop_assert_eq!(bits.len(), 1);
                    prop_assert_eq!(bits[0].len(), 1);
                    let word = bits[0].start / WORD_BITS;
                    prop_assert_eq!(layout.gpa_of(layout.region_index_of_word(word), bits[0].start), page.start());
                    prop_assert!(layout.valid_bits(word) >> (bits[0].start % WORD_BITS) & 1 == 1);
                }
            }
        }
    }
}
