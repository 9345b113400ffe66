// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

use std::collections::BTreeSet;
use std::fs::File;
use std::sync::atomic::AtomicU8;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread;

use proptest::prelude::*;
use vm_memory::{FileOffset, MmapRegion, VolatileMemory};

use super::*;
use crate::ledger::{ChunkLimits, Ledger, Start};

const PAGE: u64 = 4096;

/// A log as a back end sees it: bytes.
fn mapped(log: LogBase<'_>) -> MmapRegion<()> {
    let file = File::from(log.fd().try_clone_to_owned().unwrap());
    let size = usize::try_from(log.mmap_size()).unwrap();
    MmapRegion::from_file(FileOffset::new(file, log.mmap_offset()), size).unwrap()
}

fn set_bit(log: &MmapRegion<()>, page: u64) {
    let byte: &AtomicU8 = log.get_atomic_ref(usize::try_from(page / 8).unwrap()).unwrap();
    byte.fetch_or(1 << (page % 8), Ordering::SeqCst);
}

/// How a back end fails the next swap.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fault {
    /// The message did not reach it.
    Refused,
    /// It took the log, and the answer got lost.
    Unanswered,
}

/// A back end that does as the protocol says, and is told what goes wrong.
#[derive(Default)]
struct Model {
    log: Option<MmapRegion<()>>,
    log_all: bool,
    used_rings: bool,
    calls: Vec<String>,
    fault: Option<Fault>,
    stopped: bool,
    /// Pages written while a swap is under way, before the new log counts, and right after.
    during_swap: Option<(u64, u64)>,
    refuses_used_rings: bool,
}

impl Model {
    fn writes(&self, page: u64) {
        if self.log_all {
            set_bit(self.log.as_ref().unwrap(), page);
        }
    }

    fn writes_used_ring(&self, page: u64) {
        if self.used_rings {
            self.writes(page);
        }
    }

    fn set_log_base(&mut self, log: LogBase<'_>) -> Result<LogBaseAnswer, VhostUserError> {
        self.calls.push("set_log_base".to_owned());
        if self.stopped {
            return Ok(LogBaseAnswer::Stopped);
        }
        let fault = self.fault.take();
        if fault == Some(Fault::Refused) {
            return Err("connection is broken".into());
        }
        let pages = self.during_swap.take();
        if let Some((before, _)) = pages {
            self.writes(before);
        }
        self.log = Some(mapped(log));
        if let Some((_, after)) = pages {
            self.writes(after);
        }
        if fault == Some(Fault::Unanswered) { Err("no answer".into()) } else { Ok(LogBaseAnswer::Taken) }
    }
}

#[derive(Default, Clone)]
struct Shared(Arc<Mutex<Model>>);

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Model> {
        self.0.lock().unwrap()
    }
}

impl VhostUserBackEnd for Shared {
    fn set_log_base(&mut self, log: LogBase<'_>) -> Result<LogBaseAnswer, VhostUserError> {
        self.lock().set_log_base(log)
    }

    fn log_all(&mut self, on: bool) -> Result<(), VhostUserError> {
        let mut model = self.lock();
        model.calls.push(format!("log_all {on}"));
        model.log_all = on;
        Ok(())
    }

    fn log_used_rings(&mut self, on: bool) -> Result<(), VhostUserError> {
        let mut model = self.lock();
        model.calls.push(format!("log_used_rings {on}"));
        if model.refuses_used_rings {
            return Err("no such ring".into());
        }
        model.used_rings = on;
        Ok(())
    }
}

fn layout_of(ram: &[(u64, u64)], host_page: Granule) -> Layout {
    Layout::new(ram.iter().map(|&(page, pages)| range(page, pages)), host_page).unwrap()
}

/// Two regions that share a word of the log, and one far above.
const RAM: [(u64, u64); 3] = [(0, 130), (135, 200), (1 << 20, 70)];

fn layout() -> Layout {
    layout_of(&RAM, Granule::KIB_4)
}

fn range(page: u64, pages: u64) -> GpaRange {
    GpaRange::new(page * PAGE, pages * PAGE).unwrap()
}

fn started() -> (Shared, VhostUserLog<Shared>) {
    let back_end = Shared::default();
    let mut log = VhostUserLog::new("net0", back_end.clone());
    log.start(&layout(), &IovaMap::Identity).unwrap();
    (back_end, log)
}

