// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

use super::*;
use crate::tracker::SpaceId;

/// A tracker with one virtual address space that these sources report on.
fn in_a_space(sources: &[(&Scripted, Harvest)]) -> (Tracker, SpaceId) {
    let mut builder = builder();
    let space = builder.space(IovaMap::journal());
    for (source, harvest) in sources {
        source.script().harvest = *harvest;
        builder = builder.source_of(space, ["net0"], Box::new((*source).clone()));
    }
    (builder.build().unwrap(), space)
}

fn iova(first: u64, count: u64) -> IovaRange {
    IovaRange::new(first << 12, count << 12).unwrap()
}

/// The order of what happens at an unmap of one mapping: sources by name, and the caller's own unmapping.
fn order_of(sources: &[(&Scripted, Harvest)]) -> Vec<String> {
    let (mut tracker, space) = in_a_space(sources);
    let cursor = tracker.begin(Start::Copied).unwrap();
    tracker.map(space, Mapping::new(iova(100, 4), pages(40, 4)).unwrap()).unwrap();
    let calls = |name: &str| {
        let (source, _) = sources.iter().find(|(source, _)| source.id == name).unwrap();
        source.script().log.iter().filter(|step| **step == Operation::Unmapped).count()
    };
    for (source, _) in sources {
        source.write(101);
    }
    let mut order = Vec::new();
    tracker
        .unmap(space, iova(100, 4), || {
            order.extend(sources.iter().map(|(source, _)| source.id).filter(|id| calls(id) == 1));
            order.push("unmap");
            Ok::<_, TrackerError>(())
        })
        .unwrap();
    let later: Vec<_> =
        sources.iter().map(|(source, _)| source.id).filter(|id| !order.contains(id)).collect();
    order.extend(later);
    assert_eq!(drain(&mut tracker, cursor), BTreeSet::from([41]));
    order.into_iter().map(str::to_owned).collect()
}

#[test]
fn c13_each_back_end_is_asked_at_its_time_around_the_unmapping() {
    let [table, log] = ["page-table", "device-log"].map(Scripted::new);
    let both = [(&log, Harvest::AfterUnmap), (&table, Harvest::BeforeUnmap)];
    assert_eq!(order_of(&both), ["page-table", "unmap", "device-log"]);
    let fresh = || (Scripted::new("container"), Scripted::new("device-log"));
    let (container, log) = fresh();
    let alone = [(&container, Harvest::ByUnmapping), (&log, Harvest::AfterUnmap)];
    assert_eq!(order_of(&alone), ["container", "device-log"], "the container unmaps itself");
    let (table, (container, log)) = (Scripted::new("page-table"), fresh());
    let mixed =
        [(&container, Harvest::ByUnmapping), (&log, Harvest::AfterUnmap), (&table, Harvest::BeforeUnmap)];
    assert_eq!(order_of(&mixed), ["page-table", "unmap", "container", "device-log"]);
}

#[test]
fn an_unmapping_that_fails_leaves_the_mapping_and_its_bits() {
    for harvest in [Harvest::BeforeUnmap, Harvest::AfterUnmap] {
        let device = Scripted::new("device");
        let (mut tracker, space) = in_a_space(&[(&device, harvest)]);
        let cursor = tracker.begin(Start::Copied).unwrap();
        tracker.map(space, Mapping::new(iova(100, 4), pages(40, 4)).unwrap()).unwrap();
        device.write(101);
        let failed = tracker.unmap(space, iova(100, 4), || Err(Box::<dyn std::error::Error>::from("busy")));
        assert_eq!(failed.unwrap_err().to_string(), "busy");
        device.write(102);
        assert!(tracker.collect().is_empty());
        assert_eq!(drain(&mut tracker, cursor), BTreeSet::from([41, 42]), "{harvest:?}");
        tracker.unmap(space, iova(100, 4), unmapped).unwrap();
    }
}

#[test]
fn a_container_that_cannot_unmap_leaves_the_mapping_and_its_bits() {
    let container = Scripted::new("container");
    let (mut tracker, space) = in_a_space(&[(&container, Harvest::ByUnmapping)]);
    let cursor = tracker.begin(Start::Copied).unwrap();
    tracker.map(space, Mapping::new(iova(100, 4), pages(40, 4)).unwrap()).unwrap();
    container.write(101);
    container.fail_next(Operation::Unmap);
    assert!(tracker.unmap(space, iova(100, 4), unmapped).is_err());
    assert!(tracker.collect().is_empty());
    assert_eq!(drain(&mut tracker, cursor), BTreeSet::from([41]));
}

