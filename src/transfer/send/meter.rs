// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What a migration measures of itself, and what it shows of that.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use thiserror::Error;

use super::device_precopy::device_left;
use super::error::SendError;
use super::phases::Session;
use super::progress::{Progress, SourceProgress};
use super::rates::{Bandwidth, Pace, Reported, SourceRates, rate};
use crate::device::Estimate;
use crate::ledger::{Attribution, Chunk, Outstanding};
use crate::precopy::{Forecast, Observation};
use crate::source::SourceError;
use crate::tracker::{Tracker, TrackerError};
use crate::vm::Vm;

/// Bytes of device state per second, as the devices count it, that are read, put into base64 and JSON, checked, sent, and
/// taken apart again at the receiver. Rather too few: the text is a third longer, and no step of this overlaps another.
const STATE_BYTES_PER_SECOND: u64 = 150_000_000;

/// A source whose pages come back in every round, because a device's driver keeps them pinned.
#[derive(Debug, Error)]
#[error(
    "Pages that {id} reports stay pinned: they are sent in every round, and once more while the VM stands still"
)]
struct StandingPages {
    id: String,
}

/// Figures of one migration.
#[derive(Debug)]
pub(super) struct Measured {
    pub(super) rounds: u32,
    pub(super) back_outs: u32,
    pub(super) pace: Option<Pace>,
    /// End of the highest chunk sent so far: chunks of a round ascend, so no page from here on was sent yet.
    unsent_from: u64,
    /// Guest memory acknowledged in this round.
    pub(super) round_bytes: u64,
    /// Guest memory left out in this round.
    pub(super) round_skipped_bytes: u64,
    round_began: Instant,
    /// How long the last round took.
    pub(super) round_took: Duration,
    bandwidth: Bandwidth,
    dirty_rate: u64,
    collected: Instant,
    pub(super) source_rates: SourceRates,
    attribution_before: BTreeMap<String, Attribution>,
    /// As of the last look at everything.
    seen: Observation,
}

impl Measured {
    pub(super) fn new(attribution_before: BTreeMap<String, Attribution>, bandwidth_cap: Option<u64>) -> Self {
        let now = Instant::now();
        Self {
            rounds: 0,
            back_outs: 0,
            pace: bandwidth_cap.map(Pace::new),
            unsent_from: 0,
            round_bytes: 0,
            round_skipped_bytes: 0,
            round_began: now,
            round_took: Duration::ZERO,
            bandwidth: Bandwidth::default(),
            dirty_rate: 0,
            collected: now,
            source_rates: SourceRates::default(),
            attribution_before,
            seen: Observation::default(),
        }
    }

    /// Takes in that a chunk is about to be sent; returns whether none of its pages was before.
    pub(super) fn is_first_copy(&mut self, chunk: &Chunk) -> bool {
        let (Some(first), Some(last)) = (chunk.ranges().first(), chunk.ranges().last()) else { return true };
        let is_first = first.start() >= self.unsent_from;
        self.unsent_from = self.unsent_from.max(last.end());
        is_first
    }

    /// Takes in that the receiver has a chunk, and what of it was sent.
    pub(super) fn acknowledged(&mut self, sent_bytes: u64, skipped_bytes: u64) {
        self.round_bytes += sent_bytes;
        self.round_skipped_bytes += skipped_bytes;
        if let Some(pace) = &mut self.pace {
            pace.give_back(skipped_bytes);
        }
    }

    /// Takes in that every page of the round was acknowledged.
    pub(super) fn end_round(&mut self) {
        self.round_took = self.round_began.elapsed();
        self.bandwidth.record(self.round_bytes, self.round_skipped_bytes, self.round_took);
    }

    /// The bandwidth measured over whole rounds, or in the first one what it comes to so far.
    fn bandwidth(&self) -> u64 {
        match self.bandwidth.rate() {
            0 => rate(self.round_bytes, self.round_began.elapsed()),
            measured => measured,
        }
    }
}

