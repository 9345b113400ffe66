// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What stands in the Snapshot tree for a state that went ahead of it.

use serde::{Deserialize, Serialize};
use vm_migration::Snapshot;

use super::{SavedStateError, add_child, child};

/// Id of the child that stands in a device's node where its state went ahead, as a stream of its own.
pub const STREAMED_CHILD: &str = "vfio_migration_streamed";

/// The child [`STREAMED_CHILD`].
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct StreamedText {
    /// Bytes of the stream.
    bytes: u64,
}

/// Makes the node of a device whose state of so many bytes went ahead.
///
/// # Errors
/// The tree does not take it.
pub(in crate::device) fn streamed_to_snapshot(bytes: u64) -> Result<Snapshot, SavedStateError> {
    let mut node = Snapshot::default();
    add_child(&mut node, STREAMED_CHILD, &StreamedText { bytes })?;
    Ok(node)
}

/// Returns the bytes of state that went ahead of a device's node; `None` where none did.
///
/// # Errors
/// The node says it in no known form.
pub(in crate::device) fn streamed_bytes(node: &Snapshot) -> Result<Option<u64>, SavedStateError> {
    let common = node.snapshots.get(super::COMMON_CHILD);
    let holder = [Some(node), common].into_iter().flatten();
    let mut holders = holder.filter(|node| node.snapshots.contains_key(STREAMED_CHILD));
    let Some(node) = holders.next() else { return Ok(None) };
    Ok(child::<StreamedText>(node, STREAMED_CHILD)?.map(|text| text.bytes))
}

#[cfg(test)]
mod tests {
    use super::super::Nesting;
    use super::*;

    #[test]
    fn what_stands_for_a_state_is_found_wherever_it_is_nested() {
        for nesting in [Nesting::Flat, Nesting::Common] {
            let node = nesting.wrap(streamed_to_snapshot(7).unwrap());
            assert_eq!(streamed_bytes(&node).unwrap(), Some(7));
        }
        assert_eq!(streamed_bytes(&Snapshot::default()).unwrap(), None);
        let mut node = Snapshot::default();
        add_child(&mut node, STREAMED_CHILD, &"nonsense").unwrap();
        assert!(streamed_bytes(&node).is_err());
    }
}
