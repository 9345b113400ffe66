// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Moving a VM over the wire: Cloud Hypervisor's migration protocol, its sender and its receiver.
//!
//! [`frame`] is the protocol's bytes and touches nothing else. [`connection`] owns the sockets, their deadlines and the
//! way bytes take between them and guest memory; [`tls`] puts mutual TLS under it. [`limits`] names every bound that is
//! put on a peer. `send` moves a VM away, [`receive`] takes one in.

pub mod connection;
pub mod frame;
pub mod limits;
mod prefault;
pub mod receive;
mod send;
#[cfg_attr(not(feature = "tls"), path = "without_tls.rs")]
pub mod tls;
pub mod url;

pub use send::{
    DeviceDowntime, DowntimeParts, MissedBecause, MissedDowntime, PeerError, Phase, PinningReceiver,
    Populated, Progress, SendDegradation, SendError, SendOptions, SendOptionsError, SendStep, Sender,
    SenderHandle, Sent, SourceProgress, SourceVm, VmOperation,
};
