// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Runs the operator's command while the source's VM is paused, and lets the VM wait for it no longer than it may.

use std::ffi::OsString;
use std::io::{self, PipeReader, Read};
use std::path::PathBuf;
use std::process::ExitStatus;
use std::sync::mpsc::Sender;
use std::sync::{Arc, OnceLock};
use std::thread;
use std::time::{Duration, Instant};

use indicatif::HumanBytes;
use log::warn;
use thiserror::Error;
use vfio_migration::offload::{CopyProgress, LocalEvent};
use vfio_migration::snapshot::OnPaused;
use vfio_migration::transfer::receive::ReceiverHandle;

use crate::event::Event;
use crate::group::{GuardedCommand, TICK};
use crate::manager::tell_status;
use crate::output::Output;
use crate::printer::STDERR;

/// Names the directory to be in the command's environment. The directory is not there yet.
pub(crate) const DIR_VARIABLE: &str = "VFIO_MIGRATE_INTO";

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
    /// It was terminated because it took too long.
    #[error("{command:?} was terminated: it took longer than the {} s of --on-paused-timeout", .limit.as_secs())]
    TimedOut {
        /// The command.
        command: OsString,
        /// How long it may take.
        limit: Duration,
    },
    /// It was terminated because nobody waits for it.
    #[error("{command:?} was terminated: the source closed the connection meanwhile")]
    SourceGone {
        /// The command.
        command: OsString,
    },
    /// It was terminated because the snapshot has failed.
    #[error("{command:?} was terminated: the VM's memory could not be stored meanwhile")]
    Failing {
        /// The command.
        command: OsString,
    },
    /// It was terminated on request.
    #[error("{command:?} was terminated: the migration was given up here")]
    GivenUp {
        /// The command.
        command: OsString,
    },
}

/// Hands on what the command has printed since the last look; where nobody reads it, it is lost.
pub(crate) fn hand_on(mut printed: &PipeReader) {
    let mut piece = [0; 4096];
    while let Ok(length @ 1..) = printed.read(&mut piece) {
        STDERR.offer(&piece[..length]);
    }
}

/// The operator's command, and what it is held to.
#[derive(Debug)]
pub(crate) struct PausedCommand {
    /// What a shell runs.
    pub(crate) command: OsString,
    /// The directory to be.
    pub(crate) into: Arc<OnceLock<PathBuf>>,
    /// How long it may take.
    pub(crate) limit: Duration,
    /// Tells whether anybody waits for it.
    pub(crate) receiver: ReceiverHandle,
    /// Tells whether what is done beside it has failed.
    pub(crate) copying: CopyProgress,
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
    /// What it prints comes out here; reads do not wait.
    Prints(PipeReader),
    /// It is over.
    Ended {
        /// The command.
        command: OsString,
        /// Whether it did what it was to do.
        succeeded: bool,
        /// How long it took.
        ran: Duration,
    },
    /// The directory has its name.
    Named {
        /// The directory to be.
        into: PathBuf,
        /// What its configuration calls the VM.
        vm: Option<String>,
    },
    /// What happens to memory that came as descriptors.
    Local(LocalEvent),
    /// It was to end, and did not.
    RunsOn {
        /// The command.
        command: OsString,
        /// What is left of it.
        processes: Vec<u32>,
    },
}

impl Note {
    /// Tells it; returns where what the command prints comes out.
    pub(crate) fn tell(self, output: &Output) -> Option<PipeReader> {
        match self {
            Self::Prints(printed) => return Some(printed),
            Self::Started { command, limit } => {
                let (command, timeout_s) = (command.to_string_lossy(), limit.as_secs());
                output.tell(&Event::CommandStarted { command: &command, timeout_s }, || {
                    format!(
                        "Running {command:?} for at most {timeout_s} s; the source's VM is paused meanwhile"
                    )
                });
            }
            Self::Ended { command, succeeded, ran } => {
                let (command, ran_ms) = (command.to_string_lossy(), ran.as_millis());
                output.tell(&Event::CommandEnded { command: &command, succeeded, ran_ms }, || {
                    let how = if succeeded { "succeeded" } else { "failed" };
                    format!("{command:?} {how} after {:.1} s", ran.as_secs_f64())
                });
            }
            Self::Local(event) => tell_local(event, output),
            Self::Named { into, vm } => {
                let path = into.display();
                tell_status(&format!("Receiving into {path}"));
                output.tell(&Event::Named { into: &into, vm: vm.as_deref() }, || {
                    format!("Receiving a VM into {path}")
                });
            }
            Self::RunsOn { command, processes } => warn!(
                "Cannot end {command:?}: processes {processes:?} are still there, as another user's or waiting for a device"
            ),
        }
        None
    }
}

