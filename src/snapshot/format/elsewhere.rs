// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Memory that a snapshot leaves out, because it is in a file already.
//!
//! Cloud Hypervisor leaves the memory of a zone out of `memory-ranges` if the zone is a shared mapping of a named file. If all zones
//! are, there is no `memory-ranges`.

use std::collections::BTreeMap;
use std::fmt;

use serde::Serialize;

use super::config::{VmConfig, ZoneFile};
use super::state::VmState;
use crate::range::{GpaRange, united};

/// A memory zone that a snapshot leaves out, or part of one; prints as a [`ZoneFile`] does.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct LeftOut {
    /// The zone's id; `None` is RAM that the state assigns to no zone.
    pub zone: Option<String>,
    /// The file that holds it; `None` where the configuration names none.
    pub file: Option<String>,
}

/// Control characters are escaped.
impl fmt::Display for LeftOut {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.zone {
            Some(zone) => write!(f, "memory zone {}", zone.escape_debug())?,
            None => write!(f, "memory of no zone")?,
        }
        match &self.file {
            Some(file) => write!(f, " is in {}", file.escape_debug()),
            None => write!(f, " is in a file that the configuration does not name"),
        }
    }
}

/// The memory that a snapshot leaves out; prints as its zones do, one after the other.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize)]
#[serde(transparent)]
pub struct Elsewhere {
    zones: Vec<LeftOut>,
}

impl Elsewhere {
    /// Finds the zones whose memory `state` does not list; `config`, which anybody may edit, only names their files.
    ///
    /// A zone that shares a file, according to `config`, counts as left out if the state does not mention it: Cloud Hypervisor leaves such
    /// zones out.
    pub fn of(config: &VmConfig, state: &VmState) -> Self {
        // Ranges that touch are one, so that memory that is listed is in one of them.
        let listed = united(state.memory().ranges());
        let mut is_listed = BTreeMap::new();
        for (zone, range) in state.fixed_ram() {
            *is_listed.entry(zone).or_insert(true) &= holds(&listed, range);
        }
        let mut left_out: BTreeMap<_, Option<&str>> =
            is_listed.iter().filter(|&(_, listed)| !listed).map(|(&zone, _)| (zone, None)).collect();
        let unknown = config.shared_files().iter().map(|shared| Some(shared.zone.as_str()));
        left_out.extend(unknown.filter(|zone| !is_listed.contains_key(zone)).map(|zone| (zone, None)));
        for ZoneFile { zone, file } in config.file_zones() {
            left_out.entry(Some(zone)).and_modify(|known| *known = Some(file));
        }
        let owned = |text: Option<&str>| text.map(str::to_owned);
        let zones = left_out.into_iter().map(|(zone, file)| LeftOut { zone: owned(zone), file: owned(file) });
        Self { zones: zones.collect() }
    }

    /// Whether all of the memory is in the snapshot.
    pub fn is_empty(&self) -> bool {
        self.zones.is_empty()
    }

    /// The end of a sentence that says that there is no memory: where the memory is, if that is known.
    pub(crate) fn as_reason(&self) -> String {
        if self.is_empty() { String::new() } else { format!(": {self}") }
    }

