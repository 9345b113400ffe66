// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A vfio-user client: a device that lives in another process, behind a UNIX socket.
//!
//! ```text
//!   Client ── request ──► transport (one deadline per request) ──► server
//!     ▲                                                              │
//!     ├── message, feature, version: pure codecs, limits first ◄─────┤
//!     └── dma: guest memory for the server's own requests ◄──────────┘
//! ```
//! The codecs decode both directions, so that a server is built from the same definitions. The protocol says host
//! byte order; every machine this library runs on is little-endian and the codecs say so.
//!
//! Nothing a server sends is trusted: a length meets a named limit before it sizes a buffer, a reply must carry the
//! identifier and the command of its request, and a request that is not answered in time fails.

mod channel;
pub mod client;
mod decode;
mod dma;
mod error;
pub mod feature;
pub mod message;
mod transport;
pub mod version;

use std::sync::{Arc, Mutex, MutexGuard};

use crate::sync;

pub use client::{Client, Options};
pub use decode::DecodeError;
pub use dma::DmaRegion;
pub use error::{BrokenBy, Error, ServeError};

/// A client for all that speaks to one device: the VMM, the dirty source, the device's state.
pub type SharedClient = Arc<Mutex<Client>>;

/// Waits for its turn at the device; a thread that panicked with it leaves a client that refuses to go on out of step.
pub(crate) fn lock(client: &SharedClient) -> MutexGuard<'_, Client> {
    sync::lock(client)
}
