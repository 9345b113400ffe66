// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Callers that are no source: port scanners, health checks, whoever has the wrong address.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use vfio_migration::transfer::connection::{Connection, Listener};
use vfio_migration::transfer::limits::{ConnectionCount, Pace, PeerLimits};
use vfio_migration::transfer::receive::{ReceiveError, Receiver};
use vfio_migration::transfer::url::Endpoint;

use crate::certificates::{Authority, Files};
use crate::frames::{ABANDON, CONFIG, FOR_FAULTS, FOR_MEMORY, START, STATE, memory, message, request};
use crate::peer::{Peer, Vmm, announce, begun_on_two, quick, receive_on_tcp};

const SECOND: Duration = Duration::from_secs(1);

/// Beginnings of what strangers say; the first one says nothing.
fn foreign() -> Vec<Vec<u8>> {
    vec![
        Vec::new(),
        vec![0],
        b"GET / HTTP/1.1\r\n\r\n".to_vec(),
        vec![0xff; 4096],
        // The beginning of a TLS handshake.
        vec![0x16, 3, 1, 2, 0, 1, 0, 1, 0xfc, 3, 3, 0, 0, 0, 0, 0],
        // A scanner's question for remote desktops, which looks like a State.
        b"\x03\0\0\x0b\x06\xe0\0\0\0\0\0\0\0\0\0\0".to_vec(),
    ]
}

fn address(listener: &Listener) -> (&str, u16) {
    match listener.url().endpoint() {
        Endpoint::Tcp { host, port } => (host, port),
        Endpoint::Unix(_) => unreachable!("strangers come over TCP"),
    }
}

/// Sends the greetings one after the other, each from one stranger that goes and one that stays; returns those that stay.
fn visit(listener: &Listener, greetings: &[Vec<u8>], strangers: usize) -> Vec<TcpStream> {
    let mut staying = Vec::new();
    for greeting in greetings.iter().cycle().take(strangers / 2) {
        for stays in [false, true] {
            let mut stranger = TcpStream::connect(address(listener)).unwrap();
            // It may have had to go already.
            let _ = stranger.write_all(greeting);
            staying.extend(stays.then_some(stranger));
        }
    }
    staying
}

/// Waits until the receiver has closed `stranger`; returns how long that took.
fn closed_after(stranger: &mut TcpStream) -> Duration {
    let begun = Instant::now();
    stranger.set_read_timeout(Some(20 * SECOND)).unwrap();
    while stranger.read(&mut [0; 64]).is_ok_and(|bytes| bytes > 0) {}
    begun.elapsed()
}

#[test]
fn two_hundred_strangers_end_no_wait_and_keep_no_source_out() {
    let begun = Instant::now();
    let (received, _strangers) = receive_on_tcp(quick(), &mut Vmm::new(), |listener| {
        // The last ones speak, out of turn, in the protocol's own words.
        let own = [request(CONFIG, 1 << 62), message(ABANDON, &[])];
        let strangers = visit(listener, &[foreign(), own.to_vec()].concat(), 200);
        let mut main = Peer::to(listener);
        main.begin();
        main.say(&[memory(&[(0, &[1; 64])])]);
        main.end();
        strangers
    });
    let received = received.unwrap();
    assert_eq!(received.memory_messages, 1);
    assert_eq!(received.received_bytes, 16 * 6 + 64 + 2 * 2, "strangers' bytes are not the source's");
    assert!(begun.elapsed() < 5 * SECOND, "{:?}", begun.elapsed());
}

#[test]
fn the_strangers_heard_longest_make_room() {
    let begun = Instant::now();
    let (received, ()) = receive_on_tcp(quick(), &mut Vmm::new(), |listener| {
        let connect = |_| TcpStream::connect(address(listener)).unwrap();
        let mut silent: Vec<_> = (0..300).map(connect).collect();
        let mut main = Peer::to(listener);
        main.begin();
        closed_after(&mut silent[0]);
        assert!(begun.elapsed() < 5 * SECOND, "silence alone is tolerated for longer: {:?}", begun.elapsed());
        silent[299].set_nonblocking(true).unwrap();
        let open = silent[299].read(&mut [0]).unwrap_err();
        assert_eq!(open.kind(), std::io::ErrorKind::WouldBlock, "the last ones may stay");
        main.end();
    });
    received.unwrap();
    assert!(begun.elapsed() < 8 * SECOND, "{:?}", begun.elapsed());
}

/// Lets strangers come without a pause until `work` is done.
fn among_strangers<T>(listener: &Listener, work: impl FnOnce() -> T) -> T {
    let over = AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(|| {
            let mut staying = Vec::new();
            while !over.load(Ordering::Relaxed) {
                staying.append(&mut visit(listener, &foreign(), 12));
                let old = staying.len().saturating_sub(400);
                staying.drain(..old);
            }
        });
        thread::sleep(SECOND / 2);
        let done = work();
        over.store(true, Ordering::Relaxed);
        done
    })
}

