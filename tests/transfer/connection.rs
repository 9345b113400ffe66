// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Connections of every kind: what goes in comes out, and no wait lasts.

use std::error::Error;
use std::io::{self, Read, Write};
use std::net::TcpListener;
use std::os::unix::net::{UnixListener, UnixStream};
use std::thread;
use std::time::{Duration, Instant};

use rustls::{ServerConnection, StreamOwned};
use vfio_migration::range::GpaRange;
use vfio_migration::transfer::connection::{Connection, ConnectionError, Head, Listener, Look, Stall};
use vfio_migration::transfer::limits::{Pace, PeerLimits};
use vfio_migration::transfer::url::{Endpoint, Url};
use vm_memory::bitmap::{AtomicBitmap, Bitmap};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

use crate::bare_tls;
use crate::certificates::Files;
use crate::skip::skip;

const SECOND: Duration = Duration::from_secs(1);

type Memory = GuestMemoryMmap<AtomicBitmap>;

/// PeerLimits under which a stall is noticed in a fraction of a second.
pub(crate) fn impatient() -> PeerLimits {
    PeerLimits {
        handshake_timeout: Duration::from_millis(300),
        idle_timeout: Duration::from_millis(300),
        pace: Pace { window: Duration::from_millis(200), bytes: 64 << 10 },
        linger: Duration::from_millis(100),
        ..PeerLimits::default()
    }
}

fn range(start: u64, length: u64) -> GpaRange {
    GpaRange::new(start, length).unwrap()
}

/// Guest memory in two regions, filled from `seed` or, without one, untouched.
fn memory(seed: Option<u64>) -> Memory {
    let memory =
        Memory::from_ranges(&[(GuestAddress(0), 1 << 20), (GuestAddress(1 << 20), 1 << 20)]).unwrap();
    let Some(mut state) = seed else { return memory };
    for word in 0..(2 << 20) / 8 {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        memory.write_obj(state, GuestAddress(word * 8)).unwrap();
    }
    memory
}

fn bytes_of(memory: &Memory, range: GpaRange) -> Vec<u8> {
    let mut bytes = vec![0; usize::try_from(range.len()).unwrap()];
    memory.read_slice(&mut bytes, GuestAddress(range.start())).unwrap();
    bytes
}

fn pair(limits: &PeerLimits) -> (Connection, Connection) {
    let (near, far) = UnixStream::pair().unwrap();
    (Connection::from_unix(near, limits).unwrap(), Connection::from_unix(far, limits).unwrap())
}

/// Both ends of a connection over `url`, with TLS where there are `files`.
fn connected(url: &str, files: Option<&Files>) -> (Connection, Connection) {
    let limits = PeerLimits::default();
    let listener = Listener::bind(&url.parse().unwrap()).unwrap();
    thread::scope(|scope| {
        let far = scope.spawn(|| {
            let far = listener.accept(10 * SECOND, &limits).unwrap().expect("somebody connects");
            match files {
                Some(files) => far.secure_server(&files.server(), &limits).unwrap(),
                None => far,
            }
        });
        let client = files.map(Files::client);
        let near = Connection::connect(listener.url(), client.as_ref(), &limits).unwrap();
        (near, far.join().unwrap())
    })
}

/// Sends scattered, repeated and long ranges and compares all of memory.
fn guest_memory_crosses((mut near, mut far): (Connection, Connection)) {
    let (source, destination) = (memory(Some(7)), memory(None));
    let mut ranges: Vec<_> = (0..200).map(|page| range(page * 8192 + 1, 4093)).collect();
    ranges.extend([range(0x8_0000, 0x10_0000), range(0, 2 << 20), range(5, 1)]);
    let total: u64 = ranges.iter().map(|range| range.len()).sum();
    let (near_handle, far_handle) = (near.handle(), far.handle());
    thread::scope(|scope| {
        let ranges = &ranges;
        scope.spawn(move || {
            assert_eq!(near.send_guest(&source, ranges.iter().copied()).unwrap(), total);
            near.write_all(b"the end.").unwrap();
            near.flush().unwrap();
            assert_eq!(near.await_head(10 * SECOND).unwrap(), Head::Bytes(*b"seen"));
            near.close(SECOND);
        });
        assert_eq!(far.receive_guest(&destination, ranges.iter().copied()).unwrap(), total);
        assert_eq!(far.await_head(10 * SECOND).unwrap(), Head::Bytes(*b"the end."));
        far.write_all(b"seen").unwrap();
        far.flush().unwrap();
        assert_eq!(far.await_head::<16>(10 * SECOND).unwrap(), Head::End);
    });
    let all = range(0, 2 << 20);
    assert!(bytes_of(&memory(Some(7)), all) == bytes_of(&destination, all), "memory differs");
    assert_eq!(near_handle.sent_bytes(), far_handle.received_bytes());
    assert!(far_handle.received_bytes() >= total + 8);
}

