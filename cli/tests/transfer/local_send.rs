// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! `send --local`: memory goes to a VMM as descriptors.

use std::fs::{self, OpenOptions, Permissions};
use std::io::Write;
use std::net::Shutdown;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use serde_json::Value;
use vfio_migration::snapshot::{CONFIG_FILE, MEMORY_FILE, STATE_FILE};

use crate::frames::{COMPLETE, COMPLETE_PAUSED, CONFIG, ERROR, MEMORY_FD, OK, START, STATE, request};
use crate::kills::random;
use crate::stored::Place;
use crate::tool::{Ended, Tool, run};
use crate::vmm::{Line, Passed, Vmm};

pub(crate) fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// Starts `send --local` of `from` to a VMM in `place`, with more `options`.
pub(crate) fn begin(place: &Place, from: &[&Path], options: &[&str]) -> (Vmm, Tool) {
    begin_by(&mut Command::new(env!("CARGO_BIN_EXE_vfio-migrate")), place, from, options)
}

/// As [`begin`], with `tool` as what starts the tool. Anybody may connect to the VMM.
pub(crate) fn begin_by(tool: &mut Command, place: &Place, from: &[&Path], options: &[&str]) -> (Vmm, Tool) {
    let socket = place.path("socket");
    let _ = fs::remove_file(&socket);
    let vmm = Vmm::bind(&socket);
    fs::set_permissions(&socket, Permissions::from_mode(0o666)).unwrap();
    let url = format!("unix:{}", socket.display());
    let mut words = vec!["send", &url, "--local", "--json"];
    words.extend(from.iter().flat_map(|dir| ["--from", text(dir)]));
    words.extend(options);
    (vmm, Tool::spawn(tool.args(words)))
}

/// Sends `from` to a VMM that answers everything with Ok.
fn send(place: &Place, from: &[&Path], options: &[&str]) -> (Ended, Passed) {
    let (vmm, tool) = begin(place, from, options);
    let mut line = vmm.accept();
    while line.next().is_some() {
        line.answer(OK);
    }
    (tool.end(), line.passed)
}

pub(crate) fn memory_of(snapshot: &Path) -> Vec<u8> {
    fs::read(snapshot.join(MEMORY_FILE)).unwrap()
}

/// Flips a bit of a byte of a file.
pub(crate) fn flip(file: &Path, offset: u64) {
    let file = OpenOptions::new().read(true).write(true).open(file).unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, offset).unwrap();
    file.write_all_at(&[byte[0] ^ 0x10], offset).unwrap();
}

/// A full snapshot and so many differentials on top, each of another VM; and what the last one of them amounts to.
pub(crate) fn chain(place: &Place, length: u64) -> (Vec<PathBuf>, PathBuf) {
    let mut chain = vec![place.stored("full", 1)];
    for number in 1..=length {
        let (vm, dir) = (place.path(&format!("vm-{number}")), place.path(&format!("differential-{number}")));
        // Each has other bytes in some MiB, and in one of them zeros.
        let last = if number == 1 { chain[0].clone() } else { place.path(&format!("vm-{}", number - 1)) };
        copy_snapshot(&last, &vm);
        change(&vm, number);
        let mut words = vec!["snapshot", "create", "--from", text(&vm), "--into", text(&dir)];
        words.extend(chain.iter().flat_map(|base| ["--base", text(base)]));
        run(words).succeeded();
        chain.push(dir);
    }
    (chain, place.path(&format!("vm-{length}")))
}

fn copy_snapshot(from: &Path, to: &Path) {
    fs::create_dir(to).unwrap();
    for file in [CONFIG_FILE, STATE_FILE, MEMORY_FILE] {
        fs::copy(from.join(file), to.join(file)).unwrap();
    }
}

fn change(vm: &Path, number: u64) {
    let memory = OpenOptions::new().write(true).open(vm.join(MEMORY_FILE)).unwrap();
    for at in 0..40 {
        let page = (number * 7919 + at * at * 131) % (64 << 8);
        memory.write_all_at(&[u8::try_from(number).unwrap(); 4096], page << 12).unwrap();
    }
    // A whole MiB that was data in the full one.
    memory.write_all_at(&vec![0; 1 << 20], (number * 5 % 60) << 20).unwrap();
    memory.write_all_at(&[77; 100], (number * 5 % 60) << 20).unwrap();
}

