// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A receiver that serves one VM after the other, as a service manager starts it.

use std::fs::{self, File};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::{UnixDatagram, UnixListener};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::frames::{ERROR, OK};
use crate::local::{Source, config, guest};
use crate::raw::RAM;
use crate::stored::{Place, assert_sound};
use crate::tool::{Tool, run};

const TOOL: &str = env!("CARGO_BIN_EXE_vfio-migrate");

/// A VM that has a name, and one whose name is no name of a file.
const NAMED: &str = r#"{"memory":{"size":1048576},"platform":{"uuid":"7e0a-web_1"}}"#;
const BADLY_NAMED: &str = r#"{"memory":{"size":1048576},"platform":{"uuid":"../../etc"}}"#;

/// A folder that is served into, and the socket to do it on.
struct Desk {
    place: Place,
}

impl Desk {
    fn new() -> Self {
        let place = Place::new();
        fs::create_dir(place.path("snapshots")).unwrap();
        Self { place }
    }

    fn socket(&self) -> PathBuf {
        self.place.path("socket")
    }

    fn folder(&self) -> PathBuf {
        self.place.path("snapshots")
    }

    fn serve(&self, options: &[&str]) -> Tool {
        let (url, folder) = (format!("unix:{}", self.socket().display()), self.folder());
        let mut tool = Command::new(TOOL);
        tool.args(["receive", &url, "--serve", folder.to_str().unwrap(), "--json"]).args(options);
        Tool::listening(&mut tool).0
    }

