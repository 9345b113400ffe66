// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! How fast a VM moves over loopback, as ratios of two times taken in one run, one right after the other.
//!
//! - `throughput`: our sender to our receiver, against the same bytes through as many plain sockets; at least 0.8.
//! - `directories`: a snapshot directory to a snapshot directory, hashed and safe on disk, against its memory's file through as
//!   many plain sockets to a file that is safe on disk; at least 0.8.
//! - `sparse`: a VM with 64 MiB populated of 4 GiB of RAM, against the same VM fully populated; at most 0.05.
//!
//! `cargo bench --bench transfer` does all, `cargo bench --bench transfer -- sparse` one of them. Fails when a limit is missed.

#![expect(clippy::unwrap_used, reason = "a benchmark that cannot go on ends")]
#![expect(clippy::print_stdout, reason = "figures are what a benchmark is for")]
#![expect(clippy::cast_precision_loss, reason = "figures for people")]
#![expect(clippy::cast_possible_truncation, reason = "constants of a few pages")]

use std::fs::{self, File};
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use rustix::fs::{MemfdFlags, memfd_create};
use serde_json::{Value, json};
use vfio_migration::layout::Layout;
use vfio_migration::migratable::MigratableDevice;
use vfio_migration::snapshot::{
    DestinationOptions, Limits as DirLimits, MEMORY_FILE, SnapshotDestination, SnapshotDir, SnapshotSource,
};
use vfio_migration::source::GuestMemoryLog;
use vfio_migration::transfer::connection::Listener;
use vfio_migration::transfer::limits::{ConnectionCount, Limits};
use vfio_migration::transfer::receive::{Destination, GuestPages, PageStore, Receiver};
use vfio_migration::transfer::url::Url;
use vfio_migration::transfer::{Migration, SendOptions, Sender, Sent};
use vfio_migration::vm::{Backing, Captured, Vm, VmError};
use vm_memory::bitmap::AtomicBitmap;
use vm_memory::{
    Bytes, FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, ReadVolatile, WriteVolatile,
};
use vm_migration::Snapshot;

type Memory = GuestMemoryMmap<AtomicBitmap>;

const CONNECTIONS: [u64; 3] = [1, 4, 16];

const THROUGHPUT_BYTES: u64 = 1 << 30;
const THROUGHPUT_RUNS: usize = 5;
const LEAST_THROUGHPUT: f64 = 0.8;
/// Bytes that plain sockets move in one call.
const PLAIN_BYTES: u64 = 1 << 20;

const DIRECTORY_BYTES: u64 = 1 << 30;

const SPARSE_BYTES: u64 = 4 << 30;
const POPULATED_BYTES: u64 = 64 << 20;
const MOST_TIME: f64 = 0.05;

const PAGE: u64 = 4096;

fn memory(bytes: u64) -> Arc<Memory> {
    let file = File::from(memfd_create("guest-ram", MemfdFlags::CLOEXEC).unwrap());
    file.set_len(bytes).unwrap();
    let region = (GuestAddress(0), usize::try_from(bytes).unwrap(), Some(FileOffset::new(file, 0)));
    Arc::new(Memory::from_ranges_with_files([region]).unwrap())
}

/// Numbers that no page repeats.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn fill(&mut self, memory: &Memory, gpa: u64) {
        let mut page = [0; PAGE as usize];
        page.chunks_exact_mut(8).for_each(|word| word.copy_from_slice(&self.next().to_ne_bytes()));
        memory.write_slice(&page, GuestAddress(gpa)).unwrap();
    }
}

fn populated(bytes: u64) -> Arc<Memory> {
    let (memory, mut random) = (memory(bytes), Random(0x9e37_79b9_7f4a_7c15));
    (0..bytes).step_by(PAGE as usize).for_each(|gpa| random.fill(&memory, gpa));
    memory
}

/// A VM that stands where it is put.
struct StillVm(Arc<Memory>);