#[test]
fn a_source_gets_through_while_strangers_come_all_the_time() {
    let (received, ()) = receive_on_tcp(quick(), &mut Vmm::new(), |listener| {
        among_strangers(listener, || {
            let mut main = Peer::to(listener);
            main.begin();
            let mut additional: Vec<_> = (0..4).map(|_| Peer::to(listener)).collect();
            additional.iter_mut().for_each(announce);
            for _ in 0..100 {
                additional.iter_mut().for_each(|connection| connection.say(&[memory(&[(0, &[1; 4096])])]));
            }
            drop(additional);
            main.end();
        });
    });
    assert_eq!(received.unwrap().memory_messages, 400);
}

#[test]
fn a_source_with_tls_gets_through_while_strangers_come_all_the_time() {
    let files = Files::good();
    let listener = Listener::bind(&"tcp:127.0.0.1:0".parse().unwrap()).unwrap();
    let received = thread::scope(|scope| {
        scope.spawn(|| {
            among_strangers(&listener, || {
                let client = files.client();
                let connection = Connection::connect(listener.url(), Some(&client), &quick()).unwrap();
                let mut main = Peer(Box::new(connection));
                main.begin();
                main.end();
            });
        });
        Receiver::new(quick(), Some(files.server())).receive(&listener, &mut Vmm::new())
    });
    received.unwrap();
}

#[test]
fn a_caller_has_its_time_and_no_more_however_slowly_it_speaks() {
    let limits = PeerLimits { handshake_timeout: SECOND / 2, ..quick() };
    let (received, ()) = receive_on_tcp(limits, &mut Vmm::new(), |listener| {
        let begun = Instant::now();
        let mut stranger = TcpStream::connect(address(listener)).unwrap();
        for byte in message(START, &[]) {
            thread::sleep(Duration::from_millis(100));
            // The connection may be closed by now.
            let _ = stranger.write_all(&[byte]);
        }
        closed_after(&mut stranger);
        assert!(begun.elapsed() < 20 * SECOND, "{:?}", begun.elapsed());
        let mut main = Peer::to(listener);
        main.begin();
        main.end();
    });
    received.unwrap();
}

#[test]
fn what_strangers_say_does_not_keep_a_silent_source() {
    let limits = PeerLimits { idle_timeout: SECOND / 2, ..quick() };
    let (received, ()) = receive_on_tcp(limits, &mut Vmm::new(), |listener| {
        let mut main = Peer::to(listener);
        main.begin();
        among_strangers(listener, || assert_eq!(main.answer(), None));
    });
    assert!(matches!(received, Err(ReceiveError::Idle { .. })), "{received:?}");
}

#[test]
fn another_source_that_comes_in_the_middle_of_a_migration_does_it_no_harm() {
    let limits = PeerLimits { pace: Pace { window: SECOND / 2, bytes: 4096 }, ..quick() };
    let (received, ()) = receive_on_tcp(limits, &mut Vmm::new(), |listener| {
        let mut main = Peer::to(listener);
        main.begin();
        // Its Start looks like the role of an additional connection, and something else that never comes.
        assert_eq!(Peer::to(listener).ask(&message(START, b"")), Some(2));
        main.say(&[memory(&[(0, &[1; 64])])]);
        main.end();
    });
    received.unwrap();
}

#[test]
fn strangers_that_sound_like_connections_take_none_of_the_sources() {
    let limits = PeerLimits {
        connections: ConnectionCount::new(2).unwrap(),
        pace: Pace { window: SECOND / 2, bytes: 4096 },
        ..quick()
    };
    let (received, _strangers) = receive_on_tcp(limits, &mut Vmm::new(), |listener| {
        let mut main = Peer::to(listener);
        main.begin();
        let sound = [FOR_MEMORY.to_vec(), message(START, b""), vec![1, 0, 0, 0, 9]];
        let mut strangers = visit(listener, &sound, 20);
        // Only their speaking at once shows that they are none of the source's.
        strangers.iter_mut().for_each(|stranger| stranger.write_all(&[0xff; 64]).unwrap_or_default());
        let mut additional: Vec<_> = (0..2).map(|_| Peer::to(listener)).collect();
        for connection in &mut additional {
            announce(connection);
            connection.say(&[memory(&[(0, &[1; 64])])]);
        }
        main.end();
        strangers
    });
    let received = received.unwrap();
    assert_eq!(received.connections, 2);
    assert_eq!(
        received.received_bytes,
        16 * 4 + 4 + 2 * (2 + 32 + 64),
        "strangers' bytes are not the source's"
    );
}