#[test]
fn while_nothing_is_tracked_the_caller_unmaps() {
    let container = Scripted::new("container");
    let (mut tracker, space) = in_a_space(&[(&container, Harvest::ByUnmapping)]);
    tracker.map(space, Mapping::new(iova(100, 4), pages(40, 4)).unwrap()).unwrap();
    let mut called = false;
    let outcome = tracker.unmap(space, iova(100, 4), || {
        called = true;
        Ok::<_, TrackerError>(())
    });
    assert!(outcome.unwrap().is_empty() && called);
}

#[test]
fn c63_ram_that_a_source_does_not_take_in_is_refused_and_nothing_changed() {
    let (kvm, device) = (Scripted::new("kvm"), Scripted::new("device"));
    let mut tracker = with(&[&kvm, &device]);
    let cursor = tracker.begin(Start::Copied).unwrap();
    for operation in [Operation::Plugged, Operation::Mapped] {
        device.fail_next(operation);
        assert!(tracker.add_ram(&PluggedRam { gpa: pages(512, 64), kvm_slot: None }).is_err());
        assert_eq!(tracker.layout(), &layout());
        assert_eq!(kvm.script().cover, [pages(0, PAGES)]);
    }
    assert!(drain(&mut tracker, cursor).is_empty());
}

#[test]
fn a_page_in_flight_when_its_ram_went_holds_back_the_ram_that_comes_in_its_place() {
    let mut tracker = Tracker::builder(layout()).build().unwrap();
    tracker.add_ram(&PluggedRam { gpa: pages(512, 64), kvm_slot: None }).unwrap();
    let cursor = tracker.begin(Start::Empty).unwrap();
    let old = tracker.take(cursor, ChunkLimits::NONE).unwrap().unwrap();
    tracker.remove_ram(pages(512, 64), unmapped).unwrap();
    tracker.add_ram(&PluggedRam { gpa: pages(512, 64), kvm_slot: None }).unwrap();
    tracker.begin_round(cursor);
    assert!(tracker.take(cursor, ChunkLimits::NONE).unwrap().is_none(), "the old page is still on its way");
    tracker.commit(old);
    assert_eq!(drain(&mut tracker, cursor), (512..576).collect());
    assert_eq!(tracker.outstanding(cursor).unwrap().in_flight_bytes, 0);
}

#[test]
fn the_last_bits_of_a_source_that_goes_are_collected() {
    let (kvm, device) = (Scripted::new("kvm"), Scripted::new("device"));
    let mut tracker = with(&[&kvm, &device]);
    let cursor = tracker.begin(Start::Copied).unwrap();
    kvm.write(7);
    device.write(9);
    assert!(tracker.remove_source("device").unwrap().is_empty());
    assert!(!device.script().running);
    assert!(tracker.collect().is_empty());
    assert_eq!(drain(&mut tracker, cursor), BTreeSet::from([7, 9]));
    assert!(matches!(tracker.remove_source("device"), Err(TrackerError::NoSuchSource { .. })));
    tracker.add_source(SpaceId::IDENTITY, ["net1"], Box::new(device.clone())).unwrap();
    assert!(device.script().running, "it is switched on at once");
    device.write(5);
    assert!(tracker.collect().is_empty());
    assert_eq!(drain(&mut tracker, cursor), BTreeSet::from([5]));
}

/// What a step of the random history below does.
#[derive(Debug, Clone, Copy)]
enum Step {
    Write { source: usize, page: u64 },
    Plug { slot: u64 },
    Unplug { slot: u64 },
    Map { slot: u64, gpa: u64 },
    Unmap { slot: u64, fails: bool },
    AddSource,
    RemoveSource,
    Collect,
    Take,
    Land { commit: bool },
    Save { disk_full: bool },
    MigrateAnew,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        6 => (0..3usize, 0..640u64).prop_map(|(source, page)| Step::Write { source, page }),
        1 => (0..4u64).prop_map(|slot| Step::Plug { slot }),
        1 => (0..4u64).prop_map(|slot| Step::Unplug { slot }),
        2 => (0..8u64, 0..60u64).prop_map(|(slot, gpa)| Step::Map { slot, gpa }),
        2 => (0..8u64, any::<bool>()).prop_map(|(slot, fails)| Step::Unmap { slot, fails }),
        1 => Just(Step::AddSource),
        1 => Just(Step::RemoveSource),
        3 => Just(Step::Collect),
        3 => Just(Step::Take),
        3 => any::<bool>().prop_map(|commit| Step::Land { commit }),
        2 => any::<bool>().prop_map(|disk_full| Step::Save { disk_full }),
        1 => Just(Step::MigrateAnew),
    ]
}

