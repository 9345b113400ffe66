// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Sources that die, disks that are full, and receivers that are told to end, while memory comes as descriptors.

use std::net::Shutdown;
use std::process::Command;
use std::thread;

use vfio_migration_integration::skip;

use super::*;
use crate::frames::state_document;
use crate::kills::{kills, random};
use crate::tool::Ended;

/// RAM that takes a while to copy.
const LARGE: u64 = 64 << 20;

/// A memfd full of bytes that no page shares with another.
fn large() -> File {
    let memory = memory_of(LARGE);
    let mut piece = vec![0; 1 << 20];
    for at in (0..LARGE).step_by(piece.len()) {
        for (word, number) in piece.chunks_exact_mut(8).zip(at..) {
            word.copy_from_slice(&number.wrapping_mul(0x9e37_79b9_7f4a_7c15).to_le_bytes());
        }
        memory.write_all_at(&piece, at).unwrap();
    }
    memory
}

/// Moments at which something is killed, at least.
const MOMENTS: usize = 30;

/// The messages that follow the descriptor.
fn rest() -> [Vec<u8>; 3] {
    let config = config(&format!(r#"{{"memory":{{"size":{LARGE}}}}}"#), &[(0, 0, LARGE, 0)]);
    [config, message(crate::frames::STATE, state_document(&[(0, LARGE)]).as_bytes()), message(COMPLETE, b"")]
}

impl Source {
    /// Passes `memory` and tells the rest, until the receiver ends or refuses; returns whether it took Complete.
    fn migrate(&mut self, memory: &File) -> bool {
        let passed = self.pass(0, &[memory.as_fd()]) == Some(OK);
        passed && rest().iter().all(|message| self.ask(message) == Some(OK))
    }
}

/// How long an undisturbed migration takes.
fn undisturbed(memory: &File) -> Duration {
    let (mut bench, began) = (Bench::new(&[]), Instant::now());
    assert!(bench.source.migrate(memory));
    bench.end().0.succeeded();
    began.elapsed()
}

/// Checks what is left after `ended`: a whole snapshot, or nothing.
#[track_caller]
fn assert_whole_or_absent(ended: &Ended, place: &Place, memory: &File) {
    let into = place.path("into");
    if !into.exists() {
        assert_ne!(ended.code, Some(0));
        // A tool that was killed could not clear away its work.
        assert!(ended.code.is_none() || is_empty(place.root()), "something is left behind: {ended:?}");
        return;
    }
    assert_sound(&into);
    let kept = std::fs::read(into.join("memory-ranges")).unwrap();
    let mut expected = vec![0; usize::try_from(LARGE).unwrap()];
    memory.read_exact_at(&mut expected, 0).unwrap();
    assert!(kept == expected, "other bytes than the source's");
}

#[test]
fn a_source_that_is_killed_at_any_moment_leaves_a_whole_snapshot_or_none() {
    let memory = large();
    let time = undisturbed(&memory);
    for _ in 0..kills().max(MOMENTS) {
        let mut bench = Bench::new(&[]);
        let (stream, moment) = (bench.source.0.try_clone().unwrap(), time.mul_f64(1.1 * random()));
        thread::scope(|scope| {
            scope.spawn(move || {
                thread::sleep(moment);
                let _ = stream.shutdown(Shutdown::Both);
            });
            bench.source.migrate(&memory);
        });
        let (ended, place) = bench.end();
        // 6: all is kept, and the source may not know.
        assert!([Some(0), Some(3), Some(6)].contains(&ended.code), "{ended:?}");
        assert_whole_or_absent(&ended, &place, &memory);
    }
}

#[test]
fn a_receiver_that_is_told_to_end_or_killed_at_any_moment_keeps_a_whole_snapshot_or_none() {
    let memory = large();
    let time = undisturbed(&memory);
    for kill in 0..kills().max(MOMENTS) {
        let (signal, code) = if kill % 2 == 0 { ("-TERM", Some(130)) } else { ("-KILL", None) };
        let Bench { place, tool, mut source } = Bench::new(&[]);
        let moment = time.mul_f64(1.1 * random());
        let told = thread::scope(|scope| {
            let migrating = scope.spawn(|| source.migrate(&memory));
            thread::sleep(moment);
            tool.signal(signal);
            migrating.join().unwrap()
        });
        let ended = tool.end();
        assert!([code, Some(0)].contains(&ended.code), "{ended:?}");
        assert_whole_or_absent(&ended, &place, &memory);
        assert!(!told || place.path("into").exists(), "the source was told that all is kept: {ended:?}");
    }
}

#[test]
fn a_disk_that_is_full_is_named_and_ends_the_migration() {
    let mounted = |script: &str| {
        let mut command = Command::new("unshare");
        command.args(["-rm", "sh", "-c", script]);
        command
    };
    if !mounted("mount -t tmpfs none /mnt").status().is_ok_and(|status| status.success()) {
        return skip("no mount of one's own, which is to be full");
    }
    let memory = large();
    for options in [&[][..], &["--no-warm-copy"]] {
        let place = Place::new();
        // What is left on the mount, which nobody else sees, is told by the exit status.
        let mut tool = mounted(
            "mount -t tmpfs -o size=16m none /mnt; \"$0\" \"$@\"; code=$?; [ -z \"$(ls -A /mnt)\" ] || exit 99; exit $code",
        );
        let socket = format!("unix:{}", place.path("socket").display());
        tool.arg(env!("CARGO_BIN_EXE_vfio-migrate"));
        let (tool, _) = Tool::receive_by(&mut tool, &socket, Path::new("/mnt/into"), options);
        let mut source = Source::start(&place.path("socket"));
        assert!(!source.migrate(&memory));
        drop(source);
        tool.end().failed(4, "No space left on device");
    }
}

#[test]
fn memory_that_is_cut_off_while_it_is_copied_is_an_error() {
    for options in [&[][..], &["--no-warm-copy"]] {
        let (mut bench, memory) = (Bench::new(options), large());
        thread::scope(|scope| {
            scope.spawn(|| {
                thread::sleep(Duration::from_millis(20));
                memory.set_len(LARGE / 2).unwrap();
            });
            assert!(!bench.source.migrate(&memory));
        });
        bench.refuses("slot 0");
    }
}
