// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What `send` and `receive` say to each other, written down on the way and read by a decoder that is not ours.

use std::fs;
use std::path::Path;

use serde_json::Value;
use vfio_migration::snapshot::{CONFIG_FILE, MEMORY_FILE, STATE_FILE};

use crate::frames::{COMPLETE, COMPLETE_PAUSED, CONFIG, ERROR, OK, STATE};
use crate::relay::{Relay, Route};
use crate::stored::{Place, assert_same, assert_sound};
use crate::tool::{Ended, Tool};
use crate::wire::Exchange;

/// Sends `from` to a receiver at the other end of a relay; returns how both ended and what they said.
fn recorded(
    place: &Place,
    from: &Path,
    is_unix: bool,
    receiving: &[&str],
    sending: &[&str],
) -> ([Ended; 2], Exchange) {
    let (near, far) = (place.path("near"), place.path("far"));
    let url = if is_unix { format!("unix:{}", far.display()) } else { "tcp:127.0.0.1:0".into() };
    let (receiver, url) = Tool::receive(&url, &place.path("into"), receiving);
    let (route, url) = match url.strip_prefix("tcp:127.0.0.1:") {
        Some(port) => {
            let (route, port) = Route::tcp(port.parse().unwrap());
            (route, format!("tcp:127.0.0.1:{port}"))
        }
        None => (Route::unix(&near, &far), format!("unix:{}", near.display())),
    };
    let relay = Relay::start(route);
    let sent = Tool::send(&url, from, sending).end();
    let received = receiver.end();
    ([sent, received], Exchange::decode(&relay.end()))
}

/// Checks that what went over the wire is the snapshot `from`.
fn assert_is(exchange: &Exchange, from: &Path) {
    let config: Value = serde_json::from_slice(&exchange.main().sole(CONFIG).payload).unwrap();
    let stored: Value = serde_json::from_slice(&fs::read(from.join(CONFIG_FILE)).unwrap()).unwrap();
    assert_eq!(config["vm_config"], stored);
    assert_eq!(config["memory_manager_data"]["memory_ranges"]["data"], Value::Array(Vec::new()));
    let state: Value = serde_json::from_slice(&exchange.main().sole(STATE).payload).unwrap();
    let stored: Value = serde_json::from_slice(&fs::read(from.join(STATE_FILE)).unwrap()).unwrap();
    assert_eq!(state, stored);
    let memory = fs::read(from.join(MEMORY_FILE)).unwrap();
    let mut image = vec![0; memory.len()];
    exchange.replay(0, &mut image);
    assert!(image == memory, "the pages make up the memory");
}

#[test]
fn a_snapshot_goes_over_the_wire_as_the_protocol_is_described() {
    for (is_unix, sending, lanes, last) in [
        (true, &["--paused"][..], 0, COMPLETE_PAUSED),
        (false, &[], 0, COMPLETE),
        (false, &["--connections", "4"], 4, COMPLETE),
    ] {
        let place = Place::new();
        let from = place.stored("from", 8);
        let (ended, exchange) = recorded(&place, &from, is_unix, &[], sending);
        ended.into_iter().for_each(|ended| drop(ended.succeeded()));
        exchange.assert_whole(lanes, last);
        assert!(exchange.main().statuses().iter().all(|&status| status == OK));
        assert_is(&exchange, &from);
        assert_same(&from, &place.path("into"));
    }
}

#[test]
fn a_checkpoint_answers_the_last_message_with_an_error_and_nothing_follows() {
    let place = Place::new();
    let from = place.stored("from", 9);
    let ([sent, received], exchange) =
        recorded(&place, &from, false, &["--checkpoint"], &["--connections", "4"]);
    sent.failed(3, "Cannot hand VM over");
    received.succeeded();
    exchange.assert_whole(4, COMPLETE);
    let statuses = exchange.main().statuses();
    let (last, before) = statuses.split_last().unwrap();
    assert!(*last == ERROR && before.iter().all(|&status| status == OK), "{statuses:?}");
    assert_is(&exchange, &from);
    assert_sound(&place.path("into"));
}
