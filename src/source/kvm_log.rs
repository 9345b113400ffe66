// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! `KVM_GET_DIRTY_LOG` and `KVM_CLEAR_DIRTY_LOG`: what the vCPUs, and KVM on their behalf, wrote.

use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;

use thiserror::Error;

use super::{Cover, DirtySource, Operation, PluggedRam, Reports, Sink, SourceError};
use crate::bitmap::{WORD_BITS, low_bits};
use crate::granule::Granule;
use crate::iova::IovaMap;
use crate::layout::Layout;
use crate::range::GpaRange;
use crate::sys::kvm::{self, Protect};

pub use crate::sys::kvm::KvmSlot;

/// When a reported page's bit is cleared in KVM, so that the next write to it is seen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KvmLogMode {
    /// At every report, by GET itself. Leaves the VM as it is; right where somebody else may read the log too.
    AtReport,
    /// At every report, by one CLEAR of what was reported. Needs sole ownership of the VM's dirty log: MANUAL_PROTECT is per VM.
    ManualAtReport,
    /// Just before the page is read, by a CLEAR per chunk, with INITIALLY_SET where the kernel has it. Needs sole ownership and a
    /// reader that calls [`DirtySource::before_read`].
    ManualAtRead,
}

/// What KVM refused.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum KvmLogError {
    /// The kernel lacks `KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2`.
    #[error("KVM has no manual dirty-log protection")]
    NoManualProtect,
    /// The protection mode could not be chosen.
    #[error("Cannot choose the dirty log's protection mode")]
    Protect(#[source] io::Error),
    /// A slot's log could not be switched.
    #[error("Cannot switch the dirty log of slot {slot} at {gpa} {}", if *.on { "on" } else { "off" })]
    Switch {
        /// Slot number.
        slot: u32,
        /// The slot's pages.
        gpa: GpaRange,
        /// On or off.
        on: bool,
        /// KVM's answer.
        source: io::Error,
    },
    /// A slot's log could not be read; its bits may be gone.
    #[error("Cannot read the dirty log of slot {slot} at {gpa}")]
    Read {
        /// Slot number.
        slot: u32,
        /// The slot's pages.
        gpa: GpaRange,
        /// KVM's answer.
        source: io::Error,
    },
    /// Reported bits could not be cleared.
    #[error("Cannot clear the dirty log of slot {slot} at {gpa}")]
    Clear {
        /// Slot number.
        slot: u32,
        /// The slot's pages.
        gpa: GpaRange,
        /// KVM's answer.
        source: io::Error,
    },
}

/// Buffers of one slot, reused at every report.
#[derive(Debug)]
struct SlotLog {
    slot: KvmSlot,
    /// Bits reported; with [`KvmLogMode::ManualAtRead`], those that were not cleared in KVM yet.
    words: Vec<u64>,
    /// What `words` was before the last report, with [`KvmLogMode::ManualAtRead`].
    before: Vec<u64>,
    /// Whether bits were cleared since the last report, so that none may be left in `words`.
    cleared: bool,
}

/// The dirty log of a VM's memory slots, over any VM descriptor.
#[derive(Debug)]
pub struct KvmLog<F> {
    vm: F,
    mode: KvmLogMode,
    slots: Vec<SlotLog>,
    on: bool,
    /// Every page's bit stands once a slot's log is on.
    initially_set: bool,
}

/// Words without a bit that end a CLEAR.
const CLEAR_GAP_WORDS: usize = 64;

/// The words of one CLEAR at most: KVM holds the lock of its page tables while it goes through them.
const CLEAR_WORDS: usize = 1 << 15;

impl<F: AsRawFd + Send> KvmLog<F> {
    /// Makes the source for `slots` of `vm`; their log is off until [`DirtySource::start`].
    pub fn new(vm: F, slots: impl IntoIterator<Item = KvmSlot>, mode: KvmLogMode) -> Self {
        let slots = slots.into_iter().map(|slot| SlotLog::new(slot, mode)).collect();
        Self { vm, mode, slots, on: false, initially_set: false }
    }

