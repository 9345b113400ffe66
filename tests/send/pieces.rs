// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Pieces of device state as a source sends them that is broken, or hostile, in bytes spelled out here.

use std::error::Error;
use std::io::{Read, Write};
use std::iter::successors;
use std::net::TcpStream;
use std::thread;

use vfio_migration::device::{Device, DeviceState};
use vfio_migration::transfer::connection::Listener;
use vfio_migration::transfer::limits::PeerLimits;
use vfio_migration::transfer::receive::{ReceiveError, Received, Receiver};

use crate::frames::{COMPLETE, CONFIG, DEVICE_STATE, DEVICES, FOR_MEMORY, STATE, message};
use crate::streams::{Taker, Vmm};

/// One piece, as it should be.
#[derive(Clone)]
struct Piece {
    device: u16,
    session: u32,
    index: u64,
    position: u64,
    version: u32,
    last: bool,
    data: &'static [u8],
}

/// Three pieces of four bytes and the end of them.
fn pieces() -> Vec<Piece> {
    let piece = |(index, data)| Piece {
        device: 0,
        session: 1,
        index,
        position: 4 * index,
        version: 3,
        last: index == 2,
        data,
    };
    [(0, b"abcd".as_slice()), (1, b"efgh"), (2, b"ijkl")].map(piece).to_vec()
}

fn payload(piece: &Piece) -> Vec<u8> {
    let mut head = Vec::new();
    head.extend(piece.device.to_le_bytes());
    head.extend(u16::from(piece.last).to_le_bytes());
    head.extend(piece.session.to_le_bytes());
    head.extend(piece.index.to_le_bytes());
    head.extend(piece.position.to_le_bytes());
    head.extend(piece.version.to_le_bytes());
    let checksum = crc32c::crc32c(&[&head, piece.data].concat());
    head.extend(checksum.to_le_bytes());
    [&head, piece.data].concat()
}

/// The two devices a destination has, as a list.
fn list() -> Vec<u8> {
    let device = |name: &[u8]| {
        let head = [3, 0, 0, 0, 4, 0, 4, 0, 0, 0, 0, 0];
        [&head, name, b"fake"].concat()
    };
    [&[1, 0, 2, 0, 0, 0, 0, 0][..], &device(b"dev0"), &device(b"dev1")].concat()
}

/// What a source says after Start and Devices, each answered but the last.
fn receive(
    offers: bool,
    said: Vec<Vec<u8>>,
    limits: PeerLimits,
) -> (Result<Received, ReceiveError>, [Taker; 2], Vec<u16>) {
    receive_over(0, offers, said, limits)
}

/// As [`receive`], with the pieces on so many additional connections in turn.
fn receive_over(
    additional: usize,
    offers: bool,
    said: Vec<Vec<u8>>,
    limits: PeerLimits,
) -> (Result<Received, ReceiveError>, [Taker; 2], Vec<u16>) {
    let takers = [Taker::new(), Taker::new()];
    let device = |index: usize| {
        let io = Box::new(takers[index].clone());
        Device::new(format!("dev{index}"), io).kind("fake").stream_version(3)
    };
    let mut vmm = Vmm::new(vec![device(1), device(0)]);
    let listener = Listener::bind(&"tcp:127.0.0.1:0".parse().unwrap()).unwrap();
    let address = listener.url().to_string().replace("tcp:", "");
    let (received, answers) = thread::scope(|scope| {
        let source = scope.spawn(move || {
            let mut main = TcpStream::connect(&address).unwrap();
            begin(&mut main, offers);
            speak(main, &address, additional, said)
        });
        let received = Receiver::new(limits, None).receive(&listener, &mut vmm);
        (received, source.join().unwrap())
    });
    (received, takers, answers)
}

/// Says Start and Devices.
fn begin(main: &mut TcpStream, offers: bool) {
    let magic = if offers { [0, 0, b'v', b'M', 3, 0] } else { [0; 6] };
    main.write_all(&[&[1, 0][..], &magic, &[0; 8]].concat()).unwrap();
    let mut answer = [0; 16];
    main.read_exact(&mut answer).unwrap();
    if offers {
        assert_eq!(answer, [1, 0, b'v', b'M', 3, 0, 0, 0, 32, 0, 0, 0, 0, 0, 0, 0]);
        let mut limits = [0; 32];
        main.read_exact(&mut limits).unwrap();
        main.write_all(&message(DEVICES, &list())).unwrap();
        main.read_exact(&mut answer).unwrap();
        let mut theirs = vec![0; usize::from(answer[8])];
        main.read_exact(&mut theirs).unwrap();
        assert_eq!(theirs.len(), list().len());
    }
}

