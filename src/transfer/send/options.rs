// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! [`SendOptions`]: what is asked of a migration.

use std::num::NonZeroU64;
use std::ops::RangeInclusive;
use std::time::Duration;

use thiserror::Error;

use super::pinning::PinningReceiver;
use crate::granule::Granule;
use crate::precopy::{Policy, TimeoutStrategy};
use crate::threads::ThreadStart;
use crate::transfer::limits::{ConnectionCount, PeerLimits};
use crate::transfer::tls::ClientTls;
use crate::transfer::url::{Endpoint, Url};

/// How to send a VM, and where to. Each option is checked where it is set, so that these can be carried out.
///
/// ```
/// use std::time::Duration;
/// use vfio_migration::transfer::SendOptions;
/// use vfio_migration::transfer::limits::ConnectionCount;
///
/// let options = SendOptions::new("tcp:destination:4444".parse()?)
///     .connections(ConnectionCount::new(4)?)?
///     .downtime(Duration::from_millis(100));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, Clone)]
#[must_use]
pub struct SendOptions {
    pub(super) url: Url,
    pub(super) connections: ConnectionCount,
    pub(super) window: usize,
    pub(super) chunk_bytes: u64,
    pub(super) rate_limit: Option<NonZeroU64>,
    pub(super) policy: Policy,
    pub(super) complete_paused: bool,
    pub(super) receiver_reads_zero: bool,
    pub(super) pinning_receiver: PinningReceiver,
    pub(super) tls: Option<ClientTls>,
    pub(super) limits: PeerLimits,
    pub(super) thread_start: ThreadStart,
}

impl SendOptions {
    /// One connection to the receiver at `url`, without TLS; four chunks of 4 MiB on their way; no rate limit; 300 ms of
    /// downtime, an hour, then cancel; no cap on rounds; no throttling; the default [`PeerLimits`]; a VM that runs in the end; a
    /// receiver whose memory reads zero.
    pub fn new(url: Url) -> Self {
        Self {
            url,
            connections: ConnectionCount::ONE,
            window: 4,
            chunk_bytes: 4 << 20,
            rate_limit: None,
            policy: Policy::default(),
            complete_paused: false,
            receiver_reads_zero: true,
            pinning_receiver: PinningReceiver::default(),
            tls: None,
            limits: PeerLimits::default(),
            thread_start: ThreadStart::NOTHING,
        }
    }

    /// Sets how many connections carry memory: one, or several beside the first one.
    ///
    /// # Errors
    /// Several, and the receiver is not at a TCP address.
    pub fn connections(self, connections: ConnectionCount) -> Result<Self, SendOptionsError> {
        if connections != ConnectionCount::ONE && matches!(self.url.endpoint(), Endpoint::Unix(_)) {
            return Err(SendOptionsError::OneConnectionOnly { connections, url: self.url });
        }
        Ok(Self { connections, ..self })
    }

    /// Sets how many chunks may await their acknowledgement on each connection, from 1 to 64. On each of several connections
    /// under TLS it is one, whatever is set.
    ///
    /// # Errors
    /// `window` is not from 1 to 64.
    pub fn window(self, window: usize) -> Result<Self, SendOptionsError> {
        in_bounds("window", window as u64, 1..=64)?;
        Ok(Self { window, ..self })
    }

    /// Sets the guest memory in one chunk, in bytes: from a host page to 64 MiB.
    ///
    /// # Errors
    /// `chunk_bytes` is less or more than that.
    pub fn chunk_bytes(self, chunk_bytes: u64) -> Result<Self, SendOptionsError> {
        in_bounds("chunk_bytes", chunk_bytes, Granule::host_page().bytes()..=64 << 20)?;
        Ok(Self { chunk_bytes, ..self })
    }

