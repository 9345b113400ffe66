// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Sources that pass memory and do what no VMM does.

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use super::*;

#[test]
fn memory_that_goes_on_changing_is_kept_as_some_bytes_and_their_digests() {
    for options in [&[][..], &["--no-warm-copy"]] {
        let (mut bench, memory, is_over) = (Bench::new(options), guest(), AtomicBool::new(false));
        thread::scope(|scope| {
            // A vCPU that nobody has paused.
            scope.spawn(|| {
                for number in (0u64..).take_while(|_| !is_over.load(Ordering::Relaxed)) {
                    let bytes = number.to_le_bytes().repeat(16);
                    memory.write_all_at(&bytes, number * 7919 * 64 % (RAM / 2)).unwrap();
                }
            });
            assert_eq!(bench.pass(0, &[memory.as_fd()]), Some(OK));
            assert_eq!(bench.ask(&one_slot()), Some(OK));
            let last = bench.finish();
            is_over.store(true, Ordering::Relaxed);
            assert_eq!(last, Some(OK));
        });
        let (ended, place) = bench.end();
        ended.succeeded();
        assert_eq!(kept_memory(&place).len() as u64, RAM);
    }
}

#[test]
fn more_descriptors_than_a_vm_has_slots_are_refused() {
    let (mut bench, memory) = (Bench::new(&[]), guest());
    let taken = (0..100_000).take_while(|&slot| bench.pass(slot, &[memory.as_fd()]) == Some(OK)).count();
    // A process of few open files takes fewer.
    let (most, few) = ("More than 4096 memory slots", "More descriptors came than can be taken");
    assert!((1..=4096).contains(&taken), "{taken}");
    bench.refuses(if taken == 4096 { most } else { few });
}

#[test]
fn a_slot_number_that_never_comes_whole_is_waited_for_as_long_as_any_message() {
    let mut bench = Bench::new(&["--idle-timeout", "1"]);
    bench.source.0.write_all(&request(MEMORY_FD, 4)).unwrap();
    bench.source.0.write_all(&[0; 2]).unwrap();
    let begun = Instant::now();
    assert_ne!(bench.source.answer(), Some(OK));
    assert!(begun.elapsed() < Duration::from_secs(30));
    let (ended, place) = bench.end();
    assert_eq!(ended.code, Some(3), "{ended:?}");
    assert!(is_empty(place.root()));
}
