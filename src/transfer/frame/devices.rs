// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What two ends of this crate say of devices to each other: who they are, and pieces of their states.
//!
//! All numbers are little-endian.
//!
//! ```text
//!            0          2         4            8           10           12             14         16
//!  list      | format=1 | count   | zero       | device ...
//!  device    | stream version     | name length| model len.| firmware l.| zero | name, model, firmware
//!
//!            0        2       4         8       16         24        28         32
//!  piece     | device | flags | session | index | position | version | checksum | bytes of the state
//! ```
//!
//! The checksum is CRC32C over all of a piece but itself. The last piece of a session has flag 1, and may be of no bytes.

use std::str;

use thiserror::Error;

use crate::device::saved::NAME_LIMIT_BYTES;
use crate::device::{Piece, StreamIdentity};
use crate::units::Count;

/// The only format of a list of devices so far.
const FORMAT: u16 = 1;

/// Bytes of a list before its devices.
const LIST_HEAD_BYTES: usize = 8;

/// Bytes of a device before its texts.
const DEVICE_HEAD_BYTES: usize = 12;

/// Most devices in a list.
pub const MOST_DEVICES: usize = 256;

/// Most bytes of a list.
pub const DEVICE_LIST_LIMIT_BYTES: u64 =
    (LIST_HEAD_BYTES + MOST_DEVICES * (DEVICE_HEAD_BYTES + 3 * NAME_LIMIT_BYTES)) as u64;

/// Bytes of a piece before those of the state.
pub const PIECE_HEAD_BYTES: usize = 32;

/// Where the checksum of a piece is.
const CHECKSUM_AT: usize = 28;

/// The flag of the last piece of a session.
const LAST: u16 = 1;

/// Why bytes are not what one end tells the other of devices.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum DeviceFrameError {
    /// A list of a format not known here.
    #[error("List of devices has format {format}, and {FORMAT} is known")]
    Format {
        /// The format.
        format: u16,
    },
    /// More devices than may be.
    #[error("List of devices has {count}, and at most {MOST_DEVICES} may be")]
    TooMany {
        /// How many.
        count: u16,
    },
    /// A text of a device that is too long.
    #[error("Text of a device has {}, and at most {NAME_LIMIT_BYTES} may be", Count(.bytes, "byte"))]
    TooLong {
        /// Its bytes.
        bytes: usize,
    },
    /// The bytes end too early, or too late.
    #[error("List of devices does not end where it says")]
    Length,
    /// A text is not UTF-8.
    #[error("Text of a device is not UTF-8")]
    Text,
    /// Two devices have one name.
    #[error("Two devices in the list have one name")]
    TwoOfOneName,
    /// A piece is shorter than its head.
    #[error("Piece of device state has {}, fewer than its head of {PIECE_HEAD_BYTES}", Count(.bytes, "byte"))]
    Short {
        /// Its bytes.
        bytes: usize,
    },
    /// A piece is not as it was sent.
    #[error("Piece of device state has checksum {actual:#010x} and should have {expected:#010x}")]
    Checksum {
        /// The checksum of what is there.
        actual: u32,
        /// What it says.
        expected: u32,
    },
    /// A piece has flags not known here.
    #[error("Piece of device state has unknown flags {flags:#06x}")]
    Flags {
        /// All its flags.
        flags: u16,
    },
    /// A piece that is of no bytes, and not the last one.
    #[error("Piece of device state is empty")]
    Empty,
}

/// Appends the list of these devices to `bytes`.
///
/// # Errors
/// There are too many, or a text is too long.
pub fn encode_devices(devices: &[StreamIdentity], bytes: &mut Vec<u8>) -> Result<(), DeviceFrameError> {
    let count = u16::try_from(devices.len()).unwrap_or(u16::MAX);
    if devices.len() > MOST_DEVICES {
        return Err(DeviceFrameError::TooMany { count });
    }
    bytes.extend(FORMAT.to_le_bytes());
    bytes.extend(count.to_le_bytes());
    bytes.extend([0; 4]);
    for device in devices {
        bytes.extend(device.stream_version.to_le_bytes());
        let texts = [&device.name, &device.model, &device.firmware];
        for text in texts {
            let length =
                u16::try_from(text.len()).ok().filter(|&length| usize::from(length) <= NAME_LIMIT_BYTES);
            let length = length.ok_or(DeviceFrameError::TooLong { bytes: text.len() })?;
            bytes.extend(length.to_le_bytes());
        }
        bytes.extend([0; 2]);
        texts.iter().for_each(|text| bytes.extend(text.as_bytes()));
    }
    Ok(())
}

