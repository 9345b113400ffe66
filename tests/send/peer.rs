// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A receiver that knows the protocol from its description alone, decodes byte by byte, and misbehaves on demand.

use std::collections::HashMap;
use std::io::{self, Read, Write};
use std::net::TcpListener;
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use vfio_migration::transfer::url::Url;

use crate::frames::{ABANDON, COMPLETE, COMPLETE_PAUSED, CONFIG, FOR_MEMORY, MEMORY, STATE};
use crate::vm::{FakeVm, PAGE, PAGES, page_gpa};

/// How the receiver misbehaves.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Fault {
    None,
    /// Closes everything instead of answering the request of this number, over all connections, from 0.
    CloseAtRequest(usize),
    /// Closes everything after so many bytes have come.
    CloseAfterBytes(usize),
    /// Answers this command with an Error.
    Refuse(u16),
    /// Answers this command twice, and a Complete with an Error.
    AnswerTwice(u16),
    /// Reads the header of this command, and then neither reads nor answers, until the source goes away.
    Ignore(u16),
    /// Neither reads nor answers what comes of memory once there was as much as there is RAM.
    IgnoreSecondPass,
    /// Waits so long before it answers each Memory.
    Slow(Duration),
    /// Waits so long before it answers State.
    SlowState(Duration),
}

/// One request as it came.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Seen {
    pub(crate) connection: usize,
    pub(crate) command: u16,
    pub(crate) headers: [u8; 6],
    /// The ranges of a Memory.
    pub(crate) table: Vec<(u64, u64)>,
    /// The payload of anything else.
    pub(crate) payload: Vec<u8>,
}

#[derive(Default)]
pub(crate) struct Transcript {
    pub(crate) seen: Vec<Seen>,
    pub(crate) pages: HashMap<u64, Vec<u8>>,
    pub(crate) bytes: usize,
    /// Everything the first connection brought.
    pub(crate) raw: Vec<u8>,
}

impl Transcript {
    pub(crate) fn commands(&self) -> Vec<u16> {
        self.seen.iter().map(|seen| seen.command).collect()
    }

    pub(crate) fn of(&self, command: u16) -> Vec<&Seen> {
        self.seen.iter().filter(|seen| seen.command == command).collect()
    }

    pub(crate) fn assert_equals(&self, vm: &FakeVm) {
        let wrong = (0..PAGES).filter(|&page| self.pages.get(&page_gpa(page)) != Some(&vm.page(page)));
        assert_eq!(wrong.collect::<Vec<_>>(), Vec::<u64>::new(), "pages that differ");
    }
}

trait Stream: Read + Write + Send {}
impl<T: Read + Write + Send> Stream for T {}

enum Acceptor {
    Unix(UnixListener),
    Tcp(TcpListener),
}

impl Acceptor {
    fn accept(&self) -> io::Result<Box<dyn Stream>> {
        Ok(match self {
            Self::Unix(listener) => Box::new(listener.accept()?.0),
            Self::Tcp(listener) => {
                let stream = listener.accept()?.0;
                stream.set_nodelay(true)?;
                Box::new(stream)
            }
        })
    }
}

/// A receiver in a thread.
pub(crate) struct Peer {
    pub(crate) url: Url,
    transcript: Arc<Mutex<Transcript>>,
    thread: JoinHandle<io::Result<()>>,
    _directory: Option<tempfile::TempDir>,
}

impl Peer {
    pub(crate) fn unix(fault: Fault) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let path: PathBuf = directory.path().join("peer");
        let acceptor = Acceptor::Unix(UnixListener::bind(&path).unwrap());
        Self::start(Url::unix(path).unwrap(), acceptor, 1, fault, Some(directory))
    }

    pub(crate) fn tcp(connections: usize, fault: Fault) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = Url::tcp("127.0.0.1", listener.local_addr().unwrap().port()).unwrap();
        Self::start(url, Acceptor::Tcp(listener), connections, fault, None)
    }

    fn start(
        url: Url,
        acceptor: Acceptor,
        lanes: usize,
        fault: Fault,
        directory: Option<tempfile::TempDir>,
    ) -> Self {
        let transcript = Arc::<Mutex<Transcript>>::default();
        let shared = Arc::clone(&transcript);
        let thread = thread::spawn(move || {
            let stream = acceptor.accept()?;
            Talk { stream, connection: 0, fault, transcript: shared }.main(&acceptor, lanes)
        });
        Self { url, transcript, thread, _directory: directory }
    }

    /// What has come by now.
    pub(crate) fn look<T>(&self, look: impl FnOnce(&Transcript) -> T) -> T {
        look(&self.transcript.lock().unwrap())
    }

    /// Waits until so many requests have come.
    pub(crate) fn await_command(&self, command: u16) {
        for _ in 0..5000 {
            if self.look(|transcript| transcript.seen.iter().any(|seen| seen.command == command)) {
                return;
            }
            thread::sleep(Duration::from_millis(2));
        }
        panic!("no command {command} has come");
    }

    /// Waits for the end of the conversation.
    pub(crate) fn end(self) -> (Transcript, io::Result<()>) {
        let outcome = self.thread.join().unwrap();
        (std::mem::take(&mut *self.transcript.lock().unwrap()), outcome)
    }
}

