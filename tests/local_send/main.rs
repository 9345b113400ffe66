// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A program that hands a stored VM to a VMM on its host: what its handle tells and does, from another thread.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

#[path = "../frames/mod.rs"]
#[expect(dead_code, reason = "other tests use the rest")]
mod frames;
#[expect(dead_code, reason = "the tool's tests use the rest")]
mod vmm;

use std::io::{ErrorKind, Read};
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use tempfile::TempDir;
use vfio_migration::granule::Granule;
use vfio_migration::layout::Layout;
use vfio_migration::offload::{LocalSendError, LocalSendOptions, LocalSender, LocalSenderHandle, LocalSent};
use vfio_migration::range::GpaRange;
use vfio_migration::snapshot::{AnnouncedRam, SnapshotChain, SnapshotLimits, SnapshotWriter};
use vfio_migration::transfer::url::Url;

use frames::{ABANDON, COMPLETE, CONFIG, MEMORY_FD, OK, START, STATE};
use vmm::{Faults, Line, PATIENCE, Vmm};

const PAGE: u64 = 4096;

/// RAM in two slots, of which as much is populated.
const RAM: [(u64, u64); 2] = [(0, 6 << 20), (4 << 30, 2 << 20)];
const RAM_BYTES: u64 = RAM[0].1 + RAM[1].1;
const POPULATED: u64 = 1 << 20;

