// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! [`Sent`]: what comes of a migration.

use std::time::Duration;

use super::downtime::DowntimeParts;
use super::pinning::Populated;
use super::progress::Progress;

/// A VM that moved.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct Sent {
    /// The last look at the migration: its rounds, bytes and sources. The measured figures and the forecast in it are those of the
    /// moment when the VM had just been stopped: where the limit was exceeded, they say what was to blame.
    pub progress: Progress,
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
    /// The whole of it.
    pub total: Duration,
    /// Bytes of device state.
    pub device_state_bytes: u64,
    /// Of these, bytes that were read while the devices ran.
    pub device_precopy_bytes: u64,
    /// What each device handed over as a stream within the downtime: part of `last_pages`, all of them at the same time. Empty where
    /// states are in State.
    pub device_downtimes: Vec<DeviceDowntime>,
}

/// A device's share of the downtime.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct DeviceDowntime {
    /// The device's name.
    pub device: String,
    /// Bytes of its state that it handed over once it was stopped.
    pub bytes: u64,
    /// How long that took, from its first byte to the last one's arrival.
    pub took: Duration,
}
