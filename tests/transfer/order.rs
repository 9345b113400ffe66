// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The order of messages: what may come at which step, and what this receiver does not speak.

use std::io::Read;
use std::thread;
use std::time::Duration;

use vfio_migration::transfer::connection::{Connection, Listener};
use vfio_migration::transfer::frame::Features;
use vfio_migration::transfer::receive::{ReceiveError, Receiver, Step};

use crate::certificates::Files;
use crate::frames::{
    ABANDON, COMPLETE, COMPLETE_PAUSED, CONFIG, FOR_FAULTS, MEMORY, MEMORY_FD, PAGE_FAULT, START, STATE,
    memory, message, request,
};
use crate::peer::{Peer, Vmm, begun_on_two, quick, receive_on_pair, receive_on_tcp, text_of};

/// The messages that lead to a step, and its name.
fn steps() -> [(Vec<Vec<u8>>, Step); 4] {
    let messages = [message(START, &[]), message(CONFIG, b"{}"), message(STATE, b"{}")];
    let steps = [Step::Nothing, Step::Start, Step::Config, Step::State];
    [0, 1, 2, 3].map(|count| (messages[..count].to_vec(), steps[count]))
}

#[test]
fn every_command_out_of_order_is_refused_and_every_other_taken() {
    let payload = |command| match command {
        CONFIG | STATE => message(command, b"{}"),
        MEMORY => memory(&[(0, &[7; 16])]),
        MEMORY_FD => message(command, &[0; 4]),
        PAGE_FAULT => message(command, &[0; 16]),
        _ => message(command, &[]),
    };
    for (before, step) in steps() {
        for command in START..=PAGE_FAULT {
            let legal = match step {
                Step::Nothing => [START, ABANDON].contains(&command),
                Step::Start => [CONFIG, ABANDON].contains(&command),
                Step::Config => [MEMORY, STATE, ABANDON].contains(&command),
                Step::State => [COMPLETE, COMPLETE_PAUSED, ABANDON].contains(&command),
            };
            let (received, answer) = receive_on_pair(quick(), &mut Vmm::new(), |mut peer| {
                peer.say(&before);
                peer.ask(&payload(command))
            });
            assert_eq!(answer, Some(if legal { 1 } else { 2 }), "command {command} {step}");
            let in_order = match received {
                Err(ReceiveError::OutOfOrder { step: found, .. }) => {
                    assert_eq!(found, step);
                    false
                }
                Err(ReceiveError::LocalMemory | ReceiveError::Postcopy | ReceiveError::Start { .. }) => false,
                _ => true,
            };
            assert_eq!(in_order, legal, "command {command} {step}");
        }
    }
}

#[test]
fn memory_before_config_is_refused_by_name() {
    let (received, answer) = receive_on_pair(quick(), &mut Vmm::new(), |mut peer| {
        peer.say(&[message(START, &[])]);
        peer.ask(&memory(&[(0, &[1; 4096])]))
    });
    assert_eq!(answer, Some(2));
    assert_eq!(received.unwrap_err().to_string(), "Memory came after Start");
}

#[test]
fn abandon_is_taken_at_any_point() {
    for (before, step) in steps() {
        let mut vmm = Vmm::new();
        let (received, answer) = receive_on_pair(quick(), &mut vmm, |mut peer| {
            peer.say(&before);
            peer.ask(&message(ABANDON, &[]))
        });
        assert_eq!(answer, Some(1));
        let error = received.unwrap_err();
        assert!(matches!(error, ReceiveError::Abandoned { step: found } if found == step), "{error}");
        assert_eq!(vmm.calls.last().unwrap(), "abandoned");
    }
}

#[test]
fn an_end_between_messages_of_the_main_connection_is_named() {
    for (before, step) in steps() {
        let mut vmm = Vmm::new();
        let (received, ()) = receive_on_pair(quick(), &mut vmm, |mut peer| peer.say(&before));
        let error = received.unwrap_err();
        assert_eq!(error.to_string(), format!("Source closed the connection {step}"));
        assert_eq!(vmm.calls.last().unwrap(), "abandoned");
    }
}

#[test]
fn another_version_is_refused_by_its_number() {
    let (received, answer) = receive_on_pair(quick(), &mut Vmm::new(), |mut peer| {
        peer.ask(&[1, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0])
    });
    assert_eq!(answer, Some(2));
    let text = text_of(&received.unwrap_err());
    assert_eq!(
        text,
        "Cannot begin a migration with this source: Peer speaks protocol version 1, this side 0"
    );
}

