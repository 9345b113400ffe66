// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use proptest::prelude::*;

use super::guest::*;
use crate::granule::Granule;
use crate::ledger::{ChunkLimits, Ledger, Start};
use crate::range::GpaRange;
use crate::snapshot::*;

fn chain(paths: &[PathBuf]) -> SnapshotChain {
    SnapshotChain::open(paths, &SnapshotLimits::default()).unwrap()
}

fn compared(paths: &[PathBuf]) -> Base {
    Base::Compared(Arc::new(chain(paths)))
}

fn size(dir: &Path) -> u64 {
    fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().metadata().unwrap().len()).sum()
}

/// The three files that a VMM reads are the same in both.
fn assert_same_files(left: &Path, right: &Path) {
    for name in [CONFIG_FILE, STATE_FILE, MEMORY_FILE] {
        assert!(fs::read(left.join(name)).unwrap() == fs::read(right.join(name)).unwrap(), "{name}");
    }
}

#[test]
fn a_differential_holds_only_pages_that_differ() {
    let dir = tempfile::tempdir().unwrap();
    let (base, next) = (dir.path().join("base"), dir.path().join("next"));
    let mut guest = Guest::small();
    guest.write_full(&base);
    guest.write([(3, 0), (4, 99), (5, 98), (66, 97), (6, 7), (7, 0)]);
    guest.write_differential(&next, compared(&[base]), &guest.ranges);
    assert_eq!(names(&next), [CONFIG_FILE, CHANGES_FILE, MANIFEST_FILE, STATE_FILE]);
    let differential = Differential::open(&next, &SnapshotLimits::default()).unwrap();
    let changed: Vec<_> = differential.changed().ranges().collect();
    assert_eq!(changed, [pages(4, 2), pages(66, 1)], "page 6 is as it was");
    assert_eq!(differential.zeroed().collect::<Vec<_>>(), [pages(3, 1)], "page 7 was zero before");
    assert_eq!(fs::metadata(next.join(CHANGES_FILE)).unwrap().len(), 3 * page());
    assert_clean(&next);
}

#[test]
fn a_percent_of_a_guest_takes_little_more_than_a_percent() {
    let dir = tempfile::tempdir().unwrap();
    let next = dir.path().join("next");
    let mut guest = Guest::new(&[range(0, 1 << 30)]);
    let total = (1 << 30) / page();
    let dirty = guest.write((0..total / 100).map(|at| (at * 7919 % total, at + 1)));
    guest.write_differential(&next, Base::Named(Digest::of(b"base")), &dirty);
    let percent = size(&next) as f64 * 100.0 / f64::from(1 << 30);
    assert!(percent <= 1.1, "{percent} % for 1 % of pages, each on its own");
    assert_clean(&next);
}

#[test]
fn a_ledgers_cursor_says_what_a_differential_needs() {
    let dir = tempfile::tempdir().unwrap();
    let (base, next, full, applied) = (
        dir.path().join("base"),
        dir.path().join("next"),
        dir.path().join("full"),
        dir.path().join("applied"),
    );
    let mut guest = Guest::small();
    let digest = guest.write_full(&base);
    let mut ledger = Ledger::new(layout(&guest.ranges), 0);
    let cursor = ledger.open(Start::Copied);

    for range in guest.write([(1, 0), (2, 70), (39, 71), (64, 0), (65, 72)]) {
        ledger.mark(range);
    }
    guest.write_full(&full);
    let memory = SnapshotSource::new(FullSnapshot::open(&full, &SnapshotLimits::default()).unwrap()).unwrap();
    let memory = crate::vm::Vm::memory(&memory);
    let writer = SnapshotWriter::create(
        &next,
        guest.announced(),
        Some(Base::Named(digest)),
        SnapshotLimits::default(),
    )
    .unwrap();
    ledger.begin_round(cursor);
    while let Some(chunk) = ledger.take(cursor, ChunkLimits { bytes: 2 * page(), ranges: 2 }) {
        writer.copy_from(chunk.ranges().iter().copied(), &*memory).unwrap();
        ledger.commit(chunk);
    }
    writer.finish(&guest.config(), &guest.state()).unwrap();
    apply(&chain(&[base, next]), &applied, &SnapshotLimits::default()).unwrap();
    assert_same_files(&applied, &full);
}