    fn try_start(&mut self) -> Result<(), KvmLogError> {
        let initially_set = self.choose_protection()?;
        self.on = true;
        self.initially_set = initially_set;
        for index in 0..self.slots.len() {
            if let Err(error) = self.slots[index].begin(&self.vm, initially_set) {
                let _already_failing = self.try_stop();
                return Err(error);
            }
        }
        Ok(())
    }

    /// Sets the VM's protection mode; returns whether every page's bit stands once a slot's log is on.
    fn choose_protection(&self) -> Result<bool, KvmLogError> {
        use kvm_bindings::{KVM_DIRTY_LOG_INITIALLY_SET, KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE};
        if self.mode == KvmLogMode::AtReport {
            return Ok(false);
        }
        let flags = kvm::manual_protect_flags(&self.vm);
        if flags & KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE == 0 {
            return Err(KvmLogError::NoManualProtect);
        }
        let initially_set = self.mode == KvmLogMode::ManualAtRead && flags & KVM_DIRTY_LOG_INITIALLY_SET != 0;
        kvm::protect(&self.vm, Protect::Manual { initially_set }).map_err(KvmLogError::Protect)?;
        Ok(initially_set)
    }

    fn try_stop(&mut self) -> Result<(), KvmLogError> {
        if !std::mem::take(&mut self.on) {
            return Ok(());
        }
        let mut result = Ok(());
        for log in &self.slots {
            result = result.and(log.switch(&self.vm, false));
        }
        if self.mode != KvmLogMode::AtReport {
            result = result.and(kvm::protect(&self.vm, Protect::AtGet).map_err(KvmLogError::Protect));
        }
        result
    }
}

impl SlotLog {
    fn new(slot: KvmSlot, mode: KvmLogMode) -> Self {
        let words = vec![0; slot.words()];
        let before = if mode == KvmLogMode::ManualAtRead { words.clone() } else { Vec::new() };
        Self { slot, before, cleared: false, words }
    }

    fn switch(&self, vm: &impl AsRawFd, on: bool) -> Result<(), KvmLogError> {
        let (slot, gpa) = (self.slot.id(), self.slot.gpa());
        self.slot.log_dirty_pages(vm, on).map_err(|source| KvmLogError::Switch { slot, gpa, on, source })
    }

    fn begin(&mut self, vm: &impl AsRawFd, initially_set: bool) -> Result<(), KvmLogError> {
        self.switch(vm, true)?;
        self.words.fill(if initially_set { u64::MAX } else { 0 });
        Ok(())
    }

