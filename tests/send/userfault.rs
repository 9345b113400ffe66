// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Memory whose pages a userfaultfd has yet to fill: each arrives, or the memory is refused by name.

pub(crate) mod handler;

use std::fs::File;
use std::str::FromStr;
use std::sync::{Arc, Mutex};

use vfio_migration::layout::Layout;
use vfio_migration::range::GpaRange;
use vfio_migration::snapshot::{
    AnnouncedRam, Base, Digest, FullSnapshot, SnapshotLimits, SnapshotSource, SnapshotWriter,
};
use vfio_migration::tracker::Tracker;
use vfio_migration::transfer::{SendError, Sender, Sent, SourceVm};
use vfio_migration::vm::{UserfaultError, Vm};
use vm_memory::bitmap::{AtomicBitmap, NewBitmap};
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryRegion, GuestRegionMmap};

use self::handler::Handler;
use crate::peer::{Fault, Peer, Transcript};
use crate::skipping::Meddler;
use crate::vm::{FakeVm, HIGH, LOW, Machine, Memory, PAGE, PAGES, empty_memory, page_gpa, sparse_memory};
use crate::{options, send};

/// What the handler fills every page with.
pub(crate) const FILLING: u8 = 0xfd;

/// Memory that is a private mapping of files that are one hole.
fn private_memory() -> Memory {
    let regions = [LOW, HIGH].map(|(start, len)| {
        let file =
            File::from(rustix::fs::memfd_create("guest-ram", rustix::fs::MemfdFlags::CLOEXEC).unwrap());
        file.set_len(len).unwrap();
        let bytes = usize::try_from(len).unwrap();
        let mapping = MmapRegionBuilder::new_with_bitmap(bytes, AtomicBitmap::with_len(bytes))
            .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
            .with_mmap_flags(libc::MAP_PRIVATE | libc::MAP_NORESERVE)
            .with_file_offset(FileOffset::new(file, 0));
        Arc::new(GuestRegionMmap::new(mapping.build().unwrap(), GuestAddress(start)).unwrap())
    });
    Memory::from_arc_regions(regions.to_vec()).unwrap()
}

/// Where the region at `start` is mapped, and its length.
fn mapping_of(memory: &Memory, (start, len): (u64, u64)) -> (u64, u64) {
    (memory.get_host_address(GuestAddress(start)).unwrap() as u64, len)
}

fn both_regions(memory: &Memory) -> [(u64, u64); 2] {
    [LOW, HIGH].map(|region| mapping_of(memory, region))
}

fn assert_arrives_whole(mut vm: FakeVm) -> Sent {
    let machine = vm.machine();
    let peer = Peer::unix(Fault::None);
    let sent = send(&peer, &mut vm, &machine).unwrap();
    let (transcript, outcome) = peer.end();
    outcome.unwrap();
    assert_all_filled(&transcript, &vm);
    sent
}

fn assert_all_filled(transcript: &Transcript, vm: &FakeVm) {
    transcript.assert_equals(vm);
    let filled = (0..PAGES).filter(|&page| transcript.pages[&page_gpa(page)][PAGE as usize - 1] == FILLING);
    assert_eq!(filled.count() as u64, PAGES);
}

/// Moves a VM all of whose memory has yet to be filled.
fn assert_missing_pages_arrive(memory: Memory) {
    let Some(_handler) = Handler::serve(&both_regions(&memory), FILLING) else { return };
    let sent = assert_arrives_whole(FakeVm::with_memory(memory, 0));
    assert_eq!(sent.progress.skipped_hole_bytes, 0);
}

#[test]
fn c49_missing_pages_of_a_memfd_arrive() {
    assert_missing_pages_arrive(sparse_memory());
}

#[test]
fn c49_missing_pages_of_anonymous_memory_arrive() {
    assert_missing_pages_arrive(empty_memory());
}

