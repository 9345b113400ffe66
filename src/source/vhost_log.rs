// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! vhost-user's dirty log: shared memory in which a back end sets a bit for each 4 KiB of guest memory that it writes.

use std::error::Error;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::{AtomicU64, Ordering};

use thiserror::Error;

use super::{Cover, DirtySource, Operation, PluggedRam, Reports, Sink, SourceError};
use crate::bitmap::WORD_BITS;
use crate::granule::Granule;
use crate::iova::IovaMap;
use crate::layout::Layout;
use crate::range::GpaRange;
use crate::sys::shared_words::SharedWords;

/// What an embedder's vhost-user connection says when a message fails.
pub type VhostUserError = Box<dyn Error + Send + Sync>;

/// The memory of a log, as `VHOST_USER_SET_LOG_BASE` names it to a back end.
#[derive(Debug, Clone, Copy)]
pub struct LogBase<'a> {
    memory: &'a SharedWords,
}

impl LogBase<'_> {
    /// The memory file, for the message's ancillary data. Sealed against shrinking and growing.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.memory.as_fd()
    }

    /// `mmap_size`: bytes of the log, whole host pages.
    pub fn mmap_size(&self) -> u64 {
        self.memory.bytes()
    }

    /// `mmap_offset`: where the log begins in the file.
    pub fn mmap_offset(&self) -> u64 {
        0
    }
}

/// A back end's answer to a log that was offered to it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LogBaseAnswer {
    /// The back end has answered, and from now on sets bits in this log alone.
    Taken,
    /// All rings are stopped, `VHOST_USER_GET_VRING_BASE` of each answered: nothing more is written. The back end may be gone by now;
    /// what it logged is in the memory it was given before, and is read from there.
    Stopped,
}

/// The vhost-user messages that make a back end log: the embedder sends them over its own connection.
///
/// [`VhostUserLog`] calls these in the order the protocol needs. The protocol features `LOG_SHMFD` and, so that an
/// answer means that a message was heeded, `REPLY_ACK` are negotiated. If the guest's driver has not set the device
/// up yet, no message can be sent: store the request, send it when the device is set up, and return
/// [`LogBaseAnswer::Stopped`] until then.
pub trait VhostUserBackEnd: Send {
    /// Sends `VHOST_USER_SET_LOG_BASE` and returns once the back end has answered; without an answer it must return
    /// an error.
    ///
    /// # Errors
    /// The back end did not answer, or refused. It may log to either memory from now on; both are read.
    fn set_log_base(&mut self, log: LogBase<'_>) -> Result<LogBaseAnswer, VhostUserError>;

    /// Sends `VHOST_USER_SET_FEATURES`: what was negotiated, with `VHOST_F_LOG_ALL` where `on`.
    ///
    /// # Errors
    /// The back end did not offer the feature, or did not answer.
    fn log_all(&mut self, on: bool) -> Result<(), VhostUserError>;

    /// Sends `VHOST_USER_SET_VRING_ADDR` for each ring: where `on`, with `VHOST_VRING_F_LOG` among its flags and the used ring's
    /// guest-physical address as `log_guest_addr`.
    ///
    /// `VHOST_F_LOG_ALL` alone covers buffers but not the used rings, and a stale used ring hangs the device at the
    /// destination. A ring that the driver sets up again while the log is on needs the same flag.
    ///
    /// # Errors
    /// The back end did not answer.
    fn log_used_rings(&mut self, on: bool) -> Result<(), VhostUserError>;
}

/// Why a back end's log cannot be used.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum VhostUserLogError {
    /// There is no memory for the log.
    #[error("Cannot make a log of {bytes} bytes")]
    Memory {
        /// Its size.
        bytes: u64,
        /// What the kernel said.
        source: io::Error,
    },
    /// The back end does not take a log.
    #[error("Back end does not take a log of {bytes} bytes")]
    LogBase {
        /// Its size.
        bytes: u64,
        /// What the connection said.
        source: VhostUserError,
    },
    /// Logging could not be switched.
    #[error("Cannot switch logging of {what} {}", if *.on { "on" } else { "off" })]
    Switch {
        /// What would be logged.
        what: &'static str,
        /// On or off.
        on: bool,
        /// What the connection said.
        source: VhostUserError,
    },
}

/// The two alternating logs: the one the back end sets bits in, and the one it gets next.
#[derive(Debug)]
struct Logs {
    given: SharedWords,
    spare: SharedWords,
    /// Logs that were too short for RAM plugged in, or were offered and not answered for. The back end may set bits in them until it has
    /// taken another one.
    replaced: Vec<SharedWords>,
    /// Logs that the back end has given up for another one at the last collect; a thread of it that was late may still set bits in them.
    given_up: Vec<SharedWords>,
}

impl Logs {
    fn new(words: usize) -> Result<Self, VhostUserLogError> {
        Ok(Self {
            given: new_log(words)?,
            spare: new_log(words)?,
            replaced: Vec::new(),
            given_up: Vec::new(),
        })
    }

    fn is_shorter_than(&self, words: usize) -> bool {
        [&self.given, &self.spare].into_iter().any(|log| log.words().len() < words)
    }

