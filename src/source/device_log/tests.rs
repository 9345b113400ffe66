// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

use std::collections::BTreeSet;
use std::fs::File;

use proptest::prelude::*;

use super::*;
use crate::range::GpaRange;
use crate::source::Marks;

mod widening;

fn range(start: u64, len: u64) -> IovaRange {
    IovaRange::new(start, len).unwrap()
}

fn mapping(start: u64, len: u64) -> Mapping {
    Mapping::identity(GpaRange::new(start, len).unwrap())
}

fn layout() -> Layout {
    Layout::new([GpaRange::new(0, 8 << 20).unwrap()], Granule::KIB_4).unwrap()
}

/// A source whose every ioctl fails: what stands behind it is no device.
fn broken() -> DeviceLog<File> {
    DeviceLog::unprobed("device-log:x".to_owned(), File::open("/dev/null").unwrap())
}

fn armed(ranges: &[IovaRange]) -> Option<Armed> {
    let (asked, chosen) = (Granule::KIB_4, Granule::KIB_4);
    Some(Armed { ranges: ranges.to_vec(), asked, chosen, lost: false, gap: false, full: false })
}

fn collected(log: &mut DeviceLog<File>) -> (Result<(), SourceError>, u64) {
    let (layout, iova) = (layout(), IovaMap::Identity);
    let mut marks = Marks::new(&layout);
    let result = log.collect(&mut Sink::new(&layout, &iova, &mut marks));
    let words = (0..layout.words()).map(|word| u64::from(marks.dirty.word(word).count_ones()));
    (result, words.sum())
}

#[test]
fn a_descriptor_that_is_no_device_has_no_log() {
    let log = DeviceLog::new("d", File::open("/dev/null").unwrap());
    assert!(matches!(log, Err(DeviceLogError::Absent(_))));
}

#[test]
fn a_refused_start_leaves_the_source_off_and_names_what_was_asked() {
    let mut log = broken();
    let error = log.start(&layout(), &IovaMap::Identity).unwrap_err();
    assert_eq!(error.operation, Operation::Start);
    let message = error.cause.to_string();
    assert_eq!(message, "Cannot start DMA logging of 1 range, 0x0..0x800000 to 0x0..0x800000, at 4 KiB");
    assert!(log.covered().is_empty() && log.granule().is_none());
    log.stop().unwrap();
}

#[test]
fn nothing_mapped_is_not_asked_for() {
    let error = broken().start(&layout(), &IovaMap::journal()).unwrap_err();
    assert_eq!(error.cause.to_string(), "No memory is mapped for the device");
}

#[test]
fn c42_what_is_mapped_at_the_start_must_lie_inside_the_ranges_given() {
    let mut log = broken().with_coverage(Coverage::Ranges(vec![range(0, 4 << 20)]));
    let error = log.start(&layout(), &IovaMap::Identity).unwrap_err();
    assert_eq!(
        error.cause.to_string(),
        "Mapping at IOVA 0x0..0x800000 lies outside what the device was asked to log"
    );
}

#[test]
fn c07_a_failed_report_is_an_error_at_every_collect_until_the_log_is_started_anew() {
    let mut log = broken();
    log.armed = armed(&[range(0, 8 << 20)]);
    log.mapped(&mapping(0, 8 << 20)).unwrap();
    let (first, _) = collected(&mut log);
    assert!(first.unwrap_err().cause.to_string().starts_with("Cannot report the DMA to IOVA"));
    let (second, _) = collected(&mut log);
    assert_eq!(second.unwrap_err().cause.to_string(), "DMA log was lost at an earlier failure");
    assert_eq!(log.cover().ranges, [GpaRange::new(0, 8 << 20).unwrap()]);
}

#[test]
fn c07_a_report_that_fails_before_an_unmap_makes_the_next_collect_fail() {
    let mut log = broken();
    log.armed = armed(&[range(0, 8 << 20)]);
    let mapping = mapping(0, 1 << 20);
    log.mapped(&mapping).unwrap();
    let (layout, iova) = (layout(), IovaMap::Identity);
    let mut marks = Marks::new(&layout);
    log.unmapped(&mapping, &mut Sink::new(&layout, &iova, &mut marks)).unwrap_err();
    log.forget(&mapping);
    assert!(log.cover().ranges.is_empty());
    collected(&mut log).0.unwrap_err();
}

#[test]
fn a_devices_own_limit_of_ranges_is_kept_within_the_kernels() {
    assert_eq!(kernel_max_ranges(Granule::KIB_4), 256);
    assert_eq!(broken().with_max_ranges(3).max_ranges, 3);
    assert_eq!(broken().with_max_ranges(usize::MAX).max_ranges, kernel_max_ranges(Granule::host_page()));
}

#[test]
fn reports_are_bounded_and_whole_words_inside_what_is_armed() {
    let granule = Granule::new(2 << 20).unwrap();
    let armed = range(4 << 20, 10 << 40);
    let pieces: Vec<_> = reports(range((4 << 20) + 0x1000, 9 << 40), armed, granule).collect();
    assert_eq!(pieces.len(), 3);
    assert!(pieces.iter().all(|piece| granule.bits_for(piece.len()) <= REPORT_BITS));
    assert!(pieces.iter().all(|piece| (piece.start() - armed.start()).is_multiple_of(128 << 20)));
    assert!(pieces.iter().all(|piece| piece.len().is_multiple_of(128 << 20)));
    let to_the_end: Vec<_> = reports(range(armed.end() - 0x1000, 0x1000), armed, granule).collect();
    assert_eq!(to_the_end, [range(armed.end() - (128 << 20), 128 << 20)]);
    let short = range(4 << 20, 6 << 20);
    assert_eq!(reports(range(6 << 20, 0x1000), short, granule).collect::<Vec<_>>(), [short]);
}