/// Decodes a list of devices.
///
/// # Errors
/// The bytes are none.
pub fn decode_devices(bytes: &[u8]) -> Result<Vec<StreamIdentity>, DeviceFrameError> {
    let (head, mut rest) = bytes.split_first_chunk::<LIST_HEAD_BYTES>().ok_or(DeviceFrameError::Length)?;
    let [format_0, format_1, count_0, count_1, 0, 0, 0, 0] = *head else {
        return Err(DeviceFrameError::Length);
    };
    let (format, count) = (u16::from_le_bytes([format_0, format_1]), u16::from_le_bytes([count_0, count_1]));
    if format != FORMAT {
        return Err(DeviceFrameError::Format { format });
    }
    if usize::from(count) > MOST_DEVICES {
        return Err(DeviceFrameError::TooMany { count });
    }
    let mut devices: Vec<StreamIdentity> = Vec::new();
    for _ in 0..count {
        let device = decode_device(&mut rest)?;
        if devices.iter().any(|other| other.name == device.name) {
            return Err(DeviceFrameError::TwoOfOneName);
        }
        devices.push(device);
    }
    if rest.is_empty() { Ok(devices) } else { Err(DeviceFrameError::Length) }
}

fn decode_device(rest: &mut &[u8]) -> Result<StreamIdentity, DeviceFrameError> {
    let (head, texts) = rest.split_first_chunk::<DEVICE_HEAD_BYTES>().ok_or(DeviceFrameError::Length)?;
    let [v0, v1, v2, v3, n0, n1, m0, m1, f0, f1, 0, 0] = *head else { return Err(DeviceFrameError::Length) };
    *rest = texts;
    let mut text = |length: [u8; 2]| {
        let bytes = usize::from(u16::from_le_bytes(length));
        if bytes > NAME_LIMIT_BYTES {
            return Err(DeviceFrameError::TooLong { bytes });
        }
        let (text, after) = rest.split_at_checked(bytes).ok_or(DeviceFrameError::Length)?;
        *rest = after;
        str::from_utf8(text).map(str::to_owned).map_err(|_| DeviceFrameError::Text)
    };
    Ok(StreamIdentity {
        name: text([n0, n1])?,
        model: text([m0, m1])?,
        firmware: text([f0, f1])?,
        stream_version: u32::from_le_bytes([v0, v1, v2, v3]),
    })
}

/// Puts the head of a piece before its bytes: `payload` begins with [`PIECE_HEAD_BYTES`] that are overwritten.
///
/// # Panics
/// `payload` is shorter than the head.
pub(crate) fn seal_piece(piece: Piece, payload: &mut [u8]) {
    payload[..2].copy_from_slice(&piece.device.to_le_bytes());
    payload[2..4].copy_from_slice(&(if piece.last { LAST } else { 0 }).to_le_bytes());
    payload[4..8].copy_from_slice(&piece.session.to_le_bytes());
    payload[8..16].copy_from_slice(&piece.index.to_le_bytes());
    payload[16..24].copy_from_slice(&piece.position.to_le_bytes());
    payload[24..CHECKSUM_AT].copy_from_slice(&piece.version.to_le_bytes());
    let checksum = checksum(payload);
    payload[CHECKSUM_AT..PIECE_HEAD_BYTES].copy_from_slice(&checksum.to_le_bytes());
}

