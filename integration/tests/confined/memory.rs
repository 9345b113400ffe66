// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The VMM's own writes.

use std::sync::Arc;

use vfio_migration::layout::Layout;
use vfio_migration::ledger::{ChunkLimits, Start};
use vfio_migration::source::GuestMemoryLog;
use vfio_migration::syscalls;
use vfio_migration::tracker::{Tracker, VmMappings};
use vfio_migration_integration::confined::check;
use vm_memory::bitmap::AtomicBitmap;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

#[test]
fn guest_memory_log() {
    check("memory::guest_memory_log", syscalls::GUEST_MEMORY_LOG, &[], |confinement| {
        let memory = GuestMemoryMmap::<AtomicBitmap>::from_ranges(&[(GuestAddress(0), 4 << 20)]).unwrap();
        let memory = Arc::new(memory);
        let layout = Layout::from_guest_memory(&*memory).unwrap();
        confinement.run(|| {
            let source = Box::new(GuestMemoryLog::new(Arc::clone(&memory)));
            let maps = Arc::clone(&memory);
            let builder = Tracker::builder(layout).mappings(move || VmMappings::of_memory(&*maps));
            let mut tracker = builder.source(source).build().unwrap();
            let cursor = tracker.begin(Start::Copied).unwrap();
            memory.write_obj(7u32, GuestAddress(0x5004)).unwrap();
            assert!(tracker.collect().is_empty());
            let chunk = tracker.take(cursor, ChunkLimits::NONE).unwrap().unwrap();
            assert_eq!(chunk.bytes(), 4096);
            tracker.commit(chunk);
            tracker.end(cursor).unwrap();
        });
    });
}
