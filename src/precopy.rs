// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Convergence: when to go on copying a running VM, when to stop it, and when to give up.
//!
//! Numbers in, decision out. No clock, no socket, no thread: the sender measures, asks, and carries out the decision.
//!
//! ```
//! use std::time::Duration;
//! use vfio_migration::precopy::*;
//! let policy = Policy { downtime: Duration::from_millis(300), ..Policy::default() };
//! let mut seen = Observation { pending_bytes: 1 << 30, bandwidth: 1 << 30, rounds: 1, ..Observation::default() };
//! assert_eq!(policy.decide(&seen), Decision::Continue);
//! seen.pending_bytes = 100 << 20;
//! assert_eq!(policy.decide(&seen), Decision::SwitchOver { expected_downtime_ms: Some(98) });
//! ```

mod forecast;
mod reason;

use std::time::Duration;

use crate::units::Bytes;

pub use forecast::{Blame, Forecast, SourceRate};
pub use reason::{CancelReason, Obstacle};

/// What to do when the timeout or the last allowed round is reached before the downtime limit can be kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum TimeoutStrategy {
    /// Give up; the VM runs on at the source.
    #[default]
    Cancel,
    /// Switch over anyway; the downtime limit is exceeded.
    Ignore,
}

/// What the caller asked for; does not change during a migration.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Policy {
    /// How long the VM may stand still.
    pub downtime: Duration,
    /// How long the whole migration may take until the VM is stopped.
    pub timeout: Duration,
    /// What happens when it takes longer.
    pub timeout_strategy: TimeoutStrategy,
    /// Passes over memory after which the timeout counts as reached; `None`: as many as fit the timeout.
    pub max_rounds: Option<u32>,
    /// Whether the vCPUs may be, and can be, slowed down.
    pub can_throttle: bool,
}

impl Default for Policy {
    /// 300 ms of downtime, an hour, then cancel; no cap on rounds; no throttling.
    fn default() -> Self {
        Self {
            downtime: Duration::from_millis(300),
            timeout: Duration::from_secs(60 * 60),
            timeout_strategy: TimeoutStrategy::default(),
            max_rounds: None,
            can_throttle: false,
        }
    }
}

/// How much device state the downtime will have to carry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DeviceLeft {
    /// So many bytes.
    Exact(u64),
    /// About so many bytes.
    Estimate(u64),
    /// Unknown: counts as more than any limit allows.
    Unknown,
}

/// Bytes of a device that has state to be read before it is stopped, and does not tell how much.
pub const UNTOLD_BYTES: u64 = 1;

/// Bytes of device state, for people.
fn initial(bytes: u64) -> String {
    match bytes {
        UNTOLD_BYTES => "device state of a size that nobody tells".to_owned(),
        bytes => format!("{} of device state", Bytes(bytes)),
    }
}

impl DeviceLeft {
    /// Bytes, where they are known at least roughly.
    pub fn bytes(self) -> Option<u64> {
        match self {
            Self::Exact(bytes) | Self::Estimate(bytes) => Some(bytes),
            Self::Unknown => None,
        }
    }
}

impl Default for DeviceLeft {
    fn default() -> Self {
        Self::Exact(0)
    }
}

/// What the sender measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Observation {
    /// Bytes of guest memory changed since the receiver's copy.
    pub pending_bytes: u64,
    /// Of these, bytes that sources report in every round whatever is written: pages that devices keep pinned.
    pub standing_bytes: u64,
    /// Bytes of guest memory on their way.
    pub in_flight_bytes: u64,
    /// Bytes per second that the connections carry; 0 while nothing was measured.
    pub bandwidth: u64,
    /// Bytes per second that become pending, without those that come back in every round.
    pub dirty_rate: u64,
    /// Device state that the downtime will carry, as the devices count it: where it streams, what was not sent before; else, in State,
    /// all of it.
    pub device: DeviceLeft,
    /// Bytes of it per second that both ends can process, whatever the connections carry; 0 for no limit of their
    /// own.
    pub state_rate: u64,
    /// The same of the state without `device_early_bytes`, where devices differ; 0 where they do not.
    pub late_state_rate: u64,
    /// Device state that its devices want read before they are stopped; [`UNTOLD_BYTES`] where they do not tell how much.
    pub device_initial_bytes: u64,
    /// Of the device state that the downtime would carry, what further rounds may bring before.
    pub device_early_bytes: u64,
    /// Time since the migration began.
    pub elapsed_ms: u64,
    /// Passes over memory that have ended.
    pub rounds: u32,
    /// Share of their time that the vCPUs have lost.
    pub throttle_percent: u8,
    /// Switchovers begun and taken back because more was left than expected.
    pub back_outs: u32,
}

