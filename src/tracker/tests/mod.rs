// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

mod changes;
mod guards;

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, MutexGuard};

use proptest::prelude::*;

use super::*;
use crate::granule::Granule;
use crate::iova::Mapping;
use crate::range::GpaRange;
use crate::range::IovaRange;
use crate::source::{Cover, DirtySource, Harvest, Operation, PluggedRam, Reports, Sink};

pub(crate) const PAGES: u64 = 256;

fn pages(first: u64, count: u64) -> GpaRange {
    GpaRange::new(first << 12, count << 12).unwrap()
}

fn layout() -> Layout {
    Layout::new([pages(0, PAGES)], Granule::KIB_4).unwrap()
}

/// What a scripted kernel interface holds, and what it will do next.
struct Script {
    running: bool,
    precise: bool,
    dirty: BTreeSet<u64>,
    fail: Option<Operation>,
    reports: Reports,
    harvest: Harvest,
    may_join: bool,
    cover: Vec<GpaRange>,
    /// On failure, what was already read is gone, as from a kernel that cleared before it copied.
    log: Vec<Operation>,
}

#[derive(Clone)]
pub(crate) struct Scripted {
    id: &'static str,
    script: Arc<Mutex<Script>>,
}

impl Scripted {
    pub(crate) fn new(id: &'static str) -> Self {
        let script = Script {
            running: false,
            precise: true,
            dirty: BTreeSet::new(),
            fail: None,
            reports: Reports::Component,
            harvest: Harvest::BeforeUnmap,
            may_join: true,
            cover: vec![pages(0, PAGES)],
            log: Vec::new(),
        };
        Self { id, script: Arc::new(Mutex::new(script)) }
    }

    pub(crate) fn imprecise(id: &'static str) -> Self {
        let source = Self::new(id);
        source.script().precise = false;
        source
    }

    fn script(&self) -> MutexGuard<'_, Script> {
        self.script.lock().unwrap()
    }

    pub(crate) fn write(&self, page: u64) {
        self.script().dirty.insert(page);
    }

    pub(crate) fn fail_next(&self, operation: Operation) {
        self.script().fail = Some(operation);
    }

    fn step(&self, operation: Operation) -> Result<(), SourceError> {
        let mut script = self.script();
        script.log.push(operation);
        if script.fail == Some(operation) {
            script.fail = None;
            return Err(SourceError::new(self.id, operation, "scripted"));
        }
        Ok(())
    }
}

impl DirtySource for Scripted {
    fn id(&self) -> &str {
        self.id
    }

    fn reports(&self) -> Reports {
        self.script().reports
    }

    fn cover(&self) -> Cover {
        let script = self.script();
        Cover { ranges: script.cover.clone(), precise: script.precise }
    }

    fn devices_may_join(&self) -> bool {
        self.script().may_join
    }

    fn start(&mut self, _layout: &Layout, _iova: &IovaMap) -> Result<(), SourceError> {
        self.step(Operation::Start)?;
        self.script().running = true;
        Ok(())
    }

    fn collect(&mut self, sink: &mut Sink<'_>) -> Result<(), SourceError> {
        let dirty = std::mem::take(&mut self.script().dirty);
        self.step(Operation::Collect)?;
        dirty
            .into_iter()
            .for_each(|page| sink.iova_range(crate::range::IovaRange::new(page << 12, 1).unwrap()));
        Ok(())
    }

    fn before_read(&mut self, _chunk: &[GpaRange]) -> Result<(), SourceError> {
        self.step(Operation::BeforeRead)
    }

    fn mapped(&mut self, _mapping: &Mapping) -> Result<(), SourceError> {
        self.step(Operation::Mapped)
    }

    fn unmapped(&mut self, mapping: &Mapping, sink: &mut Sink<'_>) -> Result<(), SourceError> {
        let iova = mapping.iova();
        if self.script().fail == Some(Operation::Unmap) {
            return self.step(Operation::Unmap);
        }
        let going: Vec<u64> =
            self.script().dirty.iter().copied().filter(|page| iova.contains(page << 12)).collect();
        going.iter().for_each(|page| assert!(self.script().dirty.remove(page)));
        self.step(Operation::Unmapped)?;
        going
            .into_iter()
            .for_each(|page| sink.iova_range(crate::range::IovaRange::new(page << 12, 1).unwrap()));
        Ok(())
    }

