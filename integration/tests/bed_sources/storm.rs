// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A virtual IOMMU whose mappings change a thousand times a second while memory is copied, with as many DMA writes.
//!
//! Each run stops the device now and then, takes what is dirty, and compares all of memory with the copy. It has to be a storm: many changes a
//! second, many writes of the device's own, many rounds, and a device's log that is re-armed as the mappings leave it.

use std::fs::File;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread::sleep;
use std::time::{Duration, Instant};

use vfio_migration::granule::Granule;
use vfio_migration::iova::{IovaMap, Mapping};
use vfio_migration::layout::Layout;
use vfio_migration::ledger::{ChunkLimits, CursorId, Start};
use vfio_migration::range::{GpaRange, IovaRange};
use vfio_migration::source::{
    ContainerLog, Cover, DeviceLog, DirtySource, Harvest, Meaning, Reports, Sink, SourceError,
};
use vfio_migration::tracker::{DeviceMappings, SpaceId, Tracker, TrackerError, VmMappings};
use vfio_migration_integration::device::stream_word;

use crate::bed::*;
use crate::kernel::*;
use crate::seed::map;

const CONTROL: u64 = 0x08;
const RATE: u64 = 0x30;
const WINDOW: u64 = 0x100;
const PAGE_BYTES: u64 = PAGE as u64;

/// Changes of the mappings a second, and as many words that the engine writes beside one at each change.
const CHANGES_PER_S: u64 = 1000;
/// Mappings that stand at a time.
const STANDING: usize = 48;
/// Pages where a bounded address space lies.
const APERTURE: u64 = 1024;
/// Where address spaces begin, or grow from.
const MIDDLE: u64 = 2 << 30;
/// Changes of one of ten runs, and of one of a hundred: a second of them and two, on a machine that keeps up.
const FEW_CHANGES: u64 = CHANGES_PER_S;
const MANY_CHANGES: u64 = 2 * CHANGES_PER_S;
/// Every so many rounds all is compared.
const COMPARED: u32 = 16;
/// Changes a second below which it is no storm, even on a busy machine.
const LEAST_CHANGES_PER_S: u64 = 50;
/// Changes to a round at most, and to a word that the engine writes by itself.
const MOST_CHANGES_PER_ROUND: u64 = 50;
const MOST_CHANGES_PER_WORD: u64 = 10;
/// Times that the log of a device is re-armed at least, where the mappings wander and where they stay in an aperture. A restart covers as much
/// again, and each waits longer than the one before: a run sees four, or two.
const LEAST_RESTARTS_WANDERING: u32 = 3;
const LEAST_RESTARTS: u32 = 1;

/// A device's log that counts how often it is re-armed over other IOVAs.
struct CountedLog {
    log: DeviceLog<File>,
    covered: Vec<IovaRange>,
    restarts: Arc<AtomicU32>,
}

impl CountedLog {
    fn look(&mut self) {
        if self.log.covered() != self.covered {
            self.restarts.fetch_add(u32::from(!self.covered.is_empty()), Ordering::Relaxed);
            self.covered = self.log.covered().to_vec();
        }
    }
}

impl DirtySource for CountedLog {
    fn id(&self) -> &str {
        self.log.id()
    }

    fn reports(&self) -> Reports {
        self.log.reports()
    }

    fn cover(&self) -> Cover {
        self.log.cover()
    }

    fn start(&mut self, layout: &Layout, iova: &IovaMap) -> Result<(), SourceError> {
        self.log.start(layout, iova)
    }

    fn collect<'a>(&'a mut self, sink: &mut Sink<'a>) -> Result<(), SourceError> {
        self.look();
        self.log.collect(sink)
    }

    fn mapped(&mut self, mapping: &Mapping) -> Result<(), SourceError> {
        self.look();
        self.log.mapped(mapping)
    }

    fn harvest(&self) -> Harvest {
        self.log.harvest()
    }

    fn unmapped(&mut self, mapping: &Mapping, sink: &mut Sink<'_>) -> Result<(), SourceError> {
        self.look();
        self.log.unmapped(mapping, sink)
    }

    fn forget(&mut self, mapping: &Mapping) {
        self.log.forget(mapping);
    }

    fn standing_bytes(&self) -> u64 {
        self.log.standing_bytes()
    }

    fn stop(&mut self) -> Result<(), SourceError> {
        self.look();
        self.log.stop()
    }
}

#[derive(Debug, Clone, Copy)]
enum Log {
    Container,
    Device,
}

