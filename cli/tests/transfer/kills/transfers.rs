// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Source or receiver of a transfer killed.

use std::collections::HashMap;
use std::fmt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::{Moment, Tally, kills, timed, verify};
use crate::certificates::Files;
use crate::stored::{Place, assert_same};
use crate::tool::{Ended, Tool, run};

/// Makes a transfer last a while: a chance for each of its moments.
const SLOW: [&str; 2] = ["--bandwidth", "128M"];

/// How long a receiver takes at most to learn that its source is dead.
const NOTICED: Duration = Duration::from_secs(10);

/// How source and receiver are connected.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Way {
    Unix,
    Tcp1,
    Tcp4,
    Tls4,
}

/// What the receiver makes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Kind {
    Full,
    Checkpoint,
    Differential,
}

#[derive(Debug, Clone, Copy)]
enum Victim {
    Source,
    Receiver,
}

/// One of the combinations.
#[derive(Debug, Clone, Copy)]
struct Cell {
    way: Way,
    kind: Kind,
    victim: Victim,
}

impl Cell {
    /// The combination for a kill: all 24 take turns, and the first 12 have every way with every kind already.
    fn of(kill: usize) -> Self {
        Self {
            way: [Way::Unix, Way::Tcp1, Way::Tcp4, Way::Tls4][kill % 4],
            kind: [Kind::Full, Kind::Checkpoint, Kind::Differential][kill / 4 % 3],
            victim: [Victim::Source, Victim::Receiver][(kill + kill / 4) % 2],
        }
    }
}

impl fmt::Display for Cell {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { way, kind, victim } = self;
        write!(f, "{way:?}, {kind:?}, {victim:?} killed")
    }
}

/// What all kills have in common.
struct Setting {
    place: Place,
    tls: Files,
    from: PathBuf,
    base: PathBuf,
    undisturbed: HashMap<(Way, Kind), Duration>,
}

impl Setting {
    fn new() -> Self {
        let place = Place::new();
        let (from, base) = (place.stored("from", 1), place.stored("base", 2));
        Self { place, tls: Files::good(), from, base, undisturbed: HashMap::new() }
    }

    /// Starts a receiver into `into` and a source.
    fn start(&self, Cell { way, kind, .. }: Cell, into: &Path, slow: &[&str]) -> (Tool, Tool) {
        let unix = format!("unix:{}", self.place.path("socket").display());
        let url = if way == Way::Unix { &unix } else { "tcp:127.0.0.1:0" };
        let tls = ["--tls-dir", self.tls.path().to_str().unwrap()];
        let tls = if way == Way::Tls4 { &tls[..] } else { &[] };
        let connections = if matches!(way, Way::Tcp4 | Way::Tls4) { "4" } else { "1" };
        let base = ["--base", self.base.to_str().unwrap()];
        let kept = match kind {
            Kind::Full => &[][..],
            Kind::Checkpoint => &["--checkpoint"],
            Kind::Differential => &base,
        };
        let (receiver, url) = Tool::receive(url, into, &[kept, tls].concat());
        let sending = [slow, tls, &["--connections", connections]].concat();
        (receiver, Tool::send(&url, &self.from, &sending))
    }

    /// Transfers to `into` undisturbed, and checks that all is as it should be.
    fn transfer(&self, cell: Cell, into: &Path, slow: &[&str]) {
        let (receiver, source) = self.start(cell, into, slow);
        let told = source.end();
        match cell.kind {
            Kind::Checkpoint => drop(told.failed(3, "Receiver refused")),
            Kind::Full | Kind::Differential => drop(told.succeeded()),
        }
        receiver.end().succeeded();
        self.check_whole(cell.kind, into);
    }

    /// Checks that `into` holds what was sent.
    fn check_whole(&self, kind: Kind, into: &Path) {
        verify(into);
        if kind == Kind::Differential {
            let [from, into, base] = [&self.from, into, &self.base].map(|path| path.to_str().unwrap());
            run(["snapshot", "diff", from, into, "--base", base]).succeeded();
        } else {
            assert_same(&self.from, into);
        }
    }

