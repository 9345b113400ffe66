// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Devices' states as streams, from our sender to our receiver.

use std::cell::Cell;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread;
use std::time::Duration;

use vfio_migration::device::{
    Capabilities, DataRead, Device, DeviceError, DeviceIo, DeviceOperation, DeviceSet, DeviceState,
    IdentityMismatch, PrecopyInfo,
};
use vfio_migration::layout::Layout;
use vfio_migration::migratable::MigratableDevice;
use vfio_migration::tracker::Tracker;
use vfio_migration::transfer::connection::Listener;
use vfio_migration::transfer::frame::MemoryTable;
use vfio_migration::transfer::limits::{ConnectionCount, PeerLimits};
use vfio_migration::transfer::receive::{
    Completion, Destination, GuestPages, PageStore, Pages, ReceiveError, Received, Receiver,
};
use vfio_migration::transfer::{SendError, SendOptions, Sender, Sent, SourceVm};
use vfio_migration::vm::VmError;
use vm_migration::Snapshot;

use crate::both_ends::loopback;
use crate::log_of;
use crate::vm::{FakeDevice, FakeVm, Log, Machine, Memory, PAGES, empty_memory, note, read_page};

pub(crate) const MIB: usize = 1 << 20;

/// What a destination's device has been through.
#[derive(Default)]
pub(crate) struct Taken {
    pub(crate) state: Option<DeviceState>,
    pub(crate) written: Vec<u8>,
    /// What it accepted.
    pub(crate) loaded: Option<Vec<u8>>,
    pub(crate) moves: Vec<DeviceState>,
    pub(crate) resets: u32,
    pub(crate) largest_write: usize,
    /// Notes each piece.
    pub(crate) arrivals: Log,
    /// Refuses what would make it more than so many bytes.
    refuse_beyond: Option<usize>,
}

/// A device that takes a state in.
#[derive(Clone)]
pub(crate) struct Taker(Arc<Mutex<Taken>>);

thread_local! {
    static REFUSE_BEYOND: Cell<Option<usize>> = const { Cell::new(None) };
}

/// Makes devices that refuse what would make their states more than so many bytes.
pub(crate) fn refuse_beyond<T>(bytes: usize, make: impl FnOnce() -> T) -> T {
    REFUSE_BEYOND.set(Some(bytes));
    let made = make();
    REFUSE_BEYOND.set(None);
    made
}

impl Taker {
    pub(crate) fn new() -> Self {
        let refuse_beyond = REFUSE_BEYOND.get();
        let state = Some(DeviceState::Running);
        Self(Arc::new(Mutex::new(Taken { state, refuse_beyond, ..Taken::default() })))
    }

    pub(crate) fn look(&self) -> MutexGuard<'_, Taken> {
        self.0.lock().unwrap()
    }
}

impl DeviceIo for Taker {
    fn capabilities(&self) -> Capabilities {
        Capabilities { p2p: true, pre_copy: true }
    }

    fn state(&mut self) -> Result<DeviceState, DeviceError> {
        Ok(self.0.lock().unwrap().state.unwrap())
    }

    fn set_state(&mut self, state: DeviceState) -> Result<(), DeviceError> {
        let mut taken = self.0.lock().unwrap();
        if taken.state == Some(DeviceState::Resuming) && state == DeviceState::Stop {
            taken.loaded = Some(taken.written.clone());
        }
        if state == DeviceState::Resuming {
            taken.written.clear();
        }
        taken.state = Some(state);
        taken.moves.push(state);
        Ok(())
    }

    fn read_data(&mut self, _buffer: &mut [u8]) -> Result<DataRead, DeviceError> {
        unreachable!("a destination's device hands out nothing")
    }

    fn write_data(&mut self, data: &[u8]) -> Result<(), DeviceError> {
        let mut taken = self.0.lock().unwrap();
        assert_eq!(taken.state, Some(DeviceState::Resuming));
        if taken.refuse_beyond.is_some_and(|most| taken.written.len() + data.len() > most) {
            return Err(DeviceError::new(DeviceOperation::WriteData, "scripted to refuse"));
        }
        note(&taken.arrivals, "state");
        taken.written.extend(data);
        taken.largest_write = taken.largest_write.max(data.len());
        Ok(())
    }

    fn precopy_info(&mut self) -> Result<Option<PrecopyInfo>, DeviceError> {
        Ok(None)
    }

    fn data_size(&mut self) -> Result<Option<u64>, DeviceError> {
        Ok(None)
    }