    fn harvest(&self) -> Harvest {
        self.script().harvest
    }

    fn plugged(&mut self, ram: &PluggedRam) -> Result<(), SourceError> {
        self.step(Operation::Plugged)?;
        self.script().cover.push(ram.gpa);
        Ok(())
    }

    fn unplugged(&mut self, gpa: GpaRange) {
        self.script().cover.retain(|range| *range != gpa);
    }

    fn stop(&mut self) -> Result<(), SourceError> {
        self.script().running = false;
        self.script().dirty.clear();
        self.step(Operation::Stop)
    }
}

/// The builder for a VM whose RAM is and stays that of [`layout`].
fn builder() -> TrackerBuilder {
    Tracker::builder(layout()).mappings(|| VmMappings { ram: vec![pages(0, PAGES)], ..VmMappings::default() })
}

pub(crate) fn with(sources: &[&Scripted]) -> Tracker {
    let mut builder = builder().allow_imprecise();
    for source in sources {
        builder = builder.source(Box::new((*source).clone()));
    }
    builder.build().unwrap()
}

/// Takes everything pending, commits it, and returns its pages.
fn drain(vm: &mut Tracker, cursor: CursorId) -> BTreeSet<u64> {
    let mut taken = BTreeSet::new();
    vm.begin_round(cursor);
    while let Some(chunk) = vm.take(cursor, ChunkLimits { bytes: 7 << 12, ranges: 2 }).unwrap() {
        taken.extend(pages_of(chunk.ranges()));
        vm.commit(chunk);
    }
    taken
}

/// An unmapping that works.
fn unmapped() -> Result<(), TrackerError> {
    Ok(())
}

fn everything() -> BTreeSet<u64> {
    (0..PAGES).collect()
}

#[test]
fn c01_every_source_runs_before_the_first_page_is_taken() {
    let (kvm, device) = (Scripted::new("kvm"), Scripted::new("device"));
    let mut vm = with(&[&kvm, &device]);
    let cursor = vm.begin(Start::Empty).unwrap();
    assert!(kvm.script().running && device.script().running);
    assert_eq!(drain(&mut vm, cursor), everything());
}

#[test]
fn c01_a_source_that_does_not_start_leaves_none_running() {
    let (kvm, device) = (Scripted::new("kvm"), Scripted::new("device"));
    device.fail_next(Operation::Start);
    let mut vm = with(&[&kvm, &device]);
    let error = vm.begin(Start::Empty).unwrap_err();
    assert!(!kvm.script().running);
    let source = std::error::Error::source(&error).unwrap().to_string();
    assert_eq!(source, "Dirty source device cannot start logging");
    assert!(vm.begin(Start::Empty).is_ok(), "a second attempt works");
}

#[test]
fn c02_bits_are_cleared_before_bytes_may_be_read() {
    let kvm = Scripted::new("kvm");
    let mut vm = with(&[&kvm]);
    let cursor = vm.begin(Start::Empty).unwrap();
    kvm.script().log.clear();
    let chunk = vm.take(cursor, ChunkLimits::NONE).unwrap().unwrap();
    assert_eq!(kvm.script().log, [Operation::BeforeRead]);
    vm.commit(chunk);
}

#[test]
fn c02_pages_whose_bits_could_not_be_cleared_are_not_handed_out_and_not_lost() {
    let (first, second) = (Scripted::new("first"), Scripted::new("second"));
    let mut vm = with(&[&first, &second]);
    let cursor = vm.begin(Start::Copied).unwrap();
    first.write(9);
    assert!(vm.collect().is_empty());
    second.fail_next(Operation::BeforeRead);
    assert!(vm.take(cursor, ChunkLimits::NONE).is_err());
    assert_eq!(drain(&mut vm, cursor), BTreeSet::from([9]));
}

