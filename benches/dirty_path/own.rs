// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The VMM's own bitmap against vm-memory's: setting a bit, and draining what is idle.

use std::hint::black_box;

use vfio_migration::source::{SummaryBitmap, TakeDirtyWords};
use vm_memory::bitmap::{AtomicBitmap, Bitmap, NewBitmap};

use crate::pattern::Random;
use crate::report::{Line, median, milliseconds};

const MARKS: usize = 1 << 20;
const RAM_BYTES: u64 = 1 << 40;

/// Compares what setting a bit costs, among `pages` pages at random, each set by far more than once or not.
fn marks(name: &str, pages: u64, runs: usize) -> Line {
    let mut random = Random(0x9e37_79b9_7f4a_7c15);
    let offsets: Vec<_> = (0..MARKS).map(|_| (random.below(pages) << 12) as usize).collect();
    let bytes = (pages << 12) as usize;
    let (theirs, ours) = (AtomicBitmap::with_len(bytes), SummaryBitmap::with_len(bytes));
    let all = |bitmap: &dyn Fn(usize)| milliseconds(|| offsets.iter().for_each(|&offset| bitmap(offset)));
    let times: Vec<_> = (0..runs + 1)
        .map(|_| {
            // Each begins with a clear bitmap whose words are in memory.
            ours.take_dirty_words(&mut |_, words| {
                black_box(words);
            });
            theirs.reset();
            (all(&|offset| ours.mark_dirty(offset, 1)), all(&|offset| theirs.mark_dirty(offset, 1)))
        })
        .skip(1)
        .collect();
    let (ours, theirs) = (median(times.iter().map(|time| time.0)), median(times.iter().map(|time| time.1)));
    let nanoseconds = |spent: f64| spent * 1e6 / MARKS as f64;
    Line::new(format!("own bitmap, {name}"), ours / theirs, 1.1)
        .with("ours_ns", nanoseconds(ours))
        .with("vm_memory_ns", nanoseconds(theirs))
}

/// Times a drain of 1 TiB of which nothing was written.
fn idle_drain(runs: usize) -> Line {
    let bitmap = SummaryBitmap::with_len(RAM_BYTES as usize);
    let drain = || {
        milliseconds(|| {
            bitmap.take_dirty_words(&mut |_, words| {
                black_box(words);
            });
        })
    };
    drain();
    let spent = median((0..runs.max(9)).map(|_| drain()));
    Line::new("own bitmap, idle drain of 1 TiB, ms".to_owned(), spent, 0.1)
}

pub(crate) fn measure(runs: usize) -> Vec<Line> {
    vec![
        marks("marks in 64 MiB", 64 << 8, runs),
        marks("marks in 1 TiB", RAM_BYTES >> 12, runs),
        idle_drain(runs),
    ]
}
