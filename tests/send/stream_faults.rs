// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Each call of a device's interface fails once while states stream, at the source and at the destination, on one and on four connections.

use std::io;
use std::sync::{Arc, LazyLock, Mutex, MutexGuard};
use std::thread;
use std::time::Duration;

use vfio_migration::device::{
    Capabilities, DataRead, Device, DeviceError, DeviceIo, DeviceOperation, DeviceState, PrecopyInfo,
};
use vfio_migration::transfer::limits::ConnectionCount;
use vfio_migration::transfer::receive::{ReceiveError, Received};
use vfio_migration::transfer::{SendError, Sent};

use crate::log_of;
use crate::streams::{Taker, Vmm, moves, pattern, takers};
use crate::vm::{FakeDevice, FakeVm, Machine};

use DeviceState::{PreCopy, PreCopyP2p, Resuming, Running, RunningP2p, Stop, StopCopy};

/// What a device is asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Call {
    /// To move to this state, after it did so often.
    SetState(DeviceState, u32),
    /// For the byte at this place, in this state.
    Read(DeviceState, usize),
    /// To take the byte at this place.
    Write(usize),
    PrecopyInfo,
    DataSize,
    /// For its state, after it told that so often.
    State(u32),
}

/// What comes of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Effect {
    Fails,
    /// It fails, and leaves the device in ERROR.
    Breaks,
    /// Something else has reset the device, whose state is another one from then on.
    IsReset,
    /// The device is gone for good.
    IsLost,
}

/// A device as its test sees it.
#[derive(Default)]
struct Probe {
    fault: Option<(Call, Effect)>,
    /// What the first reset after it comes to.
    reset_fault: Option<Effect>,
    state: Option<DeviceState>,
    /// What the bytes of its state are turned by.
    salt: u8,
    /// Whether it has handed its whole state over: a reset later changes nothing of what arrives.
    ended: bool,
    broken: bool,
    lost: bool,
}

/// Another device, which fails once.
struct Faulty<D> {
    io: D,
    probe: Arc<Mutex<Probe>>,
    /// Bytes of its state in this session.
    moved: usize,
}

fn errno(operation: DeviceOperation, errno: i32) -> DeviceError {
    DeviceError::new(operation, io::Error::from_raw_os_error(errno))
}

impl<D: DeviceIo> Faulty<D> {
    fn new(io: D, probe: &Arc<Mutex<Probe>>) -> Self {
        Self { io, probe: Arc::clone(probe), moved: 0 }
    }

    fn probe(&self) -> MutexGuard<'_, Probe> {
        self.probe.lock().unwrap()
    }

    /// Lets a call happen, unless its turn to fail has come.
    fn meet(&mut self, call: Call, operation: DeviceOperation) -> Result<(), DeviceError> {
        let mut probe = self.probe.lock().unwrap();
        if probe.broken || probe.lost {
            return Err(errno(operation, if probe.lost { libc::ENODEV } else { libc::EIO }));
        }
        match (call, &mut probe.fault) {
            (Call::SetState(to, _), Some((Call::SetState(due, times), _))) if to == *due && *times > 0 => {
                *times -= 1;
                return Ok(());
            }
            (Call::State(_), Some((Call::State(times), _))) if *times > 0 => {
                *times -= 1;
                return Ok(());
            }
            _ => {}
        }
        let Some((_, effect)) = probe.fault.take_if(|(due, _)| *due == call) else { return Ok(()) };
        probe.broken = effect == Effect::Breaks;
        probe.lost = effect == Effect::IsLost;
        if effect == Effect::IsReset {
            probe.salt ^= if probe.ended { 0 } else { 0x55 };
            self.io.reset()?;
            return Err(errno(operation, libc::ENODEV));
        }
        Err(errno(operation, if probe.lost { libc::ENODEV } else { libc::EIO }))
    }

    fn look(&mut self) {
        let state = if self.probe().broken { DeviceState::Error } else { self.io.state().unwrap() };
        self.probe().state = Some(state);
    }
}

impl<D: DeviceIo> DeviceIo for Faulty<D> {
    fn capabilities(&self) -> Capabilities {
        self.io.capabilities()
    }

