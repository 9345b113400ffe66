// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What goes over the wire, in bytes spelled out here: nothing of it comes from the library under test.

pub(crate) const START: u16 = 1;
pub(crate) const CONFIG: u16 = 2;
pub(crate) const STATE: u16 = 3;
pub(crate) const MEMORY: u16 = 4;
pub(crate) const COMPLETE: u16 = 5;
pub(crate) const ABANDON: u16 = 6;
pub(crate) const MEMORY_FD: u16 = 7;
pub(crate) const COMPLETE_PAUSED: u16 = 8;
pub(crate) const PAGE_FAULT: u16 = 9;
/// Commands between two ends of this crate only.
pub(crate) const DEVICES: u16 = 0x8001;
pub(crate) const DEVICE_STATE: u16 = 0x8002;

/// Statuses of an answer.
pub(crate) const OK: u16 = 1;
pub(crate) const ERROR: u16 = 2;

/// The first bytes of an additional connection: what it is for.
pub(crate) const FOR_MEMORY: [u8; 2] = [1, 0];
pub(crate) const FOR_FAULTS: [u8; 2] = [2, 0];

/// Encodes a request.
pub(crate) fn request(command: u16, length: u64) -> Vec<u8> {
    [&command.to_le_bytes()[..], &[0; 6], &length.to_le_bytes()].concat()
}

/// Encodes a request with its payload.
pub(crate) fn message(command: u16, payload: &[u8]) -> Vec<u8> {
    [&request(command, payload.len() as u64)[..], payload].concat()
}

/// Encodes the head and table of a Memory, without its pages.
pub(crate) fn table(ranges: &[(u64, u64)]) -> Vec<u8> {
    let entries = ranges.iter().flat_map(|(gpa, length)| [gpa.to_le_bytes(), length.to_le_bytes()]);
    message(MEMORY, &entries.flatten().collect::<Vec<_>>())
}

/// Encodes a Memory with `ranges` and the bytes that go there.
pub(crate) fn memory(ranges: &[(u64, &[u8])]) -> Vec<u8> {
    let spans: Vec<_> = ranges.iter().map(|(gpa, bytes)| (*gpa, bytes.len() as u64)).collect();
    let pages = ranges.iter().flat_map(|(_, bytes)| bytes.iter().copied());
    table(&spans).into_iter().chain(pages).collect()
}

/// The document of a Config: `vm_config`, and the slots of `ram`, each a GPA and a length.
pub(crate) fn config_document(vm_config: &str, ram: &[(u64, u64)]) -> String {
    let slot = |(gpa, length): &(u64, u64)| {
        format!(r#"{{"slot":0,"gpa":{gpa},"size":{length},"virtio_mem":false}}"#)
    };
    let slots = ram.iter().map(slot).collect::<Vec<_>>().join(",");
    format!(r#"{{"vm_config":{vm_config},"memory_manager_data":{{"guest_ram_mappings":[{slots}]}}}}"#)
}

/// The document of a State that has `ram` and no devices.
pub(crate) fn state_document(ram: &[(u64, u64)]) -> String {
    let memory = component("memory-manager", "", &format!("{{{}}}", memory_ranges(ram)));
    format!(r#"{{"snapshots":{{{memory}}},"snapshot_data":null}}"#)
}

/// The list of memory ranges in a memory manager's state, with the escapes of a text within a text.
pub(crate) fn memory_ranges(ram: &[(u64, u64)]) -> String {
    let range = |(gpa, length): &(u64, u64)| format!(r#"{{\"gpa\":{gpa},\"length\":{length}}}"#);
    let ranges = ram.iter().map(range).collect::<Vec<_>>().join(",");
    format!(r#"\"memory_ranges\":{{\"data\":[{ranges}]}}"#)
}

/// A component of a State: its id, the components within it, and its state with the escapes of a text within a text.
pub(crate) fn component(id: &str, children: &str, state: &str) -> String {
    format!(r#""{id}":{{"snapshots":{{{children}}},"snapshot_data":{{"state":"{state}"}}}}"#)
}
