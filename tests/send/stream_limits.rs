// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The receiver's limits on device state: told right after Start, kept by the source, or the reason for which the VM is not stopped.

use std::io::{Read, Write};
use std::net::TcpListener;
use std::thread;
use std::time::Duration;

use vfio_migration::device::DeviceState;
use vfio_migration::transfer::frame::Features;
use vfio_migration::transfer::limits::{ConnectionCount, PeerLimits};
use vfio_migration::transfer::{PeerError, SendError, SendOptions, SendStep, Sender, SourceVm};

use crate::log_of;
use crate::streams::{MIB, Vmm, loaded, moves_within, pattern, source, takers};
use crate::vm::FakeVm;

fn options(options: SendOptions, connections: u64) -> SendOptions {
    let options = options.connections(ConnectionCount::new(connections).unwrap()).unwrap();
    options.downtime(Duration::from_secs(10))
}

#[test]
fn a_source_keeps_to_the_pieces_and_the_bytes_that_its_receiver_takes() {
    for (piece_bytes, queue_bytes) in [(4096, 64 << 20), (50_000, 3 * (4096 + 32)), (1 << 20, 200_000)] {
        for connections in [1, 4] {
            let mut vm = FakeVm::new(0);
            let states = [pattern(MIB, 1), pattern(MIB, 2), pattern(5, 3)];
            let machine = source(&vm, &states.each_ref().map(Vec::as_slice), |_, _| ());
            let (takers, devices) = takers(3);
            let limits = PeerLimits {
                device_piece_bytes: piece_bytes,
                device_queue_bytes: queue_bytes,
                ..PeerLimits::default()
            };
            let mut vmm = Vmm::new(devices);
            let (sent, received) =
                moves_within(limits, &mut vm, &machine, &mut vmm, |given| options(given, connections));
            sent.unwrap();
            let received = received.unwrap();
            assert_eq!(received.features, Some(Features::LIMITS | Features::DEVICE_STREAMS));
            assert_eq!(received.device_bytes, 2 * MIB as u64 + 5);
            for (taker, state) in takers.iter().zip(&states) {
                assert!(loaded(taker).as_ref() == Some(state));
                assert!(taker.look().largest_write as u64 <= piece_bytes.min(queue_bytes));
            }
        }
    }
}

#[test]
fn a_receiver_that_takes_no_piece_of_use_does_not_offer_streams() {
    let (least, default) = (4096 + 32, PeerLimits::default());
    let too_small = [
        PeerLimits { device_piece_bytes: 4095, ..default.clone() },
        PeerLimits { device_queue_bytes: 2 * least - 1, ..default.clone() },
    ];
    let enough = PeerLimits { device_piece_bytes: 4096, device_queue_bytes: 2 * least, ..default };
    for (limits, streams) in too_small.map(|limits| (limits, false)).into_iter().chain([(enough, true)]) {
        let mut vm = FakeVm::new(0);
        let states = [pattern(MIB, 1), pattern(5, 2)];
        let machine = source(&vm, &states.each_ref().map(Vec::as_slice), |_, _| ());
        let (takers, devices) = takers(2);
        let mut vmm = Vmm::new(devices);
        let (sent, received) = moves_within(limits, &mut vm, &machine, &mut vmm, |given| options(given, 1));
        sent.unwrap();
        assert_eq!(received.unwrap().features.unwrap().contains(Features::DEVICE_STREAMS), streams);
        assert!(takers.iter().zip(&states).all(|(taker, state)| loaded(taker).as_ref() == Some(state)));
    }
}

/// Sends a VM with a device of 1 MiB of state, which has to be refused while it runs.
fn refused(limits: PeerLimits, streams: bool) -> SendError {
    let mut vm = FakeVm::new(0);
    let machine = source(&vm, &[&pattern(MIB, 1)], |_, _| ());
    let (takers, devices) = takers(1);
    let mut vmm = Vmm::new(devices);
    vmm.streams = streams;
    let (sent, received) = moves_within(limits, &mut vm, &machine, &mut vmm, |given| options(given, 1));
    let error = sent.unwrap_err();
    assert!(received.is_err());
    assert_eq!(error.source_vm(), SourceVm::AsBefore);
    let log = log_of(&vm.log);
    assert!(!log.iter().any(|step| step == "pause" || step == "STOP_COPY"), "{log:?}");
    let taken = takers[0].look();
    assert_eq!((taken.state, taken.loaded.as_ref()), (Some(DeviceState::Running), None));
    error
}

#[test]
fn c48_the_receivers_own_limits_are_known_before_the_pause() {
    let text_bytes = (MIB as u64).div_ceil(3) * 4;
    let limits = PeerLimits { state_bytes: text_bytes - 1, ..PeerLimits::default() };
    let error = refused(limits, false);
    let words = format!("the limit is {} bytes (PeerLimits::state_bytes of the receiver)", text_bytes - 1);
    assert!(error.to_string().ends_with(&words), "{error}");

    let limits = PeerLimits { device_stream_bytes: MIB as u64 - 1, ..PeerLimits::default() };
    let error = refused(limits, true);
    let words = "\"dev0\" has 1048576 bytes or more, and the receiver takes 1048575 bytes";
    assert!(error.to_string().contains(words), "{error}");
}

#[test]
fn c48_state_beyond_what_state_may_hold_still_streams() {
    let limits = PeerLimits { state_bytes: 4096, device_stream_bytes: MIB as u64, ..PeerLimits::default() };
    let mut vm = FakeVm::new(0);
    let state = pattern(MIB, 1);
    let machine = source(&vm, &[&state], |_, _| ());
    let (takers, devices) = takers(1);
    let mut vmm = Vmm::new(devices);
    let (sent, received) = moves_within(limits, &mut vm, &machine, &mut vmm, |given| options(given, 1));
    sent.unwrap();
    received.unwrap();
    assert!(loaded(&takers[0]).as_ref() == Some(&state));
}

#[test]
fn an_answer_to_start_with_another_payload_than_limits_is_none() {
    for (features, bytes) in [(2, 31), (2, 33), (2, 0), (0, 32), (1, 32)] {
        let mut vm = FakeVm::new(0);
        let machine = source(&vm, &[b"a state"], |_, _| ());
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("tcp:{}", listener.local_addr().unwrap()).parse().unwrap();
        let error = thread::scope(|scope| {
            scope.spawn(|| {
                let (mut stream, _) = listener.accept().unwrap();
                let mut start = [0; 16];
                stream.read_exact(&mut start).unwrap();
                assert_eq!(start, [1, 0, 0, 0, b'v', b'M', 7, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
                let answer = [1, 0, b'v', b'M', features, 0, 0, 0, bytes, 0, 0, 0, 0, 0, 0, 0];
                stream.write_all(&[&answer[..], &[0; 33]].concat()).unwrap();
                let _closed = stream.read(&mut [0]);
            });
            Sender::new(SendOptions::new(url)).send(&mut vm, &machine.tracker, &machine.devices).unwrap_err()
        });
        let claimed = u64::from(bytes);
        let is_payload = matches!(
            &error,
            SendError::Peer { step: SendStep::Start, source: PeerError::Payload { bytes } } if *bytes == claimed
        );
        assert!(is_payload, "{features} {bytes}: {error:?}");
        assert!(log_of(&vm.log).is_empty());
    }
}
