// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Answers a receiver's requests for pages.

use std::io::{Read, Write};
use std::time::{Duration, Instant};

use super::asked::Asked;
use super::error::LocalSendError;
use super::handle::LocalSenderHandle;
use super::memory::VmMemory;
use super::prefetch::Prefetch;
use super::supply::Supply;
use crate::range::GpaRange;
use crate::transfer::connection::{Connection, Head};
use crate::transfer::frame::{Command, HEADER_BYTES, RANGE_BYTES, Request, Response, Status};
use crate::transfer::limits::GUEST_PAGE_BYTES;

/// How often a wait for the next request looks whether it is still waited for.
const TICK: Duration = Duration::from_millis(20);

/// How long a receiver that has asked for everything may be silent without closing the connection. It may ask for a page again.
const GOODBYE: Duration = Duration::from_secs(60);

/// The largest page that a host has.
const LARGEST_PAGE_BYTES: u64 = 1 << 30;

/// The connection that a receiver asks for pages on.
pub(super) struct FaultServer<'a> {
    connection: Connection,
    supply: &'a Supply<'a>,
    memory: &'a VmMemory,
    prefetch: &'a Prefetch,
    handle: &'a LocalSenderHandle,
    asked: Asked,
    /// The receiver has all memory.
    is_over: bool,
}

/// Before the connection closes, and a vCPU that waits goes on, memory that is not whole is taken away.
impl Drop for FaultServer<'_> {
    fn drop(&mut self) {
        if !self.is_over {
            self.take_away();
        }
    }
}

impl<'a> FaultServer<'a> {
    /// Serves faults that come over `connection`, of a receiver that asks for all of `asked`.
    pub(super) fn new(
        connection: Connection,
        (supply, memory): (&'a Supply<'a>, &'a VmMemory),
        prefetch: &'a Prefetch,
        handle: &'a LocalSenderHandle,
        asked: Asked,
    ) -> Self {
        Self { connection, supply, memory, prefetch, handle, asked, is_over: false }
    }

    /// Answers until the receiver has asked for everything and closes the connection.
    ///
    /// # Errors
    /// A page cannot be given, or makes no sense; or the connection ended before everything was asked for. Where the receiver waits for an
    /// answer, it got an error, after the memory was taken away from it.
    pub(super) fn serve(mut self) -> Result<(), LocalSendError> {
        let served = self.serve_until_the_end();
        // Whatever else failed, failed because of that.
        if self.handle.is_aborted() && !self.is_over {
            return Err(LocalSendError::Aborted { pages: self.asked.left() });
        }
        served
    }

    fn serve_until_the_end(&mut self) -> Result<(), LocalSendError> {
        let mut scratch = Vec::new();
        let mut silent_since = None;
        loop {
            if self.prefetch.has_ended() || self.handle.is_aborted() {
                return Ok(());
            }
            match self.connection.await_head::<HEADER_BYTES>(TICK) {
                Ok(Head::Bytes(head)) => {
                    silent_since = None;
                    let began = Instant::now();
                    self.handle.begin_fault(began);
                    match self.answer(head, &mut scratch) {
                        Ok(Some(is_jump)) => self.handle.note_fault(is_jump, began.elapsed()),
                        Ok(None) => return self.ended(),
                        Err(error) => return Err(self.fail(error)),
                    }
                }
                // Whoever is gone does not care how.
                Ok(Head::End) | Err(_) => return self.ended(),
                Ok(Head::Silence) if self.asked.left() == 0 => {
                    if silent_since.get_or_insert_with(Instant::now).elapsed() > GOODBYE {
                        return self.ended();
                    }
                }
                Ok(Head::Silence) => {}
            }
        }
    }

    /// Tells the end of a VM from the end of its restore: a receiver asks for all memory, also for what was written before.
    fn ended(&mut self) -> Result<(), LocalSendError> {
        let pages = self.asked.left();
        self.is_over = (pages == 0 || self.supply.is_complete()) && self.handle.let_go();
        match pages {
            _ if !self.is_over => Err(LocalSendError::Gone { pages }),
            0 => Ok(()),
            _ => Err(LocalSendError::Unasked { pages }),
        }
    }

    /// Answers one request; returns whether the guest waited for it, or `None` where the receiver said goodbye.
    fn answer(
        &mut self,
        head: [u8; HEADER_BYTES],
        scratch: &mut Vec<u8>,
    ) -> Result<Option<bool>, LocalSendError> {
        let command = Command::PageFault;
        let request =
            Request::from_bytes(head).map_err(|source| LocalSendError::Frame { command, source })?;
        match request.command() {
            Command::PageFault if request.length() == RANGE_BYTES as u64 => {}
            Command::Abandon => return Ok(None),
            other => return Err(LocalSendError::NoFault { command: other, bytes: request.length() }),
        }
        let mut range = [0; RANGE_BYTES];
        if self.connection.read_exact(&mut range).is_err() {
            return Ok(None);
        }
        let page = self.page_of(range)?;
        if !self.supply.has(page) {
            let bring = || self.supply.bring(page, scratch);
            self.prefetch.serve(page, bring).map_err(LocalSendError::Fill)?;
        }
        let answer = Response::new(Status::Ok).to_bytes();
        if self.connection.write_all(&answer).is_err() {
            return Ok(None);
        }
        // One that got no answer did not get the page.
        let place = self.asked.note(page);
        self.handle.note_asked(place.fresh_bytes);
        if place.at_cursor {
            self.supply.holding(page).next().into_iter().for_each(|number| self.prefetch.skip_to(number));
        } else if place.is_jump {
            self.prefetch.note_fault(page);
        } else if page.start().is_multiple_of(super::prefetch::NEAR_BYTES) {
            self.prefetch.note_stream(page);
        }
        Ok(Some(place.is_jump))
    }

    /// Reads a range, and checks that it is a page of one slot.
    fn page_of(&self, bytes: [u8; RANGE_BYTES]) -> Result<GpaRange, LocalSendError> {
        let [gpa, length] = [0, 8].map(|at| {
            u64::from_le_bytes(*bytes[at..].first_chunk().expect("a range is two numbers of eight bytes"))
        });
        let is_page = length.is_power_of_two()
            && (GUEST_PAGE_BYTES..=LARGEST_PAGE_BYTES).contains(&length)
            && gpa.is_multiple_of(GUEST_PAGE_BYTES);
        let page = GpaRange::new(gpa, length).ok().filter(|&page| is_page && self.memory.holds(page));
        page.ok_or(LocalSendError::OutsideRam { gpa, length })
    }

    /// Makes sure that no vCPU goes on with what is not its memory: an error wakes it.
    fn fail(&mut self, error: LocalSendError) -> LocalSendError {
        self.take_away();
        let _it_may_be_gone = self.connection.write_all(&Response::new(Status::Error).to_bytes());
        error
    }

    fn take_away(&self) {
        self.prefetch.end();
        if let Err(error) = self.memory.take_away() {
            log::error!("Cannot take the memory away from the receiver: {error}");
        }
    }
}
