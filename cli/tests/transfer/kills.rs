// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Either side killed at any moment: what lies on disk is whole or not there, and a retry succeeds.

use std::hash::{BuildHasher, RandomState};
use std::path::Path;
use std::time::{Duration, Instant};

use crate::stored::{Place, assert_same, assert_sound};
use crate::tool::Tool;

/// How many kills to try, where this variable says so.
const KILLS: &str = "VFIO_MIGRATE_TEST_KILLS";

/// Kills tried otherwise.
const FEW: u32 = 6;

/// Options that make a transfer last a while: a chance for each of its moments.
const SLOW: [&str; 2] = ["--bandwidth", "100M"];

#[derive(Debug, Clone, Copy)]
enum Victim {
    Source,
    Receiver,
}

/// Kills `victim` at a moment of a transfer to `into`; both sides end.
fn kill_one(url: &str, from: &Path, into: &Path, victim: Victim, moment: Duration) {
    let (mut receiver, url) = Tool::receive(url, into, &[]);
    let mut source = Tool::send(&url, from, &SLOW);
    std::thread::sleep(moment);
    match victim {
        Victim::Source => {
            source.kill();
            source.end();
            // Before its first message a source is none, and the receiver waits for another.
            if !receiver.ends_within(Duration::from_secs(2)) {
                receiver.signal("-TERM");
            }
            let code = receiver.end().code;
            assert!([Some(0), Some(3), Some(6), Some(130)].contains(&code), "{code:?}");
        }
        Victim::Receiver => {
            receiver.kill();
            receiver.end();
            let code = source.end().code;
            assert!([Some(0), Some(3), Some(6)].contains(&code), "{code:?}");
        }
    }
}

/// From 0 to 1, another one each time.
fn random() -> f64 {
    let bits = RandomState::new().hash_one(0) >> 32;
    f64::from(u32::try_from(bits).unwrap()) / f64::from(u32::MAX)
}

/// Transfers `from` undisturbed; returns how long that takes from when a source may come.
fn transfer(url: &str, from: &Path, into: &Path, options: &[&str]) -> Duration {
    let (receiver, url) = Tool::receive(url, into, &[]);
    let begun = Instant::now();
    Tool::send(&url, from, options).end().succeeded();
    receiver.end().succeeded();
    assert_same(from, into);
    begun.elapsed()
}

#[test]
fn killed_at_any_moment_the_directory_is_whole_or_absent_and_a_retry_succeeds() {
    let kills = std::env::var(KILLS).map_or(FEW, |text| text.parse().unwrap());
    let place = Place::new();
    let from = place.stored("from", 1);
    let socket = format!("unix:{}", place.path("socket").display());
    let undisturbed = transfer(&socket, &from, &place.path("into"), &SLOW);
    let (mut whole, mut absent) = (0, 0);
    for kill in 0..kills {
        let into = place.path(&format!("into-{kill}"));
        let url = if kill % 4 < 2 { &socket } else { "tcp:127.0.0.1:0" };
        let victim = if kill % 2 == 0 { Victim::Source } else { Victim::Receiver };
        let moment = undisturbed.mul_f64(random());
        eprintln!("kill {kill}: {victim:?} after {moment:?}, {url}");
        kill_one(url, &from, &into, victim, moment);
        if into.exists() {
            whole += 1;
            assert_sound(&into);
            continue;
        }
        absent += 1;
        transfer(url, &from, &into, &[]);
        // What a killed receiver left is gone.
        let name = format!(".into-{kill}.partial-");
        let left = place.root().read_dir().unwrap().map(|entry| entry.unwrap().file_name());
        assert_eq!(left.filter(|left| left.to_string_lossy().starts_with(&name)).count(), 0);
    }
    eprintln!("{whole} kept whole, {absent} absent");
}
