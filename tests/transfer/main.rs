// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The transfer over real sockets: connections, TLS, and a receiver with sources of every kind.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod bare_source;
mod bare_tls;
mod captures;
mod certificates;
mod connection;
mod cut_off;
mod peer;
mod receive;
mod strangers;
mod tls;
