// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Snapshots: written, made of each other, read, sent and received.

use std::fs::File;
use std::io::Read;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use rustix::fs::{MemfdFlags, memfd_create};
use vfio_migration::granule::Granule;
use vfio_migration::layout::Layout;
use vfio_migration::offload::{LocalOptions, LocalSendOptions, LocalSender};
use vfio_migration::range::GpaRange;
use vfio_migration::snapshot::{
    AnnouncedRam, Base, DestinationOptions, FullSnapshot, MANIFEST_FILE, OnPaused, SnapshotChain,
    SnapshotDestination, SnapshotLimits, SnapshotSource, SnapshotWriter, apply, compare, describe, seal,
    subtract, verify,
};
use vfio_migration::syscalls;
use vfio_migration::tracker::Tracker;
use vfio_migration::transfer::connection::Listener;
use vfio_migration::transfer::receive::{Destination, Receiver};
use vfio_migration::transfer::url::Url;
use vfio_migration::transfer::{self, SendOptions, Sender};
use vfio_migration_integration::confined::check;
use vm_memory::{GuestAddress, GuestMemoryMmap};

use crate::frames::{CONFIG, OK, STATE};
use crate::vmm::{Faults, Vmm};

const BYTES: u64 = 16 << 20;
const VM_CONFIG: &[u8] = br#"{"memory":{"size":16777216},"cpus":{"boot_vcpus":2}}"#;