/// Decodes a piece; its bytes are what follows the head.
///
/// # Errors
/// The bytes are none, or are not those that were sent.
pub(crate) fn open_piece(payload: &[u8]) -> Result<Piece, DeviceFrameError> {
    let bytes = payload.len();
    let (head, data) =
        payload.split_first_chunk::<PIECE_HEAD_BYTES>().ok_or(DeviceFrameError::Short { bytes })?;
    let [d0, d1, f0, f1, s0, s1, s2, s3, i0, i1, i2, i3, i4, i5, i6, i7, rest @ ..] = *head;
    let [p0, p1, p2, p3, p4, p5, p6, p7, v0, v1, v2, v3, c0, c1, c2, c3] = rest;
    let (actual, expected) = (checksum(payload), u32::from_le_bytes([c0, c1, c2, c3]));
    if actual != expected {
        return Err(DeviceFrameError::Checksum { actual, expected });
    }
    let flags = u16::from_le_bytes([f0, f1]);
    if flags & !LAST != 0 {
        return Err(DeviceFrameError::Flags { flags });
    }
    let last = flags & LAST != 0;
    if data.is_empty() && !last {
        return Err(DeviceFrameError::Empty);
    }
    Ok(Piece {
        device: u16::from_le_bytes([d0, d1]),
        version: u32::from_le_bytes([v0, v1, v2, v3]),
        session: u32::from_le_bytes([s0, s1, s2, s3]),
        index: u64::from_le_bytes([i0, i1, i2, i3, i4, i5, i6, i7]),
        position: u64::from_le_bytes([p0, p1, p2, p3, p4, p5, p6, p7]),
        last,
    })
}

/// The checksum of a piece, which is at least as long as its head.
fn checksum(payload: &[u8]) -> u32 {
    crc32c::crc32c_append(crc32c::crc32c(&payload[..CHECKSUM_AT]), &payload[PIECE_HEAD_BYTES..])
}