/// Tells how memory is copied that came as descriptors, and what cannot be done meanwhile.
fn tell_local(event: LocalEvent, output: &Output) {
    match event {
        LocalEvent::Passed { ram_bytes, warm_timeout } => {
            let warm_timeout_s = warm_timeout.map(|limit| limit.as_secs());
            output.tell(&Event::MemoryPassed { ram_bytes, warm_timeout_s }, || match warm_timeout_s {
                Some(limit) => format!(
                    "The source passed its memory as descriptors. Copying {} while its VM runs, for at most {limit} s. \
                     Until that is done a Cloud Hypervisor refuses every API call, and ends if its guest reboots. \
                     With preserve_source=on its VM then stays paused until `ch-remote resume`, unless --checkpoint is given here",
                    HumanBytes(ram_bytes)
                ),
                None => "The source passed its memory as descriptors; it is copied when the VM is paused".to_owned(),
            });
        }
        LocalEvent::Copied { bytes, whole, took } => {
            output.tell(&Event::MemoryCopied { bytes, whole, took_ms: took.as_millis() }, || {
                let how = if whole { "all there is" } else { "the rest comes when it is paused" };
                format!(
                    "Copied {} of the running VM in {:.1} s, {how}",
                    HumanBytes(bytes),
                    took.as_secs_f64()
                )
            });
        }
        LocalEvent::Stored { read_bytes, written_bytes, took } => {
            let took_ms = took.as_millis();
            output.tell(&Event::MemoryStored { read_bytes, written_bytes, took_ms }, || {
                format!(
                    "Stored {} of the {} of the paused VM in {took_ms} ms",
                    HumanBytes(written_bytes),
                    HumanBytes(read_bytes)
                )
            });
        }
        LocalEvent::Moved { bytes } => {
            output.tell(&Event::MemoryMoved { bytes }, || {
                format!("Moved {} to leave out memory that is not plugged", HumanBytes(bytes))
            });
        }
        _ => {}
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
        let into = self.into.get().expect("it has its name before the VM is paused");
        let variable = (DIR_VARIABLE, into.clone().into_os_string());
        let (mut running, printed) = GuardedCommand::start(&self.command, variable).map_err(failed)?;
        self.note(Note::Prints(printed));
        let reason = loop {
            match running.poll().map_err(failed)? {
                Some(status) if status.success() => return running.leave().map_err(failed),
                Some(status) => break CommandError::Failed { command: self.command.clone(), status },
                None => {}
            }
            if let Some(reason) = self.reason_to_end(begun) {
                break reason;
            }
            thread::sleep(TICK);
        };
        let processes = running.end();
        if !processes.is_empty() {
            self.note(Note::RunsOn { command: self.command.clone(), processes });
        }
        Err(reason)
    }

    fn reason_to_end(&self, begun: Instant) -> Option<CommandError> {
        let (command, limit) = (|| self.command.clone(), self.limit);
        if self.receiver.is_stopped() {
            Some(CommandError::GivenUp { command: command() })
        } else if self.receiver.source_has_gone() {
            Some(CommandError::SourceGone { command: command() })
        } else if self.copying.has_failed() {
            Some(CommandError::Failing { command: command() })
        } else {
            (begun.elapsed() >= limit).then(|| CommandError::TimedOut { command: command(), limit })
        }
    }
}