    fn state(&mut self) -> Result<DeviceState, DeviceError> {
        if !self.probe().broken {
            self.meet(Call::State(0), DeviceOperation::State)?;
        }
        self.look();
        let probe = self.probe();
        if probe.lost { Err(errno(DeviceOperation::State, libc::ENODEV)) } else { Ok(probe.state.unwrap()) }
    }

    fn set_state(&mut self, state: DeviceState) -> Result<(), DeviceError> {
        self.meet(Call::SetState(state, 0), DeviceOperation::SetState(state))?;
        if state.is_saving() != self.io.state()?.is_saving() || state == Resuming {
            self.moved = 0;
        }
        self.io.set_state(state)?;
        self.look();
        Ok(())
    }

    fn read_data(&mut self, buffer: &mut [u8]) -> Result<DataRead, DeviceError> {
        let state = self.io.state()?;
        self.meet(Call::Read(state, self.moved), DeviceOperation::ReadData)?;
        if !state.is_saving() {
            return Err(errno(DeviceOperation::ReadData, libc::ENODEV));
        }
        let Probe { fault, salt, .. } = *self.probe();
        let most = match fault {
            Some((Call::Read(due, at), _)) if due == state && at > self.moved => at - self.moved,
            _ => buffer.len(),
        };
        let most = most.min(buffer.len());
        let read = self.io.read_data(&mut buffer[..most])?;
        if let DataRead::Bytes(bytes) = read {
            buffer[..bytes].iter_mut().for_each(|byte| *byte ^= salt);
            self.moved += bytes;
        }
        self.probe().ended |= read == DataRead::End;
        Ok(read)
    }

    fn write_data(&mut self, data: &[u8]) -> Result<(), DeviceError> {
        let range = self.moved..self.moved + data.len();
        let fault = self.probe().fault;
        if let Some((due @ Call::Write(at), _)) = fault
            && range.contains(&at)
        {
            self.meet(due, DeviceOperation::WriteData)?;
        }
        self.moved = range.end;
        self.io.write_data(data)
    }

    fn precopy_info(&mut self) -> Result<Option<PrecopyInfo>, DeviceError> {
        self.meet(Call::PrecopyInfo, DeviceOperation::PrecopyInfo)?;
        self.io.precopy_info()
    }

    fn data_size(&mut self) -> Result<Option<u64>, DeviceError> {
        self.meet(Call::DataSize, DeviceOperation::DataSize)?;
        self.io.data_size()
    }

    fn reset(&mut self) -> Result<(), DeviceError> {
        let mut probe = self.probe.lock().unwrap();
        if probe.lost {
            return Err(errno(DeviceOperation::Reset, libc::ENODEV));
        }
        if let Some(effect) = probe.reset_fault.take() {
            probe.broken |= effect == Effect::Breaks;
            return Err(errno(DeviceOperation::Reset, libc::EIO));
        }
        probe.broken = false;
        drop(probe);
        self.io.reset()?;
        self.look();
        Ok(())
    }
}

const BYTES: [usize; 3] = [300_000, 2_200_000, 5];

/// What the second device hands out in PRE_COPY: the first of its pieces is gone when it fails after three quarters.
const EARLY: usize = BYTES[1] / 2;

static STATES: LazyLock<[Vec<u8>; 3]> =
    LazyLock::new(|| [(0, 1), (1, 2), (2, 3)].map(|(index, salt)| pattern(BYTES[index], salt)));

/// A VM with three devices, the second of which meets `fault`.
fn source(vm: &FakeVm, fault: Option<(Call, Effect)>) -> (Machine, Vec<Arc<Mutex<Probe>>>) {
    let machine = vm.machine();
    let probes: Vec<Arc<Mutex<Probe>>> = (0..3).map(|_| Arc::default()).collect();
    for (index, state) in STATES.iter().enumerate() {
        let mut io = FakeDevice::new(&vm.log, state);
        io.size = Some(state.len() as u64);
        let io = Box::new(Faulty::new(io, &probes[index]));
        let device = Device::new(format!("dev{index}"), io).kind("fake");
        machine.devices.lock().unwrap().add(device).unwrap();
    }
    probes[1].lock().unwrap().fault = fault;
    (machine, probes)
}

