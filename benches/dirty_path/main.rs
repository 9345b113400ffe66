// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What a round of dirty pages costs: everything between what the kernel handed over and the pages to read.
//!
//! A VM of 1 TiB (`--ram-gib` changes it; there is no memory behind it, only its bitmaps) has two logs, say KVM's and a device's,
//! and the bitmap of its VMM's own writes. Four contenders do a round over the same bits, one after the other, `--runs` times:
//!
//! - `floor`: both logs read once, every word OR-ed into one;
//! - `scalar`: the runs of one merged bitmap, added up; nothing is cleared, kept or counted;
//! - `ours`: collect from all three with attribution, take chunks of 4 MiB or 4096 ranges, commit each;
//! - `usual`: what VMMs do: copy the log, drain vm-memory's own bitmap, OR the two, make a table of ranges, and append that of the device.
//!
//! Each finds the logs as the kernel would leave them: just gone through, untimed, and so in a cache as far as they fit.
//!
//! `--counted` times nothing: it does one warm round of ours within `counted_round`, for a tool that counts instructions, see
//! `.ci/instructions`.
//!
//! Medians are compared within one run only. `cargo bench --bench dirty_path` does every pattern; names of patterns pick some;
//! `--json` prints one JSON document. A limit that is missed is told, not failed on.

#![expect(clippy::unwrap_used, reason = "a benchmark that cannot go on ends")]
#![expect(clippy::print_stdout, reason = "figures are what a benchmark is for")]
#![expect(clippy::cast_possible_truncation, reason = "bitmaps that fit in memory")]

mod contenders;
mod ours;
mod pattern;
mod report;

use contenders::{floor, scalar, usual};
use ours::Ours;
use pattern::{Bits, Pattern};
use report::{Figures, Round, milliseconds};

struct Options {
    ram_gib: u64,
    runs: usize,
    json: bool,
    counted: bool,
    patterns: Vec<Pattern>,
}

impl Options {
    fn parse() -> Self {
        let mut options = Self { ram_gib: 1024, runs: 5, json: false, counted: false, patterns: Vec::new() };
        let mut arguments = std::env::args().skip(1);
        while let Some(argument) = arguments.next() {
            let mut number = || arguments.next().unwrap().parse().unwrap();
            match argument.as_str() {
                "--ram-gib" => options.ram_gib = number(),
                "--runs" => options.runs = number() as usize,
                "--json" => options.json = true,
                "--counted" => options.counted = true,
                "--bench" => {}
                name => {
                    let pattern = Pattern::named(name).unwrap_or_else(|| panic!("no pattern {name}"));
                    options.patterns.push(pattern);
                }
            }
        }
        if options.patterns.is_empty() {
            options.patterns = Pattern::ALL.to_vec();
        }
        options
    }
}

/// Has every contender do its rounds, in turns.
fn measure(pattern: Pattern, bits: &Bits, runs: usize) -> Figures {
    let mut ours = Ours::new(bits);
    let warm = ours.round(bits);
    assert_eq!(warm.pages, bits.pages(), "a round brings just the pages of the pattern");
    assert!(ours.has(bits), "a round brings the pages of the pattern");
    assert!(contenders::usual_has(bits), "the usual way brings the same pages");
    // Whoever is next finds the logs where the kernel would have left them: as much in caches as fits.
    let timed = |contender: fn(&Bits)| {
        floor(bits);
        milliseconds(|| contender(bits))
    };
    let rounds: Vec<_> = (0..runs)
        .map(|_| {
            floor(bits);
            let ours = ours.round(bits);
            let (floor_ms, scalar_ms) = (timed(floor), timed(scalar));
            floor(bits);
            Round {
                floor: floor_ms,
                scalar: scalar_ms,
                collect: ours.collect,
                drain: ours.drain,
                usual: usual(bits).1,
            }
        })
        .collect();
    Figures::new(pattern, bits.pages(), &rounds)
}

/// One round of ours that has its memory already. A name of its own, to count between its start and its end.
#[inline(never)]
fn counted_round(ours: &mut Ours, bits: &Bits) -> u64 {
    ours.round(bits).pages
}

fn main() {
    let options = Options::parse();
    if options.counted {
        for &pattern in &options.patterns {
            let bits = Bits::new(pattern, options.ram_gib << 30);
            let mut ours = Ours::new(&bits);
            ours.round(&bits);
            assert_eq!(counted_round(&mut ours, &bits), bits.pages());
        }
        return;
    }
    let mut all = Vec::new();
    if !options.json {
        println!("{} GiB of RAM, medians of {}, milliseconds", options.ram_gib, options.runs);
        println!("{}", Figures::HEADER);
    }
    for &pattern in &options.patterns {
        let bits = Bits::new(pattern, options.ram_gib << 30);
        let figures = measure(pattern, &bits, options.runs);
        if !options.json {
            println!("{figures}");
        }
        all.push(figures.to_json());
    }
    if options.json {
        println!(
            "{}",
            serde_json::json!({ "ram_gib": options.ram_gib, "runs": options.runs, "patterns": all })
        );
    }
}
