// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What becomes of the VM and its disks: checkpoints, commands while it is paused, VMs that are refused.

use std::fs::{self, Permissions};
use std::net::{TcpListener, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use serde_json::Value;
use vfio_migration_integration::skip;

use crate::frames::{COMPLETE, ERROR, OK, message};
use crate::raw::{NO_DISKS, Target, migration, precopy, state};
use crate::stored::{Place, assert_same, assert_sound};
use crate::tool::{Ended, Tool, is_empty};

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
    let cases = [
        (
            true,
            &["--checkpoint"][..],
            ",local=on,preserve_source=on\n",
            "With preserve_source=on a Cloud Hypervisor source keeps its disk locks",
        ),
        (
            true,
            &[],
            ",local=on\n",
            "With local=on,preserve_source=on it keeps them, and its VM stands paused in the end",
        ),
        (
            false,
            &["--checkpoint"],
            "\n",
            "source has let go of its disk locks by then and does not take them again",
        ),
        (false, &[], "\n", "lets go of its disk locks before that"),
    ];
    for (is_local, options, sent, said) in cases {
        let place = Place::new();
        let into = place.path("into");
        let socket = place.path("socket");
        let free = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let url = if is_local { format!("unix:{}", socket.display()) } else { format!("tcp:{free}") };
        let words = ["receive", &url, "--into", into.to_str().unwrap()];
        let receiver = Tool::start([&words[..], options].concat());
        while !(socket.exists() || TcpStream::connect(free).is_ok()) {
            std::thread::sleep(Duration::from_millis(5));
        }
        receiver.signal("-TERM");
        let ended = receiver.end().failed(130, said);
        assert!(ended.stderr.contains("ch-remote --api-socket SOCKET send-migration destination_url="));
        assert!(ended.stderr.contains(sent) && ended.stderr.contains("disk locks"), "{ended:?}");
        // One that only tried the port says nothing.
        assert!(ended.stderr.contains("Giving up; no source has come"), "{ended:?}");
    }
}

