// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A VM that uses little of its memory.

use std::sync::Arc;

use crate::throughput::migrate;
use crate::vm::{Memory, PAGE, Random, Vmm, memory, populated, ranges_of};
use crate::way::Way;
use crate::{RUNS, median};

const BYTES: u64 = 4 << 30;
const POPULATED_BYTES: u64 = 64 << 20;
const MOST_TIME: f64 = 0.05;

pub(crate) fn holds() -> bool {
    let (sparse, full) = (sparse_memory(), populated(BYTES));
    println!("sparse: {} of {} MiB populated against all of it", POPULATED_BYTES >> 20, BYTES >> 20);
    let misses = [Way::Tcp(1), Way::Tcp(4)].map(|way| {
        let ratio = median([(); RUNS].map(|()| ratio(way, &sparse, &full)));
        println!("  {way:<7}  median ratio {ratio:.4}, at most {MOST_TIME} wanted");
        ratio > MOST_TIME
    });
    !misses.contains(&true)
}

fn ratio(way: Way, sparse: &Arc<Memory>, full: &Arc<Memory>) -> f64 {
    let fresh = || Vmm::new(memory(&ranges_of(sparse)));
    let (little, sent) = migrate(way, sparse, &mut fresh());
    let (all, _) = migrate(way, full, &mut fresh());
    let ratio = little.as_secs_f64() / all.as_secs_f64();
    println!(
        "  {way:<7}  sparse {little:.1?} ({} MiB of holes left out)  full {all:.1?}  ratio {ratio:.4}",
        sent.progress.skipped_hole_bytes >> 20
    );
    ratio
}

/// Populates pages picked at random, which is the worst for whoever looks for holes.
fn sparse_memory() -> Arc<Memory> {
    let (memory, mut random) = (memory(&[(0, BYTES)]), Random(0x5eed));
    let mut taken = vec![false; usize::try_from(BYTES / PAGE).unwrap()];
    for _ in 0..POPULATED_BYTES / PAGE {
        let page = loop {
            let page = random.next() % (BYTES / PAGE);
            if !std::mem::replace(&mut taken[usize::try_from(page).unwrap()], true) {
                break page;
            }
        };
        random.fill(&memory, page * PAGE);
    }
    memory
}