impl<V: Vm> Session<'_, V> {
    pub(super) fn begin_round(&mut self) {
        self.measured.rounds += 1;
        self.measured.round_bytes = 0;
        self.measured.round_skipped_bytes = 0;
        self.measured.round_began = Instant::now();
        let round = self.measured.rounds;
        self.migration.update(|progress| progress.round = round);
    }

    /// The last look at everything, with what a round has changed since.
    pub(super) fn glance(&self) -> Observation {
        let Outstanding { pending_bytes, in_flight_bytes } = self.left();
        let (bandwidth, elapsed_ms) = (self.measured.bandwidth(), self.elapsed_ms());
        Observation { pending_bytes, in_flight_bytes, bandwidth, elapsed_ms, ..self.measured.seen }
    }

    /// Shows how a round goes on.
    pub(super) fn show_left(&mut self) {
        let seen = self.glance();
        self.migration.update(|progress| {
            progress.left_bytes = seen.pending_bytes + seen.in_flight_bytes;
            progress.bandwidth = seen.bandwidth;
            progress.expected_downtime_ms = seen.expected_downtime_ms();
        });
    }

    /// Begins to measure what the sources report, now that they are on.
    pub(super) fn start_measuring(&mut self) {
        self.measured.collected = Instant::now();
        self.look_at_sources(Duration::ZERO);
    }

    pub(super) fn elapsed_ms(&self) -> u64 {
        u64::try_from(self.began.elapsed().as_millis()).unwrap_or(u64::MAX)
    }

    pub(super) fn left(&self) -> Outstanding {
        self.undo.cursor.and_then(|cursor| self.look().outstanding(cursor)).unwrap_or_default()
    }

    /// Collects between two rounds, reads what devices hand out, and measures.
    pub(super) fn take_stock(&mut self) -> Result<Observation, SendError> {
        let collected_bytes = self.collect()?;
        let since = self.measured.collected.elapsed();
        self.measured.collected = Instant::now();
        self.look_at_sources(since);
        let standing_bytes = self.measured.source_rates.standing_bytes();
        self.measured.dirty_rate = rate(collected_bytes.saturating_sub(standing_bytes), since);
        self.step_device_precopy()?;
        let estimate = self.estimate_devices()?;
        Ok(self.observe_and_publish(estimate))
    }

    /// Asks devices once more what they have left, now that the switchover hangs on it.
    pub(super) fn look_again(&mut self) -> Result<Observation, SendError> {
        let estimate = self.estimate_devices_anew()?;
        Ok(self.observe_and_publish(estimate))
    }

    /// Puts all that is known together, and shows it.
    pub(super) fn observe_and_publish(&mut self, estimate: Estimate) -> Observation {
        let seen = self.observe(estimate);
        self.publish(&seen);
        seen
    }

    /// Collects, and returns the bytes that became pending by it: counted under one lock, since RAM may go before and after.
    pub(super) fn collect(&mut self) -> Result<u64, SendError> {
        let mut tracker = self.tracker()?;
        let pending = |tracker: &Tracker| {
            let left = self.undo.cursor.and_then(|cursor| tracker.outstanding(cursor));
            left.unwrap_or_default().pending_bytes
        };
        let before = pending(&tracker);
        let failures = tracker.collect();
        let collected_bytes = pending(&tracker) - before;
        drop(tracker);
        self.bear(failures)?;
        Ok(collected_bytes)
    }

    /// Goes on without what sources failed to report, all they cover being dirty; ends the migration where one is gone.
    pub(super) fn bear(&mut self, failures: Vec<SourceError>) -> Result<(), SendError> {
        for failure in failures {
            if self.look().is_fatal(&failure) {
                return Err(TrackerError::from(failure).into());
            }
            self.migration.degrade(failure);
        }
        Ok(())
    }

    fn look_at_sources(&mut self, since: Duration) {
        let tracker = self.look();
        let page_bytes = tracker.layout().host_page().bytes();
        let sources = tracker.attribution().zip(tracker.standing_bytes());
        let reported = sources.map(|((id, attribution), (_, standing_bytes))| {
            if standing_bytes > 0 {
                self.migration.degrade(StandingPages { id: id.to_owned() });
            }
            Reported { id, attribution, standing_bytes }
        });
        self.measured.source_rates.look(reported, page_bytes, since);
    }

    fn observe(&mut self, estimate: Estimate) -> Observation {
        let Outstanding { pending_bytes, in_flight_bytes } = self.left();
        Observation {
            pending_bytes: pending_bytes.saturating_add(self.still_unreported()),
            standing_bytes: self.measured.source_rates.standing_bytes().min(pending_bytes),
            in_flight_bytes,
            bandwidth: self.measured.bandwidth(),
            dirty_rate: self.measured.dirty_rate,
            device: device_left(estimate),
            state_rate: STATE_BYTES_PER_SECOND,
            device_initial_bytes: estimate.initial_bytes,
            elapsed_ms: self.elapsed_ms(),
            rounds: self.measured.rounds,
            throttle_percent: self.undo.throttle_percent,
            back_outs: self.measured.back_outs,
        }
    }

    /// Bytes that imprecise sources will report once the VM stands still: part of what the downtime carries.
    fn still_unreported(&self) -> u64 {
        if self.undo.vm_paused.is_some() { 0 } else { self.look().imprecise_bytes() }
    }

    fn publish(&mut self, seen: &Observation) {
        self.measured.seen = *seen;
        let forecast = Forecast::new(&self.policy, seen, &self.measured.source_rates.rates());
        let sources = self.attribution();
        self.migration.update(|progress| {
            *progress = Progress {
                left_bytes: seen.pending_bytes + seen.in_flight_bytes,
                bandwidth: seen.bandwidth,
                dirty_rate: seen.dirty_rate,
                expected_downtime_ms: seen.expected_downtime_ms(),
                throttle_percent: seen.throttle_percent,
                sources,
                forecast,
                ..std::mem::take(progress)
            };
        });
    }

    /// What each source reported since this attempt began.
    pub(super) fn attribution(&self) -> Vec<SourceProgress> {
        let tracker = self.look();
        let before = |id: &str| self.measured.attribution_before.get(id).copied().unwrap_or_default();
        let sources = tracker.attribution().map(|(id, now)| (id, now.since(before(id))));
        sources.map(|(id, attribution)| SourceProgress { id: id.to_owned(), attribution }).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::precopy::DeviceLeft;

    #[test]
    fn a_state_of_64_mib_is_known_to_exceed_300_ms_on_any_connection() {
        for bandwidth in [1, 100 << 20, 1 << 30, u64::MAX] {
            let device = DeviceLeft::Exact(64 << 20);
            let seen = Observation {
                bandwidth,
                device,
                state_rate: STATE_BYTES_PER_SECOND,
                ..Observation::default()
            };
            assert!(
                seen.expected_downtime_ms() > Some(400),
                "{bandwidth}: {:?}",
                seen.expected_downtime_ms()
            );
        }
    }
}
