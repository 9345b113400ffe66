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
//! Further parts, each told by its file: `kvm`, the log of a real VM; `traits`, a VMM's own loop; `own`, the VMM's bitmap; `scale`,
//! from 1 GiB to 16 TiB, of which `--svg FILE` makes a picture.
//!
//! Medians are compared within one run only. `cargo bench --bench dirty_path` does every pattern and part; names pick some;
//! `--json` prints one JSON document. A limit that is missed is told, not failed on.

#![expect(clippy::unwrap_used, reason = "a benchmark that cannot go on ends")]
#![expect(clippy::print_stdout, reason = "figures are what a benchmark is for")]
#![expect(clippy::cast_precision_loss, reason = "figures are rounded anyway")]
#![expect(unsafe_code, reason = "a VM of its own, and counting what is allocated")]
#![expect(clippy::print_stderr, reason = "what cannot be measured is told")]
#![expect(clippy::cast_possible_truncation, reason = "bitmaps that fit in memory")]

mod contenders;
mod heap;
#[cfg(target_arch = "x86_64")]
mod kvm;
mod ours;
mod own;
mod pattern;
mod report;
mod scale;
mod traits;

use contenders::{floor, scalar, usual};
use ours::Ours;
use pattern::{Bits, Pattern};
use report::{Figures, Round, milliseconds};

/// What is measured beside the patterns.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Part {
    Kvm,
    Traits,
    Own,
    Scale,
}

impl Part {
    const ALL: [(&str, Self); 4] =
        [("kvm", Self::Kvm), ("traits", Self::Traits), ("own", Self::Own), ("scale", Self::Scale)];
}

struct Options {
    ram_gib: u64,
    runs: usize,
    json: bool,
    counted: bool,
    svg: Option<String>,
    patterns: Vec<Pattern>,
    parts: Vec<Part>,
}

impl Options {
    fn parse() -> Self {
        let mut options = Self {
            ram_gib: 1024,
            runs: 5,
            json: false,
            counted: false,
            svg: None,
            patterns: Vec::new(),
            parts: Vec::new(),
        };
        let mut arguments = std::env::args().skip(1);
        while let Some(argument) = arguments.next() {
            let mut number = || arguments.next().unwrap().parse().unwrap();
            match argument.as_str() {
                "--ram-gib" => options.ram_gib = number(),
                "--runs" => options.runs = number() as usize,
                "--json" => options.json = true,
                "--counted" => options.counted = true,
                "--svg" => options.svg = arguments.next(),
                "--bench" => {}
                name => match Part::ALL.into_iter().find(|(part, _)| *part == name) {
                    Some((_, part)) => options.parts.push(part),
                    None => {
                        let pattern =
                            Pattern::named(name).unwrap_or_else(|| panic!("no pattern or part {name}"));
                        options.patterns.push(pattern);
                    }
                },
            }
        }
        if options.patterns.is_empty() && options.parts.is_empty() {
            options.patterns = Pattern::ALL.to_vec();
            options.parts = Part::ALL.map(|(_, part)| part).to_vec();
        }
        options
    }
}

/// Measures the parts that were asked for; returns what goes into the document.
fn measure_parts(options: &Options) -> (Vec<serde_json::Value>, Vec<serde_json::Value>) {
    let mut lines = Vec::new();
    let mut tell = |of: Vec<report::Line>| {
        if !options.json {
            of.iter().for_each(|line| println!("{line}"));
        }
        lines.extend(of.iter().map(report::Line::to_json));
    };
    let (has, runs, ram_bytes) = (|part| options.parts.contains(&part), options.runs, options.ram_gib << 30);
    if has(Part::Traits) {
        for share in [Pattern::Random(10), Pattern::Random(100), Pattern::Random(1000)] {
            tell(vec![traits::measure(share, ram_bytes, runs)]);
        }
    }
    if has(Part::Own) {
        tell(own::measure(runs));
    }
    #[cfg(target_arch = "x86_64")]
    if has(Part::Kvm) {
        tell(kvm::measure(runs));
    }
    let mut points = Vec::new();
    if has(Part::Scale) {
        points = scale::measure(runs, 16 * options.ram_gib, |point| {
            if !options.json {
                point.print();
            }
        });
        if let Some(file) = &options.svg {
            std::fs::write(file, scale::picture(&points)).unwrap();
        }
    }
    (lines, points.iter().map(scale::Point::to_json).collect())
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
    if !options.json && !options.patterns.is_empty() {
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
    let (lines, scale) = measure_parts(&options);
    if options.json {
        println!(
            "{}",
            serde_json::json!({ "ram_gib": options.ram_gib, "runs": options.runs, "patterns": all, "parts": lines, "scale": scale })
        );
    }
}
