// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! `state.json`, kept as text.

use std::ops::Range;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;

use super::config::VmConfig;
use super::error::{ENTRIES, FormatError, json, ranges, within};
use super::limits::SnapshotLimits;
use super::list::AtMost;
use super::passthrough::{self, PassThrough};
use super::placement::Placement;
use super::tree::{MEMORY_MANAGER, Quoted, Tree, place};
use crate::range::GpaRange;

/// The root of the tree, as errors call it.
const VM: &str = "the VM";

/// `state.json`: the tree of the VM's state, which lists the memory ranges.
///
/// Takes as much memory as its text has bytes, and a clone of it takes none.
#[derive(Clone)]
pub struct VmState {
    text: Arc<String>,
    memory_manager: Range<usize>,
    own: Option<Range<usize>>,
    memory: Placement,
    /// RAM that stays, with the memory zone that it belongs to.
    fixed_ram: Vec<FixedRam>,
}

/// RAM that stays, with the memory zone that it belongs to.
type FixedRam = (Option<String>, GpaRange);

impl VmState {
    /// Reads the text of `state.json`.
    ///
    /// # Errors
    /// It is not the state of a VM, exceeds `limits`, or its memory ranges are impossible.
    pub fn parse(text: Vec<u8>, limits: &SnapshotLimits) -> Result<Self, FormatError> {
        within("state.json", text.len(), limits.state_bytes)?;
        let text = String::from_utf8(text)
            .map_err(|error| FormatError::Utf8 { document: "state.json", source: error.utf8_error() })?;
        let tree = Tree::read(&text).map_err(json("state.json"))?;
        let memory_manager = tree.memory_manager().ok_or_else(no_state(MEMORY_MANAGER))?;
        // As in a Config message, which is made of these two.
        within("Memory manager's state in state.json", memory_manager.len(), limits.config_bytes)?;
        within("VM's own state in state.json", tree.own().map_or(0, Quoted::len), limits.config_bytes)?;
        let (memory, fixed_ram) = listed_memory(memory_manager, limits)?;
        let memory_manager = memory_manager.place_in(&text);
        let own = tree.own().map(|own| own.place_in(&text));
        Ok(Self { text: Arc::new(text), memory_manager, own, memory, fixed_ram })
    }

    /// The JSON text.
    pub fn text(&self) -> &[u8] {
        self.text.as_bytes()
    }

    /// The JSON text, to be shared.
    pub(crate) fn shared_text(&self) -> Arc<String> {
        Arc::clone(&self.text)
    }

    /// Where the memory ranges lie in `memory-ranges`.
    pub fn memory(&self) -> &Placement {
        &self.memory
    }

    /// The pass-through devices of a VM with this state and `config`, and how large the saved state of each is.
    ///
    /// # Errors
    /// The state of a device is of another shape.
    pub fn devices(&self, config: &VmConfig) -> Result<Vec<PassThrough>, FormatError> {
        let mut devices = config.devices().to_vec();
        passthrough::measure(&mut devices, &self.text)?;
        Ok(devices)
    }

    /// The RAM with the memory zone of each part, whether or not a snapshot holds it; but for what a virtio-mem device plugs and
    /// unplugs.
    pub(crate) fn fixed_ram(&self) -> impl Iterator<Item = (Option<&str>, GpaRange)> {
        self.fixed_ram.iter().map(|(zone, range)| (zone.as_deref(), *range))
    }

    /// Lists the memory ranges in the order and pieces of `memory`; nothing else changes.
    pub(crate) fn relist(mut self, memory: &Placement) -> Result<Self, FormatError> {
        if self.memory.ranges().eq(memory.ranges()) {
            return Ok(self);
        }
        let manager = self.memory_manager_listing(memory.ranges())?;
        let manager = serde_json::to_string(&manager).map_err(wrong(MEMORY_MANAGER))?;
        self.replace_memory_manager(&manager);
        self.memory = memory.clone();
        Ok(self)
    }

    /// Replaces the JSON string that is the memory manager's state.
    fn replace_memory_manager(&mut self, quoted: &str) {
        let old = self.memory_manager.clone();
        let text = Arc::make_mut(&mut self.text);
        text.reserve_exact(quoted.len().saturating_sub(old.len()));
        text.replace_range(old.clone(), quoted);
        self.memory_manager.end = old.start + quoted.len();
        if let Some(own) = &mut self.own
            && own.start >= old.end
        {
            let moved = |at: usize| at - old.len() + quoted.len();
            *own = moved(own.start)..moved(own.end);
        }
    }