#[test]
fn a_connection_that_waits_for_its_memory_makes_room_for_no_stranger() {
    let (received, _strangers) = receive_on_tcp(quick(), &mut Vmm::new(), |listener| {
        let (mut main, mut additional) = begun_on_two(listener);
        let announced = |_| {
            let mut stranger = TcpStream::connect(address(listener)).unwrap();
            // It may have had to go already.
            let _ = stranger.write_all(&FOR_MEMORY);
            stranger.set_nonblocking(true).unwrap();
            stranger
        };
        let strangers: Vec<_> = (0..300).map(announced).collect();
        // Some have to go, and hear of it.
        while strangers.iter().filter(|stranger| stranger.peek(&mut [0]).is_ok()).count() < 40 {
            thread::sleep(Duration::from_millis(10));
        }
        additional.say(&[memory(&[(0, &[1; 64])])]);
        main.end();
        strangers
    });
    assert_eq!(received.unwrap().connections, 1);
}

#[test]
fn strangers_that_sound_like_postcopy_end_no_migration() {
    let (received, _stranger) = receive_on_tcp(quick(), &mut Vmm::new(), |listener| {
        let mut main = Peer::to(listener);
        main.begin();
        let strangers = visit(listener, &[FOR_FAULTS.to_vec(), message(CONFIG, b"{}")], 20);
        thread::sleep(SECOND / 10);
        main.say(&[memory(&[(0, &[1; 64])])]);
        main.end();
        strangers
    });
    assert_eq!(received.unwrap().memory_messages, 1);
}

#[test]
fn a_wait_has_an_end_and_tells_how_many_strangers_came() {
    let limits = PeerLimits { source_wait: SECOND, ..quick() };
    let (received, _staying) = receive_on_tcp(limits, &mut Vmm::new(), |listener| {
        (0..3).for_each(|_| drop(TcpStream::connect(address(listener)).unwrap()));
    });
    let text = received.unwrap_err().to_string();
    assert_eq!(text, "No source began a migration in 1 s; 3 callers were rejected");
}

#[test]
fn who_does_not_say_start_is_refused_and_the_wait_goes_on() {
    let mut vmm = Vmm::new();
    let (received, ()) = receive_on_tcp(quick(), &mut vmm, |listener| {
        for command in [CONFIG, STATE, ABANDON] {
            assert_eq!(Peer::to(listener).ask(&message(command, b"")), Some(2));
        }
        let mut main = Peer::to(listener);
        main.begin();
        main.end();
    });
    received.unwrap();
    assert_eq!(vmm.calls.len(), 3);
}

#[test]
fn strangers_do_not_keep_the_source_out() {
    let mut vmm = Vmm::new();
    let (received, _strangers) = receive_on_tcp(quick(), &mut vmm, |listener| {
        let silent: Vec<_> = (0..10).map(|_| Peer::to(listener)).collect();
        let mut garbage = Peer::to(listener);
        garbage.send(b"GET / HTTP/1.1\r\n\r\n");
        drop(Peer::to(listener));
        let mut cut = Peer::to(listener);
        cut.send(&[1, 0, 0]);
        drop(cut);
        thread::sleep(Duration::from_millis(100));

        let mut main = Peer::to(listener);
        main.begin();
        // Others do no harm to the migration either.
        let mut late = Peer::to(listener);
        late.send(&[9, 9]);
        drop(Peer::to(listener));
        main.say(&[memory(&[(0, &[1; 64])])]);
        main.end();
        (silent, garbage, late)
    });
    assert_eq!(received.unwrap().memory_messages, 1);
    assert_eq!(vmm.calls.len(), 3);
}

#[test]
fn a_second_source_is_told_that_there_is_one() {
    let (received, answer) = receive_on_tcp(quick(), &mut Vmm::new(), |listener| {
        let mut second = Peer::to(listener);
        let mut main = Peer::to(listener);
        main.say(&[message(START, &[])]);
        let answer = second.ask(&message(START, &[]));
        main.say(&[message(CONFIG, b"{}")]);
        main.end();
        answer
    });
    assert_eq!(answer, Some(2));
    received.unwrap();
}

#[test]
fn a_source_with_a_foreign_certificate_is_rejected_and_a_good_one_taken() {
    let (files, foreign) = (Files::good(), Files::of(&Authority::new("foreign")));
    std::fs::copy(files.path().join("ca-cert.pem"), foreign.path().join("ca-cert.pem")).unwrap();
    let listener = Listener::bind(&"tcp:127.0.0.1:0".parse().unwrap()).unwrap();
    let received = thread::scope(|scope| {
        scope.spawn(|| {
            let connect =
                |files: &Files| Connection::connect(listener.url(), Some(&files.client()), &quick()).unwrap();
            let mut stranger = connect(&foreign);
            let error = stranger.read_exact(&mut [0]).unwrap_err();
            assert!(error.to_string().starts_with("Peer refuses this side's certificate"), "{error}");

            let mut plain = Peer::to(&listener);
            plain.send(&message(START, &[]));

            let mut main = Peer(Box::new(connect(&files)));
            main.begin();
            main.end();
        });
        Receiver::new(quick(), Some(files.server())).receive(&listener, &mut Vmm::new())
    });
    received.unwrap();
}
