// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Wire types of Cloud Hypervisor's migration protocol, version 0.
//!
//! Every integer is little-endian. [`Request`] and [`Response`] share one 16-byte layout:
//!
//! | bytes | request | response |
//! |---|---|---|
//! | 0..2 | [`Command`] | [`Status`] |
//! | 2..8 | headers; `Start` puts the protocol version into the first two | padding |
//! | 8..16 | length of the payload that follows | length of the payload that follows |
//!
//! The payload of `Memory` is a [`MemoryRangeTable`], 16 bytes for each [`MemoryRange`], followed by
//! the bytes of all its ranges back to back. A migration is this sequence, each request answered by
//! one response:
//!
//! ```text
//! Start, MemoryFd* (same host only), Config, Memory*, State, Complete or CompletePaused
//! ```
//!
//! `Abandon` is legal at any point. An additional connection begins with a [`ConnectionRole`], which
//! is not answered.
//!
//! # What a peer can do
//!
//! Decoding never panics and never trusts a length: a table longer than 1 GiB is refused before
//! its first byte is read, and one within that bound takes memory only as its bytes arrive. A
//! connection that ends inside a message is [`MigratableError::MigrateSocket`] with
//! [`UnexpectedEof`](io::ErrorKind::UnexpectedEof), and a message that cannot be is
//! [`MigratableError::MigrateReceive`]. What the ranges of a decoded table point at is for the
//! receiver to check: only it knows the guest's memory.

mod error;
mod header;
mod request;
mod response;
mod role;
mod runs;
mod table;

pub use request::{Command, Request};
pub use response::{Response, Status};
pub use role::ConnectionRole;
pub use table::{MemoryRange, MemoryRangeTable};

use std::io::{self, Read, Write};
use std::ops::RangeInclusive;

use crate::MigratableError;

/// The protocol version that [`Request::start`] announces.
pub const CURRENT_PROTOCOL_VERSION: u16 = 0;

/// Returns the protocol versions a destination accepts: the current one and, if any, the one before.
pub fn supported_protocol_versions() -> RangeInclusive<u16> {
    CURRENT_PROTOCOL_VERSION.saturating_sub(1)..=CURRENT_PROTOCOL_VERSION
}

/// Reads until `buffer` is full or the stream ends, and returns the number of bytes read.
fn fill(fd: &mut dyn Read, buffer: &mut [u8]) -> Result<usize, MigratableError> {
    let mut filled = 0;
    while filled < buffer.len() {
        match fd.read(&mut buffer[filled..]) {
            Ok(0) => break,
            Ok(count) => filled += count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(MigratableError::MigrateSocket(error)),
        }
    }
    Ok(filled)
}

/// Reads exactly `N` bytes, which are the whole of one `message`.
fn read_message<const N: usize>(
    fd: &mut dyn Read,
    message: &'static str,
) -> Result<[u8; N], MigratableError> {
    let mut bytes = [0; N];
    match fill(fd, &mut bytes)? {
        received if received < N => Err(error::truncated(message, received as u64, N as u64)),
        _ => Ok(bytes),
    }
}

fn write_message(fd: &mut dyn Write, bytes: &[u8]) -> Result<(), MigratableError> {
    fd.write_all(bytes).map_err(MigratableError::MigrateSocket)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Serves its script, one step per call, then the end of the stream.
    struct Scripted(Vec<io::Result<Vec<u8>>>);

    impl Read for Scripted {
        fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
            if self.0.is_empty() {
                return Ok(0);
            }
            let bytes = self.0.remove(0)?;
            buffer[..bytes.len()].copy_from_slice(&bytes);
            Ok(bytes.len())
        }
    }

    #[test]
    fn short_and_interrupted_reads_are_continued() {
        let interrupted = || Err(io::ErrorKind::Interrupted.into());
        let mut fd = Scripted(vec![Ok(vec![1]), interrupted(), Ok(vec![2, 3]), interrupted(), Ok(vec![4])]);
        assert_eq!(read_message::<4>(&mut fd, "message").unwrap(), [1, 2, 3, 4]);
    }

    #[test]
    fn a_failing_read_keeps_its_errno() {
        let mut fd = Scripted(vec![Ok(vec![1]), Err(io::Error::from_raw_os_error(104))]);
        match read_message::<4>(&mut fd, "message").unwrap_err() {
            MigratableError::MigrateSocket(error) => assert_eq!(error.raw_os_error(), Some(104)),
            error => panic!("{error:?}"),
        }
    }

    #[test]
    fn the_current_version_is_among_the_supported() {
        assert!(supported_protocol_versions().contains(&CURRENT_PROTOCOL_VERSION));
        assert_eq!(supported_protocol_versions(), 0..=0);
    }
}
