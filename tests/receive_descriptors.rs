// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A receiver in a process that may open few files: a process of its own, as what is open is the whole process's.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

#[expect(dead_code, reason = "other tests use the rest")]
mod frames;
#[expect(dead_code, reason = "the transfer's other tests use the rest")]
#[path = "transfer/peer.rs"]
mod peer;

use std::fs::File;
use std::net::TcpStream;
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use vfio_migration::transfer::connection::Listener;
use vfio_migration::transfer::receive::Receiver;
use vfio_migration::transfer::url::Endpoint;

use peer::{Peer, Vmm, quick};

/// Descriptors left to the receiver.
const LEFT: usize = 4;

#[test]
fn strangers_who_take_every_descriptor_make_room_for_the_source() {
    let limit = Rlimit { current: Some(256), ..getrlimit(Resource::Nofile) };
    setrlimit(Resource::Nofile, limit).unwrap();
    let (listener, begun) = (Listener::bind(&"tcp:127.0.0.1:0".parse().unwrap()).unwrap(), Instant::now());
    let Endpoint::Tcp { host, port } = listener.url().endpoint() else { unreachable!("bound to TCP") };
    let strangers: Vec<_> = (0..12).map(|_| TcpStream::connect((host, port)).unwrap()).collect();
    let mut main = Peer::to(&listener);
    let mut files: Vec<_> = std::iter::from_fn(|| File::open("/dev/null").ok()).collect();
    files.truncate(files.len() - LEFT);

    let mut vmm = Vmm::new();
    let received = thread::scope(|scope| {
        scope.spawn(|| {
            main.begin();
            main.end();
        });
        Receiver::new(quick(), None).receive(&listener, &mut vmm)
    });
    received.unwrap();
    assert!(begun.elapsed() < Duration::from_secs(5), "{:?}", begun.elapsed());
    drop((strangers, files));
}
