// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A snapshot with the configuration and state of a real Cloud Hypervisor VM, on its way from directory to directory.

use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::{env, fs};

use serde_json::{Value, json};
use vfio_migration::snapshot::{
    DestinationOptions, FullSnapshot, SnapshotDestination, SnapshotLimits, SnapshotSource,
};
use vfio_migration::tracker::Tracker;
use vfio_migration::transfer::{SendOptions, Sender};

use crate::Way;
use crate::frames::{COMPLETE, CONFIG, STATE};
use crate::skip::skip;
use crate::wire::Exchange;

const RAM: usize = 64 << 20;

/// Returns the bytes of a captured payload, or says loudly that there is none.
fn capture(name: &str) -> Option<Vec<u8>> {
    let beside_repository = || Path::new(env!("CARGO_MANIFEST_DIR")).join("../shared/captures");
    let folder = env::var_os("VFIO_MIGRATION_CAPTURES").map_or_else(beside_repository, PathBuf::from);
    let path = folder.join(name);
    if !path.exists() {
        let how = "name its folder in VFIO_MIGRATION_CAPTURES";
        skip(format!("no capture at {}; {how}", path.display()));
        return None;
    }
    Some(fs::read(path).expect("a capture is readable"))
}

/// The memory of the stored VM: pages here and there, the last one among them.
fn ram() -> Vec<u8> {
    let mut ram = vec![0; RAM];
    for page in (0..RAM / 4096).filter(|page| page % 7 == 3 || page / 100 == 5).chain([RAM / 4096 - 1]) {
        for (at, byte) in ram[page * 4096..][..4096].iter_mut().enumerate() {
            *byte = (page * 31 + at * 7 + 1).to_le_bytes()[0];
        }
    }
    ram
}

/// Writes the three files that a Cloud Hypervisor writes, with nothing of ours beside them.
fn store(directory: &Path, config: &Value, state: &[u8], ram: &[u8]) {
    fs::create_dir(directory).unwrap();
    fs::write(directory.join("config.json"), serde_json::to_vec(&config["vm_config"]).unwrap()).unwrap();
    fs::write(directory.join("state.json"), state).unwrap();
    fs::write(directory.join("memory-ranges"), ram).unwrap();
}

/// What the root, or a child, of a State keeps as text.
fn inner(node: &Value) -> Value {
    serde_json::from_str(node["snapshot_data"]["state"].as_str().unwrap()).unwrap()
}

/// Sends the snapshot `from` over `way` into the snapshot `into`.
fn send(way: Way, from: &Path, into: &Path, set: impl FnOnce(SendOptions) -> SendOptions) -> Exchange {
    let mut source =
        SnapshotSource::new(FullSnapshot::open(from, &SnapshotLimits::default()).unwrap()).unwrap();
    let tracker = Mutex::new(Tracker::builder(source.layout().clone()).build().unwrap());
    let mut destination = SnapshotDestination::create(into, DestinationOptions::default()).unwrap();
    let options = set(way.options());
    let (sent, received, exchange) =
        way.go(&mut destination, || Sender::new(options).send(&mut source, &tracker, &Mutex::default()));
    sent.unwrap();
    received.unwrap();
    exchange
}

/// Checks what went over the wire against the messages that the real VM's own source sent.
fn assert_is_the_captured(exchange: &Exchange, config: &Value, state: &[u8], ram: &[u8]) {
    let said: Value = serde_json::from_slice(&exchange.main().sole(CONFIG).payload).unwrap();
    let root: Value = serde_json::from_slice(state).unwrap();
    let mut memory_manager = inner(&root["snapshots"]["memory-manager"]);
    memory_manager["memory_ranges"] = json!({ "data": [] });
    let by_the_description = json!({
        "vm_config": config["vm_config"],
        "common_cpuid": inner(&root)["common_cpuid"],
        "memory_manager_data": memory_manager,
    });
    assert_eq!(said, by_the_description);
    assert_eq!(&said, config, "what the real source said of itself");
    assert!(exchange.main().sole(STATE).payload == state, "State is state.json to the byte");
    let mut image = vec![0; ram.len()];
    exchange.replay(0, &mut image);
    assert!(image == ram, "the pages make up the memory");
}

#[test]
fn what_a_real_vm_left_behind_is_sent_as_its_own_source_sent_it() {
    let Some(config) = capture("config-message.json") else { return };
    let Some(state) = capture("state-message.json") else { return };
    let config: Value = serde_json::from_slice(&config).unwrap();
    let ram = ram();
    let place = tempfile::tempdir().unwrap();
    let from = place.path().join("from");
    store(&from, &config, &state, &ram);
    for (name, way, lanes) in [("unix", Way::unix(), 0), ("tcp1", Way::tcp(1), 0), ("tcp4", Way::tcp(4), 4)] {
        let into = place.path().join(name);
        let exchange = send(way, &from, &into, |options| options);
        exchange.assert_whole(lanes, COMPLETE);
        assert_is_the_captured(&exchange, &config, &state, &ram);
        let sent: usize = exchange.memory().iter().map(|request| request.pages.len()).sum();
        assert!(sent < RAM / 4, "zeros stay where they are: {sent} bytes");
        for file in ["config.json", "state.json", "memory-ranges"] {
            assert!(fs::read(from.join(file)).unwrap() == fs::read(into.join(file)).unwrap(), "{file}");
        }
    }
}

#[test]
fn a_chunk_is_64_mib_at_most() {
    let Some(config) = capture("config-message.json") else { return };
    let Some(state) = capture("state-message.json") else { return };
    let config: Value = serde_json::from_slice(&config).unwrap();
    let ram = ram();
    let place = tempfile::tempdir().unwrap();
    let (from, into) = (place.path().join("from"), place.path().join("into"));
    store(&from, &config, &state, &ram);
    let exchange = send(Way::unix(), &from, &into, |options| {
        options.chunk_bytes(64 << 20).unwrap().receiver_reads_zero(false)
    });
    let tables: Vec<_> = exchange.memory().iter().map(|request| request.table.clone()).collect();
    assert_eq!(tables, [[(0, RAM as u64)]], "all of the VM is one range in one chunk");
    assert_is_the_captured(&exchange, &config, &state, &ram);
}
