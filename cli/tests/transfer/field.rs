// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Every command with every kind of directory that people have: it works, or says in a sentence what to do; and what it makes
//! can be read.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::Ordering;

use serde_json::{Value, json};
use vfio_migration::snapshot::{CONFIG_FILE, MANIFEST_FILE, MEMORY_FILE, STATE_FILE};
use vfio_migration_integration::skip;

use crate::dense::Dense;
use crate::stored::Place;
use crate::tool::{Ended, Tool, run};

/// How many ranges the memory of many has, where this variable says so; 2^20 are the most.
const RANGES: &str = "VFIO_MIGRATE_TEST_RANGES";

/// More than a process has mappings.
const MORE_THAN_MAPPINGS: u64 = 70_001;

const PAGE: u64 = 4096;

/// What a command does with a directory.
enum Outcome {
    Works,
    /// It ends with this status and a message that holds these words.
    Refuses(i32, &'static str),
}
use Outcome::{Refuses, Works};

/// A kind of directory, and what the commands do with it once it was sealed.
struct Kind {
    name: &'static str,
    make: fn(&Path),
    /// What `info` has to tell of it, in JSON.
    tells: fn(&Value) -> bool,
    seal: Outcome,
    verify: Outcome,
    send: Outcome,
    apply: Outcome,
    /// Whether it takes so long to send that it is sent as a VMM leaves it alone, and not when it is sealed.
    sent_once: bool,
}

const ELSEWHERE: &str = "memory zone mem0 is in /dev/shm/mem0 (Cloud Hypervisor restores it from disk where the files are as they were)";
const EDITED: &str = "config.json of";
const ODD: &str = "Memory range 0x200000..0x200800 is not of whole pages of 4 KiB (Cloud Hypervisor alone restores it, from disk";

/// A kind with which every command works.
fn kind(name: &'static str, make: fn(&Path)) -> Kind {
    let tells = |info: &Value| info["kind"] == "full";
    Kind { name, make, tells, seal: Works, verify: Works, send: Works, apply: Works, sent_once: false }
}

fn kinds() -> Vec<Kind> {
    vec![
        Kind {
            tells: |info| info["elsewhere"][0]["file"] == "/dev/shm/mem0" && info["memory_bytes"] == 0,
            send: Refuses(2, ELSEWHERE),
            apply: Refuses(2, ELSEWHERE),
            ..kind("memory wholly in a zone's own file", memory_wholly_elsewhere)
        },
        Kind {
            tells: |info| info["elsewhere"][0]["zone"] == "mem0" && info["memory_bytes"] == 2 << 20,
            send: Refuses(2, ELSEWHERE),
            ..kind("memory partly in a zone's own file", memory_partly_elsewhere)
        },
        Kind { tells: |info| info["memory_bytes"] == 6u64 << 40, sent_once: true, ..kind("6 TiB", six_tib) },
        Kind {
            seal: Refuses(2, ODD),
            verify: Refuses(2, ODD),
            send: Refuses(2, ODD),
            apply: Refuses(2, ODD),
            ..kind("a placement that is not of whole pages", odd_placement)
        },
        Kind { tells: |info| info["memory_ranges"] == ranges(), ..kind("many ranges", many_ranges) },
        Kind {
            tells: |info| info["config_edited"] == true,
            seal: Refuses(2, EDITED),
            verify: Refuses(1, ""),
            send: Refuses(
                2,
                "(`snapshot seal --edited-config` takes it as it stands, `send --config FILE` sends any)",
            ),
            apply: Refuses(2, EDITED),
            ..kind("an edited config.json", edited_config)
        },
    ]
}

/// A range of memory, as JSON has it.
fn listed((gpa, length): (u64, u64)) -> Value {
    json!({"gpa": gpa, "length": length})
}

/// A part of the RAM, as JSON has it.
fn mapped(gpa: u64, size: u64, zone: &str, virtio_mem: bool) -> Value {
    json!({"slot": 0, "gpa": gpa, "size": size, "zone_id": zone, "virtio_mem": virtio_mem, "file_offset": 0})
}

/// Writes a directory as a VMM does.
fn write(dir: &Path, memory: &Value, ranges: &[(u64, u64)], mappings: &[Value]) {
    write_texts(dir, memory, ranges, mappings);
    let bytes: u64 = ranges.iter().map(|(_, length)| length).sum();
    if bytes > 0 {
        let file = File::create_new(dir.join(MEMORY_FILE)).unwrap();
        file.set_len(bytes).unwrap();
        for at in [0, bytes / 2 / PAGE * PAGE, bytes - 512] {
            file.write_all_at(&[7; 512], at).unwrap();
        }
    }
}

/// Writes a directory without a file of memory.
fn write_texts(dir: &Path, memory: &Value, ranges: &[(u64, u64)], mappings: &[Value]) {
    fs::create_dir(dir).unwrap();
    fs::write(dir.join(CONFIG_FILE), json!({"memory": memory, "disks": null}).to_string()).unwrap();
    let ranges_data: Vec<_> = ranges.iter().copied().map(listed).collect();
    let manager = json!({"memory_ranges": {"data": ranges_data}, "guest_ram_mappings": mappings}).to_string();
    let own = json!({"common_cpuid": []}).to_string();
    let state = json!({
        "snapshots": {"memory-manager": {"snapshots": {}, "snapshot_data": {"state": manager}}},
        "snapshot_data": {"state": own},
    });
    fs::write(dir.join(STATE_FILE), state.to_string()).unwrap();
}

/// Memory of 4 MiB as a VMM writes it where it can make no hole.
fn dense(dir: &Path) {
    let bytes = 4 << 20;
    write_texts(dir, &json!({"size": bytes}), &[(0, bytes)], &[mapped(0, bytes, "mem0", false)]);
    let mut memory = vec![0; usize::try_from(bytes).unwrap()];
    memory[..512].fill(7);
    memory[2 << 20..][..9000].fill(9);
    fs::write(dir.join(MEMORY_FILE), memory).unwrap();
}

const ZONES: &str = r#"{"size": 0, "zones": [{"id": "own", "size": 2097152},
    {"id": "mem0", "size": 2097152, "file": "/dev/shm/mem0", "shared": true}]}"#;

