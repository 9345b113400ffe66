// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The payloads that a real Cloud Hypervisor v53 sent.

#[path = "../../integration/src/skip.rs"]
#[expect(dead_code, unreachable_pub, reason = "other crates' tests use the rest")]
mod skip;

use std::path::{Path, PathBuf};
use std::{env, fs};

use serde::Deserialize;
use serde_json::Value;
use skip::skip;
use vm_migration::protocol::{MemoryRange, MemoryRangeTable};
use vm_migration::{Snapshot, snapshot_from_id, state_from_id};

/// What this test reads of the state of `memory-manager`.
#[derive(Deserialize)]
struct MemoryManagerData {
    memory_ranges: MemoryRangeTable,
    guest_ram_mappings: Vec<GuestRamMapping>,
}

#[derive(Deserialize)]
struct GuestRamMapping {
    gpa: u64,
    size: u64,
}

/// Returns the text of a captured payload, or says loudly that there is none.
fn capture(name: &str) -> Option<String> {
    let beside_repository = || Path::new(env!("CARGO_MANIFEST_DIR")).join("../../shared/captures");
    let folder = env::var_os("VFIO_MIGRATION_CAPTURES").map_or_else(beside_repository, PathBuf::from);
    let path = folder.join(name);
    if !path.exists() {
        let how = "name its folder in VFIO_MIGRATION_CAPTURES";
        skip(format!("no capture at {}; {how}", path.display()));
        return None;
    }
    Some(fs::read_to_string(path).expect("a capture is readable text"))
}

/// Parses the state of every node that holds one, and returns their number.
fn parse_every_state(snapshot: &Snapshot, id: &str) -> usize {
    let own = snapshot.snapshot_data.as_ref().map_or(0, |data| {
        let state: Value = data.to_state().unwrap_or_else(|error| panic!("{id}: {error:?}"));
        assert!(state.is_object() || state.is_array(), "{id}: {state}");
        1
    });
    own + snapshot.snapshots.iter().map(|(id, child)| parse_every_state(child, id)).sum::<usize>()
}

#[test]
fn a_real_state_message_is_a_snapshot_tree() {
    let Some(text) = capture("state-message.json") else { return };
    let root: Snapshot = serde_json::from_str(&text).unwrap();

    let components: Vec<_> = root.snapshots.keys().map(String::as_str).collect();
    assert_eq!(components, ["cpu-manager", "device-manager", "memory-manager"]);
    let vcpus = snapshot_from_id(Some(&root), "cpu-manager").unwrap();
    assert!(state_from_id::<Value>(Some(vcpus), "0").unwrap().unwrap()["Kvm"]["cpuid"].is_array());
    assert!(root.to_state::<Value>().unwrap()["common_cpuid"].is_array());
    assert!(parse_every_state(&root, "root") > 4);
}

#[test]
fn a_real_state_message_is_written_back_as_it_came() {
    let Some(text) = capture("state-message.json") else { return };
    let root: Snapshot = serde_json::from_str(&text).unwrap();
    assert_eq!(serde_json::to_string(&root).unwrap(), text.trim_end());
}

#[test]
fn a_real_memory_manager_state_holds_a_range_table() {
    let Some(text) = capture("state-message.json") else { return };
    let root: Snapshot = serde_json::from_str(&text).unwrap();
    let memory: MemoryManagerData = state_from_id(Some(&root), "memory-manager").unwrap().unwrap();
    assert_eq!(memory.guest_ram_mappings.iter().map(|ram| ram.size).sum::<u64>(), 64 << 20);
    assert!(memory.memory_ranges.effective_size() <= 64 << 20);
}

#[test]
fn a_real_config_message_is_json_and_describes_the_memory() {
    let Some(text) = capture("config-message.json") else { return };
    let config: Value = serde_json::from_str(&text).unwrap();
    assert_eq!(config["vm_config"]["memory"]["size"], 64 << 20);
    assert!(config["common_cpuid"].is_array());

    let memory = MemoryManagerData::deserialize(&config["memory_manager_data"]).unwrap();
    let ram: Vec<_> = memory
        .guest_ram_mappings
        .iter()
        .map(|mapping| MemoryRange { gpa: mapping.gpa, length: mapping.size })
        .collect();
    assert_eq!(ram, [MemoryRange { gpa: 0, length: 64 << 20 }]);
}

#[test]
fn every_truncated_prefix_of_a_real_payload_is_an_error() {
    let Some(state) = capture("state-message.json") else { return };
    let Some(config) = capture("config-message.json") else { return };
    // Every prefix of the long one costs minutes; a prime step meets every kind of place in it.
    for end in (0..state.trim_end().len()).step_by(97) {
        assert!(serde_json::from_slice::<Snapshot>(&state.as_bytes()[..end]).is_err(), "{end} bytes");
    }
    for end in 0..config.trim_end().len() {
        assert!(serde_json::from_slice::<Value>(&config.as_bytes()[..end]).is_err(), "{end} bytes");
    }
}
