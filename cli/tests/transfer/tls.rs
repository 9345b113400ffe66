// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Certificates that are not to be trusted, and keys that are not private.

use rcgen::CertificateParams;

use crate::certificates::{Authority, Files, expired, loopback};
use crate::stored::{Place, assert_same};
use crate::tool::{Ended, Tool};

/// Sends with the certificates in `source` to a receiver with those in `receiver`, then with those in `good`.
///
/// Returns how the first attempt ended; the second one has to succeed with the same receiver.
fn attempt(receiver: &Files, source: &Files, good: &Files) -> Ended {
    let place = Place::new();
    let (from, into) = (place.stored("from", 1), place.path("into"));
    let tls = |files: &Files| files.path().to_str().unwrap().to_owned();
    let (waiting, url) = Tool::receive("tcp:127.0.0.1:0", &into, &["--tls-dir", &tls(receiver)]);
    let ended = Tool::send(&url, &from, &["--tls-dir", &tls(source)]).end();
    Tool::send(&url, &from, &["--tls-dir", &tls(good)]).end().succeeded();
    waiting.end().succeeded();
    assert_same(&from, &into);
    ended
}

/// Sends to a receiver whose certificate is `server`; the source has to refuse it.
fn refused_server(server: &CertificateParams) -> Ended {
    let authority = Authority::new("ours");
    let files = Files::new(&authority, &authority.sign(server), &authority.sign(&loopback()));
    let place = Place::new();
    let tls = ["--tls-dir", files.path().to_str().unwrap()];
    let (waiting, url) = Tool::receive("tcp:127.0.0.1:0", &place.path("into"), &tls);
    let ended = Tool::send(&url, &place.stored("from", 1), &tls).end();
    waiting.signal("-TERM");
    waiting.end().failed(130, "");
    ended
}

#[test]
fn a_receiver_whose_certificate_is_no_good_is_refused() {
    refused_server(&expired()).failed(3, "expired");
    let other = CertificateParams::new(["elsewhere.example".into()]).unwrap();
    refused_server(&other).failed(3, "not valid for name");
}

#[test]
fn a_source_whose_certificate_is_no_good_is_rejected_and_a_better_one_let_in() {
    let authority = Authority::new("ours");
    let good = Files::of(&authority);
    let late = Files::new(&authority, &authority.sign(&loopback()), &authority.sign(&expired()));
    attempt(&good, &late, &good).failed(3, "CertificateExpired");

    // Of another authority, but it trusts ours.
    let strange = Authority::new("another");
    let mixed = Files::new(&authority, &authority.sign(&loopback()), &strange.sign(&loopback()));
    attempt(&good, &mixed, &good).failed(3, "alert");
}

#[test]
fn a_receiver_of_another_authority_is_refused() {
    let good = Files::good();
    attempt(&good, &Files::of(&Authority::new("another")), &good).failed(3, "UnknownIssuer");
}

#[test]
fn a_source_without_tls_is_rejected() {
    let place = Place::new();
    let files = Files::good();
    let tls = ["--tls-dir", files.path().to_str().unwrap()];
    let (from, into) = (place.stored("from", 1), place.path("into"));
    let (waiting, url) = Tool::receive("tcp:127.0.0.1:0", &into, &tls);
    Tool::send(&url, &from, &[]).end().failed(3, "");
    Tool::send(&url, &from, &tls).end().succeeded();
    waiting.end().succeeded();
    assert_same(&from, &into);
}

#[test]
fn a_handshake_that_never_finishes_keeps_nobody_out() {
    let place = Place::new();
    let files = Files::good();
    let tls = ["--tls-dir", files.path().to_str().unwrap()];
    let (from, into) = (place.stored("from", 1), place.path("into"));
    let (waiting, url) = Tool::receive("tcp:127.0.0.1:0", &into, &tls);
    let _silent = std::net::TcpStream::connect(url.strip_prefix("tcp:").unwrap()).unwrap();
    std::thread::sleep(std::time::Duration::from_millis(200));
    Tool::send(&url, &from, &[&tls[..], &["--connections", "4"]].concat()).end().succeeded();
    waiting.end().succeeded();
    assert_same(&from, &into);
}

#[test]
fn keys_and_files_that_cannot_be_used_are_named() {
    let place = Place::new();
    let from = place.stored("from", 1);
    let files = Files::good();
    let send = || {
        let tls = ["--tls-dir", files.path().to_str().unwrap()];
        Tool::send("tcp:127.0.0.1:1", &from, &tls).end()
    };
    let key = std::fs::read_to_string(files.path().join("client-key.pem")).unwrap();
    files.write("client-key.pem", &key, 0o640);
    send().failed(4, "client-key.pem can be read by others than its owner (mode 0640)");
    files.write("client-key.pem", "nonsense", 0o600);
    send().failed(4, "Cannot find a private key in");
    std::fs::remove_file(files.path().join("ca-cert.pem")).unwrap();
    files.write("client-key.pem", &key, 0o600);
    send().failed(4, "ca-cert.pem");
}
