// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Both ends of TLS in the middle of a connection, so that what goes over it can be written down.

use std::io;
use std::net::{Shutdown, TcpStream};
use std::ops::DerefMut;
use std::sync::Arc;

use rustls::pki_types::ServerName;
use rustls::{ClientConnection, ConnectionCommon, ServerConnection, SideData, StreamOwned};

use crate::bare_tls;
use crate::certificates::Files;
use crate::relay::{End, Wrap};

impl<C, S> End for StreamOwned<C, TcpStream>
where
    C: DerefMut<Target = ConnectionCommon<S>> + Send,
    S: SideData,
{
    fn finish(&mut self) {
        self.conn.send_close_notify();
        let _gone = self.conn.complete_io(&mut self.sock);
        let _gone = self.sock.shutdown(Shutdown::Write);
    }
}

/// Is the receiver to the source, and the source to the receiver, with the certificates of both.
pub(crate) fn between(files: &Files) -> Wrap {
    let (server, client) = (bare_tls::server(files), bare_tls::client(files));
    Box::new(move |near, far| {
        let session = ServerConnection::new(Arc::clone(&server)).map_err(io::Error::other)?;
        let near = shake_hands(StreamOwned::new(session, near))?;
        let name = ServerName::try_from("127.0.0.1").map_err(io::Error::other)?;
        let session = ClientConnection::new(Arc::clone(&client), name).map_err(io::Error::other)?;
        let far = shake_hands(StreamOwned::new(session, far))?;
        Ok((Box::new(near), Box::new(far)))
    })
}

fn shake_hands<C, S>(mut stream: StreamOwned<C, TcpStream>) -> io::Result<StreamOwned<C, TcpStream>>
where
    C: DerefMut<Target = ConnectionCommon<S>>,
    S: SideData,
{
    while stream.conn.is_handshaking() {
        stream.conn.complete_io(&mut stream.sock)?;
    }
    Ok(stream)
}
