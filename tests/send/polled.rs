// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A receiver that waits for requests as a Cloud Hypervisor does: on an additional connection's socket, whatever its TLS has
//! read ahead.

use std::io::{self, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use rustls::{ServerConfig, ServerConnection, StreamOwned};
use vfio_migration::precopy::TimeoutStrategy;
use vfio_migration::transfer::limits::{ConnectionCount, PeerLimits};
use vfio_migration::transfer::url::Url;
use vfio_migration::transfer::{SendOptions, Sender};
use vm_memory::{Bytes, GuestAddress};

use crate::bare_tls;
use crate::certificates::Files;
use crate::frames::{COMPLETE, CONFIG, FOR_MEMORY, MEMORY, STATE};
use crate::vm::{FakeVm, Memory, PAGES, empty_memory, read_page};

type Stream = StreamOwned<ServerConnection, TcpStream>;

struct Receiver {
    listener: TcpListener,
    config: Arc<ServerConfig>,
    memory: Memory,
    state_came: AtomicBool,
}

impl Receiver {
    fn accept(&self) -> io::Result<Stream> {
        let (mut socket, _) = self.listener.accept()?;
        let mut session = ServerConnection::new(Arc::clone(&self.config)).map_err(io::Error::other)?;
        while session.is_handshaking() {
            session.complete_io(&mut socket)?;
        }
        Ok(StreamOwned::new(session, socket))
    }

    /// Takes a VM in, over the main connection and `lanes` more.
    fn receive(&self, lanes: usize) -> io::Result<()> {
        let mut main = self.accept()?;
        thread::scope(|scope| {
            let mut workers = Vec::new();
            loop {
                let mut head = [0; 16];
                main.read_exact(&mut head)?;
                let command = self.take(&mut main, head)?;
                if command == STATE {
                    self.state_came.store(true, Ordering::Release);
                    for worker in std::mem::take(&mut workers) {
                        thread::ScopedJoinHandle::join(worker).unwrap()?;
                    }
                }
                answer(&mut main)?;
                if command == CONFIG {
                    // One after the other, handshake and role, on one thread.
                    for _ in 0..lanes {
                        let mut lane = self.accept()?;
                        let mut role = [0; 2];
                        lane.read_exact(&mut role)?;
                        assert_eq!(role, FOR_MEMORY);
                        workers.push(scope.spawn(move || self.work(lane)));
                    }
                }
                if command == COMPLETE {
                    return Ok(());
                }
            }
        })
    }

    /// Takes Memory until the end of the connection, or until State comes.
    fn work(&self, mut lane: Stream) -> io::Result<()> {
        while self.is_readable(&lane.sock)? {
            let mut head = [0; 16];
            match lane.read_exact(&mut head) {
                Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(()),
                outcome => outcome?,
            }
            assert_eq!(self.take(&mut lane, head)?, MEMORY);
            let ahead = lane.conn.process_new_packets().map_err(io::Error::other)?.plaintext_bytes_to_read();
            assert_eq!(ahead, 0, "bytes of another request that no poll will see");
            answer(&mut lane)?;
        }
        Ok(())
    }

    /// Waits for bytes in the socket; `false` once State has come.
    fn is_readable(&self, socket: &TcpStream) -> io::Result<bool> {
        socket.set_read_timeout(Some(Duration::from_millis(5)))?;
        while !self.state_came.load(Ordering::Acquire) {
            match socket.peek(&mut [0]) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                outcome => {
                    outcome?;
                    socket.set_read_timeout(None)?;
                    return Ok(true);
                }
            }
        }
        Ok(false)
    }

    /// Takes what comes after `head`.
    fn take(&self, stream: &mut Stream, head: [u8; 16]) -> io::Result<u16> {
        let command = u16::from_le_bytes([head[0], head[1]]);
        let mut payload = vec![0; u64::from_le_bytes(head[8..].try_into().unwrap()) as usize];
        stream.read_exact(&mut payload)?;
        if command == MEMORY {
            for entry in payload.as_chunks::<16>().0 {
                let entry = u128::from_le_bytes(*entry);
                let mut pages = vec![0; (entry >> 64) as usize];
                stream.read_exact(&mut pages)?;
                self.memory.write_slice(&pages, GuestAddress(entry as u64)).map_err(io::Error::other)?;
            }
        }
        Ok(command)
    }
}

fn answer(stream: &mut Stream) -> io::Result<()> {
    stream.write_all(&[1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0])?;
    stream.flush()
}

/// Sends `vm` over `connections` in chunks of `chunk_bytes`, and checks that it arrives.
fn arrives(mut vm: FakeVm, connections: usize, chunk_bytes: u64) {
    let files = Files::good();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = Url::tcp("127.0.0.1", listener.local_addr().unwrap().port()).unwrap();
    let options = SendOptions::new(url)
        .connections(ConnectionCount::new(connections as u64).unwrap())
        .unwrap()
        .chunk_bytes(chunk_bytes)
        .unwrap()
        .max_rounds(Some(4))
        .timeout_strategy(TimeoutStrategy::Ignore)
        .tls(Some(files.client()))
        .limits(PeerLimits { answer_timeout: Duration::from_secs(5), ..PeerLimits::default() });
    let config = bare_tls::server(&files);
    let receiver = Receiver { listener, config, memory: empty_memory(), state_came: AtomicBool::new(false) };
    let machine = vm.machine();
    thread::scope(|scope| {
        let receiving = scope.spawn(|| receiver.receive(connections));
        let sent = Sender::new(options).send(&mut vm, &machine.tracker, &machine.devices);
        let received = receiving.join().unwrap();
        assert!(sent.is_ok() && received.is_ok(), "{sent:?} {received:?}");
    });
    let wrong = (0..PAGES).filter(|&page| read_page(&receiver.memory, page) != vm.page(page));
    assert_eq!(wrong.collect::<Vec<_>>(), Vec::<u64>::new(), "pages that differ");
}

#[test]
fn no_request_hides_behind_another_from_a_receiver_that_polls_its_sockets() {
    // Chunks of which the last one in a pass is small enough to be read ahead as a whole.
    for pages in [1, 5, 9, 17] {
        arrives(FakeVm::new(5), 2, pages * 4096);
    }
}

#[test]
fn connections_that_carried_nothing_end_without_a_reset() {
    // One chunk is all of the VM: seven connections have nothing to read but their session tickets.
    arrives(FakeVm::new(0), 8, 64 << 20);
}
