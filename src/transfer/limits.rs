// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What a peer may ask of this process: bytes, connections and time.
//!
//! A receiver checks lengths against these in `receive/message.rs`, where a request is read.

use std::fmt;
use std::num::NonZeroU8;
use std::time::Duration;

use thiserror::Error;

/// A number of additional connections the protocol does not know.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[error("{connections} connections are not between 1 and {}", ConnectionCount::MAX)]
#[non_exhaustive]
pub struct ConnectionCountError {
    /// What was asked for.
    pub connections: u64,
}

/// How many connections carry memory: 1 to 128.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ConnectionCount(NonZeroU8);

impl ConnectionCount {
    /// The least: the main connection carries everything.
    pub const ONE: Self = Self(NonZeroU8::MIN);

    /// The most the protocol knows.
    pub const MAX: Self = Self(NonZeroU8::MIN.saturating_add(127));

    /// Makes a number of connections.
    ///
    /// # Errors
    /// `connections` is not between 1 and 128.
    pub fn new(connections: u64) -> Result<Self, ConnectionCountError> {
        u8::try_from(connections)
            .ok()
            .and_then(NonZeroU8::new)
            .map(Self)
            .filter(|&count| count <= Self::MAX)
            .ok_or(ConnectionCountError { connections })
    }

    /// The number.
    pub fn count(self) -> usize {
        self.0.get().into()
    }
}

impl fmt::Display for ConnectionCount {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// The slowest peer that is not called stalled: in the middle of a message, `bytes` move in every `window` spent waiting.
///
/// Only time spent waiting for the peer counts, so a slow disk here does not make the peer look slow.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pace {
    /// How long the waits may last together until `bytes` have moved.
    pub window: Duration,
    /// Bytes that have to move in it.
    pub bytes: u64,
}

/// Pieces of one device's state that may come before one that is missing.
pub const PIECES_AHEAD: u64 = 16;

/// The least that a receiver of streamed device state takes in one piece, in bytes of the state.
pub const LEAST_PIECE_BYTES: u64 = 4096;

/// The smallest page that a guest has: a Memory table has at most a range for each.
pub const GUEST_PAGE_BYTES: u64 = 4096;

