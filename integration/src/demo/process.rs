// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Child processes of the demo: started with a control channel, ended whatever happens.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command as Program, Stdio};
use std::sync::mpsc::Sender;
use std::thread::Builder;

use serde::Serialize;

use super::control::{Command, Control, Event};

/// Which process an event came from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Who {
    Source,
    /// The destination of this attempt.
    Destination(u32),
}

/// A child process. Killed and reaped when dropped.
#[derive(Debug)]
pub(crate) struct Process {
    child: Child,
    control: Control,
}

impl Process {
    /// Starts `program` with its role and descriptors. In a group of its own: a terminal's signals go to the demo alone.
    pub(crate) fn spawn(
        mut program: Program,
        role: &impl Serialize,
        descriptors: &[&dyn AsRawFd],
    ) -> io::Result<Self> {
        let (ours, theirs) = UnixStream::pair()?;
        program.stdin(Stdio::from(OwnedFd::from(theirs))).stdout(Stdio::null()).process_group(0);
        let child = program.spawn()?;
        let mut process = Self { child, control: Control::new(ours) };
        process.control.send(role)?;
        for descriptor in descriptors {
            process.control.send_descriptor(&descriptor.as_raw_fd())?;
        }
        Ok(process)
    }

    /// Forwards the process's events to `events`, ending with `None` when it is gone.
    pub(crate) fn listen(&self, who: Who, events: Sender<(Who, Option<Event>)>) -> io::Result<()> {
        let mut control = self.control.try_clone()?;
        Builder::new().name("listen".into()).spawn(move || {
            loop {
                let event = control.receive::<Event>().unwrap_or_else(|error| {
                    log::debug!("Control channel of {who:?} broke: {error}");
                    None
                });
                let last = event.is_none();
                if events.send((who, event)).is_err() || last {
                    return;
                }
            }
        })?;
        Ok(())
    }

    /// The kernel's number of it.
    pub(crate) fn id(&self) -> u32 {
        self.child.id()
    }

    pub(crate) fn send(&mut self, command: &Command) -> io::Result<()> {
        self.control.send(command)
    }

    /// Kills the process as `kill -9` would.
    pub(crate) fn kill(&mut self) -> io::Result<()> {
        self.child.kill()?;
        self.child.wait().map(drop)
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if let Err(error) = self.kill() {
            log::warn!("Cannot end process {}: {error}", self.child.id());
        }
    }
}