    /// Takes the bits of all RAM out of every log that the back end is not meant to use now.
    fn drain_others(&self, words: &mut [u64], sink: &mut Sink<'_>) {
        let others = self.replaced.iter().chain(&self.given_up).chain([&self.spare]);
        others.for_each(|log| drain(log, words, sink));
    }
}

/// The dirty log of one vhost-user back end, at one bit per 4 KiB of guest-physical memory whatever the host's page size.
///
/// Each collect gives the back end another log before it reads the one that it had, so that no bit is set in what was
/// read already. Two logs take turns, and both are read each time: one that the back end went on using, because the
/// answer to a swap got lost or a thread of it was late, gives up its bits at the next collect. A log that was too
/// short for plugged-in RAM is read the same way. A failed swap changes nothing.
///
/// The memory is the library's own: it outlives the back end. When the rings are stopped and the back end is about to
/// go, or has gone, [`LogBaseAnswer::Stopped`] makes the last collect read its bits. A back end that died without
/// that is a failed read: it may have written pages before it set their bits.
///
/// The log reaches from address 0 to the highest byte of RAM. Where RAM is plugged in above that, the back end is
/// given a longer one before [`crate::tracker::Tracker::add_ram`] returns: give it the RAM itself afterwards, since
/// some back ends end themselves when they write past the end of their log. If the back end refuses, the RAM is
/// refused. [`VhostUserLog::reaching`] makes the log long enough from the start; its memory is allocated page by page
/// as bits are set.
#[derive(Debug)]
pub struct VhostUserLog<B> {
    id: String,
    back_end: B,
    least_end: u64,
    logs: Option<Logs>,
    words: Vec<u64>,
}

/// Bytes of guest memory that a word of the log stands for.
const WORD_SPAN: u64 = WORD_BITS as u64 * Granule::KIB_4.bytes();

/// Words that are taken and handed on at a time.
const BUFFER_WORDS: usize = 512;

impl<B: VhostUserBackEnd> VhostUserLog<B> {
    /// Makes the source `id` of what `back_end` writes; its log is off until [`DirtySource::start`].
    pub fn new(id: impl Into<String>, back_end: B) -> Self {
        Self { id: id.into(), back_end, least_end: 0, logs: None, words: vec![0; BUFFER_WORDS] }
    }

    /// Makes the log long enough for RAM up to, not including, `end_gpa`, whatever the VM has now.
    #[must_use]
    pub fn reaching(self, end_gpa: u64) -> Self {
        Self { least_end: end_gpa, ..self }
    }

    fn try_start(&mut self, layout: &Layout) -> Result<Logs, VhostUserLogError> {
        let logs = Logs::new(self.words_needed(layout))?;
        offer(&mut self.back_end, &logs.given)?;
        if let Err(error) = self.switch_on() {
            let _already_failing = self.switch_off();
            return Err(error);
        }
        Ok(logs)
    }

    fn switch_on(&mut self) -> Result<(), VhostUserLogError> {
        switched(BUFFERS, true, self.back_end.log_all(true))?;
        switched(USED_RINGS, true, self.back_end.log_used_rings(true))
    }

    /// Switches both off, whichever fails.
    fn switch_off(&mut self) -> Result<(), VhostUserLogError> {
        let rings = switched(USED_RINGS, false, self.back_end.log_used_rings(false));
        rings.and(switched(BUFFERS, false, self.back_end.log_all(false)))
    }

    fn try_collect(&mut self, logs: &mut Logs, sink: &mut Sink<'_>) -> Result<(), VhostUserLogError> {
        // A log that is offered starts empty but for bits that come while it is: those that came late are taken out before.
        logs.drain_others(&mut self.words, sink);
        let needed = self.words_needed(sink.layout());
        if logs.spare.words().len() < needed {
            let short = std::mem::replace(&mut logs.spare, new_log(needed)?);
            logs.replaced.push(short);
        }
        match offer(&mut self.back_end, &logs.spare)? {
            LogBaseAnswer::Taken => {
                std::mem::swap(&mut logs.given, &mut logs.spare);
                logs.drain_others(&mut self.words, sink);
                logs.given_up = std::mem::take(&mut logs.replaced);
            }
            LogBaseAnswer::Stopped => {
                drain(&logs.given, &mut self.words, sink);
                logs.drain_others(&mut self.words, sink);
            }
        }
        Ok(())
    }

    /// Gives the back end a log that reaches RAM up to `end`. There is nowhere to report to: what it had is read by the next collect.
    fn try_plug(&mut self, logs: &mut Logs, end: u64) -> Result<(), VhostUserLogError> {
        let needed = self.words_reaching(end);
        if !logs.is_shorter_than(needed) {
            return Ok(());
        }
        let longer = new_log(needed)?;
        let old = match offer(&mut self.back_end, &longer) {
            Ok(LogBaseAnswer::Taken) => std::mem::replace(&mut logs.given, longer),
            // Once its rings are set up again it may be given what it was offered last.
            Ok(LogBaseAnswer::Stopped) => std::mem::replace(&mut logs.spare, longer),
            Err(error) => {
                logs.replaced.push(longer);
                return Err(error);
            }
        };
        logs.replaced.push(old);
        Ok(())
    }