/// Collects once for a VM of `layout`; returns the 4 KiB pages marked, those of a failed collect too.
fn collected_in(layout: &Layout, log: &mut impl DirtySource) -> (Result<(), SourceError>, BTreeSet<u64>) {
    let mut ledger = Ledger::new(layout.clone(), 1);
    let cursor = ledger.open(Start::Copied);
    let answer = log.collect(&mut ledger.sink(0, &IovaMap::Identity));
    ledger.absorb();
    let chunk = ledger.take(cursor, ChunkLimits::NONE);
    let ranges = chunk.map(|chunk| chunk.ranges().to_vec()).unwrap_or_default();
    (answer, ranges.iter().flat_map(|range| range.start() / PAGE..range.end() / PAGE).collect())
}

fn collected(log: &mut impl DirtySource) -> BTreeSet<u64> {
    let (answer, pages) = collected_in(&layout(), log);
    answer.unwrap();
    pages
}

fn pages<const N: usize>(pages: [u64; N]) -> BTreeSet<u64> {
    BTreeSet::from(pages)
}

#[test]
fn c24_a_new_log_is_given_before_the_old_one_is_read() {
    let (back_end, mut log) = started();
    back_end.lock().during_swap = Some((3, 4));
    assert_eq!(collected(&mut log), pages([3]), "page 3 was written before the swap was answered");
    assert_eq!(collected(&mut log), pages([4]), "page 4 went to the new log");
    assert_eq!(collected(&mut log), pages([]));
}

#[test]
fn c24_what_a_back_end_logged_is_read_when_it_is_stopped_and_gone() {
    let (back_end, mut log) = started();
    back_end.lock().writes(7);
    collected(&mut log);
    {
        let mut model = back_end.lock();
        model.writes(8);
        model.writes(1 << 20);
        model.stopped = true;
        model.log = None;
    }
    assert_eq!(collected(&mut log), pages([8, 1 << 20]));
    assert_eq!(collected(&mut log), pages([]));
}

#[test]
fn c25_used_rings_are_logged_too_and_in_the_order_that_loses_nothing() {
    let (back_end, mut log) = started();
    let order = ["set_log_base", "log_all true", "log_used_rings true"];
    assert_eq!(back_end.lock().calls, order, "a log to write to comes before the wish to log");
    back_end.lock().writes_used_ring(129);
    assert_eq!(collected(&mut log), pages([129]));
    back_end.lock().calls.clear();
    log.stop().unwrap();
    log.stop().unwrap();
    assert_eq!(back_end.lock().calls, ["log_used_rings false", "log_all false"]);
    assert_eq!(collected(&mut log), pages([]));
}

#[test]
fn a_swap_that_fails_leaves_the_old_log_and_loses_nothing() {
    for fault in [Fault::Refused, Fault::Unanswered] {
        let (back_end, mut log) = started();
        back_end.lock().writes(1);
        back_end.lock().fault = Some(fault);
        let (answer, marked) = collected_in(&layout(), &mut log);
        let error = answer.unwrap_err();
        assert_eq!(error.operation, Operation::Collect);
        let bytes = back_end.lock().log.as_ref().unwrap().size();
        assert_eq!(error.cause.to_string(), format!("Back end does not take a log of {bytes} bytes"));
        back_end.lock().writes(2);
        let mut found = marked;
        found.extend(collected(&mut log));
        assert_eq!(found, pages([1, 2]), "{fault:?}");
        back_end.lock().writes(3);
        assert_eq!(collected(&mut log), pages([3]), "{fault:?}");
    }
}

#[test]
fn what_is_logged_after_an_answer_got_lost_is_read_when_the_back_end_stops() {
    let (back_end, mut log) = started();
    back_end.lock().fault = Some(Fault::Unanswered);
    collected_in(&layout(), &mut log).0.unwrap_err();
    back_end.lock().writes(2);
    back_end.lock().stopped = true;
    assert_eq!(collected(&mut log), pages([2]));
}

#[test]
fn a_bit_that_is_set_late_in_a_log_that_was_read_comes_with_the_next_collect() {
    let (back_end, mut log) = started();
    let old = back_end.lock().log.take().unwrap();
    back_end.lock().log_all = false;
    collected(&mut log);
    set_bit(&old, 200);
    assert_eq!(collected(&mut log), pages([200]));
}

#[test]
fn a_bit_that_is_set_late_in_a_log_that_was_too_short_comes_with_the_next_collect() {
    let (back_end, mut log) = started();
    let old = back_end.lock().log.take().unwrap();
    back_end.lock().log_all = false;
    plug(&mut log).unwrap();
    assert_eq!(collected_in(&grown(), &mut log).1, pages([]));
    set_bit(&old, 200);
    assert_eq!(collected_in(&grown(), &mut log).1, pages([200]));
}

