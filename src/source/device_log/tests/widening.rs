// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Mappings that the running log does not cover, on a scripted device.

use std::io;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use super::super::widening::Widening;
use super::*;

const PAGES: u64 = 2048;

/// What the device was told, and what it holds.
#[derive(Debug, Default)]
struct State {
    /// What is logged; `None` while the log is off.
    logged: Option<Vec<IovaRange>>,
    dirty: BTreeSet<u64>,
    /// The most bytes that a START may name.
    room: Option<u64>,
    /// START is refused so many times from now.
    refusals: usize,
    starts: usize,
    stops: usize,
}

/// A device with a log and a script; clones are the same device.
#[derive(Debug, Default, Clone)]
struct Scripted(Arc<Mutex<State>>);

impl Scripted {
    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap()
    }

    /// Has the device write to a page.
    fn write(&self, page: u64) {
        let state = &mut *self.state();
        let logs = |logged: &Vec<IovaRange>| logged.iter().any(|range| range.contains(page << 12));
        if state.logged.as_ref().is_some_and(logs) {
            state.dirty.insert(page);
        }
    }
}

impl DmaLogging for Scripted {
    fn start(&self, granule: Granule, ranges: &[IovaRange]) -> io::Result<u64> {
        let state = &mut *self.state();
        assert!(state.logged.is_none(), "a log that is on is started");
        state.starts += 1;
        let bytes: u64 = ranges.iter().map(|range| range.len()).sum();
        if state.refusals > 0 || state.room.is_some_and(|room| bytes > room) {
            state.refusals = state.refusals.saturating_sub(1);
            return Err(io::Error::from_raw_os_error(libc::ENOMEM));
        }
        state.logged = Some(ranges.to_vec());
        Ok(granule.bytes())
    }

    fn report(&self, range: IovaRange, _: Granule, words: &mut [u64]) -> io::Result<()> {
        let state = &mut *self.state();
        state.logged.as_ref().ok_or_else(|| io::Error::from_raw_os_error(libc::EINVAL))?;
        let first = range.start() >> 12;
        for page in first..range.end() >> 12 {
            if state.dirty.remove(&page) {
                let bit = usize::try_from(page - first).unwrap();
                words[bit / 64] |= 1 << (bit % 64);
            }
        }
        Ok(())
    }

    fn stop(&self) -> io::Result<()> {
        let state = &mut *self.state();
        state.logged = None;
        state.dirty.clear();
        state.stops += 1;
        Ok(())
    }
}

/// A started log over `mapped`, pages as (first, count), of a device, and the address space.
struct Logged {
    log: DeviceLog<Scripted>,
    device: Scripted,
    iova: IovaMap,
}

impl Logged {
    fn new(mapped: &[(u64, u64)]) -> Self {
        let device = Scripted::default();
        let mut iova = IovaMap::journal();
        mapped.iter().for_each(|&(page, pages)| iova.map(pages_of(page, pages)).unwrap());
        let mut log = DeviceLog::unprobed("device-log:x".to_owned(), device.clone());
        log.start(&layout(), &iova).unwrap();
        Self { log, device, iova }
    }

    fn map(&mut self, page: u64, pages: u64) -> Result<(), SourceError> {
        self.iova.map(pages_of(page, pages)).unwrap();
        self.log.mapped(&pages_of(page, pages))
    }

    /// Takes a mapping away; returns the pages reported.
    fn unmap(&mut self, page: u64, pages: u64) -> BTreeSet<u64> {
        let (layout, mapping) = (layout(), pages_of(page, pages));
        let mut marks = Marks::new(&layout);
        self.log.unmapped(&mapping, &mut Sink::new(&layout, &self.iova, &mut marks)).unwrap();
        self.log.forget(&mapping);
        self.iova.forget(&mapping);
        marked(&marks, PAGES)
    }

    fn try_collect(&mut self) -> (Result<(), SourceError>, BTreeSet<u64>) {
        let layout = layout();
        let mut marks = Marks::new(&layout);
        let result = self.log.collect(&mut Sink::new(&layout, &self.iova, &mut marks));
        (result, marked(&marks, PAGES))
    }

    fn collect(&mut self) -> BTreeSet<u64> {
        let (result, pages) = self.try_collect();
        result.unwrap();
        pages
    }
}

fn pages_of(page: u64, pages: u64) -> Mapping {
    mapping(page << 12, pages << 12)
}

fn set(pages: impl IntoIterator<Item = u64>) -> BTreeSet<u64> {
    pages.into_iter().collect()
}

