// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Guest memory looked at in place, while the guest may write it.

use std::io;
use std::sync::atomic::{AtomicU8, Ordering};

use vm_memory::VolatileSlice;
use vm_memory::bitmap::BitmapSlice;

/// Words looked at before anything is decided: a cache line of them.
const LINE_WORDS: usize = 8;
const WORD_BYTES: usize = size_of::<u64>();

/// Whether every byte of `slice` reads zero, one after the other; stops at the first line that does not.
pub(crate) fn is_zero<B: BitmapSlice>(slice: &VolatileSlice<'_, B>) -> bool {
    let guard = slice.ptr_guard();
    let (start, bytes) = (guard.as_ptr(), guard.len());
    let head = start.align_offset(WORD_BYTES).min(bytes);
    let lines = (bytes - head) / (LINE_WORDS * WORD_BYTES);
    let tail = head + lines * LINE_WORDS * WORD_BYTES;
    let byte = |at: usize| {
        // SAFETY: `at` is below `bytes`, and the guard keeps that many bytes mapped.
        let place = unsafe { start.add(at) };
        // SAFETY: see above; volatile, because the guest may write it meanwhile.
        unsafe { place.read_volatile() }
    };
    let line = |index: usize| {
        let first = head + index * LINE_WORDS * WORD_BYTES;
        (0..LINE_WORDS).fold(0, |bits, word| {
            // SAFETY: the line lies before `tail`, which is at most `bytes`, and the guard keeps that many bytes mapped.
            let place = unsafe { start.add(first + word * WORD_BYTES) };
            // SAFETY: see above; `head` aligned it to words; volatile, because the guest may write it meanwhile.
            bits | unsafe { place.cast::<u64>().read_volatile() }
        })
    };
    (0..head).all(|at| byte(at) == 0)
        && (0..lines).all(|index| line(index) == 0)
        && (tail..bytes).all(|at| byte(at) == 0)
}

/// Has the kernel allocate every page of `slice`, each of `page_bytes`, as a write would; changes no byte.
///
/// # Errors
/// There is not enough memory, or what lies behind the slice cannot be written.
pub(crate) fn populate<B: BitmapSlice>(slice: &VolatileSlice<'_, B>, page_bytes: usize) -> io::Result<()> {
    let guard = slice.ptr_guard_mut();
    let (start, bytes) = (guard.as_ptr(), guard.len());
    // Of no bytes, the advice fails only where the kernel does not know it: before Linux 5.14.
    if advise_populate(start, 0).is_ok() {
        return advise_populate(start, bytes);
    }
    for at in (0..bytes).step_by(page_bytes) {
        // SAFETY: `at` is below `bytes`, and the guard keeps that many bytes mapped.
        let place = unsafe { start.add(at) };
        // SAFETY: see above; a byte is aligned, and whoever else writes it meanwhile loses nothing.
        unsafe { AtomicU8::from_ptr(place) }.fetch_or(0, Ordering::Relaxed);
    }
    Ok(())
}

/// Has the kernel allocate every page of `slice` in one call; changes no byte.
///
/// # Errors
/// As [`populate`], or the kernel does not know how: before Linux 5.14. Part of the pages may be allocated.
pub(crate) fn allocate<B: BitmapSlice>(slice: &VolatileSlice<'_, B>) -> io::Result<()> {
    let guard = slice.ptr_guard_mut();
    advise_populate(guard.as_ptr(), guard.len())
}

fn advise_populate(start: *mut u8, bytes: usize) -> io::Result<()> {
    // SAFETY: the advice changes no byte of a mapping, and fails where there is none.
    match unsafe { libc::madvise(start.cast(), bytes, libc::MADV_POPULATE_WRITE) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}
#[cfg(test)]
mod tests {
    use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

    use super::*;

    #[test]
    fn populated_memory_is_resident_and_keeps_its_bytes() {
        let memory = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap();
        memory.write_obj(7_u8, GuestAddress(5000)).unwrap();
        let slice = memory.get_slice(GuestAddress(0), 1 << 20).unwrap();
        for page_bytes in [4096, 1] {
            populate(&slice, page_bytes).unwrap();
        }
        let mut resident = [0_u8; 256];
        let start = slice.ptr_guard().as_ptr().cast_mut().cast();
        // SAFETY: the mapping has 256 pages of 4 KiB, fewer where pages are larger, and one byte is written for each.
        assert_eq!(unsafe { libc::mincore(start, 1 << 20, resident.as_mut_ptr()) }, 0);
        assert!(resident.iter().filter(|&&page| page & 1 == 1).count() >= 16);
        assert_eq!(memory.read_obj::<u8>(GuestAddress(5000)).unwrap(), 7);
    }

    #[test]
    fn a_single_bit_anywhere_is_seen_whatever_the_alignment() {
        let mut buffer = vec![0_u8; 256];
        for (start, len) in [(0, 256), (0, 0), (1, 200), (3, 7), (8, 64), (5, 131), (250, 6)] {
            assert!(is_zero(&VolatileSlice::from(&mut buffer[start..start + len])));
            for at in start..start + len {
                buffer[at] = 0x80;
                assert!(!is_zero(&VolatileSlice::from(&mut buffer[start..start + len])), "byte {at}");
                buffer[at] = 0;
            }
            if start > 0 {
                buffer[start - 1] = 1;
                assert!(is_zero(&VolatileSlice::from(&mut buffer[start..start + len])));
                buffer[start - 1] = 0;
            }
        }
    }
}
