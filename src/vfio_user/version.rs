// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The VERSION payload: protocol version and JSON capabilities.

use serde::{Deserialize, Serialize};
use zerocopy::little_endian::U16;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::decode::DecodeError;
use super::message::{MAX_BITMAP_BYTES, split};

/// The major version this library speaks.
pub const MAJOR: u16 = 0;
/// The newest minor version this library speaks.
pub const MINOR: u16 = 1;
/// Largest version data a peer may send, in bytes.
pub const MAX_VERSION_DATA_BYTES: usize = 16 << 10;
/// What a peer that announces no `max_data_xfer_size` takes, in bytes.
pub const DEFAULT_DATA_XFER_BYTES: u64 = 1 << 20;
/// Smallest dirty bitmap that a server's limit may allow in one message, in bytes: 8 MiB of memory at 4 KiB, so that the log
/// of a VM of 2 GiB takes 256 requests at most.
pub const MIN_BITMAP_BYTES: u64 = 256;
/// Smallest data transfer that a server's limit may allow, in bytes: a GiB of state takes 262,144 requests at most.
pub const MIN_DATA_XFER_BYTES: u64 = 4096;
/// Largest data transfer this library makes, whatever the peer allows, in bytes.
pub const MAX_DATA_XFER_BYTES: u64 = 16 << 20;

/// Is a decoded VERSION payload, request or reply.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Version {
    /// Major version; both sides must have the same.
    pub major: u16,
    /// Minor version; the reply's is at most the request's.
    pub minor: u16,
    /// What the sender can do.
    pub capabilities: PeerCapabilities,
}

/// Holds what a peer says it can do; what it leaves out has the specification's default.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PeerCapabilities {
    /// Most file descriptors the sender takes in one message.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_msg_fds: Option<u32>,
    /// Most bytes of data in one message.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_data_xfer_size: Option<u64>,
    /// Page sizes supported in DMA_MAP, or-ed together.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pgsizes: Option<u64>,
    /// Most ranges mapped at once.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_dma_maps: Option<u64>,
    /// Migration parameters; absent when the sender does not take part in migration.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub migration: Option<MigrationCapability>,
    /// A second socket for the server's own requests; absent when the sender has none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub twin_socket: Option<TwinSocketCapability>,
}

/// Holds the parameters of the second socket of [`PeerCapabilities`].
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct TwinSocketCapability {
    /// Whether the sender can use one; in a reply, whether one is passed along.
    #[serde(default)]
    pub supported: bool,
    /// In a reply, which of the message's descriptors it is.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub fd_index: Option<u32>,
}

/// Holds the migration parameters of [`PeerCapabilities`].
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct MigrationCapability {
    /// Bytes for each bit of a dirty bitmap.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pgsize: Option<u64>,
    /// Largest dirty bitmap in one message, in bytes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_bitmap_size: Option<u64>,
}

impl PeerCapabilities {
    /// Returns the most bytes of data in one message.
    pub fn data_xfer_bytes(&self) -> u64 {
        self.max_data_xfer_size.unwrap_or(DEFAULT_DATA_XFER_BYTES)
    }

    /// Returns the largest dirty bitmap in one message, in bytes, never above [`MAX_BITMAP_BYTES`].
    pub fn bitmap_bytes(&self) -> u64 {
        let announced = self.migration.as_ref().and_then(|migration| migration.max_bitmap_size);
        announced.unwrap_or(MAX_BITMAP_BYTES).min(MAX_BITMAP_BYTES)
    }
}

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct VersionHeader {
    major: U16,
    minor: U16,
}

#[derive(Default, Serialize, Deserialize)]
struct VersionData {
    #[serde(default)]
    capabilities: PeerCapabilities,
}

impl Version {
    /// Returns this library's version with `capabilities`.
    pub fn current(capabilities: PeerCapabilities) -> Self {
        Version { major: MAJOR, minor: MINOR, capabilities }
    }

    /// Decodes a request or a reply; version data is optional, its closing NUL too.
    ///
    /// # Errors
    ///
    /// The data is over [`MAX_VERSION_DATA_BYTES`] or not the JSON it should be.
    pub fn decode(payload: &[u8]) -> Result<Self, DecodeError> {
        let (header, data) = split::<VersionHeader>("VERSION", payload)?;
        if data.len() > MAX_VERSION_DATA_BYTES {
            let (value, limit) = (data.len() as u64, MAX_VERSION_DATA_BYTES as u64);
            return Err(DecodeError::OverLimit { what: "size of the version data", value, limit });
        }
        let json = data.strip_suffix(&[0]).unwrap_or(data);
        let data = match json {
            [] => VersionData::default(),
            json => serde_json::from_slice(json).map_err(DecodeError::Capabilities)?,
        };
        let (major, minor) = (header.major.get(), header.minor.get());
        Ok(Version { major, minor, capabilities: data.capabilities })
    }

