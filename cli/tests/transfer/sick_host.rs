// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The tool on a host that is sick: output that nobody takes, limits that are reached, names that are odd.

use std::ffi::{OsStr, OsString};
use std::fs::{self, File};
use std::io::{self, PipeReader, Write};
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use rustix::io::ioctl_fionbio;
use rustix::pipe::fcntl_setpipe_size;
use vfio_migration_integration::skip;

use crate::local_send::begin_by;
use crate::stored::{Place, assert_same, assert_sound};
use crate::tool::{Tool, is_empty, run};

const TOOL: &str = env!("CARGO_BIN_EXE_vfio-migrate");

/// The longest a command may wait at its end for who reads its output, with room to spare.
const PATIENCE: Duration = Duration::from_secs(60);

/// Where output goes that nobody takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Sink {
    /// A pipe that is full, and that nobody reads.
    Stuck,
    /// A pipe that nobody can read any more.
    Broken,
    /// A disk that is full.
    Full,
}

const SINKS: [Sink; 3] = [Sink::Stuck, Sink::Broken, Sink::Full];

impl Sink {
    /// Opens it, and what has to stay open with it.
    fn open(self) -> (Stdio, Option<PipeReader>) {
        match self {
            Self::Full => (File::options().write(true).open("/dev/full").unwrap().into(), None),
            Self::Broken => (io::pipe().unwrap().1.into(), None),
            Self::Stuck => {
                let (reader, mut writer) = io::pipe().unwrap();
                ioctl_fionbio(&writer, true).unwrap();
                for piece in [4096, 1] {
                    while writer.write(&vec![b'-'; piece]).is_ok() {}
                }
                ioctl_fionbio(&writer, false).unwrap();
                (writer.into(), Some(reader))
            }
        }
    }
}

/// A command whose output nobody takes.
struct Unheard {
    child: Child,
    _pipes: [Option<PipeReader>; 2],
}

impl Unheard {
    fn start<S: AsRef<OsStr>>(sink: Sink, arguments: impl IntoIterator<Item = S>) -> Self {
        let ((stdout, out), (stderr, error)) = (sink.open(), sink.open());
        let mut command = Command::new(TOOL);
        command.args(arguments).stdin(Stdio::null()).stdout(stdout).stderr(stderr);
        Self { child: command.spawn().unwrap(), _pipes: [out, error] }
    }

    #[track_caller]
    fn ends_with(mut self, code: i32) {
        let status = wait(&mut self.child);
        assert_eq!(status.code(), Some(code), "{status}");
    }
}

/// Waits for the end, but not for ever.
#[track_caller]
fn wait(child: &mut Child) -> ExitStatus {
    let begun = Instant::now();
    while begun.elapsed() < PATIENCE {
        if let Some(status) = child.try_wait().unwrap() {
            return status;
        }
        thread::sleep(Duration::from_millis(20));
    }
    child.kill().unwrap();
    child.wait().unwrap();
    panic!("still runs after {PATIENCE:?}");
}

fn text(path: &Path) -> String {
    path.to_str().unwrap().to_owned()
}

#[test]
fn output_that_nobody_takes_changes_no_exit_status() {
    thread::scope(|scope| {
        for sink in SINKS {
            scope.spawn(move || say_unheard(sink));
        }
    });
}

/// Runs commands of every kind, all at a time: a pipe that nobody reads is waited for a while.
fn say_unheard(sink: Sink) {
    let place = Place::new();
    let [one, two] = [1, 2].map(|seed| text(&place.stored(&format!("stored-{seed}"), seed)));
    let altered = place.stored("altered", 3);
    fs::write(altered.join("config.json"), "{}").unwrap();
    let [made, difference, whole] = ["made", "difference", "whole"].map(|name| text(&place.path(name)));
    run(["snapshot", "create", "--from", &two, "--base", &one, "--into", &made]).succeeded();
    // What is to print and cannot has not done its work; where the reader has enough, it has.
    let unprinted = if sink == Sink::Broken { 0 } else { 4 };
    let commands: [(&[&str], i32); 14] = [
        (&["--help"], 0),
        (&["receive"], 2),
        (&["probe"], 0),
        (&["probe", "--json"], 0),
        (&["completions", "bash"], unprinted),
        (&["man"], unprinted),
        (&["snapshot", "info", &one], 0),
        (&["snapshot", "verify", &one, "--json"], 0),
        (&["snapshot", "verify", &text(&altered)], 5),
        (&["snapshot", "seal", &one], 0),
        (&["snapshot", "diff", &one, &two], 1),
        (&["snapshot", "info", "/nonexistent"], 4),
        (&["snapshot", "create", "--from", &two, "--base", &one, "--into", &difference], 0),
        (&["snapshot", "apply", &one, &made, "--into", &whole], 0),
    ];
    let begun = commands.map(|(arguments, code)| (Unheard::start(sink, arguments), code));
    begun.into_iter().for_each(|(command, code)| command.ends_with(code));
    assert_sound(whole.as_ref());
}