    fn reset(&mut self) -> Result<(), DeviceError> {
        let mut taken = self.0.lock().unwrap();
        taken.state = Some(DeviceState::Running);
        taken.written.clear();
        taken.loaded = None;
        taken.resets += 1;
        Ok(())
    }
}

/// A VMM whose devices are there from the start.
pub(crate) struct Vmm {
    memory: Arc<Memory>,
    pub(crate) devices: MigratableDevice,
    /// Whether states may come as streams.
    pub(crate) streams: bool,
    /// Whether the devices are there only once the configuration has come.
    pub(crate) makes_devices_of_config: bool,
    configured: bool,
    /// Whether the devices' states are loaded with State.
    pub(crate) loads: bool,
    /// How long completing takes.
    pub(crate) completing: Duration,
    /// Notes what it is given.
    pub(crate) log: Log,
    /// Notes each message of memory.
    pub(crate) arrivals: Log,
}

/// Pages whose messages are noted.
struct NotedPages(GuestPages<Memory>, Log);

impl PageStore for NotedPages {
    fn layout(&self) -> &Layout {
        self.0.layout()
    }

    fn fill(&self, table: &MemoryTable, pages: &mut Pages<'_>) -> io::Result<()> {
        note(&self.1, "memory");
        self.0.fill(table, pages)
    }
}

impl Vmm {
    pub(crate) fn new(devices: Vec<Device>) -> Self {
        let memory = Arc::new(empty_memory());
        let layout = Layout::from_guest_memory(&*memory).unwrap();
        let tracker = Arc::new(Mutex::new(Tracker::builder(layout).build().unwrap()));
        let devices = Arc::new(Mutex::new(DeviceSet::new(devices).unwrap()));
        let devices = MigratableDevice::new("devices", tracker, devices);
        let (log, arrivals) = Default::default();
        Self {
            memory,
            devices,
            streams: true,
            makes_devices_of_config: false,
            configured: false,
            loads: true,
            completing: Duration::ZERO,
            log,
            arrivals,
        }
    }

    pub(crate) fn assert_equals(&self, vm: &FakeVm) {
        let wrong = (0..PAGES).filter(|&page| read_page(&self.memory, page) != vm.page(page));
        assert_eq!(wrong.collect::<Vec<_>>(), Vec::<u64>::new(), "pages that differ");
    }
}

impl Destination for Vmm {
    fn device_streams(&mut self) -> Option<Arc<Mutex<DeviceSet>>> {
        assert_eq!(self.makes_devices_of_config, self.configured, "asked at the wrong time");
        self.streams.then(|| Arc::clone(self.devices.devices()))
    }

    fn makes_devices_of_config(&self) -> bool {
        self.makes_devices_of_config
    }

    fn config(&mut self, _json: &[u8]) -> Result<Arc<dyn PageStore>, VmError> {
        note(&self.log, "config");
        self.configured = self.makes_devices_of_config;
        Ok(Arc::new(NotedPages(GuestPages::new(Arc::clone(&self.memory))?, self.arrivals.clone())))
    }

    fn state(&mut self, json: Vec<u8>) -> Result<(), VmError> {
        note(&self.log, "interrupt controller");
        let tree: Snapshot = serde_json::from_slice(&json)?;
        if self.loads {
            self.devices.restore(&tree.snapshots["devices"])?;
        }
        Ok(())
    }

    fn complete(&mut self, _paused: bool) -> Result<Completion, VmError> {
        note(&self.log, "complete");
        thread::sleep(self.completing);
        Ok(Completion::Moved)
    }

    fn abandoned(&mut self) {}
}

/// Bytes that tell where they belong.
pub(crate) fn pattern(bytes: usize, salt: u8) -> Vec<u8> {
    (0..bytes).map(|at| (at.wrapping_mul(0x9e37_79b1) >> 16) as u8 ^ salt).collect()
}

pub(crate) fn source(vm: &FakeVm, states: &[&[u8]], script: impl Fn(usize, &mut FakeDevice)) -> Machine {
    let machine = vm.machine();
    for (index, data) in states.iter().enumerate() {
        let mut io = FakeDevice::new(&vm.log, data);
        io.size = Some(data.len() as u64);
        script(index, &mut io);
        let device = Device::new(format!("dev{index}"), Box::new(io)).kind("fake");
        machine.devices.lock().unwrap().add(device).unwrap();
    }
    machine
}

