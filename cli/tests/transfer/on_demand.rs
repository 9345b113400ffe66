// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! `send --local --on-demand`: a VMM that asks for its VM's memory page by page, in bytes spelled out here, honest and otherwise.

mod ends;
mod hostile;

use std::fs::{self, OpenOptions};
use std::io::{ErrorKind, Read, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use rustix::net::{RecvFlags, recv};
use serde_json::{Value, json};
use vfio_migration::snapshot::{CONFIG_FILE, MEMORY_FILE};

use crate::frames::{
    ABANDON, COMPLETE, COMPLETE_PAUSED, CONFIG, ERROR, MEMORY, OK, PAGE_FAULT, STATE, message,
};
use crate::kills::random;
use crate::local_send::{begin, chain, flip, memory_of, text};
use crate::stored::Place;
use crate::tool::{Ended, Tool};
use crate::vmm::{Faults, Line, PATIENCE, Passed, Vmm};

const PAGE: u64 = 4096;

/// RAM of the VM of the captures, and of the one made up.
const RAM: u64 = 64 << 20;

/// Sends one signal after the other until the tool closes the connection that pages are asked for on.
#[track_caller]
fn signal_until_closed(faults: &mut Faults, tool: &Tool) {
    faults.0.set_read_timeout(Some(Duration::from_millis(400))).unwrap();
    let closed = (0..100).any(|_| {
        tool.signal("-TERM");
        !faults.0.read(&mut [0; 1]).is_err_and(|error| error.kind() == ErrorKind::WouldBlock)
    });
    assert!(closed);
}

/// A VM that its VMM runs, and asks for memory of.
struct Running {
    faults: Faults,
    passed: Passed,
    /// The memory as it is stored.
    stored: Vec<u8>,
}

impl Running {
    /// Asks for the page at `gpa`, and checks it; then the guest writes to it, as none of it is the sender's business any more.
    #[track_caller]
    fn touch(&mut self, gpa: u64) {
        self.touch_large(gpa, PAGE);
    }

    #[track_caller]
    fn touch_large(&mut self, gpa: u64, length: u64) {
        assert_eq!(self.faults.ask(gpa, length), Some(OK), "{gpa:#x}");
        let mut bytes = vec![0; usize::try_from(length).unwrap()];
        self.passed.read(gpa, &mut bytes).unwrap();
        let at = usize::try_from(gpa).unwrap();
        assert!(bytes == self.stored[at..at + bytes.len()], "page at {gpa:#x} is wrong");
    }

    /// The guest writes to a page that it has.
    fn write(&mut self, gpa: u64, byte: u8) {
        let slot = self.passed.slots()[0];
        let file = &self.passed.files[&slot.number];
        file.write_all_at(&[byte; 4096], slot.offset + (gpa - slot.gpa)).unwrap();
        let at = usize::try_from(gpa).unwrap();
        self.stored[at..at + 4096].fill(byte);
    }

    fn touch_all(&mut self) {
        (0..RAM / PAGE).for_each(|number| self.touch(number * PAGE));
    }
}

/// Takes all up to State, which is left unanswered.
pub(crate) fn take_state(vmm: &Vmm) -> (Line, Faults) {
    let mut line = vmm.accept();
    assert!(line.answer_until(CONFIG));
    line.answer(OK);
    let faults = Faults::accept(vmm);
    assert_eq!(line.next(), Some(STATE));
    (line, faults)
}

/// Starts a restore of `from` on demand, whose memory is that of `whole`, and goes on until the VM runs.
fn run(place: &Place, from: &[&Path], whole: &Path, options: &[&str]) -> (Tool, Line, Running) {
    let (vmm, tool) = begin(place, from, &[&["--on-demand"], options].concat());
    let (mut line, faults) = take_state(&vmm);
    let mut running = Running { faults, passed: std::mem::take(&mut line.passed), stored: memory_of(whole) };
    // The VMM reads memory while it takes State.
    running.touch(0x50_0000);
    line.answer(OK);
    running.touch(0);
    let last = line.next();
    assert!(matches!(last, Some(COMPLETE | COMPLETE_PAUSED)), "{last:?}");
    line.answer(OK);
    (tool, line, running)
}

fn run_one(place: &Place, options: &[&str]) -> (Tool, Line, Running, PathBuf) {
    let from = place.stored("from", 1);
    let (tool, line, running) = run(place, &[&from], &from, options);
    (tool, line, running, from)
}

#[test]
fn every_page_is_right_in_order_and_out_of_it_and_is_left_alone_once_it_was_given() {
    let place = Place::new();
    let (tool, line, mut running, _) = run_one(&place, &[]);
    drop(line);
    // The guest jumps about, and writes to what it has.
    for jump in 0..200u64 {
        let gpa = jump * 7_919 % (RAM / PAGE) * PAGE;
        running.touch(gpa);
        running.write(gpa, u8::try_from(jump).unwrap());
    }
    running.touch_all();
    let Running { faults, passed, stored } = running;
    drop(faults);
    let ended = tool.end().succeeded();
    assert!(passed.memory() == stored, "something was written after it was given");
    let events = ended.events();
    assert!(events.iter().any(|event| event["event"] == "handed-over"), "{ended:?}");
    let last = ended.last();
    assert_eq!(last["event"], "passed");
    let figures = &last["faults"];
    assert_eq!(figures["asked_bytes"], RAM);
    assert_eq!(figures["ahead_bytes"], 0);
    assert!(figures["served"].as_u64().unwrap() >= RAM / PAGE + 200, "{figures}");
    assert!((150..=210).contains(&figures["jumps"].as_u64().unwrap()), "{figures}");
    assert!(figures["last_page_ms"].is_u64(), "{figures}");
    assert_eq!(passed.allocated(), RAM, "a hole cannot be gone on with");
}

#[test]
fn a_vm_that_is_to_stay_paused_is_served_too() {
    let place = Place::new();
    let (tool, _line, mut running, _) = run_one(&place, &["--paused"]);
    running.touch_all();
    drop(running);
    tool.end().succeeded();
}

#[test]
fn a_chain_is_served_as_its_differentials_make_it() {
    let place = Place::new();
    let (chain, whole) = chain(&place, 5);
    let from: Vec<_> = chain.iter().map(PathBuf::as_path).collect();
    let (tool, _line, mut running) = run(&place, &from, &whole, &[]);
    for number in (0..RAM / PAGE).rev().step_by(3) {
        running.touch(number * PAGE);
    }
    running.touch_all();
    drop(running);
    tool.end().succeeded();
}

#[test]
fn a_large_page_comes_whole() {
    let place = Place::new();
    let (tool, _line, mut running, _) = run_one(&place, &[]);
    let large = 2 << 20;
    for number in (0..RAM / large).rev() {
        running.touch_large(number * large, large);
    }
    running.touch_large(0, RAM);
    drop(running);
    let figures = tool.end().succeeded().last()["faults"].clone();
    assert_eq!(figures["asked_bytes"], RAM);
}

#[test]
fn one_page_may_be_asked_for_ten_thousand_times() {
    let place = Place::new();
    let (tool, _line, mut running, _) = run_one(&place, &[]);
    running.touch(0x80_0000);
    for _ in 0..10_000 {
        assert_eq!(running.faults.ask(0x80_0000, PAGE), Some(OK));
    }
    running.touch_all();
    drop(running);
    let figures = tool.end().succeeded().last()["faults"].clone();
    assert!(figures["served"].as_u64().unwrap() > 10_000);
}

#[test]
fn all_is_written_ahead_though_nobody_asks_and_an_end_after_that_is_no_success() {
    let place = Place::new();
    let (mut tool, _line, running, _) = run_one(&place, &[]);
    let begun = Instant::now();
    while running.passed.allocated() < RAM {
        assert!(begun.elapsed() < PATIENCE);
        thread::sleep(Duration::from_millis(10));
    }
    assert!(!tool.ends_within(Duration::from_millis(300)), "it waits for the receiver");
    assert!(running.passed.memory() == running.stored, "memory differs");
    drop(running.faults);
    // Two pages were asked for. Cloud Hypervisor asks for all: so its VM has ended.
    let ended = tool.end().failed(6, "which was written: 16382 pages not asked for");
    assert!(ended.stderr.contains("the VM may have ended; look there"), "{ended:?}");
    assert!(running.passed.memory() == running.stored, "a VM that lives, after all, keeps its memory");
}

#[test]
fn what_is_no_page_of_the_vm_gets_an_error_and_takes_the_memory_away() {
    for (gpa, length) in [
        (RAM, PAGE),
        (RAM - PAGE, 2 * PAGE),
        (0, 0),
        (0, 3 * PAGE),
        (100, PAGE),
        (0, 512),
        (u64::MAX - 4095, PAGE),
        (0, 1 << 63),
    ] {
        let place = Place::new();
        let (tool, _line, mut running, _) = run_one(&place, &[]);
        assert_eq!(running.faults.ask(gpa, length), Some(ERROR), "{gpa:#x} {length:#x}");
        let error = running.passed.read(0, &mut [0; 4096]).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::UnexpectedEof);
        tool.end().failed(3, &format!("asked for {length:#x} bytes at GPA {gpa:#x}"));
    }
}