/// A VM a page at a time: what memory holds, what the receiver of a migration was given, and what a chain of differentials holds.
struct World {
    tracker: Tracker,
    /// The migration's.
    cursor: CursorId,
    /// The chain's.
    last_saved: CursorId,
    space: SpaceId,
    sources: [Scripted; 3],
    /// The RAM there is.
    ram: Arc<Mutex<Vec<GpaRange>>>,
    /// Content of each page that is RAM.
    memory: std::collections::BTreeMap<u64, u64>,
    receiver: std::collections::BTreeMap<u64, u64>,
    chain: std::collections::BTreeMap<u64, u64>,
    mapped: std::collections::BTreeMap<u64, u64>,
    has_third: bool,
    /// Chunks on their way, with the bytes that were read for them.
    in_flight: Vec<(Chunk, Vec<(u64, u64)>)>,
    writes: u64,
}

impl World {
    fn new(harvest: Harvest) -> Self {
        let sources = ["kvm", "device", "plugged"].map(Scripted::new);
        let ram = Arc::new(Mutex::new(vec![pages(0, PAGES)]));
        let now = Arc::clone(&ram);
        let mappings = move || VmMappings { ram: now.lock().unwrap().clone(), ..VmMappings::default() };
        let builder = Tracker::builder(layout()).mappings(mappings);
        let mut builder = builder.source(Box::new(sources[0].clone()));
        let space = builder.space(IovaMap::journal());
        sources[1].script().harvest = harvest;
        let mut tracker = builder.source_of(space, ["net0"], Box::new(sources[1].clone())).build().unwrap();
        let last_saved = tracker.begin(Start::Empty).unwrap();
        let cursor = tracker.begin(Start::Empty).unwrap();
        let memory = (0..PAGES).map(|page| (page, 0)).collect();
        let (receiver, chain, mapped) = Default::default();
        Self {
            tracker,
            cursor,
            last_saved,
            space,
            sources,
            ram,
            memory,
            receiver,
            chain,
            mapped,
            has_third: false,
            in_flight: Vec::new(),
            writes: 0,
        }
    }

    /// Regions of 64 pages that may be plugged in, at page 512 and up.
    fn slot(slot: u64) -> GpaRange {
        pages(512 + slot * 64, 64)
    }

    fn write(&mut self, source: usize, page: u64) {
        let gpa = match source {
            1 => {
                let inside =
                    self.mapped.iter().find(|(iova, _)| (**iova..**iova + 4).contains(&(1000 + page % 32)));
                let Some((iova, gpa)) = inside else { return };
                self.sources[1].write(1000 + page % 32);
                gpa + (1000 + page % 32 - iova)
            }
            2 if !self.has_third => return,
            _ if !self.memory.contains_key(&page) => return,
            _ => {
                self.sources[source].write(page);
                page
            }
        };
        self.writes += 1;
        if let Some(content) = self.memory.get_mut(&gpa) {
            *content = self.writes;
        }
    }

    fn plug(&mut self, slot: u64) {
        let gpa = Self::slot(slot);
        let is_new = !self.memory.contains_key(&(gpa.start() >> 12));
        if is_new {
            self.ram.lock().unwrap().push(gpa);
        }
        let told = self.tracker.add_ram(&PluggedRam { gpa, kvm_slot: None });
        assert_eq!(told.is_ok(), is_new);
        for page in (gpa.start() >> 12)..(gpa.end() >> 12) {
            self.memory.entry(page).or_insert(1 << 40);
        }
    }

    fn unplug(&mut self, slot: u64) {
        let gpa = Self::slot(slot);
        let (sources, ram) = (self.sources.clone(), Arc::clone(&self.ram));
        let gone = self.tracker.remove_ram(gpa, || {
            ram.lock().unwrap().retain(|range| *range != gpa);
            for page in (gpa.start() >> 12)..(gpa.end() >> 12) {
                sources.iter().for_each(|source| {
                    source.script().dirty.remove(&page);
                });
            }
            Ok::<_, TrackerError>(())
        });
        if gone.is_ok() {
            self.memory.retain(|page, _| !gpa.contains(page << 12));
        }
    }

    fn map(&mut self, slot: u64, gpa: u64) {
        let at = 1000 + slot * 4;
        let mapping = Mapping::new(iova(at, 4), pages(gpa * 4, 4)).unwrap();
        if self.tracker.map(self.space, mapping).is_ok() {
            self.mapped.insert(at, gpa * 4);
        }
    }

