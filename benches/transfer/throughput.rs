// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! From one VM's memory to another's.

use std::io::{Read, Write};
use std::ops::Range;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use rustls::pki_types::ServerName;
use rustls::{ClientConnection, ServerConnection, StreamOwned};
use vfio_migration::layout::Layout;
use vfio_migration::source::GuestMemoryLog;
use vfio_migration::tracker::{Tracker, VmMappings};
use vfio_migration::transfer::Sent;
use vm_memory::bitmap::MS;
use vm_memory::{GuestAddress, GuestMemoryBackend, ReadVolatile, VolatileSlice, WriteVolatile};

use crate::certificates::Files;
use crate::vm::{Memory, StillVm, Vmm, memory, populated, ranges_of};
use crate::way::Way;
use crate::{Race, bare_tls};

pub(crate) const BYTES: u64 = 1 << 30;

pub(crate) fn holds() -> bool {
    let source = populated(BYTES);
    println!("throughput: {} MiB, sender to receiver against plain sockets", BYTES >> 20);
    let plain = |way| {
        let destination = memory(&ranges_of(&source));
        match way {
            Way::Tls(_) => copy_encrypted(way, &source, &destination),
            _ => copy_plainly(way, &source, &destination),
        }
    };
    let ours = |way| {
        let (took, sent) = migrate(way, &source, &mut Vmm::new(memory(&ranges_of(&source))));
        assert!(sent.progress.sent_bytes >= BYTES);
        took
    };
    Race { bytes: BYTES, plain: &plain, ours: &ours, encrypts: true }.is_won()
}

/// Moves `source` into `vmm`, and tells how long that took.
pub(crate) fn migrate(way: Way, source: &Arc<Memory>, vmm: &mut Vmm) -> (Duration, Sent) {
    let layout = Layout::from_guest_memory(&**source).unwrap();
    let log = Box::new(GuestMemoryLog::new(Arc::clone(source)));
    let maps = Arc::clone(source);
    let builder = Tracker::builder(layout).mappings(move || VmMappings::of_memory(&*maps));
    let tracker = Mutex::new(builder.source(log).build().unwrap());
    way.send(&mut StillVm(Arc::clone(source)), &tracker, vmm)
}

fn slice(memory: &Memory, piece: Range<u64>) -> VolatileSlice<'_, MS<'_, Memory>> {
    let bytes = usize::try_from(piece.end - piece.start).unwrap();
    memory.get_slice(GuestAddress(piece.start), bytes).unwrap()
}

/// Copies `source` into `destination` through plain streams of TLS, and tells how long that took.
fn copy_encrypted(way: Way, source: &Memory, destination: &Memory) -> Duration {
    let files = Files::good();
    let (client, server) = (bare_tls::client(&files), bare_tls::server(&files));
    let begun = Instant::now();
    way.stream_plainly(
        BYTES,
        |socket| {
            let name = ServerName::try_from("localhost").unwrap();
            StreamOwned::new(ClientConnection::new(Arc::clone(&client), name).unwrap(), socket)
        },
        |socket| StreamOwned::new(ServerConnection::new(Arc::clone(&server)).unwrap(), socket),
        |stream, piece, buffer| {
            let buffer = &mut buffer[..usize::try_from(piece.end - piece.start).unwrap()];
            slice(source, piece).copy_to(buffer);
            stream.write_all(buffer).unwrap();
        },
        |stream, piece, buffer| {
            let buffer = &mut buffer[..usize::try_from(piece.end - piece.start).unwrap()];
            stream.read_exact(buffer).unwrap();
            slice(destination, piece).copy_from(buffer);
        },
    );
    begun.elapsed()
}

/// Copies `source` into `destination` through plain sockets, and tells how long that took.
pub(crate) fn copy_plainly(way: Way, source: &Memory, destination: &Memory) -> Duration {
    let begun = Instant::now();
    way.copy_plainly(
        BYTES,
        |socket, piece, _| socket.write_all_volatile(&slice(source, piece)).unwrap(),
        |socket, piece, _| socket.read_exact_volatile(&mut slice(destination, piece)).unwrap(),
    );
    begun.elapsed()
}
