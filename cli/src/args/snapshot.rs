// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The words of `vfio-migrate snapshot`, and what limits every command that reads a snapshot.

use std::path::PathBuf;

use clap::{Args, Subcommand};
use vfio_migration::snapshot;

use super::size;

/// Size limits for a snapshot: files on disk are trusted no more than a source.
#[derive(Debug, Args)]
pub(crate) struct SizeLimits {
    /// Size limit for the VM's state, the State message or state.json, which holds the devices' state in base64: a number of
    /// bytes with K, M or G behind it. It is held in memory, once. In a migration a larger one is refused only when all
    /// memory has moved.
    #[arg(long, global = true, default_value = "4G", value_name = "SIZE", value_parser = size)]
    pub(super) state_limit: u64,
    /// Size limit for a VM's memory, a number of bytes with G or T behind it. A VM that has more is refused.
    #[arg(long, global = true, default_value = "16T", value_name = "SIZE", value_parser = size)]
    memory_limit: u64,
}

impl SizeLimits {
    /// What a snapshot on disk is held to.
    pub(crate) fn of_snapshot(&self) -> snapshot::SnapshotLimits {
        let Self { state_limit: state_bytes, memory_limit: memory_bytes } = *self;
        snapshot::SnapshotLimits { state_bytes, memory_bytes, ..snapshot::SnapshotLimits::default() }
    }
}

#[derive(Debug, Args)]
pub(crate) struct SnapshotArguments {
    #[command(flatten)]
    pub(crate) limits: SizeLimits,
    #[command(subcommand)]
    pub(crate) command: SnapshotCommand,
}

#[derive(Debug, Subcommand)]
pub(crate) enum SnapshotCommand {
    /// Reports what a snapshot holds, the pass-through devices of its VM, and which memory is not in it. Does not
    /// read the memory.
    Info {
        /// A snapshot of either kind.
        dir: PathBuf,
        /// Print one JSON object.
        #[arg(long)]
        json: bool,
    },
    /// Checks every byte of a snapshot against its manifest; names files and guest-physical addresses that were altered.
    ///
    /// Exit status 5 if something was altered; 1 if only config.json was edited and still is a valid configuration.
    Verify {
        /// A snapshot of either kind.
        dir: PathBuf,
        /// Print one JSON object.
        #[arg(long)]
        json: bool,
    },
    /// Lists where two snapshots differ; exit status 0 when they do not, 1 when they do.
    Diff(DiffArguments),
    /// Makes a differential of a snapshot: what differs from its base.
    Create(CreateArguments),
    /// Makes a full snapshot of a full one and the differentials on top of it; every byte is checked on the way.
    Apply(ApplyArguments),
    /// Gives a full snapshot that Cloud Hypervisor wrote a manifest, so that it can be verified and be a base.
    Seal {
        /// A full snapshot; with --edited-config, one of either kind.
        dir: PathBuf,
        /// Accept the edited config.json into the existing manifest. State and memory are not read; differentials of
        /// the snapshot stay valid.
        #[arg(long)]
        edited_config: bool,
        /// Print one JSON object.
        #[arg(long)]
        json: bool,
    },
}

impl SnapshotCommand {
    /// Whether to talk to a program.
    pub(crate) fn json(&self) -> bool {
        match self {
            Self::Info { json, .. } | Self::Verify { json, .. } | Self::Seal { json, .. } => *json,
            Self::Diff(arguments) => arguments.json,
            Self::Create(arguments) => arguments.json,
            Self::Apply(arguments) => arguments.json,
        }
    }
}

#[derive(Debug, Args)]
pub(crate) struct DiffArguments {
    /// One snapshot.
    pub(crate) first: PathBuf,
    /// The other one.
    pub(crate) second: PathBuf,
    /// The chain below snapshots that are differentials; repeat the option, the full one first.
    #[arg(long, value_name = "DIR")]
    pub(crate) base: Vec<PathBuf>,
    /// Print one JSON object.
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
pub(crate) struct CreateArguments {
    /// The snapshot to take it from.
    #[arg(long, value_name = "DIR")]
    pub(crate) from: PathBuf,
    /// The base snapshot. If it is a differential itself, repeat the option for its whole chain, the full one first.
    #[arg(long, required = true, value_name = "DIR")]
    pub(crate) base: Vec<PathBuf>,
    /// The differential to be: absent, or an empty directory.
    #[arg(long, value_name = "DIR")]
    pub(crate) into: PathBuf,
    /// Print one JSON object.
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
pub(crate) struct ApplyArguments {
    /// The full snapshot, then the differentials, each on top of the one before.
    #[arg(required = true, value_name = "DIR")]
    pub(crate) chain: Vec<PathBuf>,
    /// The full snapshot to be: absent, or an empty directory.
    #[arg(long, value_name = "DIR")]
    pub(crate) into: PathBuf,
    /// Print one JSON object.
    #[arg(long)]
    pub(crate) json: bool,
}