#[test]
fn every_collect_covers_all_ram_whatever_the_log_holds() {
    let (_, log) = started();
    let cover = log.cover();
    assert!(cover.precise);
    for region in layout().regions() {
        assert!(cover.ranges.iter().any(|range| range.covers(region.range())));
    }
}

#[test]
fn the_log_grows_with_the_ram() {
    let (back_end, mut log) = started();
    back_end.lock().writes(5);
    let grown = grown();
    let (answer, marked) = collected_in(&grown, &mut log);
    answer.unwrap();
    assert_eq!(marked, pages([5]));
    for page in [6, (3 << 20) + 63] {
        back_end.lock().writes(page);
        assert_eq!(collected_in(&grown, &mut log).1, pages([page]), "whichever log it is");
    }
}

fn grown() -> Layout {
    layout_of(&[RAM[0], RAM[1], RAM[2], PLUGGED], Granule::KIB_4)
}

/// RAM behind the end of any log for [`RAM`].
const PLUGGED: (u64, u64) = (3 << 20, 64);

fn plug(log: &mut VhostUserLog<Shared>) -> Result<(), SourceError> {
    log.plugged(&PluggedRam { gpa: range(PLUGGED.0, PLUGGED.1), kvm_slot: None })
}

#[test]
fn what_is_logged_until_a_longer_log_is_taken_is_read_wherever_it_is() {
    let (back_end, mut log) = started();
    back_end.lock().fault = Some(Fault::Unanswered);
    collected_in(&layout(), &mut log).0.unwrap_err();
    // The back end logs to the spare, which is too short now.
    back_end.lock().during_swap = Some((2, 3));
    let (answer, marked) = collected_in(&grown(), &mut log);
    answer.unwrap();
    assert_eq!(marked, pages([2]));
    assert_eq!(collected_in(&grown(), &mut log).1, pages([3]));
}

#[test]
fn ram_that_is_plugged_in_has_a_log_before_the_back_end_is_given_it() {
    let (back_end, mut log) = started();
    back_end.lock().writes(5);
    back_end.lock().during_swap = Some((6, 7));
    plug(&mut log).unwrap();
    let last = PLUGGED.0 + PLUGGED.1 - 1;
    back_end.lock().writes(last);
    assert_eq!(collected_in(&grown(), &mut log).1, pages([5, 6, 7, last]));
    back_end.lock().calls.clear();
    plug(&mut log).unwrap();
    assert!(back_end.lock().calls.is_empty(), "both logs reach it by now");
    log.stop().unwrap();
    plug(&mut log).unwrap();
}

#[test]
fn ram_whose_log_a_back_end_does_not_take_is_refused_and_no_bit_is_lost() {
    for fault in [Fault::Refused, Fault::Unanswered] {
        let (back_end, mut log) = started();
        back_end.lock().writes(5);
        back_end.lock().fault = Some(fault);
        assert_eq!(plug(&mut log).unwrap_err().operation, Operation::Plugged);
        back_end.lock().writes(6);
        back_end.lock().during_swap = Some((7, 8));
        assert_eq!(collected(&mut log), pages([5, 6, 7]), "{fault:?}");
        assert_eq!(collected(&mut log), pages([8]), "{fault:?}");
    }
}

#[test]
fn ram_is_plugged_in_while_a_back_end_is_stopped() {
    let (back_end, mut log) = started();
    back_end.lock().writes(5);
    back_end.lock().stopped = true;
    plug(&mut log).unwrap();
    back_end.lock().stopped = false;
    assert_eq!(collected_in(&grown(), &mut log).1, pages([5]));
    back_end.lock().writes(PLUGGED.0);
    back_end.lock().stopped = true;
    assert_eq!(collected_in(&grown(), &mut log).1, pages([PLUGGED.0]));
}

#[test]
fn a_log_can_be_long_enough_from_the_start() {
    let back_end = Shared::default();
    let mut log = VhostUserLog::new("net0", back_end.clone()).reaching(4 << 30 << 2);
    log.start(&layout(), &IovaMap::Identity).unwrap();
    assert_eq!(back_end.lock().log.as_ref().unwrap().size(), 16 << 30 >> 15);
}

#[test]
fn a_log_too_long_for_this_host_is_an_error() {
    let mut log = VhostUserLog::new("net0", Shared::default()).reaching(u64::MAX);
    let error = log.start(&layout(), &IovaMap::Identity).unwrap_err();
    assert_eq!(error.operation, Operation::Start);
    assert!(error.cause.to_string().starts_with("Cannot make a log of "), "{}", error.cause);
}

