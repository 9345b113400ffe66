// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What a sender tells the log: a line for each phase and round at info, what led to it at debug, and nothing per chunk.

use std::fmt;

use super::error::{SendError, SourceVm};
use super::meter::Meter;
use super::options::SendOptions;
use super::progress::SourceProgress;
use super::rates::rate;
use super::sent::Sent;
use crate::error::Chain;
use crate::precopy::{Observation, SourceRate};
use crate::units::{Bytes, Count, Millis};

pub(super) fn began(options: &SendOptions, ram_bytes: u64) {
    let (url, connections) = (&options.url, options.connections);
    log::info!("Migrating a VM with {} of RAM to {url}, connections: {connections}", Bytes(ram_bytes));
}

pub(super) fn armed(sources: &[SourceProgress]) {
    let ids: Vec<_> = sources.iter().map(|source| source.id.as_str()).collect();
    let ids = if ids.is_empty() { "nothing".to_owned() } else { ids.join(", ") };
    log::info!("Receiver takes the VM; tracking dirty pages with {ids}");
}

/// Tells what a round of the running VM did, and what it is up against.
pub(super) fn round(meter: &Meter<'_>, seen: &Observation) {
    log::info!(
        "Round {}: {}, left out {}; {} dirty now at {}/s{}; expected downtime {}",
        meter.rounds(),
        Copied::of(meter),
        Bytes(meter.round_skipped_bytes()),
        Bytes(seen.pending_bytes),
        Bytes(seen.dirty_rate),
        WhoDirtied(&meter.source_rates()),
        ExpectedDowntime(seen),
    );
    log::debug!("{seen:?}");
}

/// Tells with what the VM and its devices came to a halt.
pub(super) fn stopped(meter: &Meter<'_>, seen: &Observation) {
    log::info!(
        "VM stopped after round {}: {} of memory left, dirty at {}/s{}; expected downtime {}",
        seen.rounds,
        Bytes(seen.pending_bytes),
        Bytes(seen.dirty_rate),
        WhoDirtied(&meter.source_rates()),
        ExpectedDowntime(seen),
    );
    log::debug!("{seen:?}");
}

pub(super) fn last_round(meter: &Meter<'_>) {
    log::info!("Round {}, the last one: {}", meter.rounds(), Copied::of(meter));
}

pub(super) fn outcome(outcome: &Result<Sent, SendError>, rounds: u32) {
    match outcome {
        Ok(sent) => log::info!(
            "VM moved: {} in {} and {}; downtime {}: {}",
            Bytes(sent.progress.sent_bytes),
            Count(&sent.progress.round, "round"),
            Millis(sent.total),
            Millis(sent.downtime),
            sent.downtime_parts,
        ),
        Err(error) if error.source_vm() == SourceVm::AsBefore => {
            log::info!(
                "VM did not move after {} and is as before: {}",
                Count(&rounds, "round"),
                Chain(error)
            );
        }
        Err(error) => log::error!("{}", Chain(error)),
    }
}

/// What a round sent, and how fast: `2.9 MiB in 12.0 ms (241.6 MiB/s)`.
struct Copied {
    bytes: u64,
    took: std::time::Duration,
}

impl Copied {
    fn of(meter: &Meter<'_>) -> Self {
        Self { bytes: meter.round_bytes(), took: meter.round_took() }
    }
}

impl fmt::Display for Copied {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let per_second = Bytes(rate(self.bytes, self.took));
        write!(f, "sent {} in {} ({per_second}/s)", Bytes(self.bytes), Millis(self.took))
    }
}

/// How fast each source dirties memory: ` (kvm-log 20.0 MiB/s, net0 3.0 MiB/s)`; nothing without sources.
struct WhoDirtied<'a>(&'a [SourceRate<'a>]);

impl fmt::Display for WhoDirtied<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (at, source) in self.0.iter().enumerate() {
            let before = if at == 0 { " (" } else { ", " };
            write!(f, "{before}{} {}/s", source.id, Bytes(source.dirty_rate))?;
        }
        f.write_str(if self.0.is_empty() { "" } else { ")" })
    }
}

struct ExpectedDowntime<'a>(&'a Observation);

impl fmt::Display for ExpectedDowntime<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0.expected_downtime_ms() {
            Some(ms) => write!(f, "{ms} ms"),
            None => f.write_str("unknown"),
        }
    }
}