#[test]
fn c49_missing_pages_of_a_private_file_mapping_arrive() {
    assert_missing_pages_arrive(private_memory());
}

#[test]
fn c49_only_what_is_registered_counts_as_filled() {
    let memory = sparse_memory();
    // The second half of the low region.
    let (hva, len) = mapping_of(&memory, LOW);
    let Some(_handler) = Handler::serve(&[(hva + len / 2, len / 2)], FILLING) else { return };
    let mut vm = FakeVm::with_memory(memory, 0);
    let machine = vm.machine();
    let peer = Peer::unix(Fault::None);
    let sent = send(&peer, &mut vm, &machine).unwrap();
    let (transcript, outcome) = peer.end();
    outcome.unwrap();
    let filled = LOW.1 / PAGE / 2..LOW.1 / PAGE;
    assert!(filled.clone().all(|page| transcript.pages[&page_gpa(page)][0] == FILLING));
    assert_eq!(sent.progress.skipped_hole_bytes, (PAGES - filled.count() as u64) * PAGE);
}

#[test]
fn c49_memory_registered_while_its_holes_are_looked_for_is_refused_and_arrives_the_next_time() {
    let mut vm = FakeVm::with_memory(sparse_memory(), 0);
    if Handler::serve(&[], FILLING).is_none() {
        return;
    }
    let handler = Arc::new(Mutex::new(None));
    let mut meddler = Meddler::idle(&vm);
    let late = Arc::clone(&handler);
    meddler.before_read = Box::new(move |memory| {
        late.lock().unwrap().get_or_insert_with(|| Handler::serve(&both_regions(memory), FILLING));
        Vec::new()
    });
    let machine = Machine::from(vm.builder().source(Box::new(meddler)).build().unwrap());
    let peer = Peer::unix(Fault::None);
    let error = send(&peer, &mut vm, &machine).unwrap_err();
    drop(peer.end());
    assert!(matches!(error, SendError::Userfault(UserfaultError::Late { .. })), "{error}");
    assert_eq!(error.source_vm(), SourceVm::AsBefore);

    let peer = Peer::unix(Fault::None);
    send(&peer, &mut vm, &machine).unwrap();
    let (transcript, outcome) = peer.end();
    outcome.unwrap();
    assert_all_filled(&transcript, &vm);
}

#[test]
fn c49_memory_that_only_another_mapping_of_its_file_fills_is_refused_by_name() {
    let memory = sparse_memory();
    let files = memory.iter().map(|region| {
        let len = usize::try_from(region.len()).unwrap();
        (region.start_addr(), len, Some(region.file_offset().unwrap().clone()))
    });
    let other = Memory::from_ranges_with_files(files).unwrap();
    let Some(_handler) = Handler::serve(&[mapping_of(&other, HIGH)], FILLING) else { return };
    for receiver_reads_zero in [true, false] {
        let mut vm = FakeVm::with_memory(sparse_memory(), 0);
        vm.memory = Arc::new(memory.clone());
        let machine = vm.machine();
        let peer = Peer::unix(Fault::None);
        let options = options(&peer).receiver_reads_zero(receiver_reads_zero);
        let error = Sender::new(options).send(&mut vm, &machine.tracker, &machine.devices).unwrap_err();
        drop(peer.end());
        let SendError::Userfault(UserfaultError::OtherMapping { range }) = error else { panic!("{error}") };
        assert_eq!((range.start(), range.len()), HIGH);
        vm.resume().unwrap();
    }
}

