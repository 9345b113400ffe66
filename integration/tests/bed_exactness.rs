// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Random schedules of DMA by two real devices, and of writes by a KVM guest and its VMM, over the same memory: no page is missing
//! from the merged table, and where no guest runs it names exactly what was written.
//!
//! Runs inside the test bed: `integration/testbed/run --test bed_exactness`, with `-- --include-ignored` for 200 schedules more.
//! Elsewhere each test says that it was skipped.

#![expect(clippy::unwrap_used, reason = "a test's own steps must succeed")]

use std::collections::BTreeSet;
use std::thread::sleep;
use std::time::Duration;

use vfio_migration::ledger::Attribution;
use vfio_migration::migratable::MigratableDevice;
use vfio_migration_integration::bed::{Bed, BedSetup, BedSide, EduDma, Here, Mirror};
use vfio_migration_integration::device::stream_word;
use vfio_migration_integration::vmm::{AreaKind, MIN_RAM_BYTES, Memory, PAGE_BYTES, PAGE_LEN};
use vm_memory::{Bytes, GuestAddress};

const ROUNDS: u64 = 6;

/// A stream of numbers that a seed decides.
struct Draw {
    seed: u64,
    drawn: u64,
}

impl Draw {
    fn below(&mut self, bound: u64) -> u64 {
        self.drawn += 1;
        stream_word(self.seed, self.drawn) % bound
    }

    fn one_in(&mut self, chances: u64) -> bool {
        self.below(chances) == 0
    }
}

/// Pages that a source must report at the next collect, and pages that it may report.
#[derive(Debug, Default)]
struct Oracle {
    engine: BTreeSet<u64>,
    edu: BTreeSet<u64>,
    vmm: BTreeSet<u64>,
    maybe: BTreeSet<u64>,
}

impl Oracle {
    fn all(&self) -> BTreeSet<u64> {
        self.engine.iter().chain(&self.edu).chain(&self.vmm).copied().collect()
    }
}

/// A machine with both devices, and the library over it.
struct Bench {
    side: BedSide,
    devices: MigratableDevice,
    memory: Memory,
    position: u64,
    pinned: BTreeSet<u64>,
    /// Pages of edu's last DMA to memory: their bits stand until a report finds edu idle.
    held: BTreeSet<u64>,
    /// Whether no DMA that only reads memory has been started since.
    held_is_last: bool,
}

fn page_of(gpa: u64) -> u64 {
    gpa & !(PAGE_BYTES - 1)
}

impl Bench {
    fn new(test: &str, dirty_ring_bytes: Option<u32>) -> Option<Self> {
        let bed = Bed::find(test)?;
        let ([mdev, _], [edu, _]) = (bed.two(test, "dirty_mdev")?, bed.two(test, "edu_vfio")?);
        let setup = BedSetup {
            memory_bytes: MIN_RAM_BYTES,
            dirty_ring_bytes,
            vcpu_harvests: true,
            guest_rate: Some(2000),
            engine_rate: 0,
            seed: 77,
            mdev,
            edu: Some(edu),
            served_state_bytes: None,
        };
        let Here { side, devices, memory } = Here::new(setup).unwrap();
        side.boot().unwrap();
        let (pinned, held) = Default::default();
        Some(Self { side, devices, memory, position: 0, pinned, held, held_is_last: false })
    }

    /// One schedule: some rounds over one session of the log.
    fn run(&mut self, seed: u64) {
        let mut draw = Draw { seed, drawn: 0 };
        let mirror = Mirror::start(&self.memory, &mut self.devices.tracker().lock().unwrap()).unwrap();
        let mut oracle = Oracle::default();
        for round in 0..ROUNDS {
            let at = format!("schedule {seed}, round {round}");
            let guest_runs = draw.one_in(2);
            if guest_runs {
                self.side.machine().resume().unwrap();
            }
            for _ in 0..draw.below(5) {
                self.act(&mut draw, &mut oracle);
            }
            if guest_runs {
                sleep(Duration::from_millis(10 + draw.below(40)));
                self.side.machine().pause().unwrap();
            }
            if draw.one_in(3) {
                self.finish_edu();
            }
            oracle = self.collect(&mirror, &oracle, guest_runs, &at);
        }
        self.settle(&mirror, &oracle, seed);
        mirror.end(&mut self.devices.tracker().lock().unwrap()).unwrap();
    }

    fn act(&mut self, draw: &mut Draw, oracle: &mut Oracle) {
        let engine = self.side.engine();
        match draw.below(6) {
            0 | 1 => {
                let words = draw.below(40);
                engine.burst(words).unwrap();
                let written = self.side.stream().words(self.position, words);
                oracle.engine.extend(written.map(|(iova, _)| page_of(iova)));
                self.position += words;
            }
            2 => {
                let iova = self.engine_word(draw);
                engine.write_at(iova).unwrap();
                oracle.engine.insert(page_of(iova));
            }
            3 => {
                self.finish_edu();
                let dma = self.side.territory().edu_dma(draw.seed, draw.below(1000));
                self.side.edu().unwrap().start(dma).unwrap();
                self.held_is_last = dma.to_memory;
                if dma.to_memory {
                    self.held = pages_of(dma);
                    oracle.edu.extend(&self.held);
                }
            }
            4 => {
                let area = self.side.machine().map().ranges(AreaKind::Untouched).next().unwrap();
                let gpa = area.start + draw.below((area.end - area.start) / 8) * 8;
                self.side.machine().memory().write_obj(draw.below(u64::MAX), GuestAddress(gpa)).unwrap();
                oracle.vmm.insert(page_of(gpa));
            }
            _ => {
                let page = page_of(self.engine_word(draw));
                if self.pinned.insert(page) {
                    engine.pin(page).unwrap();
                    oracle.engine.insert(page);
                } else {
                    engine.unpin(page).unwrap();
                    self.pinned.remove(&page);
                }
            }
        }
    }