pub(crate) fn takers(count: usize) -> (Vec<Taker>, Vec<Device>) {
    let takers: Vec<_> = (0..count).map(|_| Taker::new()).collect();
    let device = |(index, taker): (usize, &Taker)| {
        Device::new(format!("dev{index}"), Box::new(taker.clone())).kind("fake")
    };
    let devices = takers.iter().enumerate().map(device).collect();
    (takers, devices)
}

pub(crate) fn moves(
    vm: &mut FakeVm,
    machine: &Machine,
    vmm: &mut Vmm,
    adjust: impl FnOnce(SendOptions) -> SendOptions,
) -> (Result<Sent, SendError>, Result<Received, ReceiveError>) {
    moves_within(PeerLimits::default(), vm, machine, vmm, adjust)
}

/// As [`moves`], to a receiver with these limits.
pub(crate) fn moves_within(
    limits: PeerLimits,
    vm: &mut FakeVm,
    machine: &Machine,
    vmm: &mut Vmm,
    adjust: impl FnOnce(SendOptions) -> SendOptions,
) -> (Result<Sent, SendError>, Result<Received, ReceiveError>) {
    let listener = Listener::bind(&loopback()).unwrap();
    let options = adjust(SendOptions::new(listener.url().clone()).chunk_bytes(256 << 10).unwrap());
    thread::scope(|scope| {
        let receiver = scope.spawn(|| Receiver::new(limits, None).receive(&listener, vmm));
        let sent = Sender::new(options).send(vm, &machine.tracker, &machine.devices);
        (sent, receiver.join().unwrap())
    })
}

pub(crate) fn loaded(taker: &Taker) -> Option<Vec<u8>> {
    taker.0.lock().unwrap().loaded.clone()
}

#[test]
fn states_stream_over_one_and_over_four_connections_and_arrive_whole() {
    for connections in [1, 4] {
        let mut vm = FakeVm::new(20);
        let states = [pattern(9 * MIB + 17, 1), pattern(5, 2), pattern(3 * MIB, 3)];
        let machine = source(&vm, &states.each_ref().map(Vec::as_slice), |_, _| ());
        let (takers, devices) = takers(3);
        let mut vmm = Vmm::new(devices);
        let (sent, received) = moves(&mut vm, &machine, &mut vmm, |options| {
            let options = options.connections(ConnectionCount::new(connections).unwrap()).unwrap();
            // A busy machine misses a shorter one, which is a degradation.
            options.downtime(Duration::from_secs(10))
        });
        let (sent, received) = (sent.unwrap(), received.unwrap());
        vmm.assert_equals(&vm);
        for (taker, state) in takers.iter().zip(&states) {
            assert!(loaded(taker).as_ref() == Some(state), "the state arrived");
            let taken = taker.0.lock().unwrap();
            assert_eq!((taken.state, taken.resets), (Some(DeviceState::Stop), 0));
            assert!(taken.largest_write <= MIB, "no state is held as a whole");
        }
        let bytes: usize = states.iter().map(Vec::len).sum();
        assert_eq!((sent.device_state_bytes, received.device_bytes), (bytes as u64, bytes as u64));
        assert!(sent.device_precopy_bytes > bytes as u64 * 2 / 5, "{sent:?}");
        assert_eq!(sent.progress.degradations.len(), 0, "{:?}", sent.progress.degradations);
    }
}

#[test]
fn a_receiver_that_makes_its_devices_of_the_configuration_takes_streams_too() {
    for connections in [1, 4] {
        let mut vm = FakeVm::new(20);
        let states = [pattern(3 * MIB, 1), pattern(5, 2)];
        let machine = source(&vm, &states.each_ref().map(Vec::as_slice), |_, _| ());
        let (takers, devices) = takers(2);
        let mut vmm = Vmm::new(devices);
        vmm.makes_devices_of_config = true;
        let (sent, received) = moves(&mut vm, &machine, &mut vmm, |options| {
            let options = options.connections(ConnectionCount::new(connections).unwrap()).unwrap();
            options.downtime(Duration::from_secs(10))
        });
        sent.unwrap();
        assert_eq!(received.unwrap().device_bytes, 3 * MIB as u64 + 5);
        vmm.assert_equals(&vm);
        assert!(takers.iter().zip(&states).all(|(taker, state)| loaded(taker).as_ref() == Some(state)));
    }
}

