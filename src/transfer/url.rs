// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Where a migration goes: `unix:<path>` or `tcp:<host>:<port>`.

use std::fmt;
use std::net::Ipv6Addr;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use thiserror::Error;

/// Longest path of a UNIX socket in bytes: `sun_path` less its closing zero.
const SOCKET_PATH_BYTES: usize = 107;

/// Why a text is not a migration URL.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum UrlError {
    /// It begins with neither `unix:` nor `tcp:`.
    #[error("Migration URL \"{url}\" begins with neither \"unix:\" nor \"tcp:\"")]
    Scheme {
        /// The text.
        url: String,
    },
    /// No path after `unix:`.
    #[error("Migration URL \"{url}\" has no path")]
    NoPath {
        /// The text.
        url: String,
    },
    /// A path no socket can be bound to.
    #[error("Socket path \"{path}\" is longer than {SOCKET_PATH_BYTES} bytes or holds a zero byte")]
    Path {
        /// The path.
        path: String,
    },
    /// No host after `tcp:`.
    #[error("Migration URL \"{url}\" has no host")]
    NoHost {
        /// The text.
        url: String,
    },
    /// No port after the host.
    #[error("Migration URL \"{url}\" has no port; write tcp:<host>:<port>")]
    NoPort {
        /// The text.
        url: String,
    },
    /// A port that is no number from 0 to 65535.
    #[error("Port \"{port}\" is not a number from 0 to 65535")]
    Port {
        /// What stands in its place.
        port: String,
    },
    /// A host that is neither a name nor an address.
    #[error("Host \"{host}\" is neither a name, an IPv4 address nor an IPv6 address in brackets")]
    Host {
        /// What stands in its place.
        host: String,
    },
}

/// Where a migration goes.
///
/// ```
/// use vfio_migration::transfer::url::Url;
/// let url: Url = "tcp:[::1]:4444".parse()?;
/// assert_eq!(url, Url::tcp("::1", 4444)?);
/// assert_eq!(url.to_string(), "tcp:[::1]:4444");
/// let error = "tcp:example.org".parse::<Url>().unwrap_err();
/// assert!(error.to_string().ends_with("has no port; write tcp:<host>:<port>"));
/// # Ok::<(), vfio_migration::transfer::url::UrlError>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Url(Place);

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
enum Place {
    Unix(PathBuf),
    Tcp(String, u16),
}

/// What a [`Url`] names.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Endpoint<'a> {
    /// A UNIX stream socket.
    Unix(&'a Path),
    /// A TCP port; an IPv6 address is without its brackets.
    Tcp {
        /// Name or address.
        host: &'a str,
        /// Port; 0 lets a listener choose.
        port: u16,
    },
}

impl Url {
    /// Makes the URL of the UNIX socket at `path`.
    ///
    /// # Errors
    /// The path is empty, too long for a socket or holds a zero byte.
    pub fn unix(path: impl Into<PathBuf>) -> Result<Self, UrlError> {
        let path = path.into();
        let bytes = path.as_os_str().as_encoded_bytes();
        if bytes.is_empty() {
            return Err(UrlError::NoPath { url: "unix:".into() });
        }
        if bytes.len() > SOCKET_PATH_BYTES || bytes.contains(&0) {
            return Err(UrlError::Path { path: path.display().to_string() });
        }
        Ok(Self(Place::Unix(path)))
    }

    /// Makes the URL of the TCP `port` of `host`, a name or an address without brackets.
    ///
    /// # Errors
    /// `host` is empty, holds a character no name has, or is a malformed IPv6 address.
    pub fn tcp(host: impl Into<String>, port: u16) -> Result<Self, UrlError> {
        let host = host.into();
        if host.is_empty() {
            return Err(UrlError::NoHost { url: format!("tcp::{port}") });
        }
        if is_host(&host) { Ok(Self(Place::Tcp(host, port))) } else { Err(UrlError::Host { host }) }
    }

    /// What the URL names.
    pub fn endpoint(&self) -> Endpoint<'_> {
        match &self.0 {
            Place::Unix(path) => Endpoint::Unix(path),
            Place::Tcp(host, port) => Endpoint::Tcp { host, port: *port },
        }
    }
}

/// Whether `host` may stand for itself in a URL; an IPv6 address may have a zone.
fn is_host(host: &str) -> bool {
    if host.contains(':') {
        let (address, zone) = host.split_once('%').unwrap_or((host, "0"));
        return address.parse::<Ipv6Addr>().is_ok() && !zone.is_empty() && zone.bytes().all(is_name_byte);
    }
    host.bytes().all(is_name_byte)
}

fn is_name_byte(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || b"-._".contains(&byte)
}

impl FromStr for Url {
    type Err = UrlError;