fn state() -> String {
    let range = |(gpa, length): (u64, u64)| format!(r#"{{\"gpa\":{gpa},\"length\":{length}}}"#);
    let mapping = |number: usize| {
        let (gpa, size) = RAM[number];
        format!(r#"{{\"slot\":{number},\"gpa\":{gpa},\"size\":{size},\"virtio_mem\":false}}"#)
    };
    let ranges = format!(r#"\"memory_ranges\":{{\"data\":[{},{}]}}"#, range(RAM[0]), range(RAM[1]));
    let mappings = format!(r#"\"guest_ram_mappings\":[{},{}]"#, mapping(0), mapping(1));
    let child = format!(r#"{{"snapshots":{{}},"snapshot_data":{{"state":"{{{ranges},{mappings}}}"}}}}"#);
    let root = r#"{"state":"{\"common_cpuid\":[{\"function\":1}]}"}"#;
    format!(r#"{{"snapshots":{{"memory-manager":{child}}},"snapshot_data":{root}}}"#)
}

/// What is stored at `gpa`.
fn byte_at(gpa: u64) -> u8 {
    if gpa % (4 << 30) < POPULATED / 2 { (gpa / PAGE % 251 + 1).to_le_bytes()[0] } else { 0 }
}

fn write(target: &Path) {
    let ranges = RAM.map(|(start, bytes)| GpaRange::new(start, bytes).unwrap());
    let ram = AnnouncedRam::all(Layout::new(ranges, Granule::host_page()).unwrap());
    let writer = SnapshotWriter::create(target, ram, None, SnapshotLimits::default()).unwrap();
    for (start, _) in RAM {
        for gpa in (start..start + POPULATED / 2).step_by(4096) {
            let page = GpaRange::new(gpa, PAGE).unwrap();
            writer.fill(page, &mut std::io::repeat(byte_at(gpa)).take(PAGE)).unwrap();
        }
    }
    writer.finish(br#"{"memory":{"size":8388608}}"#, state().as_bytes()).unwrap();
}

/// A VMM that waits, a sender to it, and the directory that both are in.
struct Stage {
    _place: TempDir,
    vmm: Vmm,
    url: Url,
    sender: LocalSender,
}

impl Stage {
    fn set(options: LocalSendOptions) -> Self {
        let place = tempfile::tempdir().unwrap();
        write(&place.path().join("monday"));
        let (socket, limits) = (place.path().join("socket"), SnapshotLimits::default());
        let chain = SnapshotChain::open([place.path().join("monday")], &limits).unwrap();
        let sender = LocalSender::new(chain, options).unwrap();
        Self { vmm: Vmm::bind(&socket), url: Url::unix(socket).unwrap(), sender, _place: place }
    }

    /// Sends the VM while `play` is the VMM, and the program that holds the handle.
    fn send(self, play: impl FnOnce(&Vmm, &LocalSenderHandle)) -> Result<LocalSent, LocalSendError> {
        let Self { vmm, url, sender, _place } = self;
        let handle = sender.handle();
        thread::scope(|scope| {
            let sending = scope.spawn(|| sender.send(&url));
            play(&vmm, &handle);
            // A sender that is still busy has been let down by this VMM.
            drop(vmm);
            sending.join().unwrap()
        })
    }
}

fn on_demand() -> LocalSendOptions {
    LocalSendOptions { on_demand: true, ..LocalSendOptions::default() }
}

#[track_caller]
fn assert_page(line: &Line, gpa: u64) {
    let mut page = [0; 4096];
    line.passed.read(gpa, &mut page).unwrap();
    assert!(page.iter().all(|&byte| byte == byte_at(gpa)), "page at {gpa:#x}");
}

fn pages() -> impl Iterator<Item = u64> {
    RAM.into_iter().flat_map(|(start, bytes)| (start..start + bytes).step_by(4096))
}

/// Waits until `is_so`, but not for ever.
#[track_caller]
fn wait_until(is_so: impl Fn() -> bool) {
    let began = Instant::now();
    while !is_so() {
        assert!(began.elapsed() < PATIENCE);
        thread::sleep(Duration::from_millis(1));
    }
}

/// Takes all up to State, and answers that once the first page was asked for.
fn take_state(vmm: &Vmm) -> (Line, Faults) {
    let mut line = vmm.accept();
    assert!(line.answer_until(CONFIG));
    line.answer(OK);
    let mut faults = Faults::accept(vmm);
    assert_eq!(line.next(), Some(STATE));
    assert_eq!(faults.ask(0, PAGE), Some(OK));
    line.answer(OK);
    (line, faults)
}

#[test]
fn the_handle_tells_how_much_of_a_vm_is_there_and_when_it_was_handed_over() {
    let stage = Stage::set(LocalSendOptions::default());
    assert_eq!(stage.sender.handle().progress().ram_bytes, 0);
    let sent = stage.send(|vmm, handle| {
        let mut line = vmm.accept();
        // Nothing is told to the VMM before all memory was read.
        assert_eq!(line.next(), Some(START));
        let progress = handle.progress();
        assert_eq!((progress.ram_bytes, progress.filled_bytes), (RAM_BYTES, POPULATED));
        line.answer(OK);
        assert!(line.answer_until(STATE));
        assert!(!handle.is_too_late());
        line.answer(OK);
        assert_eq!(line.next(), Some(COMPLETE));
        assert_eq!(handle.progress().handed_over, None);
        assert!(handle.is_too_late());
        line.answer(OK);
        assert_eq!(line.passed.commands, [START, MEMORY_FD, MEMORY_FD, CONFIG, STATE, COMPLETE]);
        pages().for_each(|gpa| assert_page(&line, gpa));
    });
    let sent = sent.unwrap();
    assert!(sent.progress.handed_over.is_some_and(|at| at <= sent.took), "{sent:?}");
    assert_eq!(sent.progress.filled_bytes, POPULATED);
}

#[test]
fn the_handle_counts_the_faults_of_a_vm_that_is_served_on_demand() {
    let sent = Stage::set(on_demand()).send(|vmm, handle| {
        let (mut line, mut faults) = take_state(vmm);
        assert_eq!(line.next(), Some(COMPLETE));
        line.answer(OK);
        wait_until(|| handle.progress().handed_over.is_some());
        // A page far from the cursor, twice.
        for gpa in [RAM[1].0 + PAGE; 2] {
            assert_eq!(faults.ask(gpa, PAGE), Some(OK));
            assert_page(&line, gpa);
        }
        // The answer comes before the count.
        wait_until(|| handle.progress().faults.served == 3);
        let progress = handle.progress().faults;
        assert_eq!((progress.jumps, progress.asked_bytes, progress.waiting), (2, 2 * PAGE, None));
        assert!(Duration::ZERO < progress.jump_median && progress.jump_median <= progress.jump_99th);
        for gpa in pages() {
            assert_eq!(faults.ask(gpa, PAGE), Some(OK));
            assert_page(&line, gpa);
        }
    });
    let faults = sent.unwrap().progress.faults;
    assert_eq!((faults.asked_bytes, faults.ahead_bytes), (RAM_BYTES, 0));
    assert!(faults.last_page.is_some());
}

#[test]
fn a_sender_that_is_cancelled_in_time_leaves_the_receiver_without_a_vm() {
    let cancelled = Stage::set(LocalSendOptions::default()).send(|vmm, handle| {
        let mut line = vmm.accept();
        assert!(line.answer_until(CONFIG));
        assert!(handle.cancel(), "it was not too late");
        line.answer(OK);
        assert!(!line.answer_until(COMPLETE), "the VM was handed over");
    });
    assert!(matches!(cancelled, Err(LocalSendError::Stopped)), "{cancelled:?}");
    let abandoned = Stage::set(on_demand()).send(|vmm, handle| {
        let mut line = vmm.accept();
        assert!(line.answer_until(CONFIG));
        line.answer(OK);
        let mut faults = Faults::accept(vmm);
        assert_eq!(line.next(), Some(STATE));
        assert_eq!(faults.ask(0, PAGE), Some(OK));
        assert!(handle.cancel(), "it was not too late");
        assert_eq!(line.next(), Some(ABANDON));
    });
    assert!(matches!(abandoned, Err(LocalSendError::Stopped)), "{abandoned:?}");
}

#[test]
fn a_sender_that_is_cancelled_too_late_serves_the_vm_to_its_last_page() {
    let sent = Stage::set(on_demand()).send(|vmm, handle| {
        let (mut line, mut faults) = take_state(vmm);
        assert_eq!(line.next(), Some(COMPLETE));
        assert!(!handle.cancel());
        line.answer(OK);
        for gpa in pages() {
            assert_eq!(faults.ask(gpa, PAGE), Some(OK));
            assert_page(&line, gpa);
        }
    });
    assert_eq!(sent.unwrap().progress.faults.asked_bytes, RAM_BYTES);
}

#[test]
fn a_sender_that_is_aborted_takes_the_memory_of_a_vm_that_lacks_some_and_no_other() {
    let aborted = Stage::set(on_demand()).send(|vmm, handle| {
        let (mut line, mut faults) = take_state(vmm);
        assert_eq!(line.next(), Some(COMPLETE));
        line.answer(OK);
        assert_eq!(faults.ask(PAGE, PAGE), Some(OK));
        handle.abort();
        let missing = line.passed.read(0, &mut [0; 4096]).unwrap_err();
        assert_eq!(missing.kind(), ErrorKind::UnexpectedEof);
        assert_eq!(faults.ask(RAM[1].0, PAGE), None, "nobody answers any more");
    });
    assert!(matches!(aborted, Err(LocalSendError::Aborted { .. })), "{aborted:?}");
    let kept = Stage::set(LocalSendOptions::default()).send(|vmm, handle| {
        let mut line = vmm.accept();
        assert!(line.answer_until(COMPLETE));
        handle.abort();
        line.answer(OK);
        pages().for_each(|gpa| assert_page(&line, gpa));
    });
    assert!(kept.unwrap().progress.handed_over.is_some());
}