#[test]
fn c09_a_log_that_is_widened_tells_all_that_is_mapped_once_and_then_what_is_written() {
    let mut logged = Logged::new(&[(0, 8), (64, 8)]);
    logged.device.write(3);
    logged.map(256, 4).unwrap();
    assert_eq!(logged.device.state().starts, 2);
    assert_eq!(logged.log.covered(), [range(0, 72 << 12), range(256 << 12, 4 << 12)]);
    logged.device.write(259);
    assert_eq!(logged.collect(), set((0..8).chain(64..72).chain(256..260)), "old and new");
    assert_eq!(logged.collect(), set([]), "once");
    [5, 70, 257].into_iter().for_each(|page| logged.device.write(page));
    assert_eq!(logged.collect(), set([5, 70, 257]));
}

#[test]
fn c09_a_mapping_that_goes_before_the_next_collect_is_told_whole() {
    let mut logged = Logged::new(&[(0, 8)]);
    logged.map(256, 4).unwrap();
    assert_eq!(logged.unmap(0, 8), set(0..8));
    assert_eq!(logged.collect(), set(256..260));
}

#[test]
fn c09_c42_a_device_that_cannot_log_more_goes_on_as_it_was_and_what_it_does_not_log_is_always_dirty() {
    let mut logged = Logged::new(&[(0, 8)]);
    logged.device.state().room = Some(8 << 12);
    let error = logged.map(256, 4).unwrap_err();
    assert_eq!(error.operation, Operation::Mapped);
    assert!(
        matches!(error.cause.downcast_ref(), Some(DeviceLogError::Uncovered { .. })),
        "{:?}",
        error.cause
    );
    assert_eq!(logged.log.covered(), [range(0, 8 << 12)]);
    assert_eq!(logged.collect(), set((0..8).chain(256..260)), "the log was off for a moment");
    logged.device.write(5);
    assert_eq!(logged.collect(), set([5].into_iter().chain(256..260)));

    let starts = logged.device.state().starts;
    logged.map(512, 2).unwrap_err();
    assert_eq!(logged.device.state().starts, starts, "it is not stopped again in vain");
    logged.device.write(6);
    assert_eq!(logged.collect(), set([6].into_iter().chain(256..260).chain(512..514)));
}

#[test]
fn c09_a_log_that_does_not_start_again_is_lost_until_it_does() {
    let mut logged = Logged::new(&[(0, 8)]);
    logged.device.state().refusals = 3;
    logged.map(256, 4).unwrap_err();
    let (result, _) = logged.try_collect();
    assert!(matches!(result.unwrap_err().cause.downcast_ref(), Some(DeviceLogError::Lost)));
    logged.try_collect().0.unwrap_err();
    assert_eq!(logged.log.cover().ranges.len(), 2, "for which the caller takes all of this");
    assert_eq!(logged.collect(), set(256..260), "only that the log does not cover");
    logged.device.write(1);
    assert_eq!(logged.collect(), set([1].into_iter().chain(256..260)));
}

#[test]
fn a_mapping_inside_what_is_logged_leaves_the_log_alone() {
    let mut logged = Logged::new(&[(0, 8), (16, 8)]);
    logged.map(10, 2).unwrap();
    assert_eq!(logged.device.state().starts, 1);
    assert_eq!(logged.collect(), set([]));
}

#[test]
fn c09_a_storm_of_new_mappings_restarts_the_log_a_few_times_and_is_covered_after_that() {
    let mut logged = Logged::new(&[(0, 8)]);
    logged.log.widening = Widening::pausing(Duration::ZERO);
    let mut told = 0;
    for page in (8..1500).step_by(4) {
        logged.map(page, 4).unwrap();
        logged.device.write(page + 1);
        assert!(logged.unmap(page, 4).contains(&(page + 1)));
        told += logged.collect().len();
    }
    let starts = logged.device.state().starts;
    assert!((3..12).contains(&starts), "{starts} starts for 373 mappings");
    assert!(told <= starts * 8, "{told} pages in 373 collects of 8 pages that nobody wrote");
}

