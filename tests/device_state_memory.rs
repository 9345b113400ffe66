// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What devices' states cost in memory: in State, at a plain source's and at a plain receiver's other end, and as streams.
//!
//! Memory is all that is allocated on the heap, at both ends where both are here. Guest memory and the stacks of threads are none of it.
#![expect(clippy::unwrap_used, reason = "a test may end at any surprise")]

mod counting;
#[expect(dead_code, reason = "other tests use the rest")]
mod frames;

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, OnceLock};
use std::thread;
use std::time::Duration;

use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use counting::{alone, most_of};
use frames::{COMPLETE, CONFIG, START, STATE, component, message, request};
use vfio_migration::device::{
    Capabilities, DataRead, Device, DeviceError, DeviceIo, DeviceSet, DeviceState, PrecopyInfo,
};
use vfio_migration::layout::Layout;
use vfio_migration::migratable::MigratableDevice;
use vfio_migration::tracker::{Tracker, VmMappings};
use vfio_migration::transfer::connection::{Connection, Listener};
use vfio_migration::transfer::limits::{ConnectionCount, PeerLimits};
use vfio_migration::transfer::receive::{Completion, Destination, GuestPages, PageStore, Receiver};
use vfio_migration::transfer::{SendOptions, Sender};
use vfio_migration::vm::{Backing, Captured, Vm, VmError, read_tree};
use vm_memory::{GuestAddress, GuestMemoryMmap};
use vm_migration::Snapshot;

const REGION: usize = 1 << 20;
const PIECE_BYTES: usize = 3 << 16;

/// Bytes of the device's state; `VFIO_MIGRATE_TEST_PLAIN_STATE_MIB` makes it another number of MiB.
fn state_bytes() -> usize {
    let mib = std::env::var("VFIO_MIGRATE_TEST_PLAIN_STATE_MIB");
    let mib: usize = mib.map_or(64, |mib| mib.parse().unwrap());
    (mib << 20) / PIECE_BYTES * PIECE_BYTES
}

type Memory = GuestMemoryMmap<()>;

fn memory() -> Arc<Memory> {
    Arc::new(Memory::from_ranges(&[(GuestAddress(0), REGION)]).unwrap())
}

/// Bytes after which a device's state repeats; a prime, so that no two pieces are alike.
const PERIOD: usize = 65_521;

fn pattern() -> &'static [u8] {
    static PATTERN: OnceLock<Vec<u8>> = OnceLock::new();
    PATTERN.get_or_init(|| {
        (0..PERIOD).map(|at| (at as u64).wrapping_mul(0x9e37_79b1).to_le_bytes()[2]).collect()
    })
}

/// The bytes of a device's state from a place on, in parts, `bytes` in all.
fn parts(mut at: usize, mut bytes: usize) -> impl Iterator<Item = &'static [u8]> {
    std::iter::from_fn(move || {
        let part = &pattern()[at % PERIOD..];
        let part = &part[..part.len().min(bytes)];
        (at, bytes) = (at + part.len(), bytes - part.len());
        (!part.is_empty()).then_some(part)
    })
}

/// A device that makes its state up as it is read, and looks at what is written to it.
struct MadeUp {
    state: Arc<Mutex<DeviceState>>,
    at: usize,
    bytes: usize,
    /// Whether its state streams, and PRE_COPY may be entered.
    streams: bool,
}

impl MadeUp {
    fn device(bytes: usize) -> (Device, Arc<Mutex<DeviceState>>) {
        Self::named("dev", bytes, false)
    }

    fn named(name: &str, bytes: usize, streams: bool) -> (Device, Arc<Mutex<DeviceState>>) {
        let state = Arc::new(Mutex::new(DeviceState::Running));
        let io = Self { state: Arc::clone(&state), at: 0, bytes, streams };
        (Device::new(name, Box::new(io)), state)
    }
}

fn is_saving(state: DeviceState) -> bool {
    matches!(state, DeviceState::PreCopy | DeviceState::PreCopyP2p | DeviceState::StopCopy)
}

impl DeviceIo for MadeUp {
    fn capabilities(&self) -> Capabilities {
        Capabilities { p2p: true, pre_copy: true }
    }

    fn state(&mut self) -> Result<DeviceState, DeviceError> {
        Ok(*self.state.lock().unwrap())
    }