fn memory_wholly_elsewhere(dir: &Path) {
    let zone = json!({"id": "mem0", "size": 2 << 20, "file": "/dev/shm/mem0", "shared": true});
    write(dir, &json!({"size": 0, "zones": [zone]}), &[], &[mapped(0, 2 << 20, "mem0", false)]);
}

fn memory_partly_elsewhere(dir: &Path) {
    let zones: Value = serde_json::from_str(ZONES).unwrap();
    let mappings = [mapped(0, 2 << 20, "own", false), mapped(2 << 20, 2 << 20, "mem0", false)];
    write(dir, &zones, &[(0, 2 << 20)], &mappings);
}

fn six_tib(dir: &Path) {
    let ram = [(0, 3 << 30), (4 << 30, (6 << 40) - (3 << 30))];
    let mappings = ram.map(|(gpa, size)| mapped(gpa, size, "mem0", false));
    write(dir, &json!({"size": 6u64 << 40}), &ram, &mappings);
}

fn odd_placement(dir: &Path) {
    let ram = [(0, 2 << 20), (2 << 20, 0x800)];
    let mappings = ram.map(|(gpa, size)| mapped(gpa, size, "mem0", false));
    write(dir, &json!({"size": 4 << 20}), &ram, &mappings);
}

fn ranges() -> u64 {
    std::env::var(RANGES).map_or(MORE_THAN_MAPPINGS, |text| text.parse().unwrap())
}

/// Memory plugged piece by piece: every other page.
fn many_ranges(dir: &Path) {
    let ram: Vec<_> = (0..ranges()).map(|at| (2 * at * PAGE, PAGE)).collect();
    write(dir, &json!({"size": 0}), &ram, &[mapped(0, 2 * ranges() * PAGE, "mem0", true)]);
}

