// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What a snapshot reads of Cloud Hypervisor's JSON, and how it is put together again.
//!
//! Only what is needed is looked at; everything else passes through unread and unchanged.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;
use thiserror::Error;
use vm_migration::{MigratableError, Snapshot, SnapshotData, state_from_id};

use super::limits::Limits;
use super::placement::{Placement, PlacementError};
use crate::layout::{Layout, LayoutError};
use crate::range::{GpaRange, RangeError};

const MEMORY_MANAGER: &str = "memory-manager";
const MEMORY_RANGES: &str = "memory_ranges";

/// Why a JSON document is not one that Cloud Hypervisor wrote.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum DocumentError {
    /// The text is no JSON, or lacks a field.
    #[error("Cannot read {document}, which another version may have written")]
    Json {
        /// `config.json`, `state.json` or `Config message`.
        document: &'static str,
        /// Where and why.
        source: serde_json::Error,
    },
    /// The document is larger than anything expected.
    #[error("{document} has {bytes} bytes, the limit is {limit}")]
    TooLarge {
        /// The document.
        document: &'static str,
        /// Bytes it has.
        bytes: u64,
        /// The limit.
        limit: u64,
    },
    /// The state tree lacks a component, or it is of another shape.
    #[error("Cannot read state of {component} in state.json, which another version may have written")]
    State {
        /// The component.
        component: &'static str,
        /// Why.
        source: MigratableError,
    },
    /// The state tree has no such component.
    #[error("state.json holds no state of {component}")]
    NoState {
        /// The component.
        component: &'static str,
    },
    /// The memory ranges are impossible.
    #[error("{document} lists impossible memory ranges")]
    Ranges {
        /// The document.
        document: &'static str,
        /// What is wrong with them.
        source: PlacementError,
    },
    /// A RAM mapping that is no range.
    #[error("RAM mapping {index} of the Config message is no range")]
    Mapping {
        /// Position in `guest_ram_mappings`.
        index: usize,
        /// What is wrong with it.
        source: RangeError,
    },
    /// The RAM mappings are no layout.
    #[error("RAM mappings of the Config message are impossible")]
    Layout(#[from] LayoutError),
}

fn json(document: &'static str) -> impl FnOnce(serde_json::Error) -> DocumentError {
    move |source| DocumentError::Json { document, source }
}

fn within(document: &'static str, text: &[u8], limit: u64) -> Result<(), DocumentError> {
    let bytes = text.len() as u64;
    if bytes <= limit { Ok(()) } else { Err(DocumentError::TooLarge { document, bytes, limit }) }
}

type Fields = BTreeMap<String, Box<RawValue>>;

#[derive(Deserialize)]
struct VmConfigFields {
    memory: MemoryConfig,
    #[serde(default)]
    disks: Option<Vec<DiskConfig>>,
    #[serde(default)]
    pmem: Option<Vec<PmemConfig>>,
    #[serde(default)]
    vdpa: Option<Vec<VdpaConfig>>,
}

#[derive(Deserialize)]
struct MemoryConfig {
    size: u64,
    #[serde(default)]
    zones: Option<Vec<ZoneConfig>>,
}

#[derive(Deserialize)]
struct ZoneConfig {
    id: String,
    #[serde(default)]
    file: Option<String>,
    #[serde(default)]
    shared: bool,
}

#[derive(Deserialize)]
struct DiskConfig {
    #[serde(default)]
    path: Option<String>,
    #[serde(default)]
    vhost_socket: Option<String>,
    #[serde(default)]
    readonly: bool,
}

#[derive(Deserialize)]
struct PmemConfig {
    file: String,
    #[serde(default)]
    discard_writes: bool,
}

#[derive(Deserialize)]
struct VdpaConfig {
    path: String,
}

/// `config.json`: the VM's configuration.
#[derive(Debug, Clone)]
pub struct VmConfig {
    text: Box<RawValue>,
    memory_bytes: u64,
    writable_disks: Vec<String>,
    vdpa: Vec<String>,
    file_zones: Vec<String>,
    shared_file_zones: Vec<String>,
}

impl VmConfig {
    /// Reads the text of `config.json`.
    ///
    /// # Errors
    /// It is not the configuration of a VM, or exceeds `limits`.
    pub fn parse(text: &[u8], limits: &Limits) -> Result<Self, DocumentError> {
        within("config.json", text, limits.config_bytes)?;
        Self::from_raw(serde_json::from_slice(text).map_err(json("config.json"))?)
    }