    fn from_str(url: &str) -> Result<Self, UrlError> {
        if let Some(path) = url.strip_prefix("unix:") {
            return Self::unix(path);
        }
        let Some(rest) = url.strip_prefix("tcp:") else {
            return Err(UrlError::Scheme { url: url.to_owned() });
        };
        let (host, port) = split_port(url, rest)?;
        if host.is_empty() {
            return Err(UrlError::NoHost { url: url.to_owned() });
        }
        let digits = !port.is_empty() && port.bytes().all(|byte| byte.is_ascii_digit());
        let number = port.parse().ok().filter(|_| digits);
        Self::tcp(host, number.ok_or_else(|| UrlError::Port { port: port.to_owned() })?)
    }
}

/// Splits what follows `tcp:` into host, without brackets, and port.
fn split_port<'a>(url: &str, rest: &'a str) -> Result<(&'a str, &'a str), UrlError> {
    let no_port = || UrlError::NoPort { url: url.to_owned() };
    if let Some(bracketed) = rest.strip_prefix('[') {
        let no_address = || UrlError::Host { host: rest.to_owned() };
        let (host, after) = bracketed.split_once(']').ok_or_else(no_address)?;
        if !host.contains(':') {
            return Err(no_address());
        }
        return Ok((host, after.strip_prefix(':').ok_or_else(no_port)?));
    }
    let (host, port) = rest.rsplit_once(':').ok_or_else(no_port)?;
    if host.contains(':') {
        return Err(UrlError::Host { host: rest.to_owned() });
    }
    if port.is_empty() { Err(no_port()) } else { Ok((host, port)) }
}

impl fmt::Display for Url {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.endpoint() {
            Endpoint::Unix(path) => write!(f, "unix:{}", path.display()),
            Endpoint::Tcp { host, port } if host.contains(':') => write!(f, "tcp:[{host}]:{port}"),
            Endpoint::Tcp { host, port } => write!(f, "tcp:{host}:{port}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn text_of(url: &str) -> String {
        url.parse::<Url>().unwrap_err().to_string()
    }

    #[test]
    fn both_kinds_are_read() {
        let url: Url = "unix:/run/vm 1.sock".parse().unwrap();
        assert_eq!(url.endpoint(), Endpoint::Unix(Path::new("/run/vm 1.sock")));
        for (text, host, port) in [
            ("tcp:192.0.2.1:4444", "192.0.2.1", 4444),
            ("tcp:host-1.example.org:1", "host-1.example.org", 1),
            ("tcp:[2001:db8::1]:65535", "2001:db8::1", 65535),
            ("tcp:[fe80::1%eth0]:7", "fe80::1%eth0", 7),
            ("tcp:localhost:0", "localhost", 0),
        ] {
            let url: Url = text.parse().unwrap();
            assert_eq!(url.endpoint(), Endpoint::Tcp { host, port });
            assert_eq!(url.to_string(), text);
        }
    }

    #[test]
    fn a_url_without_a_port_says_so() {
        for url in ["tcp:example.org", "tcp:example.org:", "tcp:[::1]", "tcp:[::1]4444"] {
            assert_eq!(text_of(url), format!("Migration URL \"{url}\" has no port; write tcp:<host>:<port>"));
        }
    }

    #[test]
    fn a_malformed_url_is_refused_with_the_part_that_is_wrong() {
        assert_eq!(text_of("tcp:example.org:65536"), "Port \"65536\" is not a number from 0 to 65535");
        assert_eq!(text_of("tcp:example.org:+80"), "Port \"+80\" is not a number from 0 to 65535");
        assert_eq!(text_of("tcp::80"), "Migration URL \"tcp::80\" has no host");
        assert_eq!(text_of("unix:"), "Migration URL \"unix:\" has no path");
        for url in ["http://example.org", "example.org:80", "/run/vm.sock", ""] {
            let expected = format!("Migration URL \"{url}\" begins with neither \"unix:\" nor \"tcp:\"");
            assert_eq!(text_of(url), expected);
        }
        for host in ["::1", "[::zz]", "[127.0.0.1]", "a b", "//example.org", "[::1%]"] {
            assert!(text_of(&format!("tcp:{host}:80")).starts_with("Host \""), "{host}");
        }
        let long = format!("unix:/{}", "s".repeat(107));
        assert!(text_of(&long).ends_with("is longer than 107 bytes or holds a zero byte"));
    }

    proptest! {
        #[test]
        fn any_text_is_a_url_or_an_error(text in "(tcp:|unix:)?[\\[\\]:.a-f0-9%/]{0,20}") {
            if let Ok(url) = text.parse::<Url>() {
                prop_assert_eq!(url.to_string().parse::<Url>(), Ok(url));
            }
        }
    }
}
