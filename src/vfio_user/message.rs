// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The message header and the payloads of fixed shape.
//!
//! Each payload is the specification's structure, byte for byte, with little-endian fields. `decode` accepts a longer
//! payload than the structure (newer peers append fields) and never a shorter one; whatever follows is returned.

use derive_more::{Display, TryFrom};
use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::decode::DecodeError;

/// Bytes of the header that precedes every message.
pub const HEADER_BYTES: usize = size_of::<RawHeader>();
/// Largest bitmap a peer may announce or send, in bytes: the specification's default.
pub const MAX_BITMAP_BYTES: u64 = 256 << 20;
/// Largest message of any kind, header included: the largest bitmap and room for what surrounds it.
pub const MAX_MESSAGE_BYTES: u64 = MAX_BITMAP_BYTES + 4096;
/// Most data that a request of this library carries, in bytes.
///
/// A message of this size fits one socket buffer, which a UNIX socket hands over whole. Servers exist that read a message's
/// body with one `recv` and take the rest of a message that comes in pieces for the next one.
pub const MAX_REQUEST_DATA_BYTES: usize = 32 << 10;

/// `VFIO_DEVICE_FLAGS_RESET`: the device can be reset.
pub const DEVICE_FLAGS_RESET: u32 = 1 << 0;
/// `VFIO_DEVICE_FLAGS_PCI`: the device is a PCI device.
pub const DEVICE_FLAGS_PCI: u32 = 1 << 1;
/// `VFIO_REGION_INFO_FLAG_READ`: the region can be read.
pub const REGION_INFO_FLAG_READ: u32 = 1 << 0;
/// `VFIO_REGION_INFO_FLAG_WRITE`: the region can be written.
pub const REGION_INFO_FLAG_WRITE: u32 = 1 << 1;
/// The device may read the mapped memory.
pub const DMA_MAP_READABLE: u32 = 1 << 0;
/// The device may write the mapped memory.
pub const DMA_MAP_WRITEABLE: u32 = 1 << 1;

const TYPE_MASK: u32 = 0xf;
const TYPE_COMMAND: u32 = 0;
const TYPE_REPLY: u32 = 1;
const FLAG_NO_REPLY: u32 = 1 << 4;
const FLAG_ERROR: u32 = 1 << 5;

/// Names the requests this library makes and answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Display, TryFrom)]
#[try_from(repr)]
#[display(rename_all = "SCREAMING_SNAKE_CASE")]
#[repr(u16)]
pub enum VfioUserCommand {
    /// `VFIO_USER_VERSION`: negotiates version and capabilities.
    Version = 1,
    /// `VFIO_USER_DMA_MAP`: gives the device a range of IOVA space.
    DmaMap = 2,
    /// `VFIO_USER_DMA_UNMAP`: takes such a range back.
    DmaUnmap = 3,
    /// `VFIO_USER_DEVICE_GET_INFO`: asks for flags and counts.
    DeviceGetInfo = 4,
    /// `VFIO_USER_DEVICE_GET_REGION_INFO`: asks for one region's size.
    DeviceGetRegionInfo = 5,
    /// `VFIO_USER_REGION_READ`: reads registers.
    RegionRead = 9,
    /// `VFIO_USER_REGION_WRITE`: writes registers.
    RegionWrite = 10,
    /// `VFIO_USER_DMA_READ`: the server reads guest memory that it cannot map.
    DmaRead = 11,
    /// `VFIO_USER_DMA_WRITE`: the server writes guest memory that it cannot map.
    DmaWrite = 12,
    /// `VFIO_USER_DEVICE_RESET`: resets the device.
    DeviceReset = 13,
    /// `VFIO_USER_DEVICE_FEATURE`: probes, gets or sets a feature.
    DeviceFeature = 16,
    /// `VFIO_USER_MIG_DATA_READ`: reads migration data.
    MigDataRead = 17,
    /// `VFIO_USER_MIG_DATA_WRITE`: writes migration data.
    MigDataWrite = 18,
}

