// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

use std::error::Error;
use std::fs;
use std::path::{Path, PathBuf};

use super::guest::*;
use crate::range::GpaRange;
use crate::snapshot::*;

/// The error and all its sources, as a user sees them.
fn chain(error: &dyn Error) -> String {
    let next = error.source().map(chain);
    next.map_or(error.to_string(), |next| format!("{error}: {next}"))
}

/// A snapshot as a VMM leaves it, with no manifest, in which one file is replaced.
fn open_with(name: &str, content: &[u8]) -> String {
    let dir = tempfile::tempdir().unwrap();
    let target = dir.path().join("a");
    Guest::small().write_full(&target);
    fs::remove_file(target.join(MANIFEST_FILE)).unwrap();
    fs::write(target.join(name), content).unwrap();
    chain(&FullSnapshot::open(&target, &SnapshotLimits::default()).unwrap_err())
}

#[test]
fn json_of_another_version_names_the_file_and_the_field() {
    let unlisted = br#"{"snapshots":{},"snapshot_data":null}"#;
    let other = String::from_utf8(state_text(&[])).unwrap().replace("memory_ranges", "memory_areas");
    let cases: [(&str, &[u8], &str); 9] = [
        (CONFIG_FILE, b"{", "config.json, which another version may have written: EOF"),
        (CONFIG_FILE, b"[]", "config.json"),
        (CONFIG_FILE, b"{}", "missing field `memory`"),
        (CONFIG_FILE, br#"{"memory":{"size":"1G"}}"#, "invalid type: string \"1G\""),
        (STATE_FILE, b"\xff", "state.json is not in UTF-8: invalid utf-8 sequence of 1 bytes from index 0"),
        (STATE_FILE, b"{}", "missing field `snapshots`"),
        (STATE_FILE, unlisted, "state.json holds no state of memory-manager"),
        (STATE_FILE, other.as_bytes(), "missing field `memory_ranges`"),
        (STATE_FILE, &br#"{"snapshots":{"a":"#.repeat(100_000), "recursion limit"),
    ];
    for (name, content, expected) in cases {
        let message = open_with(name, content);
        assert!(message.contains(expected), "{message}");
    }
}

#[test]
fn memory_ranges_that_overlap_wrap_or_are_empty_are_refused() {
    let state = |from: &str, to: &str| {
        String::from_utf8(state_text(&[pages(0, 40), pages(64, 24)])).unwrap().replace(from, to).into_bytes()
    };
    let second = format!(r#"\"gpa\":{}"#, 64 * page());
    let cases = [
        (state(&second, r#"\"gpa\":4096"#), "overlap"),
        (state(&second, r#"\"gpa\":18446744073709551615"#), "wraps around"),
        (state(&format!(r#"\"length\":{}"#, 24 * page()), r#"\"length\":0"#), "is empty"),
    ];
    for (text, expected) in cases {
        let message = open_with(STATE_FILE, &text);
        assert!(
            message.contains("state.json lists impossible memory ranges") && message.contains(expected),
            "{message}"
        );
    }
}

#[test]
fn a_memory_file_of_the_wrong_size_is_refused_with_both_sizes() {
    let message = open_with(MEMORY_FILE, &[0; 5]);
    assert!(
        message.contains("memory-ranges has 5 bytes where 262144 are expected") || page() != 4096,
        "{message}"
    );
}

/// Whether `error` says that the text `name` is another than the manifest's; a configuration, that it was edited.
pub(super) fn is_refusal_of(name: &str, error: &ReadError) -> bool {
    match error {
        ReadError::EditedConfig { .. } => name == CONFIG_FILE,
        ReadError::Altered { name: altered, .. } => *altered == name,
        _ => false,
    }
}

#[test]
fn a_text_that_is_not_the_manifests_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let target = dir.path().join("a");
    let guest = Guest::small();
    for (name, content) in [(CONFIG_FILE, config_text(1)), (STATE_FILE, state_text(&[pages(0, 64)]))] {
        guest.write_full(&target);
        fs::write(target.join(name), content).unwrap();
        let error = FullSnapshot::open(&target, &SnapshotLimits::default()).unwrap_err();
        assert!(is_refusal_of(name, &error), "{error}");
        fs::remove_dir_all(&target).unwrap();
    }
}

#[test]
fn texts_over_their_limits_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let target = dir.path().join("a");
    let guest = Guest::small();
    guest.write_full(&target);
    let tight = [
        SnapshotLimits { config_bytes: 5, ..SnapshotLimits::default() },
        SnapshotLimits { state_bytes: 5, ..SnapshotLimits::default() },
        SnapshotLimits { manifest_bytes: 5, ..SnapshotLimits::default() },
        SnapshotLimits { memory_bytes: 5, ..SnapshotLimits::default() },
    ];
    for limits in tight {
        let error = FullSnapshot::open(&target, &limits).unwrap_err();
        assert!(chain(&error).contains("more than") || chain(&error).contains("limit"), "{error}");
    }
    let limits = SnapshotLimits { state_bytes: 5, ..SnapshotLimits::default() };
    let writer = SnapshotWriter::create(&dir.path().join("b"), guest.announced(), None, limits).unwrap();
    let error = writer.finish(&guest.config(), &guest.state()).unwrap_err();
    assert!(matches!(error, WriteError::Format(FormatError::TooLarge { limit: 5, .. })), "{error}");
    assert_eq!(names(dir.path()), ["a"]);
}

fn message(config: &str, mappings: &str) -> Vec<u8> {
    format!(r#"{{"vm_config":{config},"memory_manager_data":{{"guest_ram_mappings":[{mappings}]}}}}"#)
        .into_bytes()
}

fn mapping(range: GpaRange, virtio_mem: bool) -> String {
    format!(r#"{{"gpa":{},"size":{},"virtio_mem":{virtio_mem},"slot":0}}"#, range.start(), range.len())
}

#[test]
fn a_config_message_tells_what_a_snapshot_must_know() {
    let config = r#"{"memory":{"size":4096,"zones":[{"id":"own"},{"id":"file","file":"/m","shared":true},
        {"id":"private","file":"/p","shared":false}]},
        "disks":[{"path":"/a","readonly":true},{"path":"/b"},{"vhost_socket":"/s","readonly":false}],
        "pmem":[{"file":"/c"},{"file":"/d","discard_writes":true}],"vdpa":[{"path":"/dev/vdpa"}],"net":null}"#;
    let mappings = [mapping(pages(64, 8), true), mapping(pages(0, 8), false)].join(",");
    let parsed = ConfigMessage::parse(&message(config, &mappings), &SnapshotLimits::default()).unwrap();
    assert_eq!(parsed.layout(), &layout(&[pages(0, 8), pages(64, 8)]));
    assert_eq!(parsed.hotpluggable(), [pages(64, 8)]);
    let vm_config = parsed.vm_config();
    assert_eq!(vm_config.text(), config, "stored as it came");
    assert_eq!(vm_config.writable_disks(), ["/b", "/s", "/c"]);
    assert_eq!(vm_config.vdpa(), ["/dev/vdpa"]);
    let ids = |zones: &[ZoneFile]| zones.iter().map(|found| found.zone.clone()).collect::<Vec<_>>();
    assert_eq!(ids(vm_config.file_zones()), ["file", "private"]);
    assert_eq!(ids(vm_config.shared_files()), ["file"]);
}

#[test]
fn a_config_message_with_impossible_ram_is_refused() {
    let config = r#"{"memory":{"size":4096}}"#;
    let cases = [
        (String::new(), "VM has no RAM region"),
        (mapping(range(1, page()), false), "not aligned to the host page"),
        ([mapping(pages(0, 8), false), mapping(pages(7, 2), false)].join(","), "overlap"),
        (r#"{"gpa":18446744073709551615,"size":4096,"virtio_mem":false}"#.into(), "wraps around"),
        (r#"{"gpa":0,"size":0,"virtio_mem":false}"#.into(), "is empty"),
        (
            r#"{"gpa":0,"size":9223372036854775808,"virtio_mem":false}"#.into(),
            "Config message lists more memory than is read: Memory has more than 17592186044416 bytes, the limit",
        ),
        (r#"{"gpa":0}"#.into(), "missing field `size`"),
    ];
    for (mappings, expected) in cases {
        let error =
            ConfigMessage::parse(&message(config, &mappings), &SnapshotLimits::default()).unwrap_err();
        assert!(chain(&error).contains(expected), "{}", chain(&error));
    }
}

#[test]
fn a_config_with_more_devices_than_any_vm_has_is_refused() {
    for (field, entry) in [("disks", "{}"), ("vdpa", r#"{"path":""}"#), ("pmem", r#"{"file":""}"#)] {
        let list = |count: usize| vec![entry; count].join(",");
        let config = |count| format!(r#"{{"memory":{{"size":1}},"{field}":[{}]}}"#, list(count)).into_bytes();
        VmConfig::parse(&config(1 << 16), &SnapshotLimits::default()).unwrap();
        let error = VmConfig::parse(&config((1 << 16) + 1), &SnapshotLimits::default()).unwrap_err();
        assert!(chain(&error).contains("expected at most 65536 entries"), "{}", chain(&error));
    }
}

/// Data of a real migration, where it is at hand.
#[test]
fn captured_messages_make_a_snapshot_and_the_same_config_message_again() {
    let Some(captures) = captures() else { return };
    let config = fs::read(captures.join("config-message.json")).unwrap();
    let state = fs::read(captures.join("state-message.json")).unwrap();
    let limits = SnapshotLimits::default();
    let received = ConfigMessage::parse(&config, &limits).unwrap();
    assert_eq!(received.layout().bytes(), 64 << 20);
    assert!(received.vm_config().writable_disks().is_empty());

    let dir = tempfile::tempdir().unwrap();
    let target = dir.path().join("a");
    let announced = AnnouncedRam::all(received.layout().clone());
    let writer = SnapshotWriter::create(&target, announced, None, limits).unwrap();
    writer.fill(range(0, 64 << 20), &mut std::io::repeat(1)).unwrap();
    writer.finish(received.vm_config().text().as_bytes(), &state).unwrap();
    assert_eq!(fs::read(target.join(STATE_FILE)).unwrap(), state, "stored as it came");

    let opened = FullSnapshot::open(&target, &limits).unwrap();
    let again: serde_json::Value = serde_json::from_slice(&opened.config_message().unwrap()).unwrap();
    assert_eq!(again, serde_json::from_slice::<serde_json::Value>(&config).unwrap());
}

fn captures() -> Option<PathBuf> {
    let beside_repository = || Path::new(env!("CARGO_MANIFEST_DIR")).join("../shared/captures");
    let dir = std::env::var_os("VFIO_MIGRATION_CAPTURES").map_or_else(beside_repository, PathBuf::from);
    if dir.join("config-message.json").exists() {
        return Some(dir);
    }
    let how = "name their folder in VFIO_MIGRATION_CAPTURES";
    crate::skip::skip(format!("no captures at {}; {how}", dir.display()));
    None
}

#[test]
fn one_byte_is_not_called_bytes() {
    let document = FormatError::TooLarge { document: "config.json", bytes: 1, limit: 0 };
    let name = CONFIG_FILE;
    let unreadable = WriteError::Unreadable { name, path: "/dir".into(), bytes: 1, limit: 0 };
    for (error, said) in [
        (document.to_string(), "config.json has 1 byte, the limit is 0"),
        (unreadable.to_string(), "config.json of /dir would have 1 byte, the limit is 0"),
    ] {
        assert_eq!(error, said);
    }
}
