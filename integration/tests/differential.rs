// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Differential snapshots of a running machine whose guest, VMM and device all write: one on top of the other, each amounts to
//! what a full snapshot taken at the same instant holds.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod restoring;

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io::Read;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, MutexGuard};
use std::thread;
use std::time::{Duration, Instant};

use tempfile::TempDir;
use vfio_migration::ledger::{Attribution, CursorId, Start};
use vfio_migration::migratable::MigratableDevice;
use vfio_migration::range::GpaRange;
use vfio_migration::snapshot::{
    AnnouncedRam, Base, CHANGES_FILE, CONFIG_FILE, ConfigMessage, DestinationOptions, Differential, Digest,
    FullSnapshot, MANIFEST_FILE, MEMORY_FILE, Placement, STATE_FILE, SnapshotChain, SnapshotDestination,
    SnapshotLimits, SnapshotWriter, VerifyFinding, WriteError, apply, compare, verify,
};
use vfio_migration::source::KvmLogMode;
use vfio_migration::tracker::Tracker;
use vfio_migration::vm::Vm;
use vfio_migration_integration::demo::{MachineSetup, Side, SourceVm};
use vfio_migration_integration::device::control;
use vfio_migration_integration::skipped;
use vfio_migration_integration::vmm::{AreaKind, Memory, PAGE_BYTES, probe_kvm};
use vm_memory::{Bytes, GuestAddress};
use vm_migration::{Pausable, Snapshottable};

use restoring::{assert_well, restore, transfer};

/// What a snapshot holds beside memory, as it was at one instant.
struct Texts {
    config: Vec<u8>,
    state: Vec<u8>,
}

/// A running machine of which one snapshot after another is taken.
struct Subject {
    folder: TempDir,
    setup: MachineSetup,
    memory: Memory,
    side: Side,
    devices: MigratableDevice,
    cursor: CursorId,
    /// The snapshot the cursor stands for.
    last: Option<Digest>,
}

type Failure = Box<dyn std::error::Error>;

impl Subject {
    /// Starts a machine and makes it ready for its first snapshot.
    fn start(setup: MachineSetup) -> Self {
        Self::start_in(tempfile::tempdir().unwrap(), setup)
    }

    fn start_in(folder: TempDir, setup: MachineSetup) -> Self {
        let (side, memory) = Side::in_process(setup.clone()).unwrap();
        side.start().unwrap();
        let devices = side.migratable(KvmLogMode::ManualAtRead).unwrap();
        let cursor = devices.tracker().lock().unwrap().begin(Start::Empty).unwrap();
        Self { folder, setup, memory, side, devices, cursor, last: None }
    }

    fn tracker(&self) -> MutexGuard<'_, Tracker> {
        self.devices.tracker().lock().unwrap()
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Fills what the machine itself leaves zero, but for the device's pages: the device lets nobody else write there.
    fn populate(&self) {
        let mut bytes = vec![0; 1 << 20];
        for range in self.side.machine.map().ranges(AreaKind::Untouched) {
            for start in range.clone().step_by(bytes.len()) {
                let part = &mut bytes[..usize::try_from((range.end - start).min(1 << 20)).unwrap()];
                blake3::Hasher::new().update(&start.to_le_bytes()).finalize_xof().fill(part);
                self.side.machine.memory().write_slice(part, GuestAddress(start)).unwrap();
            }
        }
    }

    /// Lets the guest stamp so many more pages, and the device write so many more and, as long as that takes, some besides.
    fn work(&self, guest_pages: u64, device_pages: u64) {
        let guest_until = self.side.machine.pages_written().unwrap() + guest_pages;
        for done in (0..device_pages).step_by(100) {
            control::step(&mut self.side.client.lock().unwrap(), (device_pages - done).min(100)).unwrap();
        }
        let deadline = Instant::now() + Duration::from_secs(60);
        while self.side.machine.pages_written().unwrap() < guest_until {
            self.side.machine.health().unwrap();
            assert!(Instant::now() < deadline, "the guest makes no progress");
            thread::sleep(Duration::from_millis(1));
        }
    }

    /// Stops vCPU, VMM and device, and captures the state.
    fn pause(&mut self) -> Texts {
        self.side.machine.pause().unwrap();
        self.devices.pause().unwrap();
        let mut vm = SourceVm::new(Arc::clone(&self.side.machine));
        let message = ConfigMessage::parse(&vm.config().unwrap(), &SnapshotLimits::default()).unwrap();
        let state = vm.state(self.devices.snapshot().unwrap()).unwrap();
        let config = message.vm_config().text().as_bytes().to_vec();
        Texts { config, state: state.into_text().unwrap().as_bytes().to_vec() }
    }