#[test]
fn c07_a_failed_report_marks_all_the_source_covers() {
    let (kvm, device) = (Scripted::new("kvm"), Scripted::new("device"));
    let mut vm = with(&[&kvm, &device]);
    let cursor = vm.begin(Start::Copied).unwrap();
    kvm.write(3);
    device.write(5);
    device.fail_next(Operation::Collect);
    let degradations = vm.collect();
    assert_eq!(degradations.len(), 1);
    assert_eq!(degradations[0].id, "device");
    assert_eq!(drain(&mut vm, cursor), everything());
    device.write(6);
    assert!(vm.collect().is_empty(), "the source is usable again");
    assert_eq!(drain(&mut vm, cursor), BTreeSet::from([6]));
}

#[test]
fn c12_a_mapping_is_harvested_before_it_is_forgotten() {
    let device = Scripted::new("device");
    let mut builder = builder();
    let space = builder.space(IovaMap::journal());
    let mut vm = builder.source_of(space, ["net0"], Box::new(device.clone())).build().unwrap();
    let cursor = vm.begin(Start::Copied).unwrap();
    let iova = IovaRange::new(100 << 12, 4 << 12).unwrap();
    vm.map(space, Mapping::new(iova, pages(40, 4)).unwrap()).unwrap();
    device.write(102);
    assert!(vm.unmap(space, iova, unmapped).unwrap().is_empty());
    assert!(vm.collect().is_empty());
    assert_eq!(drain(&mut vm, cursor), BTreeSet::from([42]));
}

#[test]
fn c13_a_mapping_that_cannot_be_harvested_counts_as_written_all_over() {
    let device = Scripted::new("device");
    let mut builder = builder();
    let space = builder.space(IovaMap::journal());
    let mut vm = builder.source_of(space, ["net0"], Box::new(device.clone())).build().unwrap();
    let cursor = vm.begin(Start::Copied).unwrap();
    let iova = IovaRange::new(100 << 12, 4 << 12).unwrap();
    vm.map(space, Mapping::new(iova, pages(40, 4)).unwrap()).unwrap();
    device.fail_next(Operation::Unmapped);
    assert_eq!(vm.unmap(space, iova, unmapped).unwrap().len(), 1);
    assert_eq!(drain(&mut vm, cursor), (40..44).collect());
    device.write(101);
    assert!(vm.collect().is_empty());
    assert!(drain(&mut vm, cursor).is_empty(), "the mapping is gone whatever the answer");
}

#[test]
fn c15_a_switch_of_the_whole_address_space_harvests_every_mapping() {
    let device = Scripted::new("device");
    let mut builder = builder();
    let space = builder.space(IovaMap::journal());
    let mut vm = builder.source_of(space, ["net0"], Box::new(device.clone())).build().unwrap();
    let cursor = vm.begin(Start::Copied).unwrap();
    for (iova, gpa) in [(100, 40), (300, 60)] {
        let iova = IovaRange::new(iova << 12, 4 << 12).unwrap();
        vm.map(space, Mapping::new(iova, pages(gpa, 4)).unwrap()).unwrap();
    }
    device.write(101);
    device.write(303);
    assert!(vm.unmap(space, IovaRange::from_bounds(0, u64::MAX).unwrap(), unmapped).unwrap().is_empty());
    assert_eq!(drain(&mut vm, cursor), BTreeSet::from([41, 63]));
}

#[test]
fn an_imprecise_source_is_refused_unless_allowed_and_then_named() {
    let container = Scripted::imprecise("container");
    let refused = builder().source(Box::new(container.clone())).build();
    let Err(error) = refused else { panic!("accepted") };
    assert!(matches!(&error, TrackerError::Imprecise { id } if id == "container"), "{error}");
    let named: Vec<_> = with(&[&container]).imprecise_sources().collect();
    assert_eq!(named, [ImpreciseSource { id: "container".to_owned() }]);
}

