// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A VM's memory in memfds of ours, one for each slot.

use std::fs::File;
use std::io::{self, IoSlice};
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use rustix::fs::{FallocateFlags, MemfdFlags, SealFlags, fallocate, fcntl_add_seals, memfd_create};
use rustix::io::{pwritev, retry_on_intr};

use super::error::LocalSendError;
use crate::range::GpaRange;
use crate::snapshot::RamSlot;
use crate::transfer::limits::GUEST_PAGE_BYTES;

/// Most parts that one system call takes.
const MOST_SLICES: usize = 1024;

#[derive(Debug)]
struct SlotMemory {
    slot: RamSlot,
    file: File,
}

/// The memory of every slot, ascending by address.
#[derive(Debug, Clone)]
pub(super) struct VmMemory(Arc<[SlotMemory]>);

impl VmMemory {
    /// Makes memory that is one hole.
    ///
    /// # Errors
    /// Two slots have one number, or the system gives no more descriptors.
    pub(super) fn make(slots: &[RamSlot]) -> Result<Self, LocalSendError> {
        let mut memory: Vec<SlotMemory> = Vec::new();
        for &slot in slots {
            if memory.iter().any(|other| other.slot.slot == slot.slot) {
                return Err(LocalSendError::SlotTwice { slot: slot.slot });
            }
            let failed = |source| LocalSendError::Make { slot: slot.slot, source };
            memory.push(SlotMemory { slot, file: one_hole(slot).map_err(failed)? });
        }
        memory.sort_unstable_by_key(|part| part.slot.range);
        Ok(Self(memory.into()))
    }

    /// The slots' numbers and descriptors.
    pub(super) fn descriptors(&self) -> impl Iterator<Item = (u32, BorrowedFd<'_>)> {
        self.0.iter().map(|part| (part.slot.slot, part.file.as_fd()))
    }

    /// Writes `parts`, ascending, but for pages of zeros: these stay holes. Returns how many bytes it wrote.
    ///
    /// What lies in a row goes to the file at once: it has one writer at a time.
    ///
    /// # Errors
    /// There is no memory left.
    pub(super) fn write_data(&self, parts: &[(GpaRange, &[u8])]) -> io::Result<u64> {
        let mut row: Option<Row<'_>> = None;
        let mut written = 0;
        for (range, bytes) in parts {
            for run in data_runs(bytes) {
                written += run.len() as u64;
                let run_range = GpaRange::new(range.start() + run.start as u64, run.len() as u64);
                let run_range = run_range.map_err(io::Error::other)?;
                for place in self.places(run_range) {
                    let at = run.start
                        + usize::try_from(place.range.start() - run_range.start())
                            .map_err(io::Error::other)?;
                    let length = usize::try_from(place.range.len()).map_err(io::Error::other)?;
                    let bytes = &bytes[at..at + length];
                    match &mut row {
                        Some(row) if row.goes_on_at(&place) => row.push(bytes),
                        other => {
                            other.take().map_or(Ok(()), Row::write)?;
                            row = Some(Row::new(&place, bytes));
                        }
                    }
                }
            }
        }
        row.map_or(Ok(()), Row::write)?;
        Ok(written)
    }

    /// Writes the bytes of `range`.
    ///
    /// # Errors
    /// There is no memory left.
    pub(super) fn write(&self, range: GpaRange, bytes: &[u8]) -> io::Result<()> {
        self.places(range).try_for_each(|place| {
            let at = usize::try_from(place.range.start() - range.start()).map_err(io::Error::other)?;
            let length = usize::try_from(place.range.len()).map_err(io::Error::other)?;
            place.file.write_all_at(&bytes[at..at + length], place.offset)
        })
    }

    /// Gives `range` pages of zeros where it has none; the others stay as they are.
    ///
    /// # Errors
    /// There is no memory left.
    pub(super) fn allocate(&self, range: GpaRange) -> io::Result<()> {
        self.places(range).try_for_each(|place| {
            let allocate =
                || fallocate(place.file, FallocateFlags::KEEP_SIZE, place.offset, place.range.len());
            Ok(retry_on_intr(allocate)?)
        })
    }

    /// Whether `range` is in one slot.
    pub(super) fn holds(&self, range: GpaRange) -> bool {
        self.places(range).next().is_some_and(|place| place.range == range)
    }

    /// Cuts all memory off, for good: whoever touches it from now on gets SIGBUS, and no zeros; writing to it fails.
    ///
    /// # Errors
    /// The system refuses.
    pub(super) fn take_away(&self) -> io::Result<()> {
        self.0.iter().map(|part| part.file.set_len(0)).fold(Ok(()), io::Result::and)
    }

    fn places(&self, range: GpaRange) -> impl Iterator<Item = Place<'_>> {
        let first = self.0.partition_point(|part| part.slot.range.end() <= range.start());
        self.0[first..].iter().map_while(move |SlotMemory { slot, file }| {
            let range = slot.range.intersection(range)?;
            Some(Place { range, file, offset: slot.offset + (range.start() - slot.range.start()) })
        })
    }
}

/// A part of a slot.
struct Place<'a> {
    range: GpaRange,
    file: &'a File,
    offset: u64,
}

/// Bytes that lie in a row in one file.
struct Row<'a> {
    file: &'a File,
    offset: u64,
    end: u64,
    slices: Vec<IoSlice<'a>>,
}