#[test]
fn a_wrong_base_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    let mut guest = Guest::small();
    let first = guest.write_full(&path("first"));
    guest.write([(1, 50)]);
    guest.write_full(&path("second"));
    guest.write([(2, 51)]);
    let middle = guest.write_differential(&path("middle"), Base::Named(first), &[pages(1, 2)]);
    guest.write_differential(&path("top"), Base::Named(middle), &[pages(2, 1)]);

    let open =
        |names: &[&str]| SnapshotChain::open(names.iter().map(|name| path(name)), &SnapshotLimits::default());
    assert!(open(&["first", "middle", "top"]).is_ok());
    for wrong in [&["second", "middle"][..], &["first", "top"], &["first", "middle", "middle"]] {
        let error = open(wrong).unwrap_err();
        assert!(matches!(error, ReadError::WrongBase { .. }), "{wrong:?}: {error}");
    }
    assert!(matches!(open(&[]), Err(ReadError::Empty)));
    assert!(matches!(open(&["middle"]), Err(ReadError::Differential { .. })));
    assert!(matches!(open(&["first", "second"]), Err(ReadError::Full { .. })));

    fs::remove_file(path("first").join(MANIFEST_FILE)).unwrap();
    assert!(matches!(
        open(&["first", "middle"]),
        Err(ReadError::NoManifest { needed: ManifestUse::Name, .. })
    ));
    assert!(matches!(
        Base::open([path("first")], &SnapshotLimits::default()),
        Err(ReadError::NoManifest { needed: ManifestUse::Name, .. })
    ));
}

#[test]
fn an_altered_base_is_found_while_it_is_applied() {
    let dir = tempfile::tempdir().unwrap();
    let (base, next, applied) =
        (dir.path().join("base"), dir.path().join("next"), dir.path().join("applied"));
    let mut guest = Guest::small();
    let digest = guest.write_full(&base);
    guest.write([(4, 9)]);
    guest.write_differential(&next, Base::Named(digest), &[pages(4, 1)]);
    let mut memory = fs::read(base.join(MEMORY_FILE)).unwrap();
    memory[index(33 * page())] ^= 1;
    fs::write(base.join(MEMORY_FILE), memory).unwrap();
    let error = apply(&chain(&[base, next]), &applied, &SnapshotLimits::default()).unwrap_err();
    let OperationError::Copy { source, .. } = error else { panic!("{error}") };
    assert!(source.to_string().contains("Memory at GPA 0x20000"), "{source}");
    assert!(!applied.exists());
}

/// Puts `bytes` in place of those at `offset` of a file.
fn alter(path: &Path, offset: u64, bytes: &[u8]) {
    fs::OpenOptions::new().write(true).open(path).unwrap().write_all_at(bytes, offset).unwrap();
}

#[test]
fn a_base_altered_to_equal_what_comes_is_found_while_it_is_compared() {
    let dir = tempfile::tempdir().unwrap();
    let [base, later, next] = ["base", "later", "next"].map(|name| dir.path().join(name));
    let mut guest = Guest::small();
    guest.write_full(&base);
    guest.write([(33, 9)]);
    guest.write_full(&later);
    alter(&base.join(MEMORY_FILE), 33 * page(), &page_of(9));
    let at = "Memory at GPA 0x20000";

    let bases = [base.clone()];
    let writer =
        SnapshotWriter::create(&next, guest.announced(), Some(compared(&bases)), SnapshotLimits::default())
            .unwrap();
    let error = writer.fill(pages(33, 1), &mut page_of(9).as_slice()).unwrap_err();
    let altered = Altered::of(&error).unwrap().to_string();
    assert!(altered.contains(at) && altered.contains(base.to_str().unwrap()), "{altered}");
    drop(writer);

    let from_later = chain(&[later]);
    let error =
        subtract(&from_later, Arc::new(chain(&bases)), &next, &SnapshotLimits::default()).unwrap_err();
    let OperationError::CopyRange { source, .. } = error else { panic!("{error}") };
    assert!(Altered::of(&source).unwrap().to_string().contains(at), "{source}");
    assert!(!next.exists());
}

