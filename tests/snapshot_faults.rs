// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Writers of snapshots that are killed, or run out of disk: under the final name there is a whole snapshot or nothing.

#![expect(clippy::unwrap_used, reason = "a test may end at any surprise")]

#[path = "../integration/src/skip.rs"]
#[expect(dead_code, unreachable_pub, reason = "other crates' tests use the rest")]
mod skip;

use std::env;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

use vfio_migration::granule::Granule;
use vfio_migration::layout::Layout;
use vfio_migration::range::GpaRange;
use vfio_migration::snapshot::{
    AnnouncedRam, Base, Digest, MEMORY_FILE, SnapshotLimits, SnapshotWriter, WriteError, verify,
};

/// Names the directory that a child process writes to.
const TARGET: &str = "SNAPSHOT_FAULTS_TARGET";
/// What the child writes: `full` or `differential`.
const KIND: &str = "SNAPSHOT_FAULTS_KIND";

const MEMORY_BYTES: u64 = 24 << 20;
const CONFIG: &[u8] = br#"{"memory":{"size":25165824}}"#;

fn ram() -> GpaRange {
    GpaRange::new(0, MEMORY_BYTES).unwrap()
}

fn announced() -> AnnouncedRam {
    AnnouncedRam::all(Layout::new([ram()], Granule::host_page()).unwrap())
}

fn state() -> String {
    state_of(MEMORY_BYTES)
}

