// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The tool as a process.

use std::ffi::OsStr;
use std::io::{BufRead, BufReader, Read};
use std::path::Path;
use std::process::{Child, ChildStdout, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::Value;

/// The longest any command of a test may take.
const PATIENCE: Duration = Duration::from_secs(120);

/// A command under way, talking JSON.
pub(crate) struct Tool {
    child: Child,
    stdout: BufReader<ChildStdout>,
    stderr: thread::JoinHandle<String>,
}

/// A command that has ended.
#[derive(Debug)]
pub(crate) struct Ended {
    pub(crate) code: Option<i32>,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

impl Ended {
    /// The objects it printed.
    pub(crate) fn events(&self) -> Vec<Value> {
        self.stdout.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    }

    /// The last object it printed.
    pub(crate) fn last(&self) -> Value {
        self.events().pop().unwrap()
    }

    /// Checks that it succeeded.
    #[track_caller]
    pub(crate) fn succeeded(self) -> Self {
        assert_eq!(self.code, Some(0), "{self:?}");
        self
    }

    /// Checks that it ended with `code` and named `what`.
    #[track_caller]
    pub(crate) fn failed(self, code: i32, what: &str) -> Self {
        assert_eq!(self.code, Some(code), "{self:?}");
        assert!(self.stderr.contains(what), "{what:?} is not named: {self:?}");
        self
    }
}

impl Tool {
    pub(crate) fn start<S: AsRef<OsStr>>(arguments: impl IntoIterator<Item = S>) -> Self {
        Self::spawn(Command::new(env!("CARGO_BIN_EXE_vfio-migrate")).args(arguments))
    }

    pub(crate) fn spawn(command: &mut Command) -> Self {
        Self::spawn_with_stdin(command.stdin(Stdio::null()))
    }

    /// As [`Tool::spawn`], with the command's own standard input.
    pub(crate) fn spawn_with_stdin(command: &mut Command) -> Self {
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let stdout = BufReader::new(child.stdout.take().unwrap());
        let mut stderr = child.stderr.take().unwrap();
        let stderr = thread::spawn(move || {
            let mut text = String::new();
            stderr.read_to_string(&mut text).unwrap();
            text
        });
        Self { child, stdout, stderr }
    }

    /// Starts `receive URL --into INTO --json` with more `options`, and waits until a source may come; returns where to.
    pub(crate) fn receive(url: &str, into: &Path, options: &[&str]) -> (Self, String) {
        Self::receive_by(&mut Command::new(env!("CARGO_BIN_EXE_vfio-migrate")), url, into, options)
    }

    /// As [`Tool::receive`], with `tool` as what starts the tool.
    pub(crate) fn receive_by(tool: &mut Command, url: &str, into: &Path, options: &[&str]) -> (Self, String) {
        let into = into.to_str().unwrap();
        Self::listening(tool.args(["receive", url, "--into", into, "--json"]).args(options))
    }

    /// Starts a receiver that talks JSON, and waits until a source may come; returns where to.
    pub(crate) fn listening(tool: &mut Command) -> (Self, String) {
        let mut tool = Self::spawn(tool);
        let mut line = String::new();
        tool.stdout.read_line(&mut line).unwrap();
        if line.is_empty() {
            panic!("no source may come: {:?}", tool.end());
        }
        let event: Value = serde_json::from_str(&line).unwrap();
        assert_eq!(event["event"], "listening");
        let url = event["url"].as_str().unwrap().to_owned();
        (tool, url)
    }

    /// Starts `send URL --from FROM --json` with more `options`.
    pub(crate) fn send(url: &str, from: &Path, options: &[&str]) -> Self {
        Self::start([&["send", url, "--from", from.to_str().unwrap(), "--json"], options].concat())
    }

    /// Waits until it tells of `name`.
    pub(crate) fn await_event(&mut self, name: &str) {
        let mut lines = self.stdout.by_ref().lines().map(Result::unwrap);
        let is_named = |line: String| serde_json::from_str::<Value>(&line).unwrap()["event"] == name;
        assert!(lines.any(is_named), "it never told of {name}");
    }

    pub(crate) fn signal(&self, signal: &str) {
        let killed = Command::new("kill").args([signal, &self.child.id().to_string()]).status();
        assert!(killed.unwrap().success());
    }

    pub(crate) fn kill(&mut self) {
        self.child.kill().unwrap();
    }

    pub(crate) fn has_ended(&mut self) -> bool {
        self.child.try_wait().unwrap().is_some()
    }

    /// Waits until it has ended, or for `within`.
    pub(crate) fn ends_within(&mut self, within: Duration) -> bool {
        let begun = Instant::now();
        while begun.elapsed() < within {
            if self.has_ended() {
                return true;
            }
            thread::sleep(Duration::from_millis(5));
        }
        false
    }

    /// Waits for the end; a command that takes too long is killed, and the test fails.
    pub(crate) fn end(mut self) -> Ended {
        let in_time = self.ends_within(PATIENCE);
        if !in_time {
            self.kill();
        }
        let code = self.child.wait().unwrap().code();
        let mut stdout = String::new();
        self.stdout.read_to_string(&mut stdout).unwrap();
        let stderr = self.stderr.join().unwrap();
        let ended = Ended { code, stdout, stderr };
        assert!(in_time, "still runs after {PATIENCE:?}: {ended:?}");
        ended
    }
}

/// Runs a command to its end.
pub(crate) fn run<S: AsRef<OsStr>>(arguments: impl IntoIterator<Item = S>) -> Ended {
    Tool::start(arguments).end()
}

/// Whether `dir` has nothing in it, not even what a writer leaves under another name.
pub(crate) fn is_empty(dir: &Path) -> bool {
    dir.read_dir().unwrap().next().is_none()
}
