// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! System calls that fail, one at a time, at each place where they are made: strace makes them fail.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::Duration;

use vfio_migration::snapshot::{CHANGES_FILE, CONFIG_FILE, MANIFEST_FILE, MEMORY_FILE};
use vfio_migration_integration::skip;

use crate::stored::{Place, assert_same, assert_sound};
use crate::tool::{Ended, Tool, is_empty, run};

/// A system call, how it fails, and how often it may be made before that is not tried any more.
struct Fault {
    call: &'static str,
    error: &'static str,
    most: u32,
}

const fn fault(call: &'static str, error: &'static str, most: u32) -> Fault {
    Fault { call, error, most }
}

/// Runs the tool under strace with more `options`; returns how it ended, and whether a fault came to pass.
fn run_with(options: &[&str], arguments: &[&str]) -> (Ended, bool) {
    let log = tempfile::NamedTempFile::new().unwrap();
    let mut command = Command::new("strace");
    command.args(["-f", "-qq", "-e", "signal=none", "-o"]).arg(log.path());
    command.args(options);
    let ended = Tool::spawn(command.arg(env!("CARGO_BIN_EXE_vfio-migrate")).args(arguments)).end();
    let injected = fs::read_to_string(log.path()).unwrap().contains("(INJECTED)");
    (ended, injected)
}

/// Whether there is a strace that may trace here; says so where there is not.
fn has_strace() -> bool {
    let probe = ["-qq", "-o", "/dev/null", "-e", "inject=openat:error=EIO:when=99", "true"];
    let works = Command::new("strace").args(probe).output().is_ok_and(|output| output.status.success());
    if !works {
        skip("no strace that may trace processes");
    }
    works
}

fn text(path: &Path) -> String {
    path.to_str().unwrap().to_owned()
}

fn entries(dir: &Path) -> Vec<PathBuf> {
    dir.read_dir().unwrap().map(|entry| entry.unwrap().path()).collect()
}

/// Lets each of `faults` happen at every place in turn, and hands `check` how the tool ended.
fn each_fault(faults: &[Fault], arguments: &[&str], mut check: impl FnMut(&str, Ended)) {
    let mut happened = 0;
    for Fault { call, error, most } in faults {
        for when in 1..=*most {
            let fault = format!("{call}:error={error}:when={when}");
            let (ended, injected) = run_with(&["-e", &format!("inject={fault}")], arguments);
            check(&fault, ended);
            if !injected {
                break;
            }
            happened += 1;
        }
    }
    assert!(happened > 0);
}

#[test]
fn what_cannot_be_read_while_it_is_checked_is_not_called_altered() {
    if !has_strace() {
        return;
    }
    let place = Place::new();
    let stored = text(&place.stored("stored", 1));
    let faults = [
        fault("pread64", "EIO", 3),
        fault("pread64", "ENOMEM", 1),
        fault("lseek", "EIO", 3),
        fault("openat", "EMFILE", 30),
        fault("openat", "EACCES", 30),
        fault("read", "EIO", 20),
        fault("statx", "EIO", 20),
    ];
    each_fault(&faults, &["snapshot", "verify", &stored], |fault, ended| {
        // The program loader has its own word for its own files: 127.
        assert!(matches!(ended.code, Some(0 | 4 | 127)), "{fault}: {ended:?}");
        assert!(!ended.stdout.contains("altered") && !ended.stdout.contains("damaged"), "{fault}: {ended:?}");
        if ended.code == Some(4) {
            assert!(
                ended.stderr.contains(&stored) && ended.stderr.contains("(os error"),
                "{fault}: {ended:?}"
            );
        }
    });
}

#[test]
fn a_disk_that_fails_while_a_snapshot_is_sent_is_named() {
    if !has_strace() {
        return;
    }
    let place = Place::new();
    let (from, into) = (place.stored("stored", 1), place.path("into"));
    let memory = from.join(MEMORY_FILE);
    for (when, more) in [("1+", &[][..]), ("1+", &["--all-pages"]), ("30+", &[]), ("30+", &["--all-pages"])] {
        let (receiver, url) = Tool::receive("tcp:127.0.0.1:0", &into, &[]);
        let fault = format!("inject=pread64:error=EIO:when={when}");
        let options = ["-P", &text(&memory), "-e", "trace=pread64", "-e", &fault];
        let from = text(&from);
        let send = [&["send", &url, "--from", &from], more].concat();
        let (ended, injected) = run_with(&options, &send);
        assert!(injected);
        ended.failed(4, "memory-ranges: Input/output error (os error 5)");
        assert_eq!(receiver.end().code, Some(3));
        assert!(!into.exists());
    }
}

