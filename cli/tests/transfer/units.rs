// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The units of `resources/systemd`: systemd takes them, they start what there is, and the page on them says what they say.

use std::ffi::OsStr;
use std::fs;
use std::os::fd::AsFd;
use std::process::{Command, Stdio};

use vfio_migration_integration::skip;

use crate::frames::{ERROR, OK};
use crate::local::{Source, config, guest};
use crate::raw::{NO_DISKS, RAM};
use crate::readme::wait_for;
use crate::stored::{Place, assert_sound};
use crate::tool::{Tool, run};

const TOOL: &str = env!("CARGO_BIN_EXE_vfio-migrate");
const PAGE_TEXT: &str = include_str!("../../../docs/offload.md");
const SOCKET: &str = include_str!("../../../resources/systemd/vfio-migrate.socket");
const SERVICE: &str = include_str!("../../../resources/systemd/vfio-migrate.service");

/// What `unit` sets `key` to, which is set once.
#[track_caller]
fn value<'a>(unit: &'a str, key: &str) -> &'a str {
    let mut values = unit.lines().filter_map(|line| line.strip_prefix(key)?.strip_prefix('='));
    let value = values.next().unwrap_or_else(|| panic!("{key} is not set"));
    assert_eq!(values.next(), None, "{key} is set twice");
    value
}

/// Whether `program` is there; where not, that is said.
fn has(program: impl AsRef<OsStr>) -> bool {
    let program = program.as_ref();
    let quiet = Command::new(program).arg("--version").stdout(Stdio::null()).status();
    let is_there = quiet.is_ok_and(|status| status.success());
    if !is_there {
        skip(format!("there is no {}", program.display()));
    }
    is_there
}

/// The arguments that the service starts the tool with; systemd puts `state` in the place of the directory that it makes.
fn arguments(state: &str) -> Vec<String> {
    let mut words = value(SERVICE, "ExecStart").split(' ');
    assert_eq!(words.next(), Some("/usr/bin/vfio-migrate"));
    words.map(|word| word.replace("${STATE_DIRECTORY}", state)).collect()
}

#[test]
fn the_service_passes_options_that_the_tool_has() {
    let help = run(["receive", "--help"]).succeeded().stdout;
    let known: Vec<_> = help.split_whitespace().filter(|word| word.starts_with("--")).collect();
    let passed = arguments("/state");
    assert_eq!(passed[..3], ["receive", "--serve", "/state"]);
    let options: Vec<_> = passed.iter().filter(|word| word.starts_with("--")).collect();
    assert_eq!(options.len(), passed.len() - 2, "{passed:?}");
    options.iter().for_each(|option| assert!(known.contains(&option.as_str()), "{option}"));
}

#[test]
fn the_page_says_where_the_units_have_things() {
    let section = PAGE_TEXT.split("\n## ").find(|section| section.starts_with("A service")).unwrap();
    let named = [
        value(SOCKET, "ListenStream").to_owned(),
        format!("`{}`", value(SOCKET, "SocketGroup")),
        format!("/var/lib/{}", value(SERVICE, "StateDirectory")),
        "install -D vfio-migrate /usr/bin/vfio-migrate".to_owned(),
        "systemctl enable --now vfio-migrate.socket".to_owned(),
    ];
    named.iter().for_each(|named| assert!(section.contains(named.as_str()), "{named}"));
    assert_eq!(value(SERVICE, "DynamicUser"), "yes");
    // An operator reads the same command in the unit.
    let url = format!("destination_url=unix:{}", value(SOCKET, "ListenStream"));
    assert!(section.contains(&url) && SOCKET.contains(&url));
}

#[test]
fn systemd_finds_nothing_wrong_with_the_units() {
    if !has("systemd-analyze") {
        return;
    }
    let place = Place::new();
    // The tool need not be installed for that.
    fs::write(place.path("vfio-migrate.service"), SERVICE.replace("/usr/bin/vfio-migrate", TOOL)).unwrap();
    fs::write(place.path("vfio-migrate.socket"), SOCKET).unwrap();
    let verify = || {
        let mut command = Command::new("systemd-analyze");
        command.args(["verify", "--man=no", "vfio-migrate.service", "vfio-migrate.socket"]);
        let output = command.current_dir(place.root()).output().unwrap();
        String::from_utf8(output.stderr).unwrap()
    };
    let found = verify();
    let ours: Vec<_> = found.lines().filter(|line| line.contains("vfio-migrate")).collect();
    assert!(ours.is_empty(), "{found}");
    fs::write(place.path("vfio-migrate.socket"), SOCKET.replace("SocketMode", "SocketMood")).unwrap();
    let found = verify();
    assert!(found.contains("SocketMood"), "it looks: {found}");
}

#[test]
fn the_service_is_started_by_the_first_source() {
    if !has("systemd-socket-activate") {
        return;
    }
    let place = Place::new();
    let (socket, state) = (place.path("socket"), place.path("state"));
    fs::create_dir(&state).unwrap();
    let mut command = Command::new("systemd-socket-activate");
    command.arg("--listen").arg(&socket).arg(TOOL).args(arguments(state.to_str().unwrap()));
    let tool = Tool::spawn(&mut command);
    wait_for(&socket);
    for _ in 0..2 {
        let memory = guest();
        let mut source = loop {
            // It is refused while the last VM is being completed.
            if let Some(source) = Source::try_start(&socket) {
                break source;
            }
        };
        assert_eq!(source.pass(0, &[memory.as_fd()]), Some(OK));
        assert_eq!(source.ask(&config(NO_DISKS, &[(0, 0, RAM, 0)])), Some(OK));
        // So the VM runs on.
        assert_eq!(source.finish(), Some(ERROR));
    }
    tool.signal("-TERM");
    let ended = tool.end().succeeded();
    let kept = state.read_dir().unwrap().map(|entry| assert_sound(&entry.unwrap().path())).count();
    assert_eq!(kept, 2, "{ended:?}");
}