    /// The zones and their files.
    pub fn zones(&self) -> &[LeftOut] {
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

/// Whether one of `united`, ascending, has all of `range`.
fn holds(united: &[GpaRange], range: GpaRange) -> bool {
    let last = united.partition_point(|other| other.start() <= range.start());
    last.checked_sub(1).is_some_and(|last| united[last].end() >= range.end())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::snapshot::SnapshotLimits;

    const CONFIG: &str = r#"{"memory":{"size":0,"zones":[
        {"id":"anonymous","size":65536},
        {"id":"private","size":65536,"file":"/private"},
        {"id":"shared","size":65536,"file":"/shared","shared":true},
        {"id":"folder","size":65536,"file":"/folder","shared":true},
        {"id":"unknown","size":65536,"file":"/unknown","shared":true}]}}"#;

    fn state(manager: &str) -> VmState {
        let quoted = serde_json::to_string(manager).unwrap();
        let state = format!(
            r#"{{"snapshots":{{"memory-manager":{{"snapshots":{{}},"snapshot_data":{{"state":{quoted}}}}}}},"snapshot_data":null}}"#
        );
        VmState::parse(state.into_bytes(), &SnapshotLimits::default()).unwrap()
    }

    fn mapping(gpa: u64, size: u64, zone: &str) -> String {
        format!(
            r#"{{"slot":0,"gpa":{gpa},"size":{size},"zone_id":{zone},"virtio_mem":false,"file_offset":0}}"#
        )
    }

    #[test]
    fn c50_a_zone_is_elsewhere_that_shares_a_file_and_is_not_listed() {
        let zones = ["anonymous", "private", "shared", "folder"].map(|zone| format!("{zone:?}"));
        let mappings: Vec<_> =
            (0..).step_by(65536).zip(&zones).map(|(gpa, zone)| mapping(gpa, 65536, zone)).collect();
        let state = state(&format!(
            r#"{{"memory_ranges":{{"data":[{{"gpa":0,"length":131072}},{{"gpa":196608,"length":65536}}]}},"guest_ram_mappings":[{}]}}"#,
            mappings.join(",")
        ));
        let of = |config: &str| {
            Elsewhere::of(&VmConfig::parse(config.as_bytes(), &SnapshotLimits::default()).unwrap(), &state)
        };
        assert_eq!(
            of(CONFIG).to_string(),
            "memory zone shared is in /shared, memory zone unknown is in /unknown"
        );
        assert_eq!(of(CONFIG).zones()[0].file.as_deref(), Some("/shared"));
        // Whatever somebody makes of the configuration since, the memory is not there.
        let unshared = CONFIG.replace(r#""/shared","shared":true"#, r#""/shared","shared":false"#);
        assert_eq!(of(&unshared), of(CONFIG));
        assert_eq!(
            of(r#"{"memory":{"size":65536}}"#).to_string(),
            "memory zone shared is in a file that the configuration does not name"
        );
    }

    #[test]
    fn c50_memory_of_no_zone_and_parts_of_a_zone_are_missed_and_what_is_plugged_is_not() {
        let plugged = mapping(1 << 20, 1 << 20, r#""plugged""#).replace("false", "true");
        let mappings = [mapping(0, 8192, r#""half""#), mapping(65536, 4096, "null"), plugged].join(",");
        let state = state(&format!(
            r#"{{"memory_ranges":{{"data":[{{"gpa":0,"length":4096}}]}},"guest_ram_mappings":[{mappings}]}}"#
        ));
        let config = VmConfig::parse(br#"{"memory":{"size":0}}"#, &SnapshotLimits::default()).unwrap();
        assert_eq!(
            Elsewhere::of(&config, &state).to_string(),
            "memory of no zone is in a file that the configuration does not name, \
             memory zone half is in a file that the configuration does not name"
        );
    }

    #[test]
    fn sixty_thousand_zones_mappings_and_ranges_are_matched_in_seconds() {
        let many = 0..1u64 << 16;
        let ids: Vec<_> = many.clone().map(|zone| format!(r#""z{zone}""#)).collect();
        let zones: Vec<_> =
            ids.iter().map(|id| format!(r#"{{"id":{id},"size":0,"file":"/z","shared":true}}"#)).collect();
        let config = format!(r#"{{"memory":{{"size":0,"zones":[{}]}}}}"#, zones.join(","));
        // Each mapping is all of the memory, which is in pieces.
        let mappings: Vec<_> = ids.iter().map(|id| mapping(0, 1 << 30, id)).collect();
        let ranges: Vec<_> = many.map(|at| format!(r#"{{"gpa":{},"length":4096}}"#, at << 13)).collect();
        let state = state(&format!(
            r#"{{"memory_ranges":{{"data":[{}]}},"guest_ram_mappings":[{}]}}"#,
            ranges.join(","),
            mappings.join(",")
        ));
        let config = VmConfig::parse(config.as_bytes(), &SnapshotLimits::default()).unwrap();
        let begun = std::time::Instant::now();
        assert_eq!(Elsewhere::of(&config, &state).zones().len(), 1 << 16);
        assert!(begun.elapsed().as_secs() < 10, "{:?}", begun.elapsed());
    }
}
