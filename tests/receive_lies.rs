// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What a hostile source can do to a receiver: every row of the table of what Cloud Hypervisor v53 does not survive.
//!
//! Each lie is answered with Error in under a second. This is a process of its own, and what it takes of memory, all rows
//! together, stays under 64 MiB.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

#[expect(dead_code, reason = "other tests use the rest")]
mod frames;
#[expect(dead_code, reason = "the transfer's other tests use the rest")]
#[path = "transfer/peer.rs"]
mod peer;
#[path = "../integration/src/skip.rs"]
#[expect(dead_code, unreachable_pub, reason = "other crates' tests use the rest")]
mod skip;

use std::fs;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use serde_json::Value;
use vfio_migration::transfer::limits::{Pace, PeerLimits};
use vfio_migration::transfer::receive::{Completion, Destination, PageStore, ReceiveError, Received};
use vfio_migration::vm::VmError;
use vm_migration::{Snapshot, snapshot_from_id};

use frames::{CONFIG, MEMORY, START, STATE, memory, message, request, table};
use peer::{HIGH, Peer, REGION, Vmm, begun_on_two, receive_on_pair, receive_on_tcp, text_of};

const LIMIT_KIB: u64 = 64 << 10;

/// Bytes of RAM of the VMM here.
const RAM: u64 = 2 * REGION;

/// A VMM that looks at what it gets as closely as it must.
struct Careful(Vmm);

impl Destination for Careful {
    fn config(&mut self, json: &[u8]) -> Result<Arc<dyn PageStore>, VmError> {
        let config: Value = serde_json::from_slice(json)?;
        if config["memory_manager_data"]["start_of_device_area"] == 0 {
            return Err("The device area begins at 0, which is RAM".into());
        }
        self.0.config(json)
    }

    fn state(&mut self, json: Vec<u8>) -> Result<(), VmError> {
        let root: Snapshot = serde_json::from_slice(&json)?;
        let devices = snapshot_from_id(Some(&root), "device-manager");
        devices.ok_or("State has no device-manager")?;
        self.0.state(json)
    }

    fn complete(&mut self, paused: bool) -> Result<Completion, VmError> {
        self.0.complete(paused)
    }

    fn abandoned(&mut self) {
        self.0.abandoned();
    }
}

/// The most memory this process ever had, as the kernel counts it.
fn peak_kib() -> Option<u64> {
    let status = fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    line.trim().strip_suffix(" kB")?.parse().ok()
}

fn check_memory() {
    let Some(peak_kib) = peak_kib() else {
        return skip::skip("no VmHWM in /proc/self/status to measure memory by");
    };
    assert!(peak_kib < LIMIT_KIB, "this process took {peak_kib} KiB");
}

/// Tells a receiver `lie` after `before`, and returns what it says of it.
fn refusal_after(before: &[Vec<u8>], lie: &[u8]) -> String {
    let mut vmm = Careful(Vmm::new());
    let begun = Instant::now();
    let (received, (answer, after)) = receive_on_pair(PeerLimits::default(), &mut vmm, |mut peer| {
        peer.say(before);
        let told = Instant::now();
        (peer.ask(lie), told.elapsed())
    });
    assert!(begun.elapsed() < Duration::from_secs(1), "{:?}", begun.elapsed());
    assert!(after < Duration::from_secs(1), "{after:?}");
    assert_eq!(answer, Some(2));
    assert_eq!(vmm.0.calls.last().unwrap(), "abandoned");
    check_memory();
    text_of(&refused(received))
}

fn refused(received: Result<Received, ReceiveError>) -> ReceiveError {
    received.expect_err("a lie was believed")
}

fn started() -> Vec<Vec<u8>> {
    vec![message(START, &[])]
}

fn configured() -> Vec<Vec<u8>> {
    vec![message(START, &[]), message(CONFIG, b"{}")]
}

#[test]
fn config_or_state_length_2_45_to_2_63() {
    for length in [1 << 45, 1 << 50, 1 << 62, 1 << 63, u64::MAX] {
        let text = refusal_after(&started(), &request(CONFIG, length));
        let limit = PeerLimits::default().config_bytes;
        assert_eq!(
            text,
            format!("Config announces {length} bytes, more than the limit config_bytes = {limit}")
        );
        let text = refusal_after(&configured(), &request(STATE, length));
        let limit = PeerLimits::default().state_bytes;
        assert_eq!(
            text,
            format!("State announces {length} bytes, more than the limit state_bytes = {limit}")
        );
    }
}

#[test]
fn config_or_state_length_under_the_limit_and_never_sent() {
    for (before, command, length) in [(started(), CONFIG, 64 << 20), (configured(), STATE, 4 << 30)] {
        let mut vmm = Careful(Vmm::new());
        let (received, ()) = receive_on_pair(PeerLimits::default(), &mut vmm, |mut peer| {
            peer.say(&before);
            peer.send(&request(command, length));
            peer.send(&[b' '; 100_000]);
        });
        let text = text_of(&refused(received));
        assert!(text.starts_with("Cannot read the payload of "), "{text}");
        check_memory();
    }
}

#[test]
fn memory_table_length_not_a_multiple_of_16() {
    for length in [1, 8, 15, 17, (1 << 20) + 8] {
        let text = refusal_after(&configured(), &request(MEMORY, length));
        let expected = format!(
            "Cannot parse the table of Memory: Memory table of {length} byte{} is not a multiple of 16 bytes",
            if length == 1 { "" } else { "s" }
        );
        assert_eq!(text, expected);
    }
}