impl Observation {
    /// How long the VM would stand still if it were stopped now; `None` where that cannot be told.
    pub fn expected_downtime_ms(&self) -> Option<u64> {
        let memory = u128::from(self.pending_bytes) + u128::from(self.in_flight_bytes);
        Some(time_for(memory, self.bandwidth)?.saturating_add(self.state_ms()?))
    }

    /// How long the pages that come back in every round take; `None` where that cannot be told.
    fn standing_ms(&self) -> Option<u64> {
        time_for(self.standing_bytes.into(), self.bandwidth)
    }

    /// How much of that is for device state; `None` where that cannot be told.
    pub fn state_ms(&self) -> Option<u64> {
        self.state_ms_for(self.device.bytes()?, self.state_rate)
    }

    /// How much of it is for device state that further rounds do not bring before; `None` where that cannot be told.
    fn late_state_ms(&self) -> Option<u64> {
        self.state_ms_for(self.late_bytes()?, self.late_rate())
    }

    fn late_bytes(&self) -> Option<u64> {
        Some(self.device.bytes()?.saturating_sub(self.device_early_bytes))
    }

    fn late_rate(&self) -> u64 {
        if self.late_state_rate == 0 { self.state_rate } else { self.late_state_rate }
    }

    fn state_ms_for(&self, bytes: u64, rate: u64) -> Option<u64> {
        let rate = if self.bandwidth == 0 { 0 } else { self.arriving(rate) };
        time_for(bytes.into(), rate)
    }

    /// Bytes of device state per second: what both ends get done, but no more than arrives. In State three bytes are four of base64; a
    /// stream, which shares the connections with the last pages, is taken to need as much.
    fn state_rate(&self) -> u64 {
        self.arriving(self.state_rate)
    }

    fn arriving(&self, rate: u64) -> u64 {
        match rate {
            0 => self.bandwidth,
            rate => rate.min(self.bandwidth / 4 * 3).max(1),
        }
    }
}

/// Milliseconds for `bytes`; `None` while the rate is unknown.
fn time_for(bytes: u128, rate: u64) -> Option<u64> {
    match (bytes, rate) {
        (0, _) => Some(0),
        (_, 0) => None,
        (bytes, rate) => Some(ms_for(bytes, rate)),
    }
}

/// What to do next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Decision {
    /// Make another pass.
    Continue,
    /// Slow the vCPUs down to lose so many percent of their time, then make another pass.
    ContinueThrottled(u8),
    /// Stop the VM and send the rest.
    SwitchOver {
        /// How long it will stand still; `None` where that cannot be told (and [`TimeoutStrategy::Ignore`] switches over anyway).
        expected_downtime_ms: Option<u64>,
    },
    /// Give up; the VM runs on.
    Cancel {
        /// Why.
        reason: CancelReason,
    },
}

/// Rounds that must have ended before a dirty rate is trusted enough to slow anybody down.
const ROUNDS_BEFORE_THROTTLE: u32 = 2;
/// Rounds that must have ended before a bandwidth, or a guess at a state's size, is trusted enough to give up for it.
const ROUNDS_BEFORE_GIVING_UP: u32 = 5;
const FIRST_THROTTLE_PERCENT: u8 = 20;
const THROTTLE_STEP_PERCENT: u8 = 10;
const MAX_THROTTLE_PERCENT: u8 = 99;

impl Policy {
    /// Most back-outs: the VM was stopped and resumed because more was left than expected.
    pub const MAX_BACK_OUTS: u32 = 3;

