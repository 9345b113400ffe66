// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A device's saved state in the Snapshot tree.
//!
//! The device's node has two children. [`STATE_CHILD`] is `{"blob": "<base64>"}`, the device's stream and nothing
//! else: Cloud Hypervisor's shape, so that snapshots cross over both ways. [`META_CHILD`], which Cloud Hypervisor
//! does not look at, is `{"version": 2, "meta": "<base64>"}` with the identity of the device and the stream's length
//! and checksum. A node without it is loaded unchecked.
//!
//! Cloud Hypervisor keeps the stream one level further down, in [`COMMON_CHILD`] of the device's node. [`Nesting`] says where
//! it is written; it is read wherever it is.

use std::borrow::Cow;
use std::fmt;

use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use serde::{Deserialize, Serialize};
use thiserror::Error;
use versionize::{VersionMap, Versionize, VersionizeError, VersionizeResult};
use versionize_derive::Versionize;
use vm_migration::{MigratableError, Snapshot, state_from_id};

use super::STATE_LIMIT_BYTES;
use super::blob::Blob;
use crate::state_tree::leaf_of_text;

use crate::units::Count;

mod streamed;
mod text;

pub use streamed::STREAMED_CHILD;
pub(super) use streamed::{streamed_bytes, streamed_to_snapshot};
pub(super) use text::SavedText;

/// Id of the child that holds the device's stream.
pub const STATE_CHILD: &str = "vfio_migration";

/// Id of the child that holds what this library adds.
pub const META_CHILD: &str = "vfio_migration_meta";

/// Id of the child of a device's node in which Cloud Hypervisor keeps [`STATE_CHILD`], beside the device's registers.
pub const COMMON_CHILD: &str = "vfio_common";

/// Most bytes of a device's name, and of its kind.
pub const NAME_LIMIT_BYTES: usize = 256;

/// Most bytes of what this library adds, decoded.
pub const META_LIMIT_BYTES: usize = 1024;

/// Why a saved state could not be written or read.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum SavedStateError {
    /// The tree does not take or give a state in this shape.
    #[error("Cannot handle snapshot {child:?} of the device")]
    Snapshot {
        /// Id of the child.
        child: &'static str,
        /// What the Snapshot tree says.
        source: MigratableError,
    },
    /// The node has no stream.
    #[error("Snapshot of the device has no {STATE_CHILD:?}")]
    NoState,
    /// A text is longer than allowed; it was not decoded.
    #[error(
        "{child:?} holds {text_bytes} bytes of base64, and at most {limit_bytes} are allowed ({})",
        limit_of(child)
    )]
    TooLong {
        /// Id of the child.
        child: &'static str,
        /// Its length.
        text_bytes: usize,
        /// Most bytes allowed.
        limit_bytes: usize,
    },
    /// A text is no base64.
    #[error("{child:?} holds no base64")]
    Base64 {
        /// Id of the child.
        child: &'static str,
        /// What is wrong with it.
        source: base64::DecodeError,
    },
    /// The metadata is of a version this library does not know.
    #[error(
        "{META_CHILD:?} has version {version}; known are {} to {}",
        SavedVersion::OLDEST,
        SavedVersion::LATEST
    )]
    Version {
        /// The version it says.
        version: u16,
    },
    /// A name in the metadata is longer than allowed, or than what is there.
    #[error(
        "{META_CHILD:?} claims a name of {}; {available_bytes} are there, {NAME_LIMIT_BYTES} allowed",
        Count(.claimed_bytes, "byte")
    )]
    Name {
        /// Its length, as claimed.
        claimed_bytes: u64,
        /// Bytes that follow.
        available_bytes: usize,
    },
    /// The metadata is not of the form its version says.
    #[error("{META_CHILD:?} of version {version} cannot be read or written: {cause}")]
    Meta {
        /// The version it says.
        version: u16,
        /// What versionize says; it is no [`std::error::Error`].
        cause: VersionizeError,
    },
    /// The metadata goes on where it should end.
    #[error("{META_CHILD:?} has {} too many", Count(.trailing_bytes, "byte"))]
    Trailing {
        /// Bytes left over.
        trailing_bytes: usize,
    },
    /// The stream is not as long as when it was saved.
    #[error("Saved state has {} and should have {expected_bytes}", Count(.actual_bytes, "byte"))]
    Length {
        /// Bytes there are.
        actual_bytes: usize,
        /// Bytes that were saved.
        expected_bytes: u64,
    },
    /// More of the stream is said to come from PRE_COPY than there is.
    #[error("Saved state has {}, of which {precopy_bytes} cannot come from PRE_COPY", Count(.state_bytes, "byte"))]
    Layout {
        /// Bytes of the stream.
        state_bytes: u64,
        /// Bytes said to come from PRE_COPY.
        precopy_bytes: u64,
    },
    /// The stream is not the one that was saved.
    #[error("Saved state has checksum {actual:#018x} and should have {expected:#018x}")]
    Checksum {
        /// Checksum of what is there.
        actual: u64,
        /// Checksum of what was saved.
        expected: u64,
    },
    /// The state is another device's.
    #[error("Saved state is of {saved}, not of {device}")]
    Identity {
        /// Whose it is.
        saved: Identity,
        /// The device it was loaded into.
        device: Identity,
    },
}

