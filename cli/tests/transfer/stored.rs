// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Snapshots to send, and what makes two of them the same.

use std::io::{self, Read, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::{env, fs};

use tempfile::TempDir;
use vfio_migration::range::GpaRange;
use vfio_migration::snapshot::{
    Announced, CONFIG_FILE, ConfigMessage, Limits, MANIFEST_FILE, MEMORY_FILE, STATE_FILE, SnapshotWriter,
    verify,
};

/// Bytes of RAM of a VM that is made up here, as of the captured one.
const RAM: u64 = 64 << 20;

/// A directory for one test, removed afterwards.
pub(crate) struct Place(TempDir);

impl Place {
    pub(crate) fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    pub(crate) fn root(&self) -> &Path {
        self.0.path()
    }

    /// Writes a snapshot: a quarter populated, with bytes that depend on `seed`.
    pub(crate) fn stored(&self, name: &str, seed: u64) -> PathBuf {
        let target = self.path(name);
        let (config, state) = documents();
        let message = ConfigMessage::parse(&config, &Limits::default()).unwrap();
        let layout = message.layout().clone();
        let writer =
            SnapshotWriter::create(&target, Announced::all(layout.clone()), Limits::default()).unwrap();
        for region in layout.regions() {
            for (piece, number) in region.range().pieces(1 << 20).zip(0u64..) {
                let populated = populated(piece, number);
                writer.fill(populated, &mut noise(seed ^ number).take(populated.len())).unwrap();
            }
        }
        writer.finish(message.vm_config().text().as_bytes(), &state).unwrap();
        target
    }
}

/// What is populated of the MiB `piece`: all of every fifth, a single page of the others.
fn populated(piece: GpaRange, number: u64) -> GpaRange {
    let page = GpaRange::new(piece.start() + 0x3000, 0x1000).unwrap();
    if number.is_multiple_of(5) { piece } else { page }
}

/// Bytes without an end that no zero page is among.
fn noise(seed: u64) -> impl Read {
    struct Noise(u64);
    impl Read for Noise {
        fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
            for byte in &mut *bytes {
                self.0 =
                    self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                *byte = self.0.to_be_bytes()[0];
            }
            Ok(bytes.len())
        }
    }
    Noise(seed)
}

/// Config and State: those of a real VM, or made up ones.
fn documents() -> (Vec<u8>, Vec<u8>) {
    let beside_repository = || Path::new(env!("CARGO_MANIFEST_DIR")).join("../../shared/captures");
    let folder = env::var_os("VFIO_MIGRATION_CAPTURES").map_or_else(beside_repository, PathBuf::from);
    let read = |name| fs::read(folder.join(name)).ok();
    read("config-message.json").zip(read("state-message.json")).unwrap_or_else(|| {
        // Not `eprintln`: that is shown for failing tests only.
        let _ = writeln!(io::stderr(), "SKIPPED: the captured VM, for a made up one: no captures beside");
        made_up()
    })
}

fn made_up() -> (Vec<u8>, Vec<u8>) {
    let mapping = format!(r#"{{"slot":0,"gpa":0,"size":{RAM},"virtio_mem":false}}"#);
    let config = format!(
        r#"{{"vm_config":{{"memory":{{"size":{RAM}}}}},"common_cpuid":[],"memory_manager_data":{{"memory_ranges":{{"data":[]}},"guest_ram_mappings":[{mapping}]}}}}"#
    );
    let ranges = format!(r#"{{"data":[{{"gpa":0,"length":{RAM}}}]}}"#);
    let memory =
        format!(r#"{{"memory_ranges":{ranges},"guest_ram_mappings":[{mapping}]}}"#).replace('"', r#"\""#);
    let state = format!(
        r#"{{"snapshots":{{"memory-manager":{{"snapshots":{{}},"snapshot_data":{{"state":"{memory}"}}}}}},"snapshot_data":{{"state":"{{\"common_cpuid\":[]}}"}}}}"#
    );
    (config.into_bytes(), state.into_bytes())
}

/// Checks that `copy` is `original` to the byte, and has its holes.
#[track_caller]
pub(crate) fn assert_same(original: &Path, copy: &Path) {
    for file in [CONFIG_FILE, STATE_FILE, MEMORY_FILE, MANIFEST_FILE] {
        let same = fs::read(original.join(file)).unwrap() == fs::read(copy.join(file)).unwrap();
        assert!(same, "{file} differs");
    }
    let blocks = |dir: &Path| fs::metadata(dir.join(MEMORY_FILE)).unwrap().blocks();
    // The file system may put down a little more than it is given.
    assert!(blocks(copy) <= blocks(original) + 2048, "{} and {} blocks", blocks(original), blocks(copy));
    assert_sound(copy);
}

/// Checks that every byte of the snapshot is as its writer wrote it.
#[track_caller]
pub(crate) fn assert_sound(snapshot: &Path) {
    let report = verify(snapshot, &Limits::default()).unwrap();
    assert!(report.is_clean(), "{:?}", report.findings);
}
