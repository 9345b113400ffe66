// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Compares the ways to learn of a KVM guest's writes, on this host's KVM.

use std::io::{self, Write};
use std::process::ExitCode;
use std::time::Duration;

use clap::Parser;
use vfio_migration_integration::kvm_modes::{Tracking, drain, pages_per_cpu_second, pages_per_round};
use vfio_migration_integration::vmm::probe_kvm;

/// Compares the ways to learn of a KVM guest's writes: pages sent again, time of a drain, vCPU time lost.
///
/// Exits 77 where there is no KVM.
#[derive(Debug, Parser)]
struct Arguments {
    /// Pages a second that the guest writes while pages sent again are counted.
    #[arg(long, default_value_t = 3_600, value_name = "PAGES")]
    rate: u32,
    /// Rounds of a quarter of a second, of which the mean is told.
    #[arg(long, default_value_t = 20, value_name = "N")]
    rounds: u32,
    /// Comparisons of the vCPU's speed, each of all ways in turn, of which the median is told.
    #[arg(long, default_value_t = 5, value_name = "N")]
    runs: usize,
}

/// RAM of the guest whose pages are counted; it walks over 4 MiB of them, at the default rate every 0.3 s.
const COUNTED_RAM_BYTES: u64 = 16 << 20;
/// RAM of the guest whose speed is measured; it walks over 36 MiB.
const RAM_BYTES: u64 = 256 << 20;
/// RAM of the guest whose log is drained, most of it unpopulated.
const DRAINED_RAM_BYTES: u64 = 16 << 30;
const DRAINS: usize = 101;
/// How long each measures the vCPU's speed.
const SPELL: Duration = Duration::from_secs(1);

fn main() -> anyhow::Result<ExitCode> {
    let arguments = Arguments::parse();
    let mut out = io::stdout().lock();
    if let Err(error) = probe_kvm() {
        writeln!(out, "No KVM here: {error}")?;
        return Ok(ExitCode::from(77));
    }
    let speeds = speeds(arguments.runs.max(1))?;
    writeln!(
        out,
        "{:<16} {:>14} {:>12} {:>14} {:>12} {:>18}",
        "", "written/round", "sent/round", "pages drained", "drain in us", "vCPU time lost"
    )?;
    for (tracking, lost) in Tracking::ALL.into_iter().zip(speeds) {
        let sent = pages_per_round(tracking, COUNTED_RAM_BYTES, arguments.rate, arguments.rounds.max(1))?;
        let drain = drain(tracking, DRAINED_RAM_BYTES, DRAINS)?;
        writeln!(
            out,
            "{tracking:<16} {:>14} {:>12} {:>14} {:>12} {:>16.1} %",
            sent.written,
            sent.sent,
            drain.pages,
            drain.took.as_micros(),
            lost * 100.0
        )?;
    }
    Ok(ExitCode::SUCCESS)
}

/// The share of its time that the vCPU loses in each way, compared with no tracking at all: medians of so many `runs`.
fn speeds(runs: usize) -> anyhow::Result<[f64; Tracking::ALL.len()]> {
    let mut lost = Tracking::ALL.map(|_| Vec::with_capacity(runs));
    for _ in 0..runs {
        let free = pages_per_cpu_second(None, RAM_BYTES, SPELL)?;
        for (tracking, lost) in Tracking::ALL.into_iter().zip(&mut lost) {
            lost.push(1.0 - pages_per_cpu_second(Some(tracking), RAM_BYTES, SPELL)? / free);
        }
    }
    Ok(lost.map(|mut lost| {
        lost.sort_unstable_by(f64::total_cmp);
        lost[runs / 2]
    }))
}