fn state() -> String {
    let range = format!(r#"{{\"gpa\":0,\"length\":{BYTES}}}"#);
    let mapping = format!(r#"{{\"slot\":0,\"gpa\":0,\"size\":{BYTES},\"virtio_mem\":false}}"#);
    let lists = format!(r#"\"memory_ranges\":{{\"data\":[{range}]}},\"guest_ram_mappings\":[{mapping}]"#);
    let child = format!(r#"{{"snapshots":{{}},"snapshot_data":{{"state":"{{{lists}}}"}}}}"#);
    let root = r#"{"state":"{\"common_cpuid\":[{\"function\":1}]}"}"#;
    format!(r#"{{"snapshots":{{"memory-manager":{child}}},"snapshot_data":{root}}}"#)
}

fn ram() -> AnnouncedRam {
    AnnouncedRam::all(Layout::new([GpaRange::new(0, BYTES).unwrap()], Granule::host_page()).unwrap())
}

fn pages(start: u64, count: u64) -> GpaRange {
    let page = Granule::host_page().bytes();
    GpaRange::new(start * page, count * page).unwrap()
}

/// Memory with pages of ones, and pages that were written and read zero.
fn write(target: &Path) {
    let writer = SnapshotWriter::create(target, ram(), None, SnapshotLimits::default()).unwrap();
    let [ones, zeros] = [pages(0, 700), pages(300, 200)];
    writer.fill(ones, &mut std::io::repeat(1).take(ones.len())).unwrap();
    writer.fill(zeros, &mut std::io::repeat(0).take(zeros.len())).unwrap();
    let memory = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), 16 << 20)]).unwrap();
    writer.copy_from([pages(2000, 9)], &memory).unwrap();
    writer.finish(VM_CONFIG, state().as_bytes()).unwrap();
}

fn write_differential(base: &Path, target: &Path) {
    let base = Base::open([base], &SnapshotLimits::default()).unwrap();
    let writer = SnapshotWriter::create(target, ram(), Some(base), SnapshotLimits::default()).unwrap();
    let (twos, zeros) = (pages(100, 50), pages(600, 50));
    writer.fill(twos, &mut std::io::repeat(2).take(twos.len())).unwrap();
    writer.fill(zeros, &mut std::io::repeat(0).take(zeros.len())).unwrap();
    writer.finish(VM_CONFIG, state().as_bytes()).unwrap();
}

fn receive(listener: &Listener, target: &Path) {
    let mut directory = SnapshotDestination::create(target, DestinationOptions::default()).unwrap();
    Receiver::new(transfer::limits::PeerLimits::default(), None).receive(listener, &mut directory).unwrap();
}

fn send(directory: &Path, url: &Url) {
    let directory = FullSnapshot::open(directory, &SnapshotLimits::default()).unwrap();
    let mut source = SnapshotSource::new(directory).unwrap();
    let tracker = Mutex::new(Tracker::builder(source.layout().clone()).build().unwrap());
    let sender = Sender::new(SendOptions::new(url.clone()));
    sender.send(&mut source, &tracker, &Mutex::default()).unwrap();
}

/// Takes memory that comes as a descriptor, most of it before the State and some after it, into a differential and beside a hook.
fn take_descriptor(base: &Path, target: &Path, memory: &File) {
    let local = LocalOptions { warm_timeout: Some(Duration::MAX), ..LocalOptions::default() };
    let base = Some(Base::open([base], &SnapshotLimits::default()).unwrap());
    let on_paused: Option<OnPaused> = Some(Box::new(|| Ok(())));
    let options = DestinationOptions { base, local, on_paused, ..DestinationOptions::default() };
    let name = target.to_owned();
    let mut destination = SnapshotDestination::named_by(Box::new(move |_| name), options);
    destination.descriptor(0, memory.try_clone().unwrap().into()).unwrap();
    let mapping = format!(r#"{{"slot":0,"gpa":0,"size":{BYTES},"virtio_mem":false,"file_offset":0}}"#);
    let memory_manager = format!(r#"{{"guest_ram_mappings":[{mapping}]}}"#);
    let config = std::str::from_utf8(VM_CONFIG).unwrap();
    let message = format!(r#"{{"vm_config":{config},"memory_manager_data":{memory_manager}}}"#);
    destination.config(message.as_bytes()).unwrap();
    memory.write_all_at(&[5; 4096], 9 << 12).unwrap();
    destination.state(state().into_bytes()).unwrap();
    destination.complete(false).unwrap();
}

/// Guest memory in a memfd, with a page that is no hole.
fn memory() -> File {
    let memory = File::from(memfd_create("guest", MemfdFlags::CLOEXEC).unwrap());
    memory.set_len(BYTES).unwrap();
    memory.write_all_at(&[3; 4096], 7 << 12).unwrap();
    memory
}

#[test]
fn snapshot_write() {
    check("snapshot::snapshot_write", syscalls::SNAPSHOT_WRITE, syscalls::RECEIVER, |confinement| {
        let temporary = tempfile::tempdir().unwrap();
        let at = |name: &str| temporary.path().join(name);
        let listener = Listener::bind(&Url::unix(at("socket")).unwrap()).unwrap();
        confinement.run(|| {
            write(&at("full"));
            write_differential(&at("full"), &at("differential"));
            let chain =
                SnapshotChain::open([at("full"), at("differential")], &SnapshotLimits::default()).unwrap();
            apply(&chain, &at("applied"), &SnapshotLimits::default()).unwrap();
            let full = Arc::new(SnapshotChain::open([at("full")], &SnapshotLimits::default()).unwrap());
            let applied = SnapshotChain::open([at("applied")], &SnapshotLimits::default()).unwrap();
            subtract(&applied, full, &at("subtracted"), &SnapshotLimits::default()).unwrap();
        });
        // A directory that is there is followed to where it is.
        std::fs::create_dir(at("empty")).unwrap();
        confinement.run(|| write(&at("empty")));
        std::fs::remove_file(at("applied").join(MANIFEST_FILE)).unwrap();
        confinement.run(|| seal(&at("applied"), &SnapshotLimits::default()).unwrap());
        let memory = memory();
        confinement.run(|| take_descriptor(&at("full"), &at("passed"), &memory));
        assert!(verify(&at("passed"), &SnapshotLimits::default()).unwrap().is_clean());
        thread::scope(|scope| {
            scope.spawn(|| confinement.run(|| receive(&listener, &at("received"))));
            send(&at("full"), listener.url());
        });
        assert!(verify(&at("received"), &SnapshotLimits::default()).unwrap().is_clean());
    });
}

#[test]
fn snapshot_read() {
    check("snapshot::snapshot_read", syscalls::SNAPSHOT_READ, syscalls::SENDER, |confinement| {
        let temporary = tempfile::tempdir().unwrap();
        let at = |name: &str| temporary.path().join(name);
        write(&at("full"));
        write_differential(&at("full"), &at("differential"));
        let listener = Listener::bind(&Url::unix(at("socket")).unwrap()).unwrap();
        confinement.run(|| {
            describe(&at("differential"), &SnapshotLimits::default()).unwrap();
            assert!(verify(&at("full"), &SnapshotLimits::default()).unwrap().is_clean());
            assert!(verify(&at("differential"), &SnapshotLimits::default()).unwrap().is_clean());
            let full = SnapshotChain::open([at("full")], &SnapshotLimits::default()).unwrap();
            let chain =
                SnapshotChain::open([at("full"), at("differential")], &SnapshotLimits::default()).unwrap();
            assert!(!compare(&full, &chain).unwrap().is_empty());
        });
        thread::scope(|scope| {
            scope.spawn(|| receive(&listener, &at("received")));
            confinement.run(|| send(&at("full"), listener.url()));
        });
    });
}

/// Hands the VM of a full snapshot and a differential over as descriptors.
fn pass(place: &Path, on_demand: bool) {
    let directories = ["full", "differential"].map(|name| place.join(name));
    let chain = SnapshotChain::open(directories, &SnapshotLimits::default()).unwrap();
    let options = LocalSendOptions { on_demand, ..LocalSendOptions::default() };
    let sender = LocalSender::new(chain, options).unwrap();
    sender.send(&Url::unix(place.join("waiting")).unwrap()).unwrap();
}

/// Takes a VM, and asks for all of its memory where it comes on demand.
fn wait_for(vmm: &Vmm, on_demand: bool) {
    let mut line = vmm.accept();
    assert!(line.answer_until(CONFIG));
    line.answer(OK);
    let mut faults = on_demand.then(|| Faults::accept(vmm));
    assert_eq!(line.next(), Some(STATE));
    if let Some(faults) = &mut faults {
        assert_eq!(faults.ask(0, 4096), Some(OK));
    }
    line.answer(OK);
    assert!(line.next().is_some());
    line.answer(OK);
    if let Some(faults) = &mut faults {
        (0..BYTES).step_by(4096).for_each(|gpa| assert_eq!(faults.ask(gpa, 4096), Some(OK)));
    }
}

#[test]
fn snapshot_local_send() {
    check("snapshot::snapshot_local_send", syscalls::LOCAL_SENDER, syscalls::SNAPSHOT_READ, |confinement| {
        let place = tempfile::tempdir().unwrap();
        write(&place.path().join("full"));
        write_differential(&place.path().join("full"), &place.path().join("differential"));
        let vmm = Vmm::bind(&place.path().join("waiting"));
        for on_demand in [false, true] {
            thread::scope(|scope| {
                scope.spawn(|| wait_for(&vmm, on_demand));
                confinement.run(|| pass(place.path(), on_demand));
            });
        }
    });
}