#[test]
fn guest_memory_crosses_a_unix_socket() {
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("vm.sock");
    guest_memory_crosses(connected(&format!("unix:{}", socket.display()), None));
    assert!(!socket.exists(), "the socket's file goes with the listener");
}

#[test]
fn guest_memory_crosses_tcp() {
    guest_memory_crosses(connected("tcp:127.0.0.1:0", None));
}

#[test]
fn guest_memory_crosses_tcp_by_name() {
    guest_memory_crosses(connected("tcp:localhost:0", None));
}

#[test]
fn guest_memory_crosses_ipv6() {
    if std::net::TcpListener::bind("[::1]:0").is_err() {
        return skip("this host has no IPv6 loopback");
    }
    guest_memory_crosses(connected("tcp:[::1]:0", None));
}

#[test]
fn guest_memory_crosses_tls() {
    guest_memory_crosses(connected("tcp:127.0.0.1:0", Some(&Files::good())));
}

#[test]
fn received_memory_is_marked_dirty_and_no_more() {
    let (mut near, mut far) = pair(&PeerLimits::default());
    near.write_all(&[1; 4096 * 3]).unwrap();
    let memory = memory(None);
    far.receive_guest(&memory, [range(4096, 4096), range((1 << 20) - 4096, 8192)]).unwrap();
    let dirty: Vec<_> = (0..512)
        .filter(|page| {
            let mut regions = memory.iter();
            let region = regions.nth(page / 256).unwrap();
            region.bitmap().dirty_at(page % 256 * 4096)
        })
        .collect();
    assert_eq!(dirty, [1, 255, 256]);
}

#[test]
fn memory_outside_the_guest_is_an_error() {
    let (mut near, _far) = pair(&PeerLimits::default());
    let error = near.send_guest(&memory(None), [range(1 << 20, 1 << 30)]).unwrap_err();
    assert!(error.to_string().contains("invalid guest address"), "{error}");
    assert!(near.receive_guest(&memory(None), [range(u64::MAX - 1, 1)]).is_err());
}

#[test]
fn an_end_in_mid_page_is_an_error() {
    let (mut near, mut far) = pair(&PeerLimits::default());
    near.write_all(&[1; 5000]).unwrap();
    drop(near);
    let error = far.receive_guest(&memory(None), [range(0, 8192)]).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
}

