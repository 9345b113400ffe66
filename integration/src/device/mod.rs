// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A vfio-user device: a DMA engine whose every byte can be predicted, to be run in a process of its own.
//!
//! ```text
//!  client ═ socket ═► server ──┐ one lock       ┌─► guest memory, mapped from the DMA_MAP descriptors
//!                              ├──► engine ─────┼─► dirty log (exact; reported at any granule)
//!                    worker ───┘                └─► internal state (changes slowly; saved and loaded)
//! ```
//! Since a write and its mark in the log are made under one lock, a request to stop is answered only when no write is
//! under way and all are in the log.

mod config;
pub mod control;
mod engine;
mod image;
mod internals;
mod log;
mod memory;
pub mod registers;
mod server;
mod state;
mod stream;
mod worker;

use std::io;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::thread::Builder;

use vfio_migration::vfio_user::DecodeError;

pub use self::config::{Behaviour, DeviceConfig, Fault, When};
pub use self::state::State;
pub use self::stream::{BadPage, MAX_WINDOWS, PAGE_BYTES, Stream, Window, stream_word};

use self::engine::Engine;
use self::server::Server;
use self::worker::Shared;

/// Largest internal state, in bytes.
pub const MAX_STATE_BYTES: u64 = 16 << 30;

/// Is the device of a device process.
pub struct DmaDevice;

impl DmaDevice {
    /// Serves one client over a connected socket until it hangs up; the engine runs on a thread of its own meanwhile.
    ///
    /// # Errors
    ///
    /// The client broke the protocol, the socket failed, or a configured fault ended the device.
    pub fn serve(socket: UnixStream, config: DeviceConfig) -> Result<(), ServeError> {
        let (bytes, limit) = (config.state_bytes, MAX_STATE_BYTES);
        let state_bytes = usize::try_from(bytes).ok().filter(|_| bytes <= limit);
        let state_bytes = state_bytes.ok_or(ServeError::StateTooLarge { bytes, limit })?;
        let device = Arc::new(Shared::new(Engine::new(config.clone(), state_bytes)));
        std::thread::scope(|scope| {
            Builder::new()
                .name("engine".into())
                .spawn_scoped(scope, || device.drive())
                .map_err(ServeError::Thread)?;
            let served = Server::new(socket, config, Arc::clone(&device)).run();
            device.end();
            served
        })
    }
}

/// Describes why a device stopped serving before its client hung up.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ServeError {
    /// The socket failed.
    #[error("Cannot exchange messages with the client")]
    Socket(#[from] io::Error),
    /// There is no thread for the engine.
    #[error("Cannot start the thread that drives the engine")]
    Thread(#[source] io::Error),
    /// A header makes no sense.
    #[error("Cannot decode the header of a request")]
    Header(#[from] DecodeError),
    /// The client hung up within a header.
    #[error("The client hung up within a message")]
    Truncated,
    /// The client sent a reply.
    #[error("The client sent a reply to a request that was never made")]
    NotARequest,
    /// A request is larger than any has to be.
    #[error("Request of {size} bytes is over the limit of {limit}")]
    TooLong {
        /// Size of its payload.
        size: u64,
        /// The limit it exceeds.
        limit: u64,
    },
    /// The configured state is too large.
    #[error("Device state of {bytes} bytes is over the limit of {limit}")]
    StateTooLarge {
        /// The configured size.
        bytes: u64,
        /// The limit it exceeds.
        limit: u64,
    },
    /// A configured fault came due.
    #[error("The device died of a configured fault")]
    Died,
}

/// Is the errno of a refused request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Errno(i32);

impl From<DecodeError> for Errno {
    fn from(_: DecodeError) -> Self {
        Errno(libc::EINVAL)
    }
}
