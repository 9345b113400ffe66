// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Moving a VM over the wire: Cloud Hypervisor's migration protocol, its sender and its receiver.
//!
//! [`frame`] is the protocol's bytes and touches nothing else. [`connection`] owns the sockets, their deadlines and the
//! way bytes take between them and guest memory; [`tls`] puts mutual TLS under it. [`limits`] names every bound that is
//! put on a peer.
//!
//! A [`Sender`] goes through `phases`: `control` is its first connection, `lanes` the ones that carry memory, `rounds` what
//! it measures, `progress` what it shows.

pub mod connection;
mod control;
mod exchange;
pub mod frame;
mod lanes;
pub mod limits;
mod phases;
mod progress;
mod rounds;
mod send;
pub mod tls;
pub mod url;

pub use exchange::PeerError;
pub use progress::{Degradation, Migration, Phase, Progress, SourceProgress};
pub use send::{SendError, SendOptions, SendOptionsError, Sender, Sent, SourceVm, Step, VmOperation};