fn attempt(
    vm: &mut FakeVm,
    machine: &Machine,
    vmm: &mut Vmm,
    connections: u64,
) -> (Result<Sent, SendError>, Result<Received, ReceiveError>) {
    moves(vm, machine, vmm, |options| {
        let options = options.connections(ConnectionCount::new(connections).unwrap()).unwrap();
        options.downtime(Duration::from_secs(10))
    })
}

fn assert_holds_nothing(taker: &Taker, what: &str) {
    let taken = taker.look();
    assert_eq!((taken.state, taken.loaded.as_ref()), (Some(Running), None), "{what}");
}

/// The devices hold what the source's have now.
fn assert_arrived(takers: &[Taker], probes: &[Arc<Mutex<Probe>>], what: &str) {
    for (index, state) in STATES.iter().enumerate() {
        let salt = probes[index].lock().unwrap().salt;
        let expected: Vec<u8> = state.iter().map(|byte| byte ^ salt).collect();
        assert!(takers[index].look().loaded.as_ref() == Some(&expected), "state of device {index}: {what}");
    }
}

fn assert_all_run(vm: &FakeVm, probes: &[Arc<Mutex<Probe>>], what: &str) {
    assert!(vm.is_running(), "{what}");
    for probe in probes {
        assert_eq!(probe.lock().unwrap().state, Some(Running), "{what}");
    }
}

/// A first attempt that meets a fault at the source, and where that ends it a second one, to another destination.
fn source_meets(fault: (Call, Effect), connections: u64, prepare: impl FnOnce(&mut FakeVm)) {
    assert!(source_came_to((fault, None), connections, prepare), "it came to it: {fault:?} on {connections}");
}

/// As [`source_meets`], with a reset that fails as well where there is one; returns whether it came to the first fault.
fn source_came_to(
    (fault, reset_fault): ((Call, Effect), Option<Effect>),
    connections: u64,
    prepare: impl FnOnce(&mut FakeVm),
) -> bool {
    let what = format!("{fault:?} on {connections}");
    let mut vm = FakeVm::new(5);
    prepare(&mut vm);
    let (machine, probes) = source(&vm, Some(fault));
    probes[1].lock().unwrap().reset_fault = reset_fault;
    let (first, devices) = takers(3);
    let mut vmm = Vmm::new(devices);
    let (sent, received) = attempt(&mut vm, &machine, &mut vmm, connections);
    let came_to_it = probes[1].lock().unwrap().fault.take().is_none();
    if let Ok(sent) = sent {
        received.unwrap();
        vmm.assert_equals(&vm);
        assert_arrived(&first, &probes, &what);
        assert!(sent.progress.degradations.len() <= 1, "{what}: {sent:?}");
        return came_to_it;
    }
    assert!(received.is_err(), "{what}");
    assert_all_run(&vm, &probes, &what);
    let resets = machine.devices.lock().unwrap().drain_resets();
    assert_eq!(resets.len(), usize::from(fault.1 == Effect::Breaks), "{what}: {resets:?}");
    assert_eq!(probes[1].lock().unwrap().reset_fault, None, "{what}");
    first.iter().for_each(|taker| assert_holds_nothing(taker, &what));
    vm.fail_state = false;
    let (second, devices) = takers(3);
    let mut vmm = Vmm::new(devices);
    let (sent, received) = attempt(&mut vm, &machine, &mut vmm, connections);
    sent.unwrap();
    received.unwrap();
    vmm.assert_equals(&vm);
    assert_arrived(&second, &probes, &what);
    came_to_it
}

const EFFECTS: [Effect; 3] = [Effect::Fails, Effect::Breaks, Effect::IsReset];

/// Tries each effect on a thread of its own: most of the time is spent waiting.
fn for_each_effect(try_one: impl Fn(Effect) + Sync) {
    let try_one = &try_one;
    thread::scope(|scope| EFFECTS.map(|effect| scope.spawn(move || try_one(effect))).map(drop));
}