fn state_of(bytes: u64) -> String {
    let memory = format!(r#"{{\"memory_ranges\":{{\"data\":[{{\"gpa\":0,\"length\":{bytes}}}]}}}}"#);
    let child = format!(r#"{{"snapshots":{{}},"snapshot_data":{{"state":"{memory}"}}}}"#);
    format!(r#"{{"snapshots":{{"memory-manager":{child}}},"snapshot_data":null}}"#)
}

fn write_full(target: &Path) -> Result<Digest, WriteError> {
    let writer = SnapshotWriter::create(target, announced(), None, SnapshotLimits::default())?;
    for (piece, byte) in ram().pieces(1 << 20).zip(1..) {
        writer.fill(piece, &mut io::repeat(byte)).unwrap();
    }
    writer.finish(CONFIG, state().as_bytes())
}

fn write_differential(target: &Path) -> Result<Digest, WriteError> {
    let base = Base::Named(Digest::of(b"base"));
    let writer = SnapshotWriter::create(target, announced(), Some(base), SnapshotLimits::default())?;
    for (piece, byte) in ram().pieces(1 << 20).zip(1..) {
        writer.fill(piece, &mut io::repeat(byte)).unwrap();
    }
    writer.finish(CONFIG, state().as_bytes())
}

/// Does nothing, unless a test of this file runs it in a process of its own.
#[test]
fn child_writes_a_snapshot() {
    let Some(target) = env::var_os(TARGET).map(PathBuf::from) else { return };
    match env::var(KIND).unwrap().as_str() {
        "full" => write_full(&target).unwrap(),
        _ => write_differential(&target).unwrap(),
    };
}

fn child(kind: &str, target: &Path) -> Command {
    let mut command = Command::new(env::current_exe().unwrap());
    command.args(["child_writes_a_snapshot", "--exact", "--test-threads=1"]);
    command.env(TARGET, target).env(KIND, kind).stdout(Stdio::null()).stderr(Stdio::null());
    command
}

fn entries(dir: &Path) -> Vec<PathBuf> {
    fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path()).collect()
}

fn assert_whole(target: &Path) {
    let report = verify(target, &SnapshotLimits::default()).unwrap();
    assert!(report.is_clean(), "{:?}", report.findings);
}

/// Kills writers at moments spread over the time an undisturbed one takes.
fn kill_writers(kind: &str) {
    const KILLS: u32 = 25;
    let dir = tempfile::tempdir().unwrap();
    let target = dir.path().join("snapshot");
    let begun = Instant::now();
    assert!(child(kind, &target).status().unwrap().success());
    let undisturbed = begun.elapsed();
    assert_whole(&target);
    fs::remove_dir_all(&target).unwrap();

    let (mut whole, mut leftovers) = (0, 0);
    for kill in 0..KILLS {
        let mut writer = child(kind, &target).spawn().unwrap();
        std::thread::sleep(undisturbed * kill / (KILLS - 5));
        // It may have ended by itself.
        let _ = writer.kill();
        writer.wait().unwrap();
        if target.exists() {
            whole += 1;
            assert_whole(&target);
            assert_eq!(entries(dir.path()).len(), 1, "kill {kill} left something beside a whole snapshot");
            fs::remove_dir_all(&target).unwrap();
        }
        leftovers += entries(dir.path()).len();
    }
    assert!(leftovers > 0, "no kill came while a writer wrote");
    assert!(whole < KILLS, "every kill came too late");

    assert!(child(kind, &target).status().unwrap().success(), "the retry");
    assert_whole(&target);
    assert_eq!(entries(dir.path()), [target], "the retry cleared up");
}

#[test]
fn a_killed_writer_leaves_a_whole_snapshot_or_none() {
    kill_writers("full");
}

#[test]
fn a_killed_writer_leaves_a_whole_differential_or_none() {
    kill_writers("differential");
}

/// Checks that an error says which file of which directory the disk has no room for.
fn assert_full(error: &io::Error, file: &str) {
    assert_eq!(error.kind(), io::ErrorKind::StorageFull, "{error}");
    let target = env::var(TARGET).unwrap();
    assert_eq!(error.to_string(), format!("Cannot write {file} of {target}"));
    let cause = error.get_ref().and_then(|error| error.source()).unwrap();
    assert!(cause.to_string().contains("os error 28"), "{cause}");
}

/// Does nothing, unless the next test runs it with a small file system under its target.
#[test]
fn child_fills_the_disk() {
    let Some(target) = env::var_os(TARGET).map(PathBuf::from) else { return };
    let parent = target.parent().unwrap().to_owned();
    let base = Base::Named(Digest::of(b"base"));
    let writer = SnapshotWriter::create(&target, announced(), Some(base), SnapshotLimits::default()).unwrap();
    writer.fill(GpaRange::new(0, 5 << 20).unwrap(), &mut io::repeat(1)).unwrap();
    let error = writer.finish(CONFIG, state().as_bytes()).unwrap_err();
    assert!(error.to_string().starts_with("Cannot write memory-changes of "), "{error}");
    assert!(entries(&parent).is_empty());

    let base = Base::Named(Digest::of(b"base"));
    let writer = SnapshotWriter::create(&target, announced(), Some(base), SnapshotLimits::default()).unwrap();
    assert_full(&writer.fill(ram(), &mut io::repeat(1)).unwrap_err(), "memory-work");
    let early = writer.fill(ram(), &mut io::empty()).unwrap_err();
    assert_eq!(early.kind(), io::ErrorKind::UnexpectedEof, "of what is read, not of the file: {early}");
    drop(writer);
    assert!(entries(&parent).is_empty());

    let writer = SnapshotWriter::create(&target, announced(), None, SnapshotLimits::default()).unwrap();
    let error = writer.fill(ram(), &mut io::repeat(1)).unwrap_err();
    assert_full(&error, "memory-ranges");
    let error = writer.finish(CONFIG, state().as_bytes()).unwrap_err();
    assert!(error.to_string().starts_with("Cannot write memory-ranges of "), "{error}");
    assert!(entries(&parent).is_empty());

    // Of the pages that are lost the VM has unplugged some by the end; which, the error does not say.
    let layout = announced().layout().clone();
    let unplugged = GpaRange::from_bounds(1 << 20, MEMORY_BYTES).unwrap();
    let announced =
        AnnouncedRam::with_hotpluggable(layout, &[unplugged], &SnapshotLimits::default()).unwrap();
    let writer = SnapshotWriter::create(&target, announced, None, SnapshotLimits::default()).unwrap();
    writer.fill(unplugged, &mut io::repeat(1)).unwrap_err();
    let error = writer.finish(CONFIG, state_of(1 << 20).as_bytes()).unwrap_err();
    assert!(error.to_string().starts_with("Cannot write memory-ranges of "), "{error}");
    assert!(entries(&parent).is_empty());
}

#[test]
fn a_full_disk_is_an_error_and_nothing_stays() {
    let dir = tempfile::tempdir().unwrap();
    let script =
        r#"mount -t tmpfs -o size=8m none "$1" && exec "$2" child_fills_the_disk --exact --nocapture"#;
    let isolated = |script: &str| {
        let mut command = Command::new("unshare");
        command.args(["-rm", "sh", "-c", script, "sh"]).arg(dir.path()).arg(env::current_exe().unwrap());
        command.env(TARGET, dir.path().join("snapshot"));
        command.output()
    };
    if !isolated(r#"mount -t tmpfs none "$1""#).is_ok_and(|output| output.status.success()) {
        return skip::skip("cannot mount a small file system with unshare");
    }
    let output = isolated(script).unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert!(!dir.path().join("snapshot").join(MEMORY_FILE).exists());
}
