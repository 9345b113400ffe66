// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Who may talk to whom, and what they are told who may not.

use std::fs;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::thread;
use std::time::{Duration, Instant};

use rcgen::CertificateParams;
use vfio_migration::transfer::connection::{Connection, ConnectionError, Listener};
use vfio_migration::transfer::limits::PeerLimits;
use vfio_migration::transfer::tls::{ClientTls, ServerTls};
use vfio_migration::transfer::url::Endpoint;

use crate::certificates::{Authority, Files, expired, loopback};
use crate::connection::impatient;
use crate::peer::text_of;

/// What both ends, destination first, have to say of a connection with these files.
fn outcomes(server: &Files, client: &Files) -> [Result<(), String>; 2] {
    let limits = PeerLimits::default();
    let listener = Listener::bind(&"tcp:127.0.0.1:0".parse().unwrap()).unwrap();
    thread::scope(|scope| {
        let far = scope.spawn(|| {
            let far = listener.accept(Duration::from_secs(10), &limits).unwrap().unwrap();
            let mut far = far.secure_server(&server.server(), &limits).map_err(|error| text_of(&error))?;
            far.write_all(b"y").and_then(|()| far.flush()).map_err(|error| text_of(&error))?;
            far.close(limits.linger);
            Ok(())
        });
        let near = || {
            let near = Connection::connect(listener.url(), Some(&client.client()), &limits);
            let mut near = near.map_err(|error| text_of(&error))?;
            // With TLS 1.3 the source is done before the destination has looked at its certificate.
            near.read_exact(&mut [0]).map_err(|error| text_of(&error))
        };
        let near = near();
        [far.join().unwrap(), near]
    })
}

#[test]
fn both_ends_with_good_certificates_talk() {
    let files = Files::good();
    assert_eq!(outcomes(&files, &files), [Ok(()), Ok(())]);
}

#[test]
fn an_expired_server_is_named_and_told() {
    let authority = Authority::new("ours");
    let files = Files::new(&authority, &authority.sign(&expired()), &authority.sign(&loopback()));
    let [far, near] = outcomes(&files, &files).map(Result::unwrap_err);
    assert!(near.contains("TLS handshake with tcp:127.0.0.1:"), "{near}");
    assert!(near.contains("invalid peer certificate: certificate expired"), "{near}");
    assert!(far.contains("Peer refuses this side's certificate or TLS: alert CertificateExpired"), "{far}");
}

#[test]
fn an_expired_client_is_named_and_told() {
    let authority = Authority::new("ours");
    let files = Files::new(&authority, &authority.sign(&loopback()), &authority.sign(&expired()));
    let [far, near] = outcomes(&files, &files).map(Result::unwrap_err);
    assert!(far.contains("invalid peer certificate: certificate expired"), "{far}");
    assert!(near.contains("Peer refuses this side's certificate or TLS: alert CertificateExpired"), "{near}");
}

#[test]
fn a_server_with_another_name_is_refused() {
    let authority = Authority::new("ours");
    let elsewhere = CertificateParams::new(["elsewhere.example".into()]).unwrap();
    let files = Files::new(&authority, &authority.sign(&elsewhere), &authority.sign(&loopback()));
    let [far, near] = outcomes(&files, &files).map(Result::unwrap_err);
    assert!(
        near.contains("invalid peer certificate: certificate not valid for name \"127.0.0.1\""),
        "{near}"
    );
    assert!(far.contains("Peer refuses"), "{far}");
}

#[test]
fn certificates_of_another_authority_are_refused_on_both_sides() {
    let (ours, theirs) = (Files::good(), Files::of(&Authority::new("theirs")));
    let [far, near] = outcomes(&ours, &theirs).map(Result::unwrap_err);
    assert!(near.contains("invalid peer certificate: UnknownIssuer"), "{near}");
    assert!(far.contains("Peer refuses this side's certificate or TLS: alert UnknownCA"), "{far}");

    fs::copy(ours.path().join("ca-cert.pem"), theirs.path().join("ca-cert.pem")).unwrap();
    let [far, near] = outcomes(&ours, &theirs).map(Result::unwrap_err);
    assert!(far.contains("invalid peer certificate: UnknownIssuer"), "{far}");
    assert!(near.contains("alert UnknownCA"), "{near}");
}

#[test]
fn a_peer_without_tls_is_refused_at_once() {
    let listener = Listener::bind(&"tcp:127.0.0.1:0".parse().unwrap()).unwrap();
    let Endpoint::Tcp { port, .. } = listener.url().endpoint() else { unreachable!() };
    let mut plain = TcpStream::connect(("127.0.0.1", port)).unwrap();
    plain.write_all(&[1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]).unwrap();
    let far = listener.accept(Duration::from_secs(10), &impatient()).unwrap().unwrap();
    let error = far.secure_server(&Files::good().server(), &impatient()).unwrap_err();
    assert!(matches!(error, ConnectionError::Handshake { .. }), "{}", text_of(&error));
}