#[test]
fn anything_else_than_a_request_for_a_page_is_refused() {
    for (bytes, what) in [
        (message(MEMORY, &[0; 16]), "Memory with 16 bytes"),
        (message(PAGE_FAULT, &[0; 32]), "PageFault with 32 bytes"),
        (message(PAGE_FAULT, &[]), "PageFault with 0 bytes"),
        (message(77, &[0; 16]), "unknown command 77"),
    ] {
        let place = Place::new();
        let (tool, _line, mut running, _) = run_one(&place, &[]);
        running.faults.0.write_all(&bytes).unwrap();
        let mut answer = [0; 16];
        running.faults.0.read_exact(&mut answer).unwrap();
        assert_eq!(answer[0], 2);
        tool.end().failed(3, what);
    }
}

/// Restores a VM one of whose blocks is spoilt by `spoil` once it runs; asks for it until that fails.
fn spoilt(spoil: impl Fn(&Path), code: i32, named: &str) {
    let place = Place::new();
    // So much is not written ahead that soon.
    let from = place.stored_large("from", 8);
    let (vmm, tool) = begin(&place, &[&from], &["--on-demand"]);
    let (mut line, mut faults) = take_state(&vmm);
    line.answer(OK);
    assert_eq!(faults.ask(0, PAGE), Some(OK));
    spoil(&from.join(MEMORY_FILE));
    assert_eq!(line.next(), Some(COMPLETE));
    line.answer(OK);
    // The last MiB with data; the last GiB is above 4 GiB.
    let last = (5113 << 20) - PAGE;
    assert_eq!(faults.ask(last, PAGE), Some(ERROR));
    let ends = line.passed.files.values().map(|file| file.metadata().unwrap().len());
    assert!(ends.into_iter().all(|length| length == 0), "memory was left to the receiver");
    let ended = tool.end().failed(code, named);
    assert!(ended.stderr.contains(MEMORY_FILE), "{ended:?}");
}