    fn report<'a>(
        &'a mut self,
        vm: &impl AsRawFd,
        mode: KvmLogMode,
        sink: &mut Sink<'a>,
    ) -> Result<(), KvmLogError> {
        let (slot, gpa) = (self.slot.id(), self.slot.gpa());
        let lazy = mode == KvmLogMode::ManualAtRead;
        let into = if lazy { &mut self.before } else { &mut self.words };
        self.slot.dirty_log(vm, into).map_err(|source| KvmLogError::Read { slot, gpa, source })?;
        if lazy {
            std::mem::swap(&mut self.words, &mut self.before);
        }
        let were_cleared = std::mem::take(&mut self.cleared);
        let this: &'a Self = self;
        let stands = lazy && !(were_cleared && first_set(&this.before).is_none());
        let standing = stands.then_some(&this.before[..]);
        sink.lend_gpa_words(gpa, Granule::host_page(), &this.words, standing)
            .expect("the log has a bit for each page of its slot");
        if mode == KvmLogMode::ManualAtReport { this.clear_all(vm) } else { Ok(()) }
    }

    /// Clears, in KVM, all that was just reported.
    fn clear_all(&self, vm: &impl AsRawFd) -> Result<(), KvmLogError> {
        let Some(first) = first_set(&self.words) else { return Ok(()) };
        let end = self.words.iter().rposition(|&word| word != 0).map_or(first, |last| last + 1);
        self.clear_words(vm, first..end)
    }

    /// Clears, in KVM, the bits that are set in these words.
    fn clear_words(&self, vm: &impl AsRawFd, words: Range<usize>) -> Result<(), KvmLogError> {
        let (slot, gpa) = (self.slot.id(), self.slot.gpa());
        let mask = &self.words[words.clone()];
        self.slot.clear_dirty_log(vm, words.start, mask).map_err(|source| KvmLogError::Clear {
            slot,
            gpa,
            source,
        })
    }

    /// Clears, in KVM, the bits that stand from the first page of `chunk` to its last, which ascends.
    ///
    /// Those of pages in between that the chunk leaves out, because they are on their way, go with them: whoever needs them has them
    /// pending, and will read them later than now.
    fn clear_chunk(&mut self, vm: &impl AsRawFd, chunk: &[GpaRange]) -> Result<(), KvmLogError> {
        let (slot, shift) = (self.slot.gpa(), Granule::host_page().shift());
        let first = chunk.partition_point(|range| range.end() <= slot.start());
        let behind = chunk.partition_point(|range| range.start() < slot.end());
        let Some(inside) = chunk.get(first..behind).filter(|inside| !inside.is_empty()) else {
            return Ok(());
        };
        let span = (inside[0].start(), inside[inside.len() - 1].end());
        let page = |gpa: u64| usize::try_from((gpa - slot.start()) >> shift).expect("pages of the slot");
        let bits = page(span.0.max(slot.start()))..page(span.1.min(slot.end()) - 1) + 1;
        self.clear_bits(vm, bits)
    }

    /// Clears, in KVM, those of `bits` that stand.
    fn clear_bits(&mut self, vm: &impl AsRawFd, bits: Range<usize>) -> Result<(), KvmLogError> {
        let words = bits.start / WORD_BITS..bits.end.div_ceil(WORD_BITS);
        let (low, high) =
            (low_bits(bits.start % WORD_BITS), !low_bits(bits.end - (words.end - 1) * WORD_BITS));
        // The pages before and behind share words with those to clear: their bits are put back when that is done.
        let kept =
            [(words.start, self.words[words.start] & low), (words.end - 1, self.words[words.end - 1] & high)];
        kept.iter().for_each(|&(word, bits)| self.words[word] &= !bits);
        self.cleared = true;
        let outcome = self.clear_groups(vm, words);
        kept.iter().for_each(|&(word, bits)| self.words[word] |= bits);
        outcome
    }

    /// Clears, in KVM, the bits that stand in these words, and forgets those of which KVM took it.
    fn clear_groups(&mut self, vm: &impl AsRawFd, words: Range<usize>) -> Result<(), KvmLogError> {
        let mut next = words.start;
        loop {
            let Some(group) = next_group(&self.words[..words.end], next) else { return Ok(()) };
            self.clear_words(vm, group.clone())?;
            self.words[group.clone()].fill(0);
            next = group.end;
        }
    }
}

/// Returns the next words from `from` on that hold bits, [`CLEAR_WORDS`] at most: up to a gap that [`CLEAR_GAP_WORDS`] fit into, or twice
/// as many.
fn next_group(words: &[u64], from: usize) -> Option<Range<usize>> {
    let start = from + first_set(&words[from..])?;
    let most = &words[start..(start + CLEAR_WORDS).min(words.len())];
    let filled = most.chunks(CLEAR_GAP_WORDS).take_while(|words| any(words)).count();
    let last = most[..most.len().min(filled * CLEAR_GAP_WORDS)].iter().rposition(|&word| word != 0)?;
    Some(start..start + last + 1)
}

/// Returns the first word that holds a bit.
fn first_set(words: &[u64]) -> Option<usize> {
    /// Words that are looked at before anything is decided.
    const AT_ONCE: usize = 32;
    let empty = words.chunks(AT_ONCE).take_while(|words| !any(words)).count();
    let start = (empty * AT_ONCE).min(words.len());
    words[start..].iter().position(|&word| word != 0).map(|at| start + at)
}

