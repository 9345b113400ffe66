// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! How a demo can end badly.

use std::io;

use thiserror::Error;

use super::control::Health;
use super::report::Report;
use crate::vmm::MemoryError;

/// Why a demo did not end with `verified`.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum DemoError {
    /// Options that contradict each other.
    #[error("Contradictory options: {0}")]
    Contradiction(&'static str),
    /// The source to forget is not there.
    #[error("No dirty source is named {source_name} here; there are {known}")]
    NoSuchSource {
        /// What was asked for.
        source_name: String,
        /// What there is.
        known: String,
    },
    /// RAM of that size cannot be made.
    #[error("Cannot make the guest's RAM")]
    Memory(#[from] MemoryError),
    /// Source and destination do not fit the host together.
    #[error(
        "Source and destination need {} MiB together, but this host has {} MiB available{}",
        .needed_bytes >> 20, .available_bytes >> 20,
        if *.sparse { "" } else { "; with --sparse most of it stays unpopulated" }
    )]
    HostTooSmall {
        /// RAM and device state of both.
        needed_bytes: u64,
        /// What the host can give.
        available_bytes: u64,
        /// Whether most of the RAM stays unpopulated.
        sparse: bool,
    },
    /// No folder for sockets.
    #[error("Cannot make a temporary folder")]
    Folder(#[source] io::Error),
    /// A process could not be started.
    #[error("Cannot start a process of the demo")]
    Spawn(#[source] io::Error),
    /// A process does not listen any more.
    #[error("Cannot reach a process of the demo")]
    Control(#[source] io::Error),
    /// The man in the middle has no port.
    #[error("Cannot put a man in the middle")]
    Proxy(#[source] io::Error),
    /// A process ended by itself.
    #[error("The {who} process died")]
    Died {
        /// Which one.
        who: &'static str,
    },
    /// A process failed outside a migration.
    #[error("The {who} failed: {error}{}", runs(*.guest_runs))]
    Process {
        /// Which one.
        who: &'static str,
        /// What it said.
        error: String,
        /// Whether its guest runs.
        guest_runs: bool,
    },
    /// Something took far too long.
    #[error("Waited too long for {what}")]
    Slow {
        /// For what.
        what: &'static str,
    },
    /// The migration failed.
    #[error("Migration failed: {error}{}", runs(*.guest_runs))]
    Migration {
        /// What the source said.
        error: String,
        /// Whether the source's guest runs on.
        guest_runs: bool,
    },
    /// The migration was given up on request.
    #[error("Migration abandoned on request{}", runs(*.guest_runs))]
    Cancelled {
        /// Whether the source's guest runs on.
        guest_runs: bool,
    },
    /// The destination should have died but the migration succeeded.
    #[error("Migration succeeded before round {round}, in which the destination was to be killed")]
    Survived {
        /// The round.
        round: u32,
    },
    /// The migration failed by itself before the destination was killed.
    #[error("Migration failed before round {round}, in which the destination was to be killed: {error}")]
    NotKilled {
        /// The round.
        round: u32,
        /// What the source said.
        error: String,
    },
    /// The destination was to be killed with half the RAM acknowledged, but less was.
    #[error(
        "Only {acknowledged} of {ram} bytes of RAM were acknowledged when the destination was to be killed"
    )]
    TooEarly {
        /// Bytes acknowledged.
        acknowledged: u64,
        /// Bytes of RAM.
        ram: u64,
    },
    /// The source's guest is not well after a failed migration.
    #[error("The source's guest is not well after the failed migration: {health:?}")]
    SourceUnwell {
        /// What the checks found.
        health: Health,
    },
    /// The memfds cannot be read.
    #[error("Cannot compare the two sides' RAM")]
    Compare(#[source] io::Error),
    /// The two sides differ.
    #[error("NOT verified: pages that differ: {} of {}, the first one at GPA {gpa:#x}", .report.wrong_pages, .report.pages_compared)]
    Different {
        /// First page that differs.
        gpa: u64,
        /// The report so far.
        report: Box<Report>,
    },
    /// RAM was equal, but the VM is not well after it moved.
    #[error("NOT verified: the VM is not well after it moved: {health:?}")]
    Unwell {
        /// What the checks found.
        health: Health,
        /// The report.
        report: Box<Report>,
    },
}

fn runs(guest_runs: bool) -> &'static str {
    if guest_runs { "; the source's guest runs on" } else { "" }
}
