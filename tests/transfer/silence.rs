// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Sources that fall silent, stall or trickle.

use std::io::Write;
use std::thread;
use std::time::{Duration, Instant};

use vfio_migration::transfer::limits::{Pace, PeerLimits};

use crate::frames::memory;
use crate::peer::{Vmm, begun_on_two, quick, receive_on_pair, receive_on_tcp, text_of};

const SECOND: Duration = Duration::from_secs(1);

#[test]
fn a_source_that_falls_silent_is_given_up() {
    let limits = PeerLimits { idle_timeout: Duration::from_millis(200), ..quick() };
    let begun = Instant::now();
    let (received, _peer) = receive_on_pair(limits, &mut Vmm::new(), |mut peer| {
        peer.begin();
        peer
    });
    assert!(begun.elapsed() < 2 * SECOND);
    let text = received.unwrap_err().to_string();
    assert!(text.starts_with("Source was silent for ") && text.ends_with(" s after Config"), "{text}");
}

#[test]
fn an_idle_main_connection_lives_by_the_others() {
    let limits = PeerLimits { idle_timeout: Duration::from_millis(400), ..quick() };
    let (received, ()) = receive_on_tcp(limits, &mut Vmm::new(), |listener| {
        let (mut main, mut additional) = begun_on_two(listener);
        for _ in 0..10 {
            thread::sleep(Duration::from_millis(100));
            assert_eq!(additional.ask(&memory(&[(0, &[1; 64])])), Some(1));
        }
        main.end();
    });
    assert_eq!(received.unwrap().memory_messages, 10);
}

#[test]
fn a_source_that_stalls_or_trickles_in_mid_message_is_given_up() {
    let limits = PeerLimits { pace: Pace { window: Duration::from_millis(200), bytes: 4096 }, ..quick() };
    for trickles in [false, true] {
        for cut in [3, 20, 40] {
            let begun = Instant::now();
            let (received, answer) = receive_on_pair(limits.clone(), &mut Vmm::new(), |mut peer| {
                peer.begin();
                let message = memory(&[(0, &[1; 4096])]);
                peer.send(&message[..cut]);
                for byte in message[cut..].iter().take(if trickles { 1000 } else { 0 }) {
                    if peer.0.write_all(&[*byte]).is_err() {
                        break;
                    }
                    thread::sleep(Duration::from_millis(10));
                }
                peer.answer()
            });
            assert!(begun.elapsed() < 3 * SECOND);
            assert_eq!(answer, Some(2));
            let text = text_of(&received.unwrap_err());
            assert!(text.contains("of Memory: Peer stalled: ") || cut == 3, "{text}");
            assert!(text.contains("Peer stalled: "), "{text}");
        }
    }
}

#[test]
fn an_additional_connection_that_stalls_is_given_up() {
    let limits = PeerLimits { pace: Pace { window: Duration::from_millis(200), bytes: 4096 }, ..quick() };
    let (received, (answer, _additional)) = receive_on_tcp(limits, &mut Vmm::new(), |listener| {
        let (_main, mut additional) = begun_on_two(listener);
        additional.send(&memory(&[(0, &[1; 4096])])[..100]);
        (additional.answer(), additional)
    });
    assert_eq!(answer, Some(2));
    assert!(text_of(&received.unwrap_err()).starts_with("Cannot read the pages of Memory: Peer stalled: "));
}
