// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What can be wrong with a receiver, and with what is sent.

use std::fs::{self, OpenOptions};
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use vfio_migration::snapshot::{CONFIG_FILE, MEMORY_FILE, STATE_FILE};
use vfio_migration_integration::skip;

use crate::stored::Place;
use crate::tool::{Ended, Tool};

/// Sends a snapshot to whatever `answer` makes of one connection.
fn send_to(options: &[&str], answer: impl FnOnce(TcpStream) + Send + 'static) -> Ended {
    let place = Place::new();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("tcp:{}", listener.local_addr().unwrap());
    let receiver = thread::spawn(move || answer(listener.accept().unwrap().0));
    let ended = Tool::send(&url, &place.stored("from", 1), options).end();
    receiver.join().unwrap();
    ended
}

/// Reads until the peer closes the connection.
fn drain(mut stream: TcpStream) {
    let _ = std::io::copy(&mut stream, &mut std::io::sink());
}

#[test]
fn a_receiver_that_stalls_is_given_up() {
    let begun = Instant::now();
    send_to(&["--idle-timeout", "1"], drain).failed(3, "did not answer");
    assert!(begun.elapsed() < Duration::from_secs(20));
}

#[test]
fn a_receiver_that_talks_nonsense_is_named() {
    let nonsense = |mut stream: TcpStream| {
        stream.read_exact(&mut [0; 16]).unwrap();
        stream.write_all(b"HTTP/1.1 400 Bad Request\r\n\r\n").unwrap();
        drain(stream);
    };
    send_to(&[], nonsense).failed(3, "answered with something else");
}

#[test]
fn a_receiver_that_answers_before_it_is_asked_is_named() {
    let hasty = |mut stream: TcpStream| {
        stream.read_exact(&mut [0; 16]).unwrap();
        stream.write_all(&OK.repeat(2)).unwrap();
        drain(stream);
    };
    send_to(&[], hasty).failed(3, "answered what was not asked");
}

#[test]
fn a_receiver_that_goes_away_is_named() {
    let ended = send_to(&[], |mut stream| stream.read_exact(&mut [0; 16]).unwrap());
    ended.failed(3, "closed the connection without an answer");
}

const OK: [u8; 16] = [1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];

/// Answers everything up to Complete, which is left to the caller, with Ok.
fn answer_until_complete(mut stream: &TcpStream) {
    loop {
        let mut head = [0; 16];
        stream.read_exact(&mut head).unwrap();
        let length = u64::from_le_bytes(head[8..].try_into().unwrap());
        let mut payload = Vec::new();
        stream.take(length).read_to_end(&mut payload).unwrap();
        match head[0] {
            4 => {
                let pages: u64 =
                    payload.chunks(16).map(|entry| u64::from_le_bytes(entry[8..].try_into().unwrap())).sum();
                std::io::copy(&mut stream.take(pages), &mut std::io::sink()).unwrap();
            }
            5 => return,
            _ => {}
        }
        stream.write_all(&OK).unwrap();
    }
}

#[test]
fn an_unanswered_complete_leaves_the_outcome_unknown() {
    let ended = send_to(&[], |stream| answer_until_complete(&stream));
    let failed = ended.failed(6, "Outcome unknown").last();
    assert_eq!(failed["class"], "outcome-unknown");
    assert_eq!(failed["exit"], 6);
}

#[test]
fn a_receiver_that_takes_its_time_with_complete_is_waited_for() {
    let hurried = ["--idle-timeout", "1"];
    let ended = send_to(&hurried, |mut stream| {
        answer_until_complete(&stream);
        thread::sleep(Duration::from_secs(3));
        stream.write_all(&OK).unwrap();
        drain(stream);
    });
    ended.succeeded();
}

