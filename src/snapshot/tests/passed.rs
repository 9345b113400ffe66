// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use proptest::prelude::*;
use rustix::fs::{FallocateFlags, MemfdFlags, fallocate, memfd_create};

use super::guest::*;
use crate::offload::{LocalEvent, LocalOptions};
use crate::range::{GpaRange, subtract};
use crate::snapshot::*;
use crate::transfer::receive::{Completion, Destination};

/// The guest's memory in a memfd.
fn passed(guest: &Guest) -> File {
    let memory = File::from(memfd_create("guest", MemfdFlags::CLOEXEC).unwrap());
    memory.set_len(guest.ranges.iter().map(|range| range.end()).max().unwrap()).unwrap();
    guest.seeds.iter().for_each(|(&gpa, &seed)| memory.write_all_at(&page_of(seed), gpa).unwrap());
    memory
}

/// The Config of a guest whose memory is in a slot for each region, at its address in one file; all but the first are hotpluggable.
fn config_of(guest: &Guest) -> Vec<u8> {
    let mapping = |(slot, range): (usize, &GpaRange)| {
        let (gpa, size, virtio_mem) = (range.start(), range.len(), slot > 0);
        format!(
            r#"{{"slot":{slot},"gpa":{gpa},"size":{size},"virtio_mem":{virtio_mem},"file_offset":{gpa}}}"#
        )
    };
    let mappings: Vec<_> = guest.ranges.iter().enumerate().map(mapping).collect();
    let config = String::from_utf8(guest.config()).unwrap();
    let memory = format!(r#"{{"guest_ram_mappings":[{}]}}"#, mappings.join(","));
    format!(r#"{{"vm_config":{config},"memory_manager_data":{memory}}}"#).into_bytes()
}

/// Takes a snapshot of `guest`, of which `later` is written after the Config is answered, when `unplugged` is no memory any more; returns
/// the events.
fn take(
    guest: &mut Guest,
    later: Vec<(u64, u64)>,
    unplugged: &[GpaRange],
    target: &Path,
    base: Option<Base>,
    warm_timeout: Option<Duration>,
) -> Vec<LocalEvent> {
    take_while(guest, later, unplugged, (target, base, warm_timeout), || ())
}

/// As [`take`]; does `something` after the Config is answered.
fn take_while(
    guest: &mut Guest,
    later: Vec<(u64, u64)>,
    unplugged: &[GpaRange],
    (target, base, warm_timeout): (&Path, Option<Base>, Option<Duration>),
    something: impl FnOnce(),
) -> Vec<LocalEvent> {
    let events = Arc::new(Mutex::new(Vec::new()));
    let told = Arc::clone(&events);
    let observer: Box<dyn FnMut(LocalEvent) + Send> = Box::new(move |event| told.lock().unwrap().push(event));
    let local = LocalOptions { warm_timeout, observer: Some(observer), ..LocalOptions::default() };
    let progress = local.progress.clone();
    let options = DestinationOptions { base, local, ..DestinationOptions::default() };
    let mut destination = SnapshotDestination::create(target, options).unwrap();
    let memory = passed(guest);
    for slot in 0..u32::try_from(guest.ranges.len()).unwrap() {
        destination.descriptor(slot, memory.try_clone().unwrap().into()).unwrap();
    }
    destination.config(&config_of(guest)).unwrap();
    something();
    for (number, seed) in later {
        if !guest.write([(number, seed)]).is_empty() {
            memory.write_all_at(&page_of(seed), number * page()).unwrap();
            if seed == 0 && number % 2 == 0 {
                let punch = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
                fallocate(&memory, punch, number * page(), page()).unwrap();
            }
        }
    }
    for &gone in unplugged {
        subtract(&mut guest.ranges, gone);
        guest.seeds.retain(|&gpa, _| !gone.contains(gpa));
    }
    destination.state(guest.state()).unwrap();
    assert_eq!(progress.done_bytes(), progress.total_bytes());
    assert_eq!(destination.complete(false).unwrap(), Completion::Moved);
    std::mem::take(&mut events.lock().unwrap())
}

/// Checks that `dir`, or what it differs from `base` by, holds the guest's memory.
fn assert_memory(guest: &Guest, dir: &Path, base: Option<&Path>) {
    assert_clean(dir);
    let chain = SnapshotChain::open(base.into_iter().chain([dir]), &SnapshotLimits::default()).unwrap();
    let whole = dir.with_extension("whole");
    apply(&chain, &whole, &SnapshotLimits::default()).unwrap();
    assert!(std::fs::read(whole.join(MEMORY_FILE)).unwrap() == guest.file());
}

const TIMEOUTS: [Option<Duration>; 3] = [None, Some(Duration::ZERO), Some(Duration::MAX)];

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]
    #[test]
    fn a_snapshot_is_the_memory_at_the_state_whatever_was_copied_before(
        guest in any_guest(),
        since_base in any_writes(),
        later in any_writes(),
        unplugged in prop::collection::vec((0..180_u64, 1..30_u64), 0..3),
        timeout in 0..TIMEOUTS.len(),
        is_differential: bool,
    ) {
        let dir = tempfile::tempdir().unwrap();
        let (base, next) = (dir.path().join("base"), dir.path().join("next"));
        let mut guest = guest;
        guest.write_full(&base);
        guest.write(since_base);
        let against = is_differential.then(|| Base::open([&base], &SnapshotLimits::default()).unwrap());
        // What is not hotpluggable stays.
        let first = guest.ranges[0].end() / page();
        let unplugged: Vec<_> = unplugged.into_iter().map(|(at, count)| pages(at.max(first), count)).collect();
        take(&mut guest, later, &unplugged, &next, against, TIMEOUTS[timeout]);
        assert_memory(&guest, &next, is_differential.then_some(&base));
    }
}

