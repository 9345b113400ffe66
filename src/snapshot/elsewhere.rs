// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Memory that is in no snapshot, because it is in a file of its own already.
//!
//! Cloud Hypervisor leaves the memory of a zone out of `memory-ranges` where the zone is a shared mapping of a named file. Where
//! all zones are, there is no `memory-ranges`.

use std::fmt;

use serde::Serialize;

use super::document::VmConfig;
use super::state::VmState;

/// A memory zone that shares a file, which holds its memory; prints as "memory zone ID is in FILE".
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct ZoneFile {
    /// The zone's id.
    pub zone: String,
    /// The file, as the configuration calls it.
    pub file: String,
}

/// With nothing in it that a terminal obeys.
impl fmt::Display for ZoneFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "memory zone {} is in {}", self.zone.escape_debug(), self.file.escape_debug())
    }
}

/// The memory that a snapshot leaves out; prints as its zones do, one after the other.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize)]
#[serde(transparent)]
pub struct Elsewhere {
    zones: Vec<ZoneFile>,
}

impl Elsewhere {
    /// Finds the zones of `config` that share a file and whose memory `state` does not list.
    ///
    /// A zone that the state says nothing of counts as left out: so does who writes the state.
    pub fn of(config: &VmConfig, state: &VmState) -> Self {
        let is_listed = |zone: &str| {
            let mut ranges = state.zone_ranges(zone).peekable();
            ranges.peek().is_some() && ranges.all(|range| state.memory().holds(range))
        };
        let left_out = config.shared_files().iter().filter(|found| !is_listed(&found.zone));
        Self { zones: left_out.cloned().collect() }
    }

    /// Whether all of the memory is in the snapshot.
    pub fn is_empty(&self) -> bool {
        self.zones.is_empty()
    }

    /// The zones and their files.
    pub fn zones(&self) -> &[ZoneFile] {
        &self.zones
    }
}

impl fmt::Display for Elsewhere {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, zone) in self.zones.iter().enumerate() {
            let separator = if index == 0 { "" } else { ", " };
            write!(f, "{separator}{zone}")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::snapshot::Limits;

    const CONFIG: &str = r#"{"memory":{"size":0,"zones":[
        {"id":"anonymous","size":65536},
        {"id":"private","size":65536,"file":"/private"},
        {"id":"shared","size":65536,"file":"/shared","shared":true},
        {"id":"folder","size":65536,"file":"/folder","shared":true},
        {"id":"unknown","size":65536,"file":"/unknown","shared":true}]}}"#;

    #[test]
    fn c50_a_zone_is_elsewhere_that_shares_a_file_and_is_not_listed() {
        let config = VmConfig::parse(CONFIG.as_bytes(), &Limits::default()).unwrap();
        let mapping = |gpa: u64, zone: &str| {
            format!(
                r#"{{"slot":0,"gpa":{gpa},"size":65536,"zone_id":"{zone}","virtio_mem":false,"file_offset":0}}"#
            )
        };
        let zones = ["anonymous", "private", "shared", "folder"];
        let mappings: Vec<_> =
            (0..).step_by(65536).zip(zones).map(|(gpa, zone)| mapping(gpa, zone)).collect();
        let manager = format!(
            r#"{{"memory_ranges":{{"data":[{{"gpa":0,"length":131072}},{{"gpa":196608,"length":65536}}]}},"guest_ram_mappings":[{}]}}"#,
            mappings.join(",")
        );
        let quoted = serde_json::to_string(&manager).unwrap();
        let state = format!(
            r#"{{"snapshots":{{"memory-manager":{{"snapshots":{{}},"snapshot_data":{{"state":{quoted}}}}}}},"snapshot_data":null}}"#
        );
        let state = VmState::parse(state.into_bytes(), &Limits::default()).unwrap();
        let elsewhere = Elsewhere::of(&config, &state);
        assert_eq!(
            elsewhere.to_string(),
            "memory zone shared is in /shared, memory zone unknown is in /unknown"
        );
        assert_eq!(elsewhere.zones()[0].file, "/shared");
    }
}
