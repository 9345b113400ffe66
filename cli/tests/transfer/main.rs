// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Snapshots on their way between processes as their users start them.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod altered;
#[path = "../../../tests/transfer/certificates.rs"]
#[expect(dead_code, reason = "the library's own tests use more of it")]
mod certificates;
mod commands;
mod dense;
mod devices;
mod faults;
mod field;
#[path = "../../../tests/frames/mod.rs"]
#[expect(dead_code, reason = "the library's own tests use more of it")]
mod frames;
mod hostile_receiver;
mod hostile_source;
mod kills;
mod local;
mod local_send;
mod mixed_up;
mod on_demand;
mod paused;
mod raw;
mod readme;
mod recorded;
#[path = "../../../tests/recorded/relay.rs"]
mod relay;
mod round_trip;
mod serve;
mod sick_host;
mod stored;
mod tls;
mod tool;
mod units;
mod unprivileged;
#[path = "../../../tests/local_send/vmm.rs"]
mod vmm;
#[path = "../../../tests/recorded/wire.rs"]
#[expect(dead_code, reason = "the library's own tests use more of it")]
mod wire;
