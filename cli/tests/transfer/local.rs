// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A source that passes its memory as descriptors (`local=on`), in bytes spelled out here, honest and otherwise.

mod hostile;
mod recipes;
mod unlucky;

use std::fs::File;
use std::io::{IoSlice, PipeReader, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::fs::{MemfdFlags, memfd_create};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};

use crate::frames::{COMPLETE, CONFIG, ERROR, MEMORY_FD, OK, START, message, request};
use crate::raw::{NO_DISKS, RAM, state};
use crate::stored::{Place, assert_sound};
use crate::tool::{Ended, Tool, is_empty, run};

const PAGE: u64 = 4096;

/// A memfd of `bytes` bytes, all of them a hole.
fn memory_of(bytes: u64) -> File {
    let file = File::from(memfd_create("guest", MemfdFlags::CLOEXEC).unwrap());
    file.set_len(bytes).unwrap();
    file
}

/// A memfd of the VM's memory with a page of sevens in it.
pub(crate) fn guest() -> File {
    let file = memory_of(RAM);
    file.write_all_at(&[7; 4096], 3 * PAGE).unwrap();
    file
}

/// Encodes a Config that names these slots: number, gpa, size, offset.
pub(crate) fn config(vm_config: &str, slots: &[(u32, u64, u64, u64)]) -> Vec<u8> {
    let mapping = |&(slot, gpa, size, offset): &(u32, u64, u64, u64)| {
        format!(
            r#"{{"slot":{slot},"gpa":{gpa},"size":{size},"zone_id":"mem0","virtio_mem":false,"file_offset":{offset}}}"#
        )
    };
    let mappings: Vec<_> = slots.iter().map(mapping).collect();
    let memory = format!(r#"{{"guest_ram_mappings":[{}]}}"#, mappings.join(","));
    message(CONFIG, format!(r#"{{"vm_config":{vm_config},"memory_manager_data":{memory}}}"#).as_bytes())
}

/// The Config of a VM whose memory is in slot 0.
fn one_slot() -> Vec<u8> {
    config(NO_DISKS, &[(0, 0, RAM, 0)])
}

/// A source of a local migration.
pub(crate) struct Source(UnixStream);

impl Source {
    /// Connects to `socket` and says Start.
    fn start(socket: &Path) -> Self {
        Self::try_start(socket).unwrap()
    }

    /// As [`Source::start`]; `None` where Start is refused.
    pub(crate) fn try_start(socket: &Path) -> Option<Self> {
        let stream = UnixStream::connect(socket).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        let mut source = Self(stream);
        (source.ask(&message(START, b"")) == Some(OK)).then_some(source)
    }

    fn answer(&mut self) -> Option<u16> {
        let mut answer = [0; 16];
        self.0.read_exact(&mut answer).ok().map(|()| u16::from_le_bytes([answer[0], answer[1]]))
    }

    pub(crate) fn ask(&mut self, message: &[u8]) -> Option<u16> {
        let _ = self.0.write_all(message);
        self.answer()
    }

    /// Sends a MemoryFd: its head, and in a message of their own the slot's 4 bytes, which the descriptors ride on.
    pub(crate) fn pass(&mut self, slot: u32, descriptors: &[BorrowedFd<'_>]) -> Option<u16> {
        self.0.write_all(&request(MEMORY_FD, 4)).ok()?;
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(4))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !descriptors.is_empty() {
            assert!(control.push(SendAncillaryMessage::ScmRights(descriptors)));
        }
        let slot = slot.to_le_bytes();
        sendmsg(&self.0, &[IoSlice::new(&slot)], &mut control, SendFlags::NOSIGNAL).ok()?;
        self.answer()
    }

    /// Tells the rest of an honest migration; returns the last answer.
    pub(crate) fn finish(&mut self) -> Option<u16> {
        assert_eq!(self.ask(&state()), Some(OK));
        self.ask(&message(COMPLETE, b""))
    }
}

/// A receiver and a source at it that has said Start.
struct Bench {
    place: Place,
    tool: Tool,
    source: Source,
}

impl Bench {
    fn new(options: &[&str]) -> Self {
        let place = Place::new();
        let socket = format!("unix:{}", place.path("socket").display());
        let (tool, _) = Tool::receive(&socket, &place.path("into"), options);
        let source = Source::start(&place.path("socket"));
        Self { place, tool, source }
    }

    fn ask(&mut self, message: &[u8]) -> Option<u16> {
        self.source.ask(message)
    }

    fn pass(&mut self, slot: u32, descriptors: &[BorrowedFd<'_>]) -> Option<u16> {
        self.source.pass(slot, descriptors)
    }

    fn finish(&mut self) -> Option<u16> {
        self.source.finish()
    }

    fn end(self) -> (Ended, Place) {
        drop(self.source);
        (self.tool.end(), self.place)
    }

    /// Checks that the receiver ends as the fault of its peer, names `what` and leaves nothing behind.
    #[track_caller]
    fn refuses(self, what: &str) {
        let (ended, place) = self.end();
        ended.failed(3, what);
        assert!(is_empty(place.root()), "something is left behind");
    }
}

fn kept_memory(place: &Place) -> Vec<u8> {
    let into = place.path("into");
    assert_sound(&into);
    std::fs::read(into.join("memory-ranges")).unwrap()
}

fn contents(file: &File) -> Vec<u8> {
    let mut bytes = vec![0; usize::try_from(RAM).unwrap()];
    file.read_exact_at(&mut bytes, 0).unwrap();
    bytes
}

#[test]
fn what_changes_between_config_and_state_is_in_the_snapshot() {
    for options in [&[][..], &["--no-warm-copy"], &["--checkpoint"]] {
        let mut bench = Bench::new(options);
        let memory = guest();
        memory.write_all_at(&[5; 4096], 9 * PAGE).unwrap();
        assert_eq!(bench.pass(0, &[memory.as_fd()]), Some(OK));
        assert_eq!(bench.ask(&one_slot()), Some(OK));
        // The guest runs until Config is answered: one page changes, one comes, one becomes a hole.
        memory.write_all_at(&[8; 4096], 3 * PAGE).unwrap();
        memory.write_all_at(&[9; 100], 200 * PAGE + 50).unwrap();
        let punch = rustix::fs::FallocateFlags::PUNCH_HOLE | rustix::fs::FallocateFlags::KEEP_SIZE;
        rustix::fs::fallocate(&memory, punch, 9 * PAGE, PAGE).unwrap();
        assert_eq!(bench.finish(), Some(if options == ["--checkpoint"] { ERROR } else { OK }));
        let (ended, place) = bench.end();
        let ended = ended.succeeded();
        assert_eq!(kept_memory(&place), contents(&memory), "{options:?}");
        let stored = ended.events().into_iter().find(|event| event["event"] == "memory-stored").unwrap();
        let written = if options == ["--no-warm-copy"] { 2 } else { 3 };
        assert_eq!(stored["written_bytes"], written * PAGE, "{options:?}");
    }
}

#[test]
fn slots_may_share_a_file_and_come_in_any_order() {
    let mut bench = Bench::new(&[]);
    let (memory, half) = (guest(), RAM / 2);
    memory.write_all_at(&[4; 4096], half + PAGE).unwrap();
    assert_eq!(bench.pass(5, &[memory.as_fd()]), Some(OK));
    assert_eq!(bench.pass(2, &[memory.as_fd()]), Some(OK));
    let slots = [(2, 0, half, 0), (5, half, half, half)];
    assert_eq!(bench.ask(&config(NO_DISKS, &slots)), Some(OK));
    assert_eq!(bench.finish(), Some(OK));
    let (ended, place) = bench.end();
    ended.succeeded();
    assert_eq!(kept_memory(&place), contents(&memory));
}

/// Receives a full snapshot of `memory`, for differentials to it.
fn stored(memory: &File) -> Place {
    let mut bench = Bench::new(&[]);
    bench.pass(0, &[memory.as_fd()]);
    bench.ask(&one_slot());
    assert_eq!(bench.finish(), Some(OK));
    let (ended, place) = bench.end();
    ended.succeeded();
    place
}

/// The memory of the differential that was received, applied to its base.
fn applied(base: &Path, place: &Place) -> Vec<u8> {
    let (into, whole) = (place.path("into"), place.path("whole"));
    let words = ["snapshot", "apply", base.to_str().unwrap(), into.to_str().unwrap(), "--into"];
    run([&words[..], &[whole.to_str().unwrap()]].concat()).succeeded();
    std::fs::read(whole.join("memory-ranges")).unwrap()
}

#[test]
fn a_differential_holds_what_differs_from_its_base() {
    let memory = guest();
    let base = stored(&memory);
    let base_dir = base.path("into");

    memory.write_all_at(&[1; 4096], 20 * PAGE).unwrap();
    let mut bench = Bench::new(&["--base", base_dir.to_str().unwrap()]);
    bench.pass(0, &[memory.as_fd()]);
    assert_eq!(bench.ask(&one_slot()), Some(OK));
    // As it was in the base, one page that is zero now, and a new one.
    memory.write_all_at(&[0; 4096], 20 * PAGE).unwrap();
    memory.write_all_at(&[0; 4096], 3 * PAGE).unwrap();
    memory.write_all_at(&[2; 4096], 30 * PAGE).unwrap();
    assert_eq!(bench.finish(), Some(OK));
    let (ended, place) = bench.end();
    ended.succeeded();
    // The first one had its place by then.
    assert_eq!(std::fs::metadata(place.path("into").join("memory-changes")).unwrap().len(), 2 * PAGE);
    assert_eq!(applied(&base_dir, &place), contents(&memory));
}

#[test]
fn a_hole_made_while_the_vm_ran_replaces_a_page_of_the_base() {
    let memory = guest();
    let base = stored(&memory);
    let base_dir = base.path("into");

    let mut bench = Bench::new(&["--base", base_dir.to_str().unwrap()]);
    bench.pass(0, &[memory.as_fd()]);
    // Copied while it is as in the base.
    assert_eq!(bench.ask(&one_slot()), Some(OK));
    let punch = rustix::fs::FallocateFlags::PUNCH_HOLE | rustix::fs::FallocateFlags::KEEP_SIZE;
    rustix::fs::fallocate(&memory, punch, 3 * PAGE, PAGE).unwrap();
    assert_eq!(bench.finish(), Some(OK));
    let (ended, place) = bench.end();
    ended.succeeded();
    assert_eq!(applied(&base_dir, &place), contents(&memory));
}

#[test]
fn a_differential_writes_what_changed_since_the_warm_copy_and_not_since_the_base() {
    let memory = guest();
    let base = stored(&memory);
    let base_dir = base.path("into");

    // Twenty pages differ from the base, and one that it has is zero now.
    (40..60).for_each(|page| memory.write_all_at(&[6; 4096], page * PAGE).unwrap());
    memory.write_all_at(&[0; 4096], 3 * PAGE).unwrap();
    let mut bench = Bench::new(&["--base", base_dir.to_str().unwrap()]);
    bench.pass(0, &[memory.as_fd()]);
    assert_eq!(bench.ask(&one_slot()), Some(OK));
    // One of them changes again, one is as in the base again, and one that was zero is not.
    memory.write_all_at(&[5; 4096], 40 * PAGE).unwrap();
    memory.write_all_at(&[0; 4096], 41 * PAGE).unwrap();
    memory.write_all_at(&[4; 4096], 3 * PAGE).unwrap();
    assert_eq!(bench.finish(), Some(OK));
    let (ended, place) = bench.end();
    let ended = ended.succeeded();
    let stored = ended.events().into_iter().find(|event| event["event"] == "memory-stored").unwrap();
    assert_eq!(stored["written_bytes"], 3 * PAGE);
    let (into, whole) = (place.path("into"), place.path("whole"));
    assert_eq!(std::fs::metadata(into.join("memory-changes")).unwrap().len(), 21 * PAGE);
    let words = ["snapshot", "apply", base_dir.to_str().unwrap(), into.to_str().unwrap(), "--into"];
    run([&words[..], &[whole.to_str().unwrap()]].concat()).succeeded();
    assert_eq!(std::fs::read(whole.join("memory-ranges")).unwrap(), contents(&memory));
}

#[test]
fn the_hook_of_the_paused_vm_runs_beside_the_comparison() {
    let go_on = Place::new();
    let until = format!("until [ -e '{}' ]; do sleep 0.01; done", go_on.path("go").display());
    let (mut bench, memory) = (Bench::new(&["--on-paused", &until]), guest());
    bench.pass(0, &[memory.as_fd()]);
    assert_eq!(bench.ask(&one_slot()), Some(OK));
    bench.source.0.write_all(&state()).unwrap();
    bench.tool.await_event("memory-stored");
    File::create(go_on.path("go")).unwrap();
    assert_eq!(bench.source.answer(), Some(OK));
    assert_eq!(bench.ask(&message(COMPLETE, b"")), Some(OK));
    let (ended, place) = bench.end();
    ended.succeeded();
    assert_eq!(kept_memory(&place), contents(&memory));
}

#[test]
fn a_hook_that_fails_ends_a_snapshot_of_descriptors() {
    let (mut bench, memory) = (Bench::new(&["--on-paused", "exit 7"]), guest());
    bench.pass(0, &[memory.as_fd()]);
    assert_eq!(bench.ask(&one_slot()), Some(OK));
    assert_eq!(bench.ask(&state()), Some(ERROR));
    let (ended, place) = bench.end();
    ended.failed(4, "\"exit 7\" ended with exit status: 7");
    assert!(is_empty(place.root()));
}

#[test]
fn a_hook_is_told_to_end_when_memory_cannot_be_stored_beside_it() {
    let (mut bench, memory) = (Bench::new(&["--on-paused", "exec sleep 50"]), guest());
    memory.write_all_at(&[1; 4096], RAM - PAGE).unwrap();
    bench.pass(0, &[memory.as_fd()]);
    assert_eq!(bench.ask(&one_slot()), Some(OK));
    memory.set_len(RAM / 2).unwrap();
    let began = Instant::now();
    assert_eq!(bench.ask(&state()), Some(ERROR));
    assert!(began.elapsed() < Duration::from_secs(30), "the VM waited for {:?}", began.elapsed());
    bench.refuses("descriptor of slot 0");
}

#[test]
fn descriptors_that_are_no_memory_are_refused_at_once() {
    let (reader, _writer): (PipeReader, _) = std::io::pipe().unwrap();
    let place = Place::new();
    let directory = File::open(place.root()).unwrap();
    let write_only = File::create(place.path("file")).unwrap();
    let memory = guest();
    let file = File::open("/proc/version").unwrap();
    let cases: [(&[BorrowedFd<'_>], &str); 6] = [
        (&[file.as_fd()], "slot 0 is a file that is not in memory"),
        (&[reader.as_fd()], "slot 0 is a pipe"),
        (&[directory.as_fd()], "slot 0 is a directory"),
        (&[write_only.as_fd()], "slot 0 cannot be read"),
        (&[], "slot 0 came with 0 descriptors"),
        (&[memory.as_fd(), memory.as_fd()], "slot 0 came with 2 descriptors"),
    ];
    for (descriptors, what) in cases {
        let mut bench = Bench::new(&[]);
        assert_eq!(bench.pass(0, descriptors), Some(ERROR), "{what}");
        bench.refuses(what);
    }
    let mut bench = Bench::new(&[]);
    assert_eq!(bench.pass(0, &[memory.as_fd()]), Some(OK));
    assert_eq!(bench.pass(0, &[memory.as_fd()]), Some(ERROR));
    bench.refuses("Slot 0 was passed twice");
}

#[test]
fn a_config_that_does_not_fit_the_descriptors_is_refused() {
    let half = RAM / 2;
    let zone =
        r#"{"memory":{"size":0,"zones":[{"id":"z","size":1048576,"file":"/dev/shm/z","shared":false}]}}"#;
    let cases: [(&[u32], u64, Vec<u8>, &str); 7] = [
        (&[0], RAM - PAGE, one_slot(), "slot 0 has 1044480 bytes"),
        (&[0], RAM, config(NO_DISKS, &[(0, 0, RAM, PAGE)]), "memory goes to 1052672"),
        (&[0], RAM, config(NO_DISKS, &[(0, 0, RAM, u64::MAX)]), "Descriptor of slot 0"),
        (&[0], RAM, config(NO_DISKS, &[(0, 0, half, 0), (1, half, half, 0)]), "names slot 1, for which no"),
        (&[0, 1], RAM, one_slot(), "slot 1, which Config does not name"),
        (&[0], RAM, config(NO_DISKS, &[(0, 0, half, 0), (0, half, half, half)]), "names slot 0 twice"),
        (&[0], RAM, config(zone, &[(0, 0, RAM, 0)]), "zone z is in /dev/shm/z"),
    ];
    for (slots, bytes, config, what) in cases {
        let mut bench = Bench::new(&[]);
        for &slot in slots {
            assert_eq!(bench.pass(slot, &[memory_of(bytes).as_fd()]), Some(OK));
        }
        assert_eq!(bench.ask(&config), Some(ERROR), "{what}");
        bench.refuses(what);
    }
    let (mut bench, memory) = (Bench::new(&[]), guest());
    bench.pass(0, &[memory.as_fd()]);
    bench.pass(1, &[memory.as_fd()]);
    let slots = [(0, 0, half, 0), (1, half, half, half - PAGE)];
    assert_eq!(bench.ask(&config(NO_DISKS, &slots)), Some(ERROR));
    bench.refuses("Slots 0 and 1 are the same bytes");
}

#[test]
fn memory_that_is_cut_off_later_is_an_error() {
    for options in [&[][..], &["--no-warm-copy"]] {
        let (mut bench, memory) = (Bench::new(options), guest());
        memory.write_all_at(&[1; 4096], RAM - PAGE).unwrap();
        bench.pass(0, &[memory.as_fd()]);
        assert_eq!(bench.ask(&one_slot()), Some(OK));
        memory.set_len(RAM / 2).unwrap();
        assert_eq!(bench.ask(&state()), Some(ERROR));
        bench.refuses("descriptor of slot 0");
    }
}

#[test]
fn no_memory_comes_as_bytes_after_descriptors() {
    let (mut bench, memory) = (Bench::new(&[]), guest());
    bench.pass(0, &[memory.as_fd()]);
    bench.ask(&one_slot());
    assert_eq!(bench.ask(&crate::raw::memory(1)), Some(ERROR));
    bench.refuses("Memory");
}

#[test]
fn a_source_that_dies_leaves_nothing_behind() {
    for step in 0..4 {
        let (mut bench, memory) = (Bench::new(&[]), guest());
        if step > 0 {
            bench.pass(0, &[memory.as_fd()]);
        }
        if step > 1 {
            bench.ask(&one_slot());
        }
        if step > 2 {
            bench.ask(&state());
        }
        bench.refuses("Source closed the connection");
    }
}
