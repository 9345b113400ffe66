// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What ended a command: the library's error as a sentence, and the class that its exit status tells.

use std::error::Error;
use std::io;

use rustix::io::Errno;
use vfio_migration::precopy::CancelReason;
use vfio_migration::snapshot::{
    Altered, ApplyError, ChainError, CompareError, DestinationError, FileError, ManifestError, OpenError,
    STATE_FILE, SealError, SourceError, StagingError, SubtractError, VerifyError, WriteError,
};
use vfio_migration::tracker::TrackerError;
use vfio_migration::transfer::connection::ConnectionError;
use vfio_migration::transfer::receive::ReceiveError;
use vfio_migration::transfer::tls::TlsError;
use vfio_migration::transfer::{PeerError, SendError, SendStep};
use vfio_migration_integration::demo::chain;

use crate::exit::Exit;
use crate::host::HostError;
use crate::on_paused::CommandError;

/// Sets how long a State may be.
const STATE_LIMIT: &str = "--state-limit";

/// What limits the files a process may open.
const DESCRIPTORS: &str = "`ulimit -n` sets the limit";

/// What makes a manifest.
const SEAL: &str = "`snapshot seal` gives it one, of what it is now";

/// Why a command did not do what it was told.
#[derive(Debug)]
pub(crate) struct Failure {
    pub(crate) exit: Exit,
    /// The error and its causes, in one line.
    pub(crate) message: String,
}

/// The class that a library error belongs to.
trait Class: Error {
    fn exit(&self) -> Exit;

    /// The option that sets the limit which was reached.
    fn option(&self) -> Option<&'static str> {
        None
    }

    /// What to do about it, where the error cannot know how that is asked for here.
    fn remedy(&self) -> Option<&'static str> {
        None
    }
}

impl<E: Class> From<E> for Failure {
    fn from(error: E) -> Self {
        let option = error.option().map(|option| format!(" ({option} sets the limit)"));
        let remedy = error.remedy().map(|remedy| format!(" ({remedy})"));
        let message = chain(&error) + &option.or(remedy).unwrap_or_default();
        Self { exit: error.exit(), message }
    }
}

impl Class for HostError {
    fn exit(&self) -> Exit {
        Exit::Io
    }
}

impl Class for TlsError {
    fn exit(&self) -> Exit {
        Exit::Io
    }
}

impl Class for TrackerError {
    fn exit(&self) -> Exit {
        Exit::Io
    }
}

impl Class for SourceError {
    fn exit(&self) -> Exit {
        match self {
            Self::Check { source, .. } => exit_of_copy(source),
            _ => Exit::Io,
        }
    }
}

impl Class for CompareError {
    fn exit(&self) -> Exit {
        exit_of_copy(&self.source)
    }
}

impl Class for ConnectionError {
    fn exit(&self) -> Exit {
        match self {
            Self::TlsOverUnix { .. } | Self::ServerName { .. } => Exit::Usage,
            Self::Listen { .. } | Self::Accept { .. } | Self::Socket { .. } => Exit::Io,
            Self::Connect { source, .. } | Self::Resolve { source, .. } | Self::Handshake { source, .. } => {
                exit_of_line(source)
            }
            _ => Exit::Peer,
        }
    }
}

impl Class for StagingError {
    fn exit(&self) -> Exit {
        match self {
            Self::Name { .. } | Self::Occupied { .. } | Self::MountPoint { .. } => Exit::Usage,
            _ => Exit::Io,
        }
    }

    fn remedy(&self) -> Option<&'static str> {
        matches!(self, Self::Descriptors { .. }).then_some(DESCRIPTORS)
    }
}

impl Class for WriteError {
    fn exit(&self) -> Exit {
        match self {
            Self::Staging(error) => error.exit(),
            Self::UnnamedBase { .. } => Exit::Usage,
            _ => Exit::Verification,
        }
    }

    fn remedy(&self) -> Option<&'static str> {
        if let Self::Staging(error) = self { error.remedy() } else { None }
    }
}

impl Class for OpenError {
    fn exit(&self) -> Exit {
        match self {
            Self::File(FileError::Open { .. } | FileError::Read { .. }) => Exit::Io,
            Self::Manifest { source: ManifestError::Memory(_), .. } => Exit::Io,
            Self::Differential { .. } | Self::Full { .. } => Exit::Usage,
            _ => Exit::Verification,
        }
    }

    fn option(&self) -> Option<&'static str> {
        match self {
            Self::File(FileError::TooLarge { path, .. }) if path.ends_with(STATE_FILE) => Some(STATE_LIMIT),
            _ => None,
        }
    }
}

impl Class for ChainError {
    fn exit(&self) -> Exit {
        match self {
            Self::Open(error) => error.exit(),
            _ => Exit::Usage,
        }
    }

    fn option(&self) -> Option<&'static str> {
        if let Self::Open(error) = self { error.option() } else { None }
    }
}

impl Class for VerifyError {
    fn exit(&self) -> Exit {
        match self {
            Self::NoManifest { .. } => Exit::Usage,
            _ => Exit::Io,
        }
    }