#[test]
fn c49_a_snapshot_of_memory_that_only_another_mapping_of_its_file_fills_is_refused_by_name() {
    let memory = sparse_memory();
    let files = memory.iter().map(|region| {
        let len = usize::try_from(region.len()).unwrap();
        (region.start_addr(), len, Some(region.file_offset().unwrap().clone()))
    });
    let other = Memory::from_ranges_with_files(files).unwrap();
    let directory = tempfile::tempdir().unwrap();
    let ram = AnnouncedRam::all(Layout::from_guest_memory(&memory).unwrap());
    let full = |name: &str| {
        SnapshotWriter::create(&directory.path().join(name), ram.clone(), None, SnapshotLimits::default())
            .unwrap()
    };
    let base = Base::Named(Digest::from_str(&"0".repeat(64)).unwrap());
    let differential = SnapshotWriter::create(
        &directory.path().join("differential"),
        ram.clone(),
        Some(base),
        SnapshotLimits::default(),
    )
    .unwrap();
    let page = GpaRange::new(HIGH.0, PAGE).unwrap();
    full("before").copy_from([page], &memory).unwrap();
    let Some(_handler) = Handler::serve(&[mapping_of(&other, HIGH)], FILLING) else { return };
    for refused in [full("full").copy_from([page], &memory), differential.copy_from([page], &memory)] {
        let error = refused.unwrap_err();
        let cause = error.get_ref().and_then(|cause| cause.downcast_ref::<UserfaultError>());
        assert!(
            matches!(cause, Some(UserfaultError::OtherMapping { range }) if range.start() == HIGH.0),
            "{error}"
        );
    }
    // Through the mapping that is registered it is read, and filled.
    full("other").copy_from([page], &other).unwrap();
}

/// Sends a stored VM that wrote one page of its memory; returns the bytes of its holes that were left out.
fn holes_of_a_stored_vm() -> u64 {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("stored");
    let layout = Layout::from_guest_memory(&sparse_memory()).unwrap();
    let writer =
        SnapshotWriter::create(&path, AnnouncedRam::all(layout), None, SnapshotLimits::default()).unwrap();
    let page = GpaRange::new(HIGH.0, PAGE).unwrap();
    writer.fill(page, &mut &[1; PAGE as usize][..]).unwrap();
    let [low, high] = [LOW, HIGH].map(|(gpa, len)| format!(r#"{{\"gpa\":{gpa},\"length\":{len}}}"#));
    let memory = format!(r#"{{\"memory_ranges\":{{\"data\":[{low},{high}]}},\"guest_ram_mappings\":[]}}"#);
    let child = format!(r#"{{"snapshots":{{}},"snapshot_data":{{"state":"{memory}"}}}}"#);
    let root = r#"{"state":"{\"common_cpuid\":[{\"function\":1}]}"}"#;
    let state = format!(r#"{{"snapshots":{{"memory-manager":{child}}},"snapshot_data":{root}}}"#);
    let config = format!(r#"{{"memory":{{"size":{}}},"cpus":{{"boot_vcpus":1}}}}"#, LOW.1 + HIGH.1);
    writer.finish(config.as_bytes(), state.as_bytes()).unwrap();

    let mut vm = SnapshotSource::new(FullSnapshot::open(&path, &SnapshotLimits::default()).unwrap()).unwrap();
    let tracker = Mutex::new(Tracker::builder(vm.layout().clone()).build().unwrap());
    let peer = Peer::unix(Fault::None);
    let sender = Sender::new(options(&peer));
    let sent = sender.send(&mut vm, &tracker, &Mutex::default()).unwrap();
    peer.end().1.unwrap();
    sent.progress.skipped_hole_bytes
}

#[test]
fn a_stored_vm_is_sent_without_its_holes_where_another_vm_of_the_process_is_filled() {
    let without = holes_of_a_stored_vm();
    assert_ne!(without, 0);
    let running = sparse_memory();
    let Some(_handler) = Handler::serve(&both_regions(&running), FILLING) else { return };
    assert_eq!(holes_of_a_stored_vm(), without);
}

#[test]
fn a_handler_fills_what_is_read() {
    let memory = sparse_memory();
    let Some(_handler) = Handler::serve(&both_regions(&memory), FILLING) else { return };
    assert_eq!(memory.read_obj::<u8>(GuestAddress(page_gpa(7) + 99)).unwrap(), FILLING);
}