#[test]
fn memory_table_length_2_62() {
    for length in [(1 << 30) + 16, 1 << 62, u64::MAX - 15] {
        let text = refusal_after(&configured(), &request(MEMORY, length));
        let expected = "more than the limit table_bytes = 1073741824";
        assert_eq!(text, format!("Memory announces {length} bytes, {expected}"));
    }
}

#[test]
fn memory_table_of_more_ranges_than_the_vm_has_pages() {
    let pages = RAM / 4096;
    for ranges in [pages + 1, 1 << 26] {
        let text = refusal_after(&configured(), &request(MEMORY, 16 * ranges));
        assert_eq!(text, format!("Memory announces a table of {ranges} ranges for a VM of {pages} pages"));
    }
    let (received, ()) = receive_on_pair(PeerLimits::default(), &mut Careful(Vmm::new()), |mut peer| {
        peer.say(&configured());
        // A range for each page is legal; this table is cut off.
        peer.send(&request(MEMORY, 16 * pages));
        peer.send(&[0; 16]);
    });
    let text = text_of(&refused(received));
    assert!(text.starts_with("Cannot read the table of Memory: "), "{text}");
    check_memory();
}

#[test]
fn connection_closed_in_the_middle_of_page_bytes() {
    let begun = Instant::now();
    let (received, ()) = receive_on_pair(PeerLimits::default(), &mut Careful(Vmm::new()), |mut peer| {
        peer.say(&configured());
        let message = memory(&[(0, &[7; 0x8000])]);
        peer.send(&message[..message.len() - 1]);
    });
    assert!(begun.elapsed() < Duration::from_secs(1));
    let text = text_of(&refused(received));
    assert!(text.starts_with("Cannot read the pages of Memory: "), "{text}");
    check_memory();
}

#[test]
fn state_json_without_device_manager_data() {
    let text = refusal_after(&configured(), &message(STATE, b"{\"snapshots\":{},\"snapshot_data\":null}"));
    assert_eq!(text, "Destination cannot take State: State has no device-manager");
    let text = refusal_after(&configured(), &message(STATE, b"{\"snapshots\":"));
    assert!(text.starts_with("Destination cannot take State: EOF while parsing"), "{text}");
}

#[test]
fn start_of_device_area_0_in_config() {
    let config = b"{\"memory_manager_data\":{\"start_of_device_area\":0}}";
    let text = refusal_after(&started(), &message(CONFIG, config));
    assert_eq!(text, "Destination cannot take Config: The device area begins at 0, which is RAM");
}

/// Encodes a Memory whose one range is a lie.
fn lying_table(gpa: u64, length: u64) -> Vec<u8> {
    table(&[(gpa, length)])
}

#[test]
fn gpa_in_a_hole_or_gpa_plus_length_wrapping() {
    let outside = [(REGION, 16), (REGION - 8, 16), (HIGH - 8, 16), (0, HIGH + REGION), (1 << 60, 1 << 40)];
    for (gpa, length) in outside {
        let text = refusal_after(&configured(), &lying_table(gpa, length));
        assert!(text.ends_with(" in entry 0 of the memory table is not in the VM's RAM"), "{text}");
    }
    for (gpa, length) in [(u64::MAX, 2), (1 << 63, 1 << 63), (HIGH, u64::MAX)] {
        let text = refusal_after(&configured(), &lying_table(gpa, length));
        assert!(text.ends_with(" wraps around"), "{text}");
    }
    let text = refusal_after(&configured(), &lying_table(HIGH, 0));
    assert!(text.ends_with("Range at 0x100000000 is empty"), "{text}");
}

#[test]
fn a_worker_that_stalls_in_mid_request() {
    let limits = PeerLimits {
        pace: Pace { window: Duration::from_millis(200), bytes: 4096 },
        ..PeerLimits::default()
    };
    let (received, (answer, after)) = receive_on_tcp(limits, &mut Vmm::new(), |listener| {
        let (_main, mut worker) = begun_on_two(listener);
        worker.send(&memory(&[(0, &[1; 4096])])[..50]);
        let stalled = Instant::now();
        (worker.answer(), stalled.elapsed())
    });
    assert_eq!(answer, Some(2));
    assert!(after < Duration::from_secs(1), "{after:?}");
    assert!(text_of(&refused(received)).starts_with("Cannot read the pages of Memory: Peer stalled: "));
    check_memory();
}

#[test]
fn page_bytes_without_end() {
    // All of a region in each range, again and again: legal, and no memory beyond the table's.
    let ranges = vec![(0, REGION); usize::try_from(RAM / 4096).unwrap()];
    let (received, sent) = receive_on_pair(PeerLimits::default(), &mut Vmm::new(), |mut peer| {
        peer.say(&configured());
        peer.send(&table(&ranges));
        let begun = Instant::now();
        let mut sent = 0_u64;
        // On a fast host the table's 512 MiB would be over before the time is.
        while begun.elapsed() < Duration::from_millis(300) && sent < RAM / 4096 * REGION / 2 {
            peer.send(&[9; 1 << 16]);
            sent += 1 << 16;
        }
        sent
    });
    assert!(sent > REGION, "more than RAM was taken, {sent} bytes");
    let text = text_of(&refused(received));
    assert!(text.starts_with("Cannot read the pages of Memory: "), "{text}");
    check_memory();
}

#[test]
fn callers_without_end() {
    let (received, ()) = receive_on_tcp(PeerLimits::default(), &mut Vmm::new(), |listener| {
        let mut main = Peer::to(listener);
        main.begin();
        for _ in 0..1000 {
            drop(Peer::to(listener));
        }
        thread::sleep(Duration::from_millis(100));
        main.say(&[memory(&[(0, &[1; 64])])]);
        main.end();
    });
    received.unwrap();
    check_memory();
}