#[test]
fn an_end_in_mid_message_is_an_error_and_between_messages_is_none() {
    let (mut near, mut far) = pair(&PeerLimits::default());
    near.write_all(&[1; 20]).unwrap();
    drop(near);
    assert_eq!(far.await_head(SECOND).unwrap(), Head::Bytes([1; 16]));
    assert_eq!(far.await_head::<16>(SECOND).unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
    assert_eq!(far.await_head::<16>(SECOND).unwrap(), Head::End);
}

#[test]
fn a_cut_under_tls_is_told_in_few_words() {
    let (near, mut far) = connected("tcp:127.0.0.1:0", Some(&Files::good()));
    drop(near);
    let error = far.read_exact(&mut [0]).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
    assert_eq!(error.to_string(), "Peer closed the connection without a goodbye");
}

#[test]
fn silence_is_told_and_can_be_waited_on_again() {
    let (mut near, mut far) = pair(&PeerLimits::default());
    let begun = Instant::now();
    assert_eq!(far.await_head::<4>(Duration::from_millis(50)).unwrap(), Head::Silence);
    assert!(begun.elapsed() < SECOND);
    near.write_all(b"late").unwrap();
    assert_eq!(far.await_head(SECOND).unwrap(), Head::Bytes(*b"late"));
}

/// Looks at `near` until there is something to be read.
fn look_until_there_is_something(near: &mut Connection) -> Look {
    let looks = (0..500).map(|_| near.look().unwrap());
    let mut looks = looks.inspect(|_| thread::sleep(Duration::from_millis(2)));
    looks.find(|&look| look != Look::Silence).unwrap_or(Look::Silence)
}

fn a_look_takes_nothing((mut near, mut far): (Connection, Connection)) {
    assert_eq!(near.look().unwrap(), Look::Silence);
    far.write_all(b"word").unwrap();
    far.flush().unwrap();
    assert_eq!(look_until_there_is_something(&mut near), Look::Bytes);
    assert_eq!(near.look().unwrap(), Look::Bytes);
    assert_eq!(near.await_head(SECOND).unwrap(), Head::Bytes(*b"word"));
    assert_eq!(near.look().unwrap(), Look::Silence);
    near.write_all(b"back").unwrap();
    near.flush().unwrap();
    assert_eq!(far.await_head(SECOND).unwrap(), Head::Bytes(*b"back"));
    far.close(Duration::ZERO);
    assert_eq!(look_until_there_is_something(&mut near), Look::End);
}

#[test]
fn a_look_takes_nothing_off_any_kind_of_connection() {
    a_look_takes_nothing(pair(&PeerLimits::default()));
    a_look_takes_nothing(connected("tcp:127.0.0.1:0", None));
    a_look_takes_nothing(connected("tcp:127.0.0.1:0", Some(&Files::good())));
}

#[test]
fn what_tls_says_for_itself_is_no_byte_to_be_read() {
    let files = Files::good();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = Url::tcp("127.0.0.1", listener.local_addr().unwrap().port()).unwrap();
    let config = bare_tls::server(&files);
    assert!(config.send_tls13_tickets > 0, "this server hands tickets out");
    thread::scope(|scope| {
        let server = scope.spawn(|| {
            let mut far =
                StreamOwned::new(ServerConnection::new(config).unwrap(), listener.accept().unwrap().0);
            far.read_exact(&mut [0]).unwrap();
            far
        });
        let mut near = Connection::connect(&url, Some(&files.client()), &PeerLimits::default()).unwrap();
        near.write_all(&[1]).unwrap();
        near.flush().unwrap();
        let mut far = server.join().unwrap();
        for _ in 0..20 {
            assert_eq!(near.look().unwrap(), Look::Silence);
            thread::sleep(Duration::from_millis(1));
        }
        far.write_all(&[2]).unwrap();
        assert_eq!(look_until_there_is_something(&mut near), Look::Bytes);
    });
}

#[test]
fn a_payload_is_read_whole_into_a_buffer_that_is_used_again() {
    let (mut near, mut far) = pair(&PeerLimits::default());
    let sent: Vec<u8> = (0..3_000_000_u32).map(|at| at.to_le_bytes()[1]).collect();
    let mut payload = vec![9; 10];
    thread::scope(|scope| {
        scope.spawn(|| near.write_all(&sent).unwrap());
        far.read_payload(sent.len() as u64, &mut payload).unwrap();
    });
    assert!(payload == sent, "payload differs");
    far.read_payload(0, &mut payload).unwrap();
    assert!(payload.is_empty());
}

#[test]
fn a_payload_that_is_claimed_and_not_sent_takes_no_memory() {
    let (mut near, mut far) = pair(&PeerLimits::default());
    near.write_all(&[5; 100_000]).unwrap();
    drop(near);
    let mut payload = Vec::new();
    let error = far.read_payload(u64::MAX, &mut payload).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
    assert_eq!(payload.len(), 100_000);
    assert!(payload.capacity() <= 256 << 10, "{} bytes", payload.capacity());
}

/// Writes a byte every 20 ms until nobody reads.
fn trickle(mut stream: UnixStream) {
    while stream.write_all(&[1]).is_ok() {
        thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn a_trickling_peer_is_stalled() {
    let (near, far) = UnixStream::pair().unwrap();
    let mut near = Connection::from_unix(near, &impatient()).unwrap();
    let trickling = thread::spawn(|| trickle(far));
    let begun = Instant::now();
    let error = near.read_payload(1 << 20, &mut Vec::new()).unwrap_err();
    assert!(begun.elapsed() < 5 * SECOND);
    assert!(matches!(Stall::of(&error), Some(Stall::Slow { bytes: 1..1000, .. })), "{error}");
    drop(near);
    trickling.join().unwrap();
}

#[test]
fn a_peer_that_trickles_its_first_bytes_is_stalled() {
    let (near, far) = UnixStream::pair().unwrap();
    let mut near = Connection::from_unix(near, &impatient()).unwrap();
    let trickling = thread::spawn(|| trickle(far));
    let error = near.await_head::<1024>(SECOND).unwrap_err();
    assert!(matches!(Stall::of(&error), Some(Stall::Slow { .. })), "{error}");
    drop(near);
    trickling.join().unwrap();
}

#[test]
fn a_peer_that_reads_nothing_is_stalled() {
    let (mut near, _far) = pair(&impatient());
    let begun = Instant::now();
    let error = near.send_guest(&memory(Some(1)), [range(0, 2 << 20)]).unwrap_err();
    assert!(begun.elapsed() < 5 * SECOND);
    assert!(matches!(Stall::of(&error), Some(Stall::Slow { .. })), "{error}");
}

#[test]
fn closing_from_another_thread_ends_every_wait() {
    let (mut near, _far) = pair(&PeerLimits::default());
    let handle = near.handle();
    thread::scope(|scope| {
        let waiting = scope.spawn(|| near.await_head::<16>(Duration::from_secs(600)));
        thread::sleep(Duration::from_millis(50));
        let begun = Instant::now();
        handle.close();
        let error = waiting.join().unwrap().unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::ConnectionAborted);
        assert!(begun.elapsed() < SECOND);
    });
    assert!(near.write_all(&[0]).is_err());
}

#[test]
fn the_last_answer_reaches_a_peer_that_is_still_sending() {
    let listener = Listener::bind(&"tcp:127.0.0.1:0".parse().unwrap()).unwrap();
    let limits = PeerLimits::default();
    thread::scope(|scope| {
        let sender = scope.spawn(|| {
            let mut near = Connection::connect(listener.url(), None, &limits).unwrap();
            near.write_all(&vec![0; 8 << 20]).unwrap();
            near.await_head(10 * SECOND).unwrap()
        });
        let mut far = listener.accept(10 * SECOND, &limits).unwrap().unwrap();
        far.read_exact(&mut [0; 10]).unwrap();
        far.write_all(b"no!!").unwrap();
        far.close(2 * SECOND);
        assert_eq!(sender.join().unwrap(), Head::Bytes(*b"no!!"));
    });
}

#[test]
fn nobody_to_connect_to_is_an_error_that_names_the_place() {
    let free = Listener::bind(&"tcp:127.0.0.1:0".parse().unwrap()).unwrap().url().clone();
    let error = Connection::connect(&free, None, &PeerLimits::default()).unwrap_err();
    assert!(error.to_string().starts_with(&format!("Cannot connect to {free} at 127.0.0.1:")), "{error}");
    assert!(error.source().is_some());

    let error =
        Connection::connect(&"unix:/nonexistent/vm.sock".parse().unwrap(), None, &PeerLimits::default());
    assert!(error.unwrap_err().to_string().starts_with("Cannot connect to unix:/nonexistent/vm.sock"));

    let nowhere = "tcp:nowhere.invalid:1".parse().unwrap();
    let error = Connection::connect(&nowhere, None, &PeerLimits::default()).unwrap_err();
    assert!(matches!(error, ConnectionError::Resolve { .. }), "{error}");
}

#[test]
fn a_place_that_is_taken_is_an_error_that_names_it() {
    let listener = Listener::bind(&"tcp:127.0.0.1:0".parse().unwrap()).unwrap();
    let error = Listener::bind(listener.url()).unwrap_err();
    assert_eq!(error.to_string(), format!("Cannot listen on {}", listener.url()));

    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("vm.sock");
    let _taken = UnixListener::bind(&path).unwrap();
    assert!(Listener::bind(&Url::unix(&path).unwrap()).is_err());
    assert!(path.exists(), "the file of another listener stays");
}

#[test]
fn a_socket_that_a_dead_listener_left_is_replaced_and_no_other_file() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("vm.sock");
    drop(UnixListener::bind(&path).unwrap());
    assert!(path.exists());
    let listener = Listener::bind(&Url::unix(&path).unwrap()).unwrap();
    Connection::connect(listener.url(), None, &PeerLimits::default()).unwrap();

    let file = directory.path().join("file");
    std::fs::write(&file, "text").unwrap();
    assert!(Listener::bind(&Url::unix(&file).unwrap()).is_err());
    assert_eq!(std::fs::read_to_string(&file).unwrap(), "text");
}

#[test]
fn a_listener_waits_no_longer_than_it_is_told_and_tells_its_port() {
    let listener = Listener::bind(&"tcp:127.0.0.1:0".parse().unwrap()).unwrap();
    assert!(matches!(listener.url().endpoint(), Endpoint::Tcp { port: 1.., .. }));
    let begun = Instant::now();
    assert!(listener.accept(Duration::from_millis(50), &PeerLimits::default()).unwrap().is_none());
    assert!(begun.elapsed() < SECOND);
}
