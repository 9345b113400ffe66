// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A saved state that stays in the text of the Snapshot tree: it is decoded in pieces, once to be checked and once to be loaded.

use std::borrow::Cow;

use base64::engine::general_purpose::STANDARD as BASE64;
use base64::{DecodeError, Engine};
use serde::Deserialize;
use vm_migration::Snapshot;

use super::{
    Identity, META_CHILD, META_LIMIT_BYTES, Meta, MetaText, STATE_CHILD, SavedStateError, SavedVersion,
    check_identity, check_length, child, decode_text, state_node,
};
use crate::device::blob::Checksum;

/// Characters of base64 that are decoded at a time.
const PIECE_CHARACTERS: usize = 1 << 20;

/// The child [`STATE_CHILD`], as it is read.
#[derive(Deserialize)]
struct StateText<'a> {
    #[serde(borrow)]
    blob: Cow<'a, str>,
}

/// A saved state, checked, in base64.
pub(in crate::device) struct SavedText<'a> {
    blob: Cow<'a, str>,
    bytes: usize,
    identity: Option<Identity>,
    precopy_bytes: Option<u64>,
}

impl<'a> SavedText<'a> {
    /// Reads a device's node of the Snapshot tree, in either nesting, and checks all of it; nothing as large as the state is allocated.
    ///
    /// # Errors
    /// The node has no stream, or something in it is too long, malformed or contradictory.
    pub(in crate::device) fn check(node: &'a Snapshot, limit_bytes: usize) -> Result<Self, SavedStateError> {
        let node = state_node(node).ok_or(SavedStateError::NoState)?;
        let StateText { blob } = child(node, STATE_CHILD)?.ok_or(SavedStateError::NoState)?;
        check_length(STATE_CHILD, &blob, limit_bytes)?;
        let (mut bytes, mut checksum) = (0, Checksum::new());
        each_piece(&blob, |piece| {
            bytes += piece.len();
            checksum.push(piece);
            Ok::<_, SavedStateError>(())
        })?;
        let Some(text) = child::<MetaText<'_>>(node, META_CHILD)? else {
            return Ok(Self { blob, bytes, identity: None, precopy_bytes: None });
        };
        let version = SavedVersion::from_number(text.version)
            .ok_or(SavedStateError::Version { version: text.version })?;
        let meta = Meta::from_bytes(&decode_text(META_CHILD, &text.meta, META_LIMIT_BYTES)?, version)?;
        meta.check(bytes, checksum.value(), version)?;
        Ok(Self {
            blob,
            bytes,
            precopy_bytes: (version >= SavedVersion::V2).then_some(meta.precopy_bytes),
            identity: Some(Identity { name: meta.name, kind: meta.kind }),
        })
    }

    /// Bytes of the state.
    pub(in crate::device) fn bytes(&self) -> usize {
        self.bytes
    }

    /// Checks that the state may go into `device`.
    ///
    /// # Errors
    /// It says it is of another.
    pub(in crate::device) fn check_identity(&self, device: &Identity) -> Result<(), SavedStateError> {
        check_identity(self.identity.as_ref(), device)
    }

    /// Hands the state to `take`, piece by piece and in order.
    ///
    /// # Errors
    /// Those of `take`.
    pub(in crate::device) fn each_piece<E: From<SavedStateError>>(
        &self,
        take: impl FnMut(&[u8]) -> Result<(), E>,
    ) -> Result<(), E> {
        each_piece(&self.blob, take)
    }

    /// Whose the state is, and how much of it came in PRE_COPY, as far as the node says so.
    pub(super) fn into_meta(self) -> (Option<Identity>, Option<u64>) {
        (self.identity, self.precopy_bytes)
    }
}

fn each_piece<E: From<SavedStateError>>(
    base64: &str,
    mut take: impl FnMut(&[u8]) -> Result<(), E>,
) -> Result<(), E> {
    let mut piece = Vec::new();
    let last = base64.len().saturating_sub(1) / PIECE_CHARACTERS;
    for (index, characters) in base64.as_bytes().chunks(PIECE_CHARACTERS).enumerate() {
        piece.clear();
        let decoded = BASE64.decode_vec(characters, &mut piece);
        let whole = piece.len() == PIECE_CHARACTERS / 4 * 3;
        let offset = index * PIECE_CHARACTERS;
        let source = match decoded {
            Ok(()) if index == last || whole => None,
            // Padding ends a text, so it is wrong within one.
            Ok(()) => Some(DecodeError::InvalidByte(offset + PIECE_CHARACTERS - 1, b'=')),
            Err(DecodeError::InvalidByte(at, byte)) => Some(DecodeError::InvalidByte(offset + at, byte)),
            Err(DecodeError::InvalidLastSymbol(at, byte)) => {
                Some(DecodeError::InvalidLastSymbol(offset + at, byte))
            }
            Err(other) => Some(other),
        };
        if let Some(source) = source {
            return Err(SavedStateError::Base64 { child: STATE_CHILD, source }.into());
        }
        take(&piece)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn decode(base64: &str) -> Result<Vec<u8>, SavedStateError> {
        let mut stream = Vec::new();
        each_piece(base64, |piece| {
            stream.extend_from_slice(piece);
            Ok::<_, SavedStateError>(())
        })?;
        Ok(stream)
    }

    const PIECE_BYTES: usize = PIECE_CHARACTERS / 4 * 3;

    #[test]
    fn pieces_are_the_whole_at_every_border() {
        for bytes in [0, 1, 2, 3, PIECE_BYTES - 1, PIECE_BYTES, PIECE_BYTES + 1, 2 * PIECE_BYTES + 2] {
            let stream: Vec<u8> = (0..bytes).map(|at| at.to_le_bytes()[0]).collect();
            assert!(decode(&BASE64.encode(&stream)).unwrap() == stream, "{bytes} bytes");
        }
    }

    #[test]
    fn what_is_wrong_with_a_text_is_found_in_the_piece_that_has_it() {
        let sound = BASE64.encode(vec![7; 2 * PIECE_BYTES]);
        for at in [0, PIECE_CHARACTERS - 1, PIECE_CHARACTERS, sound.len() - 3] {
            for wrong in ["!", "="] {
                let mut text = sound.clone();
                text.replace_range(at..=at, wrong);
                let Err(SavedStateError::Base64 { source, .. }) = decode(&text) else {
                    panic!("{at} {wrong}")
                };
                assert_eq!(Some(source), BASE64.decode(&text).err(), "{at} {wrong}");
            }
        }
        decode(&sound[..sound.len() - 1]).unwrap_err();
    }

    proptest! {
        #[test]
        fn any_text_is_decoded_as_in_one_piece(text in "[A-Za-z0-9+/=]{0,40}") {
            prop_assert_eq!(decode(&text).ok(), BASE64.decode(&text).ok());
        }
    }
}