#[test]
fn a_vmm_gets_every_slot_its_config_and_its_state_in_that_order() {
    let place = Place::new();
    let from = place.stored("from", 1);
    for (options, last) in [(&[][..], COMPLETE), (&["--paused"], COMPLETE_PAUSED)] {
        let (ended, passed) = send(&place, &[&from], options);
        let event = ended.succeeded().last();
        let fds = passed.slots().len();
        let expected = [&[START][..], &vec![MEMORY_FD; fds], &[CONFIG, STATE, last]].concat();
        assert_eq!(passed.commands, expected);
        assert_eq!(passed.files.len(), fds);
        assert_eq!(passed.state, fs::read(from.join(STATE_FILE)).unwrap());
        let config: Value = serde_json::from_slice(&fs::read(from.join(CONFIG_FILE)).unwrap()).unwrap();
        assert_eq!(passed.config["vm_config"], config);
        assert!(passed.memory() == memory_of(&from), "memory differs");
        assert_eq!(event["event"], "passed");
        assert_eq!(event["ram_bytes"], 64 << 20);
        assert_eq!(event["filled_bytes"], passed.allocated());
    }
}

#[test]
fn several_slots_come_each_in_a_file_that_is_long_enough_and_holes_stay() {
    let place = Place::new();
    let from = place.stored_large("from", 64);
    let (ended, passed) = send(&place, &[&from], &[]);
    ended.succeeded();
    let slots = passed.slots();
    assert_eq!(slots.len(), 2);
    for slot in slots {
        assert!(passed.files[&slot.number].metadata().unwrap().len() >= slot.offset + slot.size);
    }
    let stored = fs::metadata(from.join(MEMORY_FILE)).unwrap().blocks() * 512;
    // A block of a page and zeros is 16 KiB on disk.
    assert!((1..=stored).contains(&passed.allocated()), "{} of {stored}", passed.allocated());
    let memory = std::fs::File::open(from.join(MEMORY_FILE)).unwrap();
    for number in (0..4096u64).filter(|number| number.is_multiple_of(64) || number.is_multiple_of(7)) {
        let gpa = if number < 3072 { number << 20 } else { (number + 1024) << 20 };
        let (mut sent, mut stored) = (vec![0; 1 << 20], vec![0; 1 << 20]);
        passed.read(gpa, &mut sent).unwrap();
        memory.read_exact_at(&mut stored, number << 20).unwrap();
        assert!(sent == stored, "MiB {number} differs");
    }
}

#[test]
fn a_chain_is_sent_as_its_differentials_make_it() {
    let place = Place::new();
    let (chain, last) = chain(&place, 10);
    let whole = place.path("whole");
    let mut words = vec!["snapshot", "apply"];
    words.extend(chain.iter().map(|dir| text(dir)));
    run([&words[..], &["--into", text(&whole)]].concat()).succeeded();
    let from: Vec<_> = chain.iter().map(PathBuf::as_path).collect();
    let (ended, of_chain) = send(&place, &from, &[]);
    ended.succeeded();
    let (ended, of_whole) = send(&place, &[&whole], &[]);
    ended.succeeded();
    assert!(of_chain.memory() == of_whole.memory(), "differs from the one that was applied");
    assert!(of_chain.memory() == memory_of(&last), "differs from the VM");
    assert_eq!(of_chain.allocated(), of_whole.allocated());
    assert_eq!((of_chain.config, of_chain.state), (of_whole.config, of_whole.state));
}

#[test]
fn a_chain_that_does_not_fit_or_goes_as_bytes_is_refused() {
    let place = Place::new();
    let (chain, _) = chain(&place, 2);
    let url = format!("unix:{}", place.path("socket").display());
    let words = ["send", &url, "--local", "--from", text(&chain[0]), "--from", text(&chain[2])];
    run(words).failed(2, "differential-2");
    let words = ["send", &url, "--from", text(&chain[0]), "--from", text(&chain[1])];
    run(words).failed(2, "--local");
    run(["send", "tcp:127.0.0.1:1", "--local", "--from", text(&chain[0])]).failed(2, "UNIX socket");
}