fn any(words: &[u64]) -> bool {
    words.iter().fold(0, |any, word| any | word) != 0
}

const ID: &str = "kvm-log";

impl<F: AsRawFd + Send> DirtySource for KvmLog<F> {
    fn id(&self) -> &str {
        ID
    }

    fn reports(&self) -> Reports {
        Reports::Vcpus
    }

    fn cover(&self) -> Cover {
        Cover { ranges: self.slots.iter().map(|log| log.slot.gpa()).collect(), precise: true }
    }

    fn start(&mut self, _layout: &Layout, _iova: &IovaMap) -> Result<(), SourceError> {
        if self.on {
            return Ok(());
        }
        self.try_start().map_err(|cause| SourceError::new(ID, Operation::Start, cause))
    }

    fn collect<'a>(&'a mut self, sink: &mut Sink<'a>) -> Result<(), SourceError> {
        let (vm, mode) = (&self.vm, self.mode);
        self.slots
            .iter_mut()
            .try_for_each(|log| log.report(vm, mode, sink))
            .map_err(|cause| SourceError::new(ID, Operation::Collect, cause))
    }

    fn before_read(&mut self, chunk: &[GpaRange]) -> Result<(), SourceError> {
        if self.mode != KvmLogMode::ManualAtRead {
            return Ok(());
        }
        let vm = &self.vm;
        self.slots
            .iter_mut()
            .try_for_each(|log| log.clear_chunk(vm, chunk))
            .map_err(|cause| SourceError::new(ID, Operation::BeforeRead, cause))
    }

    fn plugged(&mut self, ram: &PluggedRam) -> Result<(), SourceError> {
        let Some(slot) = ram.kvm_slot else { return Ok(()) };
        let mut log = SlotLog::new(slot, self.mode);
        if self.on {
            log.begin(&self.vm, self.initially_set)
                .map_err(|cause| SourceError::new(ID, Operation::Plugged, cause))?;
        }
        self.slots.push(log);
        Ok(())
    }

    fn unplugged(&mut self, gpa: GpaRange) {
        self.slots.retain(|log| !gpa.covers(log.slot.gpa()));
    }

    fn stop(&mut self) -> Result<(), SourceError> {
        self.try_stop().map_err(|cause| SourceError::new(ID, Operation::Stop, cause))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn groups_hold_every_word_with_a_bit_and_no_wide_gap(
            set in prop::collection::btree_set(0..600usize, 0..20), from in 0..600usize,
        ) {
            let mut words = vec![0; 600];
            set.iter().for_each(|&word| words[word] = 1 << (word % 64));
            let (mut left, mut next) = (set.range(from..).copied().collect::<Vec<_>>(), from);
            while let Some(group) = next_group(&words, next) {
                let (within, behind): (Vec<_>, Vec<_>) = left.into_iter().partition(|word| group.contains(word));
                prop_assert!(within.first() == Some(&group.start) && within.last() == Some(&(group.end - 1)));
                prop_assert!(within.windows(2).all(|pair| pair[1] - pair[0] < 2 * CLEAR_GAP_WORDS));
                prop_assert!(behind.first().is_none_or(|word| word - group.end >= CLEAR_GAP_WORDS));
                (left, next) = (behind, group.end);
            }
            prop_assert!(left.is_empty());
        }
    }

    #[test]
    fn a_group_is_no_longer_than_one_clear_may_be() {
        let words = vec![1; CLEAR_WORDS + 7];
        assert_eq!(next_group(&words, 0), Some(0..CLEAR_WORDS));
        assert_eq!(next_group(&words, CLEAR_WORDS), Some(CLEAR_WORDS..CLEAR_WORDS + 7));
        assert_eq!(next_group(&words, CLEAR_WORDS + 7), None);
    }
}
