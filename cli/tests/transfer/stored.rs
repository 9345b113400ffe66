// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Snapshots to send, and what makes two of them the same.

use std::ffi::OsStr;
use std::fs::File;
use std::io::{self, Read};
use std::ops::Range;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::{env, fs};

use rustix::fs::{SeekFrom, seek};
use serde_json::{Value, json};
use tempfile::TempDir;
use vfio_migration::range::GpaRange;
use vfio_migration::snapshot::{
    AnnouncedRam, CONFIG_FILE, ConfigMessage, MANIFEST_FILE, MEMORY_FILE, STATE_FILE, SnapshotLimits,
    SnapshotWriter, verify,
};
use vfio_migration_integration::skip;

use crate::tool::run;

/// Bytes of RAM of a VM that is made up here, as of the captured one.
const RAM: u64 = 64 << 20;

/// RAM of a VM of 4 GiB: the devices lie below 4 GiB.
const LARGE_RAM: [(u64, u64); 2] = [(0, 3 << 30), (4 << 30, 1 << 30)];

/// What is populated at a time.
const PIECE: u64 = 1 << 20;

/// A directory for one test, removed afterwards.
pub(crate) struct Place(TempDir);

impl Place {
    pub(crate) fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    /// One in `dir`, which may be on another file system.
    pub(crate) fn within(dir: &Path) -> Self {
        Self(tempfile::tempdir_in(dir).unwrap())
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    pub(crate) fn root(&self) -> &Path {
        self.0.path()
    }

    /// Writes a snapshot: a quarter populated, with bytes that depend on `seed`.
    pub(crate) fn stored(&self, name: &str, seed: u64) -> PathBuf {
        let (config, state) = documents();
        self.store(name, seed, (&config, &state), |number| Some(number.is_multiple_of(5)))
    }

    /// Writes a snapshot of a VM of 4 GiB: one MiB in `every` is populated, and a page here and there.
    pub(crate) fn stored_large(&self, name: &str, every: u64) -> PathBuf {
        let (config, state) = documents();
        self.store(name, 1, (&config_of_large(&config), &state_of_large(state)), |number| {
            let whole = number.is_multiple_of(every);
            (whole || number.is_multiple_of(7)).then_some(whole)
        })
    }

    /// Writes a snapshot of a VM whose upper half of RAM is virtio-mem, most of it zeros.
    pub(crate) fn stored_virtio_mem(&self, name: &str) -> PathBuf {
        let (config, state) = documents();
        let mut config: Value = serde_json::from_slice(&config).unwrap();
        let whole = config["memory_manager_data"]["guest_ram_mappings"][0]["size"].as_u64().unwrap();
        plug_half(&mut config["memory_manager_data"]);
        let state = with_memory_manager(state, plug_half);
        self.store(name, 1, (config.to_string().as_bytes(), &state), |number| {
            let is_low = number < (whole >> 21);
            (is_low || number.is_multiple_of(8)).then_some(number.is_multiple_of(5))
        })
    }

    /// Writes a snapshot of a VM of `bytes` bytes of RAM that are all zeros.
    pub(crate) fn stored_holes(&self, name: &str, bytes: u64) -> PathBuf {
        let dir = self.path(name);
        fs::create_dir(&dir).unwrap();
        let mapping = json!({ "slot": 0, "gpa": 0, "size": bytes, "virtio_mem": false });
        let memory = json!({
            "memory_ranges": { "data": [{ "gpa": 0, "length": bytes }] },
            "guest_ram_mappings": [mapping],
        })
        .to_string();
        let manager = json!({ "snapshots": {}, "snapshot_data": { "state": memory } });
        let own = json!({ "common_cpuid": [] }).to_string();
        let own = json!({ "state": own });
        let state = json!({ "snapshots": { "memory-manager": manager }, "snapshot_data": own });
        fs::write(dir.join(CONFIG_FILE), json!({ "memory": { "size": bytes } }).to_string()).unwrap();
        fs::write(dir.join(STATE_FILE), state.to_string()).unwrap();
        File::create(dir.join(MEMORY_FILE)).unwrap().set_len(bytes).unwrap();
        run([OsStr::new("snapshot"), "seal".as_ref(), dir.as_ref()]).succeeded();
        dir
    }

    /// Writes a snapshot of which `is_whole` tells for each MiB whether all of it is populated, a page or nothing.
    fn store(
        &self,
        name: &str,
        seed: u64,
        (config, state): (&[u8], &[u8]),
        is_whole: impl Fn(u64) -> Option<bool>,
    ) -> PathBuf {
        let target = self.path(name);
        let message = ConfigMessage::parse(config, &SnapshotLimits::default()).unwrap();
        let layout = message.layout().clone();
        let writer = SnapshotWriter::create(
            &target,
            AnnouncedRam::all(layout.clone()),
            None,
            SnapshotLimits::default(),
        )
        .unwrap();
        let pieces = layout.regions().iter().flat_map(|region| region.range().pieces(PIECE));
        for (piece, number) in pieces.zip(0u64..) {
            let Some(whole) = is_whole(number) else { continue };
            let page = GpaRange::new(piece.start() + 0x3000, 0x1000).unwrap();
            let populated = if whole { piece } else { page };
            writer.fill(populated, &mut Noise(seed ^ number).take(populated.len())).unwrap();
        }
        writer.finish(message.vm_config().text().as_bytes(), state).unwrap();
        target
    }
}

/// Bytes without an end that no zero page is among.
struct Noise(u64);

impl Read for Noise {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        for word in bytes.chunks_mut(8) {
            self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            word.copy_from_slice(&self.0.to_be_bytes()[..word.len()]);
        }
        Ok(bytes.len())
    }
}