    /// The names in the folder, sorted.
    fn names(&self) -> Vec<String> {
        let entries = self.folder().read_dir().unwrap();
        let mut names: Vec<_> =
            entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    /// A source that has said Start, as often as it takes: one that comes before the receiver is done with the last one is refused.
    fn source(&self) -> Source {
        let begun = Instant::now();
        loop {
            if let Some(source) = Source::try_start(&self.socket()) {
                return source;
            }
            assert!(begun.elapsed() < Duration::from_secs(30), "refused again and again");
            thread::sleep(Duration::from_millis(20));
        }
    }

    /// Sends a VM of this configuration; returns the last answer.
    fn send(&self, vm_config: &str) -> Option<u16> {
        let (mut source, memory) = (self.source(), guest());
        assert_eq!(source.pass(0, &[memory.as_fd()]), Some(OK));
        match source.ask(&config(vm_config, &[(0, 0, RAM, 0)])) {
            Some(OK) => source.finish(),
            refused => refused,
        }
    }
}

/// Checks that `name` is a time, and the name of the VM behind it.
#[track_caller]
fn assert_named(name: &str, is_vm: impl Fn(&str) -> bool) {
    let (time, vm) = name.split_at_checked(17).unwrap();
    let is_time = time.bytes().enumerate().all(|(at, byte)| match at {
        8 => byte == b'T',
        15 => byte == b'Z',
        16 => byte == b'-',
        _ => byte.is_ascii_digit(),
    });
    assert!(is_time && is_vm(vm), "{name}");
}

#[test]
fn one_vm_after_the_other_has_a_directory_named_by_time_and_vm() {
    let desk = Desk::new();
    let tool = desk.serve(&[]);
    for vm in [NAMED, NAMED, BADLY_NAMED] {
        assert_eq!(desk.send(vm), Some(OK));
    }
    // A source that dies has no directory, and changes nothing for the next one.
    drop(desk.source());
    assert_eq!(desk.send(NAMED), Some(OK));
    tool.signal("-TERM");
    let ended = tool.end().succeeded();

    let names = desk.names();
    assert_eq!(names.len(), 4);
    let is_digest = |vm: &str| vm.len() == 10 && vm.starts_with("vm");
    let (of_digest, of_uuid): (Vec<_>, Vec<_>) = names.iter().partition(|name| is_digest(&name[17..]));
    assert_eq!(of_digest.len(), 1);
    of_uuid.iter().for_each(|name| assert_named(name, |vm| vm.starts_with("7e0a-web_1")));
    names.iter().for_each(|name| assert_sound(&desk.folder().join(name)));
    let told = |event: &str| ended.events().iter().filter(|told| told["event"] == event).count();
    assert_eq!([told("named"), told("kept"), told("failed")], [4, 4, 1]);
    let named: Vec<Value> = ended.events().into_iter().filter(|told| told["event"] == "named").collect();
    assert_eq!(named[0]["vm"], "7e0a-web_1");
    assert!(!desk.socket().exists());
}

#[test]
fn one_vm_is_all_if_no_more_are_wanted() {
    let desk = Desk::new();
    let tool = desk.serve(&["--once", "--checkpoint"]);
    assert_eq!(desk.send(NAMED), Some(ERROR));
    tool.end().succeeded();
    assert_eq!(desk.names().len(), 1);

    let tool = desk.serve(&["--once"]);
    drop(desk.source());
    tool.end().failed(3, "Source closed the connection");
    assert_eq!(desk.names().len(), 1);
}

#[test]
fn a_host_that_fails_again_and_again_ends_the_service() {
    let desk = Desk::new();
    let tool = desk.serve(&["--max-failures", "2"]);
    fs::remove_dir(desk.folder()).unwrap();
    assert_eq!(desk.send(NAMED), Some(ERROR));
    // A failure of the source does not count.
    drop(desk.source());
    assert_eq!(desk.send(NAMED), Some(ERROR));
    let ended = tool.end().failed(4, "snapshots");
    let failures = ended.events().iter().filter(|told| told["event"] == "failed").count();
    assert_eq!(failures, 3);
}

#[test]
fn the_hook_is_told_the_name() {
    let desk = Desk::new();
    let hook = format!("echo \"$VFIO_MIGRATE_INTO\" > '{}'", desk.place.path("told").display());
    let tool = desk.serve(&["--once", "--on-paused", &hook]);
    assert_eq!(desk.send(NAMED), Some(OK));
    tool.end().succeeded();
    let told = fs::read_to_string(desk.place.path("told")).unwrap();
    assert_eq!(Path::new(told.trim()), desk.folder().join(&desk.names()[0]));
}

/// Starts the tool as a service manager does, with `socket` as the one that it passes.
fn passed(socket: impl Into<OwnedFd>) -> Command {
    let mut command = Command::new("sh");
    let script = r#"exec 3<&0 </dev/null; LISTEN_PID=$$ LISTEN_FDS=1 exec "$0" "$@""#;
    command.args(["-c", script, TOOL]).stdin(Stdio::from(socket.into()));
    command
}

#[test]
fn a_service_manager_passes_the_socket_and_is_told_when_sources_may_come() {
    let desk = Desk::new();
    let listener = UnixListener::bind(desk.socket()).unwrap();
    let manager = UnixDatagram::bind(desk.place.path("notify")).unwrap();
    manager.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
    let told = || {
        let mut text = [0; 1000];
        let length = manager.recv(&mut text).unwrap();
        String::from_utf8(text[..length].to_vec()).unwrap()
    };
    for _start in 0..2 {
        let folder = desk.folder();
        let mut command = passed(listener.try_clone().unwrap());
        command.args(["receive", "--serve", folder.to_str().unwrap(), "--once", "--json"]);
        command.env("NOTIFY_SOCKET", desk.place.path("notify"));
        // The source may come first: it waits in the manager's socket.
        let tool = Tool::spawn_with_stdin(&mut command);
        assert_eq!(desk.send(NAMED), Some(OK));
        let ended = tool.end().succeeded();
        assert_eq!(ended.events()[0]["url"], format!("unix:{}", desk.socket().display()));
        assert!(told().starts_with(&format!("READY=1\nSTATUS=Waiting on unix:{}", desk.socket().display())));
        assert!(told().starts_with("STATUS=Receiving into "));
        assert!(told().starts_with("STOPPING=1"));
    }
    assert_eq!(desk.names().len(), 2);
    // The socket is the manager's.
    assert!(fs::metadata(desk.socket()).unwrap().file_type().is_socket());
}

#[test]
fn what_is_passed_and_is_no_socket_that_listens_is_refused() {
    let place = Place::new();
    let into = place.path("into");
    let receive = ["receive", "--into", into.to_str().unwrap()];
    run(receive).failed(2, "no service manager passed a socket");
    let (near, _far) = std::os::unix::net::UnixStream::pair().unwrap();
    let file = File::open("/proc/version").unwrap();
    for other in [OwnedFd::from(near), file.into()] {
        let tool = Tool::spawn_with_stdin(passed(other).args(receive));
        tool.end().failed(2, "Cannot listen on the socket that the service manager passed");
    }
    let place = Desk::new();
    let folder = place.folder().join("none");
    run(["receive", "tcp:127.0.0.1:0", "--serve", folder.to_str().unwrap()]).failed(2, "it is no directory");
    run(["receive", "tcp:127.0.0.1:0"]).failed(2, "--into");
}