impl StillVm {
    fn memory_manager(&self) -> Value {
        let bytes = bytes_of(&self.0);
        json!({
            "memory_ranges": { "data": [{ "gpa": 0, "length": bytes }] },
            "guest_ram_mappings": [{ "slot": 0, "gpa": 0, "size": bytes, "virtio_mem": false }],
        })
    }
}

impl Vm for StillVm {
    type Memory = Memory;

    fn memory(&self) -> Arc<Memory> {
        Arc::clone(&self.0)
    }

    fn backing(&self) -> Backing {
        Backing::of_mmap(&self.0)
    }

    fn config(&mut self) -> Result<Vec<u8>, VmError> {
        let config = json!({
            "vm_config": { "memory": { "size": bytes_of(&self.0) }, "disks": null },
            "memory_manager_data": self.memory_manager(),
        });
        Ok(serde_json::to_vec(&config)?)
    }

    fn pause(&mut self) -> Result<(), VmError> {
        Ok(())
    }

    fn resume(&mut self) -> Result<(), VmError> {
        Ok(())
    }

    fn state(&mut self, _devices: Snapshot) -> Result<Captured, VmError> {
        let mut root = Snapshot::new_from_state(&json!({ "common_cpuid": [] }))?;
        let memory_manager = Snapshot::new_from_state(&self.memory_manager())?;
        root.add_snapshot("memory-manager".to_owned(), memory_manager);
        Ok(root.into())
    }

    fn can_throttle(&self) -> bool {
        false
    }

    fn throttle(&mut self, _percent: u8) {}
}

/// Where it goes.
struct Vmm(Arc<Memory>);

impl Destination for Vmm {
    fn config(&mut self, _json: &[u8]) -> Result<Arc<dyn PageStore>, VmError> {
        Ok(Arc::new(GuestPages::new(Arc::clone(&self.0))?))
    }

    fn state(&mut self, _json: Vec<u8>) -> Result<(), VmError> {
        Ok(())
    }

    fn complete(&mut self, _paused: bool) -> Result<(), VmError> {
        Ok(())
    }

    fn abandoned(&mut self) {}
}

/// Moves `source` into fresh memory, and tells how long that took.
fn migrate(source: &Arc<Memory>, connections: u64) -> (Duration, Sent) {
    let layout = Layout::from_guest_memory(&**source).unwrap();
    let log = Box::new(GuestMemoryLog::new(Arc::clone(source)));
    let mut machine = MigratableDevice::builder("vm", layout).source(log).build().unwrap();
    let mut vmm = Vmm(memory(bytes_of(source)));
    transfer(&mut StillVm(Arc::clone(source)), &mut machine, &mut vmm, connections)
}

fn transfer(
    vm: &mut impl Vm,
    machine: &mut MigratableDevice,
    destination: &mut (dyn Destination + Send),
    connections: u64,
) -> (Duration, Sent) {
    let listener = Listener::bind(&Url::tcp("127.0.0.1", 0).unwrap()).unwrap();
    let mut options = SendOptions::new(listener.url().clone());
    options.connections = ConnectionCount::new(connections).unwrap();
    thread::scope(|scope| {
        let receiver = Receiver::new(Limits::default(), None);
        let receiving = scope.spawn(move || receiver.receive(&listener, destination));
        let begun = Instant::now();
        let sent = Sender::new(options).send(vm, machine, &Migration::new());
        let took = begun.elapsed();
        receiving.join().unwrap().unwrap();
        (took, sent.unwrap())
    })
}

fn bytes_of(memory: &Memory) -> u64 {
    memory.last_addr().0 + 1
}