fn edited_config(dir: &Path) {
    write(dir, &json!({"size": 2 << 20}), &[(0, 2 << 20)], &[mapped(0, 2 << 20, "mem0", false)]);
    snapshot("seal", dir, &[]).succeeded();
    edit(dir);
}

/// Gives a disk another name, as whoever restores on another host does.
fn edit(dir: &Path) {
    let mut config: Value = serde_json::from_slice(&fs::read(dir.join(CONFIG_FILE)).unwrap()).unwrap();
    config["disks"] = json!([{"path": "/elsewhere/disk.raw", "readonly": true}]);
    fs::write(dir.join(CONFIG_FILE), config.to_string()).unwrap();
}

fn snapshot(command: &str, dir: &Path, options: &[&str]) -> Ended {
    run([&["snapshot", command, dir.to_str().unwrap(), "--json"], options].concat())
}

impl Outcome {
    /// Checks what a command did; returns whether it worked.
    #[track_caller]
    fn check(&self, what: &str, ended: &Ended) -> bool {
        match self {
            Works => assert_eq!(ended.code, Some(0), "{what}: {ended:?}"),
            Refuses(code, words) => {
                assert_eq!(ended.code, Some(*code), "{what}: {ended:?}");
                assert!(ended.stderr.contains(words), "{what}: {ended:?}");
                assert!(ended.stderr.lines().count() <= 1, "{what} is one sentence: {ended:?}");
            }
        }
        matches!(self, Works)
    }
}

/// Does everything with a directory that can be done with one, as a VMM leaves it and when it is sealed.
fn exercise(kind: &Kind, dir: &Path, place: &Place) {
    let info = snapshot("info", dir, &[]).succeeded().last();
    assert!((kind.tells)(&info), "{}: {info}", kind.name);
    let unsealed = send(kind, dir, &place.path("sent-unsealed"));
    kind.seal.check(&format!("seal of {}", kind.name), &snapshot("seal", dir, &[]));
    kind.verify.check(&format!("verify of {}", kind.name), &snapshot("verify", dir, &[]));

    let applied = place.path("applied");
    let whole = snapshot("apply", dir, &["--into", applied.to_str().unwrap()]);
    if kind.apply.check(&format!("apply of {}", kind.name), &whole) {
        snapshot("verify", &applied, &[]).succeeded();
    } else {
        assert!(!applied.exists(), "{}", kind.name);
    }
    let sealed = if kind.sent_once { None } else { send(kind, dir, &place.path("sent")) };
    for digest in unsealed.into_iter().chain(sealed) {
        assert_eq!(digest, snapshot("info", dir, &[]).succeeded().last()["digest"], "{}", kind.name);
    }
}

/// Sends a directory to where it becomes `sent`; returns what names that, where it can be sent.
fn send(kind: &Kind, dir: &Path, sent: &Path) -> Option<Value> {
    let (receiver, url) = Tool::receive("tcp:127.0.0.1:0", sent, &[]);
    if kind.send.check(&format!("send of {}", kind.name), &Tool::send(&url, dir, &[]).end()) {
        receiver.end().succeeded();
        snapshot("verify", sent, &[]).succeeded();
        return Some(snapshot("info", sent, &[]).succeeded().last()["digest"].clone());
    }
    receiver.signal("-TERM");
    receiver.end();
    assert!(!sent.exists(), "{}", kind.name);
    None
}

#[test]
fn c50_c51_c52_c53_c66_every_command_works_with_every_directory_or_says_what_to_do() {
    for kind in kinds() {
        let place = Place::new();
        let dir = place.path("dir");
        (kind.make)(&dir);
        let begun = std::time::Instant::now();
        exercise(&kind, &dir, &place);
        eprintln!("{}: {:?}", kind.name, begun.elapsed());
    }
}