#[test]
fn an_altered_snapshot_is_found_while_its_base_is_subtracted() {
    let dir = tempfile::tempdir().unwrap();
    let [base, middle, next] = ["base", "middle", "next"].map(|name| dir.path().join(name));
    let mut guest = Guest::small();
    let digest = guest.write_full(&base);
    guest.write([(4, 9)]);
    guest.write_differential(&middle, Base::Named(digest), &[pages(4, 1)]);
    alter(&middle.join(CHANGES_FILE), 8, &[!0]);
    let top = chain(&[base.clone(), middle.clone()]);
    let error = subtract(&top, Arc::new(chain(&[base])), &next, &SnapshotLimits::default()).unwrap_err();
    let OperationError::CopyRange { source, .. } = error else { panic!("{error}") };
    let altered = Altered::of(&source).unwrap().to_string();
    assert!(altered.contains(&pages(4, 1).to_string()), "{altered}");
    assert!(altered.contains(middle.join(CHANGES_FILE).to_str().unwrap()), "{altered}");
}

#[test]
fn a_hole_punched_into_a_base_hides_no_page_that_became_zero() {
    let dir = tempfile::tempdir().unwrap();
    let [base, later, next] = ["base", "later", "next"].map(|name| dir.path().join(name));
    let mut guest = Guest::new(&[pages(0, 128)]);
    guest.write([(100, 7)]);
    guest.write_full(&base);
    guest.write([(100, 0)]);
    guest.write_full(&later);
    let memory = fs::OpenOptions::new().write(true).open(base.join(MEMORY_FILE)).unwrap();
    memory.set_len(0).unwrap();
    memory.set_len(128 * page()).unwrap();

    let base = compared(&[base]);
    let Base::Compared(punched) = &base else { panic!("{base:?}") };
    let error =
        subtract(&chain(&[later]), Arc::clone(punched), &next, &SnapshotLimits::default()).unwrap_err();
    assert!(
        matches!(&error, OperationError::CopyRange { source, .. } if Altered::of(source).is_some()),
        "{error}"
    );

    let writer =
        SnapshotWriter::create(&next, guest.announced(), Some(base), SnapshotLimits::default()).unwrap();
    writer.presume_zeros().unwrap();
    writer.finish(&guest.config(), &guest.state()).unwrap();
    let differential = Differential::open(&next, &SnapshotLimits::default()).unwrap();
    assert!(differential.zeroed().any(|range| range.contains(100 * page())));
}

#[test]
fn a_base_cut_off_after_it_was_opened_is_an_error() {
    let dir = tempfile::tempdir().unwrap();
    let base = dir.path().join("base");
    let guest = Guest::small();
    guest.write_full(&base);
    let bases = [base.clone()];
    let base_of = compared(&bases);
    let memory = fs::OpenOptions::new().write(true).open(base.join(MEMORY_FILE)).unwrap();
    memory.set_len(33 * page()).unwrap();
    let writer = SnapshotWriter::create(
        &dir.path().join("next"),
        guest.announced(),
        Some(base_of),
        SnapshotLimits::default(),
    );
    let error = writer.unwrap().fill(pages(33, 1), &mut page_of(0).as_slice()).unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::UnexpectedEof, "{error}");
}

#[test]
fn the_next_differential_fits_what_the_chain_below_it_was_applied_to() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    let mut guest = Guest::small();
    let first = guest.write_full(&path("first"));
    guest.write([(1, 50)]);
    let middle = guest.write_differential(&path("middle"), Base::Named(first), &[pages(1, 1)]);
    guest.write([(2, 51)]);
    guest.write_differential(&path("top"), Base::Named(middle), &[pages(2, 1)]);
    apply(&chain(&[path("first"), path("middle")]), &path("applied"), &SnapshotLimits::default()).unwrap();
    apply(&chain(&[path("applied"), path("top")]), &path("last"), &SnapshotLimits::default()).unwrap();
    guest.assert_full(&path("last"));
}