/// Whether bytes are a piece of a device's state as it was sent.
///
/// # Errors
/// What is wrong with them.
pub fn check_piece(payload: &[u8]) -> Result<(), DeviceFrameError> {
    open_piece(payload).map(drop)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn device(name: &str) -> StreamIdentity {
        StreamIdentity {
            name: name.into(),
            model: "mlx5".into(),
            firmware: "22.1".into(),
            stream_version: 0x0403_0201,
        }
    }

    const PIECE: Piece = Piece {
        device: 0x0102,
        version: 0x0403_0201,
        session: 7,
        index: 0x1122_3344_5566_7788,
        position: 0x99,
        last: true,
    };

    fn sealed(piece: Piece, data: &[u8]) -> Vec<u8> {
        let mut payload = [&[0; PIECE_HEAD_BYTES], data].concat();
        seal_piece(piece, &mut payload);
        payload
    }

    #[test]
    fn a_list_of_devices_has_these_bytes_both_ways() {
        let mut golden = vec![1, 0, 2, 0, 0, 0, 0, 0];
        golden.extend([1, 2, 3, 4, 4, 0, 4, 0, 4, 0, 0, 0]);
        golden.extend(b"net0mlx522.1");
        golden.extend([1, 2, 3, 4, 1, 0, 4, 0, 4, 0, 0, 0]);
        golden.extend(b"amlx522.1");
        let devices = [device("net0"), device("a")];
        let mut bytes = Vec::new();
        encode_devices(&devices, &mut bytes).unwrap();
        assert_eq!(bytes, golden);
        assert_eq!(decode_devices(&golden).unwrap(), devices);
        assert_eq!(decode_devices(&[1, 0, 0, 0, 0, 0, 0, 0]), Ok(vec![]));
    }

    #[test]
    fn a_piece_has_these_bytes_both_ways() {
        let mut golden = vec![0x02, 0x01, 1, 0, 7, 0, 0, 0];
        golden.extend([0x88, 0x77, 0x66, 0x55, 0x44, 0x33, 0x22, 0x11]);
        golden.extend([0x99, 0, 0, 0, 0, 0, 0, 0, 1, 2, 3, 4]);
        golden.extend([0x72, 0x6c, 0xc5, 0x1f]);
        golden.extend(b"state");
        assert_eq!(sealed(PIECE, b"state"), golden);
        assert_eq!(open_piece(&golden), Ok(PIECE));
    }

    #[test]
    fn the_checksum_is_the_one_that_others_compute() {
        // The check value of CRC-32/ISCSI.
        assert_eq!(crc32c::crc32c(b"123456789"), 0xe306_9283);
    }

    #[test]
    fn every_length_of_a_list_meets_its_limit() {
        let refused = |bytes: &[u8]| decode_devices(bytes).unwrap_err();
        assert_eq!(refused(&[2, 0, 0, 0, 0, 0, 0, 0]), DeviceFrameError::Format { format: 2 });
        assert_eq!(refused(&[1, 0, 1, 1, 0, 0, 0, 0]), DeviceFrameError::TooMany { count: 257 });
        assert_eq!(refused(&[1, 0, 1, 0, 0, 0, 0, 0]), DeviceFrameError::Length);
        assert_eq!(refused(&[1, 0, 0, 0, 0, 0, 0, 1]), DeviceFrameError::Length);
        let with_name = |length: [u8; 2], name: &[u8]| {
            let head = [1, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, length[0], length[1], 0, 0, 0, 0, 0, 0];
            refused(&[&head, name].concat())
        };
        assert_eq!(with_name([1, 1], &[b'a'; 257]), DeviceFrameError::TooLong { bytes: 257 });
        assert_eq!(with_name([2, 0], b"a"), DeviceFrameError::Length);
        assert_eq!(with_name([1, 0], b"ab"), DeviceFrameError::Length);
        assert_eq!(with_name([1, 0], &[0xff]), DeviceFrameError::Text);
        let mut twice = Vec::new();
        encode_devices(&[device("a"), device("a")], &mut twice).unwrap();
        assert_eq!(refused(&twice), DeviceFrameError::TwoOfOneName);
        let long = StreamIdentity { name: "a".repeat(257), ..device("") };
        assert_eq!(encode_devices(&[long], &mut twice), Err(DeviceFrameError::TooLong { bytes: 257 }));
        let many: Vec<_> = (0..257).map(|number| device(&number.to_string())).collect();
        assert_eq!(encode_devices(&many, &mut twice), Err(DeviceFrameError::TooMany { count: 257 }));
    }

    #[test]
    fn a_piece_that_is_cut_or_of_nothing_is_refused() {
        assert_eq!(open_piece(&[0; 31]), Err(DeviceFrameError::Short { bytes: 31 }));
        assert_eq!(open_piece(&sealed(Piece { last: false, ..PIECE }, b"")), Err(DeviceFrameError::Empty));
        assert!(open_piece(&sealed(PIECE, b"")).is_ok());
        let mut payload = sealed(PIECE, b"state");
        payload[2] = 3;
        let checksum = checksum(&payload).to_le_bytes();
        payload[CHECKSUM_AT..PIECE_HEAD_BYTES].copy_from_slice(&checksum);
        assert_eq!(open_piece(&payload), Err(DeviceFrameError::Flags { flags: 3 }));
        payload.pop();
        assert!(matches!(open_piece(&payload), Err(DeviceFrameError::Checksum { .. })));
    }

    proptest! {
        #[test]
        fn a_flipped_bit_anywhere_in_a_piece_is_noticed(data in prop::collection::vec(any::<u8>(), 1..100), at in any::<prop::sample::Index>(), bit in 0..8) {
            let mut payload = sealed(PIECE, &data);
            let at = at.index(payload.len());
            payload[at] ^= 1_u8 << bit;
            let noticed = matches!(open_piece(&payload), Err(DeviceFrameError::Checksum { .. }));
            prop_assert!(noticed);
        }

        #[test]
        fn any_bytes_are_a_list_of_devices_or_an_error(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            if let Ok(devices) = decode_devices(&bytes) {
                let mut again = Vec::new();
                encode_devices(&devices, &mut again).unwrap();
                prop_assert_eq!(again, bytes);
            }
        }
    }
}