#[test]
fn a_source_of_ours_learns_that_the_destination_is_too() {
    let (received, (answer, limits)) = receive_on_pair(quick(), &mut Vmm::new(), |mut peer| {
        peer.send(&[1, 0, 0, 0, b'v', b'M', 0xff, 0xff, 0, 0, 0, 0, 0, 0, 0, 0]);
        let (mut answer, mut limits) = ([0; 16], [0; 32]);
        peer.0.read_exact(&mut answer).unwrap();
        peer.0.read_exact(&mut limits).unwrap();
        peer.say(&[message(CONFIG, b"{}")]);
        peer.end();
        (answer, limits)
    });
    assert_eq!(answer, [1, 0, b'v', b'M', 2, 0, 0, 0, 32, 0, 0, 0, 0, 0, 0, 0]);
    assert_eq!(limits[..16], [[0, 0, 0, 0, 1, 0, 0, 0], [0, 0, 0, 0, 0, 16, 0, 0]].concat()[..]);
    assert_eq!(limits[16..], [[0, 0, 0, 4, 0, 0, 0, 0], [0, 0, 16, 0, 0, 0, 0, 0]].concat()[..]);
    assert_eq!(received.unwrap().features, Some(Features::LIMITS));
}

#[test]
fn a_source_of_ours_that_would_not_hear_of_limits_is_served_as_any_other() {
    let (received, answer) = receive_on_pair(quick(), &mut Vmm::new(), |mut peer| {
        peer.send(&[1, 0, 0, 0, b'v', b'M', 1, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
        let mut answer = [0; 16];
        peer.0.read_exact(&mut answer).unwrap();
        peer.say(&[message(CONFIG, b"{}")]);
        peer.end();
        answer
    });
    assert_eq!(answer, [1, 0, b'v', b'M', 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    assert_eq!(received.unwrap().features, Some(Features::NONE));
}

#[test]
fn local_memory_and_postcopy_are_refused_by_name() {
    let refusal = |message: Vec<u8>| {
        let (received, answer) = receive_on_pair(quick(), &mut Vmm::new(), |mut peer| {
            peer.say(&steps()[1].0);
            peer.ask(&message)
        });
        assert_eq!(answer, Some(2));
        received.unwrap_err().to_string()
    };
    assert!(refusal(message(MEMORY_FD, &[0; 4])).contains("local=on"));
    assert!(refusal(message(PAGE_FAULT, &[0; 16])).contains("postcopy"));

    let (received, answer) = receive_on_tcp(quick(), &mut Vmm::new(), |listener| {
        let mut main = Peer::to(listener);
        main.begin();
        let mut fault = Peer::to(listener);
        fault.send(&FOR_FAULTS);
        thread::sleep(Duration::from_millis(100));
        main.ask(&message(STATE, b"{}"))
    });
    assert_eq!(answer, Some(2));
    assert!(matches!(received, Err(ReceiveError::Postcopy)));
}

#[test]
fn postcopy_is_refused_when_it_shows_only_after_state() {
    let (received, answer) = receive_on_tcp(quick(), &mut Vmm::new(), |listener| {
        let mut main = Peer::to(listener);
        main.begin();
        main.say(&[message(STATE, b"{}")]);
        let mut fault = Peer::to(listener);
        fault.send(&FOR_FAULTS);
        main.answer()
    });
    assert_eq!(answer, None, "no request waits for an answer");
    assert!(matches!(received, Err(ReceiveError::Postcopy)));
}

#[test]
fn postcopy_over_tls_is_refused_at_once() {
    let (files, listener) = (Files::good(), Listener::bind(&"tcp:127.0.0.1:0".parse().unwrap()).unwrap());
    let received = thread::scope(|scope| {
        scope.spawn(|| {
            let connect = || {
                let client = files.client();
                Peer(Box::new(Connection::connect(listener.url(), Some(&client), &quick()).unwrap()))
            };
            let mut main = connect();
            main.begin();
            let mut fault = connect();
            fault.send(&FOR_FAULTS);
            assert_eq!(main.answer(), None, "no request waits for an answer");
        });
        Receiver::new(quick(), Some(files.server())).receive(&listener, &mut Vmm::new())
    });
    assert!(matches!(received, Err(ReceiveError::Postcopy)));
}

#[test]
fn memory_after_state_is_refused_on_every_connection() {
    let (received, answer) = receive_on_tcp(quick(), &mut Vmm::new(), |listener| {
        let (mut main, mut additional) = begun_on_two(listener);
        additional.ask(&memory(&[(0, &[1; 64])]));
        main.say(&[message(STATE, b"{}")]);
        let answer = additional.ask(&memory(&[(0, &[1; 64])]));
        (answer, main.answer())
    });
    assert_eq!(answer, (Some(2), None));
    assert_eq!(received.unwrap_err().to_string(), "Memory came after State");
}

#[test]
fn messages_without_a_payload_may_announce_none() {
    for (before, command) in [(0, START), (3, COMPLETE), (3, COMPLETE_PAUSED), (1, ABANDON)] {
        let mut vmm = Vmm::new();
        let (received, answer) = receive_on_pair(quick(), &mut vmm, |mut peer| {
            peer.say(&steps()[before].0);
            peer.ask(&request(command, 1 << 62))
        });
        assert_eq!(answer, Some(2));
        let text = received.unwrap_err().to_string();
        assert!(
            text.ends_with(" announces a payload of 4611686018427387904 bytes and may have none"),
            "{text}"
        );
        assert!(!vmm.calls.contains(&"complete".into()));
    }
}