/// Says the rest, until a message is not answered or refused; returns the answers.
fn speak(mut main: TcpStream, address: &str, additional: usize, said: Vec<Vec<u8>>) -> Vec<u16> {
    let (mut answers, mut others, mut pieces) = (Vec::new(), Vec::new(), 0);
    for message in said {
        let is_piece = message.starts_with(&DEVICE_STATE.to_le_bytes());
        if is_piece && additional > 0 && others.is_empty() {
            others.extend((0..additional).map(|_| {
                let mut other = TcpStream::connect(address).unwrap();
                other.write_all(&FOR_MEMORY).unwrap();
                other
            }));
        }
        pieces += usize::from(is_piece);
        let connection = match others.len() {
            0 => &mut main,
            count if is_piece => &mut others[pieces % count],
            _ => {
                others.clear();
                &mut main
            }
        };
        let mut answer = [0; 16];
        let _refused_before = connection.write_all(&message);
        if connection.read_exact(&mut answer).is_err() {
            break;
        }
        answers.push(u16::from(answer[0]));
        if answer[0] != 1 {
            break;
        }
    }
    answers
}

fn config() -> Vec<u8> {
    message(CONFIG, b"{}")
}

/// State and Complete of a VM whose devices' states went ahead.
fn end(bytes: u64) -> [Vec<u8>; 2] {
    let text = format!(r#"{{\"bytes\":{bytes}}}"#);
    let leaf = format!(r#"{{"snapshots":{{}},"snapshot_data":{{"state":"{text}"}}}}"#);
    let device = format!(r#"{{"snapshots":{{"vfio_migration_streamed":{leaf}}}}}"#);
    let tree =
        format!(r#"{{"snapshots":{{"devices":{{"snapshots":{{"dev0":{device},"dev1":{device}}}}}}}}}"#);
    [message(STATE, tree.as_bytes()), message(COMPLETE, b"")]
}

/// All of a VM, its second device's pieces as they should be and its first device's as `first` has them.
fn conversation(first: Vec<Vec<u8>>) -> Vec<Vec<u8>> {
    let of_second = |piece: Piece| message(DEVICE_STATE, &payload(&Piece { device: 1, ..piece }));
    let mut said = vec![config()];
    said.extend(pieces().into_iter().map(of_second));
    said.extend(first);
    said.extend(end(12));
    said
}

fn state_messages(pieces: impl IntoIterator<Item = Piece>) -> Vec<Vec<u8>> {
    pieces.into_iter().map(|piece| message(DEVICE_STATE, &payload(&piece))).collect()
}

fn text_of(error: &dyn Error) -> String {
    let causes = successors(Some(error), |&error| error.source());
    causes.map(ToString::to_string).collect::<Vec<_>>().join(": ")
}

/// Checks that pieces are refused with these words, and that no device keeps any of a state.
fn assert_refused(first: &[Vec<u8>], words: &str) {
    assert_refused_within(&PeerLimits::default(), first, words);
}

fn assert_refused_within(limits: &PeerLimits, first: &[Vec<u8>], words: &str) {
    for additional in [0, 2] {
        let said = conversation(first.to_vec());
        let (received, takers, answers) = receive_over(additional, true, said, limits.clone());
        let error = received.unwrap_err();
        assert!(text_of(&error).contains(words), "{words}, {additional} more: {}", text_of(&error));
        assert_eq!(answers.last(), Some(&2), "the source hears of it, {additional} more");
        for taker in takers {
            let taken = taker.look();
            assert_eq!((taken.state, taken.loaded.as_ref()), (Some(DeviceState::Running), None));
            assert_eq!(taken.resets, 1, "it was reset");
        }
    }
}

#[test]
fn c35_pieces_in_any_order_are_written_in_theirs() {
    for order in [[0, 1, 2], [0, 2, 1], [1, 0, 2], [1, 2, 0], [2, 0, 1], [2, 1, 0]] {
        let mixed = order.map(|index: usize| pieces()[index].clone());
        for additional in [0, 2] {
            let said = conversation(state_messages(mixed.clone()));
            let (received, takers, _) = receive_over(additional, true, said, PeerLimits::default());
            assert_eq!(received.unwrap().device_bytes, 24);
            for taker in takers {
                let taken = taker.look();
                assert_eq!(taken.loaded.as_deref(), Some(b"abcdefghijkl".as_slice()));
                assert_eq!((taken.state, taken.resets), (Some(DeviceState::Stop), 0));
            }
        }
    }
}

#[test]
fn pieces_dropped_doubled_too_far_ahead_or_after_the_end_are_refused() {
    let [a, b, c] = <[Piece; 3]>::try_from(pieces()).ok().unwrap();
    let refused = |pieces: &[&Piece], words| {
        assert_refused(&state_messages(pieces.iter().map(|&piece| piece.clone())), words);
    };
    refused(&[&a, &c], "Piece 1 of device \"dev0\" never came");
    refused(&[&a, &b], "Piece 2 of device \"dev0\" never came");
    refused(&[&a, &a], "Piece 0 of device \"dev0\" came twice");
    refused(&[&b, &b], "Piece 1 of device \"dev0\" came twice");
    refused(
        &[&Piece { index: 17, ..a.clone() }],
        "Piece 17 of device \"dev0\" came while piece 0 is missing",
    );
    refused(&[&Piece { index: u64::MAX, ..a.clone() }], "while piece 0 is missing");
    refused(&[&a, &b, &c, &Piece { index: 3, ..c.clone() }], "follows its last one");
    let early_end = Piece { last: true, ..a.clone() };
    refused(&[&b, &early_end], "Piece 1 of device \"dev0\" follows its last one");
}

#[test]
fn pieces_of_another_device_version_session_or_place_are_refused() {
    let [a, b, _] = <[Piece; 3]>::try_from(pieces()).ok().unwrap();
    let refused = |pieces: &[Piece], words| assert_refused(&state_messages(pieces.iter().cloned()), words);
    refused(&[Piece { device: 2, ..a.clone() }], "Piece is of device 2, and 2 devices listed");
    refused(&[Piece { device: 1, ..a.clone() }], "Piece 0 of device \"dev1\" came twice");
    refused(&[Piece { version: 4, ..a.clone() }], "has stream version 4 and should have 3");
    refused(&[Piece { session: 0, ..a.clone() }], "is of session 0");
    refused(&[a.clone(), Piece { position: 5, ..b.clone() }], "begins at byte 5, and 4 bytes came before it");
}

#[test]
fn pieces_cut_flipped_or_too_long_are_refused() {
    let whole = payload(&pieces()[0]);
    let refused = |payload: &[u8], words| assert_refused(&[message(DEVICE_STATE, payload)], words);
    refused(&whole[..31], "has 31 bytes, fewer than its head of 32");
    refused(&whole[..35], "has checksum");
    for at in [0, 5, 9, 17, 25, 29, 33] {
        let mut flipped = whole.clone();
        flipped[at] ^= 0x10;
        refused(&flipped, "and should have");
    }
    let limits = PeerLimits { device_piece_bytes: 4096, ..PeerLimits::default() };
    let text = "DeviceState announces 4129 bytes, more than the limit device_piece_bytes = 4128";
    let long = Piece { data: &[0; 4097], ..pieces()[0].clone() };
    let (received, ..) = receive(true, conversation(state_messages([long])), limits);
    assert!(text_of(&received.unwrap_err()).contains(text));
}

#[test]
fn pieces_that_wait_are_bounded_in_bytes() {
    let waiting =
        state_messages((1..10).map(|index| Piece { index, data: &[0; 4096], ..pieces()[0].clone() }));
    let limits = PeerLimits { device_queue_bytes: 4 * 4128, ..PeerLimits::default() };
    assert_refused_within(&limits, &waiting, "more than 16512 bytes (PeerLimits::device_queue_bytes)");
    let held = [waiting[..4].to_vec(), state_messages(pieces()[..1].to_vec())].concat();
    assert_refused_within(&limits, &held, "more than 16512 bytes (PeerLimits::device_queue_bytes)");
}

#[test]
fn a_stream_is_bounded_in_bytes_and_in_how_often_it_begins() {
    let limits = PeerLimits { device_stream_bytes: 12, ..PeerLimits::default() };
    let words = "Stream of device \"dev0\" is longer than 12 bytes (PeerLimits::device_stream_bytes)";
    let longer = Piece { index: 3, position: 12, ..pieces()[2].clone() };
    for order in [[0, 1, 2, 3], [3, 2, 1, 0]] {
        let mut pieces = [pieces(), vec![longer.clone()]].concat();
        pieces[2].last = false;
        let pieces = order.map(|index: usize| pieces[index].clone());
        assert_refused_within(&limits, &state_messages(pieces), words);
    }
    let begun = |times: u32| {
        let sessions = (1..=times).map(|session| Piece { session: session * 5, ..pieces()[0].clone() });
        let last = pieces().into_iter().map(|piece| Piece { session: 1000, ..piece });
        state_messages(sessions.chain(last))
    };
    let limits = PeerLimits { device_sessions: 4, device_stream_bytes: 12, ..PeerLimits::default() };
    let (received, ..) = receive(true, conversation(begun(3)), limits.clone());
    received.unwrap();
    let (received, takers, _) = receive(true, conversation(begun(4)), limits);
    let words =
        "Stream of device \"dev0\" begins anew, and it has begun 4 times (PeerLimits::device_sessions)";
    let text = text_of(&received.unwrap_err());
    assert!(text.ends_with(words), "{text}");
    assert!(takers.iter().all(|taker| taker.look().loaded.is_none()));
}

#[test]
fn another_session_begins_the_device_anew() {
    let [a, b, _] = <[Piece; 3]>::try_from(pieces()).ok().unwrap();
    // Pieces 0 and 2 of the first session, one of them in the queue.
    let mut first = vec![a, Piece { index: 2, position: 8, ..b }];
    first.extend(pieces().into_iter().rev().map(|piece| Piece { session: 3, ..piece }));
    let (received, takers, _) = receive(true, conversation(state_messages(first)), PeerLimits::default());
    received.unwrap();
    let taken = takers[0].look();
    assert_eq!((taken.loaded.as_deref(), taken.resets), (Some(b"abcdefghijkl".as_slice()), 1));
    let mut old = state_messages([Piece { session: 2, ..pieces()[0].clone() }]);
    old.extend(state_messages([pieces()[1].clone()]));
    assert_refused(&old, "is of session 1, and session 2 has begun");
}

#[test]
fn states_that_are_not_as_long_as_state_says_are_refused() {
    let mut said = conversation(state_messages(pieces()));
    said.truncate(said.len() - 2);
    said.extend(end(13));
    let (received, ..) = receive(true, said, PeerLimits::default());
    let text = text_of(&received.unwrap_err());
    assert!(text.contains("State of 13 bytes was to come ahead, and 12 came"), "{text}");
}

#[test]
fn a_source_that_goes_away_after_state_leaves_no_device_with_a_state() {
    let mut said = conversation(state_messages(pieces()));
    assert_eq!(said.pop(), Some(message(COMPLETE, b"")));
    let (received, takers, answers) = receive(true, said, PeerLimits::default());
    assert_eq!(answers.last(), Some(&1), "it took State");
    assert!(received.is_err());
    for taker in takers {
        let taken = taker.look();
        assert_eq!((taken.state, taken.loaded.as_ref()), (Some(DeviceState::Running), None));
        assert_eq!(taken.resets, 1, "it was reset");
    }
}

#[test]
fn a_plain_source_has_no_pieces() {
    let said = [vec![config()], state_messages(pieces())].concat();
    let (received, takers, answers) = receive(false, said, PeerLimits::default());
    assert_eq!(text_of(&received.unwrap_err()), "DeviceState came after Config");
    assert_eq!(answers, [1, 2]);
    assert!(takers[0].look().moves.is_empty(), "the device was not touched");
}

#[test]
fn a_device_that_refuses_its_state_ends_the_migration_and_all_are_reset() {
    let (received, takers, answers) = {
        let said = conversation(state_messages(pieces()));
        // The first device is the second to be written.
        crate::streams::refuse_beyond(5, || receive(true, said, PeerLimits::default()))
    };
    let text = text_of(&received.unwrap_err());
    assert!(text.contains("cannot take its state in"), "{text}");
    assert_eq!(answers.last(), Some(&2));
    assert!(takers.iter().all(|taker| taker.look().state == Some(DeviceState::Running)));
}
