// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Config with `prefault` set, so that the receiver populates the VM's memory before the first page comes.
//!
//! A receiver with pass-through devices pins all RAM while it takes State. Pages that were left out as holes or zeros would be
//! allocated and zeroed only then, in the downtime: about half a second for each GiB.

use std::borrow::Cow;
use std::ops::Range;

use serde::de::Error as _;
use serde::{Deserialize, Deserializer};
use serde_json::value::RawValue;
use thiserror::Error;

/// Why a Config cannot ask for populated memory.
#[derive(Debug, Error)]
pub(super) enum PrefaultError {
    /// The VMM's Config has no such memory in it: it is another one's than Cloud Hypervisor's.
    #[error("Config does not say what memory the VM has")]
    NoMemory(#[source] serde_json::Error),
    /// Parts of the memory may be unplugged, and would be populated too.
    #[error("VM has virtio-mem, whose unplugged parts would be populated")]
    VirtioMem,
}

#[derive(Deserialize)]
struct Message<'a> {
    #[serde(borrow)]
    vm_config: VmConfig<'a>,
}

#[derive(Deserialize)]
struct VmConfig<'a> {
    #[serde(borrow)]
    memory: &'a RawValue,
}

/// What counts of `memory`, and of each of its zones.
#[derive(Deserialize)]
struct Memory<'a> {
    /// As it stands there, even if it is `null`.
    #[serde(borrow, default, deserialize_with = "present")]
    prefault: Option<&'a RawValue>,
    #[serde(borrow, default)]
    hotplug_method: Option<Cow<'a, str>>,
    #[serde(default)]
    hotplug_size: Option<u64>,
    #[serde(borrow, default)]
    zones: Option<Vec<&'a RawValue>>,
}

fn present<'de: 'a, 'a, D: Deserializer<'de>>(value: D) -> Result<Option<&'a RawValue>, D::Error> {
    <&RawValue>::deserialize(value).map(Some)
}

/// A change of the text: what takes the place of some bytes.
struct Edit {
    place: Range<usize>,
    text: &'static str,
}

/// Returns `config` with `prefault` set for its memory and every zone of it; every other byte is as it was.
///
/// # Errors
/// The Config names no memory, or memory that must not be populated.
pub(super) fn with_prefault(config: &[u8]) -> Result<Vec<u8>, PrefaultError> {
    let message: Message<'_> = serde_json::from_slice(config).map_err(PrefaultError::NoMemory)?;
    let memory = message.vm_config.memory.get();
    let parsed = parse(memory)?;
    if parsed.hotplug_method.as_deref() == Some("VirtioMem") {
        return Err(PrefaultError::VirtioMem);
    }
    let mut edits = vec![edit(config, memory, &parsed)];
    for zone in parsed.zones.iter().flatten() {
        let parsed = parse(zone.get())?;
        if parsed.hotplug_size.is_some() {
            return Err(PrefaultError::VirtioMem);
        }
        edits.push(edit(config, zone.get(), &parsed));
    }
    Ok(edited(config, edits))
}

/// Whether a Config asks that the VM's memory, or a zone of it, be allocated before the first page comes: see
/// [`super::receive::GuestPages::populated`].
pub fn asks_for_prefault(config: &[u8]) -> bool {
    let is_true = |memory: &Memory<'_>| memory.prefault.is_some_and(|value| value.get() == "true");
    let asks = |message: &Message<'_>| {
        let memory = parse(message.vm_config.memory.get()).ok()?;
        let mut zones = memory.zones.iter().flatten().filter_map(|zone| parse(zone.get()).ok());
        Some(is_true(&memory) || zones.any(|zone| is_true(&zone)))
    };
    serde_json::from_slice(config).ok().as_ref().and_then(asks).unwrap_or(false)
}

fn parse(memory: &str) -> Result<Memory<'_>, PrefaultError> {
    let parsed = match memory.starts_with('{') {
        true => serde_json::from_str(memory),
        false => Err(serde_json::Error::custom("memory is no object")),
    };
    parsed.map_err(PrefaultError::NoMemory)
}

