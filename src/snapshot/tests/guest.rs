// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A guest whose every page is made from one number.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use proptest::prelude::*;

use crate::granule::Granule;
use crate::layout::Layout;
use crate::range::GpaRange;
use crate::snapshot::*;

pub(super) fn page() -> u64 {
    Granule::host_page().bytes()
}

pub(super) fn range(start: u64, len: u64) -> GpaRange {
    GpaRange::new(start, len).unwrap()
}

/// Pages `first..first + count`.
pub(super) fn pages(first: u64, count: u64) -> GpaRange {
    range(first * page(), count * page())
}

pub(super) fn index(number: u64) -> usize {
    usize::try_from(number).unwrap()
}

/// The bytes of a page that `seed` makes: zeros for 0.
pub(super) fn page_of(seed: u64) -> Vec<u8> {
    let words = (0..page() / 8).map(|at| seed.wrapping_mul(0x9e37_79b9_7f4a_7c15).wrapping_mul(at | 1));
    words.flat_map(u64::to_le_bytes).collect()
}

pub(super) fn layout(ranges: &[GpaRange]) -> Layout {
    Layout::new(ranges.iter().copied(), Granule::host_page()).unwrap()
}

pub(super) fn config_text(note: u64) -> Vec<u8> {
    format!(r#"{{"memory":{{"size":{note}}},"cpus":{{"boot_vcpus":1}}}}"#).into_bytes()
}

pub(super) fn memory_manager_text(ranges: &[GpaRange]) -> String {
    let entries: Vec<_> =
        ranges.iter().map(|r| format!(r#"{{"gpa":{},"length":{}}}"#, r.start(), r.len())).collect();
    format!(r#"{{"memory_ranges":{{"data":[{}]}},"guest_ram_mappings":[]}}"#, entries.join(","))
}

pub(super) fn state_text(ranges: &[GpaRange]) -> Vec<u8> {
    let memory = serde_json::to_string(&memory_manager_text(ranges)).unwrap();
    format!(
        r#"{{"snapshots":{{"memory-manager":{{"snapshots":{{}},"snapshot_data":{{"state":{memory}}}}}}},"snapshot_data":{{"state":"{{\"clock\":7,\"common_cpuid\":[3]}}"}}}}"#
    )
    .into_bytes()
}

/// Memory as a map from page address to the number that makes the page.
#[derive(Debug, Clone)]
pub(super) struct Guest {
    pub(super) ranges: Vec<GpaRange>,
    pub(super) seeds: BTreeMap<u64, u64>,
}

impl Guest {
    pub(super) fn new(ranges: &[GpaRange]) -> Self {
        Self { ranges: ranges.to_vec(), seeds: BTreeMap::new() }
    }

    /// Two regions of 40 and 24 pages, some of them filled.
    pub(super) fn small() -> Self {
        let mut guest = Self::new(&[pages(0, 40), pages(64, 24)]);
        guest.write((0..40).step_by(3).chain([64, 87]).map(|at| (at, at + 1)));
        guest
    }

    /// Writes pages, given as page number and seed; those outside memory are left out.
    pub(super) fn write(&mut self, writes: impl IntoIterator<Item = (u64, u64)>) -> Vec<GpaRange> {
        let mut written = Vec::new();
        for (number, seed) in writes {
            let gpa = number * page();
            if self.has(gpa) {
                self.seeds.insert(gpa, seed);
                written.push(pages(number, 1));
            }
        }
        written
    }

    fn has(&self, gpa: u64) -> bool {
        self.ranges.iter().any(|range| range.contains(gpa))
    }

    pub(super) fn bytes(&self, range: GpaRange) -> Vec<u8> {
        let seed = |gpa: u64| self.seeds.get(&gpa).copied().unwrap_or(0);
        range.pieces(page()).flat_map(|page| page_of(seed(page.start()))).collect()
    }

    /// The bytes of `memory-ranges`.
    pub(super) fn file(&self) -> Vec<u8> {
        self.ranges.iter().flat_map(|&range| self.bytes(range)).collect()
    }

    pub(super) fn config(&self) -> Vec<u8> {
        config_text(self.seeds.len() as u64)
    }

    pub(super) fn state(&self) -> Vec<u8> {
        state_text(&self.ranges)
    }

    pub(super) fn announced(&self) -> AnnouncedRam {
        AnnouncedRam::all(layout(&self.ranges))
    }

    /// Writes a full snapshot: page by page those that are not zero.
    pub(super) fn write_full(&self, target: &Path) -> Digest {
        let writer =
            SnapshotWriter::create(target, self.announced(), None, SnapshotLimits::default()).unwrap();
        for (&gpa, &seed) in self.seeds.iter().filter(|(gpa, _)| self.has(**gpa)) {
            writer.fill(range(gpa, page()), &mut &page_of(seed)[..]).unwrap();
        }
        writer.finish(&self.config(), &self.state()).unwrap()
    }

    /// Writes a differential of `ranges` to `base`.
    pub(super) fn write_differential(&self, target: &Path, base: Base, ranges: &[GpaRange]) -> Digest {
        let writer =
            SnapshotWriter::create(target, self.announced(), Some(base), SnapshotLimits::default()).unwrap();
        for &range in ranges {
            writer.fill(range, &mut &self.bytes(range)[..]).unwrap();
        }
        writer.finish(&self.config(), &self.state()).unwrap()
    }

    /// Checks that the directory holds this guest and verifies.
    pub(super) fn assert_full(&self, dir: &Path) {
        assert!(fs::read(dir.join(MEMORY_FILE)).unwrap() == self.file(), "memory of {}", dir.display());
        assert_eq!(fs::read(dir.join(CONFIG_FILE)).unwrap(), self.config());
        assert_eq!(fs::read(dir.join(STATE_FILE)).unwrap(), self.state());
        assert_clean(dir);
    }
}

pub(super) fn assert_clean(dir: &Path) {
    let report = verify(dir, &SnapshotLimits::default()).unwrap();
    assert!(report.is_clean(), "{:?}", report.findings);
}

pub(super) fn names(dir: &Path) -> Vec<String> {
    let entries = fs::read_dir(dir).unwrap();
    let mut names: Vec<_> = entries.map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

/// Any guest of up to four regions, in ascending order.
pub(super) fn any_guest() -> impl Strategy<Value = Guest> {
    let regions = prop::collection::vec((1..40u64, 0..9u64), 1..5);
    (regions, any_writes()).prop_map(|(regions, writes)| {
        let mut next = 0;
        let mut guest = Guest::new(&[]);
        for (count, gap) in regions {
            guest.ranges.push(pages(next + gap, count));
            next += gap + count;
        }
        guest.write(writes);
        guest
    })
}

/// Page numbers and small seeds, so that pages become zero and equal again.
pub(super) fn any_writes() -> impl Strategy<Value = Vec<(u64, u64)>> {
    prop::collection::vec((0..180u64, 0..4u64), 0..60)
}
