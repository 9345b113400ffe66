// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! [`Sender`]: what is asked of a migration, and what comes of it.

use std::fmt;
use std::io;
use std::ops::RangeInclusive;
use std::sync::Mutex;
use std::time::Duration;

use thiserror::Error;

use super::downtime::DowntimeParts;
use super::exchange::PeerError;
use super::limits::{ConnectionCount, Limits};
use super::phases::Session;
use super::pinning::{PinningReceiver, Populated};
use super::progress::{Cancelled, Degradation, Migration, SourceProgress};
use super::tls::ClientTls;
use super::url::{Endpoint, Url};
use crate::device::{DeviceSet, DeviceSetError};
use crate::error::Chain;
use crate::granule::Granule;
use crate::precopy::{CancelReason, Forecast, Policy, TimeoutStrategy};
use crate::threads::ThreadStart;
use crate::tracker::{Tracker, TrackerError};
use crate::units::Count;
use crate::vm::{UnreadableMemory, UserfaultError, Vm, VmError};

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
    /// Guest memory sent per second while the VM runs, in bytes; `None`: as much as the connections carry.
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

    fn check(&self) -> Result<(), SendOptionsError> {
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

/// What the sender was doing with its peer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum SendStep {
    /// Reaching it.
    Connect,
    /// Agreeing on the protocol.
    Start,
    /// Describing the VM.
    Config,
    /// Copying guest memory.
    Memory,
    /// Handing over the VM's state.
    State,
    /// Handing over the VM.
    Complete,
}

impl fmt::Display for SendStep {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Connect => "connect to the receiver",
            Self::Start => "agree with the receiver on the protocol",
            Self::Config => "describe VM to the receiver",
            Self::Memory => "copy memory to the receiver",
            Self::State => "hand VM state to the receiver",
            Self::Complete => "hand VM over to the receiver",
        })
    }
}

/// What a VM was asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum VmOperation {
    /// Describing itself.
    Config,
    /// Standing still.
    Pause,
    /// Letting go of what the receiver takes.
    Release,
    /// Taking that back.
    Reclaim,
    /// Running again.
    Resume,
    /// Telling its state.
    State,
}

impl fmt::Display for VmOperation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Config => "describe itself",
            Self::Pause => "pause",
            Self::Release => "let go of what the receiver takes",
            Self::Reclaim => "take back what it let go of",
            Self::Resume => "resume",
            Self::State => "tell its state",
        })
    }
}

/// Why a VM did not move. See [`SendError::source_vm`] for where that leaves it.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum SendError {
    /// An option is out of its bounds.
    #[error("Migration cannot be done as asked")]
    Options(#[from] SendOptionsError),
    /// [`Migration::cancel`] was called.
    #[error("Migration was cancelled")]
    Cancelled,
    /// The policy gave up.
    #[error("Migration was given up: {0}")]
    GivenUp(CancelReason),
    /// The VM stood still for too long before the receiver could be told to run it.
    #[error("VM stood still for {limit_ms} ms, and the receiver did not have all of it yet")]
    SwitchoverTimedOut {
        /// How long it may: see [`Limits::switchover_timeout`].
        limit_ms: u128,
    },
    /// The connection failed, or the receiver broke the protocol or refused.
    #[error("Cannot {step}")]
    Peer {
        /// What was being done.
        step: SendStep,
        /// What went wrong.
        source: PeerError,
    },
    /// The VM failed.
    #[error("VM cannot {operation}")]
    Vm {
        /// What it was asked.
        operation: VmOperation,
        /// Its own error.
        source: VmError,
    },
    /// A source could not be switched on or cleared.
    #[error("Dirty pages cannot be tracked")]
    Tracking(#[source] Box<TrackerError>),
    /// Pages may be missing from memory that only a userfaultfd's handler can fill in.
    #[error("Memory cannot be read as it is")]
    Userfault(#[from] UserfaultError),
    /// Memory that has no address in this process, as that of a stored VM, cannot be read. The receiver is not to blame.
    #[error(transparent)]
    Memory(#[from] UnreadableMemory),
    /// A device failed.
    #[error("Devices cannot be moved")]
    Devices(#[source] Box<DeviceSetError>),
    /// State is larger than it may be; where devices say so themselves, the VM was not stopped for it.
    #[error(
        "State takes {} or more, of which {} in base64 are device state, and the limit is {} (Limits::state_bytes)",
        Count(.state_bytes, "byte"),
        Count(.device_bytes, "byte"),
        Count(.limit_bytes, "byte")
    )]
    StateTooLarge {
        /// Bytes of its text, as far as they are known.
        state_bytes: u64,
        /// Bytes of device state in it, before they are put into base64.
        device_bytes: u64,
        /// The limit.
        limit_bytes: u64,
    },
    /// The State message could not be written down.
    #[error("VM state is no JSON")]
    State(#[from] serde_json::Error),
    /// No thread could be had for a connection, or what it does first panicked.
    #[error("Cannot start a thread for a connection")]
    Thread(#[source] io::Error),
    /// A thread of a connection ended without a word.
    #[error("A connection's thread died")]
    ThreadDied,
    /// The receiver was told to run the VM and did not answer.
    #[error(
        "Outcome unknown: receiver did not answer whether it runs VM, which stays paused here; look there first: \
         where it runs, end it here; where it does not and never will, resume it here"
    )]
    OutcomeUnknown {
        /// How the answer failed to come.
        source: PeerError,
    },
    /// The migration failed, and the VM could not be set going again.
    #[error("Migration failed ({}), and VM is not running as before", Chain(&**.failure))]
    Stuck {
        /// Why the migration failed.
        failure: Box<SendError>,
        /// What failed after that.
        #[source]
        recovery: Box<SendError>,
    },
}

impl From<Cancelled> for SendError {
    fn from(_: Cancelled) -> Self {
        Self::Cancelled
    }
}

impl From<TrackerError> for SendError {
    fn from(error: TrackerError) -> Self {
        Self::Tracking(error.into())
    }
}

impl From<DeviceSetError> for SendError {
    fn from(error: DeviceSetError) -> Self {
        Self::Devices(error.into())
    }
}

/// Where a failed migration leaves the VM at the source.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SourceVm {
    /// As it was before; it may be sent again.
    AsBefore,
    /// Paused, because it may be running at the receiver.
    PausedForSafety,
    /// Its vCPUs or devices could not be set going again.
    Stuck,
}

impl SendError {
    /// What kept a chunk of memory from being sent.
    pub(super) fn of_memory(source: PeerError) -> Self {
        let unreadable = match source {
            PeerError::Io(error) => error.downcast::<UnreadableMemory>().map_err(PeerError::Io),
            other => Err(other),
        };
        unreadable.map_or_else(|source| Self::Peer { step: SendStep::Memory, source }, Self::Memory)
    }

    /// Where the failure leaves the VM.
    pub fn source_vm(&self) -> SourceVm {
        match self {
            Self::OutcomeUnknown { .. } => SourceVm::PausedForSafety,
            Self::Stuck { .. } => SourceVm::Stuck,
            _ => SourceVm::AsBefore,
        }
    }
}

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
    pub degradations: Vec<Degradation>,
    /// Switchovers that were begun and taken back.
    pub back_outs: u32,
    /// Share of their time that the vCPUs had lost in the end.
    pub throttle_percent: u8,
}