#[test]
fn a_receiver_that_makes_other_devices_of_the_configuration_is_refused_before_a_page() {
    for makes_none in [true, false] {
        let mut vm = FakeVm::new(0);
        let machine = source(&vm, &[b"a state"], |_, _| ());
        let taker = Taker::new();
        let mut vmm = Vmm::new(vec![Device::new("dev0", Box::new(taker.clone())).kind("other")]);
        (vmm.makes_devices_of_config, vmm.streams) = (true, !makes_none);
        let (sent, received) = moves(&mut vm, &machine, &mut vmm, |options| options);
        let Err(SendError::OtherDevices(mismatch)) = sent else { panic!("{sent:?}") };
        let Err(ReceiveError::OtherDevices { source }) = received else { panic!("{received:?}") };
        assert_eq!(mismatch, source);
        assert!(taker.look().moves.is_empty(), "the device was not touched");
        assert!(log_of(&vmm.arrivals).is_empty() && log_of(&vm.log).is_empty());
    }
}

#[test]
fn a_receiver_that_does_not_offer_streams_gets_the_states_in_state() {
    let mut vm = FakeVm::new(0);
    let state = pattern(MIB, 1);
    let machine = source(&vm, &[&state], |_, _| ());
    let (takers, devices) = takers(1);
    let mut vmm = Vmm::new(devices);
    vmm.streams = false;
    let (sent, received) = moves(&mut vm, &machine, &mut vmm, |options| options);
    sent.unwrap();
    let received = received.unwrap();
    assert_eq!((received.device_bytes, loaded(&takers[0])), (0, Some(state)));
}

#[test]
fn a_device_of_another_kind_firmware_or_version_is_refused_before_a_page_or_a_device_is_touched() {
    type Other = fn(Device) -> Device;
    let others: [(&str, Other); 4] = [
        ("model", |device| device.kind("other")),
        ("firmware", |device| device.kind("fake").firmware("2")),
        ("stream version", |device| device.kind("fake").stream_version(2)),
        ("no device", |_| Device::new("other", Box::new(Taker::new()))),
    ];
    for (what, other) in others {
        let mut vm = FakeVm::new(0);
        let machine = source(&vm, &[b"a state"], |_, _| ());
        let taker = Taker::new();
        let mut vmm = Vmm::new(vec![other(Device::new("dev0", Box::new(taker.clone())))]);
        let (sent, received) = moves(&mut vm, &machine, &mut vmm, |options| options);
        let Err(SendError::OtherDevices(mismatch)) = sent else { panic!("{sent:?}") };
        let Err(ReceiveError::OtherDevices { source }) = received else { panic!("{received:?}") };
        assert_eq!(mismatch, source);
        assert!(mismatch.to_string().contains(what), "{mismatch}");
        assert!(matches!(
            mismatch,
            IdentityMismatch::Differs { .. } | IdentityMismatch::NotAtDestination { .. }
        ));
        assert!(taker.0.lock().unwrap().moves.is_empty(), "the device was not touched");
        assert!(log_of(&vm.log).is_empty(), "nor the source's, nor its VM");
    }
}

#[test]
fn a_vmm_that_takes_state_and_loads_no_device_is_refused_with_the_devices_name() {
    for connections in [1, 4] {
        let mut vm = FakeVm::new(0);
        let states = [pattern(MIB, 1), pattern(5, 2)];
        let machine = source(&vm, &states.each_ref().map(Vec::as_slice), |_, _| ());
        let (takers, devices) = takers(2);
        let mut vmm = Vmm::new(devices);
        vmm.loads = false;
        let adjust = |options: SendOptions| {
            let options = options.connections(ConnectionCount::new(connections).unwrap()).unwrap();
            options.downtime(Duration::from_secs(10))
        };
        let (sent, received) = moves(&mut vm, &machine, &mut vmm, adjust);
        let Err(ReceiveError::NotLoaded { name }) = received else { panic!("{received:?}") };
        assert_eq!(name, "dev0");
        assert_eq!(sent.unwrap_err().source_vm(), SourceVm::AsBefore);
        assert!(vm.is_running() && !log_of(&vmm.log).iter().any(|step| step == "complete"));
        for taker in &takers {
            let taken = taker.look();
            assert_eq!((taken.state, taken.loaded.as_ref()), (Some(DeviceState::Running), None));
        }
        vmm.loads = true;
        let (sent, received) = moves(&mut vm, &machine, &mut vmm, adjust);
        sent.unwrap();
        received.unwrap();
        assert!(takers.iter().zip(&states).all(|(taker, state)| loaded(taker).as_ref() == Some(state)));
    }
}