#[test]
fn pages_in_part_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let guest = Guest::small();
    let base = Base::Named(Digest::of(b"base"));
    let target = dir.path().join("a");
    let writer =
        SnapshotWriter::create(&target, guest.announced(), Some(base), SnapshotLimits::default()).unwrap();
    let error = writer.fill(range(8, page()), &mut std::io::repeat(1)).unwrap_err();
    assert!(error.to_string().contains("not of whole pages"), "{error}");
}

#[test]
fn memory_that_is_plugged_in_later_begins_as_zeros() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    let mut guest = Guest::small();
    guest.write_full(&path("with"));
    let removed = guest.ranges.pop().unwrap();
    guest.seeds.retain(|&gpa, _| !removed.contains(gpa));
    guest.write_differential(&path("without"), compared(&[path("with")]), &guest.ranges);
    guest.ranges.push(removed);
    guest.write([(70, 5)]);
    let below = [path("with"), path("without")];
    guest.write_differential(&path("again"), compared(&below), &guest.ranges);
    let all = chain(&[path("with"), path("without"), path("again")]);
    apply(&all, &path("applied"), &SnapshotLimits::default()).unwrap();
    guest.assert_full(&path("applied"));
    let mut bytes = vec![1; index(removed.len())];
    all.read(removed, &mut bytes).unwrap();
    assert!(bytes == guest.bytes(removed));
}

#[test]
fn a_description_says_what_is_there() {
    let dir = tempfile::tempdir().unwrap();
    let (base, next) = (dir.path().join("base"), dir.path().join("next"));
    let mut guest = Guest::small();
    let digest = guest.write_full(&base);
    guest.write([(3, 0), (4, 99)]);
    let top = guest.write_differential(&next, compared(std::slice::from_ref(&base)), &guest.ranges);
    let full = describe(&base, &SnapshotLimits::default()).unwrap();
    assert!(matches!(full.kind, SnapshotKind::Full { populated_bytes } if populated_bytes >= 16 * page()));
    assert_eq!((full.digest, full.memory_bytes, full.memory_ranges), (Some(digest), 64 * page(), 2));
    let differential = describe(&next, &SnapshotLimits::default()).unwrap();
    let kind =
        SnapshotKind::Differential { base: digest, changed_bytes: page(), zeroed_bytes: page(), runs: 2 };
    assert_eq!((differential.kind, differential.digest), (kind, Some(top)));
    let json = serde_json::to_value(&differential).unwrap();
    assert_eq!(json["kind"], "differential");
    assert_eq!(json["base"], digest.to_string());
}

fn naive_differences(first: &Guest, second: &Guest) -> Vec<GpaRange> {
    let all = first.ranges.iter().flat_map(|range| range.pieces(page()));
    all.filter(|&page| first.bytes(page) != second.bytes(page)).collect()
}

fn by_page(ranges: &[GpaRange]) -> Vec<GpaRange> {
    ranges.iter().flat_map(|range| range.pieces(page())).collect()
}

