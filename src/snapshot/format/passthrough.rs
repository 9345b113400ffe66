// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A VM's pass-through devices: what its configuration says about them, and how large their saved states are.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fmt;

use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;

use super::error::{FormatError, json};
use super::list::AtMost;

/// Id of the component whose children are the VM's devices.
const DEVICE_MANAGER: &str = "device-manager";

/// Id of the component that holds what a device's own driver saved.
const STATE_CHILD: &str = "vfio_migration";

/// Most devices of a kind that are read.
const DEVICES: usize = 1 << 16;

/// How the state of a device begins and ends in a JSON string.
const BLOB: (&str, &str) = (r#""{\"blob\":\""#, r#"\"}""#);

/// How a VMM reaches a pass-through device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum Interface {
    /// The kernel's VFIO, the device by its group: a VMM that restores the VM opens it by its path.
    VfioGroup,
    /// The kernel's VFIO with an iommufd, each device by its descriptor, which can be handed to a receiver.
    Iommufd,
    /// A server process, by its socket.
    VfioUser,
}

/// A pass-through device of a VM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct PassThrough {
    /// What the VMM calls it; `None` where its configuration does not say.
    pub id: Option<String>,
    /// How it is reached.
    pub interface: Interface,
    /// Where it was on the host that the VM ran on; `None` where the VMM was given a descriptor.
    pub path: Option<String>,
    /// Bytes of its saved state; `None` where the VM's state holds none of it.
    pub state_bytes: Option<u64>,
}

impl PassThrough {
    /// Whether Cloud Hypervisor can take a VM with this device over `receive-migration`; else it can only restore it from disk.
    pub fn is_sendable(&self) -> bool {
        self.interface == Interface::Iommufd && self.id.is_some()
    }
}

/// The id, or the path if there is no id; control characters are escaped.
impl fmt::Display for PassThrough {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = self.id.as_deref().or(self.path.as_deref()).unwrap_or("(no id)");
        write!(f, "{}", name.escape_debug())
    }
}

/// The parts of a configuration that describe pass-through devices.
#[derive(Deserialize)]
pub(crate) struct DeviceFields {
    #[serde(default)]
    platform: Option<PlatformConfig>,
    #[serde(default)]
    devices: Option<AtMost<DEVICES, DeviceConfig>>,
    #[serde(default)]
    user_devices: Option<AtMost<DEVICES, UserDeviceConfig>>,
}

#[derive(Deserialize)]
struct PlatformConfig {
    #[serde(default)]
    iommufd: bool,
}

#[derive(Deserialize)]
struct DeviceConfig {
    #[serde(default)]
    id: Option<String>,
    #[serde(default)]
    path: Option<String>,
}

#[derive(Deserialize)]
struct UserDeviceConfig {
    #[serde(default)]
    id: Option<String>,
    #[serde(default)]
    socket: Option<String>,
}

impl DeviceFields {
    /// The devices; their states are not known yet.
    pub(crate) fn into_devices(self) -> Vec<PassThrough> {
        let iommufd = self.platform.is_some_and(|platform| platform.iommufd);
        let interface = if iommufd { Interface::Iommufd } else { Interface::VfioGroup };
        let device = |interface, id, path| PassThrough { id, interface, path, state_bytes: None };
        let kernel = self.devices.unwrap_or_default().into_iter();
        let user = self.user_devices.unwrap_or_default().into_iter();
        let kernel = kernel.map(|found| device(interface, found.id, found.path));
        kernel.chain(user.map(|found| device(Interface::VfioUser, found.id, found.socket))).collect()
    }
}

/// A node of the tree of states; its children and its state are not parsed.
#[derive(Deserialize)]
struct Node<'a> {
    #[serde(borrow, rename = "snapshots")]
    children: BTreeMap<Cow<'a, str>, &'a RawValue>,
    #[serde(borrow, rename = "snapshot_data")]
    data: Option<Data<'a>>,
}

#[derive(Deserialize)]
struct Data<'a> {
    #[serde(borrow)]
    state: &'a RawValue,
}

/// Finds how large the state of each of `devices` is in `tree`, the text of `state.json`.
///
/// # Errors
/// The text is not a tree of states.
pub(crate) fn measure(devices: &mut [PassThrough], tree: &str) -> Result<(), FormatError> {
    if devices.is_empty() {
        return Ok(());
    }
    let read = |text| serde_json::from_str::<Node<'_>>(text).map_err(json("state.json"));
    let Some(manager) = read(tree)?.children.remove(DEVICE_MANAGER) else { return Ok(()) };
    let nodes = read(manager.get())?.children;
    for device in devices {
        let node = device.id.as_deref().and_then(|id| nodes.get(id));
        device.state_bytes = node.map_or(Ok(None), |node| state_bytes(node)).map_err(json("state.json"))?;
    }
    Ok(())
}