#[test]
fn another_configuration_goes_in_place_of_the_snapshots() {
    let place = Place::new();
    let from = place.stored("from", 1);
    let mut config: Value = serde_json::from_slice(&fs::read(from.join(CONFIG_FILE)).unwrap()).unwrap();
    config["rng"] = serde_json::json!({ "src": "/dev/random" });
    fs::write(place.path("edited"), config.to_string()).unwrap();
    let (ended, passed) = send(&place, &[&from], &["--config", text(&place.path("edited"))]);
    ended.succeeded();
    assert_eq!(passed.config["vm_config"], config);
}

#[test]
fn a_damaged_block_is_named_and_the_vmm_gets_no_vm() {
    let place = Place::new();
    let (chain, _) = chain(&place, 2);
    for (dir, file, offset) in [
        (&chain[0], MEMORY_FILE, 0x0f0_1234),
        // A hole of the file.
        (&chain[0], MEMORY_FILE, 0x030_0000),
        (&chain[2], "memory-changes", 5000),
    ] {
        flip(&dir.join(file), offset);
        let from: Vec<_> = chain.iter().map(PathBuf::as_path).collect();
        let (ended, passed) = send(&place, &from, &[]);
        let ended = ended.failed(5, "was altered");
        assert!(ended.stderr.contains(text(&dir.join(file))), "{ended:?}");
        assert!(!passed.commands.contains(&START), "{:?}", passed.commands);
        flip(&dir.join(file), offset);
    }
    let file = OpenOptions::new().write(true).open(chain[0].join(MEMORY_FILE)).unwrap();
    file.set_len(1 << 20).unwrap();
    run(["send", "unix:/nowhere", "--local", "--from", text(&chain[0])]).failed(5, MEMORY_FILE);
}

/// Answers with Ok until `command` has come, then does `what`.
fn meet(options: &[&str], command: u16, what: impl FnOnce(&mut Line)) -> Ended {
    let place = Place::new();
    let from = place.stored("from", 1);
    let (vmm, tool) = begin(&place, &[&from], options);
    let mut line = vmm.accept();
    assert!(line.answer_until(command));
    what(&mut line);
    drop(line);
    tool.end()
}

#[test]
fn a_vmm_that_refuses_or_goes_away_is_named_with_what_it_was_asked() {
    for (command, name) in [(START, "Start"), (MEMORY_FD, "MemoryFd"), (CONFIG, "Config"), (STATE, "State")] {
        let refused = |line: &mut Line| line.answer(ERROR);
        meet(&[], command, refused).failed(3, &format!("Receiver refused {name}"));
        meet(&[], command, |_| {}).failed(3, &format!("instead of answering {name}"));
    }
    meet(&[], COMPLETE, |line| line.answer(ERROR)).failed(3, "Receiver refused Complete");
    meet(&[], COMPLETE, |_| {}).failed(6, "Outcome unknown");
    let nonsense = |line: &mut Line| line.stream.write_all(b"HTTP/1.1 400 Bad Request").unwrap();
    meet(&[], CONFIG, nonsense).failed(3, "answer to Config");
    let payload = |line: &mut Line| line.stream.write_all(&request(OK, 5)).unwrap();
    meet(&[], CONFIG, payload).failed(3, "answered Config with 5 bytes");
    let silent = |line: &mut Line| {
        let begun = Instant::now();
        assert_eq!(line.next(), None);
        assert!(begun.elapsed() < Duration::from_secs(20));
    };
    meet(&["--idle-timeout", "1"], CONFIG, silent).failed(3, "--idle-timeout sets the limit");
}

#[test]
fn a_sender_that_is_told_to_stop_drops_the_vm() {
    let place = Place::new();
    let from = place.stored("from", 1);
    let (vmm, tool) = begin(&place, &[&from], &[]);
    let mut line = vmm.accept();
    assert!(line.answer_until(STATE));
    tool.signal("-TERM");
    assert_eq!(line.next(), None, "no Complete comes");
    tool.end().failed(130, "Giving up");
}

