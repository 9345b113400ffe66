// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! From one VM's memory to another's.

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use vfio_migration::layout::Layout;
use vfio_migration::source::GuestMemoryLog;
use vfio_migration::tracker::{Tracker, VmMappings};
use vfio_migration::transfer::Sent;
use vm_memory::{GuestAddress, GuestMemoryBackend, ReadVolatile, WriteVolatile};

use crate::Race;
use crate::vm::{Memory, StillVm, Vmm, memory, populated, ranges_of};
use crate::way::Way;

const BYTES: u64 = 1 << 30;

pub(crate) fn holds() -> bool {
    let source = populated(BYTES);
    println!("throughput: {} MiB, sender to receiver against plain sockets", BYTES >> 20);
    let plain = |way| copy_plainly(way, &source);
    let ours = |way| {
        let (took, sent) = migrate(way, &source);
        assert!(sent.bytes_sent >= BYTES);
        took
    };
    Race { bytes: BYTES, plain: &plain, ours: &ours }.is_won()
}

/// Moves `source` into fresh memory, and tells how long that took.
pub(crate) fn migrate(way: Way, source: &Arc<Memory>) -> (Duration, Sent) {
    let layout = Layout::from_guest_memory(&**source).unwrap();
    let log = Box::new(GuestMemoryLog::new(Arc::clone(source)));
    let maps = Arc::clone(source);
    let builder = Tracker::builder(layout).mappings(move || VmMappings::of_memory(&*maps));
    let tracker = Mutex::new(builder.source(log).build().unwrap());
    let mut vmm = Vmm(memory(&ranges_of(source)));
    way.send(&mut StillVm(Arc::clone(source)), &tracker, &mut vmm)
}

/// Copies `source` into fresh memory through plain sockets, and tells how long that took.
fn copy_plainly(way: Way, source: &Memory) -> Duration {
    let destination = memory(&ranges_of(source));
    let slice = |memory, piece: std::ops::Range<u64>| {
        let bytes = usize::try_from(piece.end - piece.start).unwrap();
        Memory::get_slice(memory, GuestAddress(piece.start), bytes).unwrap()
    };
    let begun = Instant::now();
    way.copy_plainly(
        BYTES,
        |socket, piece, _| socket.write_all_volatile(&slice(source, piece)).unwrap(),
        |socket, piece, _| socket.read_exact_volatile(&mut slice(&destination, piece)).unwrap(),
    );
    begun.elapsed()
}