/// Bytes of the saved state at or below a node. Cloud Hypervisor keeps it two levels below the device's, this library one.
fn state_bytes(node: &RawValue) -> serde_json::Result<Option<u64>> {
    let Node { mut children, .. } = serde_json::from_str(node.get())?;
    if let Some(saved) = children.remove(STATE_CHILD) {
        let saved: Node<'_> = serde_json::from_str(saved.get())?;
        return saved.data.map(|data| blob_bytes(data.state)).transpose();
    }
    children.values().find_map(|child| state_bytes(child).transpose()).transpose()
}

/// Bytes that the base64 in a device's state encodes. The text is not copied if it is as our writers and Cloud Hypervisor write it.
fn blob_bytes(state: &RawValue) -> serde_json::Result<u64> {
    let as_written = state.get().strip_prefix(BLOB.0).and_then(|text| text.strip_suffix(BLOB.1));
    if let Some(base64) = as_written.filter(|text| !text.contains('\\')) {
        return Ok(decoded_bytes(base64));
    }
    #[derive(Deserialize)]
    struct Blob<'a> {
        #[serde(borrow)]
        blob: Cow<'a, str>,
    }
    let text: String = serde_json::from_str(state.get())?;
    let Blob { blob } = serde_json::from_str(&text)?;
    Ok(decoded_bytes(&blob))
}

fn decoded_bytes(base64: &str) -> u64 {
    base64.trim_end_matches('=').len() as u64 * 3 / 4
}

#[cfg(test)]
mod tests {
    use super::*;

    fn devices(config: &str) -> Vec<PassThrough> {
        serde_json::from_str::<DeviceFields>(config).unwrap().into_devices()
    }

    #[test]
    fn c68_devices_of_groups_of_an_iommufd_and_of_servers_are_told_apart() {
        let config = r#"{"devices":[{"path":"/sys/bus/pci/devices/0000:01:00.0","iommu":false,"id":"net0","pci_segment":0,
            "x_nv_gpudirect_clique":null}],"user_devices":[{"socket":"/run/nvme.sock","id":"nvme0","pci_segment":0}]}"#;
        let found = devices(config);
        assert_eq!(found[0].interface, Interface::VfioGroup);
        assert_eq!(found[0].path.as_deref(), Some("/sys/bus/pci/devices/0000:01:00.0"));
        assert_eq!(found[1].interface, Interface::VfioUser);
        assert_eq!(found[1].to_string(), "nvme0");
        assert!(!found.iter().any(PassThrough::is_sendable));

        let found =
            devices(r#"{"platform":{"iommufd":true},"devices":[{"fd":-1,"id":"net0"},{"path":"/a\u001b"}]}"#);
        assert_eq!((found[0].interface, found[0].path.as_deref()), (Interface::Iommufd, None));
        assert_eq!(found.iter().map(PassThrough::is_sendable).collect::<Vec<_>>(), [true, false]);
        assert_eq!(found[1].to_string(), r"/a\u{1b}");
        assert!(devices("{}").is_empty() && devices(r#"{"devices":null}"#).is_empty());
    }

    #[test]
    fn c68_the_size_of_a_devices_state_is_found_at_either_depth() {
        let saved = |state: &str| format!(r#"{{"snapshots":{{}},"snapshot_data":{{"state":{state}}}}}"#);
        let within =
            |id: &str, node: &str| format!(r#"{{"snapshots":{{"{id}":{node}}},"snapshot_data":null}}"#);
        let written = saved(r#""{\"blob\":\"AAEC/w==\"}""#);
        let escaped = saved(r#""{\"blob\":\"AAEC\\/w\\u003d=\", \"more\":1}""#);
        let nodes = [
            format!(r#""ours":{}"#, within("vfio_migration", &written)),
            format!(r#""theirs":{}"#, within("vfio_common", &within("vfio_migration", &escaped))),
            format!(r#""none":{}"#, within("vfio_common", &saved(r#""{}""#))),
        ];
        let manager = format!(r#"{{"snapshots":{{{}}},"snapshot_data":null}}"#, nodes.join(","));
        let tree = within("device-manager", &manager);
        let ids = ["ours", "theirs", "none", "absent"].map(|id| format!(r#"{{"id":"{id}"}}"#));
        let mut found = devices(&format!(r#"{{"devices":[{}]}}"#, ids.join(",")));
        measure(&mut found, &tree).unwrap();
        let bytes: Vec<_> = found.iter().map(|device| device.state_bytes).collect();
        assert_eq!(bytes, [Some(4), Some(4), None, None]);

        measure(&mut found, &within("cpu-manager", &written)).unwrap();
        assert!(measure(&mut found, "{").is_err());
    }
}