impl VfioUserCommand {
    /// Returns the command with this number, or `None` for one this library does not know.
    pub fn from_wire(number: u16) -> Option<Self> {
        Self::try_from(number).ok()
    }

    /// Returns the command's number.
    pub fn to_wire(self) -> u16 {
        self as u16
    }
}

/// Says what a message is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MessageKind {
    /// A request, answered unless it says otherwise.
    Command {
        /// The sender wants no answer.
        no_reply: bool,
    },
    /// An answer to a request that succeeded.
    Reply,
    /// An answer to a request that failed.
    ErrorReply {
        /// Why it failed; zero when the server does not say.
        errno: i32,
    },
}

/// Is a decoded message header, whose payload is known to fit in [`MAX_MESSAGE_BYTES`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    id: u16,
    command: u16,
    kind: MessageKind,
    message_bytes: u32,
}

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawHeader {
    id: U16,
    command: U16,
    message_bytes: U32,
    flags: U32,
    errno: U32,
}

impl Header {
    /// Returns a header for a payload of `payload_bytes`.
    ///
    /// # Errors
    ///
    /// [`DecodeError::OverLimit`] when the message would exceed [`MAX_MESSAGE_BYTES`].
    pub fn new(id: u16, command: u16, kind: MessageKind, payload_bytes: usize) -> Result<Self, DecodeError> {
        let value = (payload_bytes as u64).saturating_add(HEADER_BYTES as u64);
        match u32::try_from(value) {
            Ok(message_bytes) if value <= MAX_MESSAGE_BYTES => {
                Ok(Header { id, command, kind, message_bytes })
            }
            _ => Err(DecodeError::OverLimit { what: "message size", value, limit: MAX_MESSAGE_BYTES }),
        }
    }

    /// Decodes a header.
    ///
    /// # Errors
    ///
    /// The size it announces is smaller than the header or over [`MAX_MESSAGE_BYTES`], or its type is unknown.
    pub fn decode(bytes: &[u8; HEADER_BYTES]) -> Result<Self, DecodeError> {
        let raw: RawHeader = zerocopy::transmute!(*bytes);
        let message_bytes = raw.message_bytes.get() as usize;
        let payload_bytes = message_bytes.checked_sub(HEADER_BYTES).ok_or(DecodeError::TooShort {
            what: "message",
            needed: HEADER_BYTES,
            have: message_bytes,
        })?;
        let flags = raw.flags.get();
        let kind = match flags & TYPE_MASK {
            TYPE_COMMAND => MessageKind::Command { no_reply: flags & FLAG_NO_REPLY != 0 },
            TYPE_REPLY if flags & FLAG_ERROR != 0 => {
                MessageKind::ErrorReply { errno: i32::try_from(raw.errno.get()).unwrap_or(0) }
            }
            TYPE_REPLY => MessageKind::Reply,
            other => return Err(DecodeError::Invalid { what: "message type", value: other.into() }),
        };
        Header::new(raw.id.get(), raw.command.get(), kind, payload_bytes)
    }

    /// Encodes the header.
    pub fn encode(&self) -> [u8; HEADER_BYTES] {
        let (flags, errno) = match self.kind {
            MessageKind::Command { no_reply: false } => (TYPE_COMMAND, 0),
            MessageKind::Command { no_reply: true } => (TYPE_COMMAND | FLAG_NO_REPLY, 0),
            MessageKind::Reply => (TYPE_REPLY, 0),
            MessageKind::ErrorReply { errno } => (TYPE_REPLY | FLAG_ERROR, errno.unsigned_abs()),
        };
        zerocopy::transmute!(RawHeader {
            id: self.id.into(),
            command: self.command.into(),
            message_bytes: self.message_bytes.into(),
            flags: flags.into(),
            errno: errno.into(),
        })
    }

    /// Returns the sender's identifier, which a reply repeats.
    pub fn id(&self) -> u16 {
        self.id
    }