#[test]
fn a_sender_that_is_told_to_stop_too_late_waits_for_the_answer() {
    let place = Place::new();
    let from = place.stored("from", 1);
    let (vmm, tool) = begin(&place, &[&from], &[]);
    let mut line = vmm.accept();
    assert!(line.answer_until(COMPLETE));
    tool.signal("-TERM");
    thread::sleep(Duration::from_millis(500));
    line.answer(OK);
    drop(line);
    let ended = tool.end().succeeded();
    assert!(ended.stderr.contains("Too late to give up"), "{ended:?}");
}

#[test]
fn a_sender_that_is_killed_at_any_moment_gave_all_memory_or_the_vmm_has_no_vm() {
    let place = Place::new();
    let from = place.stored("from", 1);
    let memory = memory_of(&from);
    let begun = Instant::now();
    let (vmm, tool) = begin(&place, &[&from], &[]);
    let mut line = vmm.accept();
    assert!(line.answer_until(COMPLETE));
    let undisturbed = begun.elapsed();
    line.answer(OK);
    tool.end().succeeded();
    let killed = || {
        let (vmm, mut tool) = begin(&place, &[&from], &[]);
        // It may be killed before it connects.
        vmm.listener.set_nonblocking(true).unwrap();
        let moment = Instant::now() + undisturbed.mul_f64(1.8 * random());
        let mut line = None;
        while line.is_none() && Instant::now() < moment {
            line = vmm.listener.accept().ok().map(|(stream, _)| Line::of(stream));
        }
        let taking = line.map(|mut line| {
            thread::spawn(move || {
                while line.next().is_some() {
                    line.answer(OK);
                }
                line.passed
            })
        });
        thread::sleep(moment.saturating_duration_since(Instant::now()));
        tool.kill();
        let has_ended = tool.end().code == Some(0);
        let passed = taking.map(|taking| taking.join().unwrap()).unwrap_or_default();
        let has_vm = passed.commands.contains(&COMPLETE);
        assert!(has_vm || !has_ended, "it said that the VM was handed over");
        assert!(!has_vm || passed.memory() == memory, "memory is missing");
        has_vm
    };
    let with_vm = (0..30).filter(|_| killed()).count();
    eprintln!("{with_vm} of 30 killed senders had handed the VM over, which takes {undisturbed:?}");
}

#[test]
fn a_vmm_that_is_killed_at_any_moment_ends_the_sender_with_what_is_known() {
    let place = Place::new();
    // No time goes to memory: the moments are those of what is said.
    let from = place.stored_holes("from", 8 << 20);
    let (vmm, tool) = begin(&place, &[&from], &[]);
    let mut line = vmm.accept();
    let begun = Instant::now();
    assert!(line.answer_until(COMPLETE));
    let undisturbed = begun.elapsed();
    line.answer(OK);
    drop(line);
    tool.end().succeeded();
    let mut seen = std::collections::BTreeSet::new();
    for number in 0..60 {
        // More where this host is so slow that all were killed at the same step.
        if number >= 30 && seen.len() > 2 {
            break;
        }
        let (vmm, tool) = begin(&place, &[&from], &[]);
        let mut line = vmm.accept();
        let killed = line.stream.try_clone().unwrap();
        let passed = thread::scope(|scope| {
            scope.spawn(move || {
                thread::sleep(undisturbed.mul_f64(1.5 * random()));
                let _ = killed.shutdown(Shutdown::Both);
            });
            while line.next().is_some() {
                line.answer(OK);
            }
            line.passed
        });
        let Ended { code, stderr, .. } = tool.end();
        // 6: the VMM may run it, and did not say so.
        let is_known = match passed.commands.last() {
            Some(&COMPLETE) => matches!(code, Some(0 | 6)),
            // What is on its way may be lost, with Complete in it.
            _ => matches!(code, Some(3 | 6)),
        };
        assert!(is_known, "{code:?} {:?} {stderr}", passed.commands);
        seen.insert(passed.commands.len());
    }
    assert!(seen.len() > 1, "{seen:?}");
}