    fn remedy(&self) -> Option<&'static str> {
        matches!(self, Self::NoManifest { .. }).then_some(SEAL)
    }
}

impl Class for ApplyError {
    fn remedy(&self) -> Option<&'static str> {
        match self {
            Self::NoManifest { .. } => Some(SEAL),
            Self::Write(error) => error.remedy(),
            _ => None,
        }
    }

    fn exit(&self) -> Exit {
        match self {
            Self::NoManifest { .. } => Exit::Usage,
            Self::Copy { source, .. } => exit_of_copy(source),
            Self::Write(error) => error.exit(),
            _ => Exit::Io,
        }
    }
}

/// An altered block is found when it is read.
fn exit_of_copy(error: &io::Error) -> Exit {
    if Altered::of(error).is_some() { Exit::Verification } else { Exit::Io }
}

/// What fails on the way to the other side is its fault, unless this host is short of something.
fn exit_of_line(error: &io::Error) -> Exit {
    let errno = Errno::from_io_error(error);
    let is_short = matches!(errno, Some(Errno::NOMEM | Errno::NFILE | Errno::MFILE | Errno::NOBUFS));
    if is_short || error.kind() == io::ErrorKind::OutOfMemory { Exit::Io } else { Exit::Peer }
}

impl Class for SubtractError {
    fn exit(&self) -> Exit {
        match self {
            Self::Copy { source, .. } => exit_of_copy(source),
            Self::Write(error) => error.exit(),
            _ => Exit::Io,
        }
    }

    fn remedy(&self) -> Option<&'static str> {
        if let Self::Write(error) = self { error.remedy() } else { None }
    }
}

impl Class for SealError {
    fn exit(&self) -> Exit {
        match self {
            Self::Open(error) => error.exit(),
            _ => Exit::Io,
        }
    }

    fn option(&self) -> Option<&'static str> {
        if let Self::Open(error) = self { error.option() } else { None }
    }
}

impl Class for CommandError {
    fn exit(&self) -> Exit {
        match self {
            Self::SourceGone { .. } => Exit::Peer,
            _ => Exit::Io,
        }
    }
}

impl Class for DestinationError {
    fn exit(&self) -> Exit {
        match self {
            Self::Write(WriteError::Staging(error)) => error.exit(),
            Self::OnPaused(error) => error.downcast_ref::<CommandError>().map_or(Exit::Io, Class::exit),
            _ => Exit::Peer,
        }
    }

    fn remedy(&self) -> Option<&'static str> {
        let disks = matches!(self, Self::WritableDisks { .. });
        disks.then_some("--on-paused CMD snapshots them, --memory-only leaves them as they are")
    }
}

impl Class for ReceiveError {
    fn exit(&self) -> Exit {
        match self {
            Self::Connection { source } => source.exit(),
            Self::Stopped => Exit::Cancelled,
            Self::Store { source } => exit_of_copy(source),
            Self::Thread { .. } | Self::Descriptors { .. } | Self::Short { .. } => Exit::Io,
            Self::Read { source, .. } | Self::Answer { source, .. } => exit_of_line(source),
            Self::Destination { source, .. } => {
                source.downcast_ref::<DestinationError>().map_or(Exit::Io, Class::exit)
            }
            _ => Exit::Peer,
        }
    }

    fn option(&self) -> Option<&'static str> {
        match self {
            Self::Idle { .. } => Some("--idle-timeout"),
            Self::TooLong { name: "state_bytes", .. } => Some(STATE_LIMIT),
            Self::Connections { .. } => Some("--connections"),
            _ => None,
        }
    }

    fn remedy(&self) -> Option<&'static str> {
        match self {
            Self::Destination { source, .. } => source.downcast_ref::<DestinationError>()?.remedy(),
            Self::Descriptors { .. } => Some(DESCRIPTORS),
            _ => None,
        }
    }
}

impl Class for SendError {
    fn exit(&self) -> Exit {
        match self {
            Self::Options(_) => Exit::Usage,
            Self::Cancelled => Exit::Cancelled,
            Self::Peer { source: PeerError::Connection(error), .. } => error.exit(),
            Self::Peer { source: PeerError::Io(error), .. } => exit_of_line(error),
            Self::Peer { .. } | Self::GivenUp(_) | Self::SwitchoverTimedOut { .. } => Exit::Peer,
            Self::OutcomeUnknown { .. } => Exit::OutcomeUnknown,
            Self::Vm { source, .. } => source.downcast_ref::<SourceError>().map_or(Exit::Io, Class::exit),
            _ => Exit::Io,
        }
    }

    fn option(&self) -> Option<&'static str> {
        match self {
            Self::Peer { step: SendStep::Start | SendStep::Complete, .. } => None,
            Self::Peer { source: PeerError::Silent { .. }, .. } => Some("--idle-timeout"),
            Self::GivenUp(CancelReason::TimedOut { .. }) => Some("--timeout-s"),
            Self::StateTooLarge { .. } => Some("--state-limit"),
            _ => None,
        }
    }
}
