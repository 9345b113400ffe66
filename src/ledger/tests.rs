// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::*;

use super::*;
use crate::granule::Granule;
use crate::layout::Region;

/// A page-at-a-time ledger with one cursor, as plain as can be.
#[derive(Default)]
struct Naive {
    pending: BTreeSet<u64>,
    in_flight: BTreeSet<u64>,
    position: u64,
}

#[derive(Debug, Clone)]
enum Step {
    /// Report (source, first page, pages), by words that are lent or page by page, then absorb.
    Collect(Vec<(usize, u64, u64)>, bool),
    Mark(u64, u64),
    BeginRound,
    Take {
        bytes: u64,
        ranges: usize,
    },
    Commit(usize),
    RollBack(usize),
}

const SOURCES: usize = 3;

fn step() -> impl Strategy<Value = Step> {
    let pages = || prop_oneof![4 => 1..4u64, 4 => 1..200u64, 1 => 500..1500u64];
    let run = (0..700u64, pages());
    prop_oneof![
        4 => (prop::collection::vec((0..SOURCES, 0..700u64, pages()), 0..6), any::<bool>())
            .prop_map(|(spans, lend)| Step::Collect(spans, lend)),
        1 => run.prop_map(|(page, pages)| Step::Mark(page, pages)),
        2 => Just(Step::BeginRound),
        6 => (prop_oneof![0..400u64, 400..1500u64], 1..9usize).prop_map(|(pages, ranges)| Step::Take { bytes: pages << 12, ranges }),
        3 => any::<usize>().prop_map(Step::Commit),
        2 => any::<usize>().prop_map(Step::RollBack),
    ]
}

fn layouts() -> impl Strategy<Value = Layout> {
    let pages = prop_oneof![3 => 1..300u64, 1 => 512..1500u64];
    prop::collection::vec((pages, prop_oneof![Just(0u64), 1..90u64]), 1..4).prop_map(|regions| {
        let mut next = 0;
        let ranges: Vec<_> = regions
            .into_iter()
            .map(|(pages, gap)| {
                let range = GpaRange::new((next + gap) << 12, pages << 12).unwrap();
                next += gap + pages;
                range
            })
            .collect();
        Layout::new(ranges, Granule::KIB_4).unwrap()
    })
}

fn pages_of(layout: &Layout, first: u64, pages: u64) -> impl Iterator<Item = u64> {
    (first..first + pages).filter(|page| layout.region_of(page << 12).is_some())
}

fn pages_in(ranges: &[GpaRange]) -> Vec<u64> {
    ranges.iter().flat_map(|range| (range.start() >> 12)..(range.end() >> 12)).collect()
}

/// For each source the words of each region in which the spans' pages are set.
fn words_of(layout: &Layout, spans: &[(usize, u64, u64)]) -> Vec<Vec<(GpaRange, Vec<u64>)>> {
    let region_words = |source: usize, region: &Region| {
        let first_page = region.range().start() >> 12;
        let mut words = vec![0; region.words().len()];
        for &(_, first, pages) in spans.iter().filter(|(by, ..)| *by == source) {
            let inside = pages_of(layout, first, pages).filter(|page| region.range().contains(page << 12));
            for bit in inside.map(|page| usize::try_from(page - first_page).unwrap()) {
                words[bit / 64] |= 1 << (bit % 64);
            }
        }
        // What lies behind the last page is nobody's.
        let behind = usize::try_from(region.range().len() >> 12).unwrap() % 64;
        *words.last_mut().unwrap() |= if behind == 0 { 0 } else { u64::MAX << behind };
        (region.range(), words)
    };
    let of = |source| layout.regions().iter().map(|region| region_words(source, region)).collect();
    (0..SOURCES).map(of).collect()
}

/// Reports the spans' pages in one collect, the last source's not as words.
fn lend(ledger: &mut Ledger, spans: &[(usize, u64, u64)]) {
    let words = words_of(&ledger.layout().clone(), spans);
    let mut collection = ledger.collection();
    for (source, words) in words.iter().enumerate() {
        let sink = collection.next_sink(&IovaMap::Identity);
        for (range, words) in words.iter().rev().filter(|_| source + 1 < SOURCES) {
            sink.lend_gpa_words(*range, Granule::KIB_4, words, None).unwrap();
        }
        for &(_, first, pages) in spans.iter().filter(|(by, ..)| source + 1 == SOURCES && *by == source) {
            sink.gpa_range(GpaRange::new(first << 12, pages << 12).unwrap());
        }
    }
    collection.absorb();
}

