// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Why a snapshot cannot be read or written.

use std::io::{self, ErrorKind};
use std::path::PathBuf;

use thiserror::Error;

use crate::range::GpaRange;
use crate::snapshot::format::{CONFIG_FILE, Digest, Elsewhere, FormatError, PlacementError};
use crate::units::Count;

/// What a manifest is needed for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum ManifestUse {
    /// To name the snapshot.
    Name,
    /// To check every byte of the snapshot.
    Verify,
    /// To check the memory while it is copied.
    Copy,
    /// To take an edited configuration.
    Reseal,
}

impl ManifestUse {
    fn as_str(self) -> &'static str {
        match self {
            Self::Name => "snapshot-manifest to name it",
            Self::Verify => "snapshot-manifest to check against",
            Self::Copy => "manifest to check its memory against",
            Self::Reseal => "manifest to take an edited configuration into",
        }
    }
}

/// Why a directory is not a snapshot that can be read, or snapshots are not a chain.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum ReadError {
    /// A file is absent or forbidden.
    #[error("Cannot open {path}", path = .path.display())]
    Open {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A directory, device, pipe or socket has the name of a file.
    #[error("{path} is not a regular file", path = .path.display())]
    NotRegular {
        /// The file.
        path: PathBuf,
    },
    /// This host cannot read a file, which may be sound.
    #[error("Cannot read {path}", path = .path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A file is larger than the limits allow.
    #[error("{path} has more than {}, the limit", Count(.limit, "byte"), path = .path.display())]
    TooLarge {
        /// The file.
        path: PathBuf,
        /// The limit.
        limit: u64,
    },
    /// A file is cut off or has something appended.
    #[error("{path} has {} where {expected} are expected", Count(.bytes, "byte"), path = .path.display())]
    Size {
        /// The file.
        path: PathBuf,
        /// Bytes it has.
        bytes: u64,
        /// Bytes it should have.
        expected: u64,
    },
    /// Configuration, state or manifest are not what they should be.
    #[error("{path} is not of the right format", path = .path.display())]
    Format {
        /// The directory, or the manifest in it.
        path: PathBuf,
        /// What is wrong, in which document.
        source: FormatError,
    },
    /// A file is not the one that the manifest was made for.
    #[error("{name} of {path} is not the file that its manifest describes", path = .path.display())]
    Altered {
        /// The directory.
        path: PathBuf,
        /// The file.
        name: &'static str,
    },
    /// `config.json` is not the one that the manifest was made for, but is the configuration of a VM. Disks, taps and files have other
    /// names on other hosts.
    #[error("{CONFIG_FILE} of {path} was edited since its manifest was made", path = .path.display())]
    EditedConfig {
        /// The directory.
        path: PathBuf,
    },
    /// There is no `memory-ranges`, and the state lists no memory: none of it is in the snapshot.
    #[error("{path} holds no memory{elsewhere}", path = .path.display(), elsewhere = .elsewhere.as_reason())]
    NoMemory {
        /// The directory.
        path: PathBuf,
        /// Where the memory is.
        elsewhere: Elsewhere,
    },
    /// A differential was given where a full snapshot is needed.
    #[error("{path} is a differential, not a full snapshot", path = .path.display())]
    Differential {
        /// The directory.
        path: PathBuf,
    },
    /// A full snapshot was given where a differential is needed.
    #[error("{path} is no differential", path = .path.display())]
    Full {
        /// The directory.
        path: PathBuf,
    },
    /// A snapshot has no manifest, which is needed.
    #[error("{path} has no {}", .needed.as_str(), path = .path.display())]
    NoManifest {
        /// The snapshot.
        path: PathBuf,
        /// What for.
        needed: ManifestUse,
        /// Why [`seal`](crate::snapshot::seal()) gives it none, if that is so.
        source: Option<PlacementError>,
    },
    /// A chain of snapshots was asked for, and none was named.
    #[error("No snapshot is named")]
    Empty,
    /// A differential was made on top of something else.
    #[error("{path} is a differential to {base}, not to {below}", path = .path.display(), below = .below.display())]
    WrongBase {
        /// The differential.
        path: PathBuf,
        /// What it needs.
        base: Digest,
        /// What was given.
        below: PathBuf,
    },
}

