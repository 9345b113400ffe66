// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A source whose TLS is not ours, and which does with its connections what a Cloud Hypervisor does.

use std::net::TcpStream;
use std::thread;

use rustls::pki_types::ServerName;
use rustls::{ClientConnection, StreamOwned};
use vfio_migration::transfer::connection::Listener;
use vfio_migration::transfer::receive::Receiver;
use vfio_migration::transfer::url::Endpoint;

use crate::bare_tls;
use crate::certificates::Files;
use crate::frames::{COMPLETE, STATE, memory, message};
use crate::peer::{Peer, Vmm, announce, quick};

fn connect(listener: &Listener, files: &Files) -> Peer {
    let Endpoint::Tcp { port, .. } = listener.url().endpoint() else { unreachable!() };
    let mut socket = TcpStream::connect(("127.0.0.1", port)).unwrap();
    let name = ServerName::try_from("127.0.0.1").unwrap();
    let mut session = ClientConnection::new(bare_tls::client(files), name).unwrap();
    while session.is_handshaking() {
        session.complete_io(&mut socket).unwrap();
    }
    Peer(Box::new(StreamOwned::new(session, socket)))
}

#[test]
fn additional_connections_that_end_without_a_goodbye_have_ended() {
    let files = Files::good();
    let listener = Listener::bind(&"tcp:127.0.0.1:0".parse().unwrap()).unwrap();
    let mut vmm = Vmm::new();
    let received = thread::scope(|scope| {
        scope.spawn(|| {
            let mut main = connect(&listener, &files);
            main.begin();
            let mut lanes: Vec<_> = (0..4).map(|_| connect(&listener, &files)).collect();
            lanes.iter_mut().for_each(announce);
            // One has all there is to send; the others never hear a word.
            lanes[1].say(&[memory(&[(0x1000, &[7; 4096])])]);
            drop(lanes);
            main.say(&[memory(&[(0x2000, &[8; 4096])]), message(STATE, b"{}"), message(COMPLETE, &[])]);
        });
        Receiver::new(quick(), Some(files.server())).receive(&listener, &mut vmm)
    });
    assert_eq!(received.unwrap().memory_messages, 2);
    assert_eq!(vmm.bytes(0x1000, 0x2000), [[7; 4096], [8; 4096]].concat());
}