#[test]
fn c09_a_mapping_soon_after_a_restart_waits_for_the_next_and_is_dirty_until_then() {
    let mut logged = Logged::new(&[(0, 8)]);
    logged.log.widening = Widening::pausing(Duration::from_secs(3600));
    logged.map(256, 4).unwrap();
    logged.map(512, 4).unwrap();
    assert_eq!(logged.device.state().starts, 2);
    assert_eq!(logged.collect(), set((0..8).chain(256..260).chain(512..516)));
    assert_eq!(logged.collect(), set(512..516), "nothing is known of it");
    assert_eq!(logged.unmap(512, 4), set(512..516));
    assert_eq!(logged.collect(), set([]));

    logged.map(512, 4).unwrap();
    logged.log.widening = Widening::pausing(Duration::ZERO);
    assert_eq!(logged.collect(), set((0..8).chain(256..260).chain(512..516)), "restarted");
    logged.device.write(513);
    assert_eq!(logged.collect(), set([513]));
}

#[test]
fn c09_room_that_the_device_does_not_have_is_not_asked_for() {
    let mut logged = Logged::new(&[(100, 8)]);
    logged.log.widening = Widening::pausing(Duration::ZERO);
    logged.map(300, 4).unwrap();
    logged.device.state().room = Some(420 << 12);
    logged.map(340, 4).unwrap();
    // Around 100..344 as much again is 0..588, too much; below it 0..344 is not.
    assert_eq!(logged.log.covered(), [range(0, 344 << 12)]);
}

#[derive(Debug, Clone)]
enum Step {
    Map(u64, u64),
    Unmap(usize),
    Write(u64),
    Collect,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        2 => (0..PAGES, 1..90u64).prop_map(|(page, pages)| Step::Map(page, pages)),
        1 => (0..8usize).prop_map(Step::Unmap),
        4 => (0..PAGES).prop_map(Step::Write),
        1 => Just(Step::Collect),
    ];
    prop::collection::vec(step, 1..60)
}

/// A log, and what the device wrote that nobody was told of.
struct Oracle {
    logged: Logged,
    mapped: Vec<(u64, u64)>,
    untold: BTreeSet<u64>,
}

impl Oracle {
    fn new(room: Option<u64>, pause: Duration) -> Self {
        let mut logged = Logged::new(&[(0, 8)]);
        logged.log.widening = Widening::pausing(pause);
        logged.device.state().room = room.map(|pages| pages << 12);
        Self { logged, mapped: vec![(0, 8)], untold: BTreeSet::new() }
    }

    fn write(&mut self, page: u64) {
        if self.mapped.iter().any(|&(first, count)| (first..first + count).contains(&page)) {
            self.logged.device.write(page);
            self.untold.insert(page);
        }
    }

    fn map(&mut self, page: u64, pages: u64) {
        if page + pages > PAGES || self.logged.iova.map(pages_of(page, pages)).is_err() {
            return;
        }
        let stops = self.logged.device.state().stops;
        let _dirty_at_every_collect = self.logged.log.mapped(&pages_of(page, pages));
        self.mapped.push((page, pages));
        if self.logged.device.state().stops > stops {
            // The device went on while its log was off.
            self.untold.extend(self.mapped.iter().map(|(first, count)| first + count - 1));
        }
    }

    /// Carries out a step; returns the pages that were lost.
    fn step(&mut self, step: &Step) -> BTreeSet<u64> {
        match *step {
            Step::Map(page, pages) => self.map(page, pages),
            Step::Write(page) => self.write(page),
            Step::Unmap(index) if index < self.mapped.len() => {
                let (page, pages) = self.mapped.swap_remove(index);
                let told = self.logged.unmap(page, pages);
                self.untold.retain(|page| !told.contains(page));
                return self
                    .untold
                    .iter()
                    .copied()
                    .filter(|untold| (page..page + pages).contains(untold))
                    .collect();
            }
            Step::Unmap(_) => {}
            Step::Collect => {
                // A device that will not log more is an error once, and its caller takes all that is mapped.
                let (result, mut told) = self.logged.try_collect();
                if result.is_err() {
                    told.extend(self.mapped.iter().flat_map(|&(first, count)| first..first + count));
                }
                return std::mem::take(&mut self.untold).difference(&told).copied().collect();
            }
        }
        BTreeSet::new()
    }
}

proptest! {
    #[test]
    fn c09_whatever_is_mapped_and_whenever_no_write_is_lost(
        steps in steps(), room in prop::option::of(64..1500u64), hurried in any::<bool>(),
    ) {
        let mut oracle = Oracle::new(room, if hurried { Duration::ZERO } else { Duration::from_secs(3600) });
        for step in steps.iter().chain([&Step::Collect]) {
            prop_assert_eq!(oracle.step(step), BTreeSet::new(), "{:?}", step);
        }
    }
}