#[test]
fn imprecise_sources_count_in_the_last_collect_only() {
    let (device, container) = (Scripted::new("device"), Scripted::imprecise("container"));
    let mut vm = with(&[&device, &container]);
    let cursor = vm.begin(Start::Copied).unwrap();
    device.write(1);
    container.write(2);
    assert!(vm.collect().is_empty());
    assert_eq!(drain(&mut vm, cursor), BTreeSet::from([1]));
    assert!(vm.collect_final().is_empty());
    assert_eq!(drain(&mut vm, cursor), BTreeSet::from([2]));
}

#[test]
fn sources_run_until_the_last_receiver_is_done() {
    let kvm = Scripted::new("kvm");
    let mut vm = with(&[&kvm]);
    let (first, second) = (vm.begin(Start::Empty).unwrap(), vm.begin(Start::Copied).unwrap());
    vm.end(first).unwrap();
    assert!(kvm.script().running);
    kvm.fail_next(Operation::Stop);
    assert!(vm.end(second).is_err());
    assert!(!kvm.script().running);
}

fn pages_of(ranges: &[GpaRange]) -> BTreeSet<u64> {
    ranges.iter().flat_map(|range| (range.start() >> 12)..(range.end() >> 12)).collect()
}

/// Saves what is pending, and returns its pages.
fn saved(vm: &mut Tracker, cursor: CursorId) -> BTreeSet<u64> {
    vm.save_pending(cursor, |ranges| Ok::<_, TrackerError>(pages_of(ranges))).unwrap()
}

#[test]
fn c23_pages_whose_snapshot_fails_are_in_the_next_one() {
    let kvm = Scripted::new("kvm");
    let mut vm = with(&[&kvm]);
    let cursor = vm.begin(Start::Empty).unwrap();
    assert_eq!(saved(&mut vm, cursor), everything());
    kvm.write(3);
    assert!(vm.collect_final().is_empty());
    let failed = vm.save_pending(cursor, |ranges| {
        assert_eq!(pages_of(ranges), BTreeSet::from([3]));
        Err::<(), _>(Box::<dyn std::error::Error>::from("The disk is full"))
    });
    assert_eq!(failed.unwrap_err().to_string(), "The disk is full");
    kvm.write(4);
    assert!(vm.collect_final().is_empty());
    kvm.fail_next(Operation::BeforeRead);
    let cleared = vm.save_pending(cursor, |_| Ok::<_, TrackerError>(()));
    assert!(matches!(cleared, Err(TrackerError::Source(_))));
    assert_eq!(saved(&mut vm, cursor), BTreeSet::from([3, 4]));
    assert_eq!(saved(&mut vm, cursor), BTreeSet::new(), "a snapshot that equals its base is one, too");
}

#[test]
fn a_snapshot_that_would_lack_pages_is_refused() {
    let kvm = Scripted::new("kvm");
    let mut vm = with(&[&kvm]);
    let cursor = vm.begin(Start::Empty).unwrap();
    let chunk = vm.take(cursor, ChunkLimits { bytes: 2 << 12, ranges: 1 }).unwrap().unwrap();
    let refused = vm.save_pending(cursor, |_| Ok::<_, TrackerError>(()));
    assert!(matches!(refused, Err(TrackerError::InFlight { bytes: 8192 })), "{refused:?}");
    vm.roll_back(chunk);
    assert_eq!(saved(&mut vm, cursor), everything());
    vm.end(cursor).unwrap();
    let refused = vm.save_pending(cursor, |_| Ok::<_, TrackerError>(()));
    assert!(matches!(refused, Err(TrackerError::CursorClosed)), "{refused:?}");
}

#[test]
fn who_holds_a_copy_begins_with_clean_pages_where_a_kernel_begins_with_every_bit_set() {
    let kvm = Scripted::new("kvm");
    let mut vm = with(&[&kvm]);
    kvm.fail_next(Operation::BeforeRead);
    assert!(vm.begin(Start::Copied).is_err());
    assert!(!kvm.script().running, "nothing was left on");
    kvm.script().log.clear();
    let cursor = vm.begin(Start::Copied).unwrap();
    assert_eq!(kvm.script().log, [Operation::Start, Operation::BeforeRead]);
    kvm.script().log.clear();
    vm.begin(Start::Copied).unwrap();
    assert_eq!(kvm.script().log, [Operation::Collect], "what others have not read yet stands");
    assert_eq!(saved(&mut vm, cursor), BTreeSet::new());
}