fn assert_is_a_set(ranges: &[GpaRange]) {
    for pair in ranges.windows(2) {
        assert!(pair[0].end() < pair[1].start(), "{} and {} touch or overlap", pair[0], pair[1]);
    }
}

impl Naive {
    fn take(&mut self, layout: &Layout, bytes: u64, ranges: usize) -> Vec<u64> {
        let room = (bytes >> 12).max(1);
        let (mut taken, mut runs): (Vec<u64>, usize) = (Vec::new(), 0);
        for page in self.pending.iter().copied().filter(|&page| page >= self.position) {
            if self.in_flight.contains(&page) {
                continue;
            }
            let joins = taken.last().is_some_and(|&last| last + 1 == page);
            if taken.len() as u64 >= room || (!joins && runs >= ranges) {
                break;
            }
            runs += usize::from(!joins);
            taken.push(page);
        }
        for page in &taken {
            assert!(layout.region_of(page << 12).is_some());
            self.pending.remove(page);
            assert!(self.in_flight.insert(*page), "page {page:#x} is in flight twice");
            self.position = page + 1;
        }
        taken
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(600))]

    #[test]
    fn the_ledger_equals_a_page_at_a_time_oracle(
        layout in layouts(), empty in any::<bool>(), steps in prop::collection::vec(step(), 1..60), plain in any::<bool>(),
    ) {
        crate::sys::cpu::plain::ONLY.set(plain);
        let mut ledger = Ledger::new(layout.clone(), SOURCES);
        let cursor = ledger.open(if empty { Start::Empty } else { Start::Copied });
        let mut naive = Naive::default();
        if empty {
            naive.pending = pages_of(&layout, 0, 10_000).collect();
        }
        let mut flying: Vec<Chunk> = Vec::new();
        let mut dirtied = BTreeSet::new();
        let mut reports = [Attribution::default(); SOURCES];
        let mut this_round: BTreeSet<u64> = BTreeSet::new();
        for step in steps {
            match step {
                Step::Collect(spans, lent) => {
                    let mut by_page: BTreeMap<u64, BTreeSet<usize>> = BTreeMap::new();
                    if lent {
                        lend(&mut ledger, &spans);
                    }
                    for (source, first, pages) in spans {
                        if !lent {
                            ledger.sink(source, &IovaMap::Identity).gpa_range(GpaRange::new(first << 12, pages << 12).unwrap());
                        }
                        for page in pages_of(&layout, first, pages) {
                            by_page.entry(page).or_default().insert(source);
                        }
                    }
                    if !lent {
                        ledger.absorb();
                    }
                    for (page, sources) in by_page {
                        dirtied.insert(page);
                        naive.pending.insert(page);
                        for &source in &sources {
                            reports[source].pages += 1;
                            reports[source].exclusive_pages += u64::from(sources.len() == 1);
                        }
                    }
                    prop_assert_eq!(ledger.attribution(), &reports);
                }
                Step::Mark(first, pages) => {
                    ledger.mark(GpaRange::new(first << 12, pages << 12).unwrap());
                    naive.pending.extend(pages_of(&layout, first, pages));
                }
                Step::BeginRound => {
                    ledger.begin_round(cursor);
                    naive.position = 0;
                    this_round.clear();
                }
                Step::Take { bytes, ranges } => {
                    let chunk = ledger.take(cursor, ChunkLimits { bytes, ranges });
                    let expected = naive.take(&layout, bytes, ranges);
                    prop_assert_eq!(chunk.as_ref().map(|chunk| pages_in(chunk.ranges())).unwrap_or_default(), expected);
                    if let Some(chunk) = chunk {
                        assert_is_a_set(chunk.ranges());
                        prop_assert_eq!(chunk.bytes(), chunk.ranges().iter().map(|range| range.len()).sum::<u64>());
                        for page in pages_in(chunk.ranges()) {
                            prop_assert!(this_round.insert(page), "page twice in one round");
                        }
                        flying.push(chunk);
                    }
                }
                Step::Commit(pick) if !flying.is_empty() => {
                    let chunk = flying.swap_remove(pick % flying.len());
                    for page in pages_in(chunk.ranges()) { naive.in_flight.remove(&page); }
                    ledger.commit(chunk);
                }
                Step::RollBack(pick) if !flying.is_empty() => {
                    let chunk = flying.swap_remove(pick % flying.len());
                    for page in pages_in(chunk.ranges()) { naive.in_flight.remove(&page); naive.pending.insert(page); }
                    ledger.roll_back(chunk);
                }
                Step::Commit(_) | Step::RollBack(_) => {}
            }
            let expected = Outstanding { pending_bytes: (naive.pending.len() as u64) << 12, in_flight_bytes: (naive.in_flight.len() as u64) << 12 };
            prop_assert_eq!(ledger.outstanding(cursor), Some(expected));
            prop_assert_eq!(ledger.dirtied_bytes(cursor), Some((dirtied.len() as u64) << 12));
        }
    }

    #[test]
    fn acknowledgements_in_any_order_never_lose_or_double_a_page(
        writes in prop::collection::vec((0..300u64, 1..20u64), 1..40), acks in prop::collection::vec(any::<usize>(), 40),
    ) {
        // The receiver holds the version of each page its last applied copy carried; an ACK speaks of the copy it belongs to.
        let layout = Layout::new([GpaRange::new(0, 320 << 12).unwrap()], Granule::KIB_4).unwrap();
        let mut ledger = Ledger::new(layout, 1);
        let cursor = ledger.open(Start::Empty);
        let (mut memory, mut receiver) = ([0u32; 320], [u32::MAX; 320]);
        let mut flying: Vec<(Chunk, Vec<(usize, u32)>)> = Vec::new();
        let index = |page: u64| usize::try_from(page).unwrap();
        for ((first, pages), ack) in writes.into_iter().zip(acks) {
            for page in first..first + pages { memory[index(page)] += 1; }
            ledger.sink(0, &IovaMap::Identity).gpa_range(GpaRange::new(first << 12, pages << 12).unwrap());
            ledger.absorb();
            ledger.begin_round(cursor);
            if let Some(chunk) = ledger.take(cursor, ChunkLimits { bytes: 100 << 12, ranges: 8 }) {
                let copies = pages_in(chunk.ranges()).into_iter().map(|page| (index(page), memory[index(page)])).collect();
                flying.push((chunk, copies));
            }
            if !flying.is_empty() && ack % 2 == 0 {
                let (chunk, copies) = flying.swap_remove(ack / 2 % flying.len());
                for (page, version) in copies {
                    prop_assert!(receiver[page] == u32::MAX || receiver[page] <= version, "an older copy landed later");
                    receiver[page] = version;
                }
                ledger.commit(chunk);
            }
        }
        for (chunk, copies) in flying.drain(..) {
            for (page, version) in copies { receiver[page] = version; }
            ledger.commit(chunk);
        }
        ledger.begin_round(cursor);
        while let Some(chunk) = ledger.take(cursor, ChunkLimits::NONE) {
            for page in pages_in(chunk.ranges()) { receiver[index(page)] = memory[index(page)]; }
            ledger.commit(chunk);
        }
        prop_assert_eq!(memory, receiver);
    }
}

