// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

use std::fs;
use std::io::Read;
use std::os::unix::fs::{FileExt, MetadataExt};

use proptest::prelude::*;

use super::bad_input::is_refusal_of;
use super::guest::*;
use crate::range::GpaRange;
use crate::snapshot::ops::seal_opened;
use crate::snapshot::*;
use crate::vm::{Captured, Vm, read_memory};

fn open(dir: &std::path::Path) -> FullSnapshot {
    FullSnapshot::open(dir, &SnapshotLimits::default()).unwrap()
}

#[test]
fn a_snapshot_is_cloud_hypervisors_directory_and_a_manifest() {
    let dir = tempfile::tempdir().unwrap();
    let (guest, target) = (Guest::small(), dir.path().join("a"));
    let digest = guest.write_full(&target);
    assert_eq!(names(&target), [CONFIG_FILE, MEMORY_FILE, MANIFEST_FILE, STATE_FILE]);
    guest.assert_full(&target);
    assert_eq!(open(&target).digest(), Some(digest));
}

#[test]
fn memory_that_never_came_takes_no_space() {
    let dir = tempfile::tempdir().unwrap();
    let mut guest = Guest::new(&[range(0, 1 << 30)]);
    guest.write([(1000, 5)]);
    let target = dir.path().join("a");
    guest.write_full(&target);
    let memory = fs::metadata(target.join(MEMORY_FILE)).unwrap();
    assert_eq!(memory.len(), 1 << 30);
    assert!(memory.blocks() * 512 <= 1 << 20, "{} blocks", memory.blocks());
    assert!(fs::metadata(target.join(MANIFEST_FILE)).unwrap().len() < 64 << 10);
    let populated: Vec<_> = open(&target).populated().collect::<Result<_, _>>().unwrap();
    assert!(populated.len() == 1 && populated[0].contains(1000 * page()));
}

#[test]
fn a_block_that_becomes_zero_is_a_hole_again() {
    let dir = tempfile::tempdir().unwrap();
    let guest = Guest::new(&[range(0, 4 << 20)]);
    let target = dir.path().join("a");
    let writer = SnapshotWriter::create(&target, guest.announced(), None, SnapshotLimits::default()).unwrap();
    writer.fill(range(0, 4 << 20), &mut std::io::repeat(9)).unwrap();
    writer.fill(range(0, 4 << 20), &mut std::io::repeat(0)).unwrap();
    writer.finish(&guest.config(), &guest.state()).unwrap();
    assert_eq!(open(&target).populated().count(), 0);
    guest.assert_full(&target);
}

#[test]
fn bytes_outside_memory_and_a_source_that_ends_early_are_errors() {
    let dir = tempfile::tempdir().unwrap();
    let guest = Guest::small();
    let writer =
        SnapshotWriter::create(&dir.path().join("a"), guest.announced(), None, SnapshotLimits::default())
            .unwrap();
    let mut bytes = std::io::repeat(1);
    let error = writer.fill(pages(39, 2), &mut bytes).unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::InvalidInput);
    assert!(error.to_string().contains("not all memory of the VM"), "{error}");
    let error = writer.fill(pages(0, 2), &mut bytes.take(100)).unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::UnexpectedEof);
    drop(writer);
    assert!(names(dir.path()).is_empty());
}

#[test]
fn threads_that_write_the_same_pages_leave_digests_that_match() {
    let dir = tempfile::tempdir().unwrap();
    let guest = Guest::new(&[range(0, 8 << 20)]);
    let target = dir.path().join("a");
    let writer = SnapshotWriter::create(&target, guest.announced(), None, SnapshotLimits::default()).unwrap();
    std::thread::scope(|scope| {
        for thread in 1..5u64 {
            let writer = &writer;
            scope.spawn(move || {
                for round in 0..40 {
                    let first = (round * 37 + thread * 11) % 1500;
                    let span = range(first * 4096, 130 * 4096);
                    writer.fill(span, &mut page_of(thread * 100 + round).repeat(200).as_slice()).unwrap();
                }
            });
        }
    });
    writer.finish(&guest.config(), &guest.state()).unwrap();
    assert_clean(&target);
}

#[test]
fn a_state_that_lists_memory_in_another_order_is_put_in_order() {
    let dir = tempfile::tempdir().unwrap();
    let guest = Guest::small();
    let target = dir.path().join("a");
    let writer = SnapshotWriter::create(&target, guest.announced(), None, SnapshotLimits::default()).unwrap();
    for &range in &guest.ranges {
        writer.fill(range, &mut &guest.bytes(range)[..]).unwrap();
    }
    let state = state_text(&[pages(64, 24), pages(8, 32), pages(0, 8)]);
    writer.finish(&guest.config(), &state).unwrap();
    assert_eq!(fs::read(target.join(MEMORY_FILE)).unwrap(), guest.file());
    let opened = open(&target);
    assert_eq!(opened.placement().ranges().collect::<Vec<_>>(), guest.ranges);
    assert!(opened.state().text().windows(18).any(|text| text == b"guest_ram_mappings"));
    assert_clean(&target);
}