/// What sets the limit of a child.
fn limit_of(child: &str) -> &'static str {
    if child == STATE_CHILD { "Device::state_limit" } else { "fixed" }
}

/// How far down in a device's node its state is written. Both are found when a state is loaded.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Nesting {
    /// `<name>/vfio_migration`.
    #[default]
    Flat,
    /// `<name>/vfio_common/vfio_migration`, as Cloud Hypervisor does it.
    Common,
}

impl Nesting {
    /// Makes of a device's state the node that goes by the device's name.
    pub(super) fn wrap(self, state: Snapshot) -> Snapshot {
        match self {
            Self::Flat => state,
            Self::Common => {
                let mut node = Snapshot::default();
                node.add_snapshot(COMMON_CHILD.to_owned(), state);
                node
            }
        }
    }
}

/// Returns the node that holds a device's state, of the node that goes by the device's name; `None` where it holds none.
pub(super) fn state_node(node: &Snapshot) -> Option<&Snapshot> {
    let common = node.snapshots.get(COMMON_CHILD);
    [Some(node), common].into_iter().flatten().find(|node| node.snapshots.contains_key(STATE_CHILD))
}

/// Bytes of base64 that stand for so many bytes of state.
pub fn text_bytes(state_bytes: u64) -> u64 {
    state_bytes.div_ceil(3).saturating_mul(4)
}

/// The identity of a device that its saved state must match.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Identity {
    /// Its name in this VM: `net0`.
    pub name: String,
    /// What it is; a state is only loaded into a device of the same kind: `15b3:101e mlx5`.
    pub kind: String,
}

impl fmt::Display for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "device {:?} of kind {:?}", self.name, self.kind)
    }
}

/// Versions of what this library adds to a saved state. It writes and reads the latest and the one before.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u16)]
pub enum SavedVersion {
    /// Identity and length.
    V1 = 1,
    /// In addition the layout of the stream, and its checksum.
    V2 = 2,
}

impl SavedVersion {
    /// Oldest version that can be written and read.
    pub const OLDEST: Self = Self::V1;
    /// Version written unless asked otherwise.
    pub const LATEST: Self = Self::V2;

    fn from_number(number: u16) -> Option<Self> {
        [Self::V1, Self::V2].into_iter().find(|&version| version as u16 == number)
    }
}

impl fmt::Display for SavedVersion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", *self as u16)
    }
}

/// A device's state as it was saved.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SavedState {
    /// Whose it is; `None` in a snapshot that does not say.
    pub identity: Option<Identity>,
    /// The device's stream.
    pub stream: Vec<u8>,
    /// How much of the stream came in PRE_COPY; `None` in a snapshot that does not say.
    pub precopy_bytes: Option<u64>,
}

/// The child [`META_CHILD`].
#[derive(Serialize, Deserialize)]
struct MetaText<'a> {
    version: u16,
    #[serde(borrow)]
    meta: Cow<'a, str>,
}

/// What lies in the metadata, in this order. The two strings stay first: [`check_names`] relies on it.
#[derive(Debug, Clone, PartialEq, Eq, Versionize)]
struct Meta {
    name: String,
    kind: String,
    state_bytes: u64,
    #[version(start = 2)]
    precopy_bytes: u64,
    #[version(start = 2)]
    checksum: u64,
}

impl Meta {
    fn versions() -> VersionMap {
        let mut versions = VersionMap::new();
        versions.new_version().set_type_version(<Self as Versionize>::type_id(), 2);
        versions
    }

