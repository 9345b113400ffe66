// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! [`SendOptions`]: what is asked of a migration, and whether that can be done.

use std::ops::RangeInclusive;
use std::time::Duration;

use thiserror::Error;

use super::pinning::PinningReceiver;
use crate::granule::Granule;
use crate::precopy::{Policy, TimeoutStrategy};
use crate::threads::ThreadStart;
use crate::transfer::limits::{ConnectionCount, Limits};
use crate::transfer::tls::ClientTls;
use crate::transfer::url::{Endpoint, Url};

/// How to send a VM, and where to.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct SendOptions {
    /// The receiver.
    pub url: Url,
    /// Connections that carry memory: one, or several beside the first one (TCP only).
    pub connections: ConnectionCount,
    /// Chunks that may await their acknowledgement on each connection; just one on each of several connections under TLS.
    pub window: usize,
    /// Guest memory in one chunk, in bytes; at most 64 MiB.
    pub chunk_bytes: u64,
    /// The rate limit: guest memory sent per second while the VM runs, in bytes; `None`: as much as the connections carry.
    pub bandwidth: Option<u64>,
    /// How long the VM may stand still.
    pub downtime_ms: u64,
    /// How long copying the running VM may take.
    pub timeout_s: u64,
    /// What happens when it takes longer.
    pub timeout_strategy: TimeoutStrategy,
    /// Passes over memory after which the timeout counts as reached.
    pub max_rounds: Option<u32>,
    /// Slow the vCPUs down where that helps and the VM can.
    pub throttle: bool,
    /// The VM is paused, stays so if this fails, and is to stay so at the receiver.
    pub complete_paused: bool,
    /// The receiver's memory reads zero before anything is sent: pages that were never written, or read zero, are left out of
    /// the first pass.
    ///
    /// So it is with Cloud Hypervisor's own memory, a fresh memfd or anonymous, and with a snapshot directory. It is not where
    /// a memory zone of the receiver is a named file that holds something.
    pub receiver_reads_zero: bool,
    /// What is done for a receiver that pins all memory while it takes State, where the VM has pass-through devices.
    pub pinning_receiver: PinningReceiver,
    /// Mutual TLS over TCP.
    pub tls: Option<ClientTls>,
    /// How long the receiver may take, and more.
    pub limits: Limits,
    /// What each thread of the sender does first.
    pub thread_start: ThreadStart,
}

impl SendOptions {
    /// One connection to `url`, 300 ms of downtime, an hour, then cancel; chunks of 4 MiB, four of them on their way; a receiver
    /// whose memory reads zero.
    pub fn new(url: Url) -> Self {
        Self {
            url,
            connections: ConnectionCount::ONE,
            window: 4,
            chunk_bytes: 4 << 20,
            bandwidth: None,
            downtime_ms: 300,
            timeout_s: 3600,
            timeout_strategy: TimeoutStrategy::Cancel,
            max_rounds: None,
            throttle: false,
            complete_paused: false,
            receiver_reads_zero: true,
            pinning_receiver: PinningReceiver::default(),
            tls: None,
            limits: Limits::default(),
            thread_start: ThreadStart::NOTHING,
        }
    }

    /// Chunks that may be unacknowledged on a connection, as any receiver can take them.
    ///
    /// A Cloud Hypervisor polls the socket of an additional connection for its next request. What its TLS has read ahead,
    /// together with the end of the request before, that poll does not see: a request all of which was read ahead would wait
    /// for ever.
    pub(super) fn pipelined_chunks(&self) -> usize {
        let is_polled = self.tls.is_some() && self.connections != ConnectionCount::ONE;
        if is_polled { 1 } else { self.window }
    }

    pub(super) fn policy(&self, vm_can_throttle: bool) -> Policy {
        Policy {
            downtime_ms: self.downtime_ms,
            timeout_ms: self.timeout_s.saturating_mul(1000),
            timeout_strategy: self.timeout_strategy,
            max_rounds: self.max_rounds,
            can_throttle: self.throttle && vm_can_throttle,
        }
    }

    /// How long the VM may stand still before the receiver is told to run it; `None` where it stands still anyway.
    pub(super) fn switchover_timeout(&self) -> Option<Duration> {
        let downtime = Duration::from_millis(self.downtime_ms);
        let least = downtime.saturating_mul(Limits::SWITCHOVER_DOWNTIMES);
        (!self.complete_paused).then(|| self.limits.switchover_timeout.max(least))
    }

    /// Whether a downtime is longer than the limit; never for a VM that was paused before.
    pub(super) fn is_exceeded_by(&self, downtime: Duration) -> bool {
        !self.complete_paused && downtime > Duration::from_millis(self.downtime_ms)
    }

    /// Checks that each option is in its bounds.
    pub(super) fn check(&self) -> Result<(), SendOptionsError> {
        let in_bounds = |option, value, bounds: RangeInclusive<u64>| match bounds.contains(&value) {
            true => Ok(()),
            false => Err(SendOptionsError::OutOfBounds { option, value, bounds }),
        };
        in_bounds("window", self.window as u64, 1..=64)?;
        in_bounds("chunk_bytes", self.chunk_bytes, Granule::host_page().bytes()..=64 << 20)?;
        in_bounds("bandwidth", self.bandwidth.unwrap_or(u64::MAX), 1..=u64::MAX)?;
        if self.connections != ConnectionCount::ONE && matches!(self.url.endpoint(), Endpoint::Unix(_)) {
            return Err(SendOptionsError::OneConnectionOnly {
                connections: self.connections,
                url: self.url.clone(),
            });
        }
        Ok(())
    }
}

/// An option out of its bounds.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum SendOptionsError {
    /// No such number.
    #[error("{option} is {value}, but must be from {} to {}", .bounds.start(), .bounds.end())]
    OutOfBounds {
        /// The option.
        option: &'static str,
        /// Its value.
        value: u64,
        /// What it may be.
        bounds: RangeInclusive<u64>,
    },
    /// Several connections without TCP.
    #[error("{connections} connections take a TCP address, not {url}")]
    OneConnectionOnly {
        /// How many were asked for.
        connections: ConnectionCount,
        /// The address.
        url: Url,
    },
}
