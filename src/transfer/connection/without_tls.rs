// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What stands for a connection under TLS without the feature `tls`: there is none.

use std::convert::Infallible;
use std::io;

use super::error::ConnectionError;
use super::line::{Line, Look};
use crate::transfer::limits::PeerLimits;
use crate::transfer::tls::{ClientTls, ServerTls};

/// A connection under TLS; there is none.
#[derive(Debug)]
pub(super) struct Session(Infallible);

impl Session {
    pub(super) fn client(
        tls: &ClientTls,
        _host: &str,
        _line: Line,
        _peer: &str,
        _limits: &PeerLimits,
    ) -> Result<Self, ConnectionError> {
        match tls.0 {}
    }

    pub(super) fn server(
        tls: &ServerTls,
        _line: Line,
        _peer: &str,
        _limits: &PeerLimits,
    ) -> Result<Self, ConnectionError> {
        match tls.0 {}
    }

    pub(super) fn look(&mut self) -> io::Result<Look> {
        match self.0 {}
    }

    pub(super) fn say_goodbye(&mut self) -> io::Result<()> {
        match self.0 {}
    }

    pub(super) fn line(&self) -> &Line {
        match self.0 {}
    }

    pub(super) fn line_mut(&mut self) -> &mut Line {
        match self.0 {}
    }
}

impl io::Read for Session {
    fn read(&mut self, _bytes: &mut [u8]) -> io::Result<usize> {
        match self.0 {}
    }
}

impl io::Write for Session {
    fn write(&mut self, _bytes: &[u8]) -> io::Result<usize> {
        match self.0 {}
    }

    fn flush(&mut self) -> io::Result<()> {
        match self.0 {}
    }
}