    fn to_bytes(&self, version: SavedVersion) -> Result<Vec<u8>, SavedStateError> {
        let mut bytes = Vec::new();
        self.serialize(&mut bytes, &Self::versions(), version as u16)
            .map_err(|cause| SavedStateError::Meta { version: version as u16, cause })?;
        Ok(bytes)
    }

    fn from_bytes(mut bytes: &[u8], version: SavedVersion) -> Result<Self, SavedStateError> {
        check_names(bytes)?;
        let meta = Self::deserialize(&mut bytes, &Self::versions(), version as u16)
            .map_err(|cause| SavedStateError::Meta { version: version as u16, cause })?;
        match bytes.len() {
            0 => Ok(meta),
            trailing_bytes => Err(SavedStateError::Trailing { trailing_bytes }),
        }
    }

    /// Compares a stream of so many bytes, with this checksum, with what is said of it.
    fn check(&self, bytes: usize, actual: u64, version: SavedVersion) -> Result<(), SavedStateError> {
        if self.state_bytes != bytes as u64 {
            let (actual_bytes, expected_bytes) = (bytes, self.state_bytes);
            return Err(SavedStateError::Length { actual_bytes, expected_bytes });
        }
        if version < SavedVersion::V2 {
            return Ok(());
        }
        if self.precopy_bytes > self.state_bytes {
            let (state_bytes, precopy_bytes) = (self.state_bytes, self.precopy_bytes);
            return Err(SavedStateError::Layout { state_bytes, precopy_bytes });
        }
        if self.checksum != actual {
            return Err(SavedStateError::Checksum { actual, expected: self.checksum });
        }
        Ok(())
    }
}

impl SavedState {
    /// Reads a device's node of the Snapshot tree, a state of at most [`STATE_LIMIT_BYTES`], in either [`Nesting`].
    ///
    /// Checks every length before it decodes anything, and the stream against what the metadata says of it.
    ///
    /// # Errors
    /// The node has no stream, or something in it is too long, malformed or contradictory.
    pub fn from_snapshot(node: &Snapshot) -> Result<Self, SavedStateError> {
        Self::from_snapshot_within(node, STATE_LIMIT_BYTES)
    }

    /// As [`SavedState::from_snapshot`], with a limit of the caller's.
    ///
    /// # Errors
    /// As [`SavedState::from_snapshot`].
    pub fn from_snapshot_within(node: &Snapshot, limit_bytes: usize) -> Result<Self, SavedStateError> {
        let text = SavedText::check(node, limit_bytes)?;
        let mut stream = Vec::with_capacity(text.bytes());
        text.each_piece(|piece| {
            stream.extend_from_slice(piece);
            Ok::<_, SavedStateError>(())
        })?;
        let (identity, precopy_bytes) = text.into_meta();
        Ok(Self { identity, stream, precopy_bytes })
    }

    /// Checks that the state may go into `device`.
    ///
    /// # Errors
    /// It says it is of another.
    pub fn check_identity(&self, device: &Identity) -> Result<(), SavedStateError> {
        check_identity(self.identity.as_ref(), device)
    }
}

fn check_identity(saved: Option<&Identity>, device: &Identity) -> Result<(), SavedStateError> {
    match saved {
        Some(saved) if saved != device => {
            Err(SavedStateError::Identity { saved: saved.clone(), device: device.clone() })
        }
        _ => Ok(()),
    }
}

/// Makes a device's node of the Snapshot tree from its stream, of which `precopy_bytes` came in PRE_COPY.
///
/// # Errors
/// A name is longer than [`NAME_LIMIT_BYTES`].
pub fn to_snapshot(
    identity: &Identity,
    stream: &[u8],
    precopy_bytes: u64,
    version: SavedVersion,
) -> Result<Snapshot, SavedStateError> {
    blob_to_snapshot(identity, Blob::of(stream), precopy_bytes, version)
}

/// As [`to_snapshot`], of a stream that was put in its shape as it came; its text is not copied.
pub(super) fn blob_to_snapshot(
    identity: &Identity,
    blob: Blob,
    precopy_bytes: u64,
    version: SavedVersion,
) -> Result<Snapshot, SavedStateError> {
    let meta = Meta {
        name: identity.name.clone(),
        kind: identity.kind.clone(),
        state_bytes: blob.bytes() as u64,
        precopy_bytes,
        checksum: blob.checksum(),
    };
    let meta = meta.to_bytes(version)?;
    check_names(&meta)?;
    let mut node = Snapshot::default();
    let leaf = leaf_of_text(blob.into_text())
        .map_err(|source| SavedStateError::Snapshot { child: STATE_CHILD, source })?;
    node.add_snapshot(STATE_CHILD.to_owned(), leaf);
    let text = MetaText { version: version as u16, meta: BASE64.encode(meta).into() };
    add_child(&mut node, META_CHILD, &text)?;
    Ok(node)
}