    /// Returns the command's number.
    pub fn command(&self) -> u16 {
        self.command
    }

    /// Returns what the message is.
    pub fn kind(&self) -> MessageKind {
        self.kind
    }

    /// Returns how many bytes follow the header.
    pub fn payload_bytes(&self) -> usize {
        self.message_bytes as usize - HEADER_BYTES
    }
}

/// Decodes the `T` at the start of `payload` and returns it with what follows.
pub(super) fn split<'a, T>(what: &'static str, payload: &'a [u8]) -> Result<(&'a T, &'a [u8]), DecodeError>
where
    T: FromBytes + KnownLayout + Immutable + Unaligned,
{
    T::ref_from_prefix(payload).map_err(|_| DecodeError::TooShort {
        what,
        needed: size_of::<T>(),
        have: payload.len(),
    })
}

/// Returns the first `announced` bytes of `rest`, which follow a fixed part.
pub(super) fn data<'a>(what: &'static str, announced: u32, rest: &'a [u8]) -> Result<&'a [u8], DecodeError> {
    let needed = announced as usize;
    rest.get(..needed).ok_or(DecodeError::TooShort { what, needed, have: rest.len() })
}

/// Is the payload of DMA_MAP: `struct vfio_user_dma_map`.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, Default, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned,
)]
#[repr(C)]
pub struct DmaMap {
    /// Size of this structure.
    pub argsz: U32,
    /// [`DMA_MAP_READABLE`] and [`DMA_MAP_WRITEABLE`].
    pub flags: U32,
    /// Where the range begins in the file that is passed along.
    pub offset: U64,
    /// First IOVA of the range.
    pub iova: U64,
    /// Bytes in the range.
    pub size: U64,
}

impl DmaMap {
    /// Decodes a request.
    pub fn decode(payload: &[u8]) -> Result<Self, DecodeError> {
        split("DMA_MAP", payload).map(|(map, _)| *map)
    }
}

/// Is the payload of DMA_UNMAP, request and reply: `struct vfio_user_dma_unmap`.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, Default, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned,
)]
#[repr(C)]
pub struct DmaUnmap {
    /// Largest payload of the reply.
    pub argsz: U32,
    /// Unused.
    pub flags: U32,
    /// First IOVA of the range.
    pub iova: U64,
    /// Bytes in the range.
    pub size: U64,
}

impl DmaUnmap {
    /// Decodes a request or a reply.
    pub fn decode(payload: &[u8]) -> Result<Self, DecodeError> {
        split("DMA_UNMAP", payload).map(|(unmap, _)| *unmap)
    }
}

/// Is the payload of DEVICE_GET_INFO, request and reply: `struct vfio_device_info`.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, Default, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned,
)]
#[repr(C)]
pub struct DeviceInfo {
    /// Largest payload of the reply.
    pub argsz: U32,
    /// [`DEVICE_FLAGS_RESET`] and [`DEVICE_FLAGS_PCI`].
    pub flags: U32,
    /// How many regions the device has.
    pub num_regions: U32,
    /// How many kinds of interrupt it has.
    pub num_irqs: U32,
}

impl DeviceInfo {
    /// Decodes a request or a reply.
    pub fn decode(payload: &[u8]) -> Result<Self, DecodeError> {
        split("DEVICE_GET_INFO", payload).map(|(info, _)| *info)
    }
}

/// Is the payload of DEVICE_GET_REGION_INFO without capabilities: `struct vfio_region_info`.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, Default, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned,
)]
#[repr(C)]
pub struct RegionInfo {
    /// Largest payload of the reply; in a reply, the size it would need with its capabilities.
    pub argsz: U32,
    /// [`REGION_INFO_FLAG_READ`] and [`REGION_INFO_FLAG_WRITE`], among others.
    pub flags: U32,
    /// Which region.
    pub index: U32,
    /// Where its capabilities begin.
    pub cap_offset: U32,
    /// Bytes in the region.
    pub size: U64,
    /// Where the region begins in the file to map it from.
    pub offset: U64,
}

