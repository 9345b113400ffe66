// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Snapshots whose bytes are not those that their manifests name.

use std::fs::OpenOptions;
use std::os::unix::fs::FileExt;
use std::path::Path;

use vfio_migration::snapshot::MEMORY_FILE;

use crate::certificates::Files;
use crate::stored::Place;
use crate::tool::{Tool, run};

/// Where every stored snapshot has a populated MiB.
const AT: u64 = 5 << 20;
const NAMED: &str = "Memory at GPA 0x500000..0x504000";

/// Puts bytes of the memory of `other` in place of those of `snapshot`.
fn alter(snapshot: &Path, other: &Path) {
    let open = |dir: &Path| OpenOptions::new().read(true).write(true).open(dir.join(MEMORY_FILE)).unwrap();
    let mut bytes = [0; 4096];
    open(other).read_exact_at(&mut bytes, AT).unwrap();
    open(snapshot).write_all_at(&bytes, AT).unwrap();
}

#[test]
fn a_base_altered_to_equal_what_is_sent_keeps_a_differential_from_being_received() {
    let place = Place::new();
    let (base, later, into) = (place.stored("base", 1), place.stored("later", 2), place.path("into"));
    alter(&base, &later);
    let options = ["--base", base.to_str().unwrap()];
    let (receiver, url) = Tool::receive("tcp:127.0.0.1:0", &into, &options);
    let sent = Tool::send(&url, &later, &[]).end();
    assert_eq!(sent.code, Some(3), "{sent:?}");
    let received = receiver.end().failed(5, NAMED);
    assert!(received.stderr.contains(base.join(MEMORY_FILE).to_str().unwrap()), "{received:?}");
    assert!(!into.exists());
}

#[test]
fn a_base_altered_to_equal_a_snapshot_is_not_subtracted_from_it() {
    let place = Place::new();
    let (base, later, into) = (place.stored("base", 1), place.stored("later", 2), place.path("into"));
    alter(&base, &later);
    let [from, base, to] = [&later, &base, &into].map(|path| path.to_str().unwrap());
    run(["snapshot", "create", "--from", from, "--base", base, "--into", to]).failed(5, NAMED);
    assert!(!into.exists());
}

#[test]
fn an_altered_snapshot_is_not_sent_to_its_end() {
    let place = Place::new();
    let (from, other, into) = (place.stored("from", 1), place.stored("other", 2), place.path("into"));
    alter(&from, &other);
    let (receiver, url) = Tool::receive("tcp:127.0.0.1:0", &into, &[]);
    Tool::send(&url, &from, &[]).end().failed(5, NAMED);
    let received = receiver.end();
    assert_eq!(received.code, Some(3), "{received:?}");
    assert!(!into.exists());
}

#[test]
fn a_snapshot_cut_off_while_it_is_sent_is_named_and_the_receiver_not_blamed() {
    let files = Files::good();
    let tls = ["--tls-dir", files.path().to_str().unwrap()];
    for options in [&[][..], &["--all-pages"], &["--connections", "3"], &tls] {
        let place = Place::new();
        let (from, into) = (place.stored("from", 1), place.path("into"));
        let of_both = if options == tls { &tls[..] } else { &[] };
        let (receiver, url) = Tool::receive("tcp:127.0.0.1:0", &into, of_both);
        let mut sending = Tool::send(&url, &from, &[options, &["--bandwidth", "8M"]].concat());
        sending.await_event("sending");
        let memory = OpenOptions::new().write(true).open(from.join(MEMORY_FILE)).unwrap();
        memory.set_len(4096).unwrap();
        sending.end().failed(4, "memory-ranges: File was cut off at 4096 bytes");
        let received = receiver.end();
        assert_eq!(received.code, Some(3), "{received:?}");
        assert!(!into.exists());
    }
}
