// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What a round and its memory cost from 1 GiB of RAM to 16 TiB, and a picture of that.

use std::fmt::Write;

use vfio_migration::source::SummaryBitmap;
use vm_memory::bitmap::NewBitmap;

use crate::contenders::floor;
use crate::heap;
use crate::ours::Ours;
use crate::pattern::{Bits, Pattern};
use crate::report::median;

/// Sizes of RAM in GiB.
const SIZES: [u64; 8] = [1, 4, 16, 64, 256, 1 << 10, 4 << 10, 16 << 10];

/// The first and the last power of ten on the picture's vertical axis, of milliseconds and of MiB.
const DECADES: (i32, i32) = (-2, 4);

pub(crate) struct Point {
    gib: u64,
    share: Pattern,
    pub(crate) round_ms: f64,
    /// The library's heap: the tracker, its ledger and one cursor after two rounds.
    heap_bytes: usize,
}

impl Point {
    pub(crate) fn to_json(&self) -> serde_json::Value {
        serde_json::json!({
            "ram_gib": self.gib,
            "pattern": self.share.name(),
            "round_ms": self.round_ms,
            "heap_bytes": self.heap_bytes,
        })
    }

    pub(crate) fn print(&self) {
        let mib = self.heap_bytes as f64 / f64::from(1 << 20);
        println!(
            "scale {:>6} GiB {:>5} {:>10.3} ms {mib:>10.2} MiB",
            self.gib,
            self.share.name(),
            self.round_ms
        );
    }
}

/// Measures every size, at 0.1 % and at 1 %.
pub(crate) fn measure(runs: usize, most_gib: u64, mut each: impl FnMut(&Point)) -> Vec<Point> {
    let mut points = Vec::new();
    for share in [Pattern::Random(10), Pattern::Random(100)] {
        for gib in SIZES.into_iter().filter(|&gib| gib <= most_gib) {
            let point = point(share, gib, runs);
            each(&point);
            points.push(point);
        }
    }
    points
}

fn point(share: Pattern, gib: u64, runs: usize) -> Point {
    let bits = Bits::scattered(share, gib << 30);
    let before = heap::live();
    // The VMM's own bitmap is not the library's.
    let own = SummaryBitmap::with_len(bits.ram_bytes as usize);
    let own_bytes = heap::live() - before;
    drop(own);
    let mut ours = Ours::new(&bits);
    for _ in 0..2 {
        assert_eq!(ours.round(&bits).pages, bits.pages());
    }
    let heap_bytes = heap::live() - before - own_bytes;
    let rounds = (0..runs).map(|_| {
        floor(&bits);
        let spent = ours.round(&bits);
        spent.collect + spent.drain
    });
    Point { gib, share, round_ms: median(rounds), heap_bytes }
}

/// Draws all points: both axes are logarithmic.
pub(crate) fn picture(points: &[Point]) -> String {
    let (width, height, left, top) = (560.0, 360.0, 70.0, 20.0);
    let x = |gib: u64| left + (gib as f64).log2() / 14.0 * width;
    let (low, high) = (f64::from(DECADES.0), f64::from(DECADES.1));
    let y = |value: f64| top + (high - value.log10().clamp(low, high)) / (high - low) * height;
    let mut svg = String::new();
    let mut line = |text: std::fmt::Arguments<'_>| writeln!(svg, "{text}").unwrap();
    line(format_args!(
        r#"<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 860 440" font-family="sans-serif" font-size="12">"#
    ));
    line(format_args!(r#"<rect width="860" height="440" fill="white"/>"#));
    for decade in DECADES.0..=DECADES.1 {
        let at = y(10f64.powi(decade));
        line(format_args!(r##"<path d="M{left} {at:.1}H{}" stroke="#ddd"/>"##, left + width));
        let label = 10f64.powi(decade);
        line(format_args!(
            r#"<text x="{}" y="{:.1}" text-anchor="end">{label}</text>"#,
            left - 8.0,
            at + 4.0
        ));
    }
    for gib in SIZES {
        let label = if gib < 1024 { format!("{gib} GiB") } else { format!("{} TiB", gib >> 10) };
        line(format_args!(r##"<path d="M{:.1} {top}V{}" stroke="#eee"/>"##, x(gib), top + height));
        line(format_args!(
            r#"<text x="{:.1}" y="{}" text-anchor="middle">{label}</text>"#,
            x(gib),
            top + height + 18.0
        ));
    }
    line(format_args!(
        r#"<text x="{}" y="{}" text-anchor="middle">guest RAM</text>"#,
        left + width / 2.0,
        top + height + 38.0
    ));
    let mib = |point: &Point| point.heap_bytes as f64 / f64::from(1 << 20);
    let spots = |share: Pattern, value: &dyn Fn(&Point) -> f64| {
        let of = points.iter().filter(|point| point.share == share);
        let spots: Vec<_> = of.map(|point| format!("{:.1},{:.1}", x(point.gib), y(value(point)))).collect();
        spots.join(" ")
    };
    let (one, tenth) = (Pattern::Random(100), Pattern::Random(10));
    let series = [
        ("#c0392b", "round at 1 %, ms", spots(one, &|point| point.round_ms)),
        ("#e08e0b", "round at 0.1 %, ms", spots(tenth, &|point| point.round_ms)),
        ("#2471a3", "heap at 1 %, MiB", spots(one, &mib)),
        ("#7fb3d5", "heap at 0.1 %, MiB", spots(tenth, &mib)),
    ];
    for (index, (color, name, spots)) in series.into_iter().enumerate() {
        line(format_args!(r#"<polyline points="{spots}" fill="none" stroke="{color}" stroke-width="2"/>"#));
        let (at, end) = (top + 20.0 + 20.0 * index as f64, left + width + 20.0);
        line(format_args!(r#"<path d="M{end} {at}h24" stroke="{color}" stroke-width="2"/>"#));
        line(format_args!(r#"<text x="{}" y="{}">{name}</text>"#, end + 32.0, at + 4.0));
    }
    line(format_args!("</svg>"));
    svg
}