#[test]
fn any_call_of_a_device_that_fails_on_its_way_out_costs_no_state_and_no_device() {
    let reads = [(PreCopy, 0), (PreCopy, EARLY * 3 / 4), (PreCopy, EARLY - 1), (StopCopy, EARLY)];
    let last = [(StopCopy, BYTES[1] * 3 / 4), (StopCopy, BYTES[1] - 1), (StopCopy, BYTES[1])];
    let moves = [PreCopy, PreCopyP2p, StopCopy].map(|state| Call::SetState(state, 0));
    let reads = reads.into_iter().chain(last).map(|(state, at)| Call::Read(state, at));
    let calls: Vec<_> = moves.into_iter().chain(reads).chain([Call::PrecopyInfo, Call::DataSize]).collect();
    for connections in [1, 4] {
        for &call in &calls {
            for effect in EFFECTS {
                source_meets((call, effect), connections, |_| ());
            }
        }
    }
}

#[test]
fn a_device_that_does_not_run_on_at_once_after_a_failure_runs_in_the_end() {
    for connections in [1, 4] {
        for state in [RunningP2p, Running] {
            for effect in EFFECTS {
                source_meets((Call::SetState(state, 0), effect), connections, |vm| vm.fail_state = true);
            }
        }
    }
}

#[test]
fn a_device_that_does_not_tell_its_state_on_its_way_out_costs_no_state_and_no_device() {
    for_each_effect(|effect| {
        let mut connections = [1, 4].into_iter().cycle();
        let came_to = |&times: &u32| {
            source_came_to(((Call::State(times), effect), None), connections.next().unwrap(), |_| ())
        };
        let times = (0..100).take_while(came_to).count();
        assert!((5..100).contains(&times), "{times} times, {effect:?}");
    });
}

#[test]
fn a_reset_that_fails_at_the_source_is_made_again() {
    let (breaks, at) = (Effect::Breaks, EARLY * 3 / 4);
    for call in [Call::SetState(PreCopyP2p, 0), Call::SetState(StopCopy, 0), Call::Read(PreCopy, at)] {
        for (reset_fault, connections) in [(Effect::Fails, 1), (breaks, 4)] {
            assert!(source_came_to(((call, breaks), Some(reset_fault)), connections, |_| ()), "{call:?}");
        }
    }
}

/// A first attempt that meets a fault at the destination, and a second one to the same; returns whether it came to the fault. The source's
/// device meets `at_source`.
fn destination_came_to(
    (fault, reset_fault): (Option<(Call, Effect)>, Option<Effect>),
    at_source: Option<(Call, Effect)>,
    connections: u64,
) -> bool {
    let what = format!("{fault:?} {reset_fault:?} on {connections}");
    let mut vm = FakeVm::new(5);
    let (machine, probes) = source(&vm, at_source);
    let (takers, probe) = ((0..3).map(|_| Taker::new()).collect::<Vec<_>>(), Arc::default());
    let device = |(index, taker): (usize, &Taker)| {
        let io: Box<dyn DeviceIo> = match index {
            1 => Box::new(Faulty::new(taker.clone(), &probe)),
            _ => Box::new(taker.clone()),
        };
        Device::new(format!("dev{index}"), io).kind("fake")
    };
    let mut vmm = Vmm::new(takers.iter().enumerate().map(device).collect());
    *probe.lock().unwrap() = Probe { fault, reset_fault, ..Probe::default() };
    let (sent, received) = attempt(&mut vm, &machine, &mut vmm, connections);
    if probe.lock().unwrap().fault.take().is_some() {
        sent.unwrap();
        return false;
    }
    assert_eq!(probe.lock().unwrap().reset_fault, None, "it came to the reset: {what}");
    assert!(sent.is_err() && received.is_err(), "{what}: {sent:?} {received:?}");
    assert_all_run(&vm, &probes, &what);
    takers.iter().for_each(|taker| assert_holds_nothing(taker, &what));
    // One that broke before it was touched is reset by the next attempt.
    let is_untouched = matches!(fault, Some((Call::State(_), _)));
    assert!(is_untouched || !probe.lock().unwrap().broken, "{what}");
    let (sent, received) = attempt(&mut vm, &machine, &mut vmm, connections);
    sent.unwrap();
    received.unwrap();
    vmm.assert_equals(&vm);
    assert_arrived(&takers, &probes, &what);
    true
}

