// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A receiver in the same process: RAM that gets the pages it is given, and is compared with the machine's.

use std::collections::BTreeSet;
use std::io;
use std::os::unix::fs::FileExt;

use anyhow::Context;
use vfio_migration::ledger::{Chunk, ChunkLimits, CursorId, Start};
use vfio_migration::range::GpaRange;
use vfio_migration::tracker::Tracker;

use crate::vmm::{Memory, PAGE_BYTES, PAGE_LEN, RegionBacking};

/// Bytes compared at a time.
const BLOCK_BYTES: usize = 64 * PAGE_LEN;

/// A second RAM that is to become equal to a machine's, and what it still lacks.
pub struct Mirror {
    machine: Memory,
    copy: Memory,
    cursor: CursorId,
}

impl Mirror {
    /// Switches `tracker`'s sources on and copies all of `machine`'s RAM.
    ///
    /// # Errors
    /// A source does not start, or RAM cannot be copied.
    pub fn start(machine: &Memory, tracker: &mut Tracker) -> anyhow::Result<Self> {
        let copy = Memory::create(machine.layout())?;
        let cursor = tracker.begin(Start::Empty)?;
        let mirror = Self { machine: machine.clone(), copy, cursor };
        mirror.copy(tracker)?;
        Ok(mirror)
    }

    /// Copies every page that is pending; returns the addresses of those, ascending.
    ///
    /// # Errors
    /// A source does not clear its bits, or RAM cannot be copied.
    pub fn copy(&self, tracker: &mut Tracker) -> anyhow::Result<BTreeSet<u64>> {
        let limits = ChunkLimits { bytes: 4 << 20, ranges: 100 };
        let mut pages = BTreeSet::new();
        tracker.begin_round(self.cursor);
        while let Some(chunk) = tracker.take(self.cursor, limits)? {
            self.copy_chunk(&chunk)?;
            pages.extend(
                chunk.ranges().iter().flat_map(|range| range.pieces(PAGE_BYTES)).map(GpaRange::start),
            );
            tracker.commit(chunk);
        }
        Ok(pages)
    }

    /// Switches the sources off.
    ///
    /// # Errors
    /// A source does not stop.
    pub fn end(self, tracker: &mut Tracker) -> anyhow::Result<()> {
        Ok(tracker.end(self.cursor)?)
    }

    fn copy_chunk(&self, chunk: &Chunk) -> anyhow::Result<()> {
        let mut bytes = Vec::new();
        for range in chunk.ranges() {
            let (from, to) = (region(&self.machine, range.start())?, region(&self.copy, range.start())?);
            bytes.resize(usize::try_from(range.len())?, 0);
            from.file.read_exact_at(&mut bytes, range.start() - from.gpa)?;
            to.file.write_all_at(&bytes, range.start() - to.gpa)?;
        }
        Ok(())
    }

    /// Returns the addresses of the pages that differ, ascending. Nobody may write meanwhile.
    ///
    /// # Errors
    /// RAM cannot be read.
    pub fn differing(&self) -> anyhow::Result<BTreeSet<u64>> {
        Ok(differing(&self.machine, &self.copy)?)
    }
}

/// Returns the addresses of the pages in which two RAMs of one layout differ, ascending. Reads the memfds: who maps them does not
/// matter.
///
/// # Errors
/// A memfd cannot be read.
pub fn differing(first: &Memory, second: &Memory) -> io::Result<BTreeSet<u64>> {
    assert_eq!(first.layout(), second.layout(), "RAM of one layout");
    let mut differing = BTreeSet::new();
    let (mut a, mut b) = (vec![0; BLOCK_BYTES], vec![0; BLOCK_BYTES]);
    for (left, right) in first.regions().iter().zip(second.regions()) {
        for offset in (0..left.len).step_by(BLOCK_BYTES) {
            let bytes = usize::try_from(left.len - offset).unwrap_or(usize::MAX).min(BLOCK_BYTES);
            let (a, b) = (&mut a[..bytes], &mut b[..bytes]);
            left.file.read_exact_at(a, left.offset + offset)?;
            right.file.read_exact_at(b, right.offset + offset)?;
            if a != b {
                let pages =
                    (left.gpa + offset..).step_by(PAGE_LEN).zip(a.chunks(PAGE_LEN).zip(b.chunks(PAGE_LEN)));
                differing.extend(pages.filter(|(_, (a, b))| a != b).map(|(gpa, _)| gpa));
            }
        }
    }
    Ok(differing)
}

fn region(memory: &Memory, gpa: u64) -> anyhow::Result<&RegionBacking> {
    let holds = |region: &&RegionBacking| (region.gpa..region.gpa + region.len).contains(&gpa);
    memory.regions().iter().find(holds).with_context(|| format!("{gpa:#x} is not RAM"))
}