#[test]
fn two_sources_of_one_name_are_refused() {
    let source = Scripted::new("twin");
    let builder = builder().source(Box::new(source.clone()));
    let Err(error) = builder.source(Box::new(source)).build() else { panic!("accepted") };
    assert_eq!(error.to_string(), "Two dirty sources are named twin");
}

proptest! {
    /// A receiver fed by `take`, with any operation of any source failing at any time, ends with what memory holds.
    #[test]
    fn no_fault_at_any_point_loses_a_page(
        rounds in prop::collection::vec((prop::collection::vec((0..2usize, 0..PAGES), 0..12), prop::option::of((0..2usize, any::<bool>()))), 1..12),
    ) {
        let sources = [Scripted::new("kvm"), Scripted::new("device")];
        let mut vm = with(&[&sources[0], &sources[1]]);
        let cursor = vm.begin(Start::Empty).unwrap();
        let (mut memory, mut receiver) = (vec![0u32; 256], vec![u32::MAX; 256]);
        let mut copy_round = |vm: &mut Tracker, memory: &[u32]| {
            vm.begin_round(cursor);
            while let Ok(Some(chunk)) = vm.take(cursor, ChunkLimits { bytes: 16 << 12, ranges: 4 }) {
                for page in chunk.ranges().iter().flat_map(|range| (range.start() >> 12)..(range.end() >> 12)) {
                    let page = usize::try_from(page).unwrap();
                    receiver[page] = memory[page];
                }
                vm.commit(chunk);
            }
            receiver.clone()
        };
        for (writes, fault) in rounds {
            for (source, page) in writes {
                memory[usize::try_from(page).unwrap()] += 1;
                sources[source].write(page);
            }
            if let Some((source, at_collect)) = fault {
                sources[source].fail_next(if at_collect { Operation::Collect } else { Operation::BeforeRead });
            }
            let _degradations = vm.collect();
            copy_round(&mut vm, &memory);
        }
        for source in &sources {
            source.script().fail = None;
        }
        prop_assert!(vm.collect_final().is_empty());
        prop_assert_eq!(copy_round(&mut vm, &memory), memory);
    }

    /// Snapshots, each on top of the last that succeeded, amount to what memory holds, whatever fails in between and whoever
    /// else reads.
    #[test]
    fn no_fault_at_any_point_loses_a_page_of_a_chain_of_snapshots(
        rounds in prop::collection::vec(
            (prop::collection::vec((0..2usize, 0..PAGES), 0..12), prop::option::of((0..2usize, any::<bool>())), any::<bool>(), any::<bool>()),
            1..12,
        ),
    ) {
        let sources = [Scripted::new("kvm"), Scripted::new("device")];
        let mut vm = with(&[&sources[0], &sources[1]]);
        let cursor = vm.begin(Start::Empty).unwrap();
        let (mut memory, mut chain) = (vec![0u32; 256], vec![u32::MAX; 256]);
        for (writes, fault, disk_full, other_reader) in rounds {
            for (source, page) in writes {
                memory[usize::try_from(page).unwrap()] += 1;
                sources[source].write(page);
            }
            if other_reader {
                let other = vm.begin(Start::Empty).unwrap();
                let _degradations = vm.collect();
                drain(&mut vm, other);
                vm.end(other).unwrap();
            }
            if let Some((source, at_collect)) = fault {
                sources[source].fail_next(if at_collect { Operation::Collect } else { Operation::BeforeRead });
            }
            let _degradations = vm.collect_final();
            let saved = vm.save_pending(cursor, |ranges| {
                if disk_full { Err(TrackerError::CursorClosed) } else { Ok(pages_of(ranges)) }
            });
            for source in &sources {
                source.script().fail = None;
            }
            let Ok(pages) = saved else { continue };
            for page in pages {
                let page = usize::try_from(page).unwrap();
                chain[page] = memory[page];
            }
            prop_assert_eq!(&chain, &memory);
        }
    }
}
