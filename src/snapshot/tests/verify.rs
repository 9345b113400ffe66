// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

use std::fs;
use std::path::Path;

use super::guest::*;
use crate::snapshot::*;

/// Flips one bit of a file, hands what `verify` reports to `check`, and flips it back.
fn flip(dir: &Path, name: &str, at: usize, check: impl FnOnce(&VerifyReport)) {
    let path = dir.join(name);
    let mut bytes = fs::read(&path).unwrap();
    bytes[at] ^= 1 << (at % 8);
    fs::write(&path, &bytes).unwrap();
    let report = verify(dir, &SnapshotLimits::default()).unwrap();
    assert!(!report.is_clean(), "bit in byte {at} of {name}");
    check(&report);
    bytes[at] ^= 1 << (at % 8);
    fs::write(&path, &bytes).unwrap();
}

/// Whether `report` names the file `name`, and no other.
fn blames(report: &VerifyReport, name: &str) -> bool {
    let is_edited = report.config_edited && report.findings.is_empty() && name == CONFIG_FILE;
    let is_found = matches!(&report.findings[..], [finding] if finding.to_string().contains(name));
    is_edited || is_found && !report.config_edited
}

/// Flips bits in every file but `memory`, each of which must be found in the file it is in.
fn flip_texts(dir: &Path) {
    for name in [CONFIG_FILE, STATE_FILE, MANIFEST_FILE] {
        let length = index(fs::metadata(dir.join(name)).unwrap().len());
        for at in 0..length {
            flip(dir, name, at, |report| assert!(blames(report, name), "byte {at} of {name}: {report:?}"));
        }
    }
}

#[test]
fn a_flipped_bit_anywhere_in_a_full_snapshot_is_found_and_named() {
    let dir = tempfile::tempdir().unwrap();
    let (guest, target) = (Guest::small(), dir.path().join("a"));
    guest.write_full(&target);
    flip_texts(&target);
    let placement = Placement::new(guest.ranges.iter().copied(), &SnapshotLimits::default()).unwrap();
    let length = index(placement.bytes());
    for at in (0..length).step_by(1999).chain([length - 1]) {
        let gpa = placement.gpas(at as u64, 1).next().unwrap();
        flip(&target, MEMORY_FILE, at, |VerifyReport { findings, .. }| {
            let [VerifyFinding::Memory { range, .. }] = &findings[..] else { panic!("{findings:?}") };
            assert!(range.covers(gpa) && range.len() <= 16 << 10, "{gpa} in {range}");
        });
    }
    assert_clean(&target);
}

#[test]
fn a_flipped_bit_anywhere_in_a_differential_is_found_and_its_page_named() {
    let dir = tempfile::tempdir().unwrap();
    let target = dir.path().join("a");
    let mut guest = Guest::small();
    guest.write([(3, 0), (5, 9), (70, 8), (71, 7)]);
    let dirty = [pages(2, 5), pages(70, 2)];
    guest.write_differential(&target, Base::Named(Digest::of(b"base")), &dirty);
    flip_texts(&target);
    let runs = Differential::open(&target, &SnapshotLimits::default()).unwrap().changed().clone();
    for at in (0..index(runs.bytes())).step_by(999) {
        let gpa = runs.gpas(at as u64, 1).next().unwrap();
        flip(&target, CHANGES_FILE, at, |VerifyReport { findings, .. }| {
            let [VerifyFinding::Memory { range, .. }] = &findings[..] else { panic!("{findings:?}") };
            assert!(range.covers(gpa) && range.len() == page(), "{gpa} in {range}");
        });
    }
    assert_clean(&target);
}