#[test]
fn unplugged_memory_is_left_out() {
    let dir = tempfile::tempdir().unwrap();
    let mut guest = Guest::small();
    let target = dir.path().join("a");
    let announced =
        AnnouncedRam::with_hotpluggable(layout(&guest.ranges), &[pages(64, 24)], &SnapshotLimits::default())
            .unwrap();
    let writer = SnapshotWriter::create(&target, announced, None, SnapshotLimits::default()).unwrap();
    for &range in &guest.ranges {
        writer.fill(range, &mut &guest.bytes(range)[..]).unwrap();
    }
    guest.ranges = vec![pages(0, 40), pages(68, 4), pages(80, 8)];
    writer.finish(&guest.config(), &guest.state()).unwrap();
    assert_eq!(names(&target).len(), 4);
    guest.assert_full(&target);
}

#[test]
fn memory_that_the_state_leaves_out_or_invents_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let guest = Guest::small();
    let target = dir.path().join("a");
    let finish = |ranges: &[GpaRange]| {
        let writer =
            SnapshotWriter::create(&target, guest.announced(), None, SnapshotLimits::default()).unwrap();
        writer.finish(&guest.config(), &state_text(ranges)).unwrap_err()
    };
    let left_out = finish(&[pages(0, 40), pages(64, 23)]);
    assert!(matches!(left_out, WriteError::LeftOut { range } if range == pages(87, 1)), "{left_out}");
    let invented = finish(&[pages(0, 41), pages(64, 24)]);
    assert!(matches!(invented, WriteError::Unannounced { range } if range == pages(40, 1)), "{invented}");
    assert!(names(dir.path()).is_empty());
}

#[test]
fn a_text_edited_while_its_snapshot_is_sealed_does_not_fit_the_manifest() {
    let dir = tempfile::tempdir().unwrap();
    for name in [CONFIG_FILE, STATE_FILE] {
        let target = dir.path().join(name);
        Guest::small().write_full(&target);
        fs::remove_file(target.join(MANIFEST_FILE)).unwrap();
        let opened = FullSnapshot::open(&target, &SnapshotLimits::default()).unwrap();
        let edited = [fs::read(target.join(name)).unwrap(), b" ".to_vec()].concat();
        fs::write(target.join(name), edited).unwrap();
        seal_opened(opened.stored()).unwrap();
        let refused = FullSnapshot::open(&target, &SnapshotLimits::default()).unwrap_err();
        assert!(is_refusal_of(name, &refused), "{refused}");
    }
}

#[test]
fn sealing_gives_a_vmms_own_snapshot_the_manifest_a_writer_gives() {
    let dir = tempfile::tempdir().unwrap();
    let (guest, target) = (Guest::small(), dir.path().join("a"));
    let digest = guest.write_full(&target);
    let manifest = fs::read(target.join(MANIFEST_FILE)).unwrap();
    fs::remove_file(target.join(MANIFEST_FILE)).unwrap();
    assert_eq!(open(&target).digest(), None);
    assert!(matches!(
        verify(&target, &SnapshotLimits::default()),
        Err(ReadError::NoManifest { needed: ManifestUse::Verify, .. })
    ));
    assert_eq!(seal(&target, &SnapshotLimits::default()).unwrap(), digest);
    assert_eq!(fs::read(target.join(MANIFEST_FILE)).unwrap(), manifest);
    assert_eq!(seal(&target, &SnapshotLimits::default()).unwrap(), digest);
}

#[test]
fn a_snapshot_stands_for_a_vm_that_a_sender_sends() {
    let dir = tempfile::tempdir().unwrap();
    let (guest, target) = (Guest::small(), dir.path().join("a"));
    guest.write_full(&target);
    let mut source = SnapshotSource::new(open(&target)).unwrap();
    let memory = source.memory();
    assert_eq!(source.layout(), &layout(&guest.ranges));
    assert_eq!(source.backing().parts(), 2, "holes are found in the file");
    for &range in &guest.ranges {
        let mut bytes = vec![0; index(range.len())];
        read_memory(&*memory, range, &mut bytes).unwrap();
        assert_eq!(bytes, guest.bytes(range));
    }
    source.pause().unwrap();
    let state = source.state(vm_migration::Snapshot::default()).unwrap();
    let Captured::Text(text) = state else { panic!("a snapshot has a text") };
    assert_eq!(text.as_bytes(), guest.state());

    let config: serde_json::Value = serde_json::from_slice(&source.config().unwrap()).unwrap();
    let expected = format!(
        r#"{{"vm_config":{},"common_cpuid":[3],"memory_manager_data":{}}}"#,
        String::from_utf8(guest.config()).unwrap(),
        memory_manager_text(&[]),
    );
    assert_eq!(config, serde_json::from_str::<serde_json::Value>(&expected).unwrap());
}