    /// Sets the rate limit: bytes of guest memory, and of device state that streams, sent per second while the VM runs; `None`: as
    /// many as the connections carry.
    ///
    /// The downtime to be expected is reckoned at the rate at which these were sent, so at this rate: a VM that dirties memory, or
    /// whose devices change their states, faster than the limit, or almost, never switches over before the timeout. One whose devices hand
    /// out state once they are stopped only, more than fits the downtime at this rate, is given up, though the limit does not hold then.
    ///
    /// # Errors
    /// No bytes per second.
    pub fn rate_limit(self, bytes_per_second: Option<u64>) -> Result<Self, SendOptionsError> {
        in_bounds("rate limit", bytes_per_second.unwrap_or(u64::MAX), 1..=u64::MAX)?;
        Ok(Self { rate_limit: bytes_per_second.and_then(NonZeroU64::new), ..self })
    }

    /// Sets how long the VM may stand still; 300 ms by default.
    pub fn downtime(mut self, downtime: Duration) -> Self {
        self.policy.downtime = downtime;
        self
    }

    /// Sets how long copying the running VM may take; an hour by default.
    pub fn timeout(mut self, timeout: Duration) -> Self {
        self.policy.timeout = timeout;
        self
    }

    /// Sets what happens when the timeout is over: by default the migration is cancelled.
    pub fn timeout_strategy(mut self, strategy: TimeoutStrategy) -> Self {
        self.policy.timeout_strategy = strategy;
        self
    }

    /// Sets the passes over memory after which the timeout counts as reached; `None`: as many as fit the timeout.
    pub fn max_rounds(mut self, rounds: Option<u32>) -> Self {
        self.policy.max_rounds = rounds;
        self
    }

    /// Sets whether the vCPUs are slowed down where that helps and the VM can.
    pub fn throttle(mut self, throttle: bool) -> Self {
        self.policy.can_throttle = throttle;
        self
    }

    /// Sets whether the VM, which is paused, stays so if this fails, and is to stay so at the receiver.
    pub fn complete_paused(self, complete_paused: bool) -> Self {
        Self { complete_paused, ..self }
    }

    /// Sets whether the receiver's memory reads zero before anything is sent: then pages that were never written, or are zero
    /// pages, are left out of the first pass.
    ///
    /// So it is with Cloud Hypervisor's own memory, a fresh memfd or anonymous, and with a snapshot directory. It is not where
    /// a memory zone of the receiver is a named file that holds something.
    pub fn receiver_reads_zero(self, receiver_reads_zero: bool) -> Self {
        Self { receiver_reads_zero, ..self }
    }

    /// Sets what is done for a receiver that pins all memory while it takes State, where the VM has pass-through devices.
    pub fn pinning_receiver(self, pinning_receiver: PinningReceiver) -> Self {
        Self { pinning_receiver, ..self }
    }

    /// Sets mutual TLS over TCP, or none.
    pub fn tls(self, tls: Option<ClientTls>) -> Self {
        Self { tls, ..self }
    }

    /// Sets how long the receiver may take, and more.
    pub fn limits(self, limits: PeerLimits) -> Self {
        Self { limits, ..self }
    }

    /// Sets what each thread of the sender does first.
    pub fn thread_start(self, thread_start: ThreadStart) -> Self {
        Self { thread_start, ..self }
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

    /// The same for a VM that can, or cannot, be slowed down.
    pub(super) fn for_vm(mut self, vm_can_throttle: bool) -> Self {
        self.policy.can_throttle &= vm_can_throttle;
        self
    }

    /// How long the VM may stand still before the receiver is told to run it; `None` where it stands still anyway.
    pub(super) fn switchover_timeout(&self) -> Option<Duration> {
        let least = self.policy.downtime.saturating_mul(PeerLimits::SWITCHOVER_DOWNTIMES);
        (!self.complete_paused).then(|| self.limits.switchover_timeout.max(least))
    }

    /// Whether a downtime is longer than the limit; never for a VM that was paused before.
    pub(super) fn is_exceeded_by(&self, downtime: Duration) -> bool {
        !self.complete_paused && downtime > self.policy.downtime
    }
}

fn in_bounds(option: &'static str, value: u64, bounds: RangeInclusive<u64>) -> Result<(), SendOptionsError> {
    if bounds.contains(&value) {
        Ok(())
    } else {
        Err(SendOptionsError::OutOfBounds { option, value, bounds })
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
