// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! How fast a VM moves over loopback, as ratios of two times taken in one run, one right after the other.
//!
//! - `throughput`: our sender to our receiver, against the same bytes through as many plain sockets; at least 0.8. With TLS
//!   against as many plain streams of TLS, at least 0.7.
//! - `memory`: the same into memory nobody has touched, allocated ahead of the bytes or by page faults, and into memory that is
//!   populated, with the processor time of both ends.
//! - `zeros`: a VM whose pages are all there and all zero, against reading them once; at least 0.8.
//! - `directories`: a snapshot directory to a snapshot directory, hashed and safe on disk, against its memory's file through as
//!   many plain sockets to a file that is safe on disk; at least 0.8, and with TLS only told.
//! - `sparse`: a VM with 64 MiB populated of 4 GiB of RAM, against the same VM fully populated; at most 0.05.
//! - `round_trip`: a snapshot of 4 GiB with holes through sender and receiver, every file the same to the byte, holes kept.
//!
//! `cargo bench --bench transfer` does all, `cargo bench --bench transfer -- sparse` one of them. Fails when a limit is missed.

#![expect(clippy::unwrap_used, reason = "a benchmark that cannot go on ends")]
#![expect(clippy::print_stdout, reason = "figures are what a benchmark is for")]
#![expect(clippy::cast_precision_loss, reason = "figures for people")]
#![expect(clippy::cast_possible_truncation, reason = "constants of a few pages")]

#[path = "../../tests/transfer/bare_tls.rs"]
mod bare_tls;
#[path = "../../tests/transfer/certificates.rs"]
#[expect(dead_code, reason = "certificates that fail are for the tests of TLS")]
mod certificates;
mod directories;
mod memory;
mod sparse;
mod throughput;
mod vm;
mod way;
mod zeros;

use std::process::ExitCode;
use std::time::Duration;

use way::Way;

/// Comparisons of which the median counts.
const RUNS: usize = 5;
const LEAST_RATIO: f64 = 0.8;
const LEAST_TLS_RATIO: f64 = 0.7;

/// What both ends do, as a share of what plain sockets do.
struct Race<'a> {
    bytes: u64,
    plain: &'a dyn Fn(Way) -> Duration,
    ours: &'a dyn Fn(Way) -> Duration,
    /// Whether `plain` encrypts where `ours` does.
    encrypts: bool,
}

impl Race<'_> {
    /// Takes both times again and again, and compares the median of their ratios with what is wanted of each way.
    fn is_won(&self) -> bool {
        let misses = Way::ALL.map(|way| {
            let ratio = median([(); RUNS].map(|()| self.ratio(way)));
            let least = match way {
                Way::Tls(_) if !self.encrypts => {
                    println!("  {way:<7}  median ratio {ratio:.2}, no limit: plain sockets do not encrypt");
                    return false;
                }
                Way::Tls(_) => LEAST_TLS_RATIO,
                _ => LEAST_RATIO,
            };
            println!("  {way:<7}  median ratio {ratio:.2}, at least {least} wanted");
            ratio < least
        });
        !misses.contains(&true)
    }

    fn ratio(&self, way: Way) -> f64 {
        let (plain, ours) = ((self.plain)(way), (self.ours)(way));
        let ratio = plain.as_secs_f64() / ours.as_secs_f64();
        println!(
            "  {way:<7}  plain {:.2} GiB/s  ours {:.2} GiB/s  ratio {ratio:.2}",
            gib_per_second(self.bytes, plain),
            gib_per_second(self.bytes, ours),
        );
        ratio
    }
}

fn median(mut figures: [f64; RUNS]) -> f64 {
    figures.sort_unstable_by(f64::total_cmp);
    figures[RUNS / 2]
}

fn gib_per_second(bytes: u64, time: Duration) -> f64 {
    bytes as f64 / f64::from(1 << 30) / time.as_secs_f64()
}

fn main() -> ExitCode {
    let wanted: Vec<_> = std::env::args().skip(1).filter(|argument| !argument.starts_with('-')).collect();
    let is_wanted = |name: &str| wanted.is_empty() || wanted.iter().any(|wanted| wanted == name);
    let benchmarks: [(_, fn() -> bool); 6] = [
        ("throughput", throughput::holds),
        ("memory", memory::holds),
        ("zeros", zeros::holds),
        ("directories", directories::holds),
        ("sparse", sparse::holds),
        ("round_trip", directories::come_back_the_same),
    ];
    let chosen = benchmarks.into_iter().filter(|(name, _)| is_wanted(name));
    // All of them, also when one misses its limit.
    let missed = chosen.filter(|(_, holds)| !holds()).count();
    if missed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
