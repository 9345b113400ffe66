// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What ended a command: the library's error as a sentence, and the class that its exit status tells.

use std::error::Error;
use std::io;

use rustix::io::Errno;
use vfio_migration::error::Chain;
use vfio_migration::offload::LocalSendError;
use vfio_migration::precopy::CancelReason;
use vfio_migration::snapshot::{
    Altered, DestinationError, FormatError, ManifestUse, OperationError, PlacementError, ReadError,
    STATE_FILE, WriteError,
};
use vfio_migration::tracker::TrackerError;
use vfio_migration::transfer::connection::ConnectionError;
use vfio_migration::transfer::receive::ReceiveError;
use vfio_migration::transfer::tls::TlsError;
use vfio_migration::transfer::{PeerError, SendError, SendStep};

use crate::exit::Exit;
use crate::host::HostError;
use crate::on_paused::CommandError;

/// Sets how long a State may be.
const STATE_LIMIT: &str = "--state-limit";

/// What limits the files a process may open.
const DESCRIPTORS: &str = "`ulimit -n` sets the limit";

/// Sets how much memory a VM may have.
const MEMORY_LIMIT: &str = "--memory-limit";

/// What makes a manifest.
const SEAL: &str = "`snapshot seal` gives it one, of what it is now";

/// What can be done with memory that is not of whole pages.
pub(crate) const ODD: &str = "Cloud Hypervisor alone restores it, from disk; a VM whose memory has a size of whole pages of 4 KiB can be sealed and sent";

/// What can be done about a manifest that is missing, as far as there is no obstacle.
fn seal_unless(obstacle: Option<&PlacementError>) -> &'static str {
    if obstacle.is_some() { ODD } else { SEAL }
}

/// What takes an edited configuration.
pub(crate) const TAKE_EDITED: &str =
    "`snapshot seal --edited-config` takes it as it stands, `send --config FILE` sends any";

/// What can be done with a snapshot that lacks memory.
const RESTORE_WITH_FILES: &str = "Cloud Hypervisor restores it from disk where the files are as they were";

/// What makes memory part of snapshots.
const OWN_MEMORY: &str = "with shared=off, or without file, such a zone is part of them";

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

impl<E: Class + 'static> From<E> for Failure {
    fn from(error: E) -> Self {
        let limit = placement_limit(&error);
        let option = error.option().or(limit.and_then(|limit| limit));
        let option = option.map(|option| format!(" ({option} sets the limit)"));
        let remedy = error.remedy().map(|remedy| format!(" ({remedy})"));
        let message = Chain(&error).to_string() + &option.or(remedy).unwrap_or_default();
        // More than is allowed is no damage.
        let exit = if limit.is_some() { Exit::Usage } else { error.exit() };
        Self { exit, message }
    }
}

/// Whether `error` is about a VM with more memory, or in more pieces, than allowed; and the option that allows more, if there is one.
fn placement_limit(error: &(dyn Error + 'static)) -> Option<Option<&'static str>> {
    let causes = std::iter::successors(Some(error), |&error| error.source());
    let limit =
        causes.filter_map(|cause| cause.downcast_ref::<PlacementError>()).find(|cause| cause.is_limit())?;
    Some(matches!(limit, PlacementError::TooLarge { .. }).then_some(MEMORY_LIMIT))
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

/// The class of an error that is about the place of the new snapshot and not about what goes there.
fn exit_of_place(error: &WriteError) -> Option<Exit> {
    match error {
        WriteError::Name { .. } | WriteError::Occupied { .. } | WriteError::MountPoint { .. } => {
            Some(Exit::Usage)
        }
        WriteError::Descriptors { .. }
        | WriteError::Make { .. }
        | WriteError::File { .. }
        | WriteError::Publish { .. }
        | WriteError::Stands { .. }
        | WriteError::Unsynced { .. } => Some(Exit::Io),
        _ => None,
    }
}

impl Class for WriteError {
    fn exit(&self) -> Exit {
        exit_of_place(self).unwrap_or(match self {
            Self::UnnamedBase { .. } | Self::Unreadable { .. } => Exit::Usage,
            Self::Format(error) => exit_of_format(error),
            _ => Exit::Verification,
        })
    }

    fn remedy(&self) -> Option<&'static str> {
        match self {
            Self::Descriptors { .. } => Some(DESCRIPTORS),
            Self::UnnamedBase { source, .. } => Some(seal_unless(source.as_ref())),
            _ => None,
        }
    }
}

impl Class for ReadError {
    fn exit(&self) -> Exit {
        match self {
            Self::Open { .. } | Self::Read { .. } => Exit::Io,
            Self::Format { source, .. } => exit_of_format(source),
            Self::NotRegular { .. } | Self::Size { .. } | Self::Altered { .. } => Exit::Verification,
            _ => Exit::Usage,
        }
    }

    fn option(&self) -> Option<&'static str> {
        match self {
            Self::TooLarge { path, .. } if path.ends_with(STATE_FILE) => Some(STATE_LIMIT),
            _ => None,
        }
    }

    fn remedy(&self) -> Option<&'static str> {
        match self {
            Self::EditedConfig { .. } => Some(TAKE_EDITED),
            Self::NoMemory { elsewhere, .. } if !elsewhere.is_empty() => Some(RESTORE_WITH_FILES),
            Self::NoManifest { needed: ManifestUse::Reseal, .. } => {
                Some("`snapshot seal` makes one, of what the snapshot is now")
            }
            Self::NoManifest { source, .. } => Some(seal_unless(source.as_ref())),
            _ => None,
        }
    }
}

