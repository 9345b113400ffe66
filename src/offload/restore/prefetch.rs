// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Writes memory ahead of a receiver that asks for it, while faults that it waits for come first.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use super::supply::Supply;
use crate::range::GpaRange;

/// Memory behind a page that the guest waited for, which it may want next.
pub(super) const NEAR_BYTES: u64 = 2 << 20;

/// Memory before such a page, which comes after that behind it.
const BEFORE_BYTES: u64 = 512 << 10;

/// Memory of a range near a fault that is brought at a time.
const NEAR_AT_ONCE_BYTES: u64 = 128 << 10;

/// Most ranges near faults that are remembered: what the guest did long ago does not count.
const NEAR_RANGES: usize = 64;

/// Blocks that a thread takes at a time.
const BLOCKS_AT_ONCE: usize = 16;

/// How long threads of this kind wait before they look again.
const MOMENT: Duration = Duration::from_micros(50);

/// How long they wait for the VM to be handed over.
const TICK: Duration = Duration::from_millis(1);

/// What is to be brought next, by any number of threads.
#[derive(Debug, Default)]
pub(super) struct Prefetch {
    next: AtomicUsize,
    near: Mutex<VecDeque<GpaRange>>,
    /// A fault is being served.
    is_serving: AtomicBool,
    /// It takes so much that others are to help.
    wants_help: AtomicBool,
    handed_over: AtomicBool,
    ended: AtomicBool,
}

impl Prefetch {
    /// Ends the threads.
    pub(super) fn end(&self) {
        self.ended.store(true, Ordering::Release);
    }

    pub(super) fn has_ended(&self) -> bool {
        self.ended.load(Ordering::Acquire)
    }

    /// Lets the threads begin.
    pub(super) fn hand_over(&self) {
        self.handed_over.store(true, Ordering::Release);
    }

    /// Does `work` for a fault while the threads wait; for a large page they help.
    pub(super) fn serve<T>(&self, page: GpaRange, work: impl FnOnce() -> T) -> T {
        let is_large = page.len() > NEAR_BYTES / 2;
        if is_large {
            self.near().push_front(page);
            self.wants_help.store(true, Ordering::Release);
        }
        self.is_serving.store(true, Ordering::Release);
        let done = work();
        self.is_serving.store(false, Ordering::Release);
        self.wants_help.store(false, Ordering::Release);
        done
    }

    /// Has what is around `page` brought soon, for which the guest waited.
    pub(super) fn note_fault(&self, page: GpaRange) {
        let before = GpaRange::from_bounds(page.start().saturating_sub(BEFORE_BYTES), page.start());
        before.into_iter().for_each(|before| self.bring_soon(before));
        self.note_stream(page);
    }

    /// Has what follows `page` brought soon: the guest goes through memory.
    pub(super) fn note_stream(&self, page: GpaRange) {
        let behind = GpaRange::from_bounds(page.end(), page.end().saturating_add(NEAR_BYTES));
        behind.into_iter().for_each(|behind| self.bring_soon(behind));
    }

    fn bring_soon(&self, range: GpaRange) {
        let mut near = self.near();
        near.push_front(range);
        near.truncate(NEAR_RANGES);
    }

    /// Goes on behind block `number`: everything before it was asked for.
    pub(super) fn skip_to(&self, number: usize) {
        self.next.fetch_max(number, Ordering::Relaxed);
    }

    /// Works until everything is in memory or the end is told. Until the VM is handed over, the processors are the receiver's.
    pub(super) fn work(&self, supply: &Supply<'_>) {
        let mut scratch = Vec::new();
        while !self.handed_over.load(Ordering::Acquire) && !self.has_ended() {
            thread::sleep(TICK);
        }
        while !self.has_ended() {
            if let Some(piece) = self.next_near() {
                supply.holding(piece).for_each(|number| self.bring(supply, number, &mut scratch));
                continue;
            }
            let first = self.next.fetch_add(BLOCKS_AT_ONCE, Ordering::Relaxed);
            if first >= supply.count() {
                break;
            }
            let end = supply.count().min(first + BLOCKS_AT_ONCE);
            (first..end).for_each(|number| self.bring(supply, number, &mut scratch));
        }
        // What was skipped, because the receiver asked for it or did not.
        (0..supply.count()).for_each(|number| self.bring(supply, number, &mut scratch));
    }

    fn bring(&self, supply: &Supply<'_>, number: usize, scratch: &mut Vec<u8>) {
        while self.is_serving.load(Ordering::Acquire) && !self.wants_help.load(Ordering::Acquire) {
            thread::sleep(MOMENT);
        }
        if self.has_ended() {
            return;
        }
        if let Err(error) = supply.bring_ahead(number, scratch)
            && !self.has_ended()
        {
            // Whoever asks for it gets the error, unless it can be read then.
            log::warn!("Cannot bring memory prefetch: {error}");
        }
    }

    fn next_near(&self) -> Option<GpaRange> {
        let mut near = self.near();
        let range = near.pop_front()?;
        let mut pieces = range.pieces(NEAR_AT_ONCE_BYTES);
        let first = pieces.next();
        if let Some(rest) =
            pieces.next().and_then(|next| GpaRange::from_bounds(next.start(), range.end()).ok())
        {
            near.push_front(rest);
        }
        first
    }

    fn near(&self) -> std::sync::MutexGuard<'_, VecDeque<GpaRange>> {
        self.near.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_behind_a_fault_comes_first_and_then_what_is_before_it() {
        let prefetch = Prefetch::default();
        let page = |start: u64| GpaRange::new(start, 4096).unwrap();
        prefetch.note_fault(page(BEFORE_BYTES / 2));
        prefetch.note_fault(page(8 << 20));
        let (at, mut order) = (8 << 20, Vec::new());
        while let Some(piece) = prefetch.next_near() {
            order.push((piece.start(), piece.end()));
        }
        assert!(order.iter().all(|(start, end)| end - start <= NEAR_AT_ONCE_BYTES));
        let total = |range: std::ops::Range<u64>| {
            let inside = order.iter().filter(|(start, end)| range.start <= *start && *end <= range.end);
            inside.map(|(start, end)| end - start).sum::<u64>()
        };
        assert_eq!(order[0].0, at + 4096, "the latest fault, what follows it");
        assert_eq!(total(at + 4096..at + 4096 + NEAR_BYTES), NEAR_BYTES);
        assert_eq!(total(at - BEFORE_BYTES..at), BEFORE_BYTES);
        assert_eq!(total(0..BEFORE_BYTES / 2), BEFORE_BYTES / 2, "no further than memory goes");
        let before = order.iter().position(|(start, _)| *start == at - BEFORE_BYTES).unwrap();
        assert_eq!(before as u64, NEAR_BYTES / NEAR_AT_ONCE_BYTES, "after all that is behind the page");
    }
}