#[test]
fn c52_what_no_seal_can_help_is_never_told_to_be_sealed() {
    let place = Place::new();
    let (odd, whole, into) = (place.path("odd"), place.path("whole"), place.path("into"));
    odd_placement(&odd);
    dense(&whole);
    let [odd, whole, into] = [&odd, &whole, &into].map(|path| path.to_str().unwrap());
    let info = run(["snapshot", "info", odd]).succeeded().stdout;
    assert!(info.contains("can have no manifest: Memory range 0x200000..0x200800"), "{info}");
    for base in [odd, whole] {
        let create = run(["snapshot", "create", "--from", whole, "--base", base, "--into", into]);
        let receive = run(["receive", "tcp:127.0.0.1:0", "--into", into, "--base", base]);
        for ended in [create, receive] {
            let can_be_sealed = ended.stderr.contains("`snapshot seal` gives it one");
            assert_eq!((ended.code, can_be_sealed), (Some(2), base == whole), "{ended:?}");
            assert_eq!(ended.stderr.contains(ODD), base == odd, "{ended:?}");
        }
    }
}

#[test]
fn c56_every_command_works_on_a_file_system_without_holes() {
    let Some(file_system) = Dense::mount() else { return };
    work_on(file_system.path());
}

#[test]
fn c56_every_command_works_on_ramfs() {
    const PLACE: &str = "VFIO_MIGRATE_TEST_RAMFS";
    if let Some(mounted_at) = std::env::var_os(PLACE) {
        return work_on(mounted_at.as_ref());
    }
    let place = Place::new();
    let script = r#"mount -t ramfs none "$1" || exit 99
        exec "$0" --exact field::c56_every_command_works_on_ramfs"#;
    let mut command = Command::new("unshare");
    command.args(["-rm", "/bin/sh", "-c", script]).arg(std::env::current_exe().unwrap()).arg(place.root());
    let ended = Tool::spawn(command.env(PLACE, place.root())).end();
    if ended.code == Some(99) || ended.stderr.contains("unshare") {
        return skip("cannot mount ramfs with unshare");
    }
    assert!(ended.succeeded().stdout.contains("1 passed"), "there is no such test");
}

/// Does everything with a directory on another file system, a differential too.
fn work_on(mounted_at: &Path) {
    let place = Place::within(mounted_at);
    let dir = place.path("dir");
    dense(&dir);
    exercise(&kind("dense memory", dense), &dir, &place);

    let [base, dir, changed] = [place.path("sent"), dir, place.path("changed")];
    let memory = File::options().write(true).open(dir.join(MEMORY_FILE)).unwrap();
    memory.write_all_at(&[3; 4096], 1 << 20).unwrap();
    memory.write_all_at(&[0; 12288], 2 << 20).unwrap();
    fs::remove_file(dir.join(MANIFEST_FILE)).unwrap();
    snapshot("seal", &dir, &[]).succeeded();
    let options = ["--base", base.to_str().unwrap()];
    let (receiver, url) = Tool::receive("tcp:127.0.0.1:0", &changed, &options);
    Tool::send(&url, &dir, &[]).end().succeeded();
    receiver.end().succeeded();
    let whole = place.path("whole");
    let apply = [base.as_path(), &changed, "--into".as_ref(), &whole];
    run([Path::new("snapshot"), "apply".as_ref()].into_iter().chain(apply)).succeeded();
    assert!(fs::read(whole.join(MEMORY_FILE)).unwrap() == fs::read(dir.join(MEMORY_FILE)).unwrap());
}

#[test]
fn a_directory_that_was_moved_is_whole_whatever_its_file_system_says() {
    let Some(file_system) = Dense::mount() else { return };
    let (elsewhere, place) = (Place::new(), Place::within(file_system.path()));
    let (from, into) = (elsewhere.stored("from", 1), place.path("into"));
    file_system.faults.denies_moves.store(true, Ordering::Relaxed);
    run(["snapshot".as_ref(), "apply".as_ref(), from.as_path(), "--into".as_ref(), &into]).succeeded();
    snapshot("verify", &into, &[]).succeeded();
}