/// Config and State: those of a real VM, or made up ones.
fn documents() -> (Vec<u8>, Vec<u8>) {
    captured().unwrap_or_else(made_up)
}

/// Config and State of a real VM, where somebody captured them.
fn captured() -> Option<(Vec<u8>, Vec<u8>)> {
    let beside_repository = || Path::new(env!("CARGO_MANIFEST_DIR")).join("../../shared/captures");
    let folder = env::var_os("VFIO_MIGRATION_CAPTURES").map_or_else(beside_repository, PathBuf::from);
    let read = |name| fs::read(folder.join(name)).ok();
    read("config-message.json").zip(read("state-message.json"))
}

#[test]
fn the_vm_that_is_stored_is_a_captured_one() {
    if captured().is_none() {
        skip("no captures; name their folder in VFIO_MIGRATION_CAPTURES: a made up VM is stored instead");
    }
}

/// Gives the VM of a Config 4 GiB of RAM.
fn config_of_large(config: &[u8]) -> Vec<u8> {
    let mut config: Value = serde_json::from_slice(config).unwrap();
    enlarge(&mut config["memory_manager_data"]);
    config["vm_config"]["memory"]["size"] = json!(4u64 << 30);
    config.to_string().into_bytes()
}

/// Gives the VM of a State 4 GiB of RAM.
fn state_of_large(state: Vec<u8>) -> Vec<u8> {
    with_memory_manager(state, |memory_manager| {
        enlarge(memory_manager);
        memory_manager["memory_ranges"]["data"] =
            json!(LARGE_RAM.map(|(gpa, length)| json!({"gpa": gpa, "length": length})));
    })
}

/// Has `change` change the memory manager of a State; the rest of the text stays as it is.
fn with_memory_manager(state: Vec<u8>, change: impl Fn(&mut Value)) -> Vec<u8> {
    let tree: Value = serde_json::from_slice(&state).unwrap();
    let old = &tree["snapshots"]["memory-manager"]["snapshot_data"]["state"];
    let mut memory_manager: Value = serde_json::from_str(old.as_str().unwrap()).unwrap();
    change(&mut memory_manager);
    let new = Value::String(memory_manager.to_string());
    String::from_utf8(state).unwrap().replacen(&old.to_string(), &new.to_string(), 1).into_bytes()
}

/// Maps 4 GiB of RAM where there was one mapping.
fn enlarge(memory_manager: &mut Value) {
    let mapping = &memory_manager["guest_ram_mappings"][0];
    let mut mappings = LARGE_RAM.map(|(gpa, size)| {
        let mut mapping = mapping.clone();
        (mapping["gpa"], mapping["size"]) = (json!(gpa), json!(size));
        mapping
    });
    (mappings[1]["slot"], mappings[1]["file_offset"]) = (json!(1), json!(LARGE_RAM[0].1));
    memory_manager["guest_ram_mappings"] = json!(mappings);
}

/// Makes the upper half of the one mapping virtio-mem.
fn plug_half(memory_manager: &mut Value) {
    let mut mapping = memory_manager["guest_ram_mappings"][0].clone();
    let half = mapping["size"].as_u64().unwrap() / 2;
    mapping["size"] = json!(half);
    let mut upper = mapping.clone();
    (upper["slot"], upper["gpa"], upper["virtio_mem"]) = (json!(1), json!(half), json!(true));
    upper["file_offset"] = json!(half);
    memory_manager["guest_ram_mappings"] = json!([mapping, upper]);
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
    for file in [CONFIG_FILE, STATE_FILE, MANIFEST_FILE] {
        let same = fs::read(original.join(file)).unwrap() == fs::read(copy.join(file)).unwrap();
        assert!(same, "{file} differs");
    }
    let [of_original, of_copy] = [original, copy].map(|dir| File::open(dir.join(MEMORY_FILE)).unwrap());
    assert_same_bytes(&of_original, &of_copy);
    let blocks = |file: &File| file.metadata().unwrap().blocks();
    // The file system may put down a little more than it is given.
    let [most, blocks] = [blocks(&of_original) + 2048, blocks(&of_copy)];
    assert!(blocks <= most, "{blocks} blocks, of at most {most}");
    assert_sound(copy);
}

/// Checks that two files have the same bytes; reads them only where one of them has no hole.
#[track_caller]
fn assert_same_bytes(first: &File, second: &File) {
    assert_eq!(first.metadata().unwrap().len(), second.metadata().unwrap().len());
    let [mut one, mut other] = [(); 2].map(|()| vec![0; usize::try_from(PIECE).unwrap()]);
    for part in data(first).chain(data(second)) {
        for start in part.clone().step_by(one.len()) {
            let bytes = usize::try_from(PIECE.min(part.end - start)).unwrap();
            first.read_exact_at(&mut one[..bytes], start).unwrap();
            second.read_exact_at(&mut other[..bytes], start).unwrap();
            assert!(one[..bytes] == other[..bytes], "memory differs within 1 MiB of offset {start:#x}");
        }
    }
}

/// The parts of a file that are no hole.
fn data(file: &File) -> impl Iterator<Item = Range<u64>> {
    let mut end = 0;
    std::iter::from_fn(move || {
        let start = seek(file, SeekFrom::Data(end)).ok()?;
        end = seek(file, SeekFrom::Hole(start)).unwrap();
        Some(start..end)
    })
}

/// Checks that every byte of the snapshot is as its writer wrote it.
#[track_caller]
pub(crate) fn assert_sound(snapshot: &Path) {
    let report = verify(snapshot, &SnapshotLimits::default()).unwrap();
    assert!(report.is_clean(), "{:?}", report.findings);
}
