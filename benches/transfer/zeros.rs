// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A VM whose pages are all there and all zero.

use std::sync::Arc;
use std::time::{Duration, Instant};

use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

use crate::throughput::{BYTES, migrate};
use crate::vm::{Memory, PAGE, Vmm, memory, ranges_of};
use crate::way::Way;
use crate::{RUNS, gib_per_second, median};

const LEAST_RATIO: f64 = 0.8;
const PIECE: usize = 1 << 20;

pub(crate) fn holds() -> bool {
    let source = memory(&[(0, BYTES)]);
    (0..BYTES).step_by(PAGE as usize).for_each(|gpa| source.write_obj(0_u8, GuestAddress(gpa)).unwrap());
    println!("zeros: {} MiB of zero pages left out, against reading them once", BYTES >> 20);
    let ratio = median([(); RUNS].map(|()| {
        let read = read_once(&source);
        let (ours, sent) = migrate(Way::Unix, &source, &mut Vmm::new(memory(&ranges_of(&source))));
        assert!(sent.progress.skipped_zero_bytes >= BYTES - (8 << 20));
        println!(
            "  read {:.2} GiB/s  ours {:.2} GiB/s",
            gib_per_second(BYTES, read),
            gib_per_second(BYTES, ours)
        );
        read.as_secs_f64() / ours.as_secs_f64()
    }));
    println!("  median ratio {ratio:.2}, at least {LEAST_RATIO} wanted");
    ratio >= LEAST_RATIO
}

/// Reads all of `memory` by words, as fast as the compiler can.
#[expect(unsafe_code, reason = "the words of memory that nobody writes meanwhile")]
fn read_once(memory: &Arc<Memory>) -> Duration {
    let begun = Instant::now();
    let mut bits = 0;
    for gpa in (0..BYTES).step_by(PIECE) {
        let slice = memory.get_slice(GuestAddress(gpa), PIECE).unwrap();
        let guard = slice.ptr_guard();
        // SAFETY: so many bytes are mapped while the guard lives, a page's start is aligned, and no thread writes them.
        let words = unsafe { std::slice::from_raw_parts(guard.as_ptr().cast::<u64>(), PIECE / 8) };
        bits |= words.iter().fold(0, |bits, word| bits | word);
    }
    assert_eq!(std::hint::black_box(bits), 0);
    begun.elapsed()
}