    /// Encodes the payload, version data and closing NUL included.
    pub fn encode(&self) -> Vec<u8> {
        let header = VersionHeader { major: self.major.into(), minor: self.minor.into() };
        let data = VersionData { capabilities: self.capabilities.clone() };
        let mut payload = header.as_bytes().to_vec();
        serde_json::to_writer(&mut payload, &data).expect("numbers always encode, and a Vec takes all bytes");
        payload.push(0);
        payload
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const GOLDEN: &[u8] =
        b"\x00\x00\x01\x00{\"capabilities\":{\"max_msg_fds\":8,\"max_data_xfer_size\":1048576,\
        \"pgsizes\":4096,\"max_dma_maps\":16,\"migration\":{\"pgsize\":4096,\"max_bitmap_size\":65536},\
        \"twin_socket\":{\"supported\":true,\"fd_index\":0}}}\0";

    fn full() -> Version {
        Version::current(PeerCapabilities {
            max_msg_fds: Some(8),
            max_data_xfer_size: Some(1 << 20),
            pgsizes: Some(4096),
            max_dma_maps: Some(16),
            migration: Some(MigrationCapability { pgsize: Some(4096), max_bitmap_size: Some(65536) }),
            twin_socket: Some(TwinSocketCapability { supported: true, fd_index: Some(0) }),
        })
    }

    #[test]
    fn version_has_the_specified_bytes() {
        assert_eq!(full().encode(), GOLDEN);
        assert_eq!(Version::decode(GOLDEN).unwrap(), full());
    }

    #[test]
    fn version_of_the_common_c_server_decodes() {
        let reply = b"\0\0\x01\0{ \"capabilities\": { \"max_msg_fds\": 8, \"max_data_xfer_size\": 1048576, \
            \"migration\": { \"pgsize\": 4096 }, \"twin_socket\": { \"enable\": false } } }\0";
        let version = Version::decode(reply).unwrap();
        assert_eq!(version.capabilities.data_xfer_bytes(), 1 << 20);
        assert_eq!(version.capabilities.bitmap_bytes(), MAX_BITMAP_BYTES);
    }

    #[test]
    fn version_without_data_has_the_defaults() {
        for payload in [&b"\0\0\x01\0"[..], b"\0\0\x01\0\0", b"\0\0\x01\0{}\0"] {
            let version = Version::decode(payload).unwrap();
            assert_eq!(version.capabilities, PeerCapabilities::default());
            assert_eq!(version.capabilities.data_xfer_bytes(), DEFAULT_DATA_XFER_BYTES);
        }
    }

    #[test]
    fn version_data_that_is_no_json_or_too_long_is_rejected() {
        assert!(matches!(Version::decode(b"\0\0\x01\0{\"cap"), Err(DecodeError::Capabilities(_))));
        let negative = b"\0\0\x01\0{\"capabilities\":{\"max_data_xfer_size\":-1}}\0";
        assert!(matches!(Version::decode(negative), Err(DecodeError::Capabilities(_))));
        let nested = [b"\0\0\x01\0".to_vec(), vec![b'['; 8192]].concat();
        assert!(matches!(Version::decode(&nested), Err(DecodeError::Capabilities(_))));
        let long = vec![b' '; MAX_VERSION_DATA_BYTES + 5];
        assert!(matches!(Version::decode(&long), Err(DecodeError::OverLimit { .. })));
    }

    proptest! {
        #[test]
        fn version_roundtrips(fds: Option<u32>, xfer: Option<u64>, pgsizes: Option<u64>, maps: Option<u64>,
                              migration: Option<(Option<u64>, Option<u64>)>,
                              twin_socket: Option<(bool, Option<u32>)>) {
            let version = Version::current(PeerCapabilities {
                max_msg_fds: fds,
                max_data_xfer_size: xfer,
                pgsizes,
                max_dma_maps: maps,
                migration: migration
                    .map(|(pgsize, max_bitmap_size)| MigrationCapability { pgsize, max_bitmap_size }),
                twin_socket: twin_socket
                    .map(|(supported, fd_index)| TwinSocketCapability { supported, fd_index }),
            });
            prop_assert_eq!(Version::decode(&version.encode()).unwrap(), version);
        }

        #[test]
        fn any_version_bytes_are_decoded_or_rejected(bytes in proptest::collection::vec(any::<u8>(), 0..64)) {
            let _ = Version::decode(&bytes);
        }
    }
}
