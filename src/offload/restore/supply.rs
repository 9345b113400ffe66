// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Brings blocks of a snapshot into a VM's memory while the VM runs: each once, for the guest may have written to it since.

use std::io;
use std::sync::atomic::{AtomicU8, AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

use super::handle::LocalSenderHandle;
use super::memory::VmMemory;
use crate::range::GpaRange;
use crate::snapshot::ChainBlocks;

/// How long another thread that brings a block is left alone: it takes some ten microseconds.
const MOMENT: Duration = Duration::from_micros(20);

/// Nobody has brought the block.
const ABSENT: u8 = 0;
/// Somebody brings it.
const UNDER_WAY: u8 = 1;
/// It is in memory, and no business of ours any more.
const PRESENT: u8 = 2;
/// It could not be brought, and nothing of it is in memory.
const FAILED: u8 = 3;
/// It is zeros that may stay a hole: nobody waits for it.
const HOLE: u8 = 4;

/// The blocks of a snapshot, and which of them are in memory.
#[derive(Debug)]
pub(super) struct Supply<'a> {
    blocks: &'a ChainBlocks<'a>,
    memory: &'a VmMemory,
    handle: &'a LocalSenderHandle,
    states: Vec<AtomicU8>,
    left: AtomicUsize,
}

impl<'a> Supply<'a> {
    /// Nothing is in memory yet.
    pub(super) fn of(
        blocks: &'a ChainBlocks<'a>,
        memory: &'a VmMemory,
        handle: &'a LocalSenderHandle,
    ) -> Self {
        let states: Vec<_> = (0..blocks.count()).map(|_| AtomicU8::new(ABSENT)).collect();
        let left = AtomicUsize::new(states.len());
        Self { blocks, memory, handle, states, left }
    }

    pub(super) fn count(&self) -> usize {
        self.states.len()
    }

    /// Whether every block is in memory.
    pub(super) fn is_complete(&self) -> bool {
        self.left.load(Ordering::Acquire) == 0
    }

    /// The blocks that hold any of `range`.
    pub(super) fn holding(&self, range: GpaRange) -> impl Iterator<Item = usize> + '_ {
        self.blocks.holding(range)
    }

    /// Whether all of `range` is in memory.
    pub(super) fn has(&self, range: GpaRange) -> bool {
        self.holding(range).all(|number| self.states[number].load(Ordering::Acquire) == PRESENT)
    }

    /// Brings a block, unless somebody did or does so, or failed. `scratch` is reused.
    ///
    /// # Errors
    /// The snapshot cannot be read, the block was altered, or there is no memory left. Nothing of it is in memory that was not before.
    pub(super) fn bring_ahead(&self, number: usize, scratch: &mut Vec<u8>) -> io::Result<()> {
        let is_wanted = !self.handle.is_aborted() && self.claim(number, ABSENT);
        if is_wanted { self.bring_claimed(number, ABSENT, scratch) } else { Ok(()) }
    }

    /// Brings all of `range`, and waits for what others bring of it. Blocks that could not be brought are tried again.
    ///
    /// # Errors
    /// As [`Supply::bring_ahead`].
    pub(super) fn bring(&self, range: GpaRange, scratch: &mut Vec<u8>) -> io::Result<()> {
        for number in self.holding(range) {
            loop {
                match self.states[number].load(Ordering::Acquire) {
                    PRESENT => break,
                    UNDER_WAY if self.handle.is_aborted() => return Err(io::ErrorKind::Interrupted.into()),
                    UNDER_WAY => thread::sleep(MOMENT),
                    state if self.claim(number, state) => self.bring_claimed(number, state, scratch)?,
                    _ => {}
                }
            }
        }
        Ok(())
    }

    /// Brings the blocks of `range` that are not zeros; what is zero stays a hole, and is not brought ahead.
    ///
    /// # Errors
    /// As [`Supply::bring_ahead`].
    pub(super) fn bring_data(&self, range: GpaRange, scratch: &mut Vec<u8>) -> io::Result<()> {
        self.holding(range).try_for_each(|number| {
            if !self.blocks.is_zeros(number) {
                return self.bring_ahead(number, scratch);
            }
            let is_within = self.blocks.parts(number).iter().all(|part| range.covers(part.range));
            if is_within && self.state_changes(number, ABSENT, HOLE) {
                self.note_done();
            }
            Ok(())
        })
    }

    fn claim(&self, number: usize, from: u8) -> bool {
        self.state_changes(number, from, UNDER_WAY)
    }

    fn state_changes(&self, number: usize, from: u8, to: u8) -> bool {
        let state = &self.states[number];
        state.compare_exchange(from, to, Ordering::AcqRel, Ordering::Acquire).is_ok()
    }

    fn bring_claimed(&self, number: usize, from: u8, scratch: &mut Vec<u8>) -> io::Result<()> {
        let brought = self.copy(number, scratch);
        let if_not = if from == HOLE { HOLE } else { FAILED };
        self.states[number].store(if brought.is_ok() { PRESENT } else { if_not }, Ordering::Release);
        self.handle.add_present(brought?);
        if from != HOLE {
            self.note_done();
        }
        Ok(())
    }

    /// One block less is left.
    fn note_done(&self) {
        if self.left.fetch_sub(1, Ordering::AcqRel) == 1 {
            self.handle.note_last_page();
        }
    }

    /// Checks a block and writes it; returns how many bytes of memory it holds.
    fn copy(&self, number: usize, scratch: &mut Vec<u8>) -> io::Result<u64> {
        let is_zeros = self.blocks.is_zeros(number);
        self.blocks.read(number, scratch)?;
        let mut bytes = 0;
        for part in self.blocks.parts(number) {
            bytes += part.range.len();
            if is_zeros {
                // A receiver cannot go on at a hole.
                self.memory.allocate(part.range)?;
            } else {
                let at = usize::try_from(part.at).map_err(io::Error::other)?;
                let length = usize::try_from(part.range.len()).map_err(io::Error::other)?;
                self.memory.write(part.range, &scratch[at..at + length])?;
                self.handle.add_filled(part.range.len());
            }
        }
        Ok(bytes)
    }
}
