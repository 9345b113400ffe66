// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Devices whose states stream: what is worth reading while they run.

use super::estimates::{MIB, Size, Teller};
use super::*;

fn readers(set: &mut DeviceSet) -> Vec<StateReader> {
    let (readers, failures) = set.precopy_readers();
    assert!(failures.is_empty(), "{failures:?}");
    readers
}

/// One round: each device that has something is read to the end of its turn. Returns the bytes.
fn round(set: &mut DeviceSet) -> u64 {
    let mut bytes = 0;
    for mut reader in readers(set) {
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
    assert!(rounds.iter().sum::<u64>() <= 4 * 10 * MIB, "not much more than twice over: {rounds:?}");
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

#[test]
fn c30_a_reset_between_two_turns_of_reading_is_told_and_the_stream_begins_anew() {
    let (mut set, world) = set(vec![script(ALL), script(ALL)]);
    set.begin_streaming(&set.stream_identities());
    set.start_precopy().unwrap();
    round(&mut set);
    fail_at_next_call(&world, Effect::IsReset);
    let told = set.restart_after_resets().unwrap_err();
    assert_eq!(
        chain(&told),
        "Cannot read state of running device \"dev0\": Device left its data session for RUNNING unasked"
    );
    assert_eq!(states(&world), [PreCopy; 2]);
    set.restart_after_resets().unwrap();
    let readers = readers(&mut set);
    let next: Vec<_> = readers.iter().map(|reader| (reader.device(), reader.next_index())).collect();
    assert_eq!(next, [(0, 0)], "the other one has nothing new");
    assert_eq!(round(&mut set), 24);
}

#[test]
fn a_device_that_does_not_tell_what_precopy_has_left_leaves_it_and_the_others_are_read() {
    let (mut set, world) = set(vec![script(ALL), script(ALL)]);
    set.begin_streaming(&set.stream_identities());
    set.start_precopy().unwrap();
    {
        // The next calls ask twice where it is, and then what it has left.
        let mut world = world.lock().unwrap();
        world.fault = Some((world.calls + 2, Effect::Fails));
    }
    let (readers, failures) = set.precopy_readers();
    assert_eq!(readers.iter().map(StateReader::device).collect::<Vec<_>>(), [1]);
    assert_eq!(failures.len(), 1, "{failures:?}");
    assert_eq!(states(&world), [Running, PreCopy]);
    let (readers, failures) = set.precopy_readers();
    assert_eq!((readers.len(), failures.len()), (1, 0));
}

#[test]
fn a_stream_begins_at_the_first_byte_whatever_was_read_before() {
    for stopped in [false, true] {
        let (mut set, _world) = set(vec![script(ALL)]);
        set.start_precopy().unwrap();
        set.precopy_step(10).unwrap();
        if stopped {
            set.stop_for_copy().unwrap();
            set.save().unwrap();
        }
        set.begin_streaming(&set.stream_identities());
        set.start_precopy().unwrap();
        set.stop_for_copy().unwrap();
        let mut reader = set.final_readers().unwrap().remove(0);
        let mut buffer = Vec::new();
        while reader.read(&mut buffer, 1 << 20).is_some() {}
        set.finish_read(reader.end()).unwrap();
        assert_eq!(buffer, script(ALL).stream(), "stopped: {stopped}");
        // A save after the streams ended holds the state itself.
        set.end_streaming();
        assert_eq!(streams(&set.save().unwrap()), [script(ALL).stream()]);
    }
}

#[test]
fn a_device_that_took_a_part_in_whose_state_comes_in_the_tree_after_all_holds_just_that() {
    let (mut source, _world) = set(vec![script(ALL), script(ALL)]);
    let tree = migrate(&mut source).unwrap();
    let (mut set, world) = set(vec![script(ALL), script(ALL)]);
    let mut sinks = set.begin_loading().unwrap();
    sinks[1].write(b"a part").unwrap();
    set.load(&tree).unwrap();
    for device in &world.lock().unwrap().devices {
        assert_eq!(device.loaded, Some(script(ALL).stream()));
    }
    assert_eq!((set.is_loading(), set.drain_resets()), (false, vec!["dev1".to_owned()]));
    set.run().unwrap();
    assert_eq!(states(&world), [Running; 2]);
}
