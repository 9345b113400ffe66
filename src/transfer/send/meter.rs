// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Figures of one migration, and what is shown of them; nothing here acts.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use super::device_precopy::DevicesLeft;
use super::progress::{Progress, SenderHandle, SourceProgress};
use super::rates::{Bandwidth, Reported, SourceRates, rate};
use super::restorable_vm::Standing;
use super::tracking::Tracking;
use crate::device::{Basis, Estimate, StateRead, StreamLeft};
use crate::ledger::{Attribution, Outstanding};
use crate::precopy::{DeviceLeft, Forecast, Observation, Policy, SourceRate};

/// Bytes of device state per second, as the devices count it, that are read, put into base64 and JSON, checked, sent, and
/// taken apart again at the receiver. Rather too few: the text is a third longer, and no step of this overlaps another.
const STATE_BYTES_PER_SECOND: u64 = 150_000_000;

/// The same of states that are streams of their own, as long as nothing was measured: bytes that are read, sent and written, all of it at
/// the same time.
const STREAM_BYTES_PER_SECOND: u64 = 400_000_000;

const NANOS: u128 = 1_000_000_000;

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
    /// How fast each device's stream was read and taken in, by its number; `None` where states are in State.
    stream_rates: Option<BTreeMap<u16, u64>>,
    round_began: Instant,
    /// What the receiver had of the round with the last of its memory, in bytes, and when: a slow device may go on alone.
    carried: (u64, Instant),
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
            stream_rates: None,
            round_began: now,
            carried: (0, now),
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
        self.carried = (0, self.round_began);
        let round = self.rounds;
        self.migration.update(|progress| progress.round = round);
    }

    /// Takes in that the receiver has a chunk, and what of it was sent.
    pub(super) fn acknowledged(&mut self, sent_bytes: u64, skipped_bytes: u64) {
        self.round_bytes += sent_bytes;
        self.round_skipped_bytes += skipped_bytes;
        self.carried = (self.round_bytes + self.round_device_bytes, Instant::now());
    }

    /// Takes in that states are streams of their own.
    pub(super) fn expect_streams(&mut self) {
        self.stream_rates = Some(BTreeMap::new());
    }

    /// Takes in that the receiver has a piece of a device's state.
    pub(super) fn piece_acknowledged(&mut self, state_bytes: u64) {
        self.round_device_bytes += state_bytes;
    }

    /// Takes in what devices handed out in this round: a turn that is long enough tells how fast each of them does.
    pub(super) fn read_devices(&mut self, reads: &[StateRead]) {
        let Some(rates) = &mut self.stream_rates else { return };
        rates.extend(reads.iter().filter_map(|read| Some((read.device(), read.telling_rate()?))));
    }

    /// Takes in that every page of the round was acknowledged.
    pub(super) fn end_round(&mut self) {
        self.round_took = self.round_began.elapsed();
        let (bytes, at) = self.carried;
        let took = at.saturating_duration_since(self.round_began);
        self.bandwidth.record(bytes, self.round_skipped_bytes, took);
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
            device: device_left(devices.estimate, self.stream_rates.is_some()),
            state_rate: self.state_rate(devices, |left| left.bytes),
            late_state_rate: self.state_rate(devices, |left| left.bytes.saturating_sub(left.early_bytes)),
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

    /// Bytes of device state per second, where `bytes` of each stream are left.
    fn state_rate(&self, devices: &DevicesLeft, bytes: impl Fn(&StreamLeft) -> u64) -> u64 {
        let left = devices.streams.iter().map(|left| (left.number, bytes(left)));
        self.stream_rates.as_ref().map_or(STATE_BYTES_PER_SECOND, |rates| rate_of_streams(left, rates))
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

/// Bytes per second of all streams together, where so much is `left` of each: they go at the same time, so the one that takes longest says
/// how long all do.
fn rate_of_streams(left: impl Iterator<Item = (u16, u64)>, rates: &BTreeMap<u16, u64>) -> u64 {
    let rate_of = |number| rates.get(&number).copied().unwrap_or(STREAM_BYTES_PER_SECOND);
    let (mut total, mut longest) = (0, 0);
    for (number, bytes) in left {
        total += u128::from(bytes);
        longest = longest.max(u128::from(bytes) * NANOS / u128::from(rate_of(number)));
    }
    match longest {
        0 => STREAM_BYTES_PER_SECOND,
        nanos => u64::try_from(total * NANOS / nanos).unwrap_or(u64::MAX).max(1),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_slowest_stream_says_how_long_all_take() {
        let rates = BTreeMap::from([(0, 1 << 30), (1, 1 << 20)]);
        for (left, seconds) in [
            (vec![(0, 1 << 30), (1, 1 << 30)], 1024),
            (vec![(0, 1 << 30), (1, 0)], 1),
            (vec![(0, 0), (1, 3 << 20)], 3),
            (vec![(0, 8 << 30), (1, 1 << 20)], 8),
        ] {
            let total: u64 = left.iter().map(|(_, bytes)| bytes).sum();
            assert_eq!(total / rate_of_streams(left.iter().copied(), &rates), seconds, "{left:?}");
        }
        let unmeasured = rate_of_streams([(7, 1 << 30)].into_iter(), &rates);
        assert!(unmeasured.abs_diff(STREAM_BYTES_PER_SECOND) < 10, "{unmeasured}");
        assert_eq!(rate_of_streams([].into_iter(), &rates), STREAM_BYTES_PER_SECOND);
    }

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