/// Copies `source` into fresh memory through plain sockets, a stretch of it through each, and tells how long that took.
fn copy_plainly(source: &Memory, connections: u64) -> Duration {
    let (bytes, destination) = (bytes_of(source), memory(bytes_of(source)));
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let stretch = bytes / connections;
    let begun = Instant::now();
    thread::scope(|scope| {
        for index in 0..connections {
            let destination = &destination;
            let pieces = move || (index * stretch..(index + 1) * stretch).step_by(PLAIN_BYTES as usize);
            let mut stream = TcpStream::connect(address).unwrap();
            let mut accepted = listener.accept().unwrap().0;
            scope.spawn(move || {
                for gpa in pieces() {
                    let slice = source.get_slice(GuestAddress(gpa), PLAIN_BYTES as usize).unwrap();
                    stream.write_all_volatile(&slice).unwrap();
                }
                stream.read_exact(&mut [0]).unwrap();
            });
            scope.spawn(move || {
                for gpa in pieces() {
                    let mut slice = destination.get_slice(GuestAddress(gpa), PLAIN_BYTES as usize).unwrap();
                    accepted.read_exact_volatile(&mut slice).unwrap();
                }
                accepted.write_all(&[1]).unwrap();
            });
        }
    });
    begun.elapsed()
}

/// Copies a file through plain sockets, a stretch of it through each, until it is safe on disk.
fn copy_file_plainly(from: &File, to: &Path, connections: u64) -> Duration {
    let bytes = from.metadata().unwrap().len();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let stretch = bytes / connections;
    let begun = Instant::now();
    let to = File::create(to).unwrap();
    to.set_len(bytes).unwrap();
    thread::scope(|scope| {
        for index in 0..connections {
            let to = &to;
            let pieces = move || (index * stretch..(index + 1) * stretch).step_by(PLAIN_BYTES as usize);
            let mut stream = TcpStream::connect(address).unwrap();
            let mut accepted = listener.accept().unwrap().0;
            scope.spawn(move || {
                let mut buffer = vec![0; PLAIN_BYTES as usize];
                for offset in pieces() {
                    from.read_exact_at(&mut buffer, offset).unwrap();
                    stream.write_all(&buffer).unwrap();
                }
            });
            scope.spawn(move || {
                let mut buffer = vec![0; PLAIN_BYTES as usize];
                for offset in pieces() {
                    accepted.read_exact(&mut buffer).unwrap();
                    to.write_all_at(&buffer, offset).unwrap();
                }
            });
        }
    });
    to.sync_all().unwrap();
    begun.elapsed()
}

fn median(mut figures: Vec<f64>) -> f64 {
    figures.sort_unstable_by(f64::total_cmp);
    figures[figures.len() / 2]
}

fn gib_per_second(bytes: u64, time: Duration) -> f64 {
    bytes as f64 / f64::from(1 << 30) / time.as_secs_f64()
}

/// Takes both times again and again, and compares the median of their ratios with what is wanted.
fn is_fast_enough(
    connections: u64,
    bytes: u64,
    plain: impl Fn(u64) -> Duration,
    ours: impl Fn(u64) -> Duration,
) -> bool {
    let ratios = (0..THROUGHPUT_RUNS).map(|_| {
        let (plain, ours) = (plain(connections), ours(connections));
        let ratio = plain.as_secs_f64() / ours.as_secs_f64();
        println!(
            "  x{connections:<2}  plain {:.2} GiB/s  ours {:.2} GiB/s  ratio {ratio:.2}",
            gib_per_second(bytes, plain),
            gib_per_second(bytes, ours),
        );
        ratio
    });
    let ratio = median(ratios.collect());
    println!("  x{connections:<2}  median ratio {ratio:.2}, at least {LEAST_THROUGHPUT} wanted");
    ratio >= LEAST_THROUGHPUT
}

fn throughput() -> bool {
    let source = populated(THROUGHPUT_BYTES);
    println!("throughput: {} MiB, sender to receiver against plain sockets", THROUGHPUT_BYTES >> 20);
    let plain = |connections| copy_plainly(&source, connections);
    let ours = |connections| {
        let (took, sent) = migrate(&source, connections);
        assert!(sent.bytes_sent >= THROUGHPUT_BYTES);
        took
    };
    let misses = CONNECTIONS.map(|connections| !is_fast_enough(connections, THROUGHPUT_BYTES, plain, ours));
    !misses.contains(&true)
}

