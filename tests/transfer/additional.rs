// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Additional connections: what State waits for, and the limits over all of them.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread;
use std::time::Duration;

use vfio_migration::transfer::limits::{ConnectionCount, PeerLimits};
use vfio_migration::transfer::receive::ReceiveError;

use crate::frames::{COMPLETE, CONFIG, MEMORY, STATE, memory, message, request};
use crate::peer::{Peer, REGION, Vmm, announce, begun_on_two, quick, receive_on_tcp, text_of};
use crate::stores::Difficult;

#[test]
fn state_waits_until_the_memory_of_every_connection_is_in_place() {
    let store = Difficult::new(Some(Duration::from_millis(300)));
    let seen = Arc::clone(&store);
    let mut vmm = Vmm { store: Some(store), ..Vmm::new() };
    let (received, ()) = receive_on_tcp(quick(), &mut vmm, |listener| {
        let (mut main, mut additional) = begun_on_two(listener);
        additional.send(&memory(&[(0, &[1; 4096])]));
        thread::sleep(Duration::from_millis(150));
        assert_eq!(main.ask(&message(STATE, b"{}")), Some(1));
        assert!(seen.done.load(Ordering::Acquire), "State was answered before the memory was in place");
        assert_eq!(additional.answer(), Some(1));
        main.say(&[message(COMPLETE, &[])]);
    });
    received.unwrap();
}

/// Answers to State and Complete that came while a Memory was under way which is cut off in mid-pages.
fn answers_past_a_cut() -> [Option<u16>; 2] {
    let store = Difficult::new(Some(Duration::ZERO));
    let seen = Arc::clone(&store);
    let mut vmm = Vmm { store: Some(store), ..Vmm::new() };
    let (received, answers) = receive_on_tcp(quick(), &mut vmm, |listener| {
        let (mut main, mut additional) = begun_on_two(listener);
        let whole = memory(&[(0, &[1; 8192])]);
        additional.send(&whole[..whole.len() - 8192 + 100]);
        while !seen.begun.load(Ordering::Acquire) {
            thread::sleep(Duration::from_millis(1));
        }
        main.send(&[message(STATE, b"{}"), message(COMPLETE, &[])].concat());
        thread::sleep(Duration::from_millis(30));
        drop(additional);
        [main.answer(), main.answer()]
    });
    let error = text_of(&received.unwrap_err());
    assert!(error.starts_with("Cannot read the pages of Memory: "), "{error}");
    assert_eq!(vmm.calls, ["config {}", "abandoned"]);
    answers
}

#[test]
fn memory_cut_off_on_an_additional_connection_is_never_taken_for_whole() {
    // What could go wrong is a matter of microseconds.
    thread::scope(|scope| {
        for _ in 0..5 {
            scope.spawn(|| (0..10).for_each(|_| assert_eq!(answers_past_a_cut(), [Some(2), None])));
        }
    });
}

#[test]
fn an_additional_connection_that_fails_ends_the_migration() {
    let outcome = |bytes: &[u8]| {
        let (received, answer) = receive_on_tcp(quick(), &mut Vmm::new(), |listener| {
            let (mut main, mut additional) = begun_on_two(listener);
            additional.send(bytes);
            drop(additional);
            main.answer()
        });
        assert_eq!(answer, None);
        text_of(&received.unwrap_err())
    };
    let whole = memory(&[(0, &[1; 4096])]);
    let cut = outcome(&whole[..whole.len() - 1]);
    assert!(cut.starts_with("Cannot read the pages of Memory: "), "{cut}");
    let cut = outcome(&whole[..20]);
    assert!(cut.starts_with("Cannot read the table of Memory: "), "{cut}");
    let cut = outcome(&[&whole[..], &whole[..3]].concat());
    assert!(cut.starts_with("Cannot read the head of a message: "), "{cut}");
    assert_eq!(outcome(&message(CONFIG, b"{}")), "Config came on a connection for Memory");
    let outside = outcome(&memory(&[(REGION, &[1; 16])]));
    assert!(
        outside.ends_with("Range 0x100000..0x100010 in entry 0 of the memory table is not in the VM's RAM")
    );
}

#[test]
fn the_tables_of_all_connections_are_held_to_the_limit_of_one() {
    let limits = PeerLimits { table_bytes: 6 << 10, ..quick() };
    let (received, ()) = receive_on_tcp(limits, &mut Vmm::new(), |listener| {
        let mut main = Peer::to(listener);
        main.begin();
        // One after the other they may be as long as they like, up to the limit.
        let ranges = vec![(0, &[7; 1][..]); 6 << 6];
        main.say(&[memory(&ranges), memory(&ranges)]);
        let mut additional: Vec<_> = (0..2).map(|_| Peer::to(listener)).collect();
        for connection in &mut additional {
            announce(connection);
            connection.send(&request(MEMORY, 4 << 10));
        }
        assert_eq!(main.answer(), None);
    });
    let error = received.unwrap_err();
    assert!(
        matches!(error, ReceiveError::Tables { length: 0x1000, taken: 0x1000, limit: 0x1800 }),
        "{error:?}"
    );
}

#[test]
fn the_connection_over_the_limit_is_refused() {
    let limits = PeerLimits { connections: ConnectionCount::new(2).unwrap(), ..quick() };
    refuses_one_more_than(2, limits);
    refuses_one_more_than(128, quick());
}

fn refuses_one_more_than(limit: usize, limits: PeerLimits) {
    let (received, answer) = receive_on_tcp(limits, &mut Vmm::new(), |listener| {
        let mut main = Peer::to(listener);
        main.begin();
        let mut additional: Vec<_> = (0..limit).map(|_| Peer::to(listener)).collect();
        for connection in &mut additional {
            announce(connection);
            assert_eq!(connection.ask(&memory(&[(0, &[1; 64])])), Some(1));
        }
        let mut another = Peer::to(listener);
        announce(&mut another);
        another.ask(&memory(&[(0, &[1; 64])]))
    });
    assert_eq!(answer, Some(2));
    let text = received.unwrap_err().to_string();
    assert_eq!(text, format!("Source opened more than {limit} additional connections"));
}