impl ReadError {
    /// Returns a [`ReadError::Read`] where this host cannot look at a file: an error of the disk, a missing right, no memory or
    /// descriptor left. A file that is absent, or is not what it should be, is returned as the second.
    pub(crate) fn unread(self) -> Result<Self, Self> {
        match self {
            Self::Open { ref source, .. } if source.kind() == ErrorKind::NotFound => Err(self),
            Self::Open { path, source } => Ok(Self::Read { path, source }),
            Self::Read { .. } => Ok(self),
            other => Err(other),
        }
    }

    /// Whether a file is absent.
    pub(crate) fn is_absent(&self) -> bool {
        matches!(self, Self::Open { source, .. } if source.kind() == ErrorKind::NotFound)
    }
}

/// Why no snapshot was written. Nothing lies under its name, except after [`WriteError::Stands`] and [`WriteError::Unsynced`].
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum WriteError {
    /// The path has no last component to name the directory by, as with `..`.
    #[error("Path {path} names no directory to make", path = .path.display())]
    Name {
        /// The path.
        path: PathBuf,
    },
    /// Something is there that would be overwritten.
    #[error("{path} exists and is not an empty directory", path = .path.display())]
    Occupied {
        /// The path.
        path: PathBuf,
    },
    /// The path is an empty directory that cannot be replaced, because a file system is mounted on it.
    #[error(
        "{path} is a mount point, which no finished directory can take the place of; name a directory in it",
        path = .path.display()
    )]
    MountPoint {
        /// The path.
        path: PathBuf,
    },
    /// This process may open too few files to write the directory.
    #[error("Cannot open the {needed} files at a time that it takes to write {path}", path = .path.display())]
    Descriptors {
        /// The path.
        path: PathBuf,
        /// How many it takes.
        needed: usize,
        /// Why they cannot be opened.
        source: io::Error,
    },
    /// The directory to hold it is absent, forbidden or full.
    #[error("Cannot make a directory beside {path}", path = .path.display())]
    Make {
        /// The final path.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A file of the directory could not be written.
    #[error("Cannot write {name} of {path}", path = .path.display())]
    File {
        /// The file.
        name: &'static str,
        /// The final path of its directory.
        path: PathBuf,
        /// Why: as a rule, the disk is full.
        source: io::Error,
    },
    /// The finished directory could not be moved to its name.
    #[error("Cannot move the finished directory to {path}", path = .path.display())]
    Publish {
        /// The final path.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The directory has its name and is whole, but could be neither synced to disk nor moved back: a loss of power may lose it.
    #[error(
        "{path} is whole but may be lost with the power: it could not be brought to disk, nor taken back ({taking_back})",
        path = .path.display()
    )]
    Stands {
        /// The final path.
        path: PathBuf,
        /// Why it was not moved back.
        taking_back: io::Error,
        /// Why it was not synced.
        source: io::Error,
    },
    /// A file replaced an older one, but its name could not be synced to disk: a loss of power may bring the old one back.
    #[error(
        "{name} of {path} is the new one, but a loss of power may bring back the old one: it could not be brought to disk",
        path = .path.display()
    )]
    Unsynced {
        /// The file.
        name: &'static str,
        /// Its directory.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Configuration or state are not what they should be.
    #[error(transparent)]
    Format(#[from] FormatError),
    /// The VM's RAM exceeds the limits.
    #[error("Cannot place the VM's RAM")]
    Placement(#[from] PlacementError),
    /// The state lists memory that the VM did not announce.
    #[error("state.json lists memory {range}, which was not announced as RAM")]
    Unannounced {
        /// The memory.
        range: GpaRange,
    },
    /// The state leaves out memory that cannot be unplugged, such as that of a zone that shares a named file.
    #[error("state.json leaves out memory {range}, so a snapshot would lack it")]
    LeftOut {
        /// The memory.
        range: GpaRange,
    },
    /// A file would be larger than what is read with the same limits.
    #[error("{name} of {path} would have {}, the limit is {limit}", Count(.bytes, "byte"), path = .path.display())]
    Unreadable {
        /// The file.
        name: &'static str,
        /// The directory to be.
        path: PathBuf,
        /// Bytes it would have.
        bytes: u64,
        /// The limit.
        limit: u64,
    },
    /// The snapshot to differ from has no manifest to name it.
    #[error("{path} has no manifest to name it, so nothing can be a differential to it", path = .path.display())]
    UnnamedBase {
        /// The snapshot.
        path: PathBuf,
        /// Why [`seal`](crate::snapshot::seal()) gives it none, if that is so.
        source: Option<PlacementError>,
    },
}