#[test]
fn a_snapshot_altered_or_cut_off_is_not_sent() {
    let dir = tempfile::tempdir().unwrap();
    let (guest, target) = (Guest::small(), dir.path().join("a"));
    guest.write_full(&target);
    let memory = fs::OpenOptions::new().write(true).open(target.join(MEMORY_FILE)).unwrap();
    let mut source = SnapshotSource::new(open(&target)).unwrap();
    let mut send = || {
        source.config().and_then(|_| source.pause()).map_err(|error| {
            let Ok(error) = error.downcast::<OperationError>() else { panic!() };
            let OperationError::Send { path, source } = *error else { panic!("{error}") };
            assert_eq!(path, target);
            source
        })
    };
    send().unwrap();
    memory.set_len(64 * page() - 1).unwrap();
    assert_eq!(send().unwrap_err().kind(), std::io::ErrorKind::UnexpectedEof);

    memory.set_len(64 * page()).unwrap();
    memory.write_all_at(&[!0], 33 * page()).unwrap();
    let mut source = SnapshotSource::new(open(&target)).unwrap();
    source.config().unwrap();
    let error = source.pause().unwrap_err().downcast::<OperationError>().unwrap();
    let OperationError::Send { source, .. } = *error else { panic!("{error}") };
    assert!(Altered::of(&source).unwrap().to_string().contains("Memory at GPA 0x20000"), "{source}");

    fs::remove_file(target.join(MANIFEST_FILE)).unwrap();
    let mut source = SnapshotSource::new(open(&target)).unwrap();
    source.config().unwrap();
    source.pause().unwrap();
}

#[test]
fn guest_memory_is_written_as_it_is_read() {
    let dir = tempfile::tempdir().unwrap();
    let (guest, first, second) = (Guest::small(), dir.path().join("a"), dir.path().join("b"));
    let digest = guest.write_full(&first);
    let source = SnapshotSource::new(open(&first)).unwrap();
    let writer = SnapshotWriter::create(&second, guest.announced(), None, SnapshotLimits::default()).unwrap();
    writer.copy_from(guest.ranges.iter().copied(), &*source.memory()).unwrap();
    assert_eq!(writer.finish(&guest.config(), &guest.state()).unwrap(), digest);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    /// Bytes at any offset and of any length, over and over, against a plain array; the digests kept while writing
    /// against those of the finished file.
    #[test]
    fn the_last_bytes_win_and_the_digests_follow(
        guest in any_guest(),
        fills in prop::collection::vec((any::<prop::sample::Index>(), 1..200_000u64, 0..3u8), 0..25),
    ) {
        let dir = tempfile::tempdir().unwrap();
        let target = dir.path().join("a");
        let writer = SnapshotWriter::create(&target, guest.announced(), None, SnapshotLimits::default()).unwrap();
        let mut model = vec![0; guest.file().len()];
        let placement = Placement::new(guest.ranges.iter().copied(), &SnapshotLimits::default()).unwrap();
        for (at, length, byte) in fills {
            let offset = at.index(model.len());
            let Some(gpa) = placement.gpas(offset as u64, length).next() else { continue };
            writer.fill(gpa, &mut std::io::repeat(byte)).unwrap();
            model[offset..offset + index(gpa.len())].fill(byte);
        }
        let digest = writer.finish(&guest.config(), &guest.state()).unwrap();
        prop_assert!(fs::read(target.join(MEMORY_FILE)).unwrap() == model);
        assert_clean(&target);
        fs::remove_file(target.join(MANIFEST_FILE)).unwrap();
        prop_assert_eq!(seal(&target, &SnapshotLimits::default()).unwrap(), digest);
    }

    #[test]
    fn any_memory_written_is_read_back(guest in any_guest()) {
        let dir = tempfile::tempdir().unwrap();
        let target = dir.path().join("a");
        guest.write_full(&target);
        guest.assert_full(&target);
        let opened = open(&target);
        for &range in &guest.ranges {
            let mut bytes = vec![1; index(range.len())];
            opened.read(range, &mut bytes).unwrap();
            prop_assert!(bytes == guest.bytes(range));
        }
    }
}
