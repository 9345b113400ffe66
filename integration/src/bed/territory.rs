// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Which device writes where in a machine's RAM.

use std::ops::Range;

use super::edu::{Edu, EduDma};
use crate::device::stream_word;
use crate::vmm::{AreaKind, Map, PAGE_BYTES, PAGE_LEN, SHARED_BYTES};

/// Pages of each region's device area that are edu's.
const EDU_PAGES: u64 = 16;
/// Pages of each region, shared with the guest, that each device has.
const SHARED_PAGES: usize = 6;

/// The devices' parts of a machine's memory map.
///
/// Both also write, within [`SHARED_BYTES`], to pages that the guest stamps.
#[derive(Debug, Clone)]
pub struct Territory {
    /// Where the engine writes.
    pub engine: Vec<Range<u64>>,
    /// Where edu writes whole pages.
    edu: Vec<Range<u64>>,
    /// Where edu writes to pages that the guest stamps.
    edu_shared: Vec<Range<u64>>,
    /// Where edu reads.
    cold: Vec<Range<u64>>,
    /// A page of edu's that nothing but a check writes.
    pub scratch: u64,
}

impl Territory {
    /// Divides the device's areas of `map`.
    pub fn new(map: &Map) -> Self {
        let (mut engine, mut edu, mut edu_shared) = (Vec::new(), Vec::new(), Vec::new());
        for area in map.ranges(AreaKind::Device) {
            let border = area.end - EDU_PAGES * PAGE_BYTES;
            engine.push(area.start..border);
            edu.push(border..area.end - PAGE_BYTES);
        }
        for area in map.ranges(AreaKind::GuestAndDevice) {
            let pages = area.step_by(PAGE_LEN);
            let mut shared = pages.map(|gpa| gpa + SHARED_BYTES.start..gpa + SHARED_BYTES.end);
            engine.extend(shared.by_ref().take(SHARED_PAGES));
            edu_shared.extend(shared.take(SHARED_PAGES));
        }
        let scratch = edu.first().map_or(0, |pages| pages.end);
        Self { engine, edu, edu_shared, cold: map.ranges(AreaKind::Cold).collect(), scratch }
    }

    /// Pages of a device in edu's place.
    pub(super) fn second(&self) -> &[Range<u64>] {
        &self.edu
    }

    /// The DMA number `step` of edu's: it fills its buffer from a page that never changes, then writes it to three places.
    pub fn edu_dma(&self, seed: u64, step: u64) -> EduDma {
        let word = stream_word(seed, step);
        if step.is_multiple_of(4) {
            let iova = page_of(&self.cold, word);
            return EduDma { iova, bytes: Edu::BUFFER_BYTES, to_memory: false };
        }
        if word & 3 == 0 {
            let place = &self.edu_shared[index(word >> 2, self.edu_shared.len())];
            return EduDma { iova: place.start, bytes: place.end - place.start, to_memory: true };
        }
        // Some lie in one page, some in two: the last page of each range only ever holds an end.
        let pages = &self.edu[index(word >> 2, self.edu.len())];
        let iova = page_in(&(pages.start..pages.end - PAGE_BYTES), word >> 8) + (word >> 4 & 1) * 0x800;
        EduDma { iova, bytes: Edu::BUFFER_BYTES, to_memory: true }
    }
}

fn page_of(ranges: &[Range<u64>], word: u64) -> u64 {
    page_in(&ranges[index(word, ranges.len())], word >> 8)
}

fn page_in(range: &Range<u64>, word: u64) -> u64 {
    range.start + word % ((range.end - range.start) / PAGE_BYTES) * PAGE_BYTES
}

fn index(word: u64, len: usize) -> usize {
    usize::try_from(word % len as u64).expect("less than a length")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vmm::{MIN_RAM_BYTES, RamLayout, Split};

    #[test]
    fn the_devices_never_write_the_same_bytes() {
        let map = Map::new(&RamLayout::new(MIN_RAM_BYTES, Split::default()).unwrap());
        let territory = Territory::new(&map);
        assert!(territory.engine.len() <= 16);
        let mut two_pages = 0;
        for step in 0..1000 {
            let dma = territory.edu_dma(9, step);
            let place = dma.iova..dma.iova + dma.bytes;
            if !dma.to_memory {
                assert!(
                    map.ranges(AreaKind::Cold).any(|cold| cold.start <= place.start && place.end <= cold.end)
                );
                continue;
            }
            two_pages += u32::from(place.start / PAGE_BYTES != (place.end - 1) / PAGE_BYTES);
            assert!(place.end <= territory.scratch || place.start >= territory.scratch + PAGE_BYTES);
            assert!(
                territory.engine.iter().all(|engine| engine.end <= place.start || place.end <= engine.start)
            );
            let device = map.device_window();
            assert!(device.iter().any(|window| window.start <= place.start && place.end <= window.end));
        }
        assert!(two_pages > 100);
    }
}