    fn from_raw(text: Box<RawValue>) -> Result<Self, DocumentError> {
        let fields: VmConfigFields = serde_json::from_str(text.get()).map_err(json("config.json"))?;
        let disks = fields.disks.unwrap_or_default().into_iter().filter(|disk| !disk.readonly);
        let disks = disks.map(|disk| disk.path.or(disk.vhost_socket).unwrap_or_default());
        let pmem = fields.pmem.unwrap_or_default().into_iter().filter(|pmem| !pmem.discard_writes);
        let mut file_zones = fields.memory.zones.unwrap_or_default();
        file_zones.retain(|zone| zone.file.is_some());
        let shared = file_zones.iter().filter(|zone| zone.shared);
        Ok(Self {
            text,
            memory_bytes: fields.memory.size,
            writable_disks: disks.chain(pmem.map(|pmem| pmem.file)).collect(),
            vdpa: fields.vdpa.unwrap_or_default().into_iter().map(|vdpa| vdpa.path).collect(),
            shared_file_zones: shared.map(|zone| zone.id.clone()).collect(),
            file_zones: file_zones.into_iter().map(|zone| zone.id).collect(),
        })
    }

    /// The JSON text.
    pub fn text(&self) -> &str {
        self.text.get()
    }

    /// Bytes of RAM that the configuration gives the VM outside its memory zones.
    pub fn memory_bytes(&self) -> u64 {
        self.memory_bytes
    }

    /// Paths of the disks, persistent memory included, that the guest can write.
    pub fn writable_disks(&self) -> &[String] {
        &self.writable_disks
    }

    /// Paths of the vDPA devices, which stay suspended when a migration fails.
    pub fn vdpa(&self) -> &[String] {
        &self.vdpa
    }

    /// Ids of the memory zones that are mappings of a named file, shared or not: there a new VM finds what the file holds.
    pub fn file_zones(&self) -> &[String] {
        &self.file_zones
    }

    /// Ids of the memory zones that are shared mappings of a named file, which snapshots leave out.
    pub fn shared_file_zones(&self) -> &[String] {
        &self.shared_file_zones
    }
}

#[derive(Deserialize)]
struct ConfigFields {
    vm_config: Box<RawValue>,
    memory_manager_data: MemoryManagerConfig,
}

#[derive(Deserialize)]
struct MemoryManagerConfig {
    guest_ram_mappings: Vec<RamMapping>,
}

#[derive(Deserialize)]
struct RamMapping {
    gpa: u64,
    size: u64,
    virtio_mem: bool,
}

/// A Config message: what a source says of its VM before any page.
#[derive(Debug, Clone)]
pub struct ConfigMessage {
    vm_config: VmConfig,
    layout: Layout,
    hotpluggable: Vec<GpaRange>,
}

impl ConfigMessage {
    /// Reads the payload of a Config message.
    ///
    /// # Errors
    /// It is not that of Cloud Hypervisor, exceeds `limits`, or its RAM mappings are impossible.
    pub fn parse(payload: &[u8], limits: &Limits) -> Result<Self, DocumentError> {
        within("Config message", payload, limits.config_bytes)?;
        let fields: ConfigFields = serde_json::from_slice(payload).map_err(json("Config message"))?;
        let mappings = fields.memory_manager_data.guest_ram_mappings;
        let (mut ram, mut hotpluggable) = (Vec::new(), Vec::new());
        for (index, mapping) in mappings.iter().enumerate() {
            let range = GpaRange::new(mapping.gpa, mapping.size)
                .map_err(|source| DocumentError::Mapping { index, source })?;
            ram.push(range);
            hotpluggable.extend(mapping.virtio_mem.then_some(range));
        }
        Placement::new(ram.iter().copied(), limits)
            .map_err(|source| DocumentError::Ranges { document: "Config message", source })?;
        let layout = Layout::new(ram, crate::granule::Granule::host_page())?;
        Ok(Self { vm_config: VmConfig::from_raw(fields.vm_config)?, layout, hotpluggable })
    }

    /// The VM's configuration.
    pub fn vm_config(&self) -> &VmConfig {
        &self.vm_config
    }

    /// The VM's RAM: all that may become `memory-ranges`.
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// Parts of the RAM that virtio-mem devices plug and unplug; the state lists what is plugged.
    pub fn hotpluggable(&self) -> &[GpaRange] {
        &self.hotpluggable
    }
}

#[derive(Deserialize)]
struct RawTable {
    data: Vec<RawRange>,
}

#[derive(Serialize)]
struct TableOut {
    data: Vec<RawRange>,
}