/// Every limit on what a peer may ask for; each can be set by itself.
///
/// No limit costs memory by itself: buffers grow as bytes arrive, never by what a peer claims. A text is held once: it goes
/// to the destination as it came.
///
/// ```
/// use vfio_migration::transfer::limits::PeerLimits;
/// let limits = PeerLimits { state_bytes: 8 << 30, ..PeerLimits::default() };
/// assert_eq!(limits.config_bytes, PeerLimits::default().config_bytes);
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PeerLimits {
    /// Bytes of JSON in a Config; 64 MiB.
    pub config_bytes: u64,
    /// Bytes of JSON in a State; 4 GiB, for a device's state is in it in base64: four bytes for three of the device's.
    ///
    /// A sender takes it for its receiver's limit, unless a receiver of this crate tells a lower one: a VM whose devices say that
    /// their state is larger is not stopped.
    ///
    /// That is the most memory that a source can take up with texts; a VMM that makes a tree of one takes more. A State that
    /// is too long shows when all memory has moved and the VM stands still, so the limit is no place to save.
    pub state_bytes: u64,
    /// Bytes of table in one Memory, and in all that are under way at a time, on whatever connections; 1 GiB, which is
    /// 64 Mi ranges. Tables of a large, fragmented VM are legal; one of more ranges than the VM has pages never is.
    pub table_bytes: u64,
    /// Bytes of guest memory a sender puts in one Memory on an additional connection; 64 MiB.
    pub chunk_bytes: u64,
    /// Bytes of a device's state in one piece; 1 MiB. A sender keeps to it; a receiver with less than [`LEAST_PIECE_BYTES`] does
    /// not offer to take streams.
    pub device_piece_bytes: u64,
    /// Bytes of device state that a receiver holds: pieces that come in or are being written, on all connections, and those that wait
    /// for the ones before them; 64 MiB. A sender keeps to it; a receiver that holds less than the least piece of each device does not
    /// offer to take streams.
    pub device_queue_bytes: u64,
    /// Bytes of one device's stream, those that were sent again as the device changed them among them; 16 TiB. A sender whose device
    /// says that it has more does not stop its VM.
    pub device_stream_bytes: u64,
    /// Times that one device's stream may begin, which it does again when something resets the device; 1024.
    pub device_sessions: u32,
    /// Additional connections a receiver accepts; 128.
    pub connections: ConnectionCount,
    /// How long a receiver waits for a source; one day.
    pub source_wait: Duration,
    /// How long connecting may take, for each address of the peer; 10 s.
    pub connect_timeout: Duration,
    /// How long a new connection may take, in all, for its TLS handshake and the first bytes of its first message; 10 s.
    pub handshake_timeout: Duration,
    /// How long a receiver waits for the next message while nothing arrives on any connection; 120 s. The time that it takes
    /// itself to keep what has arrived does not count.
    pub idle_timeout: Duration,
    /// How long a sender waits for the answer to any message but the last; 300 s.
    pub answer_timeout: Duration,
    /// How long a sender waits for the answer to a Complete, which a receiver may write everything to disk before; 1 h.
    pub complete_timeout: Duration,
    /// How long a sender holds its VM stopped before it tells the receiver to run it; 30 s, or
    /// [`PeerLimits::SWITCHOVER_DOWNTIMES`] downtime limits where those are longer. Then the VM runs on at the source.
    pub switchover_timeout: Duration,
    /// The slowest peer tolerated in the middle of a message; 64 KiB in 30 s.
    pub pace: Pace,
    /// How long a failed connection is read on, so that the peer finds the answer that says so; 500 ms.
    pub linger: Duration,
}

impl PeerLimits {
    /// Downtime limits that a switchover may take, however short [`PeerLimits::switchover_timeout`] is.
    pub const SWITCHOVER_DOWNTIMES: u32 = 4;
}

impl Default for PeerLimits {
    fn default() -> Self {
        Self {
            config_bytes: 64 << 20,
            state_bytes: 4 << 30,
            table_bytes: 1 << 30,
            chunk_bytes: 64 << 20,
            device_piece_bytes: 1 << 20,
            device_queue_bytes: 64 << 20,
            device_stream_bytes: 16 << 40,
            device_sessions: 1024,
            connections: ConnectionCount::MAX,
            source_wait: Duration::from_secs(24 * 60 * 60),
            connect_timeout: Duration::from_secs(10),
            handshake_timeout: Duration::from_secs(10),
            idle_timeout: Duration::from_secs(120),
            answer_timeout: Duration::from_secs(300),
            complete_timeout: Duration::from_secs(60 * 60),
            switchover_timeout: Duration::from_secs(30),
            pace: Pace { window: Duration::from_secs(30), bytes: 64 << 10 },
            linger: Duration::from_millis(500),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn connections_are_one_to_128() {
        for connections in [0, 129, 255, 256, 257, u64::MAX] {
            assert_eq!(ConnectionCount::new(connections), Err(ConnectionCountError { connections }));
        }
        assert_eq!(ConnectionCount::new(1), Ok(ConnectionCount::ONE));
        assert_eq!(ConnectionCount::new(128), Ok(ConnectionCount::MAX));
        assert_eq!(ConnectionCount::MAX.count(), 128);
        let text = ConnectionCount::new(129).unwrap_err().to_string();
        assert_eq!(text, "129 connections are not between 1 and 128");
    }

    #[test]
    fn a_state_holds_a_device_of_a_gibibyte_in_base64() {
        assert!(PeerLimits::default().state_bytes > (1 << 30) / 3 * 4);
    }
}
