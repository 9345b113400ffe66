// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The memory a lying peer can make its receiver take, as the kernel counts it.
//!
//! One test in a process of its own, so that nothing else moves the peak.

#[path = "../../integration/src/skip.rs"]
#[expect(dead_code, unreachable_pub, reason = "other crates' tests use the rest")]
mod skip;

use std::fs;

use vm_migration::protocol::MemoryRangeTable;

/// The largest claim that passes for a table: an allocation of it could not go unseen.
const CLAIMED_BYTES: u64 = 1 << 30;

/// The peak size of this process's address space, which memory taken but not touched counts in too.
fn peak_kib() -> Option<u64> {
    let status = fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmPeak:"))?;
    line.trim().strip_suffix(" kB")?.parse().ok()
}

#[test]
fn c44_a_claimed_gigabyte_that_never_arrives_takes_no_memory() {
    let Some(before_kib) = peak_kib() else {
        return skip::skip("no VmPeak in /proc/self/status to measure allocations by");
    };
    let sent = vec![0x5a; 1 << 20];
    let error = MemoryRangeTable::read_from(&mut sent.as_slice(), CLAIMED_BYTES).unwrap_err();
    assert!(format!("{:#}", anyhow::Error::from(error)).contains("after 1048576 of 1073741824 bytes"));

    let grown_kib = peak_kib().unwrap() - before_kib;
    assert!(grown_kib < 16 << 10, "address space grew by {grown_kib} KiB for 1 MiB of table");
}
