// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What the tests share: the devices' doorbells, module parameters, and a ledger around one source.

use std::collections::BTreeSet;
use std::fs;

use vfio_migration::granule::Granule;
use vfio_migration::iova::IovaMap;
use vfio_migration::layout::Layout;
use vfio_migration::ledger::{ChunkLimits, CursorId, Ledger, Start};
use vfio_migration::range::GpaRange;
use vfio_migration::source::{DirtySource, SourceError};

use crate::kernel::{Device, IOVA, PAGE, PAGES};

/// Registers of `dirty_mdev`.
pub(crate) const SEED: u64 = 0x10;
pub(crate) const POSITION: u64 = 0x18;
pub(crate) const BURST: u64 = 0x38;
pub(crate) const WRITE_AT: u64 = 0x40;
pub(crate) const PIN: u64 = 0x48;
pub(crate) const UNPIN: u64 = 0x50;
const WINDOW: u64 = 0x100;

/// Registers of `edu`.
const DMA_SRC: u64 = 0x80;
const DMA_CMD: u64 = 0x98;
const BUFFER: u64 = 0x4_0000;
const TO_MEMORY: u64 = 3;

pub(crate) const BYTES: u64 = (PAGES * PAGE) as u64;

/// The address of a page of the devices' memory.
pub(crate) fn at(page: u64) -> u64 {
    IOVA + page * PAGE as u64
}

pub(crate) fn set(pages: impl IntoIterator<Item = u64>) -> BTreeSet<u64> {
    pages.into_iter().collect()
}

/// A module's parameter with a value that lasts as long as this.
pub(crate) struct Parameter {
    path: String,
    before: String,
}

impl Parameter {
    pub(crate) fn fixture(name: &str, value: u64) -> Self {
        let path = format!("/sys/module/vfio_fixture/parameters/{name}");
        let before = fs::read_to_string(&path).unwrap();
        fs::write(&path, value.to_string()).unwrap();
        Self { path, before }
    }
}

impl Drop for Parameter {
    fn drop(&mut self) {
        fs::write(&self.path, &self.before).unwrap();
    }
}

/// An mdev whose window is all of its memory.
pub(crate) fn open_mdev(name: &str) -> Device {
    let device = Device::open("mdev", name);
    device.write(WINDOW, IOVA).unwrap();
    device.write(WINDOW + 8, BYTES).unwrap();
    device.write(SEED, 1).unwrap();
    device
}

/// An `edu` that may do DMA.
pub(crate) fn open_edu(name: &str) -> Device {
    use std::os::unix::fs::FileExt;
    let device = Device::open("pci", name);
    device.file.write_all_at(&6u16.to_le_bytes(), (7 << 40) + 4).unwrap();
    device
}

/// Has an mdev write a word to each of these pages.
pub(crate) fn write(device: &Device, pages: impl IntoIterator<Item = u64>) {
    for page in pages {
        device.write(WRITE_AT, at(page)).unwrap();
    }
}

/// Has an `edu` write to a page, and waits until it has.
pub(crate) fn dma(device: &Device, page: u64) {
    for (register, value) in [BUFFER, at(page), 64, TO_MEMORY].into_iter().enumerate() {
        device.write(DMA_SRC + 8 * register as u64, value).unwrap();
    }
    while device.read(DMA_CMD) & 1 == 1 {
        std::thread::sleep(std::time::Duration::from_millis(2));
    }
}

/// RAM whose guest-physical addresses are the devices' IOVAs.
pub(crate) fn layout() -> Layout {
    Layout::new([GpaRange::new(IOVA, BYTES).unwrap()], Granule::host_page()).unwrap()
}

/// One source, started, in a ledger with one receiver that holds a copy.
pub(crate) struct Tracked<S> {
    pub(crate) source: S,
    pub(crate) ledger: Ledger,
    pub(crate) iova: IovaMap,
    cursor: CursorId,
}

impl<S: DirtySource> Tracked<S> {
    pub(crate) fn new(mut source: S) -> Self {
        source.start(&layout(), &IovaMap::Identity).unwrap();
        Self::started(source)
    }

    /// Takes a source that is on already.
    pub(crate) fn started(source: S) -> Self {
        let mut ledger = Ledger::new(layout(), 1);
        let cursor = ledger.open(Start::Copied);
        Self { source, ledger, iova: IovaMap::Identity, cursor }
    }

    /// Collects; a source that fails leaves all that it covers dirty.
    pub(crate) fn collect(&mut self) -> Result<(), SourceError> {
        let result = self.source.collect(&mut self.ledger.sink(0, &self.iova));
        self.ledger.absorb();
        if result.is_err() {
            self.source.cover().ranges.into_iter().for_each(|range| self.ledger.mark(range));
        }
        result
    }

    /// The pages that the receiver lacks, which it has from now on.
    pub(crate) fn taken(&mut self) -> BTreeSet<u64> {
        self.ledger.absorb();
        self.ledger.begin_round(self.cursor);
        let Some(chunk) = self.ledger.take(self.cursor, ChunkLimits::NONE) else { return BTreeSet::new() };
        let pieces = chunk.ranges().iter().flat_map(|range| range.pieces(PAGE as u64));
        let pages = pieces.map(|piece| (piece.start() - IOVA) / PAGE as u64).collect();
        self.ledger.commit(chunk);
        pages
    }

    /// Collects, which succeeds, and returns the pages reported.
    #[track_caller]
    pub(crate) fn pages(&mut self) -> BTreeSet<u64> {
        self.collect().unwrap();
        self.taken()
    }
}