    fn resume(&mut self) {
        self.devices.resume().unwrap();
        self.side.machine.resume().unwrap();
    }

    fn announced(&self) -> AnnouncedRam {
        AnnouncedRam::all(self.tracker().layout().clone())
    }

    /// Writes all of the standing machine's memory, whatever any cursor knows.
    fn write_full(&self, name: &str, texts: &Texts) -> Digest {
        let layout = self.tracker().layout().clone();
        let ram = layout.regions().iter().map(|region| region.range());
        let target = self.path(name);
        let writer =
            SnapshotWriter::create(&target, self.announced(), None, SnapshotLimits::default()).unwrap();
        writer.copy_from(ram, self.side.machine.memory()).unwrap();
        writer.finish(&texts.config, &texts.state).unwrap()
    }

    /// Takes the standing machine's first snapshot, a full one.
    fn save_base(&mut self, texts: &Texts) {
        assert!(self.tracker().collect_final().is_empty(), "no source failed");
        let (target, announced) = (self.path("base"), self.announced());
        let memory = self.side.machine.memory();
        let saved = self.tracker().save_pending(self.cursor, |pages| {
            let writer = SnapshotWriter::create(&target, announced, None, SnapshotLimits::default())?;
            writer.copy_from(pages.iter().copied(), memory)?;
            Ok::<_, Failure>(writer.finish(&texts.config, &texts.state)?)
        });
        self.last = Some(saved.unwrap());
    }

    /// Takes a differential of the standing machine to its last snapshot.
    fn save(&mut self, name: &str, texts: &Texts) -> Result<(), Failure> {
        let (cursor, base) = (self.cursor, self.last.unwrap());
        self.last = Some(self.save_from(cursor, base, name, texts)?);
        Ok(())
    }

    fn save_from(
        &mut self,
        cursor: CursorId,
        base: Digest,
        name: &str,
        texts: &Texts,
    ) -> Result<Digest, Failure> {
        assert!(self.tracker().collect_final().is_empty(), "no source failed");
        let (target, announced) = (self.path(name), self.announced());
        let memory = self.side.machine.memory();
        self.tracker().save_pending(cursor, |pages| {
            let base = Base::Named(base);
            let writer = SnapshotWriter::create(&target, announced, Some(base), SnapshotLimits::default())?;
            writer.copy_from(pages.iter().copied(), memory)?;
            Ok(writer.finish(&texts.config, &texts.state)?)
        })
    }

    /// Takes the base while the machine stands still, and lets it run on.
    fn begin(&mut self) {
        let texts = self.pause();
        self.save_base(&texts);
        self.resume();
    }

    /// Stops the machine for a differential to its last snapshot and a full snapshot, both of this instant.
    fn save_both(&mut self, differential: &str, full: &str) {
        let texts = self.pause();
        self.save(differential, &texts).unwrap();
        self.write_full(full, &texts);
        assert_holds_ram(&self.path(full), &self.memory);
        self.resume();
    }

    fn chain(&self, names: &[&str]) -> SnapshotChain {
        SnapshotChain::open(names.iter().map(|name| self.path(name)), &SnapshotLimits::default()).unwrap()
    }

    /// Applies `names`, lowest first, into `into`, which must be byte for byte what `full` is.
    fn assert_amounts_to(&self, names: &[&str], into: &str, full: &str) {
        let digest = apply(&self.chain(names), &self.path(into), &SnapshotLimits::default()).unwrap();
        for name in [CONFIG_FILE, STATE_FILE, MEMORY_FILE] {
            let open = |dir: &str| File::open(self.path(dir).join(name)).unwrap();
            assert!(
                same_bytes(&mut open(into), &mut open(full)),
                "{name} of {names:?} is not that of {full}"
            );
        }
        assert_eq!(self.chain(&[full]).digest(), Some(digest), "the same content has the same name");
    }

    fn attribution(&self) -> BTreeMap<String, Attribution> {
        self.tracker().attribution().map(|(id, pages)| (id.to_owned(), pages)).collect()
    }

    /// Pages each source reported since `before`, and those that no other source did.
    fn reported_since(&self, before: &BTreeMap<String, Attribution>) -> BTreeMap<String, (u64, u64)> {
        let since = |(id, now): (String, Attribution)| {
            let then = before[&id];
            (id, (now.pages - then.pages, now.exclusive_pages - then.exclusive_pages))
        };
        self.attribution().into_iter().map(since).collect()
    }
}