    /// Counts the words of a log that reaches to the end of RAM.
    fn words_needed(&self, layout: &Layout) -> usize {
        self.words_reaching(layout.regions().last().map_or(0, |region| region.range().end()))
    }

    /// Counts the words of a log that reaches to `end`, filled up to whole host pages.
    fn words_reaching(&self, end: u64) -> usize {
        let bytes = end.max(self.least_end).max(1).div_ceil(WORD_SPAN) * size_of::<u64>() as u64;
        let bytes = bytes.next_multiple_of(Granule::host_page().bytes());
        usize::try_from(bytes).unwrap_or(usize::MAX) / size_of::<u64>()
    }
}

const BUFFERS: &str = "buffers";
const USED_RINGS: &str = "used rings";

fn switched(
    what: &'static str,
    on: bool,
    answer: Result<(), VhostUserError>,
) -> Result<(), VhostUserLogError> {
    answer.map_err(|source| VhostUserLogError::Switch { what, on, source })
}

fn new_log(words: usize) -> Result<SharedWords, VhostUserLogError> {
    let bytes = (words as u64).saturating_mul(size_of::<u64>() as u64);
    SharedWords::new("vhost-user-log", words).map_err(|source| VhostUserLogError::Memory { bytes, source })
}

fn offer(
    back_end: &mut impl VhostUserBackEnd,
    memory: &SharedWords,
) -> Result<LogBaseAnswer, VhostUserLogError> {
    let bytes = memory.bytes();
    back_end.set_log_base(LogBase { memory }).map_err(|source| VhostUserLogError::LogBase { bytes, source })
}

/// Takes the bits of all RAM out of `log`, through the buffer `words`.
fn drain(log: &SharedWords, words: &mut [u64], sink: &mut Sink<'_>) {
    let layout = sink.layout();
    for region in layout.regions() {
        let index = |word: u64| usize::try_from(word).unwrap_or(usize::MAX).min(log.words().len());
        let first = index(region.range().start() / WORD_SPAN);
        let end = index(region.range().end().div_ceil(WORD_SPAN));
        for start in (first..end).step_by(words.len()) {
            let shared = &log.words()[start..end.min(start + words.len())];
            if take(shared, words) {
                let gpa = GpaRange::new(start as u64 * WORD_SPAN, shared.len() as u64 * WORD_SPAN);
                let gpa = gpa.expect("a log that is mapped is shorter than the address space");
                sink.gpa_words(gpa, Granule::KIB_4, words).expect("a word for each 64 pages");
            }
        }
    }
}

/// Moves the bits of `shared` into the first `words`; returns whether there are any.
///
/// The back end sees the log as bytes, the lowest page in the lowest bit of the first: a little-endian word. It sets bits after it wrote
/// the page; the exchange takes them before the page is read.
fn take(shared: &[AtomicU64], words: &mut [u64]) -> bool {
    let mut any = 0;
    for (word, bits) in words.iter_mut().zip(shared) {
        let idle = bits.load(Ordering::Relaxed) == 0;
        *word = if idle { 0 } else { u64::from_le(bits.swap(0, Ordering::SeqCst)) };
        any |= *word;
    }
    any != 0
}

impl<B: VhostUserBackEnd> DirtySource for VhostUserLog<B> {
    fn id(&self) -> &str {
        &self.id
    }

    fn reports(&self) -> Reports {
        Reports::Component
    }

    /// All RAM: a back end may write wherever its memory table leads.
    fn cover(&self) -> Cover {
        Cover::everything()
    }

    /// Gives the back end a log, then makes it log buffers, then used rings.
    fn start(&mut self, layout: &Layout, _iova: &IovaMap) -> Result<(), SourceError> {
        if self.logs.is_none() {
            let started = self.try_start(layout);
            self.logs = Some(started.map_err(|cause| SourceError::new(&self.id, Operation::Start, cause))?);
        }
        Ok(())
    }

    fn collect(&mut self, sink: &mut Sink<'_>) -> Result<(), SourceError> {
        let Some(mut logs) = self.logs.take() else { return Ok(()) };
        let collected = self.try_collect(&mut logs, sink);
        self.logs = Some(logs);
        collected.map_err(|cause| SourceError::new(&self.id, Operation::Collect, cause))
    }

    /// Gives the back end a log that reaches the new RAM.
    fn plugged(&mut self, ram: &PluggedRam) -> Result<(), SourceError> {
        let Some(mut logs) = self.logs.take() else { return Ok(()) };
        let plugged = self.try_plug(&mut logs, ram.gpa.end());
        self.logs = Some(logs);
        plugged.map_err(|cause| SourceError::new(&self.id, Operation::Plugged, cause))
    }

    fn stop(&mut self) -> Result<(), SourceError> {
        if self.logs.is_none() {
            return Ok(());
        }
        let stopped = self.switch_off();
        self.logs = None;
        stopped.map_err(|cause| SourceError::new(&self.id, Operation::Stop, cause))
    }
}

#[cfg(test)]
mod tests;
