// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Whoever writes a directory killed at any moment: what lies on disk is whole or not there, and a retry succeeds.

mod on_disk;
mod transfers;

use std::collections::BTreeMap;
use std::env;
use std::hash::{BuildHasher, RandomState};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use vfio_migration::snapshot::CONFIG_FILE;

use crate::stored::Place;
use crate::tool::{Tool, run};

/// How many kills each test tries, where this variable says so.
const KILLS: &str = "VFIO_MIGRATE_TEST_KILLS";

/// Kills tried otherwise.
const FEW: usize = 12;

/// How many kills to try.
pub(crate) fn kills() -> usize {
    env::var(KILLS).map_or(FEW, |text| text.parse().unwrap())
}

/// When to kill: half of all moments are near the end, where a directory gets its name.
#[derive(Debug, Clone, Copy)]
enum Moment {
    /// After this time.
    After(Duration),
    /// This time after the first of the last files shows up.
    Completing(Duration),
}

impl Moment {
    /// One of the moments of what takes as long as `undisturbed`.
    fn random(undisturbed: Duration) -> Self {
        match random() {
            0.0..0.5 => Self::After(undisturbed.mul_f64(random())),
            0.5..0.75 => Self::After(undisturbed.mul_f64(0.9 + 0.15 * random())),
            _ => Self::Completing(Duration::from_millis(30).mul_f64(random() * random())),
        }
    }

    /// Waits for the moment, or until `victim` has ended; `completing` tells whether the first of the last files is there.
    fn wait(self, victim: &mut Tool, completing: impl Fn() -> bool) {
        match self {
            Self::After(time) => thread::sleep(time),
            Self::Completing(time) => {
                while !completing() && !victim.has_ended() {
                    thread::sleep(Duration::from_micros(200));
                }
                thread::sleep(time);
            }
        }
    }
}

/// From 0 to 1, another one each time.
pub(crate) fn random() -> f64 {
    let bits = RandomState::new().hash_one(0) >> 32;
    f64::from(u32::try_from(bits).unwrap()) / f64::from(u32::MAX)
}

impl Place {
    /// The directories that are to be `name`, or should have been.
    fn partial(&self, name: &str) -> Vec<PathBuf> {
        partial(self.root(), name)
    }

    /// Whether the last files of what is to be `name` are being written.
    fn is_completing(&self, name: &str) -> bool {
        self.partial(name).iter().any(|dir| dir.join(CONFIG_FILE).exists())
    }
}

/// What lies in `dir` and is to be `name`, or should have been.
fn partial(dir: &Path, name: &str) -> Vec<PathBuf> {
    let prefix = format!(".{name}.partial-");
    let paths = dir.read_dir().unwrap().map(|entry| entry.unwrap().path());
    paths.filter(|path| path.file_name().unwrap().to_string_lossy().starts_with(&prefix)).collect()
}

/// What was left by how many kills of each kind.
#[derive(Default)]
struct Tally(BTreeMap<String, [u32; 2]>);

impl Tally {
    /// Counts a kill of the kind `cell`, after which the directory was there or not.
    fn count(&mut self, cell: String, whole: bool) {
        self.0.entry(cell).or_default()[usize::from(whole)] += 1;
    }

    fn print(&self) {
        for (cell, [absent, whole]) in &self.0 {
            eprintln!("{whole:>3} whole {absent:>3} absent  {cell}");
        }
        let [absent, whole] = [0, 1].map(|kind| self.0.values().map(|counts| counts[kind]).sum::<u32>());
        eprintln!("{whole:>3} whole {absent:>3} absent  in all");
    }
}

/// Checks with the tool that every byte of `snapshot` is as its writer wrote it.
#[track_caller]
fn verify(snapshot: &Path) {
    run(["snapshot", "verify", snapshot.to_str().unwrap()]).succeeded();
}

/// Does `work`; returns how long that takes.
fn timed(work: impl FnOnce()) -> Duration {
    let begun = Instant::now();
    work();
    begun.elapsed()
}
