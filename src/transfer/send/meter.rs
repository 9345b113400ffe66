// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Figures of one migration, and what is shown of them; nothing here acts.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use super::device_precopy::DevicesLeft;
use super::progress::{Progress, SenderHandle, SourceProgress};
use super::rates::{Bandwidth, Reported, SourceRates, rate};
use super::restorable_vm::Standing;
use super::tracking::Tracking;
use crate::device::{Basis, Estimate, StateRead};
use crate::ledger::{Attribution, Outstanding};
use crate::precopy::{DeviceLeft, Forecast, Observation, Policy, SourceRate};

/// Bytes of device state per second, as the devices count it, that are read, put into base64 and JSON, checked, sent, and
/// taken apart again at the receiver. Rather too few: the text is a third longer, and no step of this overlaps another.
const STATE_BYTES_PER_SECOND: u64 = 150_000_000;

/// The same of states that are streams of their own, as long as nothing was measured: bytes that are read, sent and written, all of it at
/// the same time.
const STREAM_BYTES_PER_SECOND: u64 = 400_000_000;

/// Bytes of device state whose time says how fast devices hand it out.
const TELLING_STREAM_BYTES: u64 = 8 << 20;

/// Counts rounds, measures rates, and shows both as the migration's progress.
#[derive(Debug)]
pub(super) struct Meter<'a> {
    migration: &'a SenderHandle,
    policy: Policy,
    began: Instant,
    rounds: u32,
    back_outs: u32,
    /// Guest memory acknowledged in this round.
    round_bytes: u64,
    /// Guest memory left out in this round.
    round_skipped_bytes: u64,
    /// Device state acknowledged in this round, as streams of its own.
    round_device_bytes: u64,
    /// How fast streams were read; `None` where states are in State.
    stream_rate: Option<u64>,
    round_began: Instant,
    /// How long the last round took.
    round_took: Duration,
    bandwidth: Bandwidth,
    dirty_rate: u64,
    collected: Instant,
    source_rates: SourceRates,
    attribution_before: BTreeMap<String, Attribution>,
    /// As of the last look at everything.
    seen: Observation,
}

impl<'a> Meter<'a> {
    /// Begins with what the sources have reported already.
    pub(super) fn new(migration: &'a SenderHandle, policy: Policy, tracking: &Tracking<'_>) -> Self {
        let tracker = tracking.look();
        let before = tracker.attribution().map(|(id, pages)| (id.to_owned(), pages)).collect();
        let now = Instant::now();
        Self {
            migration,
            policy,
            began: now,
            rounds: 0,
            back_outs: 0,
            round_bytes: 0,
            round_skipped_bytes: 0,
            round_device_bytes: 0,
            stream_rate: None,
            round_began: now,
            round_took: Duration::ZERO,
            bandwidth: Bandwidth::default(),
            dirty_rate: 0,
            collected: now,
            source_rates: SourceRates::default(),
            attribution_before: before,
            seen: Observation::default(),
        }
    }

    pub(super) fn rounds(&self) -> u32 {
        self.rounds
    }

    /// Counts a switchover that was taken back.
    pub(super) fn count_back_out(&mut self) {
        self.back_outs += 1;
    }

    /// Guest memory acknowledged in this round, in bytes.
    pub(super) fn round_bytes(&self) -> u64 {
        self.round_bytes
    }

    /// Guest memory left out in this round, in bytes.
    pub(super) fn round_skipped_bytes(&self) -> u64 {
        self.round_skipped_bytes
    }

    /// How long the last round took.
    pub(super) fn round_took(&self) -> Duration {
        self.round_took
    }