fn setup(memory_bytes: u64, kvm: bool) -> MachineSetup {
    MachineSetup {
        memory_bytes,
        sparse: false,
        kvm,
        guest_rate: 2_000,
        device_rate: 100,
        seed: 23,
        forget: None,
    }
}

/// Whether there is KVM; says so loudly when a test has to do with a software vCPU.
fn kvm(test: &str) -> bool {
    probe_kvm().inspect_err(|error| skipped(test, format!("with a KVM guest: {error}"))).is_ok()
}

/// The source that knows what the guest writes.
fn guest_source(kvm: bool) -> &'static str {
    if kvm { "kvm-log" } else { "vmm-writes" }
}

fn same_bytes(left: &mut impl Read, right: &mut impl Read) -> bool {
    let (mut a, mut b) = (Vec::new(), Vec::new());
    loop {
        a.clear();
        b.clear();
        left.by_ref().take(1 << 20).read_to_end(&mut a).unwrap();
        right.by_ref().take(1 << 20).read_to_end(&mut b).unwrap();
        if a != b || a.is_empty() {
            return a == b;
        }
    }
}

/// The full snapshot holds what lies in the machine's RAM, read past the machine and past the library.
fn assert_holds_ram(dir: &Path, memory: &Memory) {
    let mut saved = File::open(dir.join(MEMORY_FILE)).unwrap();
    for region in memory.regions() {
        let mut ram = region.file.try_clone().unwrap();
        std::io::Seek::rewind(&mut ram).unwrap();
        assert!(same_bytes(&mut ram, &mut (&mut saved).take(region.len)), "region at {:#x}", region.gpa);
    }
}

fn files(dir: &Path) -> impl Iterator<Item = PathBuf> {
    fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path())
}

/// A folder for several GiB: in memory if there is plenty, since it is not the disk that is under test.
fn roomy_folder() -> TempDir {
    let room = rustix::fs::statvfs("/dev/shm").map_or(0, |shm| shm.f_bavail * shm.f_frsize);
    let in_memory = (room >= 8 << 30).then(|| tempfile::tempdir_in("/dev/shm").ok()).flatten();
    in_memory.unwrap_or_else(|| tempfile::tempdir().unwrap())
}

/// Bytes that a file takes on disk.
fn disk_bytes(file: &Path) -> u64 {
    fs::metadata(file).unwrap().blocks() * 512
}

#[test]
fn a_percent_of_a_gibibyte_takes_little_more_than_a_percent_of_the_full_snapshot() {
    const GIBIBYTE: u64 = 1 << 30;
    let kvm = kvm("a_percent_of_a_gibibyte_takes_little_more_than_a_percent_of_the_full_snapshot");
    let mut subject = Subject::start_in(roomy_folder(), setup(GIBIBYTE, kvm));
    subject.populate();
    subject.begin();
    let before = subject.attribution();
    subject.work(1_200, 1_250);
    subject.save_both("differential", "full");

    let reported = subject.reported_since(&before);
    let size = |name: &str| files(&subject.path(name)).map(|file| disk_bytes(&file)).sum::<u64>();
    let (size, full_size) = (size("differential"), size("full"));
    let pages_size = disk_bytes(&subject.path("differential").join(CHANGES_FILE));
    let dirty = compare(&subject.chain(&["base"]), &subject.chain(&["full"])).unwrap().memory;
    let dirty_bytes: u64 = dirty.iter().map(|range| range.len()).sum();
    let percent = |bytes: u64| bytes as f64 * 100.0 / full_size as f64;
    eprintln!(
        "KVM guest: {kvm}; full: {full_size} bytes on disk; dirty: {dirty_bytes} bytes, {:.3} % of RAM; differential: {size} bytes, {:.3} % of the full one, its memory {pages_size}, {:.3} %; pages reported, and by that source alone: {reported:?}",
        dirty_bytes as f64 * 100.0 / GIBIBYTE as f64,
        percent(size),
        percent(pages_size),
    );
    assert!(percent(GIBIBYTE) < 105.0, "RAM is populated");
    for source in [guest_source(kvm), "device-log"] {
        assert!(reported[source].1 >= 1_000, "{source} alone reported {:?}", reported[source]);
    }
    assert!(dirty_bytes >= 2_200 * PAGE_BYTES, "{dirty_bytes} bytes");
    // A guest that outran the test's clock dirtied more than the 1 % it was meant to.
    let allowed = 1.2 * percent(dirty_bytes).max(1.0);
    assert!(percent(size) <= allowed, "{:.3} % for {dirty_bytes} dirty bytes", percent(size));
    subject.assert_amounts_to(&["base", "differential"], "applied", "full");
}

