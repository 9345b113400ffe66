// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Commands killed that write a directory from others.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use vfio_migration::snapshot::{CHANGES_FILE, CONFIG_FILE, MANIFEST_FILE, MEMORY_FILE, STATE_FILE};

use super::{Moment, Tally, kills, partial, timed, verify};
use crate::stored::{Place, assert_same};
use crate::tool::{Tool, run};

#[derive(Debug, Clone, Copy)]
enum Writer {
    Apply,
    Create,
    Seal,
}

/// Snapshots to work with.
struct Setting {
    place: Place,
    base: PathBuf,
    whole: PathBuf,
    differential: PathBuf,
}

impl Setting {
    fn new() -> Self {
        let place = Place::new();
        let (base, whole) = (place.stored("base", 1), place.stored("whole", 2));
        let differential = place.path("differential");
        let setting = Self { place, base, whole, differential };
        run(setting.command(Writer::Create, &setting.differential)).succeeded();
        setting
    }

    /// The command that makes `target`.
    fn command<'a>(&'a self, writer: Writer, target: &'a Path) -> Vec<&'a str> {
        let [base, whole, differential, target] =
            [&self.base, &self.whole, &self.differential, target].map(|path| path.to_str().unwrap());
        match writer {
            Writer::Apply => vec!["snapshot", "apply", base, differential, "--into", target],
            Writer::Create => vec!["snapshot", "create", "--from", whole, "--base", base, "--into", target],
            Writer::Seal => vec!["snapshot", "seal", target],
        }
    }

    /// Makes `target`; returns how long that takes.
    fn run(&self, writer: Writer, target: &Path) -> Duration {
        timed(|| drop(run(self.command(writer, target)).succeeded()))
    }

    /// Brings `target` to where `writer` begins.
    fn prepare(&self, writer: Writer, target: &Path) {
        if let Writer::Seal = writer {
            self.place.stored(target.file_name().unwrap().to_str().unwrap(), 2);
            fs::remove_file(target.join(MANIFEST_FILE)).unwrap();
        }
    }

    /// Whether the last files of `target` are being written.
    fn is_completing(&self, writer: Writer, target: &Path) -> bool {
        match writer {
            Writer::Apply | Writer::Create => {
                self.place.is_completing(target.file_name().unwrap().to_str().unwrap())
            }
            Writer::Seal => !partial(target, MANIFEST_FILE).is_empty(),
        }
    }

    /// Checks that `target` is what `writer` makes, and that there is nothing else in it.
    fn check_whole(&self, writer: Writer, target: &Path) {
        verify(target);
        let memory = match writer {
            Writer::Seal => {
                assert_same(&self.whole, target);
                MEMORY_FILE
            }
            Writer::Apply => {
                let [whole, target] = [&self.whole, target].map(|path| path.to_str().unwrap());
                run(["snapshot", "diff", whole, target]).succeeded();
                MEMORY_FILE
            }
            Writer::Create => {
                assert_same_files(&self.differential, target);
                CHANGES_FILE
            }
        };
        let mut names: Vec<_> = target.read_dir().unwrap().map(|entry| entry.unwrap().file_name()).collect();
        names.sort();
        assert_eq!(names, [CONFIG_FILE, memory, MANIFEST_FILE, STATE_FILE]);
    }
}

fn assert_same_files(first: &Path, second: &Path) {
    for name in [CONFIG_FILE, STATE_FILE, CHANGES_FILE, MANIFEST_FILE] {
        assert!(
            fs::read(first.join(name)).unwrap() == fs::read(second.join(name)).unwrap(),
            "{name} differs"
        );
    }
}

/// Whether `writer` has made `target`.
fn is_made(writer: Writer, target: &Path) -> bool {
    match writer {
        Writer::Apply | Writer::Create => target.exists(),
        Writer::Seal => target.join(MANIFEST_FILE).exists(),
    }
}

#[test]
fn a_killed_apply_create_or_seal_leaves_a_whole_directory_or_none_and_a_retry_succeeds() {
    let setting = Setting::new();
    let writers = [Writer::Apply, Writer::Create, Writer::Seal];
    let mut undisturbed = writers.map(|writer| {
        let target = setting.place.path(&format!("undisturbed-{writer:?}"));
        setting.prepare(writer, &target);
        setting.run(writer, &target)
    });
    let mut tally = Tally::default();
    for kill in 0..kills() {
        let turn = kill % writers.len();
        let writer = writers[turn];
        let moment = Moment::random(undisturbed[turn]);
        let name = format!("into-{kill}");
        let target = setting.place.path(&name);
        setting.prepare(writer, &target);
        eprintln!("kill {kill}: {writer:?} {moment:?}");
        let mut victim = Tool::start(setting.command(writer, &target));
        moment.wait(&mut victim, || setting.is_completing(writer, &target));
        victim.kill();
        victim.end();

        let made = is_made(writer, &target);
        tally.count(format!("{writer:?}"), made);
        if !made {
            undisturbed[turn] = setting.run(writer, &target);
        }
        setting.check_whole(writer, &target);
        assert!(setting.place.partial(&name).is_empty());
        fs::remove_dir_all(&target).unwrap();
    }
    tally.print();
}
