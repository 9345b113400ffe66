// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! `KVM_GET_DIRTY_LOG` and `KVM_CLEAR_DIRTY_LOG`: what the vCPUs, and KVM on their behalf, wrote.

use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;

use thiserror::Error;

use super::{Cover, DirtySource, Operation, PluggedRam, Reports, Sink, SourceError};
use crate::bitmap::{WORD_BITS, masks};
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
    /// The mask of a CLEAR, as long as the longest was, [`CLEAR_WORDS`] or so at most; zero in between.
    scratch: Vec<u64>,
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

/// Bits farther apart than this many words are cleared by separate CLEARs.
const CLEAR_GAP_WORDS: usize = 64;

/// The words of one CLEAR at most, so that its mask is small whatever the chunk.
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
        Self { slot, before, scratch: Vec::new(), words }
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
        let this: &'a Self = self;
        let standing = lazy.then_some(&this.before[..]);
        sink.lend_gpa_words(gpa, Granule::host_page(), &this.words, standing)
            .expect("the log has a bit for each page of its slot");
        if mode == KvmLogMode::ManualAtReport { this.clear_all(vm) } else { Ok(()) }
    }

    /// Clears, in KVM, all that was just reported.
    fn clear_all(&self, vm: &impl AsRawFd) -> Result<(), KvmLogError> {
        let dirty = |word: &u64| *word != 0;
        let Some(first) = self.words.iter().position(dirty) else { return Ok(()) };
        let last = self.words.iter().rposition(dirty).unwrap_or(first);
        self.clear_words(vm, first, &self.words[first..=last])
    }

    fn clear_words(&self, vm: &impl AsRawFd, first: usize, mask: &[u64]) -> Result<(), KvmLogError> {
        let (slot, gpa) = (self.slot.id(), self.slot.gpa());
        self.slot.clear_dirty_log(vm, first, mask).map_err(|source| KvmLogError::Clear { slot, gpa, source })
    }

    /// Clears, in KVM, the standing bits of the pages in `chunk`, which ascends.
    fn clear_chunk(&mut self, vm: &impl AsRawFd, chunk: &[GpaRange]) -> Result<(), KvmLogError> {
        let mut group: Option<Range<usize>> = None;
        let slot = self.slot.gpa();
        let shift = Granule::host_page().shift();
        let most = ((CLEAR_WORDS * WORD_BITS) as u64) << shift;
        let parts = chunk.iter().filter_map(|range| range.intersection(slot));
        for part in parts.flat_map(|part| part.pieces(most)) {
            let page = |gpa: u64| usize::try_from((gpa - slot.start()) >> shift).expect("pages of the slot");
            let bits = page(part.start())..page(part.end() - 1) + 1;
            let words = bits.start / WORD_BITS..bits.end.div_ceil(WORD_BITS);
            let near = |open: &Range<usize>| {
                words.start <= open.end + CLEAR_GAP_WORDS && words.end <= open.start + CLEAR_WORDS
            };
            group = match group.take() {
                Some(open) if near(&open) => Some(open.start..words.end.max(open.end)),
                Some(open) => {
                    self.clear_scratch(vm, open)?;
                    Some(words)
                }
                None => Some(words),
            };
            let open = group.as_ref().expect("it was just opened");
            if self.scratch.len() < open.len() {
                self.scratch.resize(open.len(), 0);
            }
            for (word, mask) in masks(bits) {
                self.scratch[word - open.start] |= self.words[word] & mask;
            }
        }
        group.map_or(Ok(()), |open| self.clear_scratch(vm, open))
    }

    /// Clears, in KVM, the bits gathered in the scratch words, of which the first is that of `group`, and forgets them whatever the answer.
    fn clear_scratch(&mut self, vm: &impl AsRawFd, group: Range<usize>) -> Result<(), KvmLogError> {
        let mask = &self.scratch[..group.len()];
        let any = mask.iter().any(|&word| word != 0);
        let result = if any { self.clear_words(vm, group.start, mask) } else { Ok(()) };
        for (word, mask) in self.words[group.clone()].iter_mut().zip(&mut self.scratch) {
            if result.is_ok() {
                *word &= !*mask;
            }
            *mask = 0;
        }
        result
    }
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
