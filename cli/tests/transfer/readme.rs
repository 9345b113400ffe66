// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What the README shows works as pasted, and `docs/cli.md` names everything that programs are told.

use std::collections::BTreeSet;
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::thread;
use std::time::{Duration, Instant};
use std::{env, fs};

use serde_json::Value;
use vfio_migration::snapshot::MANIFEST_FILE;

use crate::stored::{Place, assert_same};
use crate::tool::{Ended, Tool, run};

const README: &str = include_str!("../../../README.md");
const REFERENCE: &str = include_str!("../../../docs/cli.md");

/// The commands of the section on snapshots, without remarks, with paths and ports that nobody else uses.
fn commands(place: &Place) -> Vec<String> {
    let blocks = README.split("```sh\n").skip(1).map(|rest| rest.split("```").next().unwrap());
    let block = blocks.into_iter().find(|block| block.contains("vfio-migrate receive")).unwrap();
    let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string();
    let block = block.replace("/tmp", place.root().to_str().unwrap()).replace("127.0.0.1:4444", &free);
    let commands = block.lines().map(|line| line.split(" #").next().unwrap().trim().to_owned());
    commands.filter(|line| !line.is_empty() && !line.starts_with('#')).collect()
}

/// Pastes `command` into a shell in `place` that finds the tool.
fn paste(command: &str, place: &Place) -> Child {
    let folder = Path::new(env!("CARGO_BIN_EXE_vfio-migrate")).parent().unwrap();
    let path = format!("{}:{}", folder.display(), env::var("PATH").unwrap());
    let mut shell = Command::new("sh");
    shell.args(["-c", command]).current_dir(place.root()).env("PATH", path).stdin(Stdio::null());
    shell.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
}

#[track_caller]
fn succeeded(child: Child) -> Output {
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success(), "{output:?}");
    output
}

fn wait_for(path: &Path) {
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
