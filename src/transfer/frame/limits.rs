// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What a destination of this crate takes, told in the payload of its answer to Start.
//!
//! All numbers are little-endian.
//!
//! ```text
//!            0             8                    16                  24                  32
//!  limits    | state_bytes | device_stream_bytes | device_queue_bytes | device_piece_bytes |
//! ```

use crate::transfer::limits::PeerLimits;

/// Bytes of [`ReceiverLimits`].
pub const RECEIVER_LIMITS_BYTES: usize = 32;

/// The limits of a destination that its source has to keep, or that tell it before its VM is stopped that the VM cannot move.
///
/// Each is the field of [`PeerLimits`] with its name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ReceiverLimits {
    /// Bytes of JSON in a State.
    pub state_bytes: u64,
    /// Bytes of one device's stream.
    pub device_stream_bytes: u64,
    /// Bytes of device state that are held.
    pub device_queue_bytes: u64,
    /// Bytes of a device's state in one piece.
    pub device_piece_bytes: u64,
}

impl ReceiverLimits {
    /// Encodes the limits.
    pub fn to_bytes(self) -> [u8; RECEIVER_LIMITS_BYTES] {
        let fields =
            [self.state_bytes, self.device_stream_bytes, self.device_queue_bytes, self.device_piece_bytes];
        let mut bytes = [0; RECEIVER_LIMITS_BYTES];
        bytes.as_chunks_mut().0.iter_mut().zip(fields).for_each(|(to, field)| *to = field.to_le_bytes());
        bytes
    }

    /// Decodes limits, which may be any.
    pub fn from_bytes(bytes: [u8; RECEIVER_LIMITS_BYTES]) -> Self {
        let field = |at: usize| u64::from_le_bytes(bytes.as_chunks().0[at]);
        Self {
            state_bytes: field(0),
            device_stream_bytes: field(1),
            device_queue_bytes: field(2),
            device_piece_bytes: field(3),
        }
    }
}

impl From<&PeerLimits> for ReceiverLimits {
    fn from(limits: &PeerLimits) -> Self {
        Self {
            state_bytes: limits.state_bytes,
            device_stream_bytes: limits.device_stream_bytes,
            device_queue_bytes: limits.device_queue_bytes,
            device_piece_bytes: limits.device_piece_bytes,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_have_these_bytes_both_ways() {
        let limits = ReceiverLimits {
            state_bytes: 1 << 32,
            device_stream_bytes: 16 << 40,
            device_queue_bytes: 64 << 20,
            device_piece_bytes: 0x0102_0304_0506_0708,
        };
        let golden = [
            [0, 0, 0, 0, 1, 0, 0, 0],
            [0, 0, 0, 0, 0, 16, 0, 0],
            [0, 0, 0, 4, 0, 0, 0, 0],
            [8, 7, 6, 5, 4, 3, 2, 1],
        ];
        assert_eq!(limits.to_bytes(), golden.concat()[..]);
        assert_eq!(ReceiverLimits::from_bytes(limits.to_bytes()), limits);
    }
}
