// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Devices whose states stream: what is worth reading while they run.

use super::estimates::{MIB, Size, Teller};
use super::*;

/// One round: each device that has something is read to the end of its turn. Returns the bytes.
fn round(set: &mut DeviceSet) -> u64 {
    let mut bytes = 0;
    for mut reader in set.precopy_readers().unwrap() {
        let mut buffer = Vec::new();
        while reader.read(&mut buffer, 1 << 20).is_some() {
            buffer.clear();
        }
        let read = reader.end();
        bytes += read.bytes();
        set.finish_read(read).unwrap();
    }
    set.estimate().unwrap();
    bytes
}

fn streaming(teller: Teller) -> DeviceSet {
    let mut set = teller.in_set();
    set.begin_streaming(&set.stream_identities());
    set.start_precopy().unwrap();
    set.estimate().unwrap();
    set
}

#[test]
fn c46_a_stream_is_read_as_long_as_that_shrinks_what_is_left() {
    let mut shrinking = Teller::new(Size::Whole(40 * MIB), 5 * MIB);
    shrinking.info.dirty_bytes = 20 * MIB;
    let mut set = streaming(shrinking);
    assert_eq!((0..20).map(|_| round(&mut set)).sum::<u64>(), 25 * MIB, "dirty bytes, too");
    let rewritten = Teller::new(Size::Whole(5 * MIB), 5 * MIB).changing(5 * MIB);
    let mut set = streaming(rewritten);
    let rounds: Vec<_> = (0..20).map(|_| round(&mut set)).collect();
    assert!(rounds.iter().sum::<u64>() <= 3 * 10 * MIB, "not much more than twice over: {rounds:?}");
    assert!(rounds[10..].iter().all(|&bytes| bytes == 0), "and then no more: {rounds:?}");
}

#[test]
fn c37_a_stream_that_brings_nothing_more_is_read_again_for_initial_bytes_that_grow() {
    let rewritten = Teller::new(Size::Whole(5 * MIB), 5 * MIB).changing(5 * MIB);
    let asked = std::sync::Arc::clone(&rewritten.grows);
    let mut set = streaming(rewritten);
    let _rounds: Vec<_> = (0..20).map(|_| round(&mut set)).collect();
    assert_eq!(round(&mut set), 0);
    asked.store(1000, std::sync::atomic::Ordering::Relaxed);
    assert_eq!(set.estimate_anew().unwrap().initial_bytes, 1000);
    assert_eq!(round(&mut set), 1000);
}