#[test]
fn a_receiver_that_holds_the_stopped_vm_up_is_given_up_and_the_option_named() {
    let (place, out) = (Place::new(), Place::new());
    let on_paused = ["--on-paused", "sleep 30"];
    let (receiver, url) = Tool::receive("tcp:127.0.0.1:0", &out.path("into"), &on_paused);
    let begun = Instant::now();
    let ended = Tool::send(&url, &place.stored("from", 1), &["--idle-timeout", "2"]).end();
    ended.failed(3, "--idle-timeout sets the limit");
    receiver.end().failed(3, "the source closed the connection meanwhile");
    assert!(begun.elapsed() < Duration::from_secs(15), "{:?}", begun.elapsed());
    assert!(crate::tool::is_empty(out.root()));
}

#[test]
fn a_receiver_that_trickles_is_given_up() {
    let begun = Instant::now();
    let ended = send_to(&["--idle-timeout", "1"], |mut stream| {
        stream.read_exact(&mut [0; 16]).unwrap();
        let mut sent = OK.iter().take_while(|&&byte| {
            thread::sleep(Duration::from_millis(300));
            stream.write_all(&[byte]).is_ok()
        });
        while sent.next().is_some() {}
    });
    ended.failed(3, "Peer stalled");
    assert!(begun.elapsed() < Duration::from_secs(20));
}

#[test]
fn a_receiver_that_lies_about_lengths_is_named() {
    let ended = send_to(&[], |mut stream| {
        stream.read_exact(&mut [0; 16]).unwrap();
        stream.write_all(&[&OK[..8], &(1_u64 << 62).to_le_bytes()].concat()).unwrap();
        drain(stream);
    });
    ended.failed(3, "claims a payload of 4611686018427387904 bytes");
}

#[test]
fn nobody_listening_is_named() {
    let place = Place::new();
    let from = place.stored("from", 1);
    let free = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    Tool::send(&format!("tcp:{free}"), &from, &[]).end().failed(3, "Connection refused");
    let socket = format!("unix:{}", place.path("socket").display());
    Tool::send(&socket, &from, &[]).end().failed(3, "No such file");
    Tool::send("tcp:no-such-host.invalid:1", &from, &[]).end().failed(3, "Cannot find an address");
}

