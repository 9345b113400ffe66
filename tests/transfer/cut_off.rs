// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A short migration that is cut off, or altered, at every byte.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use proptest::prelude::*;
use vfio_migration::transfer::connection::Connection;
use vfio_migration::transfer::limits::{Pace, PeerLimits};
use vfio_migration::transfer::receive::{ReceiveError, Received, Receiver};

use crate::frames::{COMPLETE, CONFIG, START, STATE, memory, message};
use crate::peer::{HIGH, Vmm};

fn exchange() -> Vec<u8> {
    [
        message(START, &[]),
        message(CONFIG, b"{}"),
        memory(&[(0x1000, &[1; 24]), (HIGH, &[2; 8])]),
        memory(&[(0x1004, &[3; 4])]),
        message(STATE, b"{\"a\":1}"),
        message(COMPLETE, &[]),
    ]
    .concat()
}

/// Receives from a source that sends `bytes` and no more; returns also the answers it got.
fn receive(bytes: &[u8], vmm: &mut Vmm) -> (Result<Received, ReceiveError>, Vec<u8>) {
    let limits = PeerLimits {
        pace: Pace { window: Duration::from_millis(100), bytes: 64 },
        idle_timeout: Duration::from_millis(100),
        linger: Duration::from_millis(20),
        ..PeerLimits::default()
    };
    let (near, mut far) = UnixStream::pair().unwrap();
    let connection = Connection::from_unix(near, &limits).unwrap();
    far.write_all(bytes).unwrap();
    far.shutdown(Shutdown::Write).unwrap();
    let received = Receiver::new(limits, None).receive_from(connection, vmm);
    let mut answers = Vec::new();
    // What was left unread makes an error of the end, after the answers.
    let _ = far.read_to_end(&mut answers);
    let (answers, rest) = answers.as_chunks::<16>();
    assert!(rest.is_empty(), "an answer is cut off");
    (received, answers.iter().map(|answer| answer[0]).collect())
}

#[test]
fn every_truncation_of_a_short_migration_is_an_error() {
    let whole = exchange();
    for cut in 0..whole.len() {
        let (begun, mut vmm) = (Instant::now(), Vmm::new());
        let (received, answers) = receive(&whole[..cut], &mut vmm);
        let error = received.unwrap_err();
        assert!(
            matches!(error, ReceiveError::Read { .. } | ReceiveError::Closed { .. }),
            "cut at {cut}: {error}"
        );
        assert!(begun.elapsed() < Duration::from_secs(1), "cut at {cut}");
        assert_eq!(vmm.calls.last().unwrap(), "abandoned", "cut at {cut}");
        assert!(!vmm.calls.contains(&"complete".into()), "cut at {cut}");
        let oks = answers.iter().take_while(|&&status| status == 1).count();
        assert!(answers[oks..].is_empty() || answers[oks..] == [2], "cut at {cut}: {answers:?}");
        let cut_in_message = matches!(error, ReceiveError::Read { .. });
        assert_eq!(answers.len() > oks, cut_in_message, "cut at {cut}: {answers:?}");
    }
    let mut vmm = Vmm::new();
    let (received, answers) = receive(&whole, &mut vmm);
    assert_eq!(received.unwrap().memory_bytes, 36);
    assert_eq!(answers, [1; 6]);
    assert_eq!(vmm.bytes(0x1000, 24), [[1; 4], [3; 4], [1; 4], [1; 4], [1; 4], [1; 4]].concat());
}

#[test]
fn a_source_that_stays_after_half_a_message_is_given_up() {
    let whole = exchange();
    // One cut in each part of each message: the same wait is behind every other.
    for cut in [5, 20, 33, 45, 60, 80, 90, 140, whole.len() - 8] {
        let limits = PeerLimits {
            pace: Pace { window: Duration::from_millis(100), bytes: 4096 },
            linger: Duration::from_millis(20),
            idle_timeout: Duration::from_millis(200),
            ..PeerLimits::default()
        };
        let (near, mut far) = UnixStream::pair().unwrap();
        let connection = Connection::from_unix(near, &limits).unwrap();
        far.write_all(&whole[..cut]).unwrap();
        let begun = Instant::now();
        Receiver::new(limits, None).receive_from(connection, &mut Vmm::new()).unwrap_err();
        assert!(begun.elapsed() < Duration::from_secs(1), "cut at {cut}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn no_altered_migration_panics_or_hangs(changes in prop::collection::vec((0..1000usize, any::<u8>()), 1..4)) {
        let mut bytes = exchange();
        for (at, byte) in changes {
            let at = at % bytes.len();
            bytes[at] = byte;
        }
        let begun = Instant::now();
        let mut vmm = Vmm::new();
        let (received, answers) = receive(&bytes, &mut vmm);
        prop_assert!(begun.elapsed() < Duration::from_secs(2));
        prop_assert_eq!(received.is_ok(), vmm.calls.iter().any(|call| call.starts_with("complete")));
        prop_assert!(answers.len() <= 6);
    }
}
