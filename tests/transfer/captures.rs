// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The migration that a real Cloud Hypervisor v53 sent, with memory of our own in it.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::{env, fs};

use serde_json::Value;
use vfio_migration::transfer::receive::{Completion, Destination, GuestPages, PageStore};
use vfio_migration::vm::VmError;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vm_migration::Snapshot;

use crate::frames::{COMPLETE, CONFIG, START, STATE, memory, message};
use crate::peer::{quick, receive_on_pair};
use crate::skip::skip;

/// Returns the bytes of a captured payload, or says loudly that there is none.
fn capture(name: &str) -> Option<Vec<u8>> {
    let beside_repository = || Path::new(env!("CARGO_MANIFEST_DIR")).join("../shared/captures");
    let folder = env::var_os("VFIO_MIGRATION_CAPTURES").map_or_else(beside_repository, PathBuf::from);
    let path = folder.join(name);
    if !path.exists() {
        let how = "name its folder in VFIO_MIGRATION_CAPTURES";
        skip(format!("no capture at {}; {how}", path.display()));
        return None;
    }
    Some(fs::read(path).expect("a capture is readable"))
}

/// A VMM that lays its memory out as the Config says.
#[derive(Default)]
struct Vmm {
    memory: Option<Arc<GuestMemoryMmap>>,
    components: Vec<String>,
    completed: bool,
}

impl Destination for Vmm {
    fn config(&mut self, json: &[u8]) -> Result<Arc<dyn PageStore>, VmError> {
        let config: Value = serde_json::from_slice(json)?;
        let mappings = config["memory_manager_data"]["guest_ram_mappings"].as_array();
        let ranges: Option<Vec<_>> = mappings
            .ok_or("no mappings")?
            .iter()
            .map(|ram| {
                let size = usize::try_from(ram["size"].as_u64()?).ok()?;
                Some((GuestAddress(ram["gpa"].as_u64()?), size))
            })
            .collect();
        let memory =
            Arc::new(GuestMemoryMmap::from_ranges(&ranges.ok_or("a mapping is not a valid range")?)?);
        self.memory = Some(Arc::clone(&memory));
        Ok(Arc::new(GuestPages::new(memory)?))
    }

    fn state(&mut self, json: Vec<u8>) -> Result<(), VmError> {
        let root: Snapshot = serde_json::from_slice(&json)?;
        self.components = root.snapshots.into_keys().collect();
        Ok(())
    }

    fn complete(&mut self, _paused: bool) -> Result<Completion, VmError> {
        self.completed = true;
        Ok(Completion::Moved)
    }

    fn abandoned(&mut self) {}
}

#[test]
fn the_messages_of_a_real_v53_are_received() {
    let Some(config) = capture("config-message.json") else { return };
    let Some(state) = capture("state-message.json") else { return };
    let (whole, part) = (vec![0x11; 64 << 20], vec![0x22; 16 << 20]);
    let mut vmm = Vmm::default();
    let (received, ()) = receive_on_pair(quick(), &mut vmm, |mut peer| {
        peer.say(&[
            message(START, &[]),
            message(CONFIG, &config),
            memory(&[(0, &whole)]),
            memory(&[(16 << 20, &part)]),
            memory(&[(0x3000, &[0x33; 4096])]),
            message(STATE, &state),
            message(COMPLETE, &[]),
        ]);
    });
    let received = received.unwrap();
    assert_eq!((received.memory_messages, received.memory_bytes), (3, (80 << 20) + 4096));
    assert_eq!(vmm.components, ["cpu-manager", "device-manager", "memory-manager"]);
    assert!(vmm.completed);

    let memory = vmm.memory.unwrap();
    let byte = |gpa: u64| memory.read_obj::<u8>(GuestAddress(gpa)).unwrap();
    assert_eq!([0, 0x3000, 0x3fff, 0x4000].map(byte), [0x11, 0x33, 0x33, 0x11]);
    assert_eq!([(16 << 20) - 1, 16 << 20, (32 << 20) - 1, 32 << 20].map(byte), [0x11, 0x22, 0x22, 0x11]);
}