    fn unmap(&mut self, slot: u64, fails: bool) {
        let at = 1000 + slot * 4;
        let late = 1000 + slot * 4 + 3;
        let (device, mut written) = (self.sources[1].clone(), false);
        let after = device.script().harvest == Harvest::AfterUnmap && self.mapped.contains_key(&at);
        let outcome = self.tracker.unmap(self.space, iova(at, 4), || {
            // The device goes on until the mapping is gone.
            if after {
                device.write(late);
                written = true;
            }
            if fails { Err(TrackerError::CursorClosed) } else { Ok(()) }
        });
        if written {
            self.writes += 1;
            let gpa = self.mapped[&at] + 3;
            if let Some(content) = self.memory.get_mut(&gpa) {
                *content = self.writes;
            }
        }
        if outcome.is_ok() {
            self.mapped.remove(&at);
        }
    }

    fn take(&mut self) {
        self.tracker.begin_round(self.cursor);
        let limits = ChunkLimits { bytes: 40 << 12, ranges: 6 };
        let Some(chunk) = self.tracker.take(self.cursor, limits).unwrap() else { return };
        let read = pages_of(chunk.ranges()).into_iter().map(|page| (page, self.memory[&page]));
        let read = read.collect();
        self.in_flight.push((chunk, read));
    }

    /// The chunk that is on its way longest arrives, or is lost and taken back.
    fn land(&mut self, commit: bool) {
        if self.in_flight.is_empty() {
            return;
        }
        let (chunk, read) = self.in_flight.remove(self.in_flight.len() / 2);
        if commit {
            self.receiver.extend(read);
            self.tracker.commit(chunk);
        } else {
            self.tracker.roll_back(chunk);
        }
    }

    /// Takes a differential to the last one that succeeded, of RAM that is there: together they are what memory holds.
    fn save(&mut self, disk_full: bool) {
        assert!(self.tracker.collect_final().is_empty());
        let saved = self.tracker.save_pending(self.last_saved, |ranges| {
            if disk_full { Err(TrackerError::CursorClosed) } else { Ok(pages_of(ranges)) }
        });
        assert_eq!(saved.is_err(), disk_full);
        if let Ok(pages) = saved {
            self.chain.extend(pages.into_iter().map(|page| (page, self.memory[&page])));
            self.chain.retain(|page, _| self.memory.contains_key(page));
            assert_eq!(self.chain, self.memory);
        }
    }

    /// Gives up on the receiver, and begins with another that holds nothing. What is on its way to the first arrives nowhere.
    fn migrate_anew(&mut self) {
        self.tracker.end(self.cursor).unwrap();
        self.cursor = self.tracker.begin(Start::Empty).unwrap();
        for (late, _) in self.in_flight.drain(..) {
            self.tracker.commit(late);
        }
        self.receiver.clear();
    }

    fn run(&mut self, step: Step) {
        match step {
            Step::Write { source, page } => self.write(source, page),
            Step::Plug { slot } => self.plug(slot),
            Step::Unplug { slot } => self.unplug(slot),
            Step::Map { slot, gpa } => self.map(slot, gpa),
            Step::Unmap { slot, fails } => self.unmap(slot, fails),
            Step::AddSource => {
                let source = Box::new(self.sources[2].clone());
                let added = self.tracker.add_source(SpaceId::IDENTITY, [] as [&str; 0], source);
                assert_eq!(added.is_ok(), !self.has_third);
                self.has_third = true;
            }
            Step::RemoveSource => {
                assert_eq!(self.tracker.remove_source("plugged").is_ok(), self.has_third);
                self.has_third = false;
            }
            Step::Collect => assert!(self.tracker.collect().is_empty()),
            Step::Take => self.take(),
            Step::Land { commit } => self.land(commit),
            Step::Save { disk_full } => self.save(disk_full),
            Step::MigrateAnew => self.migrate_anew(),
        }
    }

    /// Everything stands still, and the rest is sent.
    fn finish(mut self) -> (std::collections::BTreeMap<u64, u64>, std::collections::BTreeMap<u64, u64>) {
        while !self.in_flight.is_empty() {
            self.land(false);
        }
        self.save(false);
        assert!(self.tracker.collect_final().is_empty());
        while self.tracker.outstanding(self.cursor).unwrap().pending_bytes > 0 {
            self.take();
            self.land(true);
        }
        self.receiver.retain(|page, _| self.memory.contains_key(page));
        (self.memory, self.receiver)
    }
}

proptest! {
    /// RAM, mappings and sources come and go, chunks arrive late, in any order or not at all, and migrations begin anew: the receiver
    /// ends with what memory holds, and so does each differential on top of those before it.
    #[test]
    fn nothing_is_lost_of_what_is_plugged_between_two_differentials_or_during_a_migration(
        steps in prop::collection::vec(step(), 1..120),
        after in any::<bool>(),
    ) {
        let mut world = World::new(if after { Harvest::AfterUnmap } else { Harvest::BeforeUnmap });
        steps.into_iter().for_each(|step| world.run(step));
        let (memory, receiver) = world.finish();
        prop_assert_eq!(receiver, memory);
    }
}