fn child<'a, T: Deserialize<'a>>(
    node: &'a Snapshot,
    child: &'static str,
) -> Result<Option<T>, SavedStateError> {
    state_from_id(Some(node), child).map_err(|source| SavedStateError::Snapshot { child, source })
}

fn add_child(
    node: &mut Snapshot,
    child: &'static str,
    state: &impl Serialize,
) -> Result<(), SavedStateError> {
    let leaf =
        Snapshot::new_from_state(state).map_err(|source| SavedStateError::Snapshot { child, source })?;
    node.add_snapshot(child.to_owned(), leaf);
    Ok(())
}

/// Checks that a text stands for at most `limit` bytes.
fn check_length(child: &'static str, text: &str, limit: usize) -> Result<(), SavedStateError> {
    let limit_bytes = limit.div_ceil(3) * 4;
    match text.len() > limit_bytes {
        true => Err(SavedStateError::TooLong { child, text_bytes: text.len(), limit_bytes }),
        false => Ok(()),
    }
}

/// Decodes base64 that stands for at most `limit` bytes.
fn decode_text(child: &'static str, text: &str, limit: usize) -> Result<Vec<u8>, SavedStateError> {
    check_length(child, text, limit)?;
    BASE64.decode(text).map_err(|source| SavedStateError::Base64 { child, source })
}