    /// An aligned word in the engine's first window.
    fn engine_word(&self, draw: &mut Draw) -> u64 {
        let window = &self.side.stream().windows[0];
        window.start + draw.below((window.end - window.start) / 8) * 8
    }

    fn finish_edu(&self) {
        self.side.edu().unwrap().finish().unwrap();
    }

    fn edu_is_busy(&self) -> bool {
        self.side.edu().unwrap().is_busy().unwrap()
    }

    fn pages_reported(&self) -> Vec<(String, Attribution)> {
        self.devices
            .tracker()
            .lock()
            .unwrap()
            .attribution()
            .map(|(id, attribution)| (id.to_owned(), attribution))
            .collect()
    }

    /// Collects and checks; returns what is due at the next collect already: pinned pages, and those of a DMA that was in flight.
    fn collect(&mut self, mirror: &Mirror, oracle: &Oracle, guest_ran: bool, at: &str) -> Oracle {
        if !self.edu_is_busy() {
            self.held.clear();
        }
        let before = self.pages_reported();
        let degradations = self.devices.tracker().lock().unwrap().collect();
        assert!(degradations.is_empty(), "{at}: {degradations:?}");
        let still_busy = self.edu_is_busy();
        let table = mirror.copy(&mut self.devices.tracker().lock().unwrap()).unwrap();
        let written = oracle.all();
        assert!(table.is_superset(&written), "{at}: missing {:x?}", missing(&table, &written));
        let mut allowed = written;
        allowed.extend(&oracle.maybe);
        assert!(guest_ran || table.is_subset(&allowed), "{at}: too many {:x?}", missing(&allowed, &table));

        let count = |id: &str| {
            let of =
                |seen: &[(String, Attribution)]| seen.iter().find(|(name, _)| name == id).unwrap().1.pages;
            of(&self.pages_reported()) - of(&before)
        };
        assert_eq!(count("container:mdev0"), oracle.engine.len() as u64, "{at}: of the mediated device");
        let (edu, late) = (count("device-log:edu0"), oracle.maybe.difference(&oracle.edu).count());
        assert!(
            (oracle.edu.len()..=oracle.edu.len() + late).contains(&usize::try_from(edu).unwrap()),
            "{at}: {edu} of edu"
        );

        let mut differing = mirror.differing().unwrap();
        differing.retain(|page| !self.held.contains(page));
        assert_eq!(differing, BTreeSet::new(), "{at}: not in the table and yet written");
        let (due, maybe) = match still_busy && self.held_is_last {
            true => (self.held.clone(), BTreeSet::new()),
            false => (BTreeSet::new(), self.held.clone()),
        };
        Oracle { engine: self.pinned.clone(), edu: due, maybe, ..Oracle::default() }
    }

    /// Ends a schedule with everything landed and unpinned, and nothing missing.
    fn settle(&mut self, mirror: &Mirror, oracle: &Oracle, seed: u64) {
        for page in std::mem::take(&mut self.pinned) {
            self.side.engine().unpin(page).unwrap();
        }
        self.finish_edu();
        self.collect(mirror, oracle, false, &format!("schedule {seed}, end"));
        self.collect(mirror, &Oracle::default(), false, &format!("schedule {seed}, after the end"));
    }
}

fn pages_of(dma: EduDma) -> BTreeSet<u64> {
    (page_of(dma.iova)..dma.iova + dma.bytes).step_by(PAGE_LEN).collect()
}

fn missing(from: &BTreeSet<u64>, of: &BTreeSet<u64>) -> Vec<u64> {
    of.difference(from).copied().collect()
}

fn run(test: &str, dirty_ring_bytes: Option<u32>, seeds: std::ops::Range<u64>) {
    let Some(mut bench) = Bench::new(test, dirty_ring_bytes) else { return };
    let count = seeds.end - seeds.start;
    seeds.for_each(|seed| bench.run(seed));
    let machine = bench.side.machine();
    assert!(machine.passes().unwrap() > 0 && machine.wrong_pages().unwrap() == 0);
    for (id, attribution) in bench.pages_reported() {
        assert!(attribution.pages > 0, "{id} reported nothing in {count} schedules");
        eprintln!("{id}: {} pages, {} of them exclusive", attribution.pages, attribution.exclusive_pages);
    }
}

const RING: Option<u32> = Some(16 << 10);

#[test]
fn ten_schedules_with_the_dirty_log() {
    run("schedules with the dirty log", None, 0..10);
}

#[test]
fn ten_schedules_with_the_dirty_ring() {
    run("schedules with the dirty ring", RING, 100..110);
}

#[test]
#[ignore = "a hundred take minutes"]
fn a_hundred_schedules_with_the_dirty_log() {
    run("many schedules with the dirty log", None, 1000..1100);
}

#[test]
#[ignore = "a hundred take minutes"]
fn a_hundred_schedules_with_the_dirty_ring() {
    run("many schedules with the dirty ring", RING, 2000..2100);
}