/// Text that is only longer than allowed, or that this host has no memory for, is not damaged.
fn exit_of_format(error: &FormatError) -> Exit {
    match error {
        FormatError::TooLarge { .. } => Exit::Usage,
        FormatError::Memory(_) => Exit::Io,
        _ => Exit::Verification,
    }
}

impl Class for OperationError {
    fn exit(&self) -> Exit {
        match self {
            Self::Read(error) => error.exit(),
            Self::Write(error) => error.exit(),
            Self::Pages { .. } | Self::Seal { .. } | Self::Elsewhere { .. } => Exit::Usage,
            Self::Copy { source, .. }
            | Self::CopyRange { source, .. }
            | Self::Compare { source, .. }
            | Self::Send { source, .. } => exit_of_copy(source),
            _ => Exit::Io,
        }
    }

    fn option(&self) -> Option<&'static str> {
        if let Self::Read(error) = self { error.option() } else { None }
    }

    fn remedy(&self) -> Option<&'static str> {
        match self {
            Self::Read(error) => error.remedy(),
            Self::Write(error) => error.remedy(),
            Self::Pages { .. } | Self::Seal { .. } => Some(ODD),
            Self::Elsewhere { .. } => Some(RESTORE_WITH_FILES),
            _ => None,
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
            Self::Write(error) => exit_of_place(error).unwrap_or(Exit::Peer),
            Self::Copy(error) => {
                let written = error.get_ref().and_then(|inner| inner.downcast_ref::<WriteError>());
                written.map_or(Exit::Peer, Class::exit)
            }
            Self::OnPaused(error) => error.downcast_ref::<CommandError>().map_or(Exit::Io, Class::exit),
            _ => Exit::Peer,
        }
    }

    fn remedy(&self) -> Option<&'static str> {
        match self {
            Self::WritableDisks { .. } => {
                Some("--on-paused CMD snapshots them, --memory-only leaves them as they are")
            }
            Self::SharedZones { .. } | Self::FileZones { .. } => Some(OWN_MEMORY),
            _ => None,
        }
    }
}

impl Class for ReceiveError {
    fn exit(&self) -> Exit {
        match self {
            Self::Connection { source } => source.exit(),
            Self::Stopped => Exit::Cancelled,
            Self::Store { source } => exit_of_copy(source),
            Self::Thread { .. } | Self::ThreadDied | Self::Descriptors { .. } | Self::Short { .. } => {
                Exit::Io
            }
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

impl Class for LocalSendError {
    fn exit(&self) -> Exit {
        match self {
            Self::Stopped | Self::Aborted { .. } => Exit::Cancelled,
            Self::Fill(source) => exit_of_copy(source),
            Self::Make { .. } | Self::Thread(_) => Exit::Io,
            Self::Document(error) => exit_of_format(error),
            Self::Elsewhere { .. }
            | Self::CannotFault { .. }
            | Self::NotOnDemand
            | Self::OnDemandReceiver { .. } => Exit::Usage,
            Self::NoSlot { .. } | Self::SlotTwice { .. } => Exit::Verification,
            Self::Connection(error) => error.exit(),
            _ if self.is_outcome_unknown() => Exit::OutcomeUnknown,
            Self::Line { source, .. } => exit_of_line(source),
            _ => Exit::Peer,
        }
    }

    fn option(&self) -> Option<&'static str> {
        match self {
            Self::Silent { .. } if !self.is_outcome_unknown() => Some("--idle-timeout"),
            _ => None,
        }
    }

    fn remedy(&self) -> Option<&'static str> {
        match self {
            Self::Elsewhere { .. } => Some(RESTORE_WITH_FILES),
            Self::NotOnDemand => Some("without --on-demand it gets all memory first"),
            Self::OnDemandReceiver { .. } => Some("--on-demand sends it so"),
            Self::CannotFault { .. } => Some("without --on-demand all memory is there first"),
            _ => None,
        }
    }
}

impl Class for SendError {
    fn exit(&self) -> Exit {
        match self {
            Self::Cancelled => Exit::Cancelled,
            Self::Peer { source: PeerError::Connection(error), .. } => error.exit(),
            Self::Peer { source: PeerError::Io(error), .. } => exit_of_line(error),
            Self::Peer { .. } | Self::GivenUp(_) | Self::SwitchoverTimedOut { .. } => Exit::Peer,
            Self::OutcomeUnknown { .. } => Exit::OutcomeUnknown,
            Self::Vm { source, .. } => source.downcast_ref::<OperationError>().map_or(Exit::Io, Class::exit),
            _ => Exit::Io,
        }
    }

    fn option(&self) -> Option<&'static str> {
        match self {
            Self::Peer { step: SendStep::Start | SendStep::Complete, .. } => None,
            Self::Peer { source: PeerError::Silent { .. }, .. } => Some("--idle-timeout"),
            Self::GivenUp(CancelReason::TimedOut { .. }) => Some("--timeout-s"),
            Self::StateTooLarge { of_receiver: false, .. } => Some("--state-limit"),
            Self::StateTooLarge { .. } => Some("--state-limit of the receiver"),
            _ => None,
        }
    }
}