    fn set_state(&mut self, state: DeviceState) -> Result<(), DeviceError> {
        let mut now = self.state.lock().unwrap();
        if *now == DeviceState::Resuming {
            assert_eq!((state, self.at), (DeviceState::Stop, self.bytes), "the state is whole");
        }
        let early = state == DeviceState::PreCopy;
        assert!(self.streams || !early, "what is read in PRE_COPY only makes State longer");
        if !is_saving(*now) || !is_saving(state) {
            self.at = 0;
        }
        *now = state;
        Ok(())
    }

    fn read_data(&mut self, buffer: &mut [u8]) -> Result<DataRead, DeviceError> {
        let bytes = buffer.len().min(self.bytes - self.at);
        let mut to = buffer;
        for part in parts(self.at, bytes) {
            let (now, rest) = to.split_at_mut(part.len());
            now.copy_from_slice(part);
            to = rest;
        }
        self.at += bytes;
        Ok(match bytes {
            0 if *self.state.lock().unwrap() == DeviceState::StopCopy => DataRead::End,
            0 => DataRead::NothingNow,
            bytes => DataRead::Bytes(bytes),
        })
    }

    fn write_data(&mut self, data: &[u8]) -> Result<(), DeviceError> {
        let mut left = data;
        for part in parts(self.at, data.len()) {
            let (now, rest) = left.split_at(part.len());
            assert!(now == part, "wrong bytes after {}", self.at);
            left = rest;
        }
        self.at += data.len();
        Ok(())
    }

    fn precopy_info(&mut self) -> Result<Option<PrecopyInfo>, DeviceError> {
        let left = (self.bytes - self.at) as u64;
        Ok(Some(PrecopyInfo { initial_bytes: left, dirty_bytes: 0 }))
    }

    fn data_size(&mut self) -> Result<Option<u64>, DeviceError> {
        Ok(Some(self.bytes as u64))
    }

    fn reset(&mut self) -> Result<(), DeviceError> {
        *self.state.lock().unwrap() = DeviceState::Running;
        Ok(())
    }
}

struct Source(Arc<Memory>);

impl Vm for Source {
    type Memory = Memory;

    fn memory(&self) -> Arc<Memory> {
        Arc::clone(&self.0)
    }

    fn backing(&self) -> Backing {
        Backing::default()
    }

    fn config(&mut self) -> Result<Vec<u8>, VmError> {
        Ok(b"{}".to_vec())
    }

    fn pause(&mut self) -> Result<(), VmError> {
        Ok(())
    }

    fn resume(&mut self) -> Result<(), VmError> {
        Ok(())
    }

    fn state(&mut self, devices: Snapshot) -> Result<Captured, VmError> {
        let mut root = Snapshot::default();
        root.add_snapshot("devices".to_owned(), devices);
        Ok(root.into())
    }

    fn can_throttle(&self) -> bool {
        false
    }

    fn throttle(&mut self, _percent: u8) {}
}

/// A plain receiver that keeps nothing; returns the bytes of the State.
fn drain(mut stream: UnixStream) -> u64 {
    let mut buffer = vec![0; 1 << 16];
    let mut state_bytes = 0;
    loop {
        let mut head = [0; 16];
        stream.read_exact(&mut head).unwrap();
        let command = u16::from_le_bytes([head[0], head[1]]);
        let length = u64::from_le_bytes(head[8..].try_into().unwrap());
        let mut left = length;
        let mut pages = 0;
        while left > 0 {
            let bytes = stream.read(&mut buffer[..usize::try_from(left.min(1 << 16)).unwrap()]).unwrap();
            assert_ne!(bytes, 0, "the source ended");
            left -= bytes as u64;
            if command == frames::MEMORY {
                let lengths = buffer[..bytes].chunks_exact(16);
                pages += lengths.map(|entry| u64::from_le_bytes(entry[8..].try_into().unwrap())).sum::<u64>();
            }
        }
        while pages > 0 {
            pages -= stream.read(&mut buffer[..usize::try_from(pages.min(1 << 16)).unwrap()]).unwrap() as u64;
        }
        if command == STATE {
            state_bytes = length;
        }
        stream.write_all(&[&[1][..], &[0; 15]].concat()).unwrap();
        if command == COMPLETE {
            return state_bytes;
        }
    }
}

fn tracker(memory: &Arc<Memory>) -> Tracker {
    let maps = Arc::clone(memory);
    let builder = Tracker::builder(Layout::from_guest_memory(&**memory).unwrap());
    builder.mappings(move || VmMappings::of_memory(&*maps)).build().unwrap()
}

