// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What the demo tells: figures while it runs, and the report at its end.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// How far a migration is.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Progress {
    /// Round under way; the first copies all RAM.
    pub round: u32,
    /// Guest memory sent so far, in bytes.
    pub sent_bytes: u64,
    /// Guest memory the destination acknowledged, in bytes.
    pub acknowledged_bytes: u64,
    /// Guest memory the destination has without having been sent it, in bytes.
    pub skipped_bytes: u64,
    /// Guest memory and device state still to send, as of now.
    pub left_bytes: u64,
    /// Measured bandwidth; 0 while it is unknown.
    pub bytes_per_second: u64,
    /// How long the VM would stand still if it were switched over now.
    pub expected_downtime_ms: Option<u64>,
}

/// What the source measured of a migration that succeeded.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct MigrationFigures {
    /// Passes over memory.
    pub rounds: u32,
    /// Bytes of pages that were reported dirty at least once.
    pub unique_dirty_bytes: u64,
    /// Bytes of RAM left out of the first pass because nobody ever wrote them.
    pub skipped_hole_bytes: u64,
    /// Bytes of RAM left out of the first pass because they read zero.
    pub skipped_zero_bytes: u64,
    /// How long the VM stood still at the source.
    pub downtime_us: u64,
    /// What that was spent on, to the microsecond.
    pub downtime: DowntimeReport,
    /// The whole of it.
    pub total_us: u64,
    /// Who dirtied what.
    pub sources: Vec<SourceReport>,
    /// What moved of the devices.
    pub device: DeviceReport,
    /// Bytes of state that each device whose state streamed handed over once it was stopped, by its name.
    pub late_bytes: BTreeMap<String, u64>,
    /// What failed on the way.
    pub degradations: Vec<String>,
    /// That the downtime limit was exceeded, and what is to blame.
    pub remark: Option<String>,
}

/// What one source of dirty pages reported over the whole migration.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SourceReport {
    /// The source's name.
    pub id: String,
    /// Pages it reported, summed over all reports.
    pub pages: u64,
    /// Pages that no other source reported at the same time.
    pub exclusive_pages: u64,
}

/// What moved of the device itself.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct DeviceReport {
    /// Bytes of device state in all.
    pub state_bytes: u64,
    /// Bytes of it that were read while the device still ran.
    pub precopy_bytes: u64,
    /// How much of the downtime it took to read the others, beside the last pages.
    pub downtime_ms: f64,
}

/// What the downtime was spent on, in milliseconds; the parts add up to it.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct DowntimeReport {
    /// Pausing the vCPUs, and what of the VMM writes guest memory.
    pub pause_ms: f64,
    /// Stopping the devices.
    pub devices_stop_ms: f64,
    /// Asking every source once more.
    pub last_collect_ms: f64,
    /// Sending the last pages.
    pub last_pages_ms: f64,
    /// Reading what is left of the devices' state.
    pub devices_save_ms: f64,
    /// Capturing the VM's state.
    pub capture_ms: f64,
    /// Sending all state, and the destination taking it, but for what follows.
    pub state_ms: f64,
    /// The destination loading the devices' state.
    pub devices_load_ms: f64,
    /// Telling the destination to take over.
    pub complete_ms: f64,
    /// Running the destination's devices and vCPUs.
    pub resume_ms: f64,
}

impl DowntimeReport {
    /// Their names and milliseconds, in the order they come.
    pub fn parts(&self) -> [(&'static str, f64); 10] {
        [
            ("pause", self.pause_ms),
            ("devices stop", self.devices_stop_ms),
            ("last collect", self.last_collect_ms),
            ("last pages", self.last_pages_ms),
            ("devices save", self.devices_save_ms),
            ("capture", self.capture_ms),
            ("state", self.state_ms),
            ("devices load", self.devices_load_ms),
            ("complete", self.complete_ms),
            ("resume", self.resume_ms),
        ]
    }
}

/// The report of a demo; `--json` prints it as one object.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Report {
    /// Whether a real KVM guest moved.
    pub kvm: bool,
    /// Whether every page was equal at the switchover, and nothing wrong was found afterwards.
    pub verified: bool,
    /// Pages of both sides compared.
    pub pages_compared: u64,
    /// BLAKE3 of the source's RAM at the switchover.
    pub source_digest: String,
    /// BLAKE3 of the destination's RAM at the switchover.
    pub destination_digest: String,
    /// Bytes of guest RAM.
    pub ram_bytes: u64,
    /// Rounds, the first full one and the last one included.
    pub rounds: u32,
    /// Bytes the destination read from its sockets.
    pub bytes_sent: u64,
    /// Bytes of pages that were reported dirty at least once.
    pub unique_dirty_bytes: u64,
    /// Bytes of pages left out of the first round because nobody ever wrote them.
    pub skipped_hole_bytes: u64,
    /// Bytes of pages left out of the first round because they read zero.
    pub skipped_zero_bytes: u64,
    /// From pausing the source's vCPUs to running the destination's, the comparison left out.
    pub downtime_ms: f64,
    /// What that was spent on.
    pub downtime: DowntimeReport,
    /// From the start of the migration to the destination running, the comparison left out.
    pub total_ms: f64,
    /// Who dirtied what.
    pub sources: Vec<SourceReport>,
    /// What moved of the device itself.
    pub device: DeviceReport,
    /// First address where the two sides differed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub wrong_gpa: Option<u64>,
    /// Pages that differed.
    #[serde(skip_serializing_if = "is_zero")]
    pub wrong_pages: u64,
    /// Sources that failed on the way and were counted as having written all they cover.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub degradations: Vec<String>,
    /// Attempts, the ones that were made to fail included.
    pub attempts: u32,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde passes references")]
fn is_zero(count: &u64) -> bool {
    *count == 0
}