/// Makes the change that sets `prefault` in the object `text`, a part of `config`.
fn edit(config: &[u8], text: &str, parsed: &Memory<'_>) -> Edit {
    match parsed.prefault {
        Some(value) => Edit { place: place_of(config, value.get()), text: "true" },
        None => {
            let inside = place_of(config, text).start + 1;
            let is_empty = text[1..].trim_start().starts_with('}');
            Edit {
                place: inside..inside,
                text: if is_empty { r#""prefault":true"# } else { r#""prefault":true,"# },
            }
        }
    }
}

/// Where in `whole` its part `part` lies, which borrows from it.
fn place_of(whole: &[u8], part: &str) -> Range<usize> {
    let start = part.as_ptr().addr() - whole.as_ptr().addr();
    start..start + part.len()
}

fn edited(config: &[u8], mut edits: Vec<Edit>) -> Vec<u8> {
    edits.sort_unstable_by_key(|edit| edit.place.start);
    let mut text = Vec::with_capacity(config.len() + 16 * edits.len());
    let mut at = 0;
    for Edit { place, text: new } in edits {
        text.extend_from_slice(&config[at..place.start]);
        text.extend_from_slice(new.as_bytes());
        at = place.end;
    }
    text.extend_from_slice(&config[at..]);
    text
}

#[cfg(test)]
mod tests {
    use std::path::{Path, PathBuf};
    use std::{env, fs};

    use serde_json::{Value, json};

    use super::*;

    fn rewritten(config: &str) -> String {
        String::from_utf8(with_prefault(config.as_bytes()).unwrap()).unwrap()
    }

    #[test]
    fn c67_prefault_is_set_for_memory_and_zones_and_every_other_byte_stays() {
        let config = r#"{ "a": 1.50, "vm_config" : {"memory":{"size":64 ,"prefault": false,"zones":[
            {"id":"é}{\"prefault\":false","prefault":false},{"id":"b"}, {}],"thp":true},"x":"\u0041"},"a2":[1,2] }"#;
        let expected = r#"{ "a": 1.50, "vm_config" : {"memory":{"size":64 ,"prefault": true,"zones":[
            {"id":"é}{\"prefault\":false","prefault":true},{"prefault":true,"id":"b"}, {"prefault":true}],"thp":true},"x":"\u0041"},"a2":[1,2] }"#;
        assert_eq!(rewritten(config), expected);
        assert_eq!(rewritten(expected), expected, "again it changes nothing");
        assert_eq!(
            (asks_for_prefault(config.as_bytes()), asks_for_prefault(expected.as_bytes())),
            (false, true)
        );
        assert!(asks_for_prefault(br#"{"vm_config":{"memory":{"zones":[{},{"prefault":true}]}}}"#));
        assert!(!asks_for_prefault(b"{}"));
        assert_eq!(
            rewritten(r#"{"vm_config":{"memory":{"prefault":null}}}"#),
            r#"{"vm_config":{"memory":{"prefault":true}}}"#
        );
        assert_eq!(
            rewritten(r#"{"vm_config":{"memory":{ }}}"#),
            r#"{"vm_config":{"memory":{"prefault":true }}}"#
        );
    }

    #[test]
    fn c67_a_recorded_config_differs_in_nothing_but_prefault() {
        let beside_repository = || Path::new(env!("CARGO_MANIFEST_DIR")).join("../shared/captures");
        let folder = env::var_os("VFIO_MIGRATION_CAPTURES").map_or_else(beside_repository, PathBuf::from);
        let path = folder.join("config-message.json");
        if !path.exists() {
            let how = "name its folder in VFIO_MIGRATION_CAPTURES";
            return crate::skip::skip(format!("no capture at {}; {how}", path.display()));
        }
        let text = fs::read(path).unwrap();
        let mut expected: Value = serde_json::from_slice(&text).unwrap();
        expected["vm_config"]["memory"]["prefault"] = json!(true);
        let changed: Value = serde_json::from_slice(&with_prefault(&text).unwrap()).unwrap();
        assert_eq!(changed, expected);
    }

    #[test]
    fn c67_memory_that_may_be_unplugged_is_not_populated() {
        for memory in [
            json!({"size": 64, "hotplug_method": "VirtioMem"}),
            json!({"size": 0, "hotplug_method": "Acpi", "zones": [{"id": "a"}, {"id": "b", "hotplug_size": 64}]}),
        ] {
            let config = json!({"vm_config": {"memory": memory}}).to_string();
            assert!(matches!(with_prefault(config.as_bytes()), Err(PrefaultError::VirtioMem)), "{config}");
        }
        let acpi =
            json!({"vm_config": {"memory": {"hotplug_method": "Acpi", "hotplug_size": 64, "zones": null}}});
        assert!(with_prefault(acpi.to_string().as_bytes()).is_ok());
    }

    #[test]
    fn what_names_no_memory_is_an_error() {
        for config in [
            "",
            "7",
            "{}",
            r#"{"vm_config":{}}"#,
            r#"{"vm_config":{"memory":null}}"#,
            r#"{"vm_config":{"memory":[1]}}"#,
            r#"{"vm_config":{"memory":{"zones":{}}}}"#,
            r#"{"vm_config":{"memory":{"prefault":true,"prefault":false}}}"#,
            "{\"vm_config\":{\"memory\":{\"id\":\"\u{fffd}",
        ] {
            assert!(matches!(with_prefault(config.as_bytes()), Err(PrefaultError::NoMemory(_))), "{config}");
        }
        assert!(with_prefault(b"{\"vm_config\":\xff").is_err());
    }
}