struct Talk {
    stream: Box<dyn Stream>,
    connection: usize,
    fault: Fault,
    transcript: Arc<Mutex<Transcript>>,
}

impl Talk {
    fn main(mut self, acceptor: &Acceptor, lanes: usize) -> io::Result<()> {
        let mut threads = Vec::new();
        while let Some(command) = self.request()? {
            if command == CONFIG && lanes > 1 {
                for connection in 1..=lanes {
                    let stream = acceptor.accept()?;
                    let transcript = Arc::clone(&self.transcript);
                    let talk = Talk { stream, connection, fault: self.fault, transcript };
                    threads.push(thread::spawn(move || talk.lane()));
                }
            }
            if [COMPLETE, COMPLETE_PAUSED, ABANDON].contains(&command) {
                break;
            }
        }
        drop(self);
        threads.into_iter().try_for_each(|thread| thread.join().unwrap())
    }

    fn lane(mut self) -> io::Result<()> {
        let mut role = [0; 2];
        self.read(&mut role)?;
        assert_eq!(role, FOR_MEMORY, "role of an additional connection");
        while let Some(command) = self.request()? {
            assert_eq!(command, MEMORY, "additional connections carry memory only");
        }
        Ok(())
    }

    /// Takes one request and answers it; `None` at the end between two requests.
    fn request(&mut self) -> io::Result<Option<u16>> {
        let mut header = [0; 16];
        match self.read(&mut header[..1]) {
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
            other => other?,
        }
        self.read(&mut header[1..])?;
        let command = u16::from_le_bytes(header[..2].try_into().unwrap());
        let length = u64::from_le_bytes(header[8..].try_into().unwrap());
        let headers = header[2..8].try_into().unwrap();
        if self.fault == Fault::Ignore(command) || self.is_ignored_second_pass(command) {
            let seen = Seen { connection: self.connection, command, headers, table: vec![], payload: vec![] };
            self.transcript.lock().unwrap().seen.push(seen);
            return self.sit_there();
        }
        let mut payload = vec![0; usize::try_from(length).unwrap()];
        self.read(&mut payload)?;
        let mut table = Vec::new();
        if command == MEMORY {
            assert!(length > 0 && length % 16 == 0, "table of {length} bytes");
            for entry in payload.chunks(16) {
                let gpa = u64::from_le_bytes(entry[..8].try_into().unwrap());
                let length = u64::from_le_bytes(entry[8..].try_into().unwrap());
                table.push((gpa, length));
            }
            payload.clear();
            for &(gpa, length) in &table {
                for page in (gpa..gpa + length).step_by(PAGE as usize) {
                    let mut bytes = vec![0; PAGE as usize];
                    self.read(&mut bytes)?;
                    self.transcript.lock().unwrap().pages.insert(page, bytes);
                }
            }
        }
        let seen = Seen { connection: self.connection, command, headers, table, payload };
        let index = {
            let mut transcript = self.transcript.lock().unwrap();
            transcript.seen.push(seen);
            transcript.seen.len() - 1
        };
        if matches!(self.fault, Fault::CloseAtRequest(at) if index >= at) {
            return Err(io::Error::other("closed on purpose"));
        }
        if let (Fault::Slow(time), MEMORY) | (Fault::SlowState(time), STATE) = (self.fault, command) {
            thread::sleep(time);
        }
        let twice = self.fault == Fault::AnswerTwice(command);
        let refused = match self.fault {
            Fault::Refuse(refused) => command == refused,
            Fault::AnswerTwice(_) => command == COMPLETE,
            _ => false,
        };
        let mut response = [0; 16];
        response[0] = if refused { 2 } else { 1 };
        self.stream.write_all(&response.repeat(if twice { 2 } else { 1 }))?;
        Ok(Some(command))
    }

    fn is_ignored_second_pass(&self, command: u16) -> bool {
        let bytes = self.transcript.lock().unwrap().bytes as u64;
        self.fault == Fault::IgnoreSecondPass && command == MEMORY && bytes > PAGES * PAGE
    }

    fn sit_there(&mut self) -> io::Result<Option<u16>> {
        // Long enough for any test; a source that is gone leaves nobody waiting.
        thread::sleep(Duration::from_secs(2));
        Ok(None)
    }

    fn read(&mut self, buffer: &mut [u8]) -> io::Result<()> {
        self.stream.read_exact(buffer)?;
        let mut transcript = self.transcript.lock().unwrap();
        transcript.bytes += buffer.len();
        if self.connection == 0 {
            transcript.raw.extend_from_slice(buffer);
        }
        if matches!(self.fault, Fault::CloseAfterBytes(bytes) if transcript.bytes >= bytes) {
            return Err(io::Error::other("closed on purpose"));
        }
        Ok(())
    }
}
