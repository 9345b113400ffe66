// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

use std::io;

use thiserror::Error;

use crate::transfer::url::Url;

/// Why there is no connection.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum ConnectionError {
    /// The host's name has no address.
    #[error("Cannot find an address for {url}")]
    Resolve {
        /// Where to.
        url: Url,
        /// What the resolver said.
        source: io::Error,
    },
    /// No address of the peer let us in.
    #[error("Cannot connect to {url} at {address}{}", tried(*.addresses))]
    Connect {
        /// Where to.
        url: Url,
        /// Address tried last.
        address: String,
        /// Addresses tried.
        addresses: usize,
        /// Why the last one failed.
        source: io::Error,
    },
    /// No socket can be bound there.
    #[error("Cannot listen on {url}")]
    Listen {
        /// Where.
        url: Url,
        /// Why not.
        source: io::Error,
    },
    /// The listening socket failed.
    #[error("Cannot accept a connection on {url}")]
    Accept {
        /// Where.
        url: Url,
        /// Why not.
        source: io::Error,
    },
    /// A connected socket refused its settings.
    #[error("Cannot set up the socket to {peer}")]
    Socket {
        /// The peer.
        peer: String,
        /// Why not.
        source: io::Error,
    },
    /// TLS was asked for on a UNIX socket, where no peer expects it.
    #[error("TLS goes over TCP, not over {url}")]
    TlsOverUnix {
        /// Where to.
        url: Url,
    },
    /// The host is no name a certificate can be for.
    #[error("No certificate can be for host \"{host}\"")]
    ServerName {
        /// The host.
        host: String,
    },
    /// Both ends did not agree to trust each other.
    #[error("TLS handshake with {peer} failed")]
    Handshake {
        /// The peer.
        peer: String,
        /// What failed; a `rustls::Error` is in it where TLS is to blame.
        source: io::Error,
    },
}

fn tried(addresses: usize) -> String {
    if addresses == 1 { String::new() } else { format!(", the last of {addresses} addresses tried") }
}

impl ConnectionError {
    /// Whether this process, or the system, has no descriptor left for it.
    pub(crate) fn is_of_descriptors(&self) -> bool {
        let Self::Accept { source, .. } = self else { return false };
        source.raw_os_error().is_some_and(|errno| [libc::EMFILE, libc::ENFILE].contains(&errno))
    }
}
