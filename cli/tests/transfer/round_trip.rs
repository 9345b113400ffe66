// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What is sent is what is received.

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use serde_json::Value;
use vfio_migration::snapshot::{CONFIG_FILE, MANIFEST_FILE};

use crate::certificates::Files;
use crate::stored::{Place, assert_same};
use crate::tool::{Tool, is_empty};

/// How many MiB of the large VM to populate, where this variable says so.
const POPULATED: &str = "VFIO_MIGRATE_TEST_POPULATED_MIB";

/// MiB populated otherwise.
const FEW: u64 = 64;

/// Sends `from` to a receiver on `url` and checks what arrives; returns the last word of the source.
#[track_caller]
fn round_trip(url: &str, from: &Path, place: &Place, receiving: &[&str], sending: &[&str]) -> Value {
    let into = place.path("copy");
    let (receiver, url) = Tool::receive(url, &into, receiving);
    let sent = Tool::send(&url, from, sending).end().succeeded();
    let kept = receiver.end().succeeded();
    assert_same(from, &into);

    let (sent, kept) = (sent.last(), kept.last());
    assert_eq!(sent["event"], "sent");
    assert!(sent["sent_bytes"].as_u64().unwrap() > 0);
    assert_eq!(kept["event"], "kept");
    assert_eq!(kept["confirmed"], true);
    assert_eq!(kept["into"], into.to_str().unwrap());
    assert_eq!(kept["digest"].as_str().unwrap().len(), 64);
    sent
}

#[test]
fn over_a_unix_socket() {
    let place = Place::new();
    let url = format!("unix:{}", place.path("socket").display());
    round_trip(&url, &place.stored("from", 1), &place, &[], &[]);
    assert!(!place.path("socket").exists());
}

#[test]
fn over_tcp_with_one_four_and_sixteen_connections() {
    for connections in ["1", "4", "16"] {
        let place = Place::new();
        let from = place.stored("from", 2);
        round_trip("tcp:127.0.0.1:0", &from, &place, &[], &["--connections", connections]);
    }
}

#[test]
fn over_tls_with_four_connections() {
    let files = Files::good();
    let place = Place::new();
    let tls = ["--tls-dir", files.path().to_str().unwrap()];
    let sending = [&tls[..], &["--connections", "4"]].concat();
    round_trip("tcp:localhost:0", &place.stored("from", 3), &place, &tls, &sending);
}

#[test]
fn four_gib_in_two_regions_over_every_transport() {
    let populated = std::env::var(POPULATED).map_or(FEW, |text| text.parse().unwrap());
    let files = Files::good();
    let tls = ["--tls-dir", files.path().to_str().unwrap()];
    let large = Place::new();
    let from = large.stored_large("from", 4096 / populated);
    let tcp = "tcp:127.0.0.1:0";
    let unix = format!("unix:{}", large.path("socket").display());
    for (url, receiving, connections) in
        [(unix.as_str(), &[][..], "1"), (tcp, &[], "1"), (tcp, &[], "4"), (tcp, &[], "16"), (tcp, &tls, "4")]
    {
        let place = Place::new();
        let begun = Instant::now();
        let sending = [receiving, &["--connections", connections]].concat();
        let sent = round_trip(url, &from, &place, receiving, &sending);
        let (bytes, ms, all) = (&sent["sent_bytes"], &sent["total_ms"], begun.elapsed());
        eprintln!("{url} x{connections} {receiving:?}: {bytes} bytes in {ms} ms; compared after {all:?}");
    }
}

#[test]
fn paused_and_within_a_bandwidth() {
    let place = Place::new();
    let url = format!("unix:{}", place.path("socket").display());
    let begun = Instant::now();
    round_trip(&url, &place.stored("from", 4), &place, &[], &["--paused", "--bandwidth", "4G"]);
    assert!(begun.elapsed() < Duration::from_secs(60));
}

