// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A command in a process group that can be ended, and that ends with this process.
//!
//! ```text
//!  vfio-migrate ──lifeline (pipe)──► guard: leads a process group, sends it the signals it reads;
//!       │                              │  at the end of the pipe TERM, and KILL after a grace
//!       └──────── starts ───────────► command: a member of the group
//! ```
//!
//! The pipe ends when this process does, even where it is killed. What makes a session or a group of its own is out of the
//! guard's reach, and so is, unless this process may do anything, what runs as another user.

use std::ffi::{OsStr, OsString};
use std::fs;
use std::io::{self, PipeReader, PipeWriter, Write};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use rustix::io::ioctl_fionbio;

/// How often a running command is looked at.
pub(crate) const TICK: Duration = Duration::from_millis(5);

/// How long the group may clean up when it is to end; the guard's `sleep` is as long.
const GRACE: Duration = Duration::from_secs(2);

/// How long what was killed may take to be gone: something that waits for a device may take for ever.
const GOING: Duration = Duration::from_secs(1);

const SHELL: &str = "/bin/sh";

/// What the guard does: it passes signals on, and ends the group where this process cannot any more.
///
/// It is the group's leader, and is not reaped before the last signal: so nobody else can have the group's number meanwhile.
const GUARD: &str = "trap '' HUP INT TERM; while read -r signal; do kill -s \"$signal\" 0; done; \
    kill -s TERM 0; sleep 2; kill -s KILL 0";

/// A command under way. Dropped, it is ended by the guard.
#[derive(Debug)]
pub(crate) struct GuardedCommand {
    guard: Child,
    command: Child,
}

impl GuardedCommand {
    /// Starts the guard, and then, in its group, a shell with `command` and one more variable.
    ///
    /// What the command prints comes out of the pipe that is returned, whose reads do not wait: the command, and the VM that
    /// waits for it, do not depend on who reads this process's standard error.
    pub(crate) fn start(command: &OsStr, variable: (&str, OsString)) -> io::Result<(Self, PipeReader)> {
        let (printed, prints) = io::pipe()?;
        ioctl_fionbio(&printed, true)?;
        let mut guard = Command::new(SHELL)
            .args(["-c", GUARD])
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .process_group(0)
            .spawn()?;
        match start_in_group(command, variable, prints, &guard) {
            Ok(command) => Ok((Self { guard, command }, printed)),
            Err(error) => {
                dismiss(&mut guard)?;
                Err(error)
            }
        }
    }

    /// Returns how the command ended, if it did.
    pub(crate) fn poll(&mut self) -> io::Result<Option<ExitStatus>> {
        self.command.try_wait()
    }

    /// Lets what a command that has ended left running in the background run on.
    pub(crate) fn leave(mut self) -> io::Result<()> {
        dismiss(&mut self.guard)
    }

    /// Ends the command and what it started: asks, and kills what is left of it after a grace.
    ///
    /// Returns as soon as all of it is gone, and anyway when grace and patience are over, with the processes that are still
    /// there. Those are left to whoever inherits them.
    pub(crate) fn end(mut self) -> Vec<u32> {
        self.signal("TERM");
        self.gone_within(GRACE);
        self.signal("KILL");
        // It may have left the group, and somebody may have ended the guard. What cannot be killed is found below.
        let _ = self.command.kill();
        self.gone_within(GOING)
    }

    fn signal(&mut self, name: &str) {
        if let Some(lifeline) = &mut self.guard.stdin {
            // A guard that is gone passes nothing on.
            let _ = writeln!(lifeline, "{name}");
        }
    }

    /// Waits until nothing is left, or for `patience`; returns what is left.
    fn gone_within(&mut self, patience: Duration) -> Vec<u32> {
        let begun = Instant::now();
        loop {
            let left = self.living();
            if left.is_empty() || begun.elapsed() >= patience {
                return left;
            }
            thread::sleep(TICK);
        }
    }

    /// The processes of the group, without the guard, and the command wherever it is.
    fn living(&mut self) -> Vec<u32> {
        let (leader, command) = (self.guard.id(), self.command.id());
        let mut living: Vec<u32> = members(leader).filter(|pid| ![leader, command].contains(pid)).collect();
        if matches!(self.command.try_wait(), Ok(None)) {
            living.push(command);
        }
        living
    }
}

