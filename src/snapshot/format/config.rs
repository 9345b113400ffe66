// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! `config.json`, the VM's configuration.
//!
//! Only what is needed is parsed; everything else passes through unchanged.

use std::collections::BTreeMap;
use std::fmt;

use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;

use super::error::{ENTRIES, FormatError, json, within};
use super::limits::SnapshotLimits;
use super::list::AtMost;
use super::passthrough::{DeviceFields, PassThrough};

#[derive(Deserialize)]
struct VmConfigFields {
    memory: MemoryConfig,
    #[serde(default)]
    disks: Option<AtMost<ENTRIES, DiskConfig>>,
    #[serde(default)]
    pmem: Option<AtMost<ENTRIES, PmemConfig>>,
    #[serde(default)]
    vdpa: Option<AtMost<ENTRIES, VdpaConfig>>,
    #[serde(default)]
    platform: Option<PlatformConfig>,
}

#[derive(Deserialize)]
struct PlatformConfig {
    #[serde(default)]
    uuid: Option<String>,
}

#[derive(Deserialize)]
struct MemoryConfig {
    size: u64,
    #[serde(default)]
    hotplugged_size: Option<u64>,
    #[serde(default)]
    zones: Option<AtMost<ENTRIES, ZoneConfig>>,
}

#[derive(Deserialize)]
struct ZoneConfig {
    id: String,
    #[serde(default)]
    hotplugged_size: Option<u64>,
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

/// The parts of a configuration that describe back ends in other processes.
#[derive(Deserialize)]
struct BackEndFields {
    #[serde(default)]
    disks: Option<AtMost<ENTRIES, BackEnd>>,
    #[serde(default)]
    net: Option<AtMost<ENTRIES, BackEnd>>,
    #[serde(default)]
    fs: Option<AtMost<ENTRIES, BackEnd>>,
    #[serde(default)]
    generic_vhost_user: Option<AtMost<ENTRIES, BackEnd>>,
}

/// A device that may have a vhost-user back end.
#[derive(Deserialize)]
struct BackEnd {
    #[serde(default)]
    id: Option<String>,
    #[serde(default)]
    vhost_user: bool,
    #[serde(default)]
    vhost_socket: Option<String>,
    #[serde(default)]
    socket: Option<String>,
}

impl BackEndFields {
    fn into_names(self) -> Vec<String> {
        let some = |list: Option<AtMost<ENTRIES, BackEnd>>| list.unwrap_or_default().into_iter();
        let always = some(self.fs).chain(some(self.generic_vhost_user));
        let maybe = some(self.disks).chain(some(self.net));
        let maybe = maybe.filter(|device| device.vhost_user || device.vhost_socket.is_some());
        let name = |device: BackEnd| device.id.or(device.vhost_socket).or(device.socket).unwrap_or_default();
        always.chain(maybe).map(name).collect()
    }
}

#[derive(Deserialize)]
struct VdpaConfig {
    path: String,
}

/// A memory zone that is a mapping of a named file; prints as "memory zone ID is in FILE".
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct ZoneFile {
    /// The zone's id.
    pub zone: String,
    /// The file, as the configuration calls it.
    pub file: String,
}

/// Control characters are escaped.
impl fmt::Display for ZoneFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "memory zone {} is in {}", self.zone.escape_debug(), self.file.escape_debug())
    }
}

/// `config.json`: the VM's configuration.
#[derive(Debug, Clone)]
pub struct VmConfig {
    text: Box<RawValue>,
    memory_bytes: u64,
    hotplugged_bytes: u64,
    uuid: Option<String>,
    writable_disks: Vec<String>,
    vdpa: Vec<String>,
    file_zones: Vec<ZoneFile>,
    shared_files: Vec<ZoneFile>,
    devices: Vec<PassThrough>,
    vhost_user: Vec<String>,
}

impl VmConfig {
    /// Reads the text of `config.json`.
    ///
    /// # Errors
    /// It is not the configuration of a VM, or exceeds `limits`.
    pub fn parse(text: &[u8], limits: &SnapshotLimits) -> Result<Self, FormatError> {
        within("config.json", text.len(), limits.config_bytes)?;
        Self::from_raw(serde_json::from_slice(text).map_err(json("config.json"))?)
    }

    pub(super) fn from_raw(text: Box<RawValue>) -> Result<Self, FormatError> {
        let fields: VmConfigFields = serde_json::from_str(text.get()).map_err(json("config.json"))?;
        let devices: DeviceFields = serde_json::from_str(text.get()).map_err(json("config.json"))?;
        let back_ends: BackEndFields = serde_json::from_str(text.get()).map_err(json("config.json"))?;
        let disks = fields.disks.unwrap_or_default().into_iter().filter(|disk| !disk.readonly);
        let disks = disks.map(|disk| disk.path.or(disk.vhost_socket).unwrap_or_default());
        let pmem = fields.pmem.unwrap_or_default().into_iter().filter(|pmem| !pmem.discard_writes);
        let (mut file_zones, mut shared_files) = (Vec::new(), Vec::new());
        let mut hotplugged_bytes = fields.memory.hotplugged_size.unwrap_or(0);
        for ZoneConfig { id, hotplugged_size, file, shared } in fields.memory.zones.unwrap_or_default() {
            hotplugged_bytes = hotplugged_bytes.saturating_add(hotplugged_size.unwrap_or(0));
            let Some(file) = file else { continue };
            let zone = ZoneFile { zone: id, file };
            shared_files.extend(shared.then(|| zone.clone()));
            file_zones.push(zone);
        }
        Ok(Self {
            text,
            memory_bytes: fields.memory.size,
            hotplugged_bytes,
            uuid: fields.platform.and_then(|platform| platform.uuid),
            writable_disks: disks.chain(pmem.map(|pmem| pmem.file)).collect(),
            vdpa: fields.vdpa.unwrap_or_default().into_iter().map(|vdpa| vdpa.path).collect(),
            file_zones,
            shared_files,
            devices: devices.into_devices(),
            vhost_user: back_ends.into_names(),
        })
    }

