// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Memory that is allocated ahead of its bytes: as much as is announced, a piece at a time, and no hole.

use std::fs::File;
use std::os::unix::fs::MetadataExt;
use std::sync::Arc;

use rustix::fs::{MemfdFlags, memfd_create};
use vfio_migration::transfer::receive::{GuestPages, Received};
use vfio_migration::vm::Backing;
use vm_memory::{FileOffset, GuestAddress, GuestMemoryMmap};

use crate::frames::{memory, table};
use crate::peer::{Peer, Vmm, quick, receive_on_pair};

const MIB: usize = 1 << 20;

/// A VMM with a memfd of this many MiB, which is one hole, and what takes its pages.
fn sparse_vmm(mib: usize) -> (Vmm, Arc<File>, GuestPages<GuestMemoryMmap>) {
    let file = File::from(memfd_create("guest-ram", MemfdFlags::CLOEXEC).unwrap());
    file.set_len((mib * MIB) as u64).unwrap();
    let backing = FileOffset::new(file, 0);
    let file = Arc::clone(backing.arc());
    let regions = [(GuestAddress(0), mib * MIB, Some(backing))];
    let memory = Arc::new(GuestMemoryMmap::from_ranges_with_files(regions).unwrap());
    let pages = GuestPages::new(Arc::clone(&memory)).unwrap();
    let store = Some(Arc::new(pages.clone()) as _);
    (Vmm { memory, store, ..Vmm::new() }, file, pages)
}

/// Bytes that a memfd takes up.
fn resident_bytes(file: &File) -> usize {
    usize::try_from(file.metadata().unwrap().blocks() * 512).unwrap()
}

#[test]
fn what_a_source_leaves_out_stays_a_hole() {
    leaves_holes(|pages, _| pages);
}

#[test]
fn what_goes_into_memory_through_its_file_is_there_and_what_is_left_out_stays_a_hole() {
    leaves_holes(|pages, memory| pages.backed_by(Backing::of_mmap(memory)));
}

fn leaves_holes(
    told: impl FnOnce(GuestPages<GuestMemoryMmap>, &GuestMemoryMmap) -> GuestPages<GuestMemoryMmap>,
) {
    let (mut vmm, file, pages) = sparse_vmm(64);
    let pages = told(pages, &vmm.memory);
    vmm.store = Some(Arc::new(pages.clone()));
    let (long, short) = (vec![7; 3 * MIB + 4096], vec![9; 4096]);
    let ranges: [(u64, &[u8]); 3] = [(8 << 20, &long), (20 << 20, &short), ((64 << 20) - 4096, &short)];
    let (received, ()) = receive_on_pair(quick(), &mut vmm, |mut peer: Peer| {
        peer.begin();
        peer.say(&[memory(&ranges)]);
        peer.end();
    });
    let received: Received = received.unwrap();
    assert_eq!(received.memory_bytes, 3 * MIB as u64 + 3 * 4096);
    assert_eq!(resident_bytes(&file), 3 * MIB + 3 * 4096);
    assert_eq!(pages.allocated_ahead_bytes(), 3 * MIB as u64, "what is short is left to faults");
    assert_eq!(vmm.bytes(8 << 20, long.len()), long);
    assert_eq!(vmm.bytes(20 << 20, 4096), short);
}

#[test]
fn bytes_that_come_again_through_the_mapping_take_the_place_of_those_that_came_through_the_file() {
    let (mut vmm, _, pages) = sparse_vmm(8);
    vmm.store = Some(Arc::new(pages.backed_by(Backing::of_mmap(&vmm.memory))));
    let (first, second) = (vec![7; 2 * MIB], vec![9; 2 * MIB]);
    let (received, ()) = receive_on_pair(quick(), &mut vmm, |mut peer: Peer| {
        peer.begin();
        peer.say(&[memory(&[(MIB as u64, &first)]), memory(&[(2 * MIB as u64, &second)])]);
        peer.end();
    });
    received.unwrap();
    assert_eq!(vmm.bytes(0, 5 * MIB), [vec![0; MIB], vec![7; MIB], second, vec![0; MIB]].concat());
}

#[test]
fn memory_left_to_faults_and_memory_that_was_populated_is_not_allocated_ahead() {
    for populated in [false, true] {
        let (mut vmm, file, pages) = sparse_vmm(8);
        let pages = if populated { pages.populated().unwrap() } else { pages.by_faults() };
        vmm.store = Some(Arc::new(pages.clone()));
        let bytes = vec![7; 2 * MIB];
        let (received, ()) = receive_on_pair(quick(), &mut vmm, |mut peer: Peer| {
            peer.begin();
            peer.say(&[memory(&[(0, &bytes)])]);
            peer.end();
        });
        received.unwrap();
        assert_eq!(pages.allocated_ahead_bytes(), 0);
        assert_eq!(resident_bytes(&file), if populated { 8 * MIB } else { 2 * MIB });
        assert_eq!(vmm.bytes(0, bytes.len()), bytes);
    }
}

#[test]
fn a_source_that_announces_much_and_sends_nothing_makes_little_resident() {
    let (mut vmm, file, _) = sparse_vmm(256);
    let (received, ()) = receive_on_pair(quick(), &mut vmm, |mut peer: Peer| {
        peer.begin();
        peer.send(&[table(&[(0, 256 << 20)]), vec![7; 4096]].concat());
    });
    received.unwrap_err();
    assert!(resident_bytes(&file) <= 2 * MIB, "{} bytes", resident_bytes(&file));
}
