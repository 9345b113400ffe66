// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Directories as people have them: made by a VMM, edited by hand, of odd shapes.

use std::fs;
use std::path::Path;
use std::sync::Arc;

use proptest::prelude::*;

use super::guest::*;
use crate::granule::Granule;
use crate::layout::Layout;
use crate::range::GpaRange;
use crate::snapshot::*;

/// A configuration whose zone `shared` is in a file of its own.
const ZONED: &str = r#"{"memory":{"size":0,"zones":[{"id":"own","size":65536},
    {"id":"shared","size":65536,"file":"/dev/shm/zone","shared":true}]}}"#;

/// Writes what a VMM does: memory that lists `listed` and belongs to zones, and `memory` as the file if there is one; else the VM
/// has the zone `shared` alone.
fn write_zoned(dir: &Path, listed: &[GpaRange], memory: Option<&[u8]>) {
    fs::create_dir(dir).unwrap();
    fs::write(dir.join(CONFIG_FILE), ZONED).unwrap();
    let zone = |range: GpaRange, id: &str| {
        let (gpa, size) = (range.start(), range.len());
        format!(
            r#"{{\"slot\":0,\"gpa\":{gpa},\"size\":{size},\"zone_id\":\"{id}\",\"virtio_mem\":false,\"file_offset\":0}}"#
        )
    };
    let own = memory.map(|_| zone(pages(0, 16), "own"));
    let mappings = own.into_iter().chain([zone(pages(64, 16), "shared")]).collect::<Vec<_>>().join(",");
    let state = String::from_utf8(state_text(listed)).unwrap();
    let state =
        state.replacen(r#"\"guest_ram_mappings\":[]"#, &format!(r#"\"guest_ram_mappings\":[{mappings}]"#), 1);
    fs::write(dir.join(STATE_FILE), state).unwrap();
    if let Some(memory) = memory {
        fs::write(dir.join(MEMORY_FILE), memory).unwrap();
    }
}

#[test]
fn c50_memory_wholly_in_a_zones_own_file_is_named_and_the_rest_is_sealed() {
    let (dir, limits) = (tempfile::tempdir().unwrap(), SnapshotLimits::default());
    let target = dir.path().join("a");
    write_zoned(&target, &[], None);
    let described = describe(&target, &limits).unwrap();
    assert_eq!(
        (described.memory_bytes, described.elsewhere.to_string()),
        (0, "memory zone shared is in /dev/shm/zone".into())
    );
    let digest = seal(&target, &limits).unwrap();
    let report = verify(&target, &limits).unwrap();
    assert!(report.is_clean() && report.elsewhere == described.elsewhere, "{report:?}");

    let opened = FullSnapshot::open(&target, &limits).unwrap();
    assert_eq!(opened.digest(), Some(digest));
    let chain = SnapshotChain::of(opened);
    let error = apply(&chain, &dir.path().join("whole"), &limits).unwrap_err();
    assert!(
        error.to_string().ends_with("a holds no memory: memory zone shared is in /dev/shm/zone"),
        "{error}"
    );
    let error = subtract(
        &chain,
        Arc::new(SnapshotChain::open([&target], &limits).unwrap()),
        &dir.path().join("x"),
        &limits,
    );
    assert!(matches!(error, Err(OperationError::Read(ReadError::NoMemory { .. }))), "{error:?}");
    let error = SnapshotSource::new(FullSnapshot::open(&target, &limits).unwrap()).unwrap_err();
    assert!(matches!(error, OperationError::Elsewhere { .. }), "{error}");
    assert_eq!(names(dir.path()), ["a"]);

    fs::write(target.join(STATE_FILE), b"x").unwrap();
    assert!(verify(&target, &limits).unwrap().is_damaged());
}

#[test]
fn c50_of_mixed_zones_only_the_anonymous_ones_are_in_the_file() {
    let (dir, limits) = (tempfile::tempdir().unwrap(), SnapshotLimits::default());
    let (target, whole) = (dir.path().join("a"), dir.path().join("whole"));
    let memory = page_of(7).repeat(16);
    write_zoned(&target, &[pages(0, 16)], Some(&memory));
    seal(&target, &limits).unwrap();
    let report = verify(&target, &limits).unwrap();
    assert!(report.is_clean() && report.elsewhere.zones()[0].zone.as_deref() == Some("shared"), "{report:?}");
    apply(&SnapshotChain::open([&target], &limits).unwrap(), &whole, &limits).unwrap();
    assert_eq!(fs::read(whole.join(MEMORY_FILE)).unwrap(), memory);
    let error = SnapshotSource::new(FullSnapshot::open(&target, &limits).unwrap()).unwrap_err();
    assert!(error.to_string().contains("lacks memory that the VM has: memory zone shared"), "{error}");

    // A folder, in which the VMM made a file without a name: its memory is in the snapshot.
    let both = dir.path().join("both");
    write_zoned(&both, &[pages(0, 16), pages(64, 16)], Some(&page_of(7).repeat(32)));
    let opened = FullSnapshot::open(&both, &limits).unwrap();
    assert!(opened.elsewhere().is_empty());
    SnapshotSource::new(opened).unwrap();
}

#[test]
fn c66_an_edited_config_is_sent_or_sealed_anew_and_differentials_still_fit() {
    let (dir, limits) = (tempfile::tempdir().unwrap(), SnapshotLimits::default());
    let [base, next, last, whole] = ["base", "next", "last", "whole"].map(|name| dir.path().join(name));
    let mut guest = Guest::small();
    let name = guest.write_full(&base);
    let dirty = guest.write([(3, 77)]);
    guest.write_differential(&next, Base::Named(name), &dirty);
    let over = guest.write([(5, 78)]);
    guest.write_differential(&last, Base::open([&base, &next], &limits).unwrap(), &over);
    for dir in [&base, &next] {
        fs::write(dir.join(CONFIG_FILE), config_text(99)).unwrap();
    }
    let error = SnapshotChain::open([&base, &next], &limits).unwrap_err();
    assert!(matches!(error, ReadError::EditedConfig { .. }), "{error}");

    let sent = FullSnapshot::open_with_config(&base, &config_text(5), &limits).unwrap();
    assert_eq!(sent.config().text().as_bytes(), config_text(5));
    assert!(sent.stored().reader().is_some_and(|memory| memory.digests.is_some()), "its memory is checked");
    assert!(FullSnapshot::open_with_config(&base, b"{}", &limits).is_err());

    let renamed = reseal(&base, &limits).unwrap();
    assert_ne!(renamed, name);
    assert_eq!(reseal(&base, &limits).unwrap(), renamed, "there is nothing left to take");
    reseal(&next, &limits).unwrap();
    assert_clean(&base);
    assert_clean(&next);
    apply(&SnapshotChain::open([&base, &next, &last], &limits).unwrap(), &whole, &limits).unwrap();
    assert_eq!(fs::read(whole.join(MEMORY_FILE)).unwrap(), guest.file());

    // So it is in two steps: what the first makes answers to every name of what it was made of.
    let [first, second, alone] = ["first", "second", "alone"].map(|name| dir.path().join(name));
    apply(&SnapshotChain::open([&base, &next], &limits).unwrap(), &first, &limits).unwrap();
    apply(&SnapshotChain::open([&first, &last], &limits).unwrap(), &second, &limits).unwrap();
    assert_eq!(fs::read(second.join(MEMORY_FILE)).unwrap(), guest.file());
    apply(&SnapshotChain::open([&base], &limits).unwrap(), &alone, &limits).unwrap();
    let manifest = |dir: &Path| fs::read(dir.join(MANIFEST_FILE)).unwrap();
    assert_eq!(manifest(&alone), manifest(&base), "no name twice");
}

#[test]
fn c66_a_seal_of_an_edited_config_hides_no_damage() {
    let (dir, limits) = (tempfile::tempdir().unwrap(), SnapshotLimits::default());
    let target = dir.path().join("a");
    let guest = Guest::small();
    guest.write_full(&target);
    fs::write(target.join(CONFIG_FILE), config_text(99)).unwrap();
    let state = fs::read(target.join(STATE_FILE)).unwrap();
    fs::write(target.join(STATE_FILE), [&state[..], b" "].concat()).unwrap();
    let error = reseal(&target, &limits).unwrap_err();
    assert!(matches!(error, OperationError::Read(ReadError::Altered { name: STATE_FILE, .. })), "{error}");
    fs::write(target.join(STATE_FILE), state).unwrap();

    let memory = fs::OpenOptions::new().write(true).open(target.join(MEMORY_FILE)).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&memory, b"x", 3).unwrap();
    reseal(&target, &limits).unwrap();
    let report = verify(&target, &limits).unwrap();
    assert!(!report.config_edited && report.is_damaged(), "{report:?}");
    fs::remove_file(target.join(MANIFEST_FILE)).unwrap();
    assert!(matches!(reseal(&target, &limits), Err(OperationError::Read(ReadError::NoManifest { .. }))));
}