#[test]
fn a_handshake_that_never_finishes_is_ended() {
    let listener = Listener::bind(&"tcp:127.0.0.1:0".parse().unwrap()).unwrap();
    let Endpoint::Tcp { port, .. } = listener.url().endpoint() else { unreachable!() };
    // A record that promises 512 bytes and brings them one by one.
    let mut slow = TcpStream::connect(("127.0.0.1", port)).unwrap();
    slow.write_all(&[0x16, 3, 1, 2, 0, 1, 0, 1, 0xfc]).unwrap();
    let far = listener.accept(Duration::from_secs(10), &impatient()).unwrap().unwrap();
    let trickle = thread::spawn(move || {
        while slow.write_all(&[0]).is_ok() {
            thread::sleep(Duration::from_millis(20));
        }
    });
    let begun = Instant::now();
    let error = far.secure_server(&Files::good().server(), &impatient()).unwrap_err();
    assert!(begun.elapsed() < Duration::from_secs(2));
    assert!(text_of(&error).contains("Peer was silent for"), "{}", text_of(&error));
    trickle.join().unwrap();
}

#[test]
fn a_silent_server_does_not_hang_the_source() {
    let listener = Listener::bind(&"tcp:127.0.0.1:0".parse().unwrap()).unwrap();
    let error = Connection::connect(listener.url(), Some(&Files::good().client()), &impatient()).unwrap_err();
    assert!(matches!(error, ConnectionError::Handshake { .. }), "{}", text_of(&error));
}

#[test]
fn a_key_readable_by_others_is_refused() {
    for mode in [0o644, 0o640, 0o604] {
        let files = Files::good();
        let key = fs::read_to_string(files.path().join("client-key.pem")).unwrap();
        files.write("client-key.pem", &key, mode);
        let error = ClientTls::from_directory(files.path()).unwrap_err().to_string();
        let expected = format!("client-key.pem can be read by others than its owner (mode 0{mode:o})");
        assert!(error.ends_with(&expected), "{error}");
        ServerTls::from_directory(files.path()).unwrap();
    }
}

#[test]
fn files_that_are_missing_or_something_else_are_named() {
    let files = Files::good();
    fs::remove_file(files.path().join("server-cert.pem")).unwrap();
    let error = text_of(&ServerTls::from_directory(files.path()).unwrap_err());
    assert!(error.contains("server-cert.pem: No such file"), "{error}");
    ClientTls::from_directory(files.path()).unwrap();

    files.write("ca-cert.pem", "nothing\n", 0o644);
    let error = ClientTls::from_directory(files.path()).unwrap_err().to_string();
    assert!(error.starts_with("Cannot find a certificate in ") && error.ends_with("ca-cert.pem"), "{error}");

    let files = Files::good();
    files.write("client-key.pem", "nothing\n", 0o600);
    let error = ClientTls::from_directory(files.path()).unwrap_err().to_string();
    assert!(error.starts_with("Cannot find a private key in "), "{error}");
}

#[test]
fn an_authority_among_certificates_that_are_none_is_trusted() {
    let files = Files::good();
    let good = fs::read_to_string(files.path().join("ca-cert.pem")).unwrap();
    let nonsense = "-----BEGIN CERTIFICATE-----\nbm9uc2Vuc2U=\n-----END CERTIFICATE-----\n";
    files.write("ca-cert.pem", &format!("{nonsense}{good}"), 0o644);
    assert_eq!(outcomes(&files, &files), [Ok(()), Ok(())]);

    files.write("ca-cert.pem", nonsense, 0o644);
    let error = ClientTls::from_directory(files.path()).unwrap_err().to_string();
    assert!(error.starts_with("TLS cannot use ") && error.ends_with("ca-cert.pem"), "{error}");
}

#[test]
fn a_key_of_another_certificate_is_refused() {
    let files = Files::good();
    let other = fs::read_to_string(Files::good().path().join("server-key.pem")).unwrap();
    files.write("server-key.pem", &other, 0o600);
    let error = text_of(&ServerTls::from_directory(files.path()).unwrap_err());
    assert!(error.contains("server-cert.pem"), "{error}");
}

#[test]
fn tls_is_for_tcp_only() {
    let directory = tempfile::tempdir().unwrap();
    let url = format!("unix:{}", directory.path().join("vm.sock").display()).parse().unwrap();
    let _listener = Listener::bind(&url).unwrap();
    let error = Connection::connect(&url, Some(&Files::good().client()), &PeerLimits::default()).unwrap_err();
    assert!(error.to_string().starts_with("TLS goes over TCP, not over unix:"), "{error}");
}