/// Sends the VM to a plain receiver; returns the bytes of its State.
fn send(bytes: usize) -> u64 {
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("socket");
    let listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
    let memory = memory();
    let tracker = Mutex::new(tracker(&memory));
    let devices = Mutex::new(DeviceSet::new(vec![MadeUp::device(bytes).0]).unwrap());
    let url = format!("unix:{}", socket.display()).parse().unwrap();
    thread::scope(|scope| {
        let receiver = scope.spawn(|| drain(listener.accept().unwrap().0));
        let options = SendOptions::new(url).downtime(Duration::from_secs(600));
        let sent = Sender::new(options).send(&mut Source(memory), &tracker, &devices).unwrap();
        assert_eq!((sent.device_state_bytes, sent.device_precopy_bytes), (bytes as u64, 0));
        receiver.join().unwrap()
    })
}

/// A VMM that makes a tree of State.
struct Vmm {
    memory: Arc<Memory>,
    devices: MigratableDevice,
    streams: bool,
}

impl Vmm {
    fn new(devices: Vec<Device>, streams: bool) -> Self {
        let memory = memory();
        let tracker = Arc::new(Mutex::new(tracker(&memory)));
        let devices = Arc::new(Mutex::new(DeviceSet::new(devices).unwrap()));
        Self { memory, devices: MigratableDevice::new("devices", tracker, devices), streams }
    }
}

impl Destination for Vmm {
    fn device_streams(&mut self) -> Option<Arc<Mutex<DeviceSet>>> {
        self.streams.then(|| Arc::clone(self.devices.devices()))
    }

    fn config(&mut self, _json: &[u8]) -> Result<Arc<dyn PageStore>, VmError> {
        Ok(Arc::new(GuestPages::new(Arc::clone(&self.memory))?))
    }

    fn state(&mut self, json: Vec<u8>) -> Result<(), VmError> {
        let tree = read_tree(json)?;
        let parent = tree.snapshots.get("device-manager").unwrap_or(&tree);
        Ok(self.devices.restore_child(parent)?)
    }

    fn complete(&mut self, _paused: bool) -> Result<Completion, VmError> {
        Ok(Completion::Moved)
    }

    fn abandoned(&mut self) {}
}