    /// How far beyond the limit the stopped VM's downtime must be before it is let run again.
    const BACK_OUT_FACTOR: u64 = 2;

    /// Decides between two rounds, with the VM running.
    ///
    /// A switchover waits for the devices' initial bytes, too. After each back-out the time aimed at for memory is halved, so
    /// that the next switchover has room for surprises.
    ///
    /// Where memory fits the limit and only device state does not, further rounds gain nothing: the timeout counts as reached.
    /// So it does where only pages that come back in every round do not fit.
    pub fn decide(&self, seen: &Observation) -> Decision {
        let expected = seen.expected_downtime_ms();
        if expected.is_some_and(|ms| ms <= self.aim_ms(seen)) && seen.device_initial_bytes == 0 {
            return Decision::SwitchOver { expected_downtime_ms: expected };
        }
        match (self.exhausted(seen).or_else(|| self.hopeless(seen)), self.timeout_strategy) {
            (Some(reason), TimeoutStrategy::Cancel) => Decision::Cancel { reason },
            (Some(_), TimeoutStrategy::Ignore) => Decision::SwitchOver { expected_downtime_ms: expected },
            (None, _) => self.throttle(seen).map_or(Decision::Continue, Decision::ContinueThrottled),
        }
    }

    /// Decides again once the VM and its devices stand still and the last size query is in.
    ///
    /// `SwitchOver`: go through with it; `Continue`: let the VM run and go on copying, because the downtime would exceed the
    /// limit by far; `Cancel`: that has happened [`Policy::MAX_BACK_OUTS`] times.
    pub fn confirm(&self, seen: &Observation) -> Decision {
        let expected = seen.expected_downtime_ms();
        let bearable =
            expected.is_some_and(|ms| ms <= self.downtime_ms().saturating_mul(Self::BACK_OUT_FACTOR));
        let strict = self.timeout_strategy == TimeoutStrategy::Cancel;
        if bearable || (!strict && self.exhausted(seen).or_else(|| self.hopeless(seen)).is_some()) {
            return Decision::SwitchOver { expected_downtime_ms: expected };
        }
        match self.exhausted(seen) {
            Some(reason) => Decision::Cancel { reason },
            None if seen.back_outs >= Self::MAX_BACK_OUTS => {
                self.after_last_back_out(seen.back_outs, expected)
            }
            None => Decision::Continue,
        }
    }

    /// The downtime limit, in milliseconds.
    fn downtime_ms(&self) -> u64 {
        millis(self.downtime)
    }

    /// The downtime to switch over at: the limit, or after back-outs the device state's part of it and less for memory.
    fn aim_ms(&self, seen: &Observation) -> u64 {
        let state_ms = seen.state_ms().unwrap_or(0).min(self.downtime_ms());
        state_ms + ((self.downtime_ms() - state_ms) >> seen.back_outs.min(Self::MAX_BACK_OUTS))
    }

    /// Whether more rounds gain nothing.
    fn hopeless(&self, seen: &Observation) -> Option<CancelReason> {
        self.hopeless_state(seen).or_else(|| self.hopeless_pages(seen))
    }

    /// Whether the device state alone breaks the limit, with all of it that should be read early read, and memory within it.
    fn hopeless_state(&self, seen: &Observation) -> Option<CancelReason> {
        let (bytes, state_ms) = (seen.late_bytes()?, seen.late_state_ms()?);
        let memory_ms = seen.expected_downtime_ms()?.saturating_sub(seen.state_ms()?);
        // In the first rounds a bandwidth is not telling and a guess is often too high; what both ends get done is certain.
        let expected_ms = match (seen.rounds < ROUNDS_BEFORE_GIVING_UP, seen.device) {
            (false, _) => state_ms,
            (true, DeviceLeft::Exact(_)) => time_for(bytes.into(), seen.late_rate())?,
            (true, _) => return None,
        };
        let only_state = expected_ms > self.downtime_ms() && memory_ms <= self.downtime_ms();
        let reason = CancelReason::DeviceStateTooLong { bytes, expected_ms, downtime_ms: self.downtime_ms() };
        (only_state && seen.device_initial_bytes == 0).then_some(reason)
    }

