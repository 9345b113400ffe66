// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Guest memory looked at in place, while the guest may write it.

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

#[cfg(test)]
mod tests {
    use super::*;

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