/// Sends VMs.
///
/// ```
/// use std::sync::Mutex;
/// use vfio_migration::{device::DeviceSet, tracker::Tracker, vm::Vm};
/// use vfio_migration::transfer::{Migration, SendError, SendOptions, Sender, Sent};
///
/// fn move_away(
///     vm: &mut impl Vm,
///     tracker: &Mutex<Tracker>,
///     devices: &Mutex<DeviceSet>,
///     migration: &Migration,
/// ) -> Result<Sent, SendError> {
///     let mut options = SendOptions::new("tcp:destination:4444".parse().expect("a URL"));
///     options.downtime_ms = 100;
///     Sender::new(options).send(vm, tracker, devices, migration)
/// }
/// ```
#[derive(Debug, Clone)]
pub struct Sender {
    options: SendOptions,
}

impl Sender {
    /// Makes a sender; [`Sender::send`] refuses options out of their bounds.
    pub fn new(options: SendOptions) -> Self {
        Self { options }
    }

    /// Moves the running VM to the receiver; on success it stands still here, with no log running.
    ///
    /// Returns when the receiver has it. `tracker` knows its dirty pages and is locked for each collect and each chunk, never
    /// while bytes are sent: the VMM may map, unmap, plug and unplug meanwhile. `devices` are its pass-through devices, locked
    /// while they are moved, asked or read.
    ///
    /// # Errors
    /// An option is out of its bounds, or anything fails. The VM runs on here, its logs off, and may be sent again to another receiver, which then gets every page anew. The two
    /// exceptions are told by [`SendError::source_vm`].
    pub fn send<V: Vm>(
        &self,
        vm: &mut V,
        tracker: &Mutex<Tracker>,
        devices: &Mutex<DeviceSet>,
        migration: &Migration,
    ) -> Result<Sent, SendError> {
        self.options.check()?;
        Session::new(&self.options, vm, tracker, devices, migration).migrate()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::{Attempt, DeviceFailure};

    #[test]
    fn a_stuck_vm_tells_the_failure_and_the_device_behind_the_recovery_each_once() {
        let broken = || io::Error::from(io::ErrorKind::BrokenPipe);
        let failure = SendError::Peer { step: SendStep::Memory, source: PeerError::Io(broken()) };
        let name = "dma0".to_owned();
        let lost = DeviceSetError::Device { name, attempt: Attempt::Run, source: DeviceFailure::Reset };
        let stuck = SendError::Stuck { failure: failure.into(), recovery: Box::new(lost.into()) };
        assert_eq!(
            Chain(&stuck).to_string(),
            "Migration failed (Cannot copy memory to the receiver: Connection failed: broken pipe), and VM is not \
             running as before: Devices cannot be moved: Cannot run device \"dma0\": Device was reset, its state is lost"
        );
    }
}
