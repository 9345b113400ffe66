// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Receivers that pin all of the VM's memory while they take State, as those with pass-through devices do.
//!
//! What was left out of the first pass is allocated and zeroed only then, while the VM stands still: half a second for each
//! GiB. So either the receiver has allocated it before, or nothing is left out.

use std::fmt;
use std::time::Duration;

use thiserror::Error;

use super::progress::Progress;
use crate::precopy::Forecast;
use crate::transfer::prefault::with_prefault;
use crate::units::Bytes;

/// Bytes of memory per second that a receiver allocates and zeroes: a low estimate.
const POPULATED_BYTES_PER_SECOND: u64 = 128 << 20;

/// What is done for the receiver of a VM that has pass-through devices: some are in the sender's
/// [`DeviceSet`](crate::device::DeviceSet), or the tracker has a source for them or knows what is mapped for them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum PinningReceiver {
    /// Config asks for `prefault`, so that the receiver allocates all memory before the first page comes. Where it cannot ask,
    /// as for a VM with virtio-mem or with a Config that is not Cloud Hypervisor's, no page is left out.
    ///
    /// It stays in the VM's configuration, at the receiver and in every later migration. Not for a receiver that is to fetch
    /// pages afterwards (postcopy).
    #[default]
    Prefault,
    /// No page is left out of the first pass, and Config stays as it is.
    SendAll,
    /// Nothing: the receiver does not pin memory, or sees to it itself.
    Unheeded,
}

/// Who saw to it that the receiver of a VM with pass-through devices has all memory allocated before State.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Populated {
    /// Nobody: the VM has no devices, or [`PinningReceiver::Unheeded`].
    #[default]
    Nobody,
    /// The receiver, which Config asked for `prefault`. That is in the VM's configuration from now on.
    Receiver,
    /// The sender, by leaving out no page.
    Sender,
}

/// The VM stood still for longer than it should have.
#[derive(Debug, Error)]
#[error("VM stood still for {downtime_ms} ms, and {limit_ms} ms were allowed: {cause}")]
#[non_exhaustive]
pub struct MissedDowntime {
    /// How long it stood still.
    pub downtime_ms: u128,
    /// How long it may.
    pub limit_ms: u64,
    /// Why.
    pub cause: MissedBecause,
}

/// Why a downtime limit was missed.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum MissedBecause {
    /// The receiver had so many bytes of pages to allocate and zero that were left out.
    LeftOut {
        /// Their bytes.
        bytes: u64,
    },
    /// It was to be expected.
    Expected(Forecast),
    /// It was expected to take so long.
    Unexpected {
        /// In milliseconds; `None` where it could not be told.
        expected_ms: Option<u64>,
    },
}

impl fmt::Display for MissedBecause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::LeftOut { bytes } => write!(
                f,
                "{} were left out of the first pass, which a receiver that pins memory allocates meanwhile \
                 (SendOptions::pinning_receiver)",
                Bytes(*bytes)
            ),
            Self::Expected(forecast) => forecast.fmt(f),
            Self::Unexpected { expected_ms: Some(ms) } => write!(f, "{ms} ms were expected"),
            Self::Unexpected { expected_ms: None } => f.write_str("nothing could be expected"),
        }
    }
}

/// The Config that asks for populated memory; `None` where it cannot.
fn asking(config: &[u8]) -> Option<Vec<u8>> {
    match with_prefault(config) {
        Ok(asking) => Some(asking),
        Err(error) => {
            log::info!("No page is left out for a receiver that pins memory: {error}");
            None
        }
    }
}

/// What is done in one migration for a receiver that pins memory.
pub(super) struct Pinning {
    wanted: PinningReceiver,
    receiver_reads_zero: bool,
    /// Whether pass-through devices write the VM's memory, whoever moves their state.
    has_devices: bool,
    populated: Populated,
}

impl Pinning {
    pub(super) fn new(wanted: PinningReceiver, receiver_reads_zero: bool) -> Self {
        Self { wanted, receiver_reads_zero, has_devices: false, populated: Populated::default() }
    }

    /// Makes of the VM's Config one for a receiver that pins memory, or decides to leave no page out.
    pub(super) fn heed(&mut self, config: Vec<u8>, has_devices: bool) -> Vec<u8> {
        self.has_devices = has_devices;
        if !has_devices || !self.receiver_reads_zero {
            return config;
        }
        let asked = match self.wanted {
            PinningReceiver::Unheeded => return config,
            PinningReceiver::SendAll => None,
            PinningReceiver::Prefault => asking(&config),
        };
        self.populated = if asked.is_some() { Populated::Receiver } else { Populated::Sender };
        asked.unwrap_or(config)
    }

    /// Who sees to it that all memory is allocated before State.
    pub(super) fn populated(&self) -> Populated {
        self.populated
    }

    /// Whether pages may be left out of the first pass.
    pub(super) fn may_leave_out(&self) -> bool {
        self.receiver_reads_zero && self.populated != Populated::Sender
    }

    /// How much longer the receiver may take to answer Config, for the memory that it allocates.
    pub(super) fn populating_time(&self, ram_bytes: u64) -> Duration {
        match self.populated {
            Populated::Receiver => Duration::from_secs(ram_bytes.div_ceil(POPULATED_BYTES_PER_SECOND)),
            Populated::Nobody | Populated::Sender => Duration::ZERO,
        }
    }

    /// Names why the VM stood still for `downtime`, longer than `limit_ms`.
    pub(super) fn explain(&self, downtime: Duration, limit_ms: u64, progress: &Progress) -> MissedDowntime {
        let left_out = progress.skipped_bytes();
        let cause = match progress.forecast {
            ref forecast @ Forecast::Stuck(_) => MissedBecause::Expected(forecast.clone()),
            _ if self.has_devices && left_out > 0 && self.populated == Populated::Nobody => {
                MissedBecause::LeftOut { bytes: left_out }
            }
            _ => MissedBecause::Unexpected { expected_ms: progress.expected_downtime_ms() },
        };
        MissedDowntime { downtime_ms: downtime.as_millis(), limit_ms, cause }
    }
}