fn start_in_group(
    command: &OsStr,
    variable: (&str, OsString),
    prints: PipeWriter,
    guard: &Child,
) -> io::Result<Child> {
    let group = i32::try_from(guard.id()).expect("process numbers are positive ints");
    Command::new(SHELL)
        .arg("-c")
        .arg(command)
        .env(variable.0, variable.1)
        .stdin(Stdio::null())
        .stdout(prints.try_clone()?)
        .stderr(prints)
        .process_group(group)
        .spawn()
}

/// Ends a guard that has nobody to watch.
fn dismiss(guard: &mut Child) -> io::Result<()> {
    guard.kill()?;
    guard.wait().map(drop)
}

/// The living processes of a group, as far as /proc tells.
fn members(group: u32) -> impl Iterator<Item = u32> {
    let processes = fs::read_dir("/proc").into_iter().flatten().flatten();
    processes.filter_map(move |entry| {
        let pid = entry.file_name().to_str()?.parse().ok()?;
        // A name may be any bytes.
        let stat = fs::read(entry.path().join("stat")).ok()?;
        is_living_member(&String::from_utf8_lossy(&stat), group).then_some(pid)
    })
}

/// Whether the process of which this is `/proc/PID/stat` is in `group` and no mere entry in its parent's books.
fn is_living_member(stat: &str, group: u32) -> bool {
    // pid (name) state ppid pgrp ...
    let Some((_, behind_name)) = stat.rsplit_once(')') else { return false };
    let mut fields = behind_name.split_ascii_whitespace();
    let (state, pgrp) = (fields.next(), fields.nth(1));
    !matches!(state, None | Some("Z" | "X")) && pgrp.and_then(|pgrp| pgrp.parse().ok()) == Some(group)
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOBODY: [u32; 0] = [];

    fn start(command: &str) -> GuardedCommand {
        GuardedCommand::start(OsStr::new(command), ("VARIABLE", OsString::new())).unwrap().0
    }

    fn exists(pid: u32) -> bool {
        fs::read_to_string(format!("/proc/{pid}/stat")).is_ok_and(|stat| !stat.contains(") Z "))
    }

    /// Waits until `command` has started `count` processes, itself among them.
    fn await_members(command: &GuardedCommand, count: usize) {
        while members(command.guard.id()).count() < count + 1 {
            thread::sleep(TICK);
        }
    }

    #[test]
    fn what_ends_when_asked_to_is_not_waited_for_any_longer() {
        let command = start("sleep 60 & wait");
        await_members(&command, 2);
        let begun = Instant::now();
        assert_eq!(command.end(), NOBODY);
        assert!(begun.elapsed() < GRACE, "{:?}", begun.elapsed());
    }

    #[test]
    fn what_a_command_that_is_over_left_behind_is_ended_too() {
        let mut command = start("(trap '' TERM; sleep 60; sleep 60) & exit 3");
        while command.poll().unwrap().is_none() {
            thread::sleep(TICK);
        }
        await_members(&command, 2);
        let left = command.living();
        let begun = Instant::now();
        assert_eq!(command.end(), NOBODY);
        assert!((GRACE..GRACE + GOING).contains(&begun.elapsed()), "{:?}", begun.elapsed());
        assert!(!left.is_empty() && !left.into_iter().any(exists));
    }

    #[test]
    fn a_command_that_leaves_the_group_is_killed_itself() {
        let command = start("exec setsid sh -c \"trap '' TERM; sleep 60; sleep 60\"");
        while members(command.command.id()).count() == 0 {
            thread::sleep(TICK);
        }
        let pid = command.command.id();
        assert_eq!(command.end(), NOBODY);
        assert!(!exists(pid));
    }

    #[test]
    fn a_process_named_with_brackets_and_blanks_is_found() {
        assert!(is_living_member("7 (sh) S 1 5 5 0 -1", 5));
        assert!(is_living_member("7 (a) Z 1 6 () R 1 5 5", 5));
        assert!(!is_living_member("7 (sh) S 1 6 5 0 -1", 5));
        assert!(!is_living_member("7 (sh) Z 1 5 5 0 -1", 5));
        assert!(!is_living_member("", 5));
    }
}
