// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The transfer over real sockets: connections, TLS, and a receiver with sources of every kind.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod additional;
mod ahead;
mod bare_source;
mod bare_tls;
mod captures;
mod certificates;
mod connection;
mod cut_off;
#[path = "../frames/mod.rs"]
#[expect(dead_code, reason = "other tests use the rest")]
mod frames;
mod order;
mod peer;
mod receive;
mod silence;
#[path = "../../integration/src/skip.rs"]
#[expect(dead_code, unreachable_pub, reason = "other crates' tests use the rest")]
mod skip;
mod stopping;
mod stores;
mod strangers;
mod tls;
