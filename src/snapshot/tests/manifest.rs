// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

use proptest::prelude::*;
use zerocopy::IntoBytes;

use super::guest::{range, state_text};
use crate::granule::Granule;
use crate::range::GpaRange;
use crate::snapshot::format::{BlockTable, Changes, Covered, Digest, FormatError, Manifest};
use crate::snapshot::{Placement, SnapshotLimits};

fn placement(ranges: &[GpaRange]) -> Placement {
    Placement::new(ranges.iter().copied(), &SnapshotLimits::default()).unwrap()
}

fn covered(text: &[u8]) -> Covered {
    Covered::of(text)
}

/// Three pages of a differential, one run and one zero run, in memory of two ranges.
fn differential() -> Manifest {
    Manifest {
        page: Granule::KIB_4,
        memory: placement(&[range(0, 0x10000), range(0x10_0000, 0x8000)]),
        config: covered(b"config"),
        state: covered(b"state"),
        changes: Some(Changes {
            base: Digest::of(b"base"),
            runs: placement(&[range(0x1000, 0x2000), range(0x10_0000, 0x1000)]),
            zero_runs: placement(&[range(0x4000, 0x1000)]),
        }),
        blocks: BlockTable {
            block_bytes: 4096,
            digests: vec![Some(Digest::of(b"a")), None, Some(Digest::of(b"c"))],
        },
        aliases: Vec::new(),
    }
}

fn full() -> Manifest {
    Manifest {
        changes: None,
        blocks: BlockTable {
            block_bytes: 16384,
            digests: vec![Some(Digest::of(b"a")), None, None, None, None, None],
        },
        aliases: vec![Digest::of(b"alias")],
        ..differential()
    }
}

fn parse(bytes: &[u8]) -> Result<Manifest, FormatError> {
    Manifest::parse(bytes, &SnapshotLimits::default())
}

/// The bytes as `docs/snapshot-format.md` describes them, written down one field after the other.
#[test]
fn a_differentials_manifest_has_the_documented_bytes() {
    let mut golden = vec![0x89, b'V', b'M', b'S', 0x0d, 0x0a, 0x1a, 0x0a];
    let mut u = |number: u64, bytes: usize| golden.extend_from_slice(&number.to_le_bytes()[..bytes]);
    u(1, 2); // version
    u(2, 2); // kind
    u(4096, 4); // page_bytes
    u(4096, 4); // block_bytes
    u(2, 4); // ranges
    u(2, 8); // runs
    u(1, 8); // zero_runs
    u(0x3000, 8); // content_bytes
    u(6, 8); // config_bytes
    u(5, 8); // state_bytes
    for text in [b"config".as_slice(), b"state", b"base"] {
        golden.extend_from_slice(blake3::hash(text).as_bytes());
    }
    assert_eq!(golden.len(), 160);
    let ranges = [
        (0u64, 0x10000u64),
        (0x10_0000, 0x8000), // memory
        (0x1000, 0x2000),
        (0x10_0000, 0x1000), // runs
        (0x4000, 0x1000),    // zero runs
    ];
    for (gpa, length) in ranges {
        golden.extend_from_slice(&gpa.to_le_bytes());
        golden.extend_from_slice(&length.to_le_bytes());
    }
    golden.extend_from_slice(&0b101u64.to_le_bytes()); // blocks that are not zero
    golden.extend_from_slice(blake3::hash(b"a").as_bytes());
    golden.extend_from_slice(blake3::hash(b"c").as_bytes());
    let digest = blake3::hash(&golden);
    golden.extend_from_slice(digest.as_bytes());
    golden.extend_from_slice(&0u64.to_le_bytes()); // aliases
    golden.extend_from_slice(blake3::hash(&golden).as_bytes());

    let (bytes, named) = differential().encode().unwrap();
    assert_eq!(bytes, golden);
    assert_eq!(named, Digest::from(digest));
    assert_eq!(parse(&golden).unwrap(), differential());
}

#[test]
fn a_full_manifest_comes_back_and_its_aliases_do_not_name_it() {
    let manifest = full();
    let (bytes, digest) = manifest.encode().unwrap();
    assert_eq!(parse(&bytes).unwrap(), manifest);
    let nameless = Manifest { aliases: Vec::new(), ..full() };
    assert_eq!(nameless.digest(), digest);
    assert!(manifest.answers_to(digest) && manifest.answers_to(Digest::of(b"alias")));
    assert!(!nameless.answers_to(Digest::of(b"alias")));
}

#[test]
fn every_cut_is_refused() {
    for (bytes, _) in [full().encode().unwrap(), differential().encode().unwrap()] {
        for length in 0..bytes.len() {
            assert!(parse(&bytes[..length]).is_err(), "{length} bytes");
        }
        assert!(parse(&[&bytes[..], &[0]].concat()).is_err());
    }
}

#[test]
fn another_version_and_another_file_are_told_apart() {
    let (mut bytes, _) = full().encode().unwrap();
    bytes[8] = 2;
    assert!(matches!(parse(&bytes), Err(FormatError::Version { version: 2 })));
    bytes[1] = b'X';
    assert!(matches!(parse(&bytes), Err(FormatError::Magic)));
    assert!(matches!(parse(&state_text(&[])), Err(FormatError::Magic)));
}