    /// Makes the payload of the Config message of a VM with this state and `config`.
    ///
    /// # Errors
    /// The state lacks what the message needs.
    pub fn config_message(&self, config: &VmConfig) -> Result<Vec<u8>, FormatError> {
        let manager = self.memory_manager_listing([])?;
        let manager: &RawValue = serde_json::from_str(&manager).map_err(wrong(MEMORY_MANAGER))?;
        let own = self.own.clone().ok_or_else(no_state(VM))?;
        let own = Quoted::at(&self.text, own).unquote().map_err(wrong(VM))?;
        let own: OwnState<'_> = serde_json::from_str(&own).map_err(wrong(VM))?;
        let message = ConfigOut {
            vm_config: config.raw(),
            common_cpuid: own.common_cpuid,
            memory_manager_data: manager,
        };
        serde_json::to_vec(&message).map_err(json("Config message"))
    }

    /// Returns the memory manager's state with another list of memory ranges.
    fn memory_manager_listing(
        &self,
        ranges: impl IntoIterator<Item = GpaRange>,
    ) -> Result<String, FormatError> {
        let mut state =
            Quoted::at(&self.text, self.memory_manager.clone()).unquote().map_err(wrong(MEMORY_MANAGER))?;
        let listing: Listing<'_> = serde_json::from_str(&state).map_err(wrong(MEMORY_MANAGER))?;
        let listing = place(listing.memory_ranges.get(), &state);
        let entry = |range: GpaRange| RawRange { gpa: range.start(), length: range.len() };
        let table = Table { data: ranges.into_iter().map(entry).collect() };
        let table = serde_json::to_string(&table).map_err(wrong(MEMORY_MANAGER))?;
        state.replace_range(listing, &table);
        Ok(state)
    }
}

impl std::fmt::Debug for VmState {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("VmState").field("bytes", &self.text.len()).field("memory", &self.memory).finish()
    }
}

/// Reads the memory ranges out of the memory manager's state, and the RAM that stays.
fn listed_memory(
    memory_manager: Quoted<'_>,
    limits: &SnapshotLimits,
) -> Result<(Placement, Vec<FixedRam>), FormatError> {
    let text = memory_manager.unquote().map_err(wrong(MEMORY_MANAGER))?;
    let state: MemoryManagerState = serde_json::from_str(&text).map_err(wrong(MEMORY_MANAGER))?;
    let pairs = state.memory_ranges.data.iter().map(|range| (range.gpa, range.length));
    let memory = Placement::from_pairs(pairs, limits).map_err(ranges("state.json"))?;
    Ok((memory, fixed_ram(&text)))
}

/// Reads the RAM that stays, and its zones, out of the memory manager's state; none if the state has another shape.
fn fixed_ram(memory_manager: &str) -> Vec<FixedRam> {
    let mappings: Mappings = serde_json::from_str(memory_manager).unwrap_or_default();
    let fixed = mappings.guest_ram_mappings.into_iter().filter(|mapping| !mapping.virtio_mem);
    fixed
        .filter_map(|mapping| Some((mapping.zone_id, GpaRange::new(mapping.gpa, mapping.size).ok()?)))
        .collect()
}

fn wrong(component: &'static str) -> impl FnOnce(serde_json::Error) -> FormatError {
    move |source| FormatError::State { component, source }
}

fn no_state(component: &'static str) -> impl FnOnce() -> FormatError {
    move || FormatError::NoState { component }
}

#[derive(Deserialize)]
struct MemoryManagerState {
    memory_ranges: Table,
}

#[derive(Default, Deserialize)]
struct Mappings {
    guest_ram_mappings: AtMost<ENTRIES, ZoneMapping>,
}

#[derive(Deserialize)]
struct ZoneMapping {
    gpa: u64,
    size: u64,
    #[serde(default)]
    zone_id: Option<String>,
    #[serde(default)]
    virtio_mem: bool,
}

#[derive(Serialize, Deserialize)]
struct Table {
    data: Vec<RawRange>,
}

#[derive(Serialize, Deserialize)]
struct RawRange {
    gpa: u64,
    length: u64,
}

/// The memory manager's state, with its list of memory ranges as raw text.
#[derive(Deserialize)]
struct Listing<'a> {
    #[serde(borrow)]
    memory_ranges: &'a RawValue,
}

/// The VM's own state.
#[derive(Deserialize)]
struct OwnState<'a> {
    #[serde(borrow, default)]
    common_cpuid: Option<&'a RawValue>,
}

#[derive(Serialize)]
struct ConfigOut<'a> {
    vm_config: &'a RawValue,
    #[serde(skip_serializing_if = "Option::is_none")]
    common_cpuid: Option<&'a RawValue>,
    memory_manager_data: &'a RawValue,
}