#[test]
fn files_cut_off_lengthened_missing_or_punched_are_found() {
    let dir = tempfile::tempdir().unwrap();
    let (guest, target) = (Guest::small(), dir.path().join("a"));
    guest.write_full(&target);
    for name in [CONFIG_FILE, STATE_FILE, MEMORY_FILE, MANIFEST_FILE] {
        let path = target.join(name);
        let bytes = fs::read(&path).unwrap();
        for wrong in [&bytes[..bytes.len() - 1], &[&bytes[..], b"\n"].concat(), b""] {
            fs::write(&path, wrong).unwrap();
            let report = verify(&target, &SnapshotLimits::default()).unwrap();
            assert!(blames(&report, name), "{report:?}");
        }
        fs::remove_file(&path).unwrap();
        match verify(&target, &SnapshotLimits::default()) {
            Ok(report) => {
                let finding = report.findings[0].to_string();
                assert!(finding.contains(name) && finding.contains(": No such file"), "{finding}");
            }
            Err(error) => assert!(
                name == MANIFEST_FILE
                    && matches!(error, ReadError::NoManifest { needed: ManifestUse::Verify, .. })
            ),
        }
        fs::write(&path, bytes).unwrap();
    }
    let memory = fs::OpenOptions::new().write(true).open(target.join(MEMORY_FILE)).unwrap();
    memory.set_len(0).unwrap();
    memory.set_len(64 * page()).unwrap();
    let report = verify(&target, &SnapshotLimits::default()).unwrap();
    let altered: Vec<_> = report.findings.iter().map(ToString::to_string).collect();
    assert_eq!(altered.len(), 3, "the low region, and the ends of the high one: {altered:?}");
    assert_eq!(altered[0], format!("Memory at GPA {} in memory-ranges was altered", pages(0, 40)));
}

#[test]
fn a_directory_that_is_not_there_is_an_error() {
    let dir = tempfile::tempdir().unwrap();
    let error = verify(&dir.path().join("none"), &SnapshotLimits::default()).unwrap_err();
    assert!(matches!(error, ReadError::Read { .. }), "{error}");
}

#[test]
fn c66_an_edited_config_is_named_and_everything_else_is_checked() {
    let dir = tempfile::tempdir().unwrap();
    let (guest, target) = (Guest::small(), dir.path().join("a"));
    guest.write_full(&target);
    fs::write(target.join(CONFIG_FILE), config_text(1)).unwrap();
    let edited = verify(&target, &SnapshotLimits::default()).unwrap();
    assert!(edited.config_edited && !edited.is_damaged() && !edited.is_clean(), "{edited:?}");
    assert!(describe(&target, &SnapshotLimits::default()).unwrap().config_edited);

    let memory = fs::OpenOptions::new().write(true).open(target.join(MEMORY_FILE)).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&memory, b"x", 3).unwrap();
    let damaged = verify(&target, &SnapshotLimits::default()).unwrap();
    assert!(damaged.config_edited && damaged.is_damaged(), "{damaged:?}");

    // What is no configuration at all was not edited by anybody who meant it.
    fs::write(target.join(CONFIG_FILE), b"{}").unwrap();
    let torn = verify(&target, &SnapshotLimits::default()).unwrap();
    assert!(!torn.config_edited && torn.findings[0].to_string() == "config.json was altered", "{torn:?}");
    let refused = FullSnapshot::open(&target, &SnapshotLimits::default()).unwrap_err();
    assert!(matches!(refused, ReadError::Altered { name: CONFIG_FILE, .. }), "{refused}");
}

#[test]
fn c51_what_is_only_too_large_is_no_damage() {
    let dir = tempfile::tempdir().unwrap();
    let (guest, target) = (Guest::small(), dir.path().join("a"));
    guest.write_full(&target);
    let tight = [
        SnapshotLimits { config_bytes: 5, ..SnapshotLimits::default() },
        SnapshotLimits { state_bytes: 5, ..SnapshotLimits::default() },
        SnapshotLimits { manifest_bytes: 5, ..SnapshotLimits::default() },
        SnapshotLimits { memory_bytes: 5, ..SnapshotLimits::default() },
        SnapshotLimits { ranges: 1, ..SnapshotLimits::default() },
    ];
    for limits in tight {
        let error = verify(&target, &limits).unwrap_err();
        assert!(
            matches!(
                error,
                ReadError::TooLarge { .. } | ReadError::Format { source: FormatError::OverLimit { .. }, .. }
            ),
            "{error}"
        );
    }
}
