// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Standard output and standard error, each written on a thread of its own.
//!
//! Whoever does the work hands text over and goes on: a pipe that nobody reads, a disk that is full or a stopped terminal
//! delays nothing and fails nothing. Only at the end does the command wait for whoever reads, and no longer than [`STALL`].

use std::collections::VecDeque;
use std::fmt;
use std::io;
use std::os::fd::BorrowedFd;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::Builder;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::{Errno, ioctl_fionread, write};
use rustix::stdio::{stderr, stdout};

/// How long nothing may be read before the end of the command stops waiting.
const STALL: Duration = Duration::from_secs(10);

/// Bytes that may wait before text that can be done without is left out.
const WAITING_BYTES: usize = 1 << 20;

/// Bytes written at once: a pipe that is ready takes as many without waiting.
const PIECE_BYTES: usize = 4096;

/// Standard output.
pub(crate) static STDOUT: Printer = Printer::new(Stream::Output);

/// Standard error.
pub(crate) static STDERR: Printer = Printer::new(Stream::Error);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stream {
    Output,
    Error,
}

/// Who reads, and so how long the end of the command waits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Reader {
    /// Perhaps somebody who starts processes and waits for their end: no longer than [`STALL`] without a read.
    Any,
    /// Perhaps a pager: as long as it takes, once it has read anything.
    Pager,
}

/// Why not all text was written.
#[derive(Debug)]
pub(crate) enum Unwritten {
    /// A write failed.
    Failed(io::Error),
    /// Nobody reads it.
    Unread {
        /// Bytes that are left.
        bytes: usize,
    },
}

impl Unwritten {
    /// Whether the reader has enough, as `head` has.
    pub(crate) fn is_enough(&self) -> bool {
        matches!(self, Self::Failed(error) if error.kind() == io::ErrorKind::BrokenPipe)
    }
}

impl fmt::Display for Unwritten {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Failed(error) => error.fmt(f),
            Self::Unread { bytes: 1 } => f.write_str("nobody reads the last byte"),
            Self::Unread { bytes } => write!(f, "nobody reads the last {bytes} bytes"),
        }
    }
}

/// What waits to be written.
struct State {
    texts: VecDeque<Vec<u8>>,
    /// Bytes in `texts`, and in the one being written.
    waiting_bytes: usize,
    written_bytes: u64,
    /// When a byte was written last, or began to wait.
    moved: Option<Instant>,
    has_thread: bool,
    failed: Option<io::Error>,
}

/// Writes to one stream.
pub(crate) struct Printer {
    stream: Stream,
    state: Mutex<State>,
    changed: Condvar,
}

impl Printer {
    const fn new(stream: Stream) -> Self {
        let state = State {
            texts: VecDeque::new(),
            waiting_bytes: 0,
            written_bytes: 0,
            moved: None,
            has_thread: false,
            failed: None,
        };
        Self { stream, state: Mutex::new(state), changed: Condvar::new() }
    }

    /// Has `text` written; never waits.
    pub(crate) fn print(&'static self, text: impl Into<Vec<u8>>) {
        self.add(self.lock(), text.into());
    }

    /// Has `text` written, unless much is waiting already: then it is left out, and `false` comes back.
    pub(crate) fn offer(&'static self, text: impl Into<Vec<u8>>) -> bool {
        let state = self.lock();
        let has_room = state.waiting_bytes < WAITING_BYTES;
        if has_room {
            self.add(state, text.into());
        }
        has_room
    }

    fn add(&'static self, mut state: MutexGuard<'_, State>, text: Vec<u8>) {
        if state.waiting_bytes == 0 {
            state.moved = Some(Instant::now());
        }
        state.waiting_bytes += text.len();
        state.texts.push_back(text);
        if !state.has_thread {
            // Where there is no thread to be had, the next text or the end of the command sees to it.
            state.has_thread = Builder::new().name("print".into()).spawn(|| self.keep_writing()).is_ok();
        }
        self.changed.notify_all();
    }

    /// Waits until all is written, as long as whoever reads does.
    ///
    /// # Errors
    /// Some of it was not written, now or before.
    pub(crate) fn finish(&'static self, reader: Reader) -> Result<(), Unwritten> {
        let mut state = self.lock();
        if !state.has_thread {
            drop(state);
            self.write_here();
            state = self.lock();
        }
        while state.waiting_bytes > 0 {
            let stalled = state.moved.is_some_and(|moved| moved.elapsed() >= STALL);
            if stalled && !(reader == Reader::Pager && self.is_read(state.written_bytes)) {
                return Err(Unwritten::Unread { bytes: state.waiting_bytes });
            }
            let waited = self.changed.wait_timeout(state, STALL / 100);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        state.failed.take().map_or(Ok(()), |error| Err(Unwritten::Failed(error)))
    }

    /// Whether somebody has read of the `written` bytes: a pipe has fewer in it.
    fn is_read(&self, written: u64) -> bool {
        ioctl_fionread(self.descriptor()).is_ok_and(|unread| unread < written)
    }

    fn keep_writing(&self) {
        let mut state = self.lock();
        loop {
            while let Some(text) = state.texts.pop_front() {
                drop(state);
                let outcome = self.write_all(&text, None);
                state = self.note(&text, outcome);
            }
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Writes what waits where no thread can be had to do it.
    fn write_here(&self) {
        let mut state = self.lock();
        while let Some(text) = state.texts.pop_front() {
            drop(state);
            let outcome = self.write_all(&text, Some(STALL));
            state = self.note(&text, outcome);
        }
    }

    fn note(&self, text: &[u8], outcome: io::Result<()>) -> MutexGuard<'_, State> {
        let mut state = self.lock();
        state.waiting_bytes -= text.len();
        if let Err(error) = outcome {
            state.failed = Some(error);
        }
        self.changed.notify_all();
        state
    }

    /// Writes `text`, and waits at most `patience` for the stream to take the next piece of it.
    fn write_all(&self, mut text: &[u8], patience: Option<Duration>) -> io::Result<()> {
        while !text.is_empty() {
            self.await_ready(patience)?;
            match write(self.descriptor(), &text[..text.len().min(PIECE_BYTES)]) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(written) => {
                    text = &text[written..];
                    let mut state = self.lock();
                    state.written_bytes += written as u64;
                    state.moved = Some(Instant::now());
                }
                Err(Errno::INTR | Errno::AGAIN) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    fn await_ready(&self, patience: Option<Duration>) -> io::Result<()> {
        let limit = patience.and_then(|patience| Timespec::try_from(patience).ok());
        match poll(&mut [PollFd::from_borrowed_fd(self.descriptor(), PollFlags::OUT)], limit.as_ref()) {
            Ok(0) => Err(io::ErrorKind::TimedOut.into()),
            Ok(_) | Err(Errno::INTR) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    fn descriptor(&self) -> BorrowedFd<'static> {
        match self.stream {
            Stream::Output => stdout(),
            Stream::Error => stderr(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // The state holds together after every statement, so also after a panic of one who held it.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