#[test]
fn what_cannot_be_read_of_a_base_or_a_snapshot_is_named() {
    if !has_strace() {
        return;
    }
    let (place, out) = (Place::new(), Place::new());
    let [one, two] = [1, 2].map(|seed| text(&place.stored(&format!("stored-{seed}"), seed)));
    let changed = text(&place.path("changed"));
    run(["snapshot", "create", "--from", &two, "--base", &one, "--into", &changed]).succeeded();
    let (into, url) = (text(&out.path("into")), format!("unix:{}", out.path("socket").display()));
    let memory = |dir: &str| format!("{dir}/{MEMORY_FILE}");
    let broken = |file: &str, arguments: &[&str]| {
        let options = ["-P", file, "-e", "trace=pread64", "-e", "inject=pread64:error=EIO"];
        let (ended, injected) = run_with(&options, arguments);
        assert!(injected, "{arguments:?}: {ended:?}");
        ended.failed(4, &format!("{file}: Input/output error (os error 5)"));
    };
    let create = ["snapshot", "create", "--from", &two, "--base", &one, "--into", &into];
    for side in [&one, &two] {
        broken(&memory(side), &["snapshot", "diff", &one, &two]);
        broken(&memory(side), &create);
        assert!(is_empty(out.root()));
    }
    broken(&format!("{changed}/{CHANGES_FILE}"), &["snapshot", "diff", &changed, &two, "--base", &one]);
    let sending = thread::spawn({
        let (url, socket, two) = (url.clone(), out.path("socket"), two.clone());
        move || {
            while !socket.exists() {
                thread::sleep(Duration::from_millis(5));
            }
            Tool::send(&url, two.as_ref(), &[]).end()
        }
    });
    broken(&memory(&one), &["receive", &url, "--into", &into, "--base", &one, "--log-level", "off"]);
    sending.join().unwrap().failed(3, "");
}

#[test]
fn a_seal_that_is_done_is_not_called_failed() {
    if !has_strace() {
        return;
    }
    let place = Place::new();
    let dir = place.stored("stored", 1);
    fs::remove_file(dir.join(MANIFEST_FILE)).unwrap();
    let state = text(&dir.join("state.json"));
    let options = ["-P", &state, "-e", "trace=openat", "-e", "inject=openat:error=EMFILE:when=2+"];
    let (ended, injected) = run_with(&options, &["snapshot", "seal", &text(&dir)]);
    assert!(injected);
    ended.succeeded();
    assert_sound(&dir);
}

#[test]
fn a_step_that_fails_while_a_snapshot_is_written_leaves_a_whole_one_or_nothing() {
    if !has_strace() {
        return;
    }
    let (place, out) = (Place::new(), Place::new());
    let (from, into) = (place.stored("stored", 1), out.path("into"));
    let faults = [
        fault("openat", "EMFILE", 30),
        fault("mkdirat", "ENOSPC", 2),
        fault("statx", "EIO", 20),
        fault("fcntl", "EMFILE", 25),
        fault("ftruncate", "EFBIG", 4),
        fault("pwrite64", "ENOSPC", 2),
        fault("write", "ENOSPC", 4),
        fault("fsync", "EIO", 8),
        fault("fdatasync", "EIO", 4),
        fault("renameat", "EIO", 3),
        fault("newfstatat", "EIO", 10),
    ];
    each_fault(&faults, &["snapshot", "apply", &text(&from), "--into", &text(&into)], |fault, ended| {
        assert!(matches!(ended.code, Some(0 | 4 | 127)), "{fault}: {ended:?}");
        if ended.code == Some(0) {
            assert_eq!(entries(out.root()), std::slice::from_ref(&into), "{fault}");
            assert_same(&from, &into);
            fs::remove_dir_all(&into).unwrap();
        } else {
            assert!(entries(out.root()).is_empty(), "{fault}: {:?} is left, {ended:?}", entries(out.root()));
        }
        // Of writes, what is printed is one, too.
        if ended.code == Some(4) && !fault.starts_with("write:") {
            assert!(ended.stderr.contains("(os error"), "{fault}: {ended:?}");
        }
    });
}

#[test]
fn a_directory_that_cannot_be_taken_back_is_left_whole() {
    if !has_strace() {
        return;
    }
    let (place, out) = (Place::new(), Place::new());
    let (from, into) = (place.stored("stored", 1), out.path("into"));
    // What is done to the directory above: it is moved into, brought to disk, and moved out of again.
    let parent = text(out.root());
    let faults =
        ["fsync:error=EIO:when=1", "renameat:error=EROFS:when=2"].map(|fault| format!("inject={fault}"));
    let options = ["-P", &parent, "-e", "trace=fsync,renameat", "-e", &faults[0], "-e", &faults[1]];
    let (ended, _) = run_with(&options, &["snapshot", "apply", &text(&from), "--into", &text(&into)]);
    let ended = ended.failed(4, "is whole but may be lost with the power");
    assert!(ended.stderr.contains("Read-only file system"), "{ended:?}");
    assert!(ended.stderr.contains("(os error 5)"), "{ended:?}");
    assert_sound(&into);
    assert_same(&from, &into);

    // Where it can be taken back, nothing is left.
    fs::remove_dir_all(&into).unwrap();
    let (ended, _) = run_with(&options[..6], &["snapshot", "apply", &text(&from), "--into", &text(&into)]);
    ended.failed(4, "Cannot move the finished directory to");
    assert!(entries(out.root()).is_empty(), "{:?}", entries(out.root()));
}