    /// The JSON text.
    pub fn text(&self) -> &str {
        self.text.get()
    }

    pub(crate) fn raw(&self) -> &RawValue {
        &self.text
    }

    /// Bytes of RAM that the configuration gives the VM outside its memory zones.
    pub fn memory_bytes(&self) -> u64 {
        self.memory_bytes
    }

    /// Bytes of memory beyond its first that the VM was asked to have: virtio-mem devices may have plugged less of it, or still more.
    pub fn hotplugged_bytes(&self) -> u64 {
        self.hotplugged_bytes
    }

    /// What `platform.uuid` calls the VM, as the source wrote it: any text.
    pub fn uuid(&self) -> Option<&str> {
        self.uuid.as_deref()
    }

    /// Paths of the disks, persistent memory included, that the guest can write.
    pub fn writable_disks(&self) -> &[String] {
        &self.writable_disks
    }

    /// Paths of the vDPA devices, which stay suspended when a migration fails.
    pub fn vdpa(&self) -> &[String] {
        &self.vdpa
    }

    /// The memory zones that are mappings of a named file, shared or not: a new VM finds in them what the file holds.
    pub fn file_zones(&self) -> &[ZoneFile] {
        &self.file_zones
    }

    /// The memory zones that are shared mappings of a named file, which Cloud Hypervisor's snapshots leave out.
    pub fn shared_files(&self) -> &[ZoneFile] {
        &self.shared_files
    }

    /// The pass-through devices; the size of their saved states is not known from a configuration.
    pub fn devices(&self) -> &[PassThrough] {
        &self.devices
    }

    /// The devices whose back ends are other processes that map the VM's memory (vhost-user), by id or socket.
    pub fn vhost_user(&self) -> &[String] {
        &self.vhost_user
    }

    /// Returns the configuration without `prefault=on`, or `None` where it has none.
    ///
    /// # Errors
    /// Its memory is of another shape.
    pub(crate) fn without_prefault(&self) -> Result<Option<Self>, FormatError> {
        let wrong = || json("config.json");
        let mut config: Object = serde_json::from_str(self.text()).map_err(wrong())?;
        let memory = config.get("memory").map_or("{}", |memory| memory.get());
        let mut memory: Object = serde_json::from_str(memory).map_err(wrong())?;
        let zones = memory.get("zones").map_or("null", |zones| zones.get());
        let mut zones: Option<Vec<Object>> = serde_json::from_str(zones).map_err(wrong())?;
        let all = std::iter::once(&mut memory).chain(zones.iter_mut().flatten());
        let cleared = all.filter_map(|part| part.get_mut("prefault").filter(|value| value.get() == "true"));
        let cleared: usize = cleared.map(|value| *value = raw(&false)).count();
        if cleared == 0 {
            return Ok(None);
        }
        if let Some(zones) = zones {
            memory.insert("zones".to_owned(), raw(&zones));
        }
        config.insert("memory".to_owned(), raw(&memory));
        Self::from_raw(raw(&config)).map(Some)
    }
}

/// A JSON object whose values are kept as text.
type Object = BTreeMap<String, Box<RawValue>>;

fn raw(value: &impl Serialize) -> Box<RawValue> {
    serde_json::value::to_raw_value(value).expect("texts with text keys are JSON")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(text: &str) -> VmConfig {
        VmConfig::parse(text.as_bytes(), &SnapshotLimits::default()).unwrap()
    }

    #[test]
    fn prefault_is_cleared_wherever_it_is_and_nothing_else_changes() {
        let with = r#"{"memory":{"size":0,"prefault":true,"zones":[{"id":"a","prefault":true,"size":18446744073709551615}]},"x":1.50}"#;
        let cleared = config(with).without_prefault().unwrap().unwrap();
        let expected = r#"{"memory":{"prefault":false,"size":0,"zones":[{"id":"a","prefault":false,"size":18446744073709551615}]},"x":1.50}"#;
        assert_eq!(cleared.text(), expected);
        assert!(cleared.without_prefault().unwrap().is_none());
        assert!(config(r#"{"memory":{"size":0,"zones":null}}"#).without_prefault().unwrap().is_none());
    }

    #[test]
    fn back_ends_in_other_processes_are_found() {
        let text = r#"{"memory":{"size":0},"fs":[{"socket":"/fs"}],"net":[{"id":"n","vhost_user":true},{"id":"tap"}],
            "disks":[{"path":"/disk"},{"vhost_socket":"/blk"}],"generic_vhost_user":[{"id":"g","socket":"/g"}]}"#;
        assert_eq!(config(text).vhost_user(), ["/fs", "g", "/blk", "n"]);
        assert!(config(r#"{"memory":{"size":0},"fs":null}"#).vhost_user().is_empty());
    }
}