#[test]
fn at_info_both_sides_tell_of_each_phase_in_few_lines() {
    let place = Place::new();
    let from = place.stored("from", 8);
    let info = ["--log-level", "info"];
    let (receiver, url) = Tool::receive("tcp:127.0.0.1:0", &place.path("copy"), &info);
    let sent = Tool::send(&url, &from, &[&info[..], &["--connections", "4"]].concat()).end().succeeded();
    let kept = receiver.end().succeeded();
    let copy = place.path("copy");
    let verify = ["snapshot", "verify", copy.to_str().unwrap(), "--json", "--log-level", "info"];
    let verified = Tool::start(verify).end().succeeded();
    for (ended, words) in [
        (&sent, &["Migrating a VM with 64.0 MiB", "Round 1: sent", "the last one", "VM moved"][..]),
        (
            &kept,
            &["Receiving a VM from", "of memory in", "the VM's state", "is hashed", "safe under its name"],
        ),
        (&verified, &["Checked ", "findings: 0"]),
    ] {
        assert!(words.iter().all(|word| ended.stderr.contains(word)), "{words:?}: {ended:?}");
        assert!(ended.stderr.lines().count() <= 10, "{ended:?}");
    }
}

#[test]
fn holes_and_zeros_are_left_out_unless_the_receiver_needs_them() {
    for (options, least, most) in [(&[][..], 13 << 20, 32 << 20), (&["--all-pages"], 64 << 20, 65 << 20)] {
        let place = Place::new();
        let (receiver, url) = Tool::receive("tcp:127.0.0.1:0", &place.path("into"), &[]);
        let sent = Tool::send(&url, &place.stored("from", 7), options).end().succeeded().last();
        receiver.end().succeeded();
        assert_same(&place.path("from"), &place.path("into"));
        let (sent, skipped) = (sent["sent_bytes"].as_u64().unwrap(), sent["skipped_bytes"].as_u64().unwrap());
        assert!((least..most).contains(&sent), "{options:?}: {sent}");
        assert!((64 << 20..65 << 20).contains(&(sent + skipped)), "{options:?}: {sent} and {skipped}");
    }
}

#[test]
fn nothing_is_left_out_where_the_memory_of_a_new_vm_is_what_a_file_holds() {
    let place = Place::new();
    let from = place.stored("from", 7);
    let config =
        r#"{"memory":{"size":0,"zones":[{"id":"mem0","size":67108864,"file":"/used","shared":false}]}}"#;
    fs::write(from.join(CONFIG_FILE), config).unwrap();
    fs::remove_file(from.join(MANIFEST_FILE)).unwrap();
    let (receiver, url) = Tool::receive("tcp:127.0.0.1:0", &place.path("into"), &[]);
    let sent = Tool::send(&url, &from, &[]).end().succeeded().last();
    receiver.end().succeeded();
    assert_eq!(sent["skipped_bytes"], 0);
    assert!(sent["sent_bytes"].as_u64().unwrap() > 64 << 20);
}

#[test]
fn a_signal_to_the_source_abandons_and_nothing_is_kept() {
    let place = Place::new();
    let out = Place::new();
    let (receiver, url) = Tool::receive("tcp:127.0.0.1:0", &out.path("into"), &[]);
    let source = Tool::send(&url, &place.stored("from", 5), &["--bandwidth", "1M"]);
    std::thread::sleep(Duration::from_millis(500));
    source.signal("-TERM");
    source.end().failed(130, "cancelled");
    receiver.end().failed(3, "Source abandoned the migration");
    assert!(is_empty(out.root()));
}

#[test]
fn a_signal_to_the_receiver_abandons_and_nothing_is_kept() {
    let place = Place::new();
    let out = Place::new();
    let (receiver, url) = Tool::receive("tcp:127.0.0.1:0", &out.path("into"), &[]);
    let source = Tool::send(&url, &place.stored("from", 6), &["--bandwidth", "1M"]);
    std::thread::sleep(Duration::from_millis(500));
    receiver.signal("-INT");
    let failed = receiver.end().failed(130, "stopped here").last();
    assert_eq!(failed["event"], "failed");
    assert_eq!(failed["class"], "cancelled");
    source.end().failed(3, "");
    assert!(is_empty(out.root()));
}

#[test]
fn a_receiver_that_nobody_came_to_ends_at_a_signal() {
    let out = Place::new();
    let (receiver, _) = Tool::receive("tcp:127.0.0.1:0", &out.path("into"), &[]);
    receiver.signal("-TERM");
    receiver.end().failed(130, "stopped here");
    assert!(is_empty(out.root()));
}