#[test]
fn a_block_that_is_altered_while_faults_are_served_never_reaches_the_guest() {
    spoilt(|memory| flip(memory, (4089 << 20) - 100), 5, "Memory at GPA 0x13f8fc000..0x13f900000");
}

#[test]
fn a_file_that_is_cut_off_while_faults_are_served_is_named() {
    let cut = |memory: &Path| OpenOptions::new().write(true).open(memory).unwrap().set_len(3 << 30).unwrap();
    spoilt(cut, 4, "cut off");
}

#[test]
fn damage_that_is_found_before_the_vm_is_handed_over_abandons_it() {
    let place = Place::new();
    let from = place.stored("from", 1);
    flip(&from.join(MEMORY_FILE), 0x50_1234);
    let (vmm, tool) = begin(&place, &[&from], &["--on-demand"]);
    let (mut line, mut faults) = take_state(&vmm);
    assert_eq!(faults.ask(0x50_1000, PAGE), Some(ERROR));
    line.answer(ERROR);
    assert_eq!(line.next(), Some(ABANDON));
    tool.end().failed(5, "Memory at GPA 0x500000..0x504000");
}

#[test]
fn a_receiver_without_postcopy_is_abandoned_and_the_option_named() {
    let place = Place::new();
    let from = place.stored("from", 1);
    let (vmm, tool) = begin(&place, &[&from], &["--on-demand"]);
    let (mut line, faults) = take_state(&vmm);
    // It drops the connection just before it answers State with Ok.
    drop(faults);
    line.answer(OK);
    assert_eq!(line.next(), Some(ABANDON));
    tool.end().failed(2, "memory_mode=postcopy");
}