/// MiB of RAM of the machine of which a chain is taken, where this variable says so.
const CHAIN_MIB: &str = "VFIO_MIGRATE_TEST_CHAIN_MIB";

fn a_chain_of_ten_amounts_to_each_instant(kvm: bool) {
    let mib: u64 = std::env::var(CHAIN_MIB).map_or(16, |text| text.parse().unwrap());
    let mut subject = Subject::start(setup(mib << 20, kvm));
    subject.populate();
    subject.begin();
    let began = subject.side.check(1).unwrap();
    let links: Vec<_> = (1..=10).map(|link| format!("link-{link}")).collect();
    let mut below = "base".to_owned();
    for link in &links {
        subject.work(100, 100);
        subject.save_both(link, &format!("full-{link}"));
        let applied = format!("applied-{link}");
        subject.assert_amounts_to(&[&below, link], &applied, &format!("full-{link}"));
        below = applied;
    }
    let chain: Vec<_> = std::iter::once("base").chain(links.iter().map(String::as_str)).collect();
    subject.assert_amounts_to(&chain, "whole", "full-link-10");

    assert_well(&subject.side.check(2).unwrap());
    let restored = restore(subject.setup.clone(), &subject.path("whole"));
    assert_well(&restored);
    assert!(restored.passes >= began.passes + 2, "it does not begin anew");
    assert!(restored.device_position >= began.device_position + 1_000, "nor does its device");
}

#[test]
fn a_chain_of_ten_amounts_to_each_instant_of_a_kvm_guest() {
    match probe_kvm() {
        Ok(()) => a_chain_of_ten_amounts_to_each_instant(true),
        Err(error) => skipped("a_chain_of_ten_amounts_to_each_instant_of_a_kvm_guest", error),
    }
}

#[test]
fn a_chain_of_ten_amounts_to_each_instant_of_a_guest_on_a_software_vcpu() {
    a_chain_of_ten_amounts_to_each_instant(false);
}

/// Takes a differential with one source forgotten; returns where it misses the full snapshot.
fn missed_without(source: &str, kvm: bool) -> Vec<GpaRange> {
    let mut subject =
        Subject::start(MachineSetup { forget: Some(source.to_owned()), ..setup(16 << 20, kvm) });
    subject.begin();
    subject.work(100, 100);
    subject.save_both("differential", "full");
    apply(&subject.chain(&["base", "differential"]), &subject.path("applied"), &SnapshotLimits::default())
        .unwrap();
    let found = compare(&subject.chain(&["applied"]), &subject.chain(&["full"])).unwrap();
    assert!(!found.config && !found.state, "{found:?}");
    let map = subject.side.machine.map();
    let is_devices =
        |range: &GpaRange| map.ranges(AreaKind::Device).any(|area| area.contains(&range.start()));
    assert!(found.memory.iter().all(|range| is_devices(range) == (source == "device-log")), "{found:?}");
    found.memory
}

#[test]
fn without_one_source_the_differential_misses_what_only_that_source_knew() {
    let kvm = kvm("without_one_source_the_differential_misses_what_only_that_source_knew");
    for source in [guest_source(kvm), "device-log"] {
        let missed = missed_without(source, kvm);
        assert!(
            missed.iter().map(|range| range.len()).sum::<u64>() >= 50 * PAGE_BYTES,
            "{source}: {missed:?}"
        );
    }
}

#[test]
fn no_other_reader_takes_pages_from_the_cursor_of_the_snapshots() {
    let kvm = kvm("no_other_reader_takes_pages_from_the_cursor_of_the_snapshots");
    let mut subject = Subject::start(setup(16 << 20, kvm));
    let seldom = subject.tracker().begin(Start::Empty).unwrap();
    let texts = subject.pause();
    subject.save_base(&texts);
    let base = subject.last.unwrap();
    // The base is what this cursor stands for, too.
    subject.tracker().save_pending(seldom, |_| Ok::<_, Failure>(())).unwrap();
    subject.resume();

    subject.work(100, 100);
    let migrated = subject.path("checkpoint");
    let options = DestinationOptions { checkpoint: true, ..DestinationOptions::default() };
    let mut checkpoint = SnapshotDestination::create(&migrated, options).unwrap();
    let mut vm = SourceVm::new(Arc::clone(&subject.side.machine));
    let (sent, _) = transfer(&mut vm, &subject.devices, &mut checkpoint, |options| options);
    assert!(sent.is_err() && checkpoint.kept().is_some(), "the checkpoint is kept, and its VM runs on");
    subject.work(100, 100);
    subject.save_both("first", "full-first");
    subject.work(100, 100);
    let texts = subject.pause();
    subject.save("second", &texts).unwrap();
    subject.save_from(seldom, base, "both", &texts).unwrap();
    subject.write_full("full", &texts);

    subject.assert_amounts_to(&["base", "first"], "applied-first", "full-first");
    subject.assert_amounts_to(&["base", "first", "second"], "applied", "full");
    subject.assert_amounts_to(&["base", "both"], "applied-both", "full");
}

