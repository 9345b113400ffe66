// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Reads a device's saved state: what is accepted survives being written and read again.
//!
//! The input is a version, then metadata, then the device's stream; or, from an odd first byte on, the JSON of the node.

#![no_main]

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use libfuzzer_sys::fuzz_target;
use serde_json::json;
use vfio_migration::device::SavedVersion;
use vfio_migration::device::saved::{META_CHILD, STATE_CHILD, SavedState, to_snapshot};
use vm_migration::Snapshot;

fuzz_target!(|input: &[u8]| {
    let Some(node) = node(input) else { return };
    let Ok(state) = SavedState::from_snapshot(&node) else { return };
    let Some(identity) = &state.identity else { return };
    let version = if state.precopy_bytes.is_some() { SavedVersion::V2 } else { SavedVersion::V1 };
    let written = to_snapshot(identity, &state.stream, state.precopy_bytes.unwrap_or(0), version)
        .expect("names that were read can be written");
    let again = SavedState::from_snapshot(&written).expect("what was written is read");
    assert_eq!(again, state);
    again.check_identity(identity).expect("a device is itself");
});

/// Makes the node of a Snapshot tree that the input stands for.
fn node(input: &[u8]) -> Option<Snapshot> {
    let (&[kind, version, meta_bytes], rest) = input.split_first_chunk()?;
    if kind % 2 == 1 {
        return serde_json::from_slice(&input[1..]).ok();
    }
    let (meta, stream) = rest.split_at_checked(usize::from(meta_bytes))?;
    let mut node = Snapshot::default();
    let meta = json!({"version": version, "meta": STANDARD.encode(meta)});
    let children = [(META_CHILD, meta), (STATE_CHILD, json!({"blob": STANDARD.encode(stream)}))];
    for (child, state) in children {
        node.add_snapshot(child.to_owned(), Snapshot::new_from_state(&state).ok()?);
    }
    Some(node)
}
