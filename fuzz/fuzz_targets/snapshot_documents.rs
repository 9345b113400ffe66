// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Reads the JSON of a snapshot: what is accepted makes a Config message that is accepted too, unless its RAM is none.

#![no_main]

use libfuzzer_sys::fuzz_target;
use vfio_migration::snapshot::{ConfigMessage, SnapshotLimits, VmConfig, VmState};

fuzz_target!(|text: &[u8]| {
    let limits = SnapshotLimits::default();
    let _ = ConfigMessage::parse(text, &limits);
    let config = VmConfig::parse(text, &limits);
    let Ok(state) = VmState::parse(text.to_vec(), &limits) else { return };
    assert_eq!(state.text(), text);
    let bytes: u64 = state.memory().ranges().map(|range| range.len()).sum();
    assert_eq!(state.memory().bytes(), bytes);
    let plain = VmConfig::parse(br#"{"memory":{"size":0}}"#, &limits).expect("a plain configuration");
    let Ok(message) = state.config_message(config.as_ref().unwrap_or(&plain)) else { return };
    if let Ok(read) = ConfigMessage::parse(&message, &limits) {
        assert!(read.layout().bytes() <= limits.memory_bytes);
    }
});