/// Which IOVAs the guest's driver takes next.
#[derive(Debug, Clone, Copy)]
enum Allocator {
    /// Any free ones of an aperture.
    Anywhere,
    /// Those above all before.
    Upward,
    /// Those below all before, as Linux does it.
    Downward,
}

/// What one run measured.
#[derive(Debug, Default)]
struct Figures {
    changes: u64,
    words: u64,
    /// Words that the engine wrote by itself.
    own_words: u64,
    /// Times that the device's log was re-armed.
    restarts: u32,
    took: Duration,
    rounds: u32,
    pages: u64,
    most_pages: u64,
    /// Pages of the rounds in the run's second half, and how many these were.
    late: (u64, u32),
    /// Pages at the end, when the device stood still.
    last: u64,
}

impl Figures {
    /// Checks that so many changes came, fast, among rounds and writes of the engine's own.
    fn assert_storm(&self, changes: u64, at: &str) {
        assert_eq!(self.changes, changes, "{at}");
        let most = Duration::from_secs(changes / LEAST_CHANGES_PER_S);
        assert!(self.took <= most, "{at}: no storm: {self:?}");
        assert!(u64::from(self.rounds) >= changes / MOST_CHANGES_PER_ROUND, "{at}: few rounds: {self:?}");
        assert!(self.own_words >= changes / MOST_CHANGES_PER_WORD, "{at}: few writes: {self:?}");
        assert_eq!(self.words, changes + self.own_words, "{at}");
    }
}

/// The guest that maps and unmaps.
struct Guest {
    allocator: Allocator,
    standing: Vec<Mapping>,
    next_iova: u64,
    seed: u64,
    draws: u64,
}

impl Guest {
    fn new(seed: u64) -> Self {
        let allocators = [Allocator::Anywhere, Allocator::Upward, Allocator::Downward];
        let allocator = allocators[usize::try_from(seed % 3).unwrap()];
        Self { allocator, standing: Vec::new(), next_iova: MIDDLE, seed, draws: 0 }
    }

    fn draw(&mut self, below: u64) -> u64 {
        self.draws += 1;
        stream_word(self.seed, self.draws) % below
    }

    /// Draws a mapping that is not there.
    fn draw_mapping(&mut self) -> Mapping {
        let pages = 1 + self.draw(4);
        let gpa = self.draw(PAGES as u64 - pages) * PAGE_BYTES;
        let bytes = pages * PAGE_BYTES;
        let start = match self.allocator {
            Allocator::Upward => {
                self.next_iova += bytes;
                self.next_iova - bytes
            }
            Allocator::Downward => {
                self.next_iova -= bytes;
                self.next_iova
            }
            Allocator::Anywhere => loop {
                let start = self.next_iova + self.draw(APERTURE - pages) * PAGE_BYTES;
                let iova = IovaRange::new(start, bytes).unwrap();
                if self.standing.iter().all(|other| other.iova().intersection(iova).is_none()) {
                    break start;
                }
            },
        };
        Mapping::new(IovaRange::new(start, bytes).unwrap(), GpaRange::new(gpa, bytes).unwrap()).unwrap()
    }

    /// Makes a mapping in the device's container.
    fn map_one(&mut self, device: &Device) -> Mapping {
        let mapping = self.draw_mapping();
        let (iova, gpa) = (mapping.iova(), mapping.gpa());
        let (offset, bytes) = (usize::try_from(gpa.start()).unwrap(), usize::try_from(gpa.len()).unwrap());
        map(device, iova.start(), offset, bytes);
        self.standing.push(mapping);
        mapping
    }

    /// The IOVAs that it has used.
    fn used(&self) -> std::ops::Range<u64> {
        match self.allocator {
            Allocator::Anywhere => MIDDLE..MIDDLE + APERTURE * PAGE_BYTES,
            Allocator::Upward => MIDDLE..self.next_iova,
            Allocator::Downward => self.next_iova..MIDDLE,
        }
    }
}

/// Takes the IOVAs of a range out of a container.
fn unmap(device: &Device, iova: u64, bytes: u64) {
    let mut unmap = [24, iova, bytes];
    vfio(&device.container, 114, &raw mut unmap).unwrap();
}

struct Storm {
    device: Device,
    tracker: Tracker,
    space: SpaceId,
    cursor: CursorId,
    guest: Guest,
    copy: Vec<u64>,
    changes: u64,
    restarts: Arc<AtomicU32>,
    began: Instant,
    figures: Figures,
}

fn layout_at_zero() -> Layout {
    Layout::new([GpaRange::new(0, BYTES).unwrap()], Granule::host_page()).unwrap()
}