/// Checks the lengths of the two strings that `meta` begins with, before anything is made of them.
fn check_names(mut meta: &[u8]) -> Result<(), SavedStateError> {
    for _ in 0..2 {
        // Too short for a length: the decoder says so without allocating.
        let Some((length, rest)) = meta.split_first_chunk() else { return Ok(()) };
        let claimed_bytes = u64::from_le_bytes(*length);
        let allowed = rest.len().min(NAME_LIMIT_BYTES);
        let length = usize::try_from(claimed_bytes).unwrap_or(usize::MAX);
        if length > allowed {
            return Err(SavedStateError::Name { claimed_bytes, available_bytes: rest.len() });
        }
        meta = &rest[length..];
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::{Value, json};

    use super::*;

    fn identity() -> Identity {
        Identity { name: "net0".to_owned(), kind: "nic".to_owned() }
    }

    const STREAM: &[u8] = b"early and late";

    fn saved(version: SavedVersion) -> Snapshot {
        to_snapshot(&identity(), STREAM, 5, version).unwrap()
    }

    fn state(node: &Snapshot, child: &'static str) -> Value {
        super::child(node, child).unwrap().unwrap()
    }

    /// A saved state with the metadata replaced.
    fn with_meta(version: u16, meta: &[u8]) -> Snapshot {
        let mut node = saved(SavedVersion::LATEST);
        add_child(&mut node, META_CHILD, &json!({"version": version, "meta": BASE64.encode(meta)})).unwrap();
        node
    }

    fn meta(version: SavedVersion) -> Vec<u8> {
        let node = saved(version);
        let text = state(&node, META_CHILD);
        BASE64.decode(text["meta"].as_str().unwrap()).unwrap()
    }

    /// What every version begins with.
    const GOLDEN_V1: &[u8] = &[
        4, 0, 0, 0, 0, 0, 0, 0, b'n', b'e', b't', b'0', // name
        3, 0, 0, 0, 0, 0, 0, 0, b'n', b'i', b'c', // kind
        14, 0, 0, 0, 0, 0, 0, 0, // bytes of state
    ];

    fn golden_v2() -> Vec<u8> {
        // CRC-64/Jones of the stream, computed elsewhere.
        let checksum = 0xc986_ea11_0839_ca12_u64;
        [GOLDEN_V1, &5u64.to_le_bytes(), &checksum.to_le_bytes()].concat()
    }

    #[test]
    fn the_blob_is_the_stream_in_cloud_hypervisors_shape() {
        for version in [SavedVersion::V1, SavedVersion::V2] {
            assert_eq!(state(&saved(version), STATE_CHILD), json!({"blob": "ZWFybHkgYW5kIGxhdGU="}));
        }
        let text = serde_json::to_string(&saved(SavedVersion::V1)).unwrap();
        let begin =
            r#"{"snapshots":{"vfio_migration":{"snapshots":{},"snapshot_data":{"state":"{\"blob\":\"ZWFy"#;
        assert!(text.starts_with(begin), "{text}");
    }

    #[test]
    fn golden_metadata_of_both_versions_is_written_and_read() {
        assert_eq!(state(&saved(SavedVersion::V1), META_CHILD)["version"], 1);
        assert_eq!(state(&saved(SavedVersion::V2), META_CHILD)["version"], 2);
        assert_eq!(meta(SavedVersion::V1), GOLDEN_V1);
        assert_eq!(meta(SavedVersion::V2), golden_v2());
        let old = SavedState::from_snapshot(&with_meta(1, GOLDEN_V1)).unwrap();
        let new = SavedState::from_snapshot(&with_meta(2, &golden_v2())).unwrap();
        assert_eq!((&old.identity, old.precopy_bytes), (&Some(identity()), None));
        assert_eq!((&new.identity, new.precopy_bytes), (&Some(identity()), Some(5)));
        assert_eq!(old.stream, STREAM);
        assert_eq!(new.stream, STREAM);
    }

    #[test]
    fn a_snapshot_made_by_cloud_hypervisor_itself_loads() {
        let text = r#"{"snapshots":{"vfio_migration":{"snapshots":{},"snapshot_data":{"state":"{\"blob\":\"AAEC/w==\"}"}}},"snapshot_data":null}"#;
        let state = SavedState::from_snapshot(&serde_json::from_str(text).unwrap()).unwrap();
        assert_eq!(state, SavedState { identity: None, stream: vec![0, 1, 2, 255], precopy_bytes: None });
        state.check_identity(&identity()).unwrap();
    }

    #[test]
    fn a_state_is_found_where_cloud_hypervisor_keeps_it() {
        let nested = Nesting::Common.wrap(saved(SavedVersion::LATEST));
        let text = serde_json::to_string(&nested).unwrap();
        assert!(text.starts_with(r#"{"snapshots":{"vfio_common":{"snapshots":{"vfio_migration""#), "{text}");
        assert_eq!(SavedState::from_snapshot(&nested).unwrap().stream, STREAM);
        assert_eq!(
            SavedState::from_snapshot(&Nesting::Flat.wrap(saved(SavedVersion::V1))).unwrap().stream,
            STREAM
        );
        let elsewhere = Nesting::Common.wrap(nested);
        assert!(matches!(SavedState::from_snapshot(&elsewhere), Err(SavedStateError::NoState)));
    }

    #[test]
    fn c48_a_saved_state_beyond_the_limit_is_not_decoded_and_the_limit_is_named() {
        let refused = SavedState::from_snapshot_within(&saved(SavedVersion::LATEST), 9).unwrap_err();
        assert_eq!(
            refused.to_string(),
            "\"vfio_migration\" holds 20 bytes of base64, and at most 12 are allowed (Device::state_limit)"
        );
        assert_eq!([0, 1, 3, 4].map(text_bytes), [0, 4, 4, 8]);
    }

    #[test]
    fn a_state_goes_only_where_name_and_kind_agree() {
        let state = SavedState::from_snapshot(&saved(SavedVersion::V1)).unwrap();
        state.check_identity(&identity()).unwrap();
        let other = Identity { kind: "gpu".to_owned(), ..identity() };
        let refused = state.check_identity(&other).unwrap_err().to_string();
        let expected = r#"Saved state is of device "net0" of kind "nic", not of device "net0" of kind "gpu""#;
        assert_eq!(refused, expected);
    }

    #[test]
    fn each_lie_is_refused_by_its_own_name() {
        let refusal = |version, meta: &[u8]| {
            SavedState::from_snapshot(&with_meta(version, meta)).unwrap_err().to_string()
        };
        let changed = |at: usize, byte: u8| {
            let mut meta = golden_v2();
            meta[at] = byte;
            meta
        };
        assert_eq!(refusal(0, GOLDEN_V1), "\"vfio_migration_meta\" has version 0; known are 1 to 2");
        assert_eq!(refusal(3, &golden_v2()), "\"vfio_migration_meta\" has version 3; known are 1 to 2");
        assert_eq!(refusal(1, &golden_v2()), "\"vfio_migration_meta\" has 16 bytes too many");
        assert!(refusal(2, GOLDEN_V1).contains("of version 2 cannot be read"), "{}", refusal(2, GOLDEN_V1));
        assert!(refusal(2, &[]).contains("of version 2 cannot be read"));
        assert!(refusal(2, &changed(8, 0xff)).contains("Utf8"));
        assert_eq!(
            refusal(2, &changed(7, 1)),
            "\"vfio_migration_meta\" claims a name of 72057594037927940 bytes; 39 are there, 256 allowed"
        );
        assert!(refusal(2, &changed(12, 40)).contains("claims a name of 40 bytes; 27 are there"));
        assert_eq!(refusal(2, &changed(23, 15)), "Saved state has 14 bytes and should have 15");
        assert_eq!(
            refusal(2, &changed(31, 15)),
            "Saved state has 14 bytes, of which 15 cannot come from PRE_COPY"
        );
        assert!(refusal(2, &changed(39, 0)).starts_with("Saved state has checksum 0xc986ea110839ca12"));
        assert_eq!(
            refusal(2, &[0; META_LIMIT_BYTES + 3]),
            "\"vfio_migration_meta\" holds 1372 bytes of base64, and at most 1368 are allowed (fixed)"
        );
    }

    #[test]
    fn what_is_no_base64_or_has_no_state_is_refused() {
        let mut node = Snapshot::default();
        assert!(matches!(SavedState::from_snapshot(&node), Err(SavedStateError::NoState)));
        for text in ["AAEC/w=", "AAEC/w", "AAEC/w==\n", "AA-_", "é"] {
            add_child(&mut node, STATE_CHILD, &json!({"blob": text})).unwrap();
            assert!(
                matches!(SavedState::from_snapshot(&node), Err(SavedStateError::Base64 { .. })),
                "{text}"
            );
        }
        for state in [json!({}), json!({"blob": 7}), json!("AAEC")] {
            add_child(&mut node, STATE_CHILD, &state).unwrap();
            assert!(matches!(SavedState::from_snapshot(&node), Err(SavedStateError::Snapshot { .. })));
        }
    }

    #[test]
    fn a_text_is_measured_before_it_is_decoded() {
        assert_eq!(decode_text(STATE_CHILD, "AAEC", 3).unwrap(), [0, 1, 2]);
        let long = decode_text(STATE_CHILD, "not base64 at all", 12);
        assert!(matches!(long, Err(SavedStateError::TooLong { text_bytes: 17, limit_bytes: 16, .. })));
    }

    #[test]
    fn a_name_that_could_not_be_read_back_is_not_written() {
        let long = Identity { name: "n".repeat(NAME_LIMIT_BYTES + 1), ..identity() };
        let refused = to_snapshot(&long, STREAM, 0, SavedVersion::LATEST);
        assert!(matches!(refused, Err(SavedStateError::Name { claimed_bytes: 257, .. })));
    }

    proptest! {
        #[test]
        fn a_state_comes_back_as_it_went_in(
            name in "\\PC{1,60}", kind in "\\PC{0,60}", stream in prop::collection::vec(any::<u8>(), 0..200), cut in 0..200u64,
            version in prop::sample::select(vec![SavedVersion::V1, SavedVersion::V2]),
        ) {
            let identity = Identity { name, kind };
            let precopy_bytes = cut.min(stream.len() as u64);
            let node = to_snapshot(&identity, &stream, precopy_bytes, version).unwrap();
            let text = serde_json::to_string(&node).unwrap();
            let state = SavedState::from_snapshot(&serde_json::from_str(&text).unwrap()).unwrap();
            prop_assert_eq!(state.identity, Some(identity));
            prop_assert_eq!(state.stream, stream);
            prop_assert_eq!(state.precopy_bytes, (version == SavedVersion::V2).then_some(precopy_bytes));
        }

        #[test]
        fn metadata_with_anything_changed_is_refused_or_read_but_never_panics(
            version in 0..4u16, at in 0..60usize, byte: u8, keep in 0..60usize,
        ) {
            let mut meta = golden_v2();
            if let Some(place) = meta.get_mut(at) {
                *place = byte;
            }
            meta.truncate(keep);
            let _ = SavedState::from_snapshot(&with_meta(version, &meta));
        }
    }
}