#[test]
fn c57_only_pages_that_became_zero_are_counted_as_such() {
    let (dir, limits) = (tempfile::tempdir().unwrap(), SnapshotLimits::default());
    let [base, next, whole] = ["base", "next", "whole"].map(|name| dir.path().join(name));
    let mut guest = Guest::new(&[pages(0, 256)]);
    guest.write((0..256).step_by(8).map(|at| (at, at + 1)));
    guest.write_full(&base);
    // Of a block's pages one becomes zero and never comes, as a source leaves it out; another comes and is zero.
    guest.write([(8, 0), (200, 0), (16, 5)]);
    let base_of = Base::open([&base], &limits).unwrap();
    let writer = SnapshotWriter::create(&next, guest.announced(), Some(base_of), limits).unwrap();
    writer.presume_zeros().unwrap();
    for at in (0..256).step_by(8).filter(|&at| at != 8) {
        writer.fill(pages(at, 1), &mut &guest.bytes(pages(at, 1))[..]).unwrap();
    }
    writer.finish(&guest.config(), &guest.state()).unwrap();
    let differential = Differential::open(&next, &limits).unwrap();
    assert_eq!(differential.zeroed().collect::<Vec<_>>(), [pages(8, 1), pages(200, 1)]);
    let SnapshotKind::Differential { zeroed_bytes, changed_bytes, .. } =
        describe(&next, &limits).unwrap().kind
    else {
        panic!()
    };
    assert_eq!((zeroed_bytes, changed_bytes), (2 * page(), page()));
    apply(&SnapshotChain::open([&base, &next], &limits).unwrap(), &whole, &limits).unwrap();
    assert_eq!(fs::read(whole.join(MEMORY_FILE)).unwrap(), guest.file());
}

