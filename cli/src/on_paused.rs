// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Runs the operator's command while the source's VM is paused, and never for longer than it may.
//!
//! ```text
//!  vfio-migrate ──lifeline (pipe)──► guard: leads a process group, waits for the end of the pipe
//!       │                              │  TERM, and KILL after a grace, to all of the group
//!       └──────── starts ───────────► command: a member of the group
//! ```
//!
//! The pipe ends when the command has to, and also when this process is killed: so nothing outlives it unbounded.

use std::ffi::{OsStr, OsString};
use std::io;
use std::os::fd::AsFd;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::Sender;
use std::thread;
use std::time::{Duration, Instant};

use thiserror::Error;
use vfio_migration::snapshot::OnPaused;
use vfio_migration::transfer::receive::ReceiverHandle;

use crate::event::Event;
use crate::output::Output;

/// Names the directory to be in the command's environment. The directory is not there yet.
pub(crate) const DIR_VARIABLE: &str = "VFIO_MIGRATE_INTO";

/// How often a running command is looked at.
const TICK: Duration = Duration::from_millis(5);

const SHELL: &str = "/bin/sh";

/// What the guard does: once its standard input ends, it asks the group to end, and kills what is left of it 2 s later.
///
/// It is the group's leader, and waited for last: so nobody else can have the group's number meanwhile.
const GUARD: &str = "trap '' HUP INT TERM; read -r line; kill -TERM 0; sleep 2; kill -KILL 0";

/// Why the command did not do what it was to do.
#[derive(Debug, Error)]
#[non_exhaustive]
pub(crate) enum CommandError {
    /// It could not be started or waited for.
    #[error("Cannot run {command:?}")]
    Run {
        /// The command.
        command: OsString,
        /// Why.
        source: io::Error,
    },
    /// It said that it failed.
    #[error("{command:?} ended with {status}")]
    Failed {
        /// The command.
        command: OsString,
        /// How it ended.
        status: ExitStatus,
    },
    /// It was ended because it took too long.
    #[error("{command:?} was ended: it took longer than the {} s of --on-paused-timeout", .limit.as_secs())]
    TimedOut {
        /// The command.
        command: OsString,
        /// How long it may take.
        limit: Duration,
    },
    /// It was ended because nobody waits for it.
    #[error("{command:?} was ended: the source closed the connection meanwhile")]
    SourceGone {
        /// The command.
        command: OsString,
    },
    /// It was ended on request.
    #[error("{command:?} was ended: the migration was given up here")]
    GivenUp {
        /// The command.
        command: OsString,
    },
}

/// The operator's command, and what it is held to.
#[derive(Debug)]
pub(crate) struct PausedCommand {
    /// What a shell runs.
    pub(crate) command: OsString,
    /// The directory to be.
    pub(crate) into: PathBuf,
    /// How long it may take.
    pub(crate) limit: Duration,
    /// Tells whether anybody waits for it.
    pub(crate) receiver: ReceiverHandle,
    /// Who tells that the VM is paused, and for how long: not the thread that the VM waits for, which may not wait for
    /// whoever reads it.
    pub(crate) notes: Sender<Note>,
}

/// Something to tell of the command.
#[derive(Debug)]
pub(crate) enum Note {
    /// It begins.
    Started {
        /// The command.
        command: OsString,
        /// How long it may take.
        limit: Duration,
    },
    /// It is over.
    Ended {
        /// The command.
        command: OsString,
        /// Whether it did what it was to do.
        succeeded: bool,
        /// How long it took.
        ran: Duration,
    },
}

impl Note {
    /// Tells it.
    pub(crate) fn tell(&self, output: &Output) {
        match self {
            Self::Started { command, limit } => {
                let (command, timeout_s) = (command.to_string_lossy(), limit.as_secs());
                output.tell(&Event::CommandStarted { command: &command, timeout_s }, || {
                    format!(
                        "Running {command:?} for at most {timeout_s} s; the source's VM is paused meanwhile"
                    )
                });
            }
            &Self::Ended { ref command, succeeded, ran } => {
                let (command, ran_ms) = (command.to_string_lossy(), ran.as_millis());
                output.tell(&Event::CommandEnded { command: &command, succeeded, ran_ms }, || {
                    let how = if succeeded { "succeeded" } else { "failed" };
                    format!("{command:?} {how} after {:.1} s", ran.as_secs_f64())
                });
            }
        }
    }
}

