// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What the README and `docs/other-host.md` show works as pasted, and `docs/cli.md` names everything that programs are told.

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::thread;
use std::time::{Duration, Instant};
use std::{env, fs};

use serde_json::Value;
use vfio_migration::snapshot::{CONFIG_FILE, MANIFEST_FILE, MEMORY_FILE, STATE_FILE};
use vfio_migration_integration::skip;

use crate::stored::{Place, assert_same};
use crate::tool::{Ended, Tool, run};

const README: &str = include_str!("../../../README.md");
const OTHER_HOST: &str = include_str!("../../../docs/other-host.md");
const REFERENCE: &str = include_str!("../../../docs/cli.md");

/// The blocks of commands in `text`.
fn blocks(text: &str) -> impl Iterator<Item = &str> {
    text.split("```sh\n").skip(1).map(|rest| rest.split("```").next().unwrap())
}

/// The commands of the section on snapshots, without remarks, with paths and ports that nobody else uses.
fn commands(place: &Place) -> Vec<String> {
    let block = blocks(README).find(|block| block.contains("vfio-migrate receive")).unwrap();
    let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string();
    let block = block.replace("/tmp", place.root().to_str().unwrap()).replace("127.0.0.1:4444", &free);
    let commands = block.lines().map(|line| line.split(" #").next().unwrap().trim().to_owned());
    commands.filter(|line| !line.is_empty() && !line.starts_with('#')).collect()
}

/// Pastes `command` into a shell in `place` that finds the tool.
pub(crate) fn paste(command: &str, place: &Place) -> Child {
    paste_in(command, place.root())
}

/// Pastes `command` into a shell in `dir` that finds the tool.
fn paste_in(command: &str, dir: &Path) -> Child {
    let folder = Path::new(env!("CARGO_BIN_EXE_vfio-migrate")).parent().unwrap();
    let path = format!("{}:{}", folder.display(), env::var("PATH").unwrap());
    let mut shell = Command::new("sh");
    shell.args(["-c", command]).current_dir(dir).env("PATH", path).stdin(Stdio::null());
    shell.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
}

#[track_caller]
pub(crate) fn succeeded(child: Child) -> Output {
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success(), "{output:?}");
    output
}

pub(crate) fn wait_for(path: &Path) {
    let begun = Instant::now();
    while !path.exists() {
        assert!(begun.elapsed() < Duration::from_secs(30), "{} does not appear", path.display());
        thread::sleep(Duration::from_millis(5));
    }
}

/// The commands for `ch-remote` are done by the tool: it stands for Cloud Hypervisor, too.
#[test]
fn the_commands_of_the_section_on_snapshots_work_one_after_the_other() {
    let place = Place::new();
    let vm = [place.stored("vm-on-monday", 1), place.stored("vm-on-tuesday", 2)];
    fs::write(place.path("disk.raw"), "blocks").unwrap();
    let mut states = vm.iter();
    let mut waiting: Option<Child> = None;
    let mut new_vm: Option<Tool> = None;
    for command in commands(&place) {
        eprintln!("{command}");
        let argument = |key| command.split(key).nth(1);
        if command.starts_with("vfio-migrate receive") {
            waiting = Some(paste(&command, &place));
            wait_for(&place.path("checkpoint.sock"));
        } else if let Some(url) = argument("destination_url=") {
            // A source of a checkpoint is told that it failed.
            Tool::send(url, states.next().unwrap(), &[]).end().failed(3, "Receiver refused");
            succeeded(waiting.take().unwrap());
        } else if let Some(url) = argument("receiver_url=") {
            new_vm = Some(Tool::receive(url, &place.path("vm-restored"), &[]).0);
        } else {
            succeeded(paste(&command, &place));
        }
    }
    assert!(states.next().is_none() && waiting.is_none());
    new_vm.unwrap().end().succeeded();
    assert_same(&vm[0], &place.path("monday"));
    assert_eq!(fs::read(place.path("monday.raw")).unwrap(), b"blocks");
    run(["snapshot", "diff", vm[1].to_str().unwrap(), place.path("vm-restored").to_str().unwrap()])
        .succeeded();
}

/// Has the commands of a restore on another host, each with what is said of how it ends: two hosts are two directories.
fn commands_of_two_hosts(place: &Place) -> Vec<(String, Option<i32>)> {
    let root = place.root().to_str().unwrap();
    let text = blocks(OTHER_HOST).collect::<String>();
    let text = text.replace("/tmp/", &format!("{root}/")).replace("/srv", &format!("{root}/srv"));
    let text = text.replace("/var/lib/vms", &format!("{root}/vms")).replace("newhost:", "");
    let command = |line: &str| {
        let (command, remark) = line.split_once(" #").unwrap_or((line, ""));
        let code = remark.split_once("ends with ").map(|(_, code)| code[..1].parse().unwrap());
        (command.trim().to_owned(), code)
    };
    text.lines().map(command).collect()
}