/// The blocks of a chain make up the guest: each byte of its RAM is in one part of one block, and found by its address.
fn assert_blocks(chain: &SnapshotChain, guest: &Guest) {
    let blocks = ChainBlocks::of(chain, guest.ranges.iter().copied()).unwrap();
    let (mut parts, mut bytes) = (Vec::new(), Vec::new());
    for number in 0..blocks.count() {
        bytes.clear();
        blocks.read(number, &mut bytes).unwrap();
        for part in blocks.parts(number) {
            let expected = guest.bytes(part.range);
            if blocks.is_zeros(number) {
                assert!(expected.iter().all(|&byte| byte == 0), "zeros at {}", part.range);
            } else {
                assert!(
                    bytes[index(part.at)..][..expected.len()] == expected,
                    "block {number}, {}",
                    part.range
                );
            }
            let mut read = vec![1; expected.len()];
            chain.read(part.range, &mut read).unwrap();
            assert!(read == expected, "{} as the chain reads it", part.range);
            assert!(blocks.holding(part.range).any(|found| found == number));
            parts.push(part.range);
        }
    }
    parts.sort_unstable();
    assert!(parts.windows(2).all(|pair| pair[0].end() <= pair[1].start()), "a byte is in two blocks");
    assert_eq!(by_page(&parts), by_page(&guest.ranges));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(8))]

    /// Two full snapshots, against the differential that was written while the guest was at hand.
    #[test]
    fn a_snapshot_less_its_base_is_the_differential(mut guest in any_guest(), writes in any_writes()) {
        let dir = tempfile::tempdir().unwrap();
        let [base, later, written, made] = ["base", "later", "written", "made"].map(|name| dir.path().join(name));
        guest.write_full(&base);
        guest.write(writes);
        guest.write_full(&later);
        let bases = [base.clone()];
        let expected = guest.write_differential(&written, compared(&bases), &guest.ranges);
        let digest = subtract(&chain(&[later]), Arc::new(chain(&bases)), &made, &SnapshotLimits::default()).unwrap();
        prop_assert_eq!(digest, expected);
        assert_clean(&made);
    }

    /// A chain of ten, by comparison and by dirty pages alone, against the guest itself at every step.
    #[test]
    fn a_chain_amounts_to_the_guest(
        mut guest in any_guest(),
        steps in prop::collection::vec((any_writes(), any::<bool>()), 10),
    ) {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: String| dir.path().join(name);
        let mut paths = vec![path("full".into())];
        let mut digest = guest.write_full(&paths[0]);
        for (step, (writes, compare)) in steps.into_iter().enumerate() {
            let before = guest.clone();
            let dirty = guest.write(writes);
            let next = path(format!("step{step}"));
            digest = if compare {
                let compared = guest.write_differential(&next, compared(&paths), &guest.ranges);
                let differential = Differential::open(&next, &SnapshotLimits::default()).unwrap();
                let mut found: Vec<_> = differential.changed().ranges().chain(differential.zeroed()).collect();
                found.sort_unstable();
                prop_assert_eq!(by_page(&found), naive_differences(&before, &guest));
                compared
            } else {
                guest.write_differential(&next, Base::Named(digest), &dirty)
            };
            assert_clean(&next);
            paths.push(next);
        }
        let read = chain(&paths);
        assert_blocks(&read, &guest);
        let applied = path("applied".into());
        let whole = apply(&chain(&paths), &applied, &SnapshotLimits::default()).unwrap();
        let taken = path("taken".into());
        prop_assert_eq!(whole, guest.write_full(&taken), "one name for one content");
        guest.assert_full(&applied);
        assert_same_files(&applied, &taken);
        prop_assert!(compare(&chain(&paths), &chain(&[taken])).unwrap().is_empty());
    }

    #[test]
    fn a_comparison_lists_the_pages_that_differ(mut guest in any_guest(), writes in any_writes()) {
        let dir = tempfile::tempdir().unwrap();
        let (first, second) = (dir.path().join("first"), dir.path().join("second"));
        let before = guest.clone();
        guest.write_full(&first);
        guest.write(writes);
        guest.write_full(&second);
        let found = compare(&chain(&[first]), &chain(&[second])).unwrap();
        prop_assert_eq!(by_page(&found.memory), naive_differences(&before, &guest));
        prop_assert_eq!(found.config, before.config() != guest.config());
        prop_assert!(!found.state);
    }
}

#[test]
fn memory_of_one_side_is_told_from_pages_that_differ() {
    let dir = tempfile::tempdir().unwrap();
    let (first, second) = (dir.path().join("first"), dir.path().join("second"));
    let mut guest = Guest::small();
    guest.write_full(&first);
    guest.ranges = vec![pages(4, 40), pages(64, 20)];
    guest.write_full(&second);
    let found = compare(&chain(&[first]), &chain(&[second])).unwrap();
    assert_eq!(found.only_in_first, [pages(0, 4), pages(84, 4)]);
    assert_eq!(found.only_in_second, [pages(40, 4)]);
    assert!(found.state && found.memory.is_empty());
    assert_eq!(Granule::host_page().bytes(), page());
}
