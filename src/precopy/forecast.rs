// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Whether a migration will converge, and what keeps it from that.

use std::fmt;

use super::{Observation, Policy, bytes_in, ms_for};
use crate::units::Bytes;

/// How fast one source dirties memory, in bytes per second.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SourceRate<'a> {
    /// The source's id.
    pub id: &'a str,
    /// What it reports.
    pub dirty_rate: u64,
    /// What only it reports.
    pub exclusive_dirty_rate: u64,
    /// Bytes that it reports in every round, whatever is written.
    pub standing_bytes: u64,
}

/// Whether a migration will come to its switchover, said for people.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum Forecast {
    /// Nothing was measured yet.
    #[default]
    Unmeasured,
    /// It will, in about so long.
    Converges {
        /// Time to the switchover.
        in_ms: u64,
    },
    /// Memory is ready for it; devices still hand out state that they want read before they are stopped.
    AwaitsDevices {
        /// Bytes of it.
        initial_bytes: u64,
    },
    /// It will not while this goes on.
    Stuck(Blame),
}

/// What keeps a migration from converging.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Blame {
    /// The device state alone takes longer than the downtime limit.
    DeviceState {
        /// The device that has most of it.
        device: String,
        /// Its bytes.
        bytes: u64,
        /// Bytes that the limit allows.
        allowed_bytes: u64,
    },
    /// Nobody can tell how much state a device has left.
    DeviceSizeUnknown {
        /// The device.
        device: String,
    },
    /// Pages that a device keeps pinned come back in every round, and do not fit the downtime limit.
    StandingPages {
        /// Who reports most of them.
        id: String,
        /// Bytes of all of them.
        bytes: u64,
        /// Bytes that the limit allows.
        allowed_bytes: u64,
    },
    /// Without the pages that only this source reports it would converge.
    Source {
        /// The source's id.
        id: String,
        /// What only it dirties, in bytes per second.
        exclusive_dirty_rate: u64,
        /// Bytes per second that the connections carry.
        bandwidth: u64,
    },
    /// No single source is the cause.
    Together {
        /// What all dirty, in bytes per second.
        dirty_rate: u64,
        /// Bytes per second that the connections carry.
        bandwidth: u64,
    },
}

impl Forecast {
    /// Judges from the rates of each source; where several could be to blame, names the one that dirties most. `device` is the one that has
    /// most state left.
    pub fn new(policy: &Policy, seen: &Observation, sources: &[SourceRate<'_>], device: &str) -> Self {
        if seen.bandwidth == 0 {
            return Self::Unmeasured;
        }
        let device = device.to_owned();
        let initial_bytes = seen.device_initial_bytes.max(seen.device_early_bytes);
        let Some(bytes) = seen.late_bytes() else {
            return match initial_bytes {
                0 => Self::Stuck(Blame::DeviceSizeUnknown { device }),
                _ => Self::AwaitsDevices { initial_bytes },
            };
        };
        let left_ms = |state_ms: Option<u64>| policy.downtime_ms().checked_sub(state_ms?);
        if left_ms(seen.late_state_ms()).is_none() && seen.device_initial_bytes == 0 {
            let allowed_bytes = bytes_in(policy.downtime_ms(), seen.state_rate());
            return Self::Stuck(Blame::DeviceState { device, bytes, allowed_bytes });
        }
        let Some(left_ms) = left_ms(seen.state_ms()) else {
            return Self::AwaitsDevices { initial_bytes };
        };
        let memory = seen.pending_bytes.saturating_add(seen.in_flight_bytes);
        let allowed_bytes = bytes_in(left_ms, seen.bandwidth);
        if seen.standing_bytes > allowed_bytes {
            return Self::Stuck(standing(seen, sources, allowed_bytes));
        }
        let above_limit = memory.saturating_sub(allowed_bytes);
        match (above_limit, seen.bandwidth.saturating_sub(seen.dirty_rate)) {
            (0, _) if seen.device_initial_bytes > 0 => {
                Self::AwaitsDevices { initial_bytes: seen.device_initial_bytes }
            }
            (0, _) => Self::Converges { in_ms: 0 },
            (_, 0) => Self::Stuck(blame(seen, sources)),
            (bytes, gain) => Self::Converges { in_ms: ms_for(bytes.into(), gain) },
        }
    }
}

fn blame(seen: &Observation, sources: &[SourceRate<'_>]) -> Blame {
    let needed = seen.dirty_rate.saturating_sub(seen.bandwidth);
    let culprits = sources.iter().filter(|source| source.exclusive_dirty_rate > needed);
    match culprits.max_by_key(|source| source.exclusive_dirty_rate) {
        Some(source) => Blame::Source {
            id: source.id.to_owned(),
            exclusive_dirty_rate: source.exclusive_dirty_rate,
            bandwidth: seen.bandwidth,
        },
        None => Blame::Together { dirty_rate: seen.dirty_rate, bandwidth: seen.bandwidth },
    }
}

fn standing(seen: &Observation, sources: &[SourceRate<'_>], allowed_bytes: u64) -> Blame {
    let most = sources.iter().max_by_key(|source| source.standing_bytes);
    let id = most.map_or_else(String::new, |source| source.id.to_owned());
    Blame::StandingPages { id, bytes: seen.standing_bytes, allowed_bytes }
}

impl fmt::Display for Forecast {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unmeasured => f.write_str("nothing measured yet"),
            Self::Converges { in_ms: 0 } => f.write_str("ready to switch over"),
            Self::Converges { in_ms } => write!(f, "switches over in about {} s", in_ms.div_ceil(1000)),
            Self::AwaitsDevices { initial_bytes } => {
                write!(f, "waits for {} to be read", super::initial(*initial_bytes))
            }
            Self::Stuck(blame) => write!(f, "does not converge: {blame}"),
        }
    }
}

impl fmt::Display for Blame {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::DeviceState { device, bytes, allowed_bytes } => write!(
                f,
                "device state of {}, most of it of {device:?}, does not fit the downtime limit, which carries {}",
                Bytes(*bytes),
                Bytes(*allowed_bytes)
            ),
            Self::DeviceSizeUnknown { device } => {
                write!(f, "size of the state of device {device:?} is unknown")
            }
            Self::StandingPages { id, bytes, allowed_bytes } => write!(
                f,
                "{id} reports {} of pinned pages in every round, and the downtime limit carries {}",
                Bytes(*bytes),
                Bytes(*allowed_bytes)
            ),
            Self::Source { id, exclusive_dirty_rate, bandwidth } => write!(
                f,
                "{id} alone dirties {}/s, and {}/s can be sent",
                Bytes(*exclusive_dirty_rate),
                Bytes(*bandwidth)
            ),
            Self::Together { dirty_rate, bandwidth } => write!(
                f,
                "all sources together dirty {}/s, and {}/s can be sent",
                Bytes(*dirty_rate),
                Bytes(*bandwidth)
            ),
        }
    }
}