/// Ranges that are not all of whole pages, in an order of their own.
fn any_ranges() -> impl Strategy<Value = Vec<GpaRange>> {
    let unit = prop_oneof![4 => Just(4096u64), 1 => Just(512u64), 2 => Just(65536u64)];
    (unit, prop::collection::vec((1..9u64, 0..5u64), 0..6), any::<prop::sample::Index>()).prop_map(
        |(unit, sizes, turn)| {
            let mut next = 0;
            let mut ranges: Vec<_> = sizes
                .into_iter()
                .map(|(units, gap)| {
                    let made = range(next + gap * unit, units * unit);
                    next = made.end();
                    made
                })
                .collect();
            let count = ranges.len().max(1);
            let turn = turn.index(count).min(ranges.len());
            ranges.rotate_left(turn);
            ranges
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// A VMM's directory is sealed into one that opens, verifies and is applied, or it is refused and stays as it was.
    #[test]
    fn c52_what_is_sealed_can_be_read(ranges in any_ranges()) {
        let (dir, limits) = (tempfile::tempdir().unwrap(), SnapshotLimits::default());
        let (target, whole) = (dir.path().join("a"), dir.path().join("whole"));
        fs::create_dir(&target).unwrap();
        fs::write(target.join(CONFIG_FILE), config_text(1)).unwrap();
        fs::write(target.join(STATE_FILE), state_text(&ranges)).unwrap();
        let bytes: u64 = ranges.iter().map(|range| range.len()).sum();
        fs::write(target.join(MEMORY_FILE), vec![7; index(bytes)]).unwrap();
        let of_pages = ranges.iter().all(|range| range.start() % 4096 == 0 && range.len() % 4096 == 0);
        match seal(&target, &limits) {
            Ok(_) => {
                prop_assert!(of_pages);
                assert_clean(&target);
                let chain = SnapshotChain::open([&target], &limits).unwrap();
                prop_assert_eq!(apply(&chain, &whole, &limits).is_ok(), !ranges.is_empty());
                prop_assert_eq!(SnapshotSource::new(FullSnapshot::open(&target, &limits).unwrap()).is_ok(), !ranges.is_empty());
            }
            Err(error) => {
                prop_assert!(!of_pages && matches!(error, OperationError::Seal { .. }), "{}", error);
                prop_assert!(!target.join(MANIFEST_FILE).exists());
            }
        }
    }

    /// What a writer finishes can be read, whatever part of the memory the state lists.
    #[test]
    fn c52_what_is_written_can_be_read(ranges in any_ranges(), cut in 0..3u64) {
        let (dir, limits) = (tempfile::tempdir().unwrap(), SnapshotLimits::default());
        let all = range(0, 1 << 22);
        let layout = Layout::new([all], Granule::KIB_4).unwrap();
        let announced = AnnouncedRam::with_hotpluggable(layout, &[all], &limits).unwrap();
        let full = SnapshotWriter::create(&dir.path().join("full"), announced.clone(), None, limits).unwrap();
        let base = Base::Named(Digest::of(b"base"));
        let writer = SnapshotWriter::create(&dir.path().join("next"), announced, Some(base), limits).unwrap();
        let listed: Vec<_> = ranges.iter().filter_map(|whole| range_less(*whole, cut * 256)).collect();
        let _ = (full.finish(&config_text(1), &state_text(&listed)), writer.finish(&config_text(1), &state_text(&listed)));
        for name in ["full", "next"] {
            let target = dir.path().join(name);
            if target.exists() {
                assert_clean(&target);
                describe(&target, &limits).unwrap();
            }
        }
        let of_pages = listed.iter().all(|range| range.start() % 4096 == 0 && range.len() % 4096 == 0);
        prop_assert_eq!(dir.path().join("full").exists(), of_pages);
        prop_assert_eq!(dir.path().join("next").exists(), of_pages);
    }
}

/// `whole` without its last `bytes`, if anything is left.
fn range_less(whole: GpaRange, bytes: u64) -> Option<GpaRange> {
    GpaRange::from_bounds(whole.start(), whole.end().saturating_sub(bytes)).ok()
}

#[test]
fn c52_a_manifest_that_nobody_would_read_is_not_written() {
    let dir = tempfile::tempdir().unwrap();
    let (guest, target) = (Guest::small(), dir.path().join("a"));
    for limits in [
        SnapshotLimits { manifest_bytes: 200, ..SnapshotLimits::default() },
        SnapshotLimits { state_bytes: guest.state().len() as u64 - 1, ..SnapshotLimits::default() },
    ] {
        let writer = SnapshotWriter::create(&target, guest.announced(), None, limits).unwrap();
        let error = writer.finish(&guest.config(), &guest.state()).unwrap_err();
        let is_limit =
            matches!(error, WriteError::Unreadable { .. } | WriteError::Format(FormatError::TooLarge { .. }));
        assert!(is_limit, "{error}");
        assert!(names(dir.path()).is_empty());
    }
}