#[test]
fn a_disk_that_reads_nothing_ends_no_command_by_a_signal() {
    let Some(file_system) = Dense::mount() else { return };
    let place = Place::within(file_system.path());
    let dir = place.path("dir");
    dense(&dir);
    snapshot("seal", &dir, &[]).succeeded();
    *file_system.faults.unreadable.lock().unwrap() = Some(MEMORY_FILE);
    let named = "memory-ranges: Input/output error (os error 5)";
    snapshot("verify", &dir, &[]).failed(4, named);
    for options in [&[][..], &["--all-pages"]] {
        let (receiver, url) = Tool::receive("tcp:127.0.0.1:0", &place.path("into"), &[]);
        Tool::send(&url, &dir, options).end().failed(4, named);
        receiver.end().failed(3, "");
    }
}

#[test]
fn c51_a_vm_larger_than_allowed_is_refused_with_the_option_that_allows_it() {
    let place = Place::new();
    let dir = place.path("dir");
    edited_config(&dir);
    let limit = ["--memory-limit", "1M"];
    for command in ["info", "verify", "seal"] {
        let ended = snapshot(command, &dir, &limit);
        let ended =
            ended.failed(2, "Memory has more than 1048576 bytes, the limit (--memory-limit sets the limit)");
        assert!(!ended.stderr.contains("impossible"), "{ended:?}");
    }
    Tool::send("tcp:127.0.0.1:1", &dir, &limit).end().failed(2, "--memory-limit");
}

#[test]
fn c50_c66_memory_that_is_elsewhere_is_missed_whatever_the_configuration_says_of_it() {
    let place = Place::new();
    let dir = place.path("dir");
    memory_partly_elsewhere(&dir);
    let edited = json!({"memory": {"size": 0, "zones": [{"id": "own", "size": 2 << 20}, {"id": "mem0", "size": 2 << 20}]}});
    let (other, lacks) =
        (place.path("other.json"), "memory zone mem0 is in a file that the configuration does not name");
    fs::write(&other, edited.to_string()).unwrap();
    // Nobody listens there: it is refused before.
    let send = |options: &[&str]| Tool::send("tcp:127.0.0.1:1", &dir, options).end();
    for sealed in [false, true] {
        send(&["--config", other.to_str().unwrap()]).failed(2, lacks);
        if !sealed {
            snapshot("seal", &dir, &[]).succeeded();
        }
    }
    fs::copy(&other, dir.join(CONFIG_FILE)).unwrap();
    snapshot("seal", &dir, &["--edited-config"]).succeeded();
    send(&[]).failed(2, lacks);
    let verified = run(["snapshot", "verify", dir.to_str().unwrap()]).succeeded();
    assert!(verified.stdout.contains(lacks), "{verified:?}");

    let empty = place.path("empty");
    write(&empty, &json!({"size": 0}), &[], &[]);
    let ended = Tool::send("tcp:127.0.0.1:1", &empty, &[]).end();
    assert!(ended.stderr.ends_with("empty holds no memory\n"), "{ended:?}");
}

/// Makes a sealed directory and names another configuration of the same VM.
fn moved_to_another_host(place: &Place) -> (PathBuf, PathBuf) {
    let dir = place.stored("dir", 3);
    let other = place.path("other.json");
    let mut config: Value = serde_json::from_slice(&fs::read(dir.join(CONFIG_FILE)).unwrap()).unwrap();
    config["disks"] = json!([{"path": "/srv/disk.raw"}]);
    config["serial"] = json!({"mode": "File", "file": "/srv/serial.log"});
    fs::write(&other, config.to_string()).unwrap();
    (dir, other)
}

