// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A VM that comes over, by every way, from sources that keep to the protocol; and a destination that does not take it.

use std::thread;

use vfio_migration::transfer::connection::{Connection, Listener};
use vfio_migration::transfer::receive::{Received, Receiver};
use vfio_migration::transfer::tls::ServerTls;

use crate::certificates::Files;
use crate::frames::{COMPLETE, COMPLETE_PAUSED, CONFIG, START, STATE, memory, message};
use crate::peer::{
    HIGH, Peer, REGION, Vmm, announce, begun_on_two, quick, receive_on_pair, receive_on_tcp, text_of,
};
use crate::skip::skip;

/// A page that looks like no other.
fn page(seed: u64) -> Vec<u8> {
    (0..4096_u64).map(|at| (at * 31 + seed * 7 + (at >> 8)).to_le_bytes()[0]).collect()
}

fn check_migrated(vmm: &Vmm, received: &Received, connections: usize) {
    for index in 0..REGION / 4096 {
        let expected = if index == 5 { page(9999) } else { page(index) };
        assert!(vmm.bytes(index * 4096, 4096) == expected, "low page {index}");
        assert!(vmm.bytes(HIGH + index * 4096, 4096) == page(index + REGION / 4096), "high page {index}");
    }
    assert_eq!(vmm.calls, ["config {}", "state {}", "complete"]);
    assert_eq!(received.memory_messages, 2 * REGION / 4096 + 1);
    assert_eq!(received.memory_ranges, received.memory_messages);
    assert_eq!(received.memory_bytes, 2 * REGION + 4096);
    assert_eq!(received.connections, connections);
    assert_eq!(received.features, None);
    assert!(received.confirmed && !received.paused);
}

fn migrates_over(url: &str, connections: usize) {
    let listener = Listener::bind(&url.parse().unwrap()).unwrap();
    let mut vmm = Vmm::new();
    let received = thread::scope(|scope| {
        scope.spawn(|| {
            let mut main = Peer::to(&listener);
            main.begin();
            let mut additional: Vec<_> = (0..connections).map(|_| Peer::to(&listener)).collect();
            additional.iter_mut().for_each(announce);
            migrate_memory(&mut main, additional);
        });
        Receiver::new(quick(), None).receive(&listener, &mut vmm).unwrap()
    });
    check_migrated(&vmm, &received, connections);
    let heads = 16 * (4 + received.memory_messages) + 4;
    let exact = heads + 16 * received.memory_ranges + received.memory_bytes + 2 * connections as u64;
    assert_eq!(received.received_bytes, exact);
}

/// Sends all of RAM over `additional`, where there is one, then a last page over `main`, and completes.
fn migrate_memory(main: &mut Peer, mut additional: Vec<Peer>) {
    for index in 0..2 * REGION / 4096 {
        let gpa = if index < REGION / 4096 { index * 4096 } else { HIGH + (index * 4096 - REGION) };
        let message = memory(&[(gpa, &page(index))]);
        let slot = usize::try_from(index).unwrap() % additional.len().max(1);
        assert_eq!(additional.get_mut(slot).unwrap_or(main).ask(&message), Some(1));
    }
    drop(additional);
    main.say(&[memory(&[(0x5000, &page(9999))])]);
    main.end();
}

#[test]
fn a_vm_comes_over_a_unix_socket() {
    let directory = tempfile::tempdir().unwrap();
    migrates_over(&format!("unix:{}", directory.path().join("vm.sock").display()), 0);
}

#[test]
fn a_vm_comes_over_tcp() {
    migrates_over("tcp:127.0.0.1:0", 0);
}

#[test]
fn a_vm_comes_over_ipv6() {
    if std::net::TcpListener::bind("[::1]:0").is_err() {
        return skip("this host has no IPv6 loopback");
    }
    migrates_over("tcp:[::1]:0", 1);
}

#[test]
fn a_vm_comes_over_several_connections() {
    migrates_over("tcp:127.0.0.1:0", 4);
    migrates_over("tcp:127.0.0.1:0", 128);
}

#[test]
fn a_vm_comes_over_tls() {
    let (files, listener) = (Files::good(), Listener::bind(&"tcp:127.0.0.1:0".parse().unwrap()).unwrap());
    let mut vmm = Vmm::new();
    let received = thread::scope(|scope| {
        scope.spawn(|| {
            let connect = || {
                let client = files.client();
                Peer(Box::new(Connection::connect(listener.url(), Some(&client), &quick()).unwrap()))
            };
            let mut main = connect();
            main.begin();
            let mut additional: Vec<_> = (0..4).map(|_| connect()).collect();
            additional.iter_mut().for_each(announce);
            migrate_memory(&mut main, additional);
        });
        Receiver::new(quick(), Some(files.server())).receive(&listener, &mut vmm).unwrap()
    });
    check_migrated(&vmm, &received, 4);
    assert!(received.received_bytes > received.memory_bytes);
}

