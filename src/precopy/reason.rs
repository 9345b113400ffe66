// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Why a migration is given up, in numbers and in words.

use std::fmt;

use derive_more::Display;

use crate::units::{Bytes, Count};

/// Why a migration is given up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum CancelReason {
    /// The timeout came first.
    TimedOut {
        /// The timeout.
        timeout_ms: u64,
        /// What still stood in the way.
        obstacle: Obstacle,
    },
    /// The cap on rounds came first.
    OutOfRounds {
        /// The cap.
        max_rounds: u32,
        /// What still stood in the way.
        obstacle: Obstacle,
    },
    /// Pages that devices keep pinned come back in every round, and take longer than the downtime limit.
    StandingPagesTooLong {
        /// Bytes of these pages.
        bytes: u64,
        /// How long they and the device state take.
        expected_ms: u64,
        /// The limit.
        downtime_ms: u64,
    },
    /// The device state alone takes longer than the downtime limit, and further rounds would not make it less.
    DeviceStateTooLong {
        /// Its bytes.
        bytes: u64,
        /// How long they take.
        expected_ms: u64,
        /// The limit.
        downtime_ms: u64,
    },
    /// Each time the VM was stopped, more was left than had been expected.
    SwitchoverTooLong {
        /// Times the VM was stopped and let run again.
        back_outs: u32,
        /// The downtime expected the last time; `None` where it could not be told.
        expected_downtime_ms: Option<u64>,
    },
}

/// What kept a migration from its switchover.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Display)]
#[non_exhaustive]
pub enum Obstacle {
    /// More guest memory had changed than the downtime limit allows.
    #[display("{} of memory had changed again", Bytes(*bytes))]
    Memory {
        /// Its bytes, those on their way included.
        bytes: u64,
    },
    /// Devices had state left that they want read before they are stopped.
    #[display("{} was to be read before the devices stop", super::initial(*bytes))]
    InitialBytes {
        /// Its bytes.
        bytes: u64,
    },
    /// The device state takes longer than the downtime limit.
    #[display("device state of {} exceeds the downtime limit", Bytes(*bytes))]
    DeviceState {
        /// Its bytes.
        bytes: u64,
    },
    /// Nobody could tell the device state's size.
    #[display("the size of the device state is unknown")]
    DeviceSizeUnknown,
    /// Pages that devices keep pinned take longer than the downtime limit.
    #[display("{} of pinned pages come back in every round", Bytes(*bytes))]
    StandingPages {
        /// Their bytes.
        bytes: u64,
    },
}

impl fmt::Display for CancelReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::TimedOut { timeout_ms, obstacle } => {
                write!(f, "not converged within the timeout of {timeout_ms} ms: {obstacle}")
            }
            Self::OutOfRounds { max_rounds, obstacle } => {
                write!(f, "not converged within {}: {obstacle}", Count(max_rounds, "round"))
            }
            Self::StandingPagesTooLong { bytes, expected_ms, downtime_ms } => write!(
                f,
                "{} of pinned pages come back in every round and take about {expected_ms} ms with the device state, more \
                 than the downtime limit of {downtime_ms} ms",
                Bytes(*bytes)
            ),
            Self::DeviceStateTooLong { bytes, expected_ms, downtime_ms } => write!(
                f,
                "device state of {} takes about {expected_ms} ms, more than the downtime limit of {downtime_ms} ms",
                Bytes(*bytes)
            ),
            Self::SwitchoverTooLong { back_outs, expected_downtime_ms: Some(ms) } => {
                write!(
                    f,
                    "stopped VM {}, and {ms} ms of downtime were still to come",
                    Count(back_outs, "time")
                )
            }
            Self::SwitchoverTooLong { back_outs, expected_downtime_ms: None } => {
                write!(f, "stopped VM {}, and the downtime still could not be told", Count(back_outs, "time"))
            }
        }
    }
}
