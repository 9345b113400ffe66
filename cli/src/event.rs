// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What a command tells while it runs and when it ends: for programs, one JSON object on a line each.

use std::path::Path;

use serde::Serialize;
use vfio_migration::offload::LocalSendProgress;
use vfio_migration::snapshot::{Digest, PassThrough};

use crate::exit::Exit;

/// Something that happened. `docs/cli.md` documents the fields; programs rely on them.
#[derive(Debug, Serialize)]
#[serde(tag = "event", rename_all = "kebab-case")]
pub(crate) enum Event<'a> {
    /// A source may come.
    Listening {
        /// Where to; with TCP port 0, the port that was free.
        url: String,
        /// The directory to be.
        into: &'a Path,
    },
    /// Bytes came.
    Receiving {
        /// All so far, framing and TLS included.
        received_bytes: u64,
        /// Over the last moments.
        bytes_per_second: u64,
    },
    /// The directory of a VM that comes to `--serve` has its name.
    Named {
        /// The directory to be.
        into: &'a Path,
        /// What its configuration calls the VM: `platform.uuid`.
        vm: Option<&'a str>,
    },
    /// The source passed its memory as descriptors.
    MemoryPassed {
        /// The VM's memory.
        ram_bytes: u64,
        /// How long it is copied while the VM runs, at most; `null`: not at all.
        warm_timeout_s: Option<u64>,
    },
    /// Such memory is on its way to the disk, or compared with what is there.
    Copying {
        /// Memory that was read in this pass over it.
        copied_bytes: u64,
        /// Memory that the pass reads: what is no hole.
        data_bytes: u64,
    },
    /// The copy of such memory while the VM runs is over.
    MemoryCopied {
        /// Memory that was copied; holes are none.
        bytes: u64,
        /// Whether that is all.
        whole: bool,
        /// How long it took.
        took_ms: u128,
    },
    /// Memory was moved within the snapshot while the VM was paused, because its state left out memory that it had announced.
    MemoryMoved {
        /// How much.
        bytes: u64,
    },
    /// Such memory of the paused VM is stored.
    MemoryStored {
        /// Memory that was looked at while the VM was paused.
        read_bytes: u64,
        /// Memory that was written of it while the VM was paused.
        written_bytes: u64,
        /// How long it took.
        took_ms: u128,
    },
    /// The command of `--on-paused` begins; the source's VM is paused while it runs.
    CommandStarted {
        /// The command.
        command: &'a str,
        /// How long it may take.
        timeout_s: u64,
    },
    /// The command of `--on-paused` is over.
    CommandEnded {
        /// The command.
        command: &'a str,
        /// Whether it did what it was to do.
        succeeded: bool,
        /// How long the VM was paused for it.
        ran_ms: u128,
    },
    /// The snapshot is whole and safe on disk.
    Kept {
        /// The directory.
        into: &'a Path,
        /// What names the snapshot.
        digest: Digest,
        /// Whether the source was told to run its VM on.
        checkpoint: bool,
        /// Whether the source was told that it may end its VM; a checkpoint's never is.
        confirmed: bool,
        /// All bytes that came, framing and TLS included.
        received_bytes: u64,
        /// The VM's pass-through devices; `null` where the snapshot could not be read again to tell them.
        devices: Option<&'a [PassThrough]>,
    },
    /// A snapshot is on its way.
    Sending {
        /// Where the migration stands.
        phase: String,
        /// Pass over memory, from 1.
        round: u32,
        /// The VM's memory.
        ram_bytes: u64,
        /// Bytes handed to the connections.
        sent_bytes: u64,
        /// Memory that need not be sent: holes and zero pages.
        skipped_bytes: u64,
        /// Memory that the receiver lacks.
        left_bytes: u64,
        /// Bytes of memory per second.
        bytes_per_second: u64,
    },
    /// The receiver has the VM.
    Sent {
        /// Where it is.
        url: String,
        /// Bytes handed to the connections.
        sent_bytes: u64,
        /// Memory that was not sent: holes and zero pages.
        skipped_bytes: u64,
        /// Passes over memory.
        rounds: u32,
        /// From the first connection to the last answer.
        total_ms: u128,
    },
    /// The memory of a VM that is passed as descriptors is being filled.
    Filling {
        /// The VM's memory.
        ram_bytes: u64,
        /// Memory that was read from the snapshot and is not zero.
        filled_bytes: u64,
    },
    /// The receiver runs the VM, or holds it paused, and asks for its memory.
    HandedOver {
        /// Where it is.
        url: String,
        /// From the first connection on.
        took_ms: u128,
    },
    /// The receiver asks for memory on demand.
    Serving(Faults),
    /// The receiver has the VM, and its memory as descriptors.
    Passed {
        /// Where it is.
        url: String,
        /// The VM's memory.
        ram_bytes: u64,
        /// Memory of it that was read and written.
        filled_bytes: u64,
        /// From the first connection to the end.
        total_ms: u128,
        /// What was asked for on demand; `null` without that.
        faults: Option<Faults>,
    },
    /// The command failed.
    Failed {
        /// The class of the failure.
        class: Exit,
        /// Its exit status.
        exit: u8,
        /// What went wrong.
        message: &'a str,
    },
}

/// What became of memory that is asked for on demand.
#[derive(Debug, Serialize)]
pub(crate) struct Faults {
    /// The VM's memory.
    pub(crate) ram_bytes: u64,
    /// Memory that was asked for.
    pub(crate) asked_bytes: u64,
    /// Memory that is there and was not asked for yet.
    pub(crate) ahead_bytes: u64,
    /// Requests for a page that were answered.
    pub(crate) served: u64,
    /// Half of them were answered in so many microseconds.
    pub(crate) median_us: u128,
    /// All but a hundredth of them were.
    pub(crate) percentile_99_us: u128,
    /// Requests out of order: the guest waited for the page.
    pub(crate) jumps: u64,
    /// Half of those out of order were answered in so many microseconds.
    pub(crate) jump_median_us: u128,
    /// All but a hundredth of those out of order were.
    pub(crate) jump_percentile_99_us: u128,
    /// When the last page was in memory, from the first connection on.
    pub(crate) last_page_ms: Option<u128>,
}

impl Faults {
    pub(crate) fn of(progress: &LocalSendProgress) -> Self {
        let faults = &progress.faults;
        Self {
            ram_bytes: progress.ram_bytes,
            asked_bytes: faults.asked_bytes,
            ahead_bytes: faults.ahead_bytes,
            served: faults.served,
            median_us: faults.median.as_micros(),
            percentile_99_us: faults.percentile_99th.as_micros(),
            jumps: faults.jumps,
            jump_median_us: faults.jump_median.as_micros(),
            jump_percentile_99_us: faults.jump_99th.as_micros(),
            last_page_ms: faults.last_page.map(|at| at.as_millis()),
        }
    }
}