    /// How fast each source dirties memory.
    pub(super) fn source_rates(&self) -> Vec<SourceRate<'_>> {
        self.source_rates.rates()
    }

    /// Time since the migration began.
    pub(super) fn elapsed(&self) -> Duration {
        self.began.elapsed()
    }

    pub(super) fn elapsed_ms(&self) -> u64 {
        u64::try_from(self.elapsed().as_millis()).unwrap_or(u64::MAX)
    }

    pub(super) fn begin_round(&mut self) {
        self.rounds += 1;
        self.round_bytes = 0;
        self.round_skipped_bytes = 0;
        self.round_device_bytes = 0;
        self.round_began = Instant::now();
        let round = self.rounds;
        self.migration.update(|progress| progress.round = round);
    }

    /// Takes in that the receiver has a chunk, and what of it was sent.
    pub(super) fn acknowledged(&mut self, sent_bytes: u64, skipped_bytes: u64) {
        self.round_bytes += sent_bytes;
        self.round_skipped_bytes += skipped_bytes;
    }

    /// Takes in that states are streams of their own.
    pub(super) fn expect_streams(&mut self) {
        self.stream_rate = Some(STREAM_BYTES_PER_SECOND);
    }

    /// Takes in that the receiver has a piece of a device's state.
    pub(super) fn piece_acknowledged(&mut self, state_bytes: u64) {
        self.round_device_bytes += state_bytes;
    }

    /// Takes in what devices handed out in this round: a turn that is long enough tells how fast they do.
    pub(super) fn read_devices(&mut self, reads: &[StateRead]) {
        let bytes = reads.iter().map(StateRead::bytes).sum();
        let took = reads.iter().map(|read| read.took).max().unwrap_or_default();
        if bytes >= TELLING_STREAM_BYTES {
            self.stream_rate = self.stream_rate.map(|_| rate(bytes, took));
        }
    }

    /// Takes in that every page of the round was acknowledged.
    pub(super) fn end_round(&mut self) {
        self.round_took = self.round_began.elapsed();
        let bytes = self.round_bytes + self.round_device_bytes;
        self.bandwidth.record(bytes, self.round_skipped_bytes, self.round_took);
    }

    /// The bandwidth measured over whole rounds, or in the first one what it comes to so far.
    fn bandwidth(&self) -> u64 {
        match self.bandwidth.rate() {
            0 => rate(self.round_bytes, self.round_began.elapsed()),
            measured => measured,
        }
    }

    /// Begins to measure what the sources report, now that they are on.
    pub(super) fn start(&mut self, tracking: &Tracking<'_>) {
        self.collected = Instant::now();
        self.look_at_sources(tracking, Duration::ZERO);
    }

    /// Takes in that a collect has made so many bytes pending.
    pub(super) fn collected(&mut self, tracking: &Tracking<'_>, collected_bytes: u64) {
        let since = self.collected.elapsed();
        self.collected = Instant::now();
        self.look_at_sources(tracking, since);
        let standing_bytes = self.source_rates.standing_bytes();
        self.dirty_rate = rate(collected_bytes.saturating_sub(standing_bytes), since);
    }

    fn look_at_sources(&mut self, tracking: &Tracking<'_>, since: Duration) {
        let tracker = tracking.look();
        let page_bytes = tracker.layout().host_page().bytes();
        let sources = tracker.attribution().zip(tracker.standing_bytes());
        let reported = sources.map(|((id, attribution), (_, standing_bytes))| Reported {
            id,
            attribution,
            standing_bytes,
        });
        self.source_rates.look(reported, page_bytes, since);
    }

    /// The last look at everything, with what a round has changed since.
    pub(super) fn glance(&self, tracking: &Tracking<'_>) -> Observation {
        let Outstanding { pending_bytes, in_flight_bytes } = tracking.left();
        let (bandwidth, elapsed_ms) = (self.bandwidth(), self.elapsed_ms());
        Observation { pending_bytes, in_flight_bytes, bandwidth, elapsed_ms, ..self.seen }
    }

    /// Shows how a round goes on.
    pub(super) fn show_left(&self, tracking: &Tracking<'_>) {
        let seen = self.glance(tracking);
        self.migration.update(|progress| progress.seen = seen);
    }

    /// Puts all that is known together, and shows it.
    pub(super) fn observe(
        &mut self,
        tracking: &Tracking<'_>,
        vm: Standing,
        devices: &DevicesLeft,
    ) -> Observation {
        let Outstanding { pending_bytes, in_flight_bytes } = tracking.left();
        // What imprecise sources will report once the VM stands still is part of what the downtime carries.
        let unreported_bytes = if vm.is_paused { 0 } else { tracking.look().imprecise_bytes() };
        self.seen = Observation {
            pending_bytes: pending_bytes.saturating_add(unreported_bytes),
            standing_bytes: self.source_rates.standing_bytes().min(pending_bytes),
            in_flight_bytes,
            bandwidth: self.bandwidth(),
            dirty_rate: self.dirty_rate,
            device: device_left(devices.estimate, self.stream_rate.is_some()),
            state_rate: self.stream_rate.unwrap_or(STATE_BYTES_PER_SECOND),
            device_initial_bytes: devices.estimate.initial_bytes,
            device_early_bytes: devices.estimate.early_bytes,
            elapsed_ms: self.elapsed_ms(),
            rounds: self.rounds,
            throttle_percent: vm.throttle_percent,
            back_outs: self.back_outs,
        };
        self.show(tracking, &devices.largest);
        self.seen
    }

    fn show(&self, tracking: &Tracking<'_>, device: &str) {
        let seen = self.seen;
        let forecast = Forecast::new(&self.policy, &seen, &self.source_rates.rates(), device);
        let sources = self.attribution(tracking);
        self.migration.update(|progress| {
            *progress = Progress { seen, sources, forecast, ..std::mem::take(progress) };
        });
    }

    /// What each source reported since this attempt began.
    pub(super) fn attribution(&self, tracking: &Tracking<'_>) -> Vec<SourceProgress> {
        let tracker = tracking.look();
        let before = |id: &str| self.attribution_before.get(id).copied().unwrap_or_default();
        let sources = tracker.attribution().map(|(id, now)| (id, now.since(before(id))));
        sources.map(|(id, attribution)| SourceProgress { id: id.to_owned(), attribution }).collect()
    }
}

/// What the downtime will carry of the devices: what is left of streams; of states in State all, what PRE_COPY brought too.
fn device_left(estimate: Estimate, streams: bool) -> DeviceLeft {
    let bytes = if streams { estimate.stop_copy_bytes } else { estimate.state_bytes };
    match estimate.basis {
        Basis::Told => DeviceLeft::Exact(bytes),
        Basis::Guessed => DeviceLeft::Estimate(bytes),
        Basis::Unknown => DeviceLeft::Unknown,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
