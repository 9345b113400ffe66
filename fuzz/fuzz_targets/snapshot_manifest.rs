// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Reads a manifest whose checksums were put right by a forger: what is accepted is what would be written.

#![no_main]

use libfuzzer_sys::fuzz_target;
use vfio_migration::snapshot::{Manifest, SnapshotLimits};

const DIGEST_BYTES: usize = blake3::OUT_LEN;

fuzz_target!(|input: &[u8]| {
    let limits = SnapshotLimits::default();
    let _ = Manifest::parse(input, &limits);
    // The first byte says how many aliases follow the body.
    let Some((aliases, body)) = input.split_first() else { return };
    let forged = seal(body, usize::from(aliases % 3));
    let Ok(manifest) = Manifest::parse(&forged, &limits) else { return };
    let (written, digest) = manifest.encode().unwrap();
    assert_eq!(written, forged);
    assert!(manifest.answers_to(digest));
});

/// Puts digest, aliases and checksum behind a body.
fn seal(body: &[u8], aliases: usize) -> Vec<u8> {
    let mut bytes = body.to_vec();
    bytes.extend_from_slice(blake3::hash(body).as_bytes());
    bytes.extend_from_slice(&(aliases as u64).to_le_bytes());
    bytes.resize(bytes.len() + aliases * DIGEST_BYTES, 0x5a);
    let checksum = blake3::hash(&bytes);
    bytes.extend_from_slice(checksum.as_bytes());
    bytes
}