impl Storm {
    fn new(mdev: &str, log: Log, seed: u64, changes: u64) -> Self {
        let device = Device::open("mdev", mdev);
        unmap(&device, IOVA, BYTES);
        let restarts = Arc::default();
        let source: Box<dyn DirtySource> = match log {
            Log::Container => {
                let container = device.container.try_clone().unwrap();
                Box::new(ContainerLog::new("container", container, 3, Meaning::Written).unwrap())
            }
            Log::Device => {
                let log = DeviceLog::new("device-log", device.file.try_clone().unwrap()).unwrap();
                Box::new(CountedLog { log, covered: Vec::new(), restarts: Arc::clone(&restarts) })
            }
        };
        let mut guest = Guest::new(seed);
        let mut journal = IovaMap::journal();
        (0..STANDING).for_each(|_| journal.map(guest.map_one(&device)).unwrap());
        let gpa = guest.standing.iter().map(Mapping::gpa).collect();
        let devices = vec![DeviceMappings { device: "mdev".to_owned(), gpa }];
        let ram = vec![GpaRange::new(0, BYTES).unwrap()];
        let mappings =
            move || VmMappings { ram: ram.clone(), devices: devices.clone(), ..VmMappings::default() };
        let mut builder = Tracker::builder(layout_at_zero()).mappings(mappings);
        let space = builder.space(journal);
        let mut tracker = builder.source_of(space, ["mdev"], source).build().unwrap();
        let cursor = tracker.begin(Start::Empty).unwrap();
        let copy = vec![0; PAGES * PAGE / 8];
        Self {
            device,
            tracker,
            space,
            cursor,
            guest,
            copy,
            changes,
            restarts,
            began: Instant::now(),
            figures: Figures::default(),
        }
    }

    /// Has the device write a word somewhere in a mapping.
    fn write_in(&mut self, mapping: Mapping) {
        let at = mapping.iova().start() + self.guest.draw(mapping.iova().len() / 8) * 8;
        self.device.write(WRITE_AT, at).unwrap();
        self.figures.words += 1;
    }

    /// Takes one mapping away and makes another, with a write to one of them.
    fn change(&mut self) {
        let victim = self.guest.draw(self.guest.standing.len() as u64);
        let victim = self.guest.standing.swap_remove(usize::try_from(victim).unwrap());
        let writes_last = self.guest.draw(2) == 0;
        if writes_last {
            self.write_in(victim);
        }
        let unmapped = self.tracker.unmap(self.space, victim.iova(), || {
            unmap(&self.device, victim.iova().start(), victim.iova().len());
            Ok::<_, TrackerError>(())
        });
        assert!(unmapped.unwrap().is_empty());
        let mapping = self.guest.map_one(&self.device);
        self.tracker.map(self.space, mapping).unwrap();
        if !writes_last {
            self.write_in(mapping);
        }
        self.figures.changes += 1;
    }

    /// Makes the changes that are due by now, but so many at most: a slow machine has its rounds, too.
    fn catch_up(&mut self, most: u64) {
        let due = u64::try_from(self.began.elapsed().as_micros()).unwrap() * CHANGES_PER_S / 1_000_000;
        let until = due.min(self.changes).min(self.figures.changes + most);
        while self.figures.changes < until {
            self.change();
        }
    }

    /// Copies what is dirty, with changes in between unless `at_rest`; returns how many pages these were.
    fn round(&mut self, at_rest: bool) -> u64 {
        let failures = if at_rest { self.tracker.collect_final() } else { self.tracker.collect() };
        assert!(failures.is_empty(), "{failures:?}");
        self.tracker.begin_round(self.cursor);
        let mut pages = 0;
        let limits = ChunkLimits { bytes: 16 * PAGE_BYTES, ranges: usize::MAX };
        while let Some(chunk) = self.tracker.take(self.cursor, limits).unwrap() {
            for range in chunk.ranges() {
                self.copy(*range);
                pages += range.len() / PAGE_BYTES;
            }
            if !at_rest {
                self.catch_up(4);
            }
            self.tracker.commit(chunk);
        }
        pages
    }

    fn copy(&mut self, range: GpaRange) {
        let words = usize::try_from(range.start() / 8).unwrap()..usize::try_from(range.end() / 8).unwrap();
        for word in words {
            // SAFETY: the mapping is this long and stays; the device may write to it meanwhile, and the word is read as it is.
            self.copy[word] = unsafe { self.device.memory.cast::<u64>().wrapping_add(word).read_volatile() };
        }
    }