#[test]
fn a_receiver_that_goes_away_before_it_has_all_memory_is_told_from_one_that_has() {
    let place = Place::new();
    let from = place.stored_large("from", 8);
    let (vmm, tool) = begin(&place, &[&from], &["--on-demand"]);
    let (mut line, mut faults) = take_state(&vmm);
    line.answer(OK);
    assert_eq!(faults.ask(0, PAGE), Some(OK));
    assert_eq!(line.next(), Some(COMPLETE));
    line.answer(OK);
    drop(faults);
    tool.end().failed(3, "ended before it had all memory");
}

#[test]
fn a_vm_with_what_cannot_wait_for_a_page_is_refused_with_the_reason() {
    let devices = [
        (
            json!({ "devices": [{ "id": "net0", "path": "/sys/bus/pci/devices/0000:01:00.0" }] }),
            "pass-through device net0",
        ),
        (json!({ "user_devices": [{ "id": "nvme0", "socket": "/run/nvme" }] }), "pass-through device nvme0"),
        (
            json!({ "vdpa": [{ "path": "/dev/vhost-vdpa-0", "num_queues": 1 }] }),
            "vDPA device /dev/vhost-vdpa-0",
        ),
        (json!({ "fs": [{ "id": "fs0", "socket": "/run/fs", "tag": "t" }] }), "vhost-user back end fs0"),
    ];
    for (devices, named) in devices {
        let place = Place::new();
        let from = place.stored("from", 1);
        let mut config: Value = serde_json::from_slice(&fs::read(from.join(CONFIG_FILE)).unwrap()).unwrap();
        for (name, list) in devices.as_object().unwrap() {
            config[name] = list.clone();
        }
        fs::write(place.path("config"), config.to_string()).unwrap();
        let words = ["send", "unix:/nowhere", "--local", "--on-demand", "--from", text(&from)];
        let ended = crate::tool::run([&words[..], &["--config", text(&place.path("config"))]].concat());
        ended.failed(2, named);
    }
    let place = Place::new();
    let from = place.stored("from", 1);
    crate::tool::run(["send", "unix:/nowhere", "--on-demand", "--from", text(&from)]).failed(2, "--local");
}

#[test]
fn prefault_is_cleared_and_said() {
    let place = Place::new();
    let from = place.stored("from", 1);
    let mut config: Value = serde_json::from_slice(&fs::read(from.join(CONFIG_FILE)).unwrap()).unwrap();
    config["memory"]["prefault"] = json!(true);
    fs::write(place.path("config"), config.to_string()).unwrap();
    let edited = place.path("config");
    let (tool, _line, mut running) = run(&place, &[&from], &from, &["--config", text(&edited)]);
    assert_eq!(running.passed.config["vm_config"]["memory"]["prefault"], false);
    running.touch_all();
    drop(running);
    let ended = tool.end().succeeded();
    assert!(ended.stderr.contains("prefault"), "{ended:?}");
}

#[test]
fn a_signal_waits_for_the_last_page_and_says_so_and_a_second_one_ends_the_vm() {
    let place = Place::new();
    let (mut tool, _line, mut running, _) = run_one(&place, &[]);
    tool.signal("-TERM");
    assert!(!tool.ends_within(Duration::from_millis(500)));
    running.touch_all();
    drop(running);
    let ended = tool.end().succeeded();
    assert!(ended.stderr.contains("ends with the last page"), "{ended:?}");

    let place = Place::new();
    let (mut tool, _line, mut running, _) = run_one(&place, &[]);
    tool.signal("-TERM");
    assert!(!tool.ends_within(Duration::from_millis(500)));
    running.touch(0x100_0000);
    // Signals in quick succession count as one, and a busy host takes them late.
    signal_until_closed(&mut running.faults, &tool);
    assert!(running.passed.read(0, &mut [0; 4096]).is_err(), "memory was left to the receiver");
    tool.end().failed(130, "given up");
}

