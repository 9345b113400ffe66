// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Moving a VM over the wire: Cloud Hypervisor's migration protocol, its sender and its receiver.
//!
//! [`frame`] is the protocol's bytes and touches nothing else. [`connection`] owns the sockets, their deadlines and the
//! way bytes take between them and guest memory; [`tls`] puts mutual TLS under it. [`limits`] names every bound that is
//! put on a peer. [`receive`] takes a VM in.
//!
//! A [`Sender`] goes through `phases`, the longest of which is `copying`: `control` is its first connection, `lanes` the ones
//! that carry memory, `skipping` what they need not carry; `measuring` turns what happens into numbers, `progress` shows them to other threads,
//! `logging` tells them to the log, and `downtime` says where the time went.

pub mod connection;
mod control;
mod copying;
mod device_state;
mod downtime;
mod exchange;
pub mod frame;
mod lanes;
pub mod limits;
mod logging;
mod measuring;
mod payload;
mod phases;
mod pinning;
mod prefault;
mod progress;
pub mod receive;
mod rounds;
mod send;
mod skipping;
#[cfg_attr(not(feature = "tls"), path = "without_tls.rs")]
pub mod tls;
pub mod url;

pub use downtime::DowntimeParts;
pub use exchange::PeerError;
pub use pinning::{MissedBecause, MissedDowntime, PinningReceiver, Populated};
pub use progress::{Degradation, Migration, Phase, Progress, SourceProgress};
pub use send::{SendError, SendOptions, SendOptionsError, SendStep, Sender, Sent, SourceVm, VmOperation};