#[test]
fn a_snapshot_that_is_none_is_not_sent() {
    let place = Place::new();
    let send = |name: &str| Tool::send("tcp:127.0.0.1:1", &place.path(name), &[]).end();
    send("absent").failed(4, CONFIG_FILE);

    let short = place.stored("short", 1);
    let memory = OpenOptions::new().write(true).open(short.join(MEMORY_FILE)).unwrap();
    memory.set_len(memory.metadata().unwrap().len() - 4096).unwrap();
    send("short").failed(5, "are expected");

    let altered = place.stored("altered", 1);
    fs::write(altered.join(STATE_FILE), "{}").unwrap();
    send("altered").failed(5, STATE_FILE);

    let other = place.stored("other", 1);
    fs::remove_file(other.join(vfio_migration::snapshot::MANIFEST_FILE)).unwrap();
    fs::write(other.join(CONFIG_FILE), r#"{"version":99}"#).unwrap();
    send("other").failed(5, "which another version may have written");
}

#[test]
fn options_that_make_no_sense_are_refused() {
    let place = Place::new();
    let from = place.stored("from", 1);
    let send = |url: &str, options: &[&str]| Tool::send(url, &from, options).end();
    send("tcp:127.0.0.1", &[]).failed(2, "has no port");
    send("http://example.org", &[]).failed(2, "begins with neither");
    send("tcp:127.0.0.1:1", &["--connections", "129"]).failed(2, "not between 1 and 128");
    send("tcp:127.0.0.1:1", &["--connections", "0"]).failed(2, "not between 1 and 128");
    send("tcp:127.0.0.1:1", &["--memory-mode", "postcopy"]).failed(2, "the DMA of a device cannot wait");
    let socket = format!("unix:{}", place.path("socket").display());
    send(&socket, &["--connections", "2"]).failed(2, "2 connections take a TCP address");
    send("tcp:127.0.0.1:1", &["--bandwidth", "0"]).failed(2, "rate limit is 0");
}

#[test]
fn a_place_that_is_taken_is_refused_before_a_source_may_come() {
    let place = Place::new();
    let receive = |url: &str, into: &str| {
        let into = place.path(into);
        Tool::start(["receive", url, "--into", into.to_str().unwrap(), "--json"]).end()
    };
    let taken = place.stored("taken", 1);
    receive("tcp:127.0.0.1:0", "taken").failed(2, "exists and is not an empty directory");
    crate::stored::assert_sound(&taken);
    fs::write(place.path("file"), "text").unwrap();
    receive("tcp:127.0.0.1:0", "file").failed(2, "exists and is not an empty directory");
    receive("tcp:127.0.0.1:0", "absent/into").failed(4, "Cannot make a directory");
    receive("tcp:127.0.0.1", "into").failed(2, "has no port");

    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("tcp:{}", listener.local_addr().unwrap());
    receive(&url, "into").failed(4, "Address already in use");
    assert!(!place.path("into").exists());
}

#[test]
fn a_full_disk_is_named_and_nothing_is_kept() {
    let (place, out) = (Place::new(), Place::new());
    let into = out.path("into");
    // No file may have more than 32 MiB.
    let script = r#"ulimit -f 65536; exec "$0" receive "unix:$1" --into "$2""#;
    let socket = place.path("socket");
    let receiver = Command::new("/bin/sh")
        .args(["-c", script, env!("CARGO_BIN_EXE_vfio-migrate")])
        .args([&socket, &into])
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    while !socket.exists() {
        thread::sleep(Duration::from_millis(10));
    }
    let url = format!("unix:{}", socket.display());
    Tool::send(&url, &place.stored("from", 1), &[]).end().failed(3, "Receiver refused");
    let ended = receiver.wait_with_output().unwrap();
    let stderr = String::from_utf8_lossy(&ended.stderr);
    assert_eq!(ended.status.code(), Some(4), "{stderr}");
    assert!(stderr.contains("memory-ranges"), "{stderr}");
    assert!(crate::tool::is_empty(out.root()));
}

#[test]
fn a_file_system_that_is_full_is_named_and_nothing_is_kept() {
    let (place, out) = (Place::new(), Place::new());
    let isolated = |script: &str| {
        let mut command = Command::new("unshare");
        command.args(["-rm", "/bin/sh", "-c", script, env!("CARGO_BIN_EXE_vfio-migrate")]);
        command.arg(out.root()).arg(place.path("socket")).stderr(Stdio::piped());
        command
    };
    if !isolated(r#"mount -t tmpfs none "$1""#).status().is_ok_and(|status| status.success()) {
        return skip("cannot mount a small file system with unshare");
    }
    // 13 MiB are to come.
    let script = r#"mount -t tmpfs -o size=8m none "$1" || exit 99
        "$0" receive "unix:$2" --into "$1/into"; code=$?; echo "left: $(ls -A "$1")." >&2; exit $code"#;
    let receiver = isolated(script).spawn().unwrap();
    while !place.path("socket").exists() {
        thread::sleep(Duration::from_millis(10));
    }
    let url = format!("unix:{}", place.path("socket").display());
    Tool::send(&url, &place.stored("from", 1), &[]).end().failed(3, "Receiver refused");
    let ended = receiver.wait_with_output().unwrap();
    let stderr = String::from_utf8_lossy(&ended.stderr);
    assert_eq!(ended.status.code(), Some(4), "{stderr}");
    assert!(stderr.contains("Destination cannot keep the pages of Memory: "), "{stderr}");
    assert!(stderr.contains("os error 28"), "no space left: {stderr}");
    assert!(stderr.contains("left: ."), "{stderr}");
}
