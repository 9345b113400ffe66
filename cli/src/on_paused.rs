// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Runs the operator's command while the source's VM is paused.

use std::ffi::{OsStr, OsString};
use std::io;
use std::os::fd::AsFd;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process_group};
use thiserror::Error;
use vfio_migration::snapshot::OnPaused;

/// Names the directory to be in the command's environment. The directory is not there yet.
pub(crate) const DIR_VARIABLE: &str = "VFIO_MIGRATE_INTO";

/// How often a running command is looked at.
const TICK: Duration = Duration::from_millis(20);

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
}

/// Makes what a destination does while the VM is paused: run `command` in a shell and wait for its success.
///
/// When `stop` is raised meanwhile, the command and what it started are asked to end.
pub(crate) fn run_on_paused(command: OsString, into: PathBuf, stop: Arc<AtomicBool>) -> OnPaused {
    Box::new(move || Ok(run(&command, &into, &stop)?))
}

fn run(command: &OsStr, into: &Path, stop: &AtomicBool) -> Result<(), CommandError> {
    let failed = |source| CommandError::Run { command: command.to_owned(), source };
    let mut child = start(command, into).map_err(failed)?;
    let status = wait(&mut child, stop).map_err(failed)?;
    if status.success() { Ok(()) } else { Err(CommandError::Failed { command: command.to_owned(), status }) }
}

/// Starts the command in a process group of its own; what it prints goes to standard error.
fn start(command: &OsStr, into: &Path) -> io::Result<Child> {
    let out = io::stderr().as_fd().try_clone_to_owned()?;
    Command::new("/bin/sh")
        .arg("-c")
        .arg(command)
        .env(DIR_VARIABLE, into)
        .stdin(Stdio::null())
        .stdout(out)
        .process_group(0)
        .spawn()
}

fn wait(child: &mut Child, stop: &AtomicBool) -> io::Result<ExitStatus> {
    let mut asked = false;
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(status);
        }
        if !asked && stop.load(Ordering::Relaxed) {
            asked = true;
            kill_process_group(Pid::from_child(child), Signal::TERM)?;
        }
        thread::sleep(TICK);
    }
}
