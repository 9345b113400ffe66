// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The Config message: what a source says of its VM before any page.

use serde::Deserialize;
use serde_json::value::RawValue;

use super::config::VmConfig;
use super::error::{ENTRIES, FormatError, json, ranges, within};
use super::limits::SnapshotLimits;
use super::list::AtMost;
use super::placement::Placement;
use crate::granule::Granule;
use crate::layout::Layout;
use crate::range::GpaRange;

#[derive(Deserialize)]
struct ConfigFields {
    vm_config: Box<RawValue>,
    memory_manager_data: MemoryManagerConfig,
}

#[derive(Deserialize)]
struct MemoryManagerConfig {
    guest_ram_mappings: AtMost<ENTRIES, RamMapping>,
}

#[derive(Deserialize)]
struct RamMapping {
    #[serde(default)]
    slot: u32,
    gpa: u64,
    size: u64,
    virtio_mem: bool,
    #[serde(default)]
    file_offset: u64,
}

/// Where a part of the RAM is in the descriptor of its slot.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct RamSlot {
    /// Its number.
    pub(crate) slot: u32,
    /// The RAM.
    pub(crate) range: GpaRange,
    /// Where that begins in the descriptor.
    pub(crate) offset: u64,
}

/// A Config message: what a source says of its VM before any page.
#[derive(Debug, Clone)]
pub struct ConfigMessage {
    vm_config: VmConfig,
    layout: Layout,
    hotpluggable: Vec<GpaRange>,
    slots: Vec<RamSlot>,
}

impl ConfigMessage {
    /// Reads the payload of a Config message: Cloud Hypervisor's, or another VMM's with these fields.
    ///
    /// ```
    /// use vfio_migration::snapshot::{ConfigMessage, SnapshotLimits, VmState};
    /// use vm_migration::Snapshot;
    /// let mappings = r#""guest_ram_mappings":[{"gpa":0,"size":1048576,"virtio_mem":false}]"#;
    /// let config = format!(r#"{{"vm_config":{{"memory":{{"size":1048576}}}},"memory_manager_data":{{{mappings}}}}}"#);
    /// let config = ConfigMessage::parse(config.as_bytes(), &SnapshotLimits::default())?;
    /// assert_eq!(config.layout().bytes(), 1 << 20);
    ///
    /// // A State with which such a VM is received into a snapshot, and sent from it.
    /// let memory = format!(r#"{{{mappings},"memory_ranges":{{"data":[{{"gpa":0,"length":1048576}}]}}}}"#);
    /// let mut state = Snapshot::new_from_state(&serde_json::json!({}))?;
    /// let memory: serde_json::Value = serde_json::from_str(&memory)?;
    /// state.add_snapshot("memory-manager".into(), Snapshot::new_from_state(&memory)?);
    /// let state = VmState::parse(serde_json::to_vec(&state)?, &SnapshotLimits::default())?;
    /// let sent = state.config_message(config.vm_config())?;
    /// assert_eq!(ConfigMessage::parse(&sent, &SnapshotLimits::default())?.layout(), config.layout());
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    /// A field is missing or of another shape, the text exceeds `limits`, or its RAM mappings are impossible.
    pub fn parse(payload: &[u8], limits: &SnapshotLimits) -> Result<Self, FormatError> {
        within("Config message", payload.len(), limits.config_bytes)?;
        let fields: ConfigFields = serde_json::from_slice(payload).map_err(json("Config message"))?;
        let mappings = fields.memory_manager_data.guest_ram_mappings;
        let (mut ram, mut hotpluggable, mut slots) = (Vec::new(), Vec::new(), Vec::new());
        for (index, mapping) in mappings.iter().enumerate() {
            let range = GpaRange::new(mapping.gpa, mapping.size)
                .map_err(|source| FormatError::Mapping { index, source })?;
            ram.push(range);
            slots.push(RamSlot { slot: mapping.slot, range, offset: mapping.file_offset });
            hotpluggable.extend(mapping.virtio_mem.then_some(range));
        }
        Placement::new(ram.iter().copied(), limits).map_err(ranges("Config message"))?;
        let layout = Layout::new(ram, Granule::host_page())?;
        Ok(Self { vm_config: VmConfig::from_raw(fields.vm_config)?, layout, hotpluggable, slots })
    }

    /// The VM's configuration.
    pub fn vm_config(&self) -> &VmConfig {
        &self.vm_config
    }

    /// The VM's RAM: all that may become `memory-ranges`.
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// The RAM as it is in descriptors.
    pub(crate) fn slots(&self) -> &[RamSlot] {
        &self.slots
    }

    /// Parts of the RAM that virtio-mem devices plug and unplug; the state lists what is plugged.
    pub fn hotpluggable(&self) -> &[GpaRange] {
        &self.hotpluggable
    }
}