impl RegionInfo {
    /// Decodes a request or a reply; capabilities are ignored.
    pub fn decode(payload: &[u8]) -> Result<Self, DecodeError> {
        split("DEVICE_GET_REGION_INFO", payload).map(|(info, _)| *info)
    }
}

/// Is the fixed part of REGION_READ and REGION_WRITE: `struct vfio_user_region_access`.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, Default, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned,
)]
#[repr(C)]
pub struct RegionAccess {
    /// Offset within the region.
    pub offset: U64,
    /// Which region.
    pub region: U32,
    /// Bytes to transfer, or transferred.
    pub count: U32,
}

impl RegionAccess {
    /// Decodes a REGION_READ request or a REGION_WRITE reply, which carry no data.
    pub fn decode(payload: &[u8]) -> Result<Self, DecodeError> {
        split("region access", payload).map(|(access, _)| *access)
    }

    /// Decodes a REGION_READ reply or a REGION_WRITE request with its `count` bytes of data.
    pub fn decode_with_data(payload: &[u8]) -> Result<(Self, &[u8]), DecodeError> {
        let (access, rest) = split::<Self>("region access", payload)?;
        Ok((*access, data("region data", access.count.get(), rest)?))
    }
}

/// Is the fixed part of DMA_READ and DMA_WRITE: `struct vfio_user_dma_region_access`.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, Default, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned,
)]
#[repr(C)]
pub struct DmaAccess {
    /// First IOVA.
    pub iova: U64,
    /// Bytes to transfer, or transferred.
    pub count: U64,
}

impl DmaAccess {
    /// Decodes a DMA_READ request or a DMA_WRITE reply, which carry no data.
    pub fn decode(payload: &[u8]) -> Result<Self, DecodeError> {
        split("DMA access", payload).map(|(access, _)| *access)
    }

    /// Decodes a DMA_WRITE request or a DMA_READ reply with its `count` bytes of data.
    pub fn decode_with_data(payload: &[u8]) -> Result<(Self, &[u8]), DecodeError> {
        let (access, rest) = split::<Self>("DMA access", payload)?;
        let needed = usize::try_from(access.count.get()).unwrap_or(usize::MAX);
        let too_short = DecodeError::TooShort { what: "DMA data", needed, have: rest.len() };
        Ok((*access, rest.get(..needed).ok_or(too_short)?))
    }
}

/// Is the fixed part of MIG_DATA_READ and MIG_DATA_WRITE: `struct vfio_user_mig_data`.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, Default, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned,
)]
#[repr(C)]
pub struct MigData {
    /// Largest payload of the reply, or size of this one.
    pub argsz: U32,
    /// Bytes of migration data asked for, or carried.
    pub size: U32,
}

impl MigData {
    /// Decodes a MIG_DATA_READ request, which carries no data.
    pub fn decode(payload: &[u8]) -> Result<Self, DecodeError> {
        split("migration data", payload).map(|(header, _)| *header)
    }