#[derive(Serialize, Deserialize)]
struct RawRange {
    gpa: u64,
    length: u64,
}

#[derive(Deserialize)]
struct MemoryManagerState {
    memory_ranges: RawTable,
}

#[derive(Deserialize)]
struct RootState {
    #[serde(default)]
    common_cpuid: Option<Box<RawValue>>,
}

#[derive(Serialize)]
struct ConfigOut<'a> {
    vm_config: &'a RawValue,
    #[serde(skip_serializing_if = "Option::is_none")]
    common_cpuid: Option<Box<RawValue>>,
    memory_manager_data: Fields,
}

/// `state.json`: the tree of the VM's state, which lists the memory ranges.
#[derive(Clone)]
pub struct VmState {
    text: Vec<u8>,
    tree: Snapshot,
    memory: Placement,
}

impl VmState {
    /// Reads the text of `state.json`.
    ///
    /// # Errors
    /// It is not the state of a VM, exceeds `limits`, or its memory ranges are impossible.
    pub fn parse(text: Vec<u8>, limits: &Limits) -> Result<Self, DocumentError> {
        within("state.json", &text, limits.state_bytes)?;
        let tree: Snapshot = serde_json::from_slice(&text).map_err(json("state.json"))?;
        let state: MemoryManagerState = memory_manager(&tree)?;
        let pairs = state.memory_ranges.data.iter().map(|range| (range.gpa, range.length));
        let memory = Placement::from_pairs(pairs, limits)
            .map_err(|source| DocumentError::Ranges { document: "state.json", source })?;
        Ok(Self { text, tree, memory })
    }

    /// The JSON text.
    pub fn text(&self) -> &[u8] {
        &self.text
    }

    /// The tree.
    pub fn tree(&self) -> &Snapshot {
        &self.tree
    }

    /// Where the memory ranges lie in `memory-ranges`.
    pub fn memory(&self) -> &Placement {
        &self.memory
    }

    /// Lists the memory ranges in the order and pieces of `memory`, whatever they were before.
    pub(super) fn relist(mut self, memory: &Placement) -> Result<Self, DocumentError> {
        if self.memory.ranges().eq(memory.ranges()) {
            return Ok(self);
        }
        let mut fields: Fields = memory_manager(&self.tree)?;
        fields.insert(MEMORY_RANGES.to_owned(), raw(&table(memory.ranges()))?);
        let data = SnapshotData::new_from_state(&fields)
            .map_err(|source| DocumentError::State { component: MEMORY_MANAGER, source })?;
        if let Some(child) = self.tree.snapshots.get_mut(MEMORY_MANAGER) {
            child.snapshot_data = Some(data);
        }
        self.text = serde_json::to_vec(&self.tree).map_err(json("state.json"))?;
        self.memory = memory.clone();
        Ok(self)
    }

    /// Makes the payload of the Config message of a VM with this state and `config`.
    ///
    /// # Errors
    /// The state lacks what the message needs.
    pub fn config_message(&self, config: &VmConfig) -> Result<Vec<u8>, DocumentError> {
        let mut memory_manager_data: Fields = memory_manager(&self.tree)?;
        memory_manager_data.insert(MEMORY_RANGES.to_owned(), raw(&table([]))?);
        let root: RootState =
            self.tree.to_state().map_err(|source| DocumentError::State { component: "the VM", source })?;
        let message =
            ConfigOut { vm_config: &config.text, common_cpuid: root.common_cpuid, memory_manager_data };
        serde_json::to_vec(&message).map_err(json("Config message"))
    }
}

impl std::fmt::Debug for VmState {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("VmState").field("bytes", &self.text.len()).field("memory", &self.memory).finish()
    }
}

fn memory_manager<'a, T: Deserialize<'a>>(tree: &'a Snapshot) -> Result<T, DocumentError> {
    state_from_id(Some(tree), MEMORY_MANAGER)
        .map_err(|source| DocumentError::State { component: MEMORY_MANAGER, source })?
        .ok_or(DocumentError::NoState { component: MEMORY_MANAGER })
}

fn table(ranges: impl IntoIterator<Item = GpaRange>) -> TableOut {
    let entry = |range: GpaRange| RawRange { gpa: range.start(), length: range.len() };
    TableOut { data: ranges.into_iter().map(entry).collect() }
}

fn raw(value: &TableOut) -> Result<Box<RawValue>, DocumentError> {
    serde_json::value::to_raw_value(value).map_err(json("state.json"))
}