impl<'a> Row<'a> {
    fn new(place: &Place<'a>, bytes: &'a [u8]) -> Self {
        let end = place.offset + bytes.len() as u64;
        Self { file: place.file, offset: place.offset, end, slices: vec![IoSlice::new(bytes)] }
    }

    fn goes_on_at(&self, place: &Place<'a>) -> bool {
        std::ptr::eq(self.file, place.file) && self.end == place.offset && self.slices.len() < MOST_SLICES
    }

    fn push(&mut self, bytes: &'a [u8]) {
        self.slices.push(IoSlice::new(bytes));
        self.end += bytes.len() as u64;
    }

    fn write(mut self) -> io::Result<()> {
        let mut left = self.slices.as_mut_slice();
        while !left.is_empty() {
            let written = retry_on_intr(|| pwritev(self.file, left, self.offset))?;
            if written == 0 {
                return Err(io::ErrorKind::WriteZero.into());
            }
            self.offset += written as u64;
            IoSlice::advance_slices(&mut left, written);
        }
        Ok(())
    }
}

fn one_hole(slot: RamSlot) -> io::Result<File> {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let file = File::from(memfd_create(format!("vm-slot-{}", slot.slot), flags)?);
    let bytes = slot.offset.checked_add(slot.range.len()).ok_or(io::ErrorKind::InvalidInput)?;
    file.set_len(bytes)?;
    // What is written late to memory that was taken away does not make it come back, full of zeros. And no receiver may add a seal that
    // keeps us from writing to it, or from taking it away.
    fcntl_add_seals(&file, SealFlags::GROW | SealFlags::SEAL)?;
    Ok(file)
}

/// Finds the runs of pages that are not zeros; the last page may be a part of one.
fn data_runs(bytes: &[u8]) -> impl Iterator<Item = Range<usize>> + '_ {
    let page_bytes = usize::try_from(GUEST_PAGE_BYTES).expect("a page fits memory");
    let is_zero = move |at: usize| bytes[at..bytes.len().min(at + page_bytes)].iter().all(|&byte| byte == 0);
    let mut next = 0;
    std::iter::from_fn(move || {
        let start = (next..bytes.len()).step_by(page_bytes).find(|&at| !is_zero(at))?;
        let end = (start..bytes.len()).step_by(page_bytes).find(|&at| is_zero(at)).unwrap_or(bytes.len());
        next = end;
        Some(start..end)
    })
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use rustix::io::Errno;

    use super::*;

    fn range(start: u64, length: u64) -> GpaRange {
        GpaRange::new(start, length).unwrap()
    }

    #[test]
    fn runs_are_pages_that_are_not_zeros() {
        let mut bytes = vec![0; 5 * 4096 + 10];
        assert_eq!(data_runs(&bytes).count(), 0);
        for at in [0, 2 * 4096, 4 * 4096 - 1, 5 * 4096 + 9] {
            bytes[at] = 1;
        }
        let runs: Vec<_> = data_runs(&bytes).collect();
        assert_eq!(runs, [0..4096, 8192..16384, 20480..20490]);
    }

    #[test]
    fn bytes_go_to_the_slots_that_have_them_and_zeros_stay_holes() {
        let high = RamSlot { slot: 7, range: range(0x10000, 0x10000), offset: 0 };
        let low = RamSlot { slot: 1, range: range(0, 0x10000), offset: 0x3000 };
        let memory = VmMemory::make(&[high, low]).unwrap();
        let mut bytes = vec![0; 0x4000];
        bytes[0x1000..0x3000].fill(9);
        assert_eq!(
            memory
                .write_data(&[
                    (range(0xe000, 0x1000), &bytes[..0x1000]),
                    (range(0xf000, 0x3000), &bytes[0x1000..])
                ])
                .unwrap(),
            0x2000
        );
        let read = |number: usize, at: u64| {
            let mut byte = [0];
            memory.0[number].file.read_exact_at(&mut byte, at).unwrap();
            byte[0]
        };
        assert_eq!([read(0, 0x11fff), read(0, 0x12000), read(1, 0xfff), read(1, 0x1000)], [0, 9, 9, 0]);
        assert!(memory.holds(range(0xf000, 0x1000)) && !memory.holds(range(0xf000, 0x2000)));
        memory.allocate(range(0, 0x20000)).unwrap();
        assert_eq!([read(0, 0x12fff), read(1, 0xfff), read(1, 0x1000)], [9, 9, 0]);
        let blocks = |number: usize| memory.0[number].file.metadata().unwrap().blocks();
        assert_eq!([blocks(0), blocks(1)], [0x10000 / 512; 2]);
        for seal in [SealFlags::SHRINK, SealFlags::WRITE, SealFlags::FUTURE_WRITE] {
            assert_eq!(fcntl_add_seals(&memory.0[0].file, seal), Err(Errno::PERM), "a receiver may not");
        }
        memory.take_away().unwrap();
        assert!(memory.write(range(0x1000, 0x1000), &[1; 0x1000]).is_err());
        assert!(memory.allocate(range(0x1000, 0x1000)).is_err());
        assert!(memory.0.iter().all(|part| part.file.metadata().unwrap().len() == 0));
        assert!(matches!(VmMemory::make(&[low, low]), Err(LocalSendError::SlotTwice { slot: 1 })));
    }
}