fn directories() -> bool {
    let folder = tempfile::tempdir().unwrap();
    let original = folder.path().join("original");
    store(&populated(DIRECTORY_BYTES), &original);
    println!("directories: {} MiB of memory, send to receive against plain sockets", DIRECTORY_BYTES >> 20);
    let plain = |connections| {
        let (from, to) = (File::open(original.join(MEMORY_FILE)).unwrap(), folder.path().join("plain"));
        let took = copy_file_plainly(&from, &to, connections);
        fs::remove_file(to).unwrap();
        took
    };
    let ours = |connections| {
        let to = folder.path().join("copy");
        let took = send_directory(&original, &to, connections);
        fs::remove_dir_all(to).unwrap();
        took
    };
    let misses = CONNECTIONS.map(|connections| !is_fast_enough(connections, DIRECTORY_BYTES, plain, ours));
    !misses.contains(&true)
}

fn store(source: &Arc<Memory>, target: &Path) {
    let layout = Layout::from_guest_memory(&**source).unwrap();
    let mut machine = MigratableDevice::builder("vm", layout).build().unwrap();
    let mut directory = SnapshotDestination::create(target, DestinationOptions::default()).unwrap();
    transfer(&mut StillVm(Arc::clone(source)), &mut machine, &mut directory, 1);
}

fn send_directory(from: &Path, to: &Path, connections: u64) -> Duration {
    let mut source = SnapshotSource::new(SnapshotDir::open(from, &DirLimits::default()).unwrap()).unwrap();
    let mut machine = MigratableDevice::builder("vm", source.layout().clone()).build().unwrap();
    let mut directory = SnapshotDestination::create(to, DestinationOptions::default()).unwrap();
    transfer(&mut source, &mut machine, &mut directory, connections).0
}

/// Populates pages picked at random, which is the worst for whoever looks for holes.
fn sparse_memory() -> Arc<Memory> {
    let (memory, mut random) = (memory(SPARSE_BYTES), Random(0x5eed));
    let mut taken = vec![false; usize::try_from(SPARSE_BYTES / PAGE).unwrap()];
    for _ in 0..POPULATED_BYTES / PAGE {
        let page = loop {
            let page = random.next() % (SPARSE_BYTES / PAGE);
            if !std::mem::replace(&mut taken[usize::try_from(page).unwrap()], true) {
                break page;
            }
        };
        random.fill(&memory, page * PAGE);
    }
    memory
}

fn sparse() -> bool {
    let (sparse, full) = (sparse_memory(), populated(SPARSE_BYTES));
    let mut holds = true;
    println!("sparse: {} of {} MiB populated against all of it", POPULATED_BYTES >> 20, SPARSE_BYTES >> 20);
    for connections in [1, 4] {
        let (little, sent) = migrate(&sparse, connections);
        let (all, _) = migrate(&full, connections);
        let ratio = little.as_secs_f64() / all.as_secs_f64();
        holds &= ratio <= MOST_TIME;
        println!(
            "  x{connections}  sparse {little:.1?} ({} MiB of holes left out)  full {all:.1?}  ratio {ratio:.4}, at most {MOST_TIME} wanted",
            sent.skipped_hole_bytes >> 20
        );
    }
    holds
}

fn main() -> ExitCode {
    let wanted: Vec<_> = std::env::args().skip(1).filter(|argument| !argument.starts_with('-')).collect();
    let is_wanted = |name: &str| wanted.is_empty() || wanted.iter().any(|wanted| wanted == name);
    let benchmarks: [(_, fn() -> bool); 3] =
        [("throughput", throughput), ("directories", directories), ("sparse", sparse)];
    let chosen = benchmarks.into_iter().filter(|(name, _)| is_wanted(name));
    // All of them, also when one misses its limit.
    let missed = chosen.filter(|(_, holds)| !holds()).count();
    if missed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