    /// Whether pages that come back in every round break the limit, together with the device state, and all else fits it.
    fn hopeless_pages(&self, seen: &Observation) -> Option<CancelReason> {
        if seen.rounds < ROUNDS_BEFORE_GIVING_UP || seen.standing_bytes == 0 || seen.device_initial_bytes > 0
        {
            return None;
        }
        let expected_ms = seen.standing_ms()?.saturating_add(seen.late_state_ms()?);
        let others_ms = seen.expected_downtime_ms()?.saturating_sub(expected_ms);
        let bytes = seen.standing_bytes;
        let reason =
            CancelReason::StandingPagesTooLong { bytes, expected_ms, downtime_ms: self.downtime_ms() };
        (expected_ms > self.downtime_ms() && others_ms <= self.downtime_ms()).then_some(reason)
    }

    /// Whether the timeout, or the last round allowed, has been reached, and which.
    pub fn exhausted(&self, seen: &Observation) -> Option<CancelReason> {
        let timeout_ms = millis(self.timeout);
        if seen.elapsed_ms >= timeout_ms {
            return Some(CancelReason::TimedOut { timeout_ms, obstacle: self.obstacle(seen) });
        }
        let max_rounds = self.max_rounds.filter(|&max| seen.rounds >= max)?;
        Some(CancelReason::OutOfRounds { max_rounds, obstacle: self.obstacle(seen) })
    }

    /// The main obstacle to a switchover; one that further rounds help least comes first.
    fn obstacle(&self, seen: &Observation) -> Obstacle {
        let breaks = |ms: Option<u64>| ms.is_some_and(|ms| ms > self.downtime_ms());
        let pinned_ms =
            seen.standing_ms().zip(seen.state_ms()).map(|(pages, state)| pages.saturating_add(state));
        match seen.device.bytes() {
            None => Obstacle::DeviceSizeUnknown,
            Some(bytes) if breaks(seen.state_ms()) => Obstacle::DeviceState { bytes },
            _ if seen.standing_bytes > 0 && breaks(pinned_ms) => {
                Obstacle::StandingPages { bytes: seen.standing_bytes }
            }
            _ if seen.device_initial_bytes > 0 && !breaks(seen.expected_downtime_ms()) => {
                Obstacle::InitialBytes { bytes: seen.device_initial_bytes }
            }
            _ => Obstacle::Memory { bytes: seen.pending_bytes.saturating_add(seen.in_flight_bytes) },
        }
    }

    fn after_last_back_out(&self, back_outs: u32, expected_downtime_ms: Option<u64>) -> Decision {
        match self.timeout_strategy {
            TimeoutStrategy::Ignore => Decision::SwitchOver { expected_downtime_ms },
            TimeoutStrategy::Cancel => {
                let reason = CancelReason::SwitchoverTooLong { back_outs, expected_downtime_ms };
                Decision::Cancel { reason }
            }
        }
    }

    /// Returns the next throttle where a round no longer halves what is left.
    fn throttle(&self, seen: &Observation) -> Option<u8> {
        let measured = seen.bandwidth > 0 && seen.rounds >= ROUNDS_BEFORE_THROTTLE;
        let losing = seen.dirty_rate > seen.bandwidth / 2;
        if !(self.can_throttle && measured && losing) || seen.throttle_percent >= MAX_THROTTLE_PERCENT {
            return None;
        }
        let next = seen.throttle_percent.saturating_add(THROTTLE_STEP_PERCENT);
        Some(next.clamp(FIRST_THROTTLE_PERCENT, MAX_THROTTLE_PERCENT))
    }
}

/// As whole milliseconds.
pub(crate) fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

fn bytes_in(ms: u64, rate: u64) -> u64 {
    u64::try_from(u128::from(ms) * u128::from(rate) / 1000).unwrap_or(u64::MAX)
}

fn ms_for(bytes: u128, rate: u64) -> u64 {
    u64::try_from((bytes * 1000).div_ceil(u128::from(rate))).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests;