#[test]
fn a_vm_with_writable_disks_is_refused_unless_they_are_seen_to() {
    let target = Target::new(&[]);
    assert_eq!(target.tell(&migration(WRITABLE)).1, Some(ERROR));
    target.refuses("--memory-only leaves them as they are");
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

/// A command that shows that it runs, in a file, and is deaf to SIGTERM.
struct Beating {
    place: Place,
    command: String,
}

impl Beating {
    fn new() -> Self {
        let place = Place::new();
        let beats = place.path("beats");
        let command = format!("trap '' TERM; while :; do echo >> '{}'; sleep 0.05; done", beats.display());
        Self { place, command }
    }

    fn beats(&self) -> u64 {
        fs::metadata(self.place.path("beats")).map_or(0, |metadata| metadata.len())
    }

    fn await_first(&self) {
        while self.beats() == 0 {
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Checks that it ends within `within`.
    #[track_caller]
    fn ends(&self, within: Duration) {
        let begun = Instant::now();
        loop {
            let before = self.beats();
            std::thread::sleep(Duration::from_millis(300));
            if self.beats() == before {
                return;
            }
            assert!(begun.elapsed() < within, "it still runs");
        }
    }
}

/// The event `name` that a command told.
#[track_caller]
fn event(ended: &Ended, name: &str) -> Value {
    ended.events().into_iter().find(|event| event["event"] == name).unwrap()
}

#[test]
fn a_command_that_hangs_is_ended_and_its_source_told() {
    let beating = Beating::new();
    let target = Target::new(&["--on-paused", &beating.command, "--on-paused-timeout", "1"]);
    let begun = Instant::now();
    assert_eq!(target.tell(&migration(WRITABLE)).1, Some(ERROR));
    assert!((1..6).contains(&begun.elapsed().as_secs()), "{:?}", begun.elapsed());
    let (ended, place) = target.end();
    let ended = ended.failed(4, "it took longer than the 1 s of --on-paused-timeout");
    assert!(ended.stderr.contains("while :; do"), "the command is named: {ended:?}");
    assert_eq!(event(&ended, "command-ended")["succeeded"], false);
    assert!(is_empty(place.root()));
    beating.ends(Duration::ZERO);
}

#[test]
fn a_command_that_is_ended_has_time_to_clean_up() {
    let notes = Place::new();
    let note = notes.path("note");
    let clean_up = format!("sleep 0.3; touch '{}'; exit 0", note.display());
    let command = format!("trap \"{clean_up}\" TERM; while :; do sleep 0.05; done");
    let target = Target::new(&["--on-paused", &command, "--on-paused-timeout", "1"]);
    assert_eq!(target.tell(&migration(WRITABLE)).1, Some(ERROR));
    target.end().0.failed(4, "--on-paused-timeout");
    assert!(note.exists());
}

#[test]
fn a_command_whose_source_goes_away_is_ended() {
    let beating = Beating::new();
    let target = Target::new(&["--on-paused", &beating.command]);
    let (mut source, _) = target.tell(&precopy(WRITABLE));
    // With bytes behind it that nobody has read.
    source.send(&[state(), message(COMPLETE, b"")].concat()).unwrap();
    beating.await_first();
    let begun = Instant::now();
    drop(source);
    target.refuses("was terminated: the source closed the connection meanwhile");
    assert!(begun.elapsed() < Duration::from_secs(5), "{:?}", begun.elapsed());
    beating.ends(Duration::ZERO);
}

#[test]
fn a_command_ends_with_the_tool_even_where_that_is_killed() {
    let beating = Beating::new();
    let place = Place::new();
    let on_paused = ["--on-paused", &beating.command];
    let (mut receiver, url) = Tool::receive("tcp:127.0.0.1:0", &place.path("into"), &on_paused);
    let source = Tool::send(&url, &place.stored("from", 1), &[]);
    beating.await_first();
    receiver.kill();
    beating.ends(Duration::from_secs(5));
    assert_eq!(receiver.end().code, None);
    source.end().failed(3, "");
}

#[test]
fn what_a_command_leaves_running_runs_on() {
    let notes = Place::new();
    let note = notes.path("note");
    let command = format!("(sleep 2; touch '{}') &", note.display());
    let target = Target::new(&["--on-paused", &command]);
    let begun = Instant::now();
    assert_eq!(target.tell(&migration(WRITABLE)).1, Some(OK));
    assert!(begun.elapsed() < Duration::from_secs(2), "it is not waited for");
    let (ended, _place) = target.end();
    ended.succeeded();
    while !note.exists() {
        assert!(begun.elapsed() < Duration::from_secs(20), "it was ended");
        std::thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn what_a_command_that_fails_leaves_running_is_ended() {
    let beating = Beating::new();
    let started = beating.place.path("beats");
    let command = format!(
        "({}) & while ! [ -s '{}' ]; do sleep 0.01; done; exit 3",
        beating.command,
        started.display()
    );
    let target = Target::new(&["--on-paused", &command]);
    assert_eq!(target.tell(&migration(WRITABLE)).1, Some(ERROR));
    target.end().0.failed(4, "exit status: 3");
    beating.ends(Duration::ZERO);
}

/// What runs a program as nobody, and what makes a program that nobody runs one of root, in `place`.
///
/// That takes root, and a file system that heeds set-user-ID bits.
fn as_nobody_and_back(place: &Place) -> Option<(Command, String)> {
    let tool = place.path("setpriv");
    let open = |path: &Path, mode| fs::set_permissions(path, Permissions::from_mode(mode)).unwrap();
    open(place.root(), 0o777);
    fs::copy("/usr/bin/setpriv", &tool).ok()?;
    open(&tool, 0o4755);
    let mut as_nobody = Command::new(&tool);
    as_nobody.args(["--reuid=65534", "--regid=65534", "--clear-groups"]);
    let back = format!("{} --reuid=0 --regid=0 --clear-groups", tool.display());
    let who = Command::new(as_nobody.get_program())
        .args(as_nobody.get_args())
        .args(["sh", "-c", &format!("id -ru; {back} id -ru")])
        .output();
    who.is_ok_and(|who| who.stdout == b"65534\n0\n").then_some((as_nobody, back))
}

#[test]
fn a_command_that_cannot_be_ended_holds_the_source_no_longer() {
    let (place, programs) = (Place::new(), Place::new());
    let Some((mut as_nobody, back)) = as_nobody_and_back(&programs) else {
        return skip("a command of another user takes root");
    };
    fs::set_permissions(place.root(), Permissions::from_mode(0o777)).unwrap();
    let command = format!("exec {back} sleep 10");
    let options = ["--on-paused", &command, "--on-paused-timeout", "1"];
    let tool = as_nobody.arg(env!("CARGO_BIN_EXE_vfio-migrate"));
    let target =
        Target::waiting(Tool::receive_by(tool, "tcp:127.0.0.1:0", &place.path("into"), &options), place);
    let begun = Instant::now();
    assert_eq!(target.tell(&migration(WRITABLE)).1, Some(ERROR));
    assert!((4..8).contains(&begun.elapsed().as_secs()), "{:?}", begun.elapsed());
    let (ended, place) = target.end();
    let ended = ended.failed(4, "it took longer than the 1 s of --on-paused-timeout");
    assert!(ended.stderr.contains("Cannot end"), "{ended:?}");
    assert!(is_empty(place.root()));
}

#[test]
fn the_command_and_its_time_are_told() {
    let target = Target::new(&["--on-paused", "sleep 0.2", "--on-paused-timeout", "7"]);
    assert_eq!(target.tell(&migration(WRITABLE)).1, Some(OK));
    let ended = target.end().0.succeeded();
    let started = event(&ended, "command-started");
    assert_eq!((&started["command"], &started["timeout_s"]), (&"sleep 0.2".into(), &7.into()));
    let over = event(&ended, "command-ended");
    assert_eq!((&over["command"], &over["succeeded"]), (&"sleep 0.2".into(), &true.into()));
    assert!(over["ran_ms"].as_u64().unwrap() >= 200, "{over}");

    let place = Place::new();
    let (into, socket) = (place.path("into"), place.path("socket"));
    let url = format!("unix:{}", socket.display());
    let receiver =
        Tool::start(["receive", &url, "--into", into.to_str().unwrap(), "--on-paused", "sleep 0.2"]);
    while !socket.exists() {
        std::thread::sleep(Duration::from_millis(5));
    }
    Tool::send(&url, &place.stored("from", 1), &[]).end().succeeded();
    let told = receiver.end().succeeded().stderr;
    assert!(
        told.contains("Running \"sleep 0.2\" for at most 60 s; the source's VM is paused meanwhile"),
        "{told}"
    );
    assert!(told.contains("\"sleep 0.2\" succeeded after 0."), "{told}");
}

#[test]
fn a_command_without_an_end_cannot_be_asked_for() {
    let receive = ["receive", "tcp:127.0.0.1:0", "--into", "into", "--on-paused", "true"];
    for bad in ["0", "none", "86401"] {
        Tool::start([&receive[..], &["--on-paused-timeout", bad]].concat())
            .end()
            .failed(2, "on-paused-timeout");
    }
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

#[test]
fn a_signal_that_comes_twice_at_once_asks_once() {
    for _ in 0..5 {
        let out = Place::new();
        let (receiver, _) = Tool::receive("tcp:127.0.0.1:0", &out.path("into"), &[]);
        receiver.signal("-TERM");
        receiver.signal("-TERM");
        receiver.end().failed(130, "stopped here");
        assert!(is_empty(out.root()));
    }
}

#[test]
fn a_second_signal_ends_the_tool_at_once_and_what_it_leaves_is_cleared_up() {
    let notes = Place::new();
    let begun = notes.path("begun");
    // Deaf to the first signal, which is passed on to it.
    let command = format!("trap '' TERM; touch '{}'; sleep 5; true", begun.display());
    let place = Place::new();
    let out = Place::new();
    let (from, into) = (place.stored("from", 1), out.path("into"));
    let (mut receiver, url) = Tool::receive("tcp:127.0.0.1:0", &into, &["--on-paused", &command]);
    let source = Tool::send(&url, &from, &[]);
    while !begun.exists() {
        std::thread::sleep(Duration::from_millis(5));
    }
    receiver.signal("-TERM");
    assert!(!receiver.ends_within(Duration::from_millis(500)));
    receiver.signal("-TERM");
    assert!(receiver.ends_within(Duration::from_secs(1)));
    assert_eq!(receiver.end().code, Some(130));
    source.end().failed(3, "");
    assert!(!into.exists());

    let (receiver, url) = Tool::receive("tcp:127.0.0.1:0", &into, &[]);
    Tool::send(&url, &from, &[]).end().succeeded();
    receiver.end().succeeded();
    assert_same(&from, &into);
    assert_eq!(out.root().read_dir().unwrap().count(), 1);
}