#[test]
fn a_signal_before_the_vm_is_handed_over_abandons_it() {
    // Whoever runs the tests may ignore SIGHUP, as `nohup` does.
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let ignored = status.lines().find_map(|line| line.strip_prefix("SigIgn:")).unwrap();
    let ignored = u64::from_str_radix(ignored.trim(), 16).unwrap();
    for (signal, number) in [("-TERM", 15), ("-INT", 2), ("-HUP", 1), ("-QUIT", 3)] {
        if ignored >> (number - 1) & 1 == 1 {
            continue;
        }
        let place = Place::new();
        let from = place.stored("from", 1);
        let (vmm, tool) = begin(&place, &[&from], &["--on-demand"]);
        let (mut line, mut faults) = take_state(&vmm);
        assert_eq!(faults.ask(0, PAGE), Some(OK));
        tool.signal(signal);
        assert_eq!(line.next(), Some(ABANDON), "{signal}");
        tool.end().failed(130, "Giving up");
    }
}

/// A VMM that asks for pages until it is killed.
fn ask_until(vmm: &Vmm, killed: Instant) {
    let mut line = vmm.accept();
    let mut faults = None;
    let mut page = 0;
    while Instant::now() < killed {
        let mut byte = [0; 1];
        let looked = recv(&line.stream, &mut byte[..], RecvFlags::PEEK | RecvFlags::DONTWAIT);
        match looked.map(|(_, bytes)| bytes) {
            Ok(0) => break,
            Ok(_) => {
                let Some(command) = line.next() else { break };
                line.answer(OK);
                if command == CONFIG {
                    faults = Some(Faults::accept(vmm));
                }
            }
            Err(_) => {}
        }
        if let Some(faults) = faults.as_mut().filter(|_| line.passed.commands.contains(&STATE)) {
            let gpa = page * 31 % (RAM / PAGE) * PAGE;
            if faults.ask(gpa, PAGE) != Some(OK) {
                break;
            }
            page += 1;
        }
    }
}

/// How long a VMM takes that asks for a few thousand pages.
const LIFE: Duration = Duration::from_millis(400);

#[test]
fn a_receiver_that_is_killed_at_any_moment_ends_the_sender_with_an_error_or_all_pages() {
    let place = Place::new();
    let from = place.stored("from", 1);
    let mut seen = std::collections::BTreeSet::new();
    // Later ones where this host is so slow that all were killed at the same step.
    let lives = (0..30).map(|_| LIFE.mul_f64(random())).chain((1..=8).map(|life| LIFE * life));
    for (number, life) in lives.enumerate() {
        if number >= 30 && seen.len() > 1 {
            break;
        }
        let (vmm, tool) = begin(&place, &[&from], &["--on-demand"]);
        ask_until(&vmm, Instant::now() + life);
        let Ended { code, stderr, .. } = tool.end();
        assert!(matches!(code, Some(0 | 2 | 3 | 6)), "{code:?} {stderr}");
        seen.insert(code);
    }
    assert!(seen.len() > 1, "{seen:?}");
}

#[test]
fn a_sender_that_is_killed_at_any_moment_gave_no_page_that_is_wrong_and_leaves_nobody_waiting() {
    let place = Place::new();
    let from = place.stored("from", 1);
    let stored = memory_of(&from);
    for _ in 0..30 {
        let (vmm, mut tool) = begin(&place, &[&from], &["--on-demand"]);
        let (mut line, mut faults) = take_state(&vmm);
        let passed = std::mem::take(&mut line.passed);
        let moment = Instant::now() + LIFE.mul_f64(random());
        let (mut page, mut is_answered) = (0, false);
        thread::scope(|scope| {
            scope.spawn(|| {
                thread::sleep(moment.saturating_duration_since(Instant::now()));
                tool.kill();
            });
            loop {
                let gpa = page * 31 % (RAM / PAGE) * PAGE;
                if faults.ask(gpa, PAGE) != Some(OK) {
                    break;
                }
                let (mut bytes, at) = ([0; 4096], usize::try_from(gpa).unwrap());
                passed.read(gpa, &mut bytes).unwrap();
                assert!(bytes == stored[at..at + 4096], "page at {gpa:#x} is wrong");
                if !is_answered {
                    is_answered = true;
                    line.answer(OK);
                }
                page += 1;
            }
        });
        assert_ne!(tool.end().code, Some(0));
    }
}