#[test]
fn c66_a_config_is_edited_for_another_host_and_the_vm_sent_with_it() {
    let place = Place::new();
    let (dir, other) = moved_to_another_host(&place);
    let sealed = snapshot("info", &dir, &[]).succeeded().last()["digest"].clone();
    fs::copy(&other, dir.join(CONFIG_FILE)).unwrap();

    // Named as what it is, and everything else checked.
    let ended = snapshot("verify", &dir, &[]);
    assert_eq!(ended.code, Some(1), "{ended:?}");
    assert_eq!(ended.last()["config_edited"], true);
    assert_eq!(ended.last()["findings"], json!([]));
    let said = run(["snapshot", "verify", dir.to_str().unwrap()]);
    assert!(said.stdout.contains("config.json was edited since its manifest was made"), "{said:?}");
    assert!(said.stdout.contains("every other byte is as it was written"), "{said:?}");

    let edited = dir.join(CONFIG_FILE);
    for config in [&edited, &other] {
        let sent = place.path("sent");
        let (receiver, url) = Tool::receive("tcp:127.0.0.1:0", &sent, &["--memory-only"]);
        Tool::send(&url, &dir, &["--config", config.to_str().unwrap()]).end().succeeded();
        receiver.end().succeeded();
        assert_eq!(fs::read(sent.join(CONFIG_FILE)).unwrap(), fs::read(&other).unwrap());
        for name in [STATE_FILE, MEMORY_FILE] {
            assert!(fs::read(sent.join(name)).unwrap() == fs::read(dir.join(name)).unwrap(), "{name}");
        }
        fs::remove_dir_all(sent).unwrap();
    }
    let renamed = snapshot("seal", &dir, &["--edited-config"]).succeeded().last()["digest"].clone();
    assert_ne!(renamed, sealed);
    snapshot("verify", &dir, &[]).succeeded();
    assert_eq!(snapshot("info", &dir, &[]).succeeded().last()["aliases"], json!([sealed]));
    // What Cloud Hypervisor's --restore needs is what a VMM wrote, with the configuration of the new host.
    let names = [CONFIG_FILE, MEMORY_FILE, MANIFEST_FILE, STATE_FILE];
    let mut found: Vec<_> = fs::read_dir(&dir).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    found.sort();
    assert_eq!(found, names);
    assert_eq!(fs::read(dir.join(CONFIG_FILE)).unwrap(), fs::read(&other).unwrap());
}

#[test]
fn c66_what_is_no_config_is_sent_to_nobody() {
    let place = Place::new();
    let (dir, other) = moved_to_another_host(&place);
    let send =
        |config: &Path| Tool::send("tcp:127.0.0.1:1", &dir, &["--config", config.to_str().unwrap()]).end();
    send(&place.path("none.json")).failed(4, "none.json: No such file");
    send(place.root()).failed(2, "is not a regular file");
    let pipe = place.path("pipe");
    rustix::fs::mknodat(rustix::fs::CWD, &pipe, rustix::fs::FileType::Fifo, rustix::fs::Mode::RUSR, 0)
        .unwrap();
    send(&pipe).failed(2, "pipe is not a regular file");
    fs::write(&other, "{}").unwrap();
    send(&other).failed(2, "other.json for a config.json: Cannot read config.json");
    // An altered State or memory is found whatever configuration goes with it.
    let (state, config) = (dir.join(STATE_FILE), dir.join(CONFIG_FILE));
    let text = fs::read_to_string(&state).unwrap();
    fs::write(&state, format!("{text} ")).unwrap();
    send(&config).failed(5, "state.json of");
    snapshot("seal", &dir, &["--edited-config"]).failed(5, "state.json of");
}

#[test]
fn one_of_a_thing_is_not_called_many() {
    let place = Place::new();
    let dir = place.path("dir");
    edited_config(&dir);
    let info = run(["snapshot", "info", dir.to_str().unwrap()]).succeeded().stdout;
    assert!(info.contains("in 1 range,") && info.contains("config.json was edited"), "{info}");
    File::options().write(true).open(dir.join(MEMORY_FILE)).unwrap().write_all_at(b"x", 3).unwrap();
    let verify = run(["snapshot", "verify", dir.to_str().unwrap()]);
    assert!(verify.code == Some(5) && verify.stdout.ends_with(": 1 finding\n"), "{verify:?}");
}
