// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What becomes of the VM and its disks: checkpoints, commands while it is paused, VMs that are refused.

use std::fs;
use std::time::{Duration, Instant};

use crate::raw::{COMPLETE, ERROR, NO_DISKS, OK, Target, message, migration, precopy, state};
use crate::stored::{Place, assert_same, assert_sound};
use crate::tool::{Tool, is_empty};

const WRITABLE: &str = r#"{"memory":{"size":1048576},"disks":[{"path":"root.raw","readonly":false}]}"#;
const READ_ONLY: &str = r#"{"memory":{"size":1048576},"disks":[{"path":"root.raw","readonly":true}]}"#;
const VDPA: &str = r#"{"memory":{"size":1048576},"vdpa":[{"path":"vdpa-0"}]}"#;

#[test]
fn a_checkpoint_is_kept_and_its_source_told_that_it_failed() {
    let place = Place::new();
    let (from, into) = (place.stored("from", 1), place.path("into"));
    let (receiver, url) = Tool::receive("tcp:127.0.0.1:0", &into, &["--checkpoint"]);
    Tool::send(&url, &from, &["--connections", "4"]).end().failed(3, "Cannot hand VM over");
    let kept = receiver.end().succeeded().last();
    assert_eq!(kept["event"], "kept");
    assert_eq!(kept["checkpoint"], true);
    assert_same(&from, &into);
}

#[test]
fn a_checkpoint_is_on_disk_before_its_source_hears_of_it() {
    let target = Target::new(&["--checkpoint"]);
    let into = target.kept();
    let (_source, last) = target.tell(&migration(NO_DISKS));
    assert_eq!(last, Some(ERROR));
    assert_sound(&into);
    target.end().0.succeeded();
}

#[test]
fn nothing_is_there_before_complete() {
    let target = Target::new(&[]);
    let (mut source, last) = target.tell(&[precopy(NO_DISKS), vec![state()]].concat());
    assert_eq!(last, Some(OK));
    assert!(!target.kept().exists());
    assert_eq!(source.ask(&message(COMPLETE, b"")), Some(OK));
    assert_sound(&target.kept());
    target.end().0.succeeded();
}

#[test]
fn what_the_operator_has_to_know_is_said() {
    for (options, said) in [
        (&["--checkpoint"][..], "told that the migration failed: so its VM runs on"),
        (&[], "lets go of its disk locks"),
    ] {
        let place = Place::new();
        let into = place.path("into");
        let socket = place.path("socket");
        let url = format!("unix:{}", socket.display());
        let receiver = Tool::start([&["receive", &url, "--into", into.to_str().unwrap()], options].concat());
        while !socket.exists() {
            std::thread::sleep(Duration::from_millis(5));
        }
        receiver.signal("-TERM");
        let ended = receiver.end().failed(130, said);
        assert!(ended.stderr.contains("ch-remote --api-socket SOCKET send-migration destination_url=unix:"));
        assert!(ended.stderr.contains("disk locks"), "{ended:?}");
    }
}

#[test]
fn a_vm_with_writable_disks_is_refused_unless_they_are_seen_to() {
    let target = Target::new(&[]);
    assert_eq!(target.tell(&migration(WRITABLE)).1, Some(ERROR));
    target.refuses("VM writes to root.raw");
    for (options, config) in
        [(&["--memory-only"][..], WRITABLE), (&["--on-paused", "true"], WRITABLE), (&[], READ_ONLY)]
    {
        let target = Target::new(options);
        assert_eq!(target.tell(&migration(config)).1, Some(OK), "{options:?}");
        target.end().0.succeeded();
    }
}

#[test]
fn a_vm_with_vdpa_is_refused_whatever_is_asked() {
    let target = Target::new(&["--memory-only", "--checkpoint"]);
    assert_eq!(target.tell(&migration(VDPA)).1, Some(ERROR));
    target.refuses("vDPA devices vdpa-0");
}

#[test]
fn the_command_runs_between_state_and_its_answer() {
    let notes = Place::new();
    let note = notes.path("note");
    let command = format!("echo to-stdout; echo \"$VFIO_MIGRATE_INTO\" > '{}'", note.display());
    let target = Target::new(&["--on-paused", &command]);
    let into = target.kept();
    let (mut source, last) = target.tell(&precopy(WRITABLE));
    assert_eq!(last, Some(OK));
    assert!(!note.exists());
    assert_eq!(source.ask(&state()), Some(OK));
    assert_eq!(fs::read_to_string(&note).unwrap().trim(), into.to_str().unwrap());
    assert_eq!(source.ask(&message(COMPLETE, b"")), Some(OK));
    let ended = target.end().0.succeeded();
    assert_eq!(ended.last()["event"], "kept");
    assert!(ended.stderr.contains("to-stdout"));
}

#[test]
fn a_command_that_fails_keeps_nothing() {
    let target = Target::new(&["--on-paused", "exit 3"]);
    assert_eq!(target.tell(&migration(WRITABLE)).1, Some(ERROR));
    let (ended, place) = target.end();
    ended.failed(4, "exit status: 3");
    assert!(is_empty(place.root()));
}

#[test]
fn a_signal_ends_the_command_too() {
    let notes = Place::new();
    let begun = notes.path("begun");
    let command = format!("touch '{}'; sleep 60", begun.display());
    let place = Place::new();
    let out = Place::new();
    let (receiver, url) = Tool::receive("tcp:127.0.0.1:0", &out.path("into"), &["--on-paused", &command]);
    let source = Tool::send(&url, &place.stored("from", 1), &[]);
    while !begun.exists() {
        std::thread::sleep(Duration::from_millis(5));
    }
    let asked = Instant::now();
    receiver.signal("-TERM");
    receiver.end().failed(130, "stopped here");
    assert!(asked.elapsed() < Duration::from_secs(10));
    source.end().failed(3, "");
    assert!(is_empty(out.root()));
}