#[test]
fn later_bytes_win_where_ranges_overlap_and_repeat() {
    let mut vmm = Vmm::new();
    let (received, ()) = receive_on_pair(quick(), &mut vmm, |mut peer| {
        peer.begin();
        peer.say(&[
            memory(&[
                (0x2000, &[1; 0x2000]),
                (0x1000, &[2; 0x1800]),
                (0x2000, &[3; 0x400]),
                (0x2000, &[4; 1]),
            ]),
            memory(&[(0x1000, &[5; 0x10])]),
        ]);
        peer.end();
    });
    assert_eq!(received.unwrap().memory_ranges, 5);
    assert_eq!(vmm.bytes(0x1000, 0x10), [5; 0x10]);
    assert_eq!(vmm.bytes(0x1010, 0xff0), [2; 0xff0]);
    assert_eq!(vmm.bytes(0x2000, 1), [4]);
    assert_eq!(vmm.bytes(0x2001, 0x3ff), [3; 0x3ff]);
    assert_eq!(vmm.bytes(0x2400, 0x400), [2; 0x400]);
    assert_eq!(vmm.bytes(0x2800, 0x1800), [1; 0x1800]);
}

#[test]
fn requests_in_flight_are_answered_in_order() {
    let mut vmm = Vmm::new();
    let (received, ()) = receive_on_tcp(quick(), &mut vmm, |listener| {
        let (mut main, mut additional) = begun_on_two(listener);
        for seed in 0..50 {
            additional.send(&memory(&[(0x3000, &page(seed))]));
        }
        for _ in 0..50 {
            assert_eq!(additional.answer(), Some(1));
        }
        main.end();
    });
    assert_eq!(received.unwrap().memory_messages, 50);
    assert!(vmm.bytes(0x3000, 4096) == page(49), "the last one wins");
}

#[test]
fn everything_in_flight_at_once_is_taken() {
    let mut vmm = Vmm::new();
    let (received, ()) = receive_on_pair(quick(), &mut vmm, |mut peer| {
        let messages =
            [message(START, &[]), message(CONFIG, b"{}"), memory(&[(0, &page(3))]), message(STATE, b"{}")];
        peer.send(&[messages.concat(), message(COMPLETE_PAUSED, &[])].concat());
        assert_eq!((0..5).map(|_| peer.answer()).collect::<Vec<_>>(), [Some(1); 5]);
    });
    assert!(received.unwrap().paused);
    assert_eq!(vmm.calls, ["config {}", "state {}", "complete paused"]);
}

#[test]
fn what_the_destination_does_not_take_is_answered_with_error() {
    for (call, command) in [("config", CONFIG), ("state", STATE), ("complete", COMPLETE)] {
        let mut vmm = Vmm::failing_at(call);
        let (received, answers) = receive_on_pair(quick(), &mut vmm, |mut peer| {
            let messages = [
                message(START, &[]),
                message(CONFIG, b"{}"),
                memory(&[(0, &[1; 64])]),
                message(STATE, b"{}"),
                message(COMPLETE, &[]),
            ];
            messages.iter().map(|message| peer.ask(message)).take_while(|&answer| answer == Some(1)).count()
        });
        let taken = [0, 0, 1, 3, 0, 4][usize::from(command)];
        assert_eq!(answers, taken, "{call}");
        let text = text_of(&received.unwrap_err());
        assert!(text.starts_with("Destination cannot take "), "{text}");
        assert!(text.ends_with(&format!(": no {call} today")), "{text}");
        // A checkpoint fails its completion on purpose and keeps everything.
        assert_eq!(vmm.calls.last().unwrap() == "abandoned", call != "complete");
    }
}

#[test]
fn tls_over_a_unix_socket_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    let url = format!("unix:{}", directory.path().join("vm.sock").display());
    let listener = Listener::bind(&url.parse().unwrap()).unwrap();
    let tls = ServerTls::from_directory(Files::good().path()).unwrap();
    let error = Receiver::new(quick(), Some(tls)).receive(&listener, &mut Vmm::new()).unwrap_err();
    assert!(text_of(&error).contains("TLS goes over TCP, not over unix:"));
}

#[test]
fn a_receiver_can_receive_again() {
    let receiver = Receiver::new(quick(), None);
    let listener = Listener::bind(&"tcp:127.0.0.1:0".parse().unwrap()).unwrap();
    for _ in 0..2 {
        let received = thread::scope(|scope| {
            scope.spawn(|| {
                let mut main = Peer::to(&listener);
                main.begin();
                main.end();
            });
            receiver.receive(&listener, &mut Vmm::new()).unwrap()
        });
        assert_eq!(received.received_bytes, 16 * 4 + 4);
    }
}