fn small() -> Ledger {
    Ledger::new(Layout::new([GpaRange::new(0, 256 << 12).unwrap()], Granule::KIB_4).unwrap(), 1)
}

#[test]
fn a_second_receiver_gets_pages_the_first_acknowledged() {
    let mut ledger = small();
    let first = ledger.open(Start::Empty);
    ledger.begin_round(first);
    let chunk = ledger.take(first, ChunkLimits { bytes: 128 << 12, ranges: 1 }).unwrap();
    ledger.commit(chunk);
    ledger.close(first);
    let second = ledger.open(Start::Empty);
    assert_eq!(ledger.outstanding(second).unwrap().pending_bytes, 256 << 12);
}

#[test]
fn a_late_acknowledgement_of_a_closed_session_changes_nothing() {
    let mut ledger = small();
    let first = ledger.open(Start::Empty);
    ledger.begin_round(first);
    let late = ledger.take(first, ChunkLimits::NONE).unwrap();
    ledger.close(first);
    let second = ledger.open(Start::Empty);
    ledger.commit(late);
    assert_eq!(
        ledger.outstanding(second).unwrap(),
        Outstanding { pending_bytes: 256 << 12, in_flight_bytes: 0 }
    );
    assert_eq!(ledger.outstanding(first), None);
}