/// Sends, as a source of another make does, a VM whose device has so many bytes of state.
fn foreign_source(mut stream: UnixStream, bytes: usize) {
    let blob = component("vfio_migration", "", r#"{\"blob\":\"@\"}"#);
    let devices = component("devices", &component("dev", &blob, "{}"), "{}");
    let tree = format!(r#"{{"snapshots":{{{}}}}}"#, component("device-manager", &devices, "{}"));
    let (begin, end) = tree.split_once('@').unwrap();
    let answer = |stream: &mut UnixStream| {
        let mut answer = [0; 16];
        stream.read_exact(&mut answer).unwrap();
        assert_eq!(answer[0], 1, "refused");
    };
    for message in [message(START, b""), message(CONFIG, b"{}")] {
        stream.write_all(&message).unwrap();
        answer(&mut stream);
    }
    stream.write_all(&request(STATE, (begin.len() + bytes / 3 * 4 + end.len()) as u64)).unwrap();
    stream.write_all(begin.as_bytes()).unwrap();
    for first in (0..bytes).step_by(PIECE_BYTES) {
        let piece: Vec<u8> = parts(first, PIECE_BYTES).flatten().copied().collect();
        stream.write_all(BASE64.encode(piece).as_bytes()).unwrap();
    }
    stream.write_all(end.as_bytes()).unwrap();
    answer(&mut stream);
    stream.write_all(&request(COMPLETE, 0)).unwrap();
    answer(&mut stream);
}

fn receive(bytes: usize) {
    let (device, state) = MadeUp::device(bytes);
    let mut vmm = Vmm::new(vec![device], false);
    let limits = PeerLimits::default();
    let (near, far) = UnixStream::pair().unwrap();
    thread::scope(|scope| {
        scope.spawn(|| foreign_source(near, bytes));
        let connection = Connection::from_unix(far, &limits).unwrap();
        Receiver::new(limits, None).receive_from(connection, &mut vmm).unwrap();
    });
    assert_eq!(*state.lock().unwrap(), DeviceState::Stop, "loaded");
}

/// Moves the states of so many devices, of `bytes` each, as streams; returns the bytes of all, and those that moved in the downtime, of each.
fn stream(devices: usize, bytes: usize, connections: u64) -> (u64, Vec<u64>) {
    let count = devices;
    let devices =
        || (0..count).map(|index| MadeUp::named(&format!("dev{index}"), bytes, true).0).collect::<Vec<_>>();
    let mut vmm = Vmm::new(devices(), true);
    let listener = Listener::bind(&"tcp:127.0.0.1:0".parse().unwrap()).unwrap();
    let memory = memory();
    let tracker = Mutex::new(tracker(&memory));
    let devices = Mutex::new(DeviceSet::new(devices()).unwrap());
    let options = SendOptions::new(listener.url().clone()).downtime(Duration::from_secs(600));
    let options = options.connections(ConnectionCount::new(connections).unwrap()).unwrap();
    let sent = thread::scope(|scope| {
        let received =
            scope.spawn(|| Receiver::new(PeerLimits::default(), None).receive(&listener, &mut vmm));
        let sent = Sender::new(options).send(&mut Source(memory), &tracker, &devices);
        assert_eq!(received.join().unwrap().unwrap().device_bytes, (count * bytes) as u64);
        sent.unwrap()
    });
    let in_downtime: Vec<_> = sent.device_downtimes.iter().map(|device| device.bytes).collect();
    assert_eq!(in_downtime.iter().sum::<u64>(), sent.device_state_bytes - sent.device_precopy_bytes);
    (sent.device_state_bytes, in_downtime)
}

/// What both ends may hold together of states that stream.
const STREAMING_BYTES: usize = 64 << 20;

/// The same of very many: 32 MiB of pieces at the source, as much at the receiver and 8 MiB of buffers, and 8 MiB beside them.
const MANY_STREAMS_BYTES: usize = 80 << 20;

#[test]
fn the_states_of_two_devices_stream_in_little_memory_and_hardly_any_in_the_downtime() {
    let _alone = alone();
    let bytes = state_bytes();
    let ((moved, in_downtime), most) = most_of(|| stream(2, bytes, 4));
    eprintln!(
        "two states of {} MiB: {in_downtime:?} bytes in the downtime, both ends held {} MiB",
        bytes >> 20,
        most >> 20
    );
    assert_eq!((moved, in_downtime.len()), (2 * bytes as u64, 2));
    for of_device in in_downtime {
        assert!(
            of_device * 20 <= bytes as u64,
            "{of_device} of {bytes} bytes of a device moved in the downtime"
        );
    }
    assert!(most <= STREAMING_BYTES, "both ends held {} MiB", most >> 20);
}

#[test]
fn the_states_of_many_devices_over_many_connections_stream_in_as_little_memory() {
    let _alone = alone();
    let (devices, bytes) = (200, 1 << 20);
    let ((moved, in_downtime), most) = most_of(|| stream(devices, bytes, 64));
    eprintln!("{devices} states of {} MiB: both ends held {} MiB", bytes >> 20, most >> 20);
    assert_eq!((moved, in_downtime.len()), ((devices * bytes) as u64, devices));
    assert!(most <= MANY_STREAMS_BYTES, "both ends held {} MiB", most >> 20);
}

/// What is held beside a state: pieces, buffers, threads.
const BESIDE_BYTES: usize = 8 << 20;

/// Checks the most that was held against the state's text and an eighth of it, by which buffers grow: 1.5 times the state.
fn assert_lean(what: &str, bytes: usize, most: usize) {
    let times = most as f64 / bytes as f64;
    eprintln!("{what}: a state of {} MiB took {} MiB, {times:.2} times as much", bytes >> 20, most >> 20);
    assert!(most > bytes, "{what}: nothing was measured");
    assert!(most <= bytes / 2 * 3 + BESIDE_BYTES, "{what}: {times:.2} times the state");
}

#[test]
fn a_source_holds_a_devices_state_once_as_the_text_that_it_sends_to_a_plain_receiver() {
    let _alone = alone();
    let bytes = state_bytes();
    let (sent, most) = most_of(|| send(bytes));
    assert!(sent > bytes as u64 / 3 * 4, "the state was in State");
    assert_lean("source", bytes, most);
}

#[test]
fn a_receiver_holds_a_devices_state_once_as_the_text_that_came_from_a_plain_source() {
    let _alone = alone();
    let bytes = state_bytes();
    let ((), most) = most_of(|| receive(bytes));
    assert_lean("receiver", bytes, most);
}
