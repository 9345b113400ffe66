// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Takes descriptors and a Config that names them as the input says: both are refused, or all RAM that Config names is in the
//! descriptors, and can be stored.

#![no_main]

use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;

use libfuzzer_sys::fuzz_target;
use rustix::fs::{MemfdFlags, memfd_create};
use vfio_migration::offload::LocalOptions;
use vfio_migration::snapshot::{DestinationOptions, SnapshotDestination};
use vfio_migration::transfer::receive::Destination;

/// Bytes of the input that make a slot of Config, and a descriptor.
const SLOT: usize = 9;
const DESCRIPTOR: usize = 4;

/// A descriptor: memory that is so long, has data in it or not, and what is no memory.
fn descriptor(bytes: &[u8]) -> OwnedFd {
    if bytes[1] & 0xf == 0 {
        return File::open("/dev/null").expect("there is one").into();
    }
    let memory = File::from(memfd_create("guest", MemfdFlags::CLOEXEC).expect("memory"));
    memory.set_len(u64::from(bytes[2]) << 12).expect("memory has any length");
    if bytes[3] & 1 == 1 {
        memory.write_all_at(&[bytes[3]; 64], u64::from(bytes[3]) << 8).expect("memory is there");
    }
    memory.into()
}

fuzz_target!(|input: &[u8]| {
    let Some((&count, rest)) = input.split_first() else { return };
    let count = usize::from(count & 3) + 1;
    if rest.len() < count * DESCRIPTOR {
        return;
    }
    let (descriptors, slots) = rest.split_at(count * DESCRIPTOR);
    let place = tempfile::tempdir().expect("a directory");
    let target = place.path().join("vm");
    let name = target.clone();
    let local = LocalOptions { warm_timeout: None, ..LocalOptions::default() };
    let options = DestinationOptions { local, memory_only: true, ..DestinationOptions::default() };
    let mut destination = SnapshotDestination::named_by(Box::new(move |_| name), options);
    let mut lengths = [None; 256];
    for bytes in descriptors.chunks_exact(DESCRIPTOR) {
        let memory = descriptor(bytes);
        let length =
            File::from(memory.try_clone().expect("a descriptor")).metadata().expect("it is open").len();
        if destination.descriptor(u32::from(bytes[0]), memory).is_err() {
            return destination.abandoned();
        }
        assert!(bytes[1] & 0xf != 0, "no memory was taken for some");
        lengths[usize::from(bytes[0])] = Some(length);
    }
    let named: Vec<_> = slots.chunks_exact(SLOT).take(8).collect();
    let large = |byte: u8| if byte == 0xff { u64::MAX - 0xfff } else { u64::from(byte) << 12 };
    let mapping = |slot: &&[u8]| {
        let (gpa, size, offset) =
            (u64::from(slot[1]) << (12 + (slot[2] & 31)), large(slot[3]), large(slot[4]));
        (slot[0], gpa, size.saturating_add(u64::from(slot[5] & 1)), offset, slot[6] & 1 == 1)
    };
    let mappings: Vec<_> = named.iter().map(mapping).collect();
    let text: Vec<_> = mappings
        .iter()
        .map(|(slot, gpa, size, offset, is_virtio_mem)| {
            format!(
                r#"{{"slot":{slot},"gpa":{gpa},"size":{size},"virtio_mem":{is_virtio_mem},"file_offset":{offset}}}"#
            )
        })
        .collect();
    let manager = format!(r#"{{"guest_ram_mappings":[{}]}}"#, text.join(","));
    let config =
        format!(r#"{{"vm_config":{{"memory":{{"size":1048576}}}},"memory_manager_data":{manager}}}"#);
    if destination.config(config.as_bytes()).is_ok() {
        for (slot, _, size, offset, _) in mappings {
            let length = lengths[usize::from(slot)].expect("a slot without a descriptor was taken");
            assert!(
                offset.checked_add(size).is_some_and(|end| end <= length),
                "slot {slot} is not all there"
            );
        }
    }
    destination.abandoned();
    assert!(!target.exists(), "half a snapshot under the final name");
});