#[test]
fn a_manifest_is_never_lost_to_an_edited_configuration() {
    if !has_strace() {
        return;
    }
    let place = Place::new();
    let (full, later, into) = (place.stored("full", 1), place.stored("later", 2), place.path("into"));
    run(["snapshot", "create", "--from", &text(&later), "--base", &text(&full), "--into", &text(&into)])
        .succeeded();
    for dir in [&full, &into] {
        let config = dir.join(CONFIG_FILE);
        fs::write(&config, fs::read_to_string(&config).unwrap() + "\n").unwrap();
        let options = ["-P", &text(dir), "-e", "trace=fsync", "-e", "inject=fsync:error=EIO"];
        let (ended, _) = run_with(&options, &["snapshot", "seal", &text(dir), "--edited-config"]);
        ended
            .failed(4, "snapshot-manifest of")
            .failed(4, "is the new one, but a loss of power may bring back");
        assert_sound(dir);
    }
    // A first manifest is taken back: there is none to miss.
    fs::remove_file(full.join(MANIFEST_FILE)).unwrap();
    let options = ["-P", &text(&full), "-e", "trace=fsync", "-e", "inject=fsync:error=EIO"];
    let (ended, _) = run_with(&options, &["snapshot", "seal", &text(&full)]);
    ended.failed(4, "Cannot write snapshot-manifest of");
    assert!(!full.join(MANIFEST_FILE).exists());
}

#[test]
fn no_memory_for_a_manifest_is_not_called_damage() {
    let place = Place::new();
    let large = place.stored_holes("large", 16 << 30);
    // Enough for the tool, and too little for a million digests.
    let limited = |arguments: &[&str]| Tool::spawn(limited(40_960).args(arguments)).end();
    limited(&["snapshot", "info", "/nonexistent"]).failed(4, "No such file");
    for command in ["verify", "info", "seal"] {
        limited(&["snapshot", command, &text(&large)]).failed(4, "memory");
    }
    run(["snapshot", "verify", &text(&large)]).succeeded();
}

/// A tool that may have so much memory, in KiB.
fn limited(kib: u32) -> Command {
    let mut command = Command::new("/bin/sh");
    let script = format!("ulimit -v {kib} && exec \"$0\" \"$@\"");
    command.args(["-c", &script, env!("CARGO_BIN_EXE_vfio-migrate")]);
    command
}

#[test]
fn whatever_runs_short_of_memory_says_so() {
    let (place, out) = (Place::new(), Place::new());
    // A quarter of a million digests.
    let large = place.stored_holes("large", 4 << 30);
    let (from, into, socket) = (text(&large), text(&out.path("into")), out.path("socket"));
    let url = format!("unix:{}", socket.display());
    let check = |what: &str, kib: u32, ended: Ended| {
        assert!(matches!(ended.code, Some(0 | 4)), "{what} with {kib} KiB: {ended:?}");
        let short = ["memory", "Resource temporarily unavailable"];
        let is_named = short.iter().any(|words| ended.stderr.contains(words));
        assert!(ended.code == Some(0) || is_named, "{what} with {kib} KiB: {ended:?}");
        ended.code == Some(0)
    };
    let mut done = [0_usize; 4];
    let limits: Vec<u32> = (24_000..=96_000).step_by(6_000).collect();
    for &kib in &limits {
        let apply = ["snapshot", "apply", &from, "--into", &into];
        done[0] += usize::from(check("apply", kib, Tool::spawn(limited(kib).args(apply)).end()));
        let _absent = fs::remove_dir_all(&into);
        fs::remove_file(large.join(MANIFEST_FILE)).unwrap();
        done[1] += usize::from(check(
            "seal",
            kib,
            Tool::spawn(limited(kib).args(["snapshot", "seal", &from])).end(),
        ));
        run(["snapshot", "seal", &from]).succeeded();
        for (side, of_receiver, of_sender) in [(2, kib, 1 << 30), (3, 1 << 30, kib)] {
            let receive = ["receive", &url, "--into", &into, "--log-level", "off", "--idle-timeout", "5"];
            let mut receiver = Tool::spawn(limited(of_receiver).args(receive));
            while !socket.exists() && !receiver.has_ended() {
                thread::sleep(Duration::from_millis(5));
            }
            let sent = Tool::spawn(limited(of_sender).args(["send", &url, "--from", &from])).end();
            // It may have turned the source away for want of a thread, and wait for a better moment.
            let waits = sent.code != Some(0) && !receiver.ends_within(Duration::from_millis(500));
            if waits {
                receiver.signal("-TERM");
            }
            let received = receiver.end();
            let (what, ended) = if side == 2 { ("receive", received) } else { ("send", sent) };
            done[side] += usize::from(!(waits && side == 2) && check(what, kib, ended));
            let _absent = (fs::remove_dir_all(&into), fs::remove_file(&socket));
        }
    }
    assert!(done.iter().all(|&done| done > 0), "{done:?} of {}", limits.len());
    assert!(done.iter().any(|&done| done < limits.len()), "{done:?}");
    assert!(is_empty(out.root()));
}