/// Puts digest and checksum right, as somebody who forges a manifest would.
fn reseal(bytes: &mut [u8], aliases: usize) {
    let body = bytes.len() - 32 - 32 * aliases - 8 - 32;
    let digest = blake3::hash(&bytes[..body]);
    bytes[body..body + 32].copy_from_slice(digest.as_bytes());
    let covered = bytes.len() - 32;
    let checksum = blake3::hash(&bytes[..covered]);
    bytes[covered..].copy_from_slice(checksum.as_bytes());
}

/// Puts `number` at `at` of a sealed differential's manifest.
fn forged(at: usize, number: u64, bytes: usize) -> Result<Manifest, FormatError> {
    let (mut manifest, _) = differential().encode().unwrap();
    manifest[at..at + bytes].copy_from_slice(&number.to_le_bytes()[..bytes]);
    reseal(&mut manifest, 0);
    parse(&manifest)
}

#[test]
fn a_manifest_that_names_itself_as_an_alias_is_refused() {
    let (mut bytes, digest) = full().encode().unwrap();
    let alias = bytes.len() - 64..bytes.len() - 32;
    bytes[alias].copy_from_slice(digest.as_bytes());
    let end = bytes.len() - 32;
    let checksum = Digest::of(&bytes[..end]);
    bytes[end..].copy_from_slice(checksum.as_bytes());
    let error = Manifest::parse(&bytes, &SnapshotLimits::default()).unwrap_err();
    assert!(matches!(error, FormatError::Field { field: "aliases", value: 1 }), "{error}");
}

#[test]
fn forged_numbers_are_refused_before_they_size_anything() {
    let cases: [(usize, u64, usize, &str); 19] = [
        (10, 3, 2, r#"Field { field: "kind", value: 3"#),
        (10, 1, 2, r#"Field { field: "runs", value: 2"#),
        (12, 4097, 4, "Page("),
        (16, 2048, 4, r#"Field { field: "block_bytes", value: 2048"#),
        (12, 1 << 21, 4, r#"Field { field: "page_bytes", value: 2097152"#),
        // Larger than any writer chooses for so few pages: a block is in memory as a whole.
        (16, 8192, 4, r#"Field { field: "block_bytes", value: 8192"#),
        (16, 1 << 31, 4, r#"Field { field: "block_bytes", value: 2147483648"#),
        (16, 0, 4, r#"Field { field: "block_bytes", value: 0"#),
        (20, u64::from(u32::MAX), 4, "Length"),
        (24, u64::MAX, 8, "Length"),
        (24, u64::MAX / 16 + 3, 8, "Length"),
        (32, 1 << 40, 8, "Length"),
        (40, u64::MAX, 8, r#"Field { field: "content_bytes""#),
        (40, 0x3001, 8, r#"Field { field: "content_bytes", value: 12289"#),
        // Memory that overlaps, wraps, is empty; runs outside memory.
        (176, 0x8000, 8, r#"Ranges { document: "Manifest", what: "memory ranges", source: Overlap"#),
        (
            184,
            u64::MAX,
            8,
            r#"Ranges { document: "Manifest", what: "memory ranges", source: Range { index: 1, source: Wraps"#,
        ),
        (
            168,
            0,
            8,
            r#"Ranges { document: "Manifest", what: "memory ranges", source: Range { index: 0, source: Empty"#,
        ),
        (192, 0xf000, 8, "Run { run: 0xf000..0x11000 }"),
        // A zero run on top of a run.
        (224, 0x2000, 8, "Run { run: 0x2000..0x3000 }"),
    ];
    for (at, number, bytes, expected) in cases {
        let error = format!("{:?}", forged(at, number, bytes).unwrap_err());
        assert!(error.contains(expected), "{number:#x} at {at}: {error}");
    }
    assert!(forged(240, 0b1101, 8).is_err(), "a block behind the last one");
}

#[test]
fn limits_hold() {
    let (bytes, _) = full().encode().unwrap();
    let limits = SnapshotLimits { ranges: 1, ..SnapshotLimits::default() };
    assert!(matches!(Manifest::parse(&bytes, &limits), Err(FormatError::OverLimit { .. })));
    let limits = SnapshotLimits { memory_bytes: 0x17fff, ..SnapshotLimits::default() };
    assert!(matches!(Manifest::parse(&bytes, &limits), Err(FormatError::OverLimit { .. })));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    /// Whatever parses is, to the byte, what would be written.
    #[test]
    fn forged_manifests_are_refused_or_canonical(
        is_full in any::<bool>(),
        edits in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..4),
    ) {
        let (manifest, aliases) = if is_full { (full(), 1) } else { (differential(), 0) };
        let (mut bytes, _) = manifest.encode().unwrap();
        for (at, byte) in edits {
            let at = at.index(bytes.len());
            bytes[at] = byte;
        }
        reseal(&mut bytes, aliases);
        if let Ok(parsed) = parse(&bytes) {
            prop_assert_eq!(parsed.encode().unwrap().0, bytes);
        }
    }
}
