// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Receivers on demand that do what no VMM does.

use super::*;

#[test]
fn a_request_that_never_comes_whole_is_waited_for_as_long_as_any_message() {
    let page = [0u64.to_le_bytes(), PAGE.to_le_bytes()].concat();
    for bytes in [&[9, 0, 0][..], &message(PAGE_FAULT, &page)[..20]] {
        let place = Place::new();
        let (tool, _line, mut running, _) = run_one(&place, &["--idle-timeout", "1"]);
        running.faults.0.write_all(bytes).unwrap();
        let begun = Instant::now();
        assert_eq!(running.faults.0.read(&mut [0; 16]).unwrap(), 0, "closed");
        assert!(begun.elapsed() < Duration::from_secs(30));
        let ended = tool.end();
        assert!(matches!(ended.code, Some(3 | 6)), "{ended:?}");
    }
}

#[test]
fn requests_whose_answers_nobody_reads_end_with_an_error() {
    let place = Place::new();
    let (tool, _line, mut running, _) = run_one(&place, &["--idle-timeout", "1"]);
    running.faults.0.set_write_timeout(Some(PATIENCE)).unwrap();
    let page = [0u64.to_le_bytes(), PAGE.to_le_bytes()].concat();
    let (flood, begun) = (message(PAGE_FAULT, &page).repeat(1000), Instant::now());
    // Until the sender has had enough.
    while running.faults.0.write_all(&flood).is_ok() {
        assert!(begun.elapsed() < PATIENCE);
    }
    let ended = tool.end();
    assert!(matches!(ended.code, Some(3 | 6)), "{ended:?}");
}

#[test]
fn a_receiver_that_cuts_its_memory_off_itself_gets_no_more_of_it() {
    let place = Place::new();
    let from = place.stored_large("from", 8);
    let (vmm, tool) = begin(&place, &[&from], &["--on-demand"]);
    let (mut line, mut faults) = take_state(&vmm);
    assert_eq!(faults.ask(0, PAGE), Some(OK));
    for file in line.passed.files.values() {
        file.set_len(0).unwrap();
    }
    line.answer(OK);
    // Where there is no room for a page, there is an error, and no answer that it is there.
    assert_eq!(faults.ask((5113 << 20) - PAGE, PAGE), Some(ERROR));
    drop(line);
    // It did not say whether it runs the VM; without its memory it does not.
    tool.end().failed(4, "Cannot read the snapshot into memory");
}