#[test]
fn any_call_of_a_device_that_fails_on_its_way_in_leaves_nothing_and_the_next_attempt_arrives() {
    let moves = [(Stop, 0), (Resuming, 0), (Stop, 1)].map(|(state, times)| Call::SetState(state, times));
    let calls = moves.into_iter().chain([0, BYTES[1] / 2, BYTES[1] - 1].map(Call::Write));
    for (call, connections) in calls.flat_map(|call| [(call, 1), (call, 4)]) {
        for effect in EFFECTS {
            let came_to = destination_came_to((Some((call, effect)), None), None, connections);
            assert!(came_to, "{call:?} {effect:?} on {connections}");
        }
    }
}

#[test]
fn a_device_that_does_not_tell_its_state_on_its_way_in_leaves_nothing() {
    for_each_effect(|effect| {
        let mut connections = [1, 4].into_iter().cycle();
        let came_to = |&times: &u32| {
            let fault = Some((Call::State(times), effect));
            destination_came_to((fault, None), None, connections.next().unwrap())
        };
        let times = (0..100).take_while(came_to).count();
        assert!((3..100).contains(&times), "{times} times, {effect:?}");
    });
}

#[test]
fn a_reset_that_fails_at_the_destination_leaves_nothing() {
    let half = Call::Write(BYTES[1] / 2);
    for (reset_fault, connections) in
        [Effect::Fails, Effect::Breaks].into_iter().flat_map(|effect| [(effect, 1), (effect, 4)])
    {
        // To drop a state that was refused.
        let refused = Some((half, Effect::Fails));
        assert!(destination_came_to((refused, Some(reset_fault)), None, connections));
        // To begin anew, because the source's device was reset.
        let anew = Some((Call::Read(PreCopy, EARLY * 3 / 4), Effect::IsReset));
        assert!(destination_came_to((None, Some(reset_fault)), anew, connections));
    }
}

#[test]
fn c30_a_device_reset_while_it_streams_begins_anew_and_its_receiver_drops_what_it_had() {
    for (connections, at) in [1, 4].into_iter().flat_map(|count| [(count, EARLY * 3 / 4), (count, EARLY - 1)])
    {
        let mut vm = FakeVm::new(5);
        let (machine, probes) = source(&vm, Some((Call::Read(PreCopy, at), Effect::IsReset)));
        let (takers, devices) = takers(3);
        let (sent, received) = attempt(&mut vm, &machine, &mut Vmm::new(devices), connections);
        let (sent, received) = (sent.unwrap(), received.unwrap());
        assert_arrived(&takers, &probes, "after a reset");
        assert_eq!(takers.iter().map(|taker| taker.look().resets).collect::<Vec<_>>(), [0, 1, 0]);
        let told: Vec<_> = sent.progress.degradations.iter().map(|told| (&told.error, told.times)).collect();
        assert!(matches!(&told[..], [(error, 1)] if error.to_string().contains("\"dev1\"")), "{told:?}");
        assert_eq!(log_of(&vm.log).iter().filter(|step| *step == "PRE_COPY").count(), 4, "again in PRE_COPY");
        assert_eq!(
            received.device_bytes,
            BYTES.iter().sum::<usize>() as u64,
            "the first stream does not count"
        );
        assert!(machine.devices.lock().unwrap().drain_resets().is_empty(), "we reset nothing");
    }
}

#[test]
fn a_device_that_is_lost_while_it_streams_ends_the_migration() {
    for connections in [1, 4] {
        let mut vm = FakeVm::new(5);
        let (machine, _) = source(&vm, Some((Call::Read(PreCopy, EARLY * 3 / 4), Effect::IsLost)));
        let (takers, devices) = takers(3);
        let (sent, received) = attempt(&mut vm, &machine, &mut Vmm::new(devices), connections);
        let error = sent.unwrap_err();
        assert!(format!("{error:?}").contains("gone: true"), "{error:?}");
        assert!(received.is_err() && vm.is_running());
        takers.iter().for_each(|taker| assert_holds_nothing(taker, "after the loss of a device"));
    }
}