proptest! {
    #[test]
    fn every_mapping_is_either_read_whole_or_unknown(
        steps in prop::collection::vec((0..5000u64, 1..3000u64), 1..12), cut in 0..20_000u64, from in 0..10_000u64, shift in 12..22u32,
    ) {
        let mut mapped = Mapped::default();
        let mut next = 0;
        for (gap, len) in steps {
            mapped.add(mapping((next + gap) << 12, len << 12));
            next += gap + len;
        }
        let covered = [range(from << 12, (cut + 1) << 12)];
        let plan = requests(&mapped, &covered, Granule::new(1 << shift).unwrap());
        for mapping in mapped.iter() {
            let iova = mapping.iova();
            let read: u64 = plan.reports.iter().filter_map(|report| report.intersection(iova)).map(|part| part.len()).sum();
            let known = covered[0].covers(iova);
            prop_assert_eq!(plan.unknown.contains(&iova), !known);
            prop_assert!(!known || read >= iova.len());
        }
    }
}

/// A driver that clears its bitmap by the word, and drops bits that were not asked for.
struct WordDriver {
    armed: Vec<IovaRange>,
    /// Whether the words of its bitmap begin with the lowest range, as pds has it, or with each range.
    one_bitmap: bool,
    dirty: BTreeSet<u64>,
}

impl WordDriver {
    fn report(&mut self, asked: IovaRange) -> Vec<u64> {
        let inside = self.armed.iter().find(|armed| armed.covers(asked)).expect("a part of one range");
        let origin = if self.one_bitmap { self.armed[0].start() } else { inside.start() } >> 12;
        let (first, end) = (asked.start() >> 12, asked.end() >> 12);
        let words = origin + (first - origin) / 64 * 64..origin + (end - origin).next_multiple_of(64);
        let mut bits = vec![0; usize::try_from((end - first).div_ceil(64)).unwrap()];
        for page in words.filter(|page| self.dirty.remove(page) && (first..end).contains(page)) {
            let bit = usize::try_from(page - first).unwrap();
            bits[bit / 64] |= 1 << (bit % 64);
        }
        bits
    }
}

/// Mappings of (gap, pages) each, one after the other.
fn mappings(steps: Vec<(u64, u64)>) -> IovaMap {
    let (mut iova, mut next) = (IovaMap::journal(), 0);
    for (gap, pages) in steps {
        iova.map(mapping((next + gap) << 12, pages << 12)).unwrap();
        next += gap + pages;
    }
    iova
}

fn marked(marks: &Marks, pages: u64) -> BTreeSet<u64> {
    let word = |page: u64| marks.dirty.word(usize::try_from(page / 64).unwrap());
    (0..pages).filter(|page| word(*page) >> (page % 64) & 1 == 1).collect()
}

proptest! {
    #[test]
    fn c55_nothing_is_lost_to_a_driver_that_clears_whole_words(
        steps in prop::collection::vec((0..150u64, 1..90u64), 1..6), merge in 1..6usize, one_bitmap: bool,
        rounds in prop::collection::vec(
            (prop::collection::btree_set(0..1500u64, 0..60), prop::option::of(0..6usize)), 1..6
        ),
    ) {
        let layout = Layout::new([GpaRange::new(0, 1500 << 12).unwrap()], Granule::KIB_4).unwrap();
        let iova = mappings(steps);
        let mapped = Mapped::at_start(&layout, &iova);
        let ranges = united(mapped.iter().map(|mapping| mapping.iova()));
        let armed = merged(&in_words(&ranges, Granule::KIB_4), merge);
        let mut driver = WordDriver { armed: armed.clone(), one_bitmap, dirty: BTreeSet::new() };
        for (pages, one) in rounds {
            let is_mapped = |page: &u64| mapped.iter().any(|mapping| mapping.iova().contains(page << 12));
            let written: BTreeSet<_> = pages.into_iter().filter(is_mapped).collect();
            driver.dirty.extend(&written);
            let mut alone = Mapped::default();
            one.and_then(|one| mapped.iter().nth(one)).into_iter().for_each(|mapping| alone.add(mapping));
            let mut marks = Marks::new(&layout);
            for held in [&alone, &mapped] {
                for request in requests(held, &armed, Granule::KIB_4).reports {
                    let words = driver.report(request);
                    mark(&mut Sink::new(&layout, &iova, &mut marks), request, Granule::KIB_4, &words);
                }
            }
            prop_assert_eq!(marked(&marks, 1500), written);
        }
    }
}

#[test]
fn c55_bits_past_the_end_of_what_was_asked_count_too() {
    let (layout, iova) = (layout(), IovaMap::Identity);
    let mut marks = Marks::new(&layout);
    let asked = range(64 << 12, 70 << 12);
    mark(&mut Sink::new(&layout, &iova, &mut marks), asked, Granule::KIB_4, &[1, 1 << 5 | 1 << 63]);
    assert_eq!(marked(&marks, 2048), BTreeSet::from([64, 64 + 69, 64 + 127]));
}