    /// How long a transfer takes that nobody is killed in.
    fn undisturbed(&mut self, cell: Cell) -> Duration {
        let key = (cell.way, cell.kind);
        if let Some(&known) = self.undisturbed.get(&key) {
            return known;
        }
        let into = self.place.path(&format!("undisturbed-{key:?}"));
        let (receiver, source) = self.start(cell, &into, &SLOW);
        let time = timed(|| drop((source.end(), receiver.end())));
        self.undisturbed.insert(key, time);
        time
    }

    /// Kills one side of a transfer to `name`; both end. Returns how the other one did.
    fn kill(&self, cell: Cell, name: &str, moment: Moment) -> Ended {
        let into = self.place.path(name);
        let (mut receiver, mut source) = self.start(cell, &into, &SLOW);
        match cell.victim {
            Victim::Source => {
                moment.wait(&mut source, || self.place.is_completing(name));
                source.kill();
                source.end();
                // Before its first message a source is none, and the receiver waits for another.
                let begun = self
                    .place
                    .partial(name)
                    .iter()
                    .any(|dir| dir.read_dir().is_ok_and(|files| files.count() > 0));
                let patience = if begun { NOTICED } else { Duration::from_millis(300) };
                if !receiver.ends_within(patience) {
                    assert!(!begun, "the receiver did not notice");
                    receiver.signal("-TERM");
                }
                receiver.end()
            }
            Victim::Receiver => {
                moment.wait(&mut receiver, || self.place.is_completing(name));
                receiver.kill();
                receiver.end();
                source.end()
            }
        }
    }
}

/// Checks what the side that was not killed says; `whole` is whether the directory is there.
fn check_survivor(cell: Cell, ended: &Ended, whole: bool) {
    let checkpoint = cell.kind == Kind::Checkpoint;
    let class = match (cell.victim, ended.code) {
        // Who says that the VM has moved, or is kept, is right.
        (Victim::Source, Some(0)) if whole => "kept",
        (Victim::Receiver, Some(0)) if whole && !checkpoint => "sent",
        // It is kept, but the source died before it was told.
        (Victim::Source, Some(6)) if whole && !checkpoint => "kept",
        // The source's VM runs on: there must not be two of it.
        (_, Some(3)) if !whole => "peer",
        (Victim::Receiver, Some(3)) if checkpoint => "peer",
        // A receiver without a source ends when it is told to.
        (Victim::Source, Some(130)) if !whole => "cancelled",
        (Victim::Receiver, Some(6)) => "outcome-unknown",
        _ => panic!("{cell:?}, whole: {whole}, {ended:?}"),
    };
    let last = ended.last();
    if last["event"] == "failed" {
        assert_eq!(last["class"], class, "{ended:?}");
        assert_eq!(last["exit"], ended.code.unwrap(), "{ended:?}");
        let message = last["message"].as_str().unwrap();
        assert!(ended.stderr.contains(&format!("error: {message}\n")), "{ended:?}");
        assert_eq!(class == "outcome-unknown", message.starts_with("Outcome unknown"), "{ended:?}");
    } else {
        assert_eq!(last["event"], class, "{ended:?}");
        assert_eq!(last["confirmed"] == false, ended.code == Some(6) || checkpoint, "{ended:?}");
    }
}

#[test]
fn killed_at_any_moment_the_directory_is_whole_or_absent_and_a_retry_succeeds() {
    let mut setting = Setting::new();
    let mut tally = Tally::default();
    for kill in 0..kills() {
        let cell = Cell::of(kill);
        let moment = Moment::random(setting.undisturbed(cell));
        let name = format!("into-{kill}");
        let into = setting.place.path(&name);
        eprintln!("kill {kill}: {cell} {moment:?}");
        let ended = setting.kill(cell, &name, moment);
        let whole = into.exists();
        tally.count(format!("{cell}: the other one exits {}", ended.code.unwrap_or(-1)), whole);
        check_survivor(cell, &ended, whole);
        if whole {
            setting.check_whole(cell.kind, &into);
        } else {
            if let Victim::Source = cell.victim {
                assert!(setting.place.partial(&name).is_empty(), "the receiver did not clear up");
            }
            setting.transfer(cell, &into, &[]);
        }
        // What a killed receiver left is gone.
        assert!(setting.place.partial(&name).is_empty());
        std::fs::remove_dir_all(&into).unwrap();
    }
    tally.print();
}
