// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A source that says what it is told to, in bytes spelled out here.

use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use crate::frames::{COMPLETE, CONFIG, OK, START, STATE, config_document, message, state_document, table};
use crate::stored::Place;
use crate::tool::{Ended, Tool, is_empty};

/// Bytes of RAM of the VM that comes over the wire.
pub(crate) const RAM: u64 = 1 << 20;

/// The configuration of a VM without disks.
pub(crate) const NO_DISKS: &str = r#"{"memory":{"size":1048576},"disks":null}"#;

/// Encodes a Config with `vm_config`.
pub(crate) fn config(vm_config: &str) -> Vec<u8> {
    message(CONFIG, config_document(vm_config, &[(0, RAM)]).as_bytes())
}

/// Encodes the State that goes with every Config.
pub(crate) fn state() -> Vec<u8> {
    message(STATE, state_document(&[(0, RAM)]).as_bytes())
}

/// Encodes a Memory with all RAM, filled with `byte`.
pub(crate) fn memory(byte: u8) -> Vec<u8> {
    let pages = vec![byte; usize::try_from(RAM).unwrap()];
    [table(&[(0, RAM)]), pages].concat()
}

/// The messages up to the last page.
pub(crate) fn precopy(vm_config: &str) -> Vec<Vec<u8>> {
    vec![message(START, b""), config(vm_config), memory(7)]
}

/// A whole migration.
pub(crate) fn migration(vm_config: &str) -> Vec<Vec<u8>> {
    [precopy(vm_config), vec![state(), message(COMPLETE, b"")]].concat()
}

/// A receiver under test.
pub(crate) struct Target {
    pub(crate) place: Place,
    tool: Tool,
    address: String,
}

impl Target {
    pub(crate) fn new(options: &[&str]) -> Self {
        let place = Place::new();
        Self::waiting(Tool::receive("tcp:127.0.0.1:0", &place.path("into"), options), place)
    }

    /// A receiver that waits, and the place that it receives into.
    pub(crate) fn waiting((tool, url): (Tool, String), place: Place) -> Self {
        let address = url.strip_prefix("tcp:").unwrap().to_owned();
        Self { place, tool, address }
    }

    pub(crate) fn kept(&self) -> PathBuf {
        self.place.path("into")
    }

    pub(crate) fn connect(&self) -> Source {
        Source::connect(&self.address)
    }

    /// Connects and sends `messages` one after the other for as long as they are answered with Ok; returns the last answer.
    pub(crate) fn tell(&self, messages: &[Vec<u8>]) -> (Source, Option<u16>) {
        let mut source = self.connect();
        let mut last = None;
        for message in messages {
            last = source.ask(message);
            if last != Some(OK) {
                break;
            }
        }
        (source, last)
    }

    /// Waits for the end of the receiver.
    pub(crate) fn end(self) -> (Ended, Place) {
        (self.tool.end(), self.place)
    }

    /// Checks that the receiver ends soon, as the fault of its peer, names `what` and leaves nothing behind.
    #[track_caller]
    pub(crate) fn refuses(self, what: &str) {
        let begun = Instant::now();
        let (ended, place) = self.end();
        ended.failed(3, what);
        assert!(begun.elapsed() < Duration::from_secs(10), "{:?}", begun.elapsed());
        assert!(is_empty(place.root()), "something is left behind");
    }
}

/// A connection to a receiver.
pub(crate) struct Source(TcpStream);

impl Source {
    pub(crate) fn connect(address: &str) -> Self {
        let stream = TcpStream::connect(address).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        Self(stream)
    }

    /// Sends bytes; a receiver that has gone away is no failure of the test's source.
    pub(crate) fn send(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.0.write_all(bytes)
    }

    /// Sends a message, whole or not; returns the status of its answer, if there is one.
    pub(crate) fn ask(&mut self, message: &[u8]) -> Option<u16> {
        // Refused half way, the rest of a message finds no reader.
        let _ = self.send(message);
        let mut answer = [0; 16];
        self.0.read_exact(&mut answer).ok().map(|()| u16::from_le_bytes([answer[0], answer[1]]))
    }
}