#[test]
fn a_warm_copy_whose_time_is_over_leaves_the_rest_to_the_pause() {
    let dir = tempfile::tempdir().unwrap();
    let (mut guest, next) = (Guest::small(), dir.path().join("next"));
    let populated = guest.seeds.len() as u64 * page();
    let events = take(&mut guest, vec![(1, 9)], &[], &next, None, Some(Duration::ZERO));
    assert!(matches!(events[1], LocalEvent::Copied { bytes: 0, whole: false, .. }), "{events:?}");
    let stored =
        matches!(events[2], LocalEvent::Stored { written_bytes, .. } if written_bytes == populated + page());
    assert!(stored, "{events:?}");
    assert_memory(&guest, &next, None);
}

/// What was moved or written while the VM was paused, in bytes.
fn written_in_pause(events: &[LocalEvent]) -> u64 {
    let written = events.iter().map(|event| match event {
        LocalEvent::Moved { bytes } => *bytes,
        LocalEvent::Stored { written_bytes, .. } => *written_bytes,
        _ => 0,
    });
    written.sum()
}

#[test]
fn memory_that_is_not_plugged_costs_nothing_at_the_end_and_what_is_behind_it_little() {
    for (unplugged, moved) in [(pages(72, 16), 0), (pages(66, 3), 1)] {
        for is_differential in [false, true] {
            let dir = tempfile::tempdir().unwrap();
            let (mut guest, base, next) = (Guest::small(), dir.path().join("base"), dir.path().join("next"));
            guest.write_full(&base);
            guest.write((0..40).map(|at| (at, at + 50)));
            guest.write([(70, 3), (71, 4)]);
            let against = is_differential.then(|| Base::open([&base], &SnapshotLimits::default()).unwrap());
            let later = vec![(1, 99), (64, 5)];
            let events = take(&mut guest, later, &[unplugged], &next, against, Some(Duration::MAX));
            let moved = if is_differential { 0 } else { moved * 3 * page() };
            assert_eq!(written_in_pause(&events), 2 * page() + moved, "{events:?}");
            assert_memory(&guest, &next, is_differential.then_some(&base));
            if is_differential {
                let differential = Differential::open(&next, &SnapshotLimits::default()).unwrap();
                let last = differential.changed().ranges().last();
                assert_eq!(last, Some(pages(64, 1)), "the others were laid out before it came");
            }
        }
    }
}

#[test]
fn holes_where_the_base_has_something_are_not_looked_at_again_in_the_pause() {
    let dir = tempfile::tempdir().unwrap();
    let (mut guest, base, next) = (Guest::small(), dir.path().join("base"), dir.path().join("next"));
    guest.write_full(&base);
    // All that was there is gone.
    guest.seeds.clear();
    let against = Some(Base::open([&base], &SnapshotLimits::default()).unwrap());
    // From here on nothing of the base can be read: its memory has lost its bytes.
    let events = take_while(&mut guest, Vec::new(), &[], (&next, against, Some(Duration::MAX)), || {
        File::options().write(true).open(base.join(MEMORY_FILE)).unwrap().set_len(0).unwrap();
    });
    assert_eq!(written_in_pause(&events), 0, "{events:?}");
    assert_clean(&next);
}