impl PausedCommand {
    /// Makes what a destination does while the VM is paused: run the command, and wait for its success.
    pub(crate) fn hook(self) -> OnPaused {
        Box::new(move || Ok(self.run()?))
    }

    fn run(&self) -> Result<(), CommandError> {
        let command = || self.command.clone();
        self.note(Note::Started { command: command(), limit: self.limit });
        let begun = Instant::now();
        let outcome = self.run_watched(begun);
        let (succeeded, ran) = (outcome.is_ok(), begun.elapsed());
        self.note(Note::Ended { command: command(), succeeded, ran });
        outcome
    }

    fn note(&self, note: Note) {
        // Where nobody listens, nobody needs to know.
        let _ = self.notes.send(note);
    }

    fn run_watched(&self, begun: Instant) -> Result<(), CommandError> {
        let failed = |source| CommandError::Run { command: self.command.clone(), source };
        let mut running = Running::start(&self.command, &self.into).map_err(failed)?;
        loop {
            if let Some(status) = running.poll().map_err(failed)? {
                return match status.success() {
                    true => Ok(()),
                    false => Err(CommandError::Failed { command: self.command.clone(), status }),
                };
            }
            if let Some(reason) = self.reason_to_end(begun) {
                running.end().map_err(failed)?;
                return Err(reason);
            }
            thread::sleep(TICK);
        }
    }

    fn reason_to_end(&self, begun: Instant) -> Option<CommandError> {
        let (command, limit) = (|| self.command.clone(), self.limit);
        if self.receiver.is_stopped() {
            Some(CommandError::GivenUp { command: command() })
        } else if self.receiver.source_has_gone() {
            Some(CommandError::SourceGone { command: command() })
        } else {
            (begun.elapsed() >= limit).then(|| CommandError::TimedOut { command: command(), limit })
        }
    }
}

/// A command under way.
#[derive(Debug)]
struct Running {
    guard: Child,
    command: Child,
}

impl Running {
    /// Starts the guard, and then the command in its group; what the command prints goes to standard error.
    fn start(command: &OsStr, into: &Path) -> io::Result<Self> {
        let mut guard = Command::new(SHELL)
            .args(["-c", GUARD])
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .process_group(0)
            .spawn()?;
        match start_in_group(command, into, &guard) {
            Ok(command) => Ok(Self { guard, command }),
            Err(error) => {
                dismiss(&mut guard)?;
                Err(error)
            }
        }
    }

    /// Returns how the command ended, if it did. What it left running in the background may run on.
    fn poll(&mut self) -> io::Result<Option<ExitStatus>> {
        let status = self.command.try_wait()?;
        if status.is_some() {
            dismiss(&mut self.guard)?;
        }
        Ok(status)
    }

    /// Ends the command and what it started.
    fn end(mut self) -> io::Result<()> {
        drop(self.guard.stdin.take());
        self.guard.wait()?;
        // In vain, unless somebody ended the guard itself.
        self.command.kill()?;
        self.command.wait()?;
        Ok(())
    }
}

fn start_in_group(command: &OsStr, into: &Path, guard: &Child) -> io::Result<Child> {
    let out = io::stderr().as_fd().try_clone_to_owned()?;
    let group = i32::try_from(guard.id()).expect("process numbers are positive ints");
    Command::new(SHELL)
        .arg("-c")
        .arg(command)
        .env(DIR_VARIABLE, into)
        .stdin(Stdio::null())
        .stdout(out)
        .process_group(group)
        .spawn()
}

/// Ends a guard that has nobody to watch.
fn dismiss(guard: &mut Child) -> io::Result<()> {
    guard.kill()?;
    guard.wait().map(drop)
}
