// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! [`Sent`]: what comes of a migration.

use std::time::Duration;

use super::downtime::DowntimeParts;
use super::pinning::Populated;
use super::progress::{SendDegradation, SourceProgress};
use crate::precopy::Forecast;

/// A VM that moved.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct Sent {
    /// Passes over memory, the first full one and the last one included.
    pub rounds: u32,
    /// Bytes written to the connections, framing included.
    pub bytes_sent: u64,
    /// Bytes of pages left out of the first pass because nobody ever wrote them.
    pub skipped_hole_bytes: u64,
    /// Bytes of pages left out of the first pass because they read zero.
    pub skipped_zero_bytes: u64,
    /// Bytes of pages that were reported dirty at least once.
    pub unique_dirty_bytes: u64,
    /// From pausing the VM to the receiver's word that it has it.
    pub downtime: Duration,
    /// What that was spent on.
    pub downtime_parts: DowntimeParts,
    /// Whether that was longer than the limit; never for a VM that was paused before. Then a degradation says why.
    pub downtime_exceeded: bool,
    /// Who saw to it that a receiver with pass-through devices has all memory allocated before State.
    pub populated: Populated,
    /// What was to be expected when the VM had just been stopped: where the limit was exceeded, what was to blame.
    pub forecast: Forecast,
    /// The whole of it.
    pub total: Duration,
    /// Who dirtied what during this migration.
    pub sources: Vec<SourceProgress>,
    /// Bytes of device state.
    pub device_state_bytes: u64,
    /// Of these, bytes that were read while the devices ran.
    pub device_precopy_bytes: u64,
    /// What failed on the way.
    pub degradations: Vec<SendDegradation>,
    /// Switchovers that were begun and taken back.
    pub back_outs: u32,
    /// Share of their time that the vCPUs had lost in the end.
    pub throttle_percent: u8,
}