#[test]
fn a_back_end_that_logs_only_half_of_it_is_switched_off_again() {
    let back_end = Shared::default();
    back_end.lock().refuses_used_rings = true;
    let mut log = VhostUserLog::new("net0", back_end.clone());
    let error = log.start(&layout(), &IovaMap::Identity).unwrap_err();
    assert_eq!(error.cause.to_string(), "Cannot switch logging of used rings on");
    assert!(!back_end.lock().log_all);
    assert_eq!(collected(&mut log), pages([]));
}

#[test]
fn c20_a_bit_of_4_kib_marks_its_host_page_of_64_kib() {
    let layout = layout_of(&[(0, 64), (160, 32)], Granule::new(16 * PAGE).unwrap());
    let back_end = Shared::default();
    let mut log = VhostUserLog::new("net0", back_end.clone());
    log.start(&layout, &IovaMap::Identity).unwrap();
    for page in [17, 31, 175, 100] {
        back_end.lock().writes(page);
    }
    let (answer, marked) = collected_in(&layout, &mut log);
    answer.unwrap();
    assert_eq!(marked, (16..32).chain(160..176).collect());
}

proptest! {
    #[test]
    fn every_collect_reports_just_the_pages_of_ram_written_since_the_one_before(
        rounds in prop::collection::vec(prop::collection::btree_set(prop_oneof![0..400u64, (1u64 << 20)..(1 << 20) + 100], 0..40), 1..6),
    ) {
        let (back_end, mut log) = started();
        let in_ram = |page: u64| RAM.iter().any(|&(first, count)| (first..first + count).contains(&page));
        for written in rounds {
            written.iter().for_each(|&page| back_end.lock().writes(page));
            let oracle: BTreeSet<_> = written.into_iter().filter(|&page| in_ram(page)).collect();
            prop_assert_eq!(collected(&mut log), oracle);
        }
    }
}

/// A back end on a thread of its own, which is given logs by message.
struct Remote {
    logs: Sender<MmapRegion<()>>,
    answers: Receiver<()>,
}

impl VhostUserBackEnd for Remote {
    fn set_log_base(&mut self, log: LogBase<'_>) -> Result<LogBaseAnswer, VhostUserError> {
        if self.logs.send(mapped(log)).is_err() {
            return Ok(LogBaseAnswer::Stopped);
        }
        // The thread may end before it has seen the message, having written all it was to write.
        Ok(self.answers.recv().map_or(LogBaseAnswer::Stopped, |()| LogBaseAnswer::Taken))
    }

    fn log_all(&mut self, _on: bool) -> Result<(), VhostUserError> {
        Ok(())
    }

    fn log_used_rings(&mut self, _on: bool) -> Result<(), VhostUserError> {
        Ok(())
    }
}

/// Writes `count` pages of `memory`, each then marked in the log that was given last.
fn write_and_log(memory: &[AtomicU64], count: u64, logs: &Receiver<MmapRegion<()>>, answers: &Sender<()>) {
    let mut log = None;
    let mut random = 1u64;
    let mut written = 0;
    while written < count {
        if let Ok(next) =
            if log.is_none() { logs.recv().map_err(drop) } else { logs.try_recv().map_err(drop) }
        {
            log = Some(next);
            answers.send(()).unwrap();
        }
        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        let page = random >> 33 & 0xff;
        if page.is_multiple_of(5) {
            continue;
        }
        written += 1;
        memory[usize::try_from(page).unwrap()].store(written, Ordering::SeqCst);
        set_bit(log.as_ref().unwrap(), page);
    }
}

#[test]
fn a_copy_of_what_is_reported_equals_what_a_thread_writes_meanwhile() {
    let layout = layout_of(&[(0, 256)], Granule::KIB_4);
    let memory: Vec<_> = (0..256).map(|_| AtomicU64::new(0)).collect();
    let mut copy = vec![0; 256];
    let (logs, log_receiver) = channel();
    let (answer_sender, answers) = channel();
    let mut log = VhostUserLog::new("net0", Remote { logs, answers });
    thread::scope(|scope| {
        let memory = &memory;
        let writer = scope.spawn(move || write_and_log(memory, 400_000, &log_receiver, &answer_sender));
        log.start(&layout, &IovaMap::Identity).unwrap();
        let mut last = false;
        while !last {
            last = writer.is_finished();
            let (answer, marked) = collected_in(&layout, &mut log);
            answer.unwrap();
            assert!(marked.iter().all(|page| !page.is_multiple_of(5)), "pages that nobody wrote");
            for page in marked {
                let page = usize::try_from(page).unwrap();
                copy[page] = memory[page].load(Ordering::SeqCst);
            }
        }
    });
    assert_eq!(copy, memory.iter().map(|page| page.load(Ordering::SeqCst)).collect::<Vec<_>>());
}
