// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! When a sender on demand ends, and what it leaves to the receiver then.

use super::*;
use crate::dense::Dense;

#[test]
fn a_receiver_that_has_asked_for_everything_may_ask_again_for_as_long_as_it_does() {
    let place = Place::new();
    let (mut tool, _line, mut running, _) = run_one(&place, &[]);
    running.touch_all();
    for _ in 0..6 {
        assert!(!tool.ends_within(Duration::from_secs(1)));
        running.touch(0x10_0000);
    }
    drop(running);
    tool.end().succeeded();
}

#[test]
fn a_receiver_whose_requests_end_before_the_vm_is_handed_over_is_abandoned() {
    let place = Place::new();
    let from = place.stored("from", 1);
    let (vmm, tool) = begin(&place, &[&from], &["--on-demand"]);
    let (mut line, mut faults) = take_state(&vmm);
    assert_eq!(faults.ask(0, PAGE), Some(OK));
    drop(faults);
    // It takes the sender a moment to see that.
    thread::sleep(Duration::from_millis(300));
    line.answer(OK);
    assert_eq!(line.next(), Some(ABANDON));
    tool.end().failed(3, "ended before it had all memory: 16383 pages not asked for");
}

#[test]
fn a_second_signal_ends_a_vm_that_the_receiver_does_not_say_it_has() {
    let place = Place::new();
    let from = place.stored("from", 1);
    let (vmm, mut tool) = begin(&place, &[&from], &["--on-demand"]);
    let (mut line, mut faults) = take_state(&vmm);
    assert_eq!(faults.ask(0, PAGE), Some(OK));
    line.answer(OK);
    assert_eq!(line.next(), Some(COMPLETE));
    tool.signal("-TERM");
    assert!(!tool.ends_within(Duration::from_millis(500)));
    signal_until_closed(&mut faults, &tool);
    assert!(line.passed.read(0, &mut [0; 4096]).is_err(), "memory was left to the receiver");
    let ended = tool.end().failed(130, "given up");
    assert!(ended.events().iter().all(|event| event["event"] != "handed-over"), "{ended:?}");
}

#[test]
fn what_is_zero_of_virtio_mem_takes_up_no_memory() {
    let place = Place::new();
    let from = place.stored_virtio_mem("from");
    let (tool, _line, mut running) = run(&place, &[&from], &from, &[]);
    let whole: u64 = RAM / 2;
    for number in 0..whole / PAGE {
        running.touch(number * PAGE);
    }
    // Whoever writes ahead would do so now.
    thread::sleep(Duration::from_millis(500));
    let Running { faults, passed, stored } = running;
    drop(faults);
    let last = tool.end().succeeded().last();
    assert!(last["faults"]["last_page_ms"].is_u64(), "{last}");
    assert!(passed.memory() == stored, "memory differs");
    let most = whole + (RAM - whole) / 4;
    assert!((whole..most).contains(&passed.allocated()), "{} bytes", passed.allocated());
}

#[test]
fn a_second_signal_ends_a_vm_whose_disk_answers_no_read() {
    let Some(dense) = Dense::mount() else { return };
    let place = Place::within(dense.path());
    let from = place.stored("from", 1);
    let local = Place::new();
    let (vmm, mut tool) = begin(&local, &[&from], &["--on-demand"]);
    let (mut line, mut faults) = take_state(&vmm);
    assert_eq!(faults.ask(0, PAGE), Some(OK));
    *dense.faults.hangs.lock().unwrap() = Some(MEMORY_FILE);
    line.answer(OK);
    assert_eq!(line.next(), Some(COMPLETE));
    line.answer(OK);
    // A page that the guest waits for, and that nobody can read.
    let range = [(60u64 << 20).to_le_bytes(), PAGE.to_le_bytes()].concat();
    faults.0.write_all(&message(PAGE_FAULT, &range)).unwrap();
    tool.signal("-TERM");
    assert!(!tool.ends_within(Duration::from_secs(4)), "the first signal waits");
    signal_until_closed(&mut faults, &tool);
    assert!(line.passed.read(0, &mut [0; 4096]).is_err(), "memory was left to the receiver");
    // The VM has ended. The kernel keeps a process for as long as a FUSE server has a read of it.
    *dense.faults.hangs.lock().unwrap() = None;
    let ended = tool.end();
    assert_eq!(ended.code, Some(130));
    assert!(ended.stderr.contains("waits for a page that cannot be read yet"), "{ended:?}");
}