#[test]
fn adjacent_regions_make_one_range() {
    let regions = [GpaRange::new(0, 70 << 12).unwrap(), GpaRange::new(70 << 12, 10 << 12).unwrap()];
    let mut ledger = Ledger::new(Layout::new(regions, Granule::KIB_4).unwrap(), 1);
    let cursor = ledger.open(Start::Empty);
    let chunk = ledger.take(cursor, ChunkLimits::NONE).unwrap();
    assert_eq!(chunk.ranges(), [GpaRange::new(0, 80 << 12).unwrap()]);
    ledger.commit(chunk);
}

/// Has one source report `words` with `standing`, over the pages from `first` on: in a collect, or in one that is cut short. Returns what came of it.
fn standing_reported(
    words: &[u64],
    standing: &[u64],
    first: u64,
    in_collect: bool,
) -> (Attribution, Vec<u64>) {
    let layout = Layout::new([GpaRange::new(0, 700 << 12).unwrap()], Granule::KIB_4).unwrap();
    let mut ledger = Ledger::new(layout, 2);
    let cursor = ledger.open(Start::Copied);
    let range = GpaRange::new(first << 12, (words.len() as u64 * 64) << 12).unwrap();
    if in_collect {
        let mut collection = ledger.collection();
        let sink = collection.next_sink(&IovaMap::Identity);
        sink.lend_gpa_words(range, Granule::KIB_4, words, Some(standing)).unwrap();
        collection.absorb();
    } else {
        // A collect that is cut short keeps what it was told.
        let mut collection = ledger.collection();
        let sink = collection.next_sink(&IovaMap::Identity);
        sink.lend_gpa_words(range, Granule::KIB_4, words, Some(standing)).unwrap();
        drop(collection);
        ledger.absorb();
    }
    let pages = ledger.take(cursor, ChunkLimits::NONE).map(|chunk| pages_in(chunk.ranges()));
    (ledger.attribution()[0], pages.unwrap_or_default())
}

proptest! {
    #[test]
    fn pages_that_stand_are_pending_again_but_counted_once(
        words in prop::collection::vec(any::<u64>(), 10), standing in prop::collection::vec(any::<u64>(), 10),
        first in prop_oneof![Just(0u64), Just(64), 0..60u64], in_collect in any::<bool>(),
    ) {
        let words = &words[..9];
        let (attribution, pages) = standing_reported(words, &standing[..9], first, in_collect);
        let is_set = |words: &[u64], bit: u64| words[usize::try_from(bit / 64).unwrap()] >> (bit % 64) & 1 == 1;
        let reported: Vec<_> = (0..9 * 64).filter(|&bit| is_set(words, bit)).map(|bit| first + bit).collect();
        let fresh = reported.iter().filter(|&&page| !is_set(&standing, page - first)).count() as u64;
        prop_assert_eq!(pages, reported);
        prop_assert_eq!(attribution, Attribution { pages: fresh, exclusive_pages: fresh });
    }
}

#[test]
fn a_chunk_taken_before_the_round_began_is_still_on_its_way() {
    let mut ledger = small();
    let cursor = ledger.open(Start::Empty);
    ledger.begin_round(cursor);
    let early = ledger.take(cursor, ChunkLimits { bytes: 8 << 12, ranges: 1 }).unwrap();
    ledger.mark(GpaRange::new(0, 256 << 12).unwrap());
    ledger.begin_round(cursor);
    let next = ledger.take(cursor, ChunkLimits::NONE).unwrap();
    assert_eq!(next.ranges(), [GpaRange::new(8 << 12, 248 << 12).unwrap()]);
    let in_flight = |ledger: &Ledger| ledger.outstanding(cursor).unwrap().in_flight_bytes >> 12;
    assert_eq!(in_flight(&ledger), 256);
    ledger.commit(early);
    assert_eq!(in_flight(&ledger), 248);
    ledger.begin_round(cursor);
    ledger.roll_back(next);
    assert_eq!(in_flight(&ledger), 0);
    let all = ledger.take(cursor, ChunkLimits::NONE).unwrap();
    assert_eq!(all.bytes(), 256 << 12, "written since they were taken, or never acknowledged");
    ledger.commit(all);
}