#[test]
fn c23_pages_of_a_differential_that_fails_are_in_the_next_one() {
    let kvm = kvm("c23_pages_of_a_differential_that_fails_are_in_the_next_one");
    let mut subject = Subject::start(setup(16 << 20, kvm));
    subject.begin();
    let pending = |subject: &Subject| subject.tracker().outstanding(subject.cursor).unwrap().pending_bytes;

    subject.work(100, 100);
    let texts = subject.pause();
    fs::write(subject.path("taken"), "").unwrap();
    subject.save("taken", &texts).unwrap_err();
    let after_first = pending(&subject);
    assert!(after_first >= 150 * PAGE_BYTES, "{after_first} bytes");

    let broken = Texts { state: texts.state[1..].to_vec(), config: texts.config };
    let error = subject.save("next", &broken).unwrap_err();
    assert!(matches!(error.downcast_ref(), Some(WriteError::Format(_))), "{error}");
    assert_eq!(pending(&subject), after_first, "all pages were read, and all are pending again");
    subject.resume();

    subject.work(100, 100);
    subject.save_both("next", "full");
    assert_eq!(pending(&subject), 0);
    subject.assert_amounts_to(&["base", "next"], "applied", "full");
}

/// The first byte of a file, the last, and some in between that are always the same.
fn offsets(file: &File) -> impl Iterator<Item = u64> + use<> {
    let length = file.metadata().unwrap().len();
    let between = (1..=6u64).map(move |at| at.wrapping_mul(0x9e37_79b9_7f4a_7c15) % length);
    [0, length - 1].into_iter().chain(between)
}

/// Flips bits in every file of a snapshot, one at a time: each is found and named, and its page with it.
fn assert_flips_are_found(dir: &Path, memory_file: &str, placement: &Placement) {
    let mut names: Vec<_> = files(dir).map(|path| path.file_name().unwrap().to_owned()).collect();
    names.sort();
    assert_eq!(names, [CONFIG_FILE, memory_file, MANIFEST_FILE, STATE_FILE]);
    for name in [CONFIG_FILE, memory_file, MANIFEST_FILE, STATE_FILE] {
        let file = OpenOptions::new().read(true).write(true).open(dir.join(name)).unwrap();
        for offset in offsets(&file) {
            let mut byte = [0];
            file.read_exact_at(&mut byte, offset).unwrap();
            file.write_all_at(&[byte[0] ^ 1 << (offset % 8)], offset).unwrap();
            let report = verify(dir, &SnapshotLimits::default()).unwrap();
            file.write_all_at(&byte, offset).unwrap();
            if name == CONFIG_FILE && report.config_edited {
                // Still a configuration: what somebody may have edited is told apart from damage.
                assert!(
                    report.findings.is_empty() && !report.is_clean(),
                    "byte {offset} of {name}: {report:?}"
                );
                continue;
            }
            let [finding] = &report.findings[..] else {
                panic!("byte {offset} of {name}: {:?}", report.findings)
            };
            assert!(finding.to_string().contains(name), "byte {offset} of {name}: {finding}");
            if name == memory_file {
                let gpa = placement.gpas(offset, 1).next().unwrap();
                let VerifyFinding::Memory { range, .. } = finding else { panic!("{finding}") };
                assert!(range.covers(gpa) && range.len() <= 16 << 10, "{gpa} in {range}");
            }
        }
    }
    assert!(verify(dir, &SnapshotLimits::default()).unwrap().is_clean());
}

#[test]
fn a_flipped_bit_in_any_file_of_base_and_differential_is_found_and_named() {
    let kvm = kvm("a_flipped_bit_in_any_file_of_base_and_differential_is_found_and_named");
    let mut subject = Subject::start(setup(16 << 20, kvm));
    subject.begin();
    subject.work(100, 100);
    let texts = subject.pause();
    subject.save("differential", &texts).unwrap();

    let (base, differential) = (subject.path("base"), subject.path("differential"));
    let opened = FullSnapshot::open(&base, &SnapshotLimits::default()).unwrap();
    assert_flips_are_found(&base, MEMORY_FILE, opened.placement());
    let opened = Differential::open(&differential, &SnapshotLimits::default()).unwrap();
    assert_flips_are_found(&differential, CHANGES_FILE, opened.changed());
}
