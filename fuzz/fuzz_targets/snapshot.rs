// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Reads a State message: a tree that is accepted survives being written and read again.

#![no_main]

use libfuzzer_sys::fuzz_target;
use serde_json::Value;
use vm_migration::{Snapshot, snapshot_from_id, state_from_id};

fuzz_target!(|text: &[u8]| {
    let Ok(root) = serde_json::from_slice::<Snapshot>(text) else { return };
    let written = serde_json::to_string(&root).expect("a tree of strings has a JSON form");
    let again: Snapshot = serde_json::from_str(&written).expect("what was written is read");
    assert_eq!(serde_json::to_string(&again).expect("a tree of strings has a JSON form"), written);
    visit(&root);
});

/// Parses every state in the tree, whether or not it is JSON, and finds every child by its id.
fn visit(snapshot: &Snapshot) {
    for (id, child) in &snapshot.snapshots {
        let found = snapshot_from_id(Some(snapshot), id).expect("a child has its id");
        let by_id = state_from_id::<Value>(Some(snapshot), id).ok();
        assert_eq!(by_id, found.to_state().ok().map(Some));
        visit(child);
    }
}