    /// Stops the device, takes all that is dirty, and looks for pages that the copy lacks; returns how many were taken.
    fn compare(&mut self, when: &str) -> u64 {
        self.device.write(CONTROL, 0).unwrap();
        let pages = self.round(true);
        let memory = self.device.memory();
        let wrong = (0..PAGES).filter(|page| {
            let words = page * PAGE / 8..(page + 1) * PAGE / 8;
            memory[words.clone()] != self.copy[words]
        });
        let wrong: Vec<_> = wrong.collect();
        assert!(wrong.is_empty(), "{when}: pages {wrong:?} were lost");
        self.device.write(CONTROL, 1).unwrap();
        pages
    }

    fn run(mut self, at: &str) -> Figures {
        // The engine's own stream reaches the aperture, or the mappings that stand at first.
        let window = self.guest.used();
        for (register, value) in [
            (WINDOW, window.start),
            (WINDOW + 8, window.end - window.start),
            (SEED, self.guest.seed),
            (RATE, CHANGES_PER_S),
            (CONTROL, 1),
        ] {
            self.device.write(register, value).unwrap();
        }
        self.began = Instant::now();
        while self.figures.changes < self.changes {
            self.catch_up(8);
            let pages = self.round(false);
            let figures = &mut self.figures;
            figures.rounds += 1;
            figures.pages += pages;
            if figures.changes > self.changes / 2 {
                figures.most_pages = figures.most_pages.max(pages);
                figures.late = (figures.late.0 + pages, figures.late.1 + 1);
            }
            if self.figures.rounds.is_multiple_of(COMPARED) {
                let round = self.figures.rounds;
                self.compare(&format!("{at}, round {round}"));
            }
            sleep(Duration::from_millis(1));
        }
        self.figures.last = self.compare(&format!("{at}, end"));
        self.figures.took = self.began.elapsed();
        self.figures.own_words = self.device.read(POSITION);
        self.figures.words += self.figures.own_words;
        self.figures.restarts = self.restarts.load(Ordering::Relaxed);
        self.device.write(CONTROL, 0).unwrap();
        self.tracker.end(self.cursor).unwrap();
        self.figures
    }
}

fn storm(test: &str, log: Log, seeds: std::ops::Range<u64>, changes: u64) {
    let Some([mdev, _]) = two(test, "dirty_mdev") else { return };
    for seed in seeds {
        // Some drivers acknowledge whole words, some hold few ranges.
        let _words = Parameter::fixture("log_whole_words", seed / 3 % 2);
        let _ranges = Parameter::fixture("log_max_ranges", seed / 6 % 2 * 4);
        let storm = Storm::new(&mdev, log, seed, changes);
        let (at, allocator) = (format!("{test}, seed {seed}"), storm.guest.allocator);
        let figures = storm.run(&at);
        let mean = figures.late.0 / u64::from(figures.late.1.max(1));
        eprintln!(
            "{at}, {allocator:?}: {} changes and {} words in {:.1} s, {} restarts, {} rounds of {mean} pages late, {} at most, {} at the end",
            figures.changes,
            figures.words,
            figures.took.as_secs_f64(),
            figures.restarts,
            figures.rounds,
            figures.most_pages,
            figures.last,
        );
        figures.assert_storm(changes, &at);
        let least = match (log, allocator) {
            (Log::Container, _) => 0,
            (Log::Device, Allocator::Anywhere) => LEAST_RESTARTS,
            (Log::Device, Allocator::Upward | Allocator::Downward) => LEAST_RESTARTS_WANDERING,
        };
        assert!(figures.restarts >= least, "{at}: the log was re-armed too few times: {figures:?}");
        // Not all of memory again and again.
        assert!(mean <= PAGES as u64 / 2 && figures.last <= PAGES as u64 / 2, "{at}: {figures:?}");
    }
}

#[test]
fn c09_c12_ten_storms_of_mappings_in_a_container_lose_nothing() {
    storm("storm in a container", Log::Container, 0..10, FEW_CHANGES);
}

#[test]
fn c09_c12_ten_storms_of_mappings_behind_a_devices_log_lose_nothing() {
    storm("storm behind a device's log", Log::Device, 0..10, FEW_CHANGES);
}

#[test]
#[ignore = "a hundred take minutes"]
fn c09_c12_a_hundred_storms_of_mappings_in_a_container_lose_nothing() {
    storm("many storms in a container", Log::Container, 100..200, MANY_CHANGES);
}

#[test]
#[ignore = "a hundred take minutes"]
fn c09_c12_a_hundred_storms_of_mappings_behind_a_devices_log_lose_nothing() {
    storm("many storms behind a device's log", Log::Device, 100..200, MANY_CHANGES);
}
