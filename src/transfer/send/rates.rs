// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What rounds measure: bandwidth and dirty rates. No clock here.

use std::time::Duration;

use crate::ledger::Attribution;
use crate::precopy::SourceRate;

/// Bytes below which a round's time says more about latency than about bandwidth.
const TELLING_BYTES: u64 = 1 << 20;

/// Weight of the past against a new round of the same length.
const PAST_WEIGHT: f64 = 0.5;

/// Bandwidth over the last rounds; a long round weighs more than a short one.
#[derive(Debug, Default)]
pub(super) struct Bandwidth {
    bytes: f64,
    seconds: f64,
    telling: bool,
}

impl Bandwidth {
    /// Takes in that within `time` `bytes` were sent and acknowledged, and `skipped_bytes` were looked at and left out.
    ///
    /// A round that looked more than it sent says little about the connections.
    pub(super) fn record(&mut self, bytes: u64, skipped_bytes: u64, time: Duration) {
        let telling = bytes >= TELLING_BYTES && bytes >= skipped_bytes;
        if bytes == 0 || (self.telling && !telling) {
            return;
        }
        let past = if self.telling == telling { PAST_WEIGHT } else { 0.0 };
        self.bytes = self.bytes * past + to_float(bytes);
        self.seconds = self.seconds * past + time.as_secs_f64();
        self.telling = telling;
    }

    /// Bytes per second; 0 while nothing was measured.
    pub(super) fn rate(&self) -> u64 {
        if self.bytes == 0.0 { 0 } else { to_rate(self.bytes / self.seconds.max(1e-6)) }
    }
}

/// Bytes per second for `bytes` in `time`; 0 where no time has passed.
pub(super) fn rate(bytes: u64, time: Duration) -> u64 {
    if time.is_zero() { 0 } else { to_rate(to_float(bytes) / time.as_secs_f64()) }
}

#[expect(clippy::cast_precision_loss, reason = "rates need no more than 52 bits")]
pub(super) fn to_float(bytes: u64) -> f64 {
    bytes as f64
}

#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "saturates, and is not negative")]
fn to_rate(rate: f64) -> u64 {
    rate as u64
}

#[derive(Debug)]
struct SourceMeter {
    id: String,
    last: Attribution,
    standing_bytes: u64,
    dirty_rate: u64,
    exclusive_dirty_rate: u64,
}

/// What one source has reported, and which of it comes back in every report.
#[derive(Debug, Clone, Copy)]
pub(super) struct Reported<'a> {
    pub(super) id: &'a str,
    pub(super) attribution: Attribution,
    pub(super) standing_bytes: u64,
}

impl SourceMeter {
    fn new(id: &str, last: Attribution) -> Self {
        Self { id: id.to_owned(), last, standing_bytes: 0, dirty_rate: 0, exclusive_dirty_rate: 0 }
    }
}

/// How fast each source dirties memory, from what it had reported at two looks.
#[derive(Debug, Default)]
pub(super) struct SourceRates {
    meters: Vec<SourceMeter>,
}

impl SourceRates {
    /// Takes a look: `now` is what each source has reported; the look before lies `time` back. What comes back in every report
    /// is no rate: it comes as often as it is asked for.
    pub(super) fn look<'a>(
        &mut self,
        now: impl Iterator<Item = Reported<'a>>,
        page_bytes: u64,
        time: Duration,
    ) {
        let mut before = std::mem::take(&mut self.meters);
        for Reported { id, attribution, standing_bytes } in now {
            let known = before.iter().position(|meter| meter.id == id).map(|at| before.swap_remove(at));
            let mut meter = known.unwrap_or_else(|| SourceMeter::new(id, attribution));
            let moving = |pages: u64| rate((pages * page_bytes).saturating_sub(standing_bytes), time);
            let since = attribution.since(meter.last);
            meter.dirty_rate = moving(since.pages);
            meter.exclusive_dirty_rate = moving(since.exclusive_pages);
            (meter.last, meter.standing_bytes) = (attribution, standing_bytes);
            self.meters.push(meter);
        }
    }

    /// Bytes that come back in every report, of all sources.
    pub(super) fn standing_bytes(&self) -> u64 {
        self.meters.iter().map(|meter| meter.standing_bytes).sum()
    }

    /// The rates between the last two looks.
    pub(super) fn rates(&self) -> Vec<SourceRate<'_>> {
        let meters = self.meters.iter();
        meters
            .map(|meter| SourceRate {
                id: &meter.id,
                dirty_rate: meter.dirty_rate,
                exclusive_dirty_rate: meter.exclusive_dirty_rate,
                standing_bytes: meter.standing_bytes,
            })
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_short_round_does_not_spoil_a_measured_bandwidth() {
        let mut bandwidth = Bandwidth::default();
        bandwidth.record(4096, 0, Duration::from_millis(1));
        assert_eq!(bandwidth.rate(), 4_096_000);
        bandwidth.record(1 << 30, 0, Duration::from_secs(1));
        assert_eq!(bandwidth.rate(), 1 << 30);
        bandwidth.record(4096, 0, Duration::from_secs(1));
        assert_eq!(bandwidth.rate(), 1 << 30);
    }

    #[test]
    fn a_round_that_skipped_most_gives_way_to_any_that_did_not() {
        let mut bandwidth = Bandwidth::default();
        bandwidth.record(4 << 20, 4 << 30, Duration::from_secs(2));
        assert_eq!(bandwidth.rate(), 2 << 20);
        bandwidth.record(4 << 20, 0, Duration::from_millis(4));
        assert_eq!(bandwidth.rate(), 1000 << 20);
    }

    #[test]
    fn bandwidth_follows_the_last_rounds() {
        let mut bandwidth = Bandwidth::default();
        bandwidth.record(1 << 30, 0, Duration::from_secs(1));
        for _ in 0..20 {
            bandwidth.record(1 << 30, 0, Duration::from_secs(4));
        }
        assert!(bandwidth.rate().abs_diff(1 << 28) < 1 << 10);
        assert_eq!(Bandwidth::default().rate(), 0);
    }

    #[test]
    fn source_rates_tell_what_came_since_the_last_look() {
        let mut rates = SourceRates::default();
        let seen = |pages, exclusive_pages| {
            let attribution = Attribution { pages, exclusive_pages };
            [Reported { id: "a", attribution, standing_bytes: 0 }].into_iter()
        };
        rates.look(seen(1000, 1000), 4096, Duration::from_secs(1));
        rates.look(seen(1020, 1005), 4096, Duration::from_secs(2));
        let expected =
            SourceRate { id: "a", dirty_rate: 10 * 4096, exclusive_dirty_rate: 5 * 2048, standing_bytes: 0 };
        assert_eq!(rates.rates(), [expected]);
    }

    #[test]
    fn c54_what_comes_back_in_every_round_is_no_rate() {
        let mut rates = SourceRates::default();
        let seen = |pages| {
            let attribution = Attribution { pages, exclusive_pages: pages };
            [Reported { id: "a", attribution, standing_bytes: 100 * 4096 }].into_iter()
        };
        rates.look(seen(100), 4096, Duration::ZERO);
        rates.look(seen(202), 4096, Duration::from_millis(1));
        let rate = rates.rates()[0];
        assert_eq!((rate.dirty_rate, rate.standing_bytes), (2 * 4096 * 1000, 100 * 4096));
        assert_eq!(rates.standing_bytes(), 100 * 4096);
    }
}