    /// Decodes a MIG_DATA_READ reply or a MIG_DATA_WRITE request and returns its data.
    pub fn decode_with_data(payload: &[u8]) -> Result<&[u8], DecodeError> {
        let (header, rest) = split::<Self>("migration data", payload)?;
        data("migration data", header.size.get(), rest)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const REQUEST: [u8; 16] = [0x34, 0x12, 16, 0, 24, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    const ERROR_REPLY: [u8; 16] = [0x34, 0x12, 16, 0, 16, 0, 0, 0, 0x21, 0, 0, 0, 22, 0, 0, 0];

    #[test]
    fn commands_are_shown_as_the_specification_names_them() {
        let shown: Vec<_> =
            (0..20).filter_map(VfioUserCommand::from_wire).map(|known| known.to_string()).collect();
        let specified = "VERSION DMA_MAP DMA_UNMAP DEVICE_GET_INFO DEVICE_GET_REGION_INFO REGION_READ REGION_WRITE DMA_READ \
                         DMA_WRITE DEVICE_RESET DEVICE_FEATURE MIG_DATA_READ MIG_DATA_WRITE";
        assert_eq!(shown.join(" "), specified);
    }

    #[test]
    fn header_has_the_specified_bytes() {
        let request = Header::new(0x1234, 16, MessageKind::Command { no_reply: false }, 8).unwrap();
        assert_eq!(request.encode(), REQUEST);
        assert_eq!(Header::decode(&REQUEST).unwrap(), request);
        let refusal = Header::new(0x1234, 16, MessageKind::ErrorReply { errno: 22 }, 0).unwrap();
        assert_eq!(refusal.encode(), ERROR_REPLY);
        assert_eq!(Header::decode(&ERROR_REPLY).unwrap(), refusal);
    }

    #[test]
    fn header_with_an_impossible_size_is_rejected() {
        for (size, too_short) in [(0_u32, true), (15, true), (u32::MAX, false), (0x1000_1001, false)] {
            let mut bytes = REQUEST;
            bytes[4..8].copy_from_slice(&size.to_le_bytes());
            match Header::decode(&bytes) {
                Err(DecodeError::TooShort { .. }) => assert!(too_short, "{size}"),
                Err(DecodeError::OverLimit { .. }) => assert!(!too_short, "{size}"),
                other => panic!("{size}: {other:?}"),
            }
        }
    }

    #[test]
    fn header_of_unknown_type_is_rejected() {
        let mut bytes = REQUEST;
        bytes[8] = 2;
        assert!(matches!(Header::decode(&bytes), Err(DecodeError::Invalid { value: 2, .. })));
    }

    #[test]
    fn fixed_payloads_have_the_specified_bytes() {
        let map = DmaMap {
            argsz: 32.into(),
            flags: 3.into(),
            offset: 0x1000.into(),
            iova: 0x1_0000_0000.into(),
            size: 0x2000.into(),
        };
        let map_bytes = [
            32, 0, 0, 0, 3, 0, 0, 0, 0, 0x10, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0x20, 0, 0, 0, 0,
            0, 0,
        ];
        assert_eq!(map.as_bytes(), map_bytes);
        assert_eq!(DmaMap::decode(&map_bytes).unwrap(), map);

        let unmap = DmaUnmap { argsz: 24.into(), flags: 0.into(), iova: 0x3000.into(), size: 0x1000.into() };
        let unmap_bytes = [24, 0, 0, 0, 0, 0, 0, 0, 0, 0x30, 0, 0, 0, 0, 0, 0, 0, 0x10, 0, 0, 0, 0, 0, 0];
        assert_eq!(unmap.as_bytes(), unmap_bytes);
        assert_eq!(DmaUnmap::decode(&unmap_bytes).unwrap(), unmap);

        let info =
            DeviceInfo { argsz: 16.into(), flags: 3.into(), num_regions: 9.into(), num_irqs: 5.into() };
        let info_bytes = [16, 0, 0, 0, 3, 0, 0, 0, 9, 0, 0, 0, 5, 0, 0, 0];
        assert_eq!(info.as_bytes(), info_bytes);
        assert_eq!(DeviceInfo::decode(&info_bytes).unwrap(), info);

        let region = RegionInfo {
            argsz: 32.into(),
            flags: 3.into(),
            index: 7.into(),
            cap_offset: 0.into(),
            size: 256.into(),
            offset: 0x40.into(),
        };
        let region_bytes = [
            32, 0, 0, 0, 3, 0, 0, 0, 7, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0x40, 0, 0, 0, 0, 0, 0,
            0,
        ];
        assert_eq!(region.as_bytes(), region_bytes);
        assert_eq!(RegionInfo::decode(&region_bytes).unwrap(), region);
    }

    #[test]
    fn data_payloads_have_the_specified_bytes() {
        let access = [8, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 4, 0, 0, 0, 0xaa, 0xbb, 0xcc, 0xdd];
        let (header, bytes) = RegionAccess::decode_with_data(&access).unwrap();
        assert_eq!(header, RegionAccess { offset: 8.into(), region: 2.into(), count: 4.into() });
        assert_eq!(header.as_bytes(), &access[..16]);
        assert_eq!(bytes, [0xaa, 0xbb, 0xcc, 0xdd]);

        let access = [0, 0x30, 0, 0, 1, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0, 0xaa, 0xbb];
        let (header, bytes) = DmaAccess::decode_with_data(&access).unwrap();
        assert_eq!(header, DmaAccess { iova: 0x1_0000_3000.into(), count: 2.into() });
        assert_eq!((header.as_bytes(), bytes), access.split_at(16));

        let data = [11, 0, 0, 0, 3, 0, 0, 0, 1, 2, 3];
        assert_eq!(MigData::decode(&data).unwrap(), MigData { argsz: 11.into(), size: 3.into() });
        assert_eq!(MigData::decode(&data).unwrap().as_bytes(), &data[..8]);
        assert_eq!(MigData::decode_with_data(&data).unwrap(), [1, 2, 3]);
    }

    #[test]
    fn padding_after_the_announced_data_is_not_data() {
        assert_eq!(MigData::decode_with_data(&[12, 0, 0, 0, 1, 0, 0, 0, 7, 0, 0, 0]).unwrap(), [7]);
    }

    #[test]
    fn every_command_survives_its_number() {
        let known = (0..=u16::MAX).filter_map(VfioUserCommand::from_wire).collect::<Vec<_>>();
        assert_eq!(known.len(), 13);
        assert!(known.iter().all(|c| VfioUserCommand::from_wire(c.to_wire()) == Some(*c)));
    }

    proptest! {
        #[test]
        fn header_roundtrips(id: u16, command: u16, pick in 0..3_usize, errno in 0..4096, payload in 0..1_usize << 20) {
            let kind = [MessageKind::Command { no_reply: errno % 2 == 0 }, MessageKind::Reply, MessageKind::ErrorReply { errno }][pick];
            let header = Header::new(id, command, kind, payload).unwrap();
            prop_assert_eq!(Header::decode(&header.encode()).unwrap(), header);
        }

        #[test]
        fn header_of_any_bytes_is_bounded_or_rejected(bytes: [u8; 16]) {
            if let Ok(header) = Header::decode(&bytes) {
                prop_assert!(header.payload_bytes() as u64 + 16 <= MAX_MESSAGE_BYTES);
            }
        }

        #[test]
        fn truncated_payloads_are_rejected(bytes in proptest::collection::vec(any::<u8>(), 0..40)) {
            prop_assert_eq!(DmaMap::decode(&bytes).is_ok(), bytes.len() >= 32);
            prop_assert_eq!(DmaUnmap::decode(&bytes).is_ok(), bytes.len() >= 24);
            prop_assert_eq!(DeviceInfo::decode(&bytes).is_ok(), bytes.len() >= 16);
            prop_assert_eq!(RegionInfo::decode(&bytes).is_ok(), bytes.len() >= 32);
            prop_assert_eq!(RegionAccess::decode(&bytes).is_ok(), bytes.len() >= 16);
            prop_assert_eq!(DmaAccess::decode(&bytes).is_ok(), bytes.len() >= 16);
            prop_assert_eq!(MigData::decode(&bytes).is_ok(), bytes.len() >= 8);
            if let Ok((access, data)) = DmaAccess::decode_with_data(&bytes) {
                prop_assert_eq!(access.count.get(), data.len() as u64);
            }
            if let Ok((access, data)) = RegionAccess::decode_with_data(&bytes) {
                prop_assert_eq!(access.count.get() as usize, data.len());
            }
            if let Ok(data) = MigData::decode_with_data(&bytes) {
                prop_assert!(data.len() + 8 <= bytes.len());
            }
        }
    }
}