#[test]
fn a_vm_moves_where_nobody_takes_the_output_of_either_side() {
    thread::scope(|scope| {
        for (sink, options) in SINKS.into_iter().flat_map(|sink| [(sink, &["--json"][..]), (sink, &[])]) {
            scope.spawn(move || move_unheard(sink, options));
        }
    });
}

/// Moves a VM while the log, the events and a chatty command find no reader.
fn move_unheard(sink: Sink, options: &[&str]) {
    let place = Place::new();
    let (from, into, socket) = (place.stored("from", 1), place.path("into"), place.path("socket"));
    let url = format!("unix:{}", socket.display());
    let chatty = "yes 'of what nobody reads' | head -c 1000000; echo error >&2";
    let receive = ["receive", &url, "--into", &text(&into), "--on-paused", chatty, "--log-level", "trace"];
    let receiver = Unheard::start(sink, receive.iter().chain(options));
    await_path(&socket);
    let send = ["send", &url, "--from", &text(&from), "--log-level", "trace"];
    Unheard::start(sink, send.iter().chain(options)).ends_with(0);
    receiver.ends_with(0);
    assert_same(&from, &into);
}

fn await_path(path: &Path) {
    let begun = Instant::now();
    while !path.exists() {
        assert!(begun.elapsed() < PATIENCE, "{} does not appear", path.display());
        thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn streams_that_are_closed_change_no_exit_status() {
    let place = Place::new();
    let stored = place.stored("stored", 1);
    for (arguments, code) in [("snapshot verify \"$1\"", 0), ("snapshot info /nonexistent", 4), ("probe", 0)]
    {
        let script = format!("exec \"$0\" {arguments} <&- >&- 2>&-");
        let status = Command::new("/bin/sh").args(["-c", &script, TOOL]).arg(&stored).status().unwrap();
        assert_eq!(status.code(), Some(code), "{arguments}");
    }
}

#[test]
fn a_slow_reader_gets_everything() {
    let (reader, writer) = io::pipe().unwrap();
    fcntl_setpipe_size(&writer, 4096).unwrap();
    let mut command = Command::new(TOOL);
    let mut child = command.args(["completions", "bash"]).stdout(writer).spawn().unwrap();
    drop(command);
    // Longer than a reader that takes nothing is waited for.
    let mut read = Vec::new();
    io::copy(&mut io::Read::take(&reader, 1000), &mut read).unwrap();
    thread::sleep(Duration::from_secs(12));
    io::copy(&mut &reader, &mut read).unwrap();
    assert!(wait(&mut child).success());
    assert_eq!(String::from_utf8(read).unwrap(), run(["completions", "bash"]).succeeded().stdout);
}

/// Runs the tool where no file may have more than `kib` KiB, and SIGXFSZ is as it is by default.
fn with_small_files(kib: u32, arguments: &[&str]) -> Command {
    let mut command = Command::new("/bin/sh");
    let script = format!("ulimit -f {} && exec \"$0\" \"$@\"", kib * 2);
    command.args(["-c", &script, TOOL]).args(arguments);
    command
}

#[test]
fn a_file_that_may_not_grow_is_named_and_ends_nothing_by_signal() {
    let (place, out) = (Place::new(), Place::new());
    let [one, two] = [1, 2].map(|seed| text(&place.stored(&format!("stored-{seed}"), seed)));
    let into = text(&out.path("into"));
    for arguments in [
        ["snapshot", "apply", &one, "--into", &into, "--json"].as_slice(),
        &["snapshot", "create", "--from", &two, "--base", &one, "--into", &into],
    ] {
        let ended = Tool::spawn(&mut with_small_files(1024, arguments)).end();
        let ended = ended.failed(4, "File too large (os error 27)");
        assert!(ended.stderr.contains(&into), "{ended:?}");
        assert!(is_empty(out.root()), "{arguments:?}");
    }
    // What the tool prints is a file, too.
    let printed = File::create(place.path("printed")).unwrap();
    let mut command = with_small_files(0, &["snapshot", "verify", &one]);
    assert!(command.stdout(printed).status().unwrap().success());
}

#[test]
fn memory_of_a_vm_that_may_not_grow_is_named_and_the_vmm_gets_no_vm() {
    let place = Place::new();
    let from = place.stored("from", 1);
    for options in [&[][..], &["--on-demand"]] {
        // Half of the VM's 64 MiB.
        let (vmm, tool) = begin_by(&mut with_small_files(32 << 10, &[]), &place, &[&from], options);
        tool.end().failed(4, "Cannot make memory for slot 0: File too large (os error 27)");
        vmm.listener.set_nonblocking(true).unwrap();
        assert!(vmm.listener.accept().is_err(), "it is known before the VMM hears of it");
    }
}

#[test]
fn a_command_that_is_run_gets_sigxfsz_as_ever() {
    let place = Place::new();
    let (from, into, grown) = (place.stored("from", 1), place.path("into"), place.path("grown"));
    let grow = format!("ulimit -f 2 && exec head -c 1000000 /dev/zero > '{}'", grown.display());
    let (receiver, url) = Tool::receive("tcp:127.0.0.1:0", &into, &["--on-paused", &grow]);
    Tool::send(&url, &from, &[]).end().failed(3, "Receiver refused");
    receiver.end().failed(4, "signal: 25 (SIGXFSZ)");
}

#[test]
fn a_name_that_no_json_can_hold_is_refused_before_the_work() {
    let place = Place::new();
    let (one, two) = (place.stored("stored-1", 1), place.stored("stored-2", 2));
    let odd = place.root().join(OsString::from_vec(b"od\xffd".to_vec()));
    let words = |words: &[&str]| words.iter().map(OsString::from).collect::<Vec<_>>();
    let commands = [
        [words(&["receive", "tcp:127.0.0.1:0", "--into"]), vec![odd.clone().into()]].concat(),
        [words(&["snapshot", "apply"]), vec![one.clone().into(), "--into".into(), odd.clone().into()]]
            .concat(),
        [
            words(&["snapshot", "create", "--from"]),
            vec![two.into(), "--base".into(), one.clone().into()],
            vec!["--into".into(), odd.clone().into()],
        ]
        .concat(),
    ];
    for command in commands {
        run(command.into_iter().chain(["--json".into()])).failed(2, "in JSON: it is not UTF-8");
        assert!(!odd.exists());
    }
    // For a person there is no such limit.
    run([OsStr::new("snapshot"), "apply".as_ref(), one.as_ref(), "--into".as_ref(), odd.as_ref()])
        .succeeded();
    assert_sound(&odd);
    let config = odd.join("config.json");
    fs::write(&config, fs::read_to_string(&config).unwrap() + "\n").unwrap();
    let manifest = fs::read(odd.join("snapshot-manifest")).unwrap();
    let reseal = [OsStr::new("snapshot"), "seal".as_ref(), odd.as_ref(), "--edited-config".as_ref()];
    run(reseal.into_iter().chain([OsStr::new("--json")])).failed(2, "in JSON: it is not UTF-8");
    assert_eq!(fs::read(odd.join("snapshot-manifest")).unwrap(), manifest);
    run(reseal).succeeded();
    let seal = [OsStr::new("snapshot"), "seal".as_ref(), odd.as_ref()];
    run(seal.into_iter().chain([OsStr::new("--json")])).failed(2, "in JSON: it is not UTF-8");
    run(seal).succeeded();
}

#[test]
fn a_mount_point_is_refused_before_a_source_may_come() {
    let place = Place::new();
    let script = r#"mount -t tmpfs none "$1" || exit 99
        "$0" receive tcp:127.0.0.1:0 --into "$1""#;
    let mut command = Command::new("unshare");
    command.args(["-rm", "/bin/sh", "-c", script, TOOL]).arg(place.root());
    let ended = Tool::spawn(&mut command).end();
    if ended.code == Some(99) || ended.stderr.contains("unshare") {
        return skip("cannot mount a small file system with unshare");
    }
    ended.failed(2, "is a mount point, which no finished directory can take the place of");
}

#[test]
fn a_name_that_leaves_no_room_beside_it_is_none_the_worse() {
    let place = Place::new();
    let (one, long) = (place.stored("stored", 1), place.path(&"n".repeat(255)));
    run(["snapshot", "apply", &text(&one), "--into", &text(&long)]).succeeded();
    assert_same(&one, &long);
    let longer = place.path(&"n".repeat(256));
    let refused = run(["receive", "tcp:127.0.0.1:0", "--into", &text(&longer)]);
    let ended = refused.failed(4, "File name too long");
    assert!(!ended.stderr.contains("Waiting for a source"), "{ended:?}");
}

/// A control group that holds at most so many threads; removed when it is dropped.
struct ThreadLimit(PathBuf);

impl ThreadLimit {
    /// Makes one; says so where this host has none to give.
    fn new(threads: usize) -> Option<Self> {
        static NEXT: std::sync::atomic::AtomicU32 = std::sync::atomic::AtomicU32::new(0);
        let number = NEXT.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        let name = format!("vfio-migrate-{}-{number}", std::process::id());
        let made = ["/sys/fs/cgroup/pids", "/sys/fs/cgroup"].into_iter().find_map(|root| {
            let group = Path::new(root).join(&name);
            fs::create_dir(&group).ok()?;
            let group = Self(group);
            fs::write(group.0.join("pids.max"), threads.to_string()).ok()?;
            Some(group)
        });
        if made.is_none() {
            skip("cannot limit threads: no control group with pids.max can be made");
        }
        made
    }

    /// Runs the tool in it.
    fn run(&self, arguments: &[&str]) -> Tool {
        let script = r#"echo $$ > "$0/cgroup.procs" && exec "$@""#;
        let mut command = Command::new("/bin/sh");
        Tool::spawn(command.args(["-c", script]).arg(&self.0).arg(TOOL).args(arguments))
    }
}

impl Drop for ThreadLimit {
    fn drop(&mut self) {
        // Its last process may not be gone yet.
        for _ in 0..100 {
            if fs::remove_dir(&self.0).is_ok() {
                return;
            }
            thread::sleep(Duration::from_millis(10));
        }
    }
}

#[test]
fn threads_that_cannot_be_had_are_named_and_a_receiver_that_can_never_serve_ends_at_once() {
    let place = Place::new();
    let mut waited = 0;
    for threads in 1..=7 {
        let Some(limit) = ThreadLimit::new(threads) else { return };
        let into = place.path("into");
        let mut tool = limit.run(&["receive", "tcp:127.0.0.1:0", "--into", &text(&into)]);
        if tool.ends_within(Duration::from_secs(3)) {
            tool.end().failed(4, "Cannot start ");
        } else {
            waited += 1;
            tool.kill();
            tool.end();
        }
    }
    assert!((1..=4).contains(&waited), "{waited} of 7 receivers could serve");
}

#[test]
fn a_receiver_short_of_threads_names_that_and_not_its_source() {
    let place = Place::new();
    let from = place.stored("from", 1);
    let mut served = 0;
    for threads in 5..=12 {
        let Some(limit) = ThreadLimit::new(threads) else { return };
        let (into, socket) = (place.path("into"), place.path("socket"));
        let url = format!("unix:{}", socket.display());
        let options = ["--idle-timeout", "2", "--log-level", "off"];
        let mut tool = limit.run(&[&["receive", &url, "--into", &text(&into)], &options[..]].concat());
        while !socket.exists() && !tool.has_ended() {
            thread::sleep(Duration::from_millis(5));
        }
        let sent = Tool::send(&url, &from, &[]).end();
        if !tool.ends_within(Duration::from_secs(3)) {
            // The source was rejected; another one may find a thread.
            tool.signal("-TERM");
            assert_ne!(sent.code, Some(0));
            tool.end();
            continue;
        }
        let ended = tool.end();
        assert_eq!(ended.code == Some(0), sent.code == Some(0), "{ended:?}, {sent:?}");
        if ended.code == Some(0) {
            served += 1;
            assert_same(&from, &into);
            fs::remove_dir_all(&into).unwrap();
        } else {
            ended.failed(4, "Resource temporarily unavailable");
        }
    }
    assert!(served > 0);
}

#[test]
fn a_demo_without_threads_ends_with_an_error_and_not_with_a_panic() {
    for threads in 1..=24 {
        let Some(limit) = ThreadLimit::new(threads) else { return };
        let demo = ["demo", "--no-kvm", "--memory", "16M", "--timeout-s", "10"];
        let ended = limit.run(&demo).end();
        assert!(!ended.stderr.contains("panicked"), "{threads} threads: {ended:?}");
        assert!(matches!(ended.code, Some(0 | 3 | 4)), "{threads} threads: {ended:?}");
    }
}

#[test]
fn descriptors_that_cannot_be_had_are_named_at_the_start() {
    let place = Place::new();
    let from = place.stored("from", 1);
    let mut served = 0;
    for limit in (4..=36).step_by(4) {
        let (into, socket) = (place.path("into"), place.path("socket"));
        let url = format!("unix:{}", socket.display());
        let script = format!("ulimit -n {limit} && exec \"$0\" receive \"$1\" --into \"$2\" --log-level off");
        let mut command = Command::new("/bin/sh");
        let mut tool = Tool::spawn(command.args(["-c", &script, TOOL, &url]).arg(&into));
        while !socket.exists() && !tool.has_ended() {
            thread::sleep(Duration::from_millis(5));
        }
        if tool.ends_within(Duration::from_millis(500)) {
            tool.end().failed(4, "(os error 24)");
            assert_eq!(served, 0, "fewer were enough before");
            continue;
        }
        Tool::send(&url, &from, &[]).end().succeeded();
        tool.end().succeeded();
        fs::remove_dir_all(&into).unwrap();
        served += 1;
    }
    assert!(served > 1, "{served}");
}