#[test]
fn c66_the_commands_of_a_restore_on_another_host_work_one_after_the_other() {
    let has = |program| Command::new(program).arg("--version").output().is_ok();
    if !has("jq") {
        return skip("no jq, which edits the configuration");
    }
    let place = Place::new();
    let vm = place.stored("vm", 1);
    for dir in ["vms", "srv", "old"] {
        fs::create_dir(place.path(dir)).unwrap();
    }
    fs::write(place.path("vms/web.raw"), "blocks").unwrap();
    let mut host = place.path("old");
    let (mut waiting, mut new_vm, mut was_restored) = (None, None, false);
    for (command, code) in commands_of_two_hosts(&place) {
        eprintln!("{command}");
        let argument = |key| command.split(key).nth(1).map(|text| text.trim_end_matches(" &"));
        if command.starts_with("vfio-migrate receive") {
            waiting = Some(paste_in(&command, &host));
            wait_for(&place.path("checkpoint.sock"));
        } else if let Some(url) = argument("destination_url=") {
            Tool::send(url, &vm, &[]).end().failed(3, "Receiver refused");
            succeeded(waiting.take().unwrap());
        } else if command.starts_with("rsync") {
            let copy =
                if has("rsync") { command } else { command.replace("rsync -aS", "cp -a --sparse=always") };
            succeeded(paste_in(&copy, &host));
            host = place.path("srv");
        } else if let Some(url) = argument("receiver_url=") {
            new_vm = Some(Tool::receive(url, &place.path("vm-restored"), &["--memory-only"]).0);
        } else if let Some(restored) = argument("source_url=file://") {
            assert_restorable(restored.as_ref(), &vm, &host);
            was_restored = true;
        } else if !["cloud-hypervisor", "ch-remote", "until"].iter().any(|word| command.starts_with(word)) {
            let ended = paste_in(&command, &host).wait_with_output().unwrap();
            assert_eq!(ended.status.code(), Some(code.unwrap_or(0)), "{ended:?}");
        }
    }
    assert!(was_restored && waiting.is_none());
    new_vm.unwrap().end().succeeded();
    assert_restorable(&place.path("vm-restored"), &vm, &host);
    assert_eq!(fs::read(place.path("srv/web.raw")).unwrap(), b"blocks");
}

/// Checks that `dir` is what Cloud Hypervisor restores: memory and state of `vm`, with the configuration that was edited for `host`.
#[track_caller]
fn assert_restorable(dir: &Path, vm: &Path, host: &Path) {
    for name in [STATE_FILE, MEMORY_FILE] {
        assert!(fs::read(dir.join(name)).unwrap() == fs::read(vm.join(name)).unwrap(), "{name}");
    }
    let config: Value = serde_json::from_slice(&fs::read(dir.join(CONFIG_FILE)).unwrap()).unwrap();
    assert_eq!(config["disks"][0]["path"], host.join("web.raw").to_str().unwrap());
    assert_eq!(config["serial"]["file"], host.join("web.log").to_str().unwrap());
    run([OsStr::new("snapshot"), "verify".as_ref(), dir.as_ref()]).succeeded();
}

/// The names in `told`, and values that are one of a few words.
fn names(told: &Value) -> BTreeSet<String> {
    let fields = told.as_object().unwrap();
    let words = ["event", "class", "kind"].iter().filter_map(|key| fields.get(*key)?.as_str());
    fields.keys().map(String::as_str).chain(words).map(str::to_owned).collect()
}

#[test]
fn everything_that_programs_are_told_is_named() {
    let place = Place::new();
    let (one, two, differential) =
        (place.stored("one", 1), place.stored("two", 2), place.path("differential"));
    let [first, second, made] = [&one, &two, &differential].map(|path| path.to_str().unwrap());
    let (receiver, url) = Tool::receive("tcp:127.0.0.1:0", &place.path("into"), &[]);
    // Slow enough for a word on the way.
    let sent = Tool::send(&url, &one, &["--bandwidth", "8M"]).end().succeeded();
    let mut ended: Vec<Ended> = vec![sent, receiver.end().succeeded()];
    let snapshot = |arguments: &[&str]| run([&["snapshot"], arguments, &["--json"]].concat());
    ended.push(snapshot(&["create", "--from", second, "--base", first, "--into", made]));
    ended.extend([first, made].map(|dir| snapshot(&["info", dir])));
    ended.extend([snapshot(&["verify", first]), snapshot(&["diff", first, second])]);
    ended.push(snapshot(&["verify", place.path("none").to_str().unwrap()]));
    fs::remove_file(one.join(MANIFEST_FILE)).unwrap();
    ended.push(snapshot(&["verify", first]));

    let told: BTreeSet<String> =
        ended.iter().flat_map(|ended| ended.events()).flat_map(|event| names(&event)).collect();
    for name in ["receiving", "kept", "sending", "sent", "failed", "io", "usage", "full", "differential"] {
        assert!(told.contains(name), "{name} is not among {told:?}");
    }
    let unnamed: Vec<_> = told.iter().filter(|name| !REFERENCE.contains(&format!("`{name}`"))).collect();
    assert!(unnamed.is_empty(), "{unnamed:?}");
}
