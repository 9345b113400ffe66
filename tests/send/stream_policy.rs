// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! When a VM whose devices' states stream is switched over.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use vfio_migration::device::{
    Capabilities, DataRead, Device, DeviceError, DeviceIo, DeviceOperation, DeviceState, PrecopyInfo,
};
use vfio_migration::precopy::{CancelReason, Forecast, Obstacle, TimeoutStrategy};
use vfio_migration::transfer::{SendError, SourceVm};

use crate::streams::{Vmm, loaded, moves, pattern, source, takers};
use crate::vm::FakeVm;

const MIB: usize = 1 << 20;

/// A device that begins another piece of its initial bytes when it is asked and has none, a few times.
struct Reinitialising {
    state: DeviceState,
    left: u64,
    times: Arc<AtomicU64>,
}

const PIECE: u64 = 1000;

impl DeviceIo for Reinitialising {
    fn capabilities(&self) -> Capabilities {
        Capabilities { p2p: true, pre_copy: true }
    }

    fn state(&mut self) -> Result<DeviceState, DeviceError> {
        Ok(self.state)
    }

    fn set_state(&mut self, state: DeviceState) -> Result<(), DeviceError> {
        if state == DeviceState::PreCopyP2p && self.times.load(Ordering::Relaxed) + self.left > 0 {
            return Err(DeviceError::new(DeviceOperation::SetState(state), "switched over too early"));
        }
        self.state = state;
        Ok(())
    }

    fn read_data(&mut self, buffer: &mut [u8]) -> Result<DataRead, DeviceError> {
        let bytes = usize::try_from(self.left).unwrap().min(buffer.len());
        self.left -= bytes as u64;
        Ok(match (bytes, self.state) {
            (0, DeviceState::StopCopy) => DataRead::End,
            (0, _) => DataRead::NothingNow,
            _ => DataRead::Bytes(bytes),
        })
    }

    fn write_data(&mut self, _: &[u8]) -> Result<(), DeviceError> {
        unreachable!("a source's device takes no state")
    }

    fn precopy_info(&mut self) -> Result<Option<PrecopyInfo>, DeviceError> {
        if self.left == 0 && self.times.load(Ordering::Relaxed) > 0 {
            self.times.fetch_sub(1, Ordering::Relaxed);
            self.left = PIECE;
        }
        Ok(Some(PrecopyInfo { initial_bytes: self.left, dirty_bytes: 0 }))
    }

    fn data_size(&mut self) -> Result<Option<u64>, DeviceError> {
        Ok(Some(8 * PIECE))
    }

    fn reset(&mut self) -> Result<(), DeviceError> {
        self.state = DeviceState::Running;
        Ok(())
    }
}

#[test]
fn c37_streamed_initial_bytes_that_grow_again_put_the_switchover_off() {
    let mut vm = FakeVm::new(5);
    let machine = vm.machine();
    let times = Arc::new(AtomicU64::new(6));
    let io = Reinitialising { state: DeviceState::Running, left: 0, times: Arc::clone(&times) };
    machine.devices.lock().unwrap().add(Device::new("dev0", Box::new(io)).kind("fake")).unwrap();
    let (_takers, devices) = takers(1);
    let mut vmm = Vmm::new(devices);
    let (sent, received) =
        moves(&mut vm, &machine, &mut vmm, |options| options.downtime(Duration::from_secs(10)));
    assert_eq!(sent.unwrap().device_precopy_bytes, 6 * PIECE);
    assert_eq!(received.unwrap().device_bytes, 6 * PIECE);
    assert_eq!(times.load(Ordering::Relaxed), 0);
}

#[test]
fn c47_a_streaming_device_that_always_wants_more_read_is_what_the_timeout_names() {
    let mut vm = FakeVm::new(0);
    let machine = source(&vm, &[b"a state"], |_, io| io.restless = true);
    let (takers, devices) = takers(1);
    let mut vmm = Vmm::new(devices);
    let (sent, received) =
        moves(&mut vm, &machine, &mut vmm, |options| options.timeout(Duration::from_secs(1)));
    let error = sent.unwrap_err();
    let SendError::GivenUp(CancelReason::TimedOut { obstacle, .. }) = &error else { panic!("{error}") };
    assert!(matches!(obstacle, Obstacle::InitialBytes { .. }), "{obstacle:?}");
    assert_eq!(error.source_vm(), SourceVm::AsBefore);
    assert!(received.is_err() && loaded(&takers[0]).is_none());
}

#[test]
fn c47_initial_bytes_beyond_the_limit_of_a_state_in_state_are_streamed() {
    for (streams, fits) in [(true, true), (false, false)] {
        let mut vm = FakeVm::new(0);
        let machine = vm.machine();
        let data = pattern(4 * MIB, 1);
        let mut io = crate::vm::FakeDevice::new(&vm.log, &data);
        io.size = Some(data.len() as u64);
        let device = Device::new("dev0", Box::new(io)).kind("fake").state_limit(MIB);
        machine.devices.lock().unwrap().add(device).unwrap();
        let (takers, devices) = takers(1);
        let mut vmm = Vmm::new(devices);
        vmm.streams = streams;
        let (sent, _) =
            moves(&mut vm, &machine, &mut vmm, |options| options.downtime(Duration::from_secs(10)));
        assert_eq!(sent.is_ok(), fits, "{sent:?}");
        assert_eq!(loaded(&takers[0]), fits.then_some(data));
    }
}

/// A device that changes its state while it runs; and tells no sizes, as one behind vfio-user, or all of them.
struct Busy {
    tells: bool,
    state: DeviceState,
    bytes: u64,
    left: u64,
    changes_per_second: u64,
    looked: Instant,
    /// How long it takes to hand out 64 KiB.
    reading: Duration,
}

impl Busy {
    /// Has `bytes` of state, which do not change, and hands out 64 MiB a second.
    fn new(bytes: usize, tells: bool) -> Self {
        Self {
            tells,
            state: DeviceState::Running,
            bytes: bytes as u64,
            left: bytes as u64,
            changes_per_second: 0,
            looked: Instant::now(),
            reading: Duration::from_millis(1),
        }
    }

    fn device(bytes: usize, changes_per_second: u64) -> Device {
        Self { changes_per_second, ..Self::new(bytes, false) }.into_device()
    }

    fn telling(bytes: usize) -> Device {
        Self::new(bytes, true).into_device()
    }

    fn into_device(self) -> Device {
        let bytes = self.bytes;
        Device::new("dev0", Box::new(self)).kind("fake").state_limit(usize::try_from(bytes).unwrap())
    }

    /// Takes in what has changed.
    fn look(&mut self) {
        let since = std::mem::replace(&mut self.looked, Instant::now()).elapsed();
        let changed = if self.state == DeviceState::PreCopy {
            u128::from(self.changes_per_second) * since.as_micros() / 1_000_000
        } else {
            0
        };
        self.left = self.bytes.min(self.left.saturating_add(u64::try_from(changed).unwrap()));
    }
}

impl DeviceIo for Busy {
    fn capabilities(&self) -> Capabilities {
        Capabilities { p2p: false, pre_copy: true }
    }

    fn state(&mut self) -> Result<DeviceState, DeviceError> {
        Ok(self.state)
    }

    fn set_state(&mut self, state: DeviceState) -> Result<(), DeviceError> {
        self.look();
        self.state = state;
        Ok(())
    }

    fn read_data(&mut self, buffer: &mut [u8]) -> Result<DataRead, DeviceError> {
        self.look();
        let bytes = usize::try_from(self.left).unwrap().min(buffer.len()).min(MIB / 16);
        if bytes > 0 {
            thread::sleep(self.reading);
        }
        self.left -= bytes as u64;
        Ok(match (bytes, self.state) {
            (0, DeviceState::StopCopy) => DataRead::End,
            (0, _) => DataRead::NothingNow,
            _ => DataRead::Bytes(bytes),
        })
    }

    fn write_data(&mut self, _: &[u8]) -> Result<(), DeviceError> {
        unreachable!("a source's device takes no state")
    }

    fn precopy_info(&mut self) -> Result<Option<PrecopyInfo>, DeviceError> {
        self.look();
        Ok(self.tells.then_some(PrecopyInfo { initial_bytes: 0, dirty_bytes: self.left }))
    }

    fn data_size(&mut self) -> Result<Option<u64>, DeviceError> {
        Ok(self.tells.then_some(self.bytes))
    }

    fn reset(&mut self) -> Result<(), DeviceError> {
        unreachable!("nothing fails")
    }
}

#[test]
fn c28_a_device_that_tells_no_sizes_is_read_until_what_it_has_left_is_known() {
    let bytes = 96 * MIB;
    let mut vm = FakeVm::new(5);
    let machine = vm.machine();
    machine.devices.lock().unwrap().add(Busy::device(bytes, 4 * MIB as u64)).unwrap();
    let (_takers, devices) = takers(1);
    let (sent, received) = moves(&mut vm, &machine, &mut Vmm::new(devices), |options| options);
    let (sent, received) = (sent.unwrap(), received.unwrap());
    assert_eq!(received.device_bytes, sent.device_state_bytes);
    let [share] = sent.device_downtimes.as_slice() else { panic!("{sent:?}") };
    assert_eq!((&*share.device, share.bytes), ("dev0", sent.device_state_bytes - sent.device_precopy_bytes));
    assert!(share.bytes < bytes as u64 / 4, "{share:?}");
    assert!(share.took <= sent.downtime, "{share:?} of {:?}", sent.downtime);
}

#[test]
fn c47_a_device_that_changes_its_state_as_fast_as_it_is_read_is_named_in_the_forecast() {
    let bytes = 8 * MIB;
    let mut vm = FakeVm::new(5);
    let machine = vm.machine();
    machine.devices.lock().unwrap().add(Busy::device(bytes, 1 << 40)).unwrap();
    let (_takers, devices) = takers(1);
    let (sent, _received) = moves(&mut vm, &machine, &mut Vmm::new(devices), |options| {
        let options = options.downtime(Duration::from_millis(10)).timeout(Duration::from_secs(60));
        options.timeout_strategy(TimeoutStrategy::Ignore)
    });
    let sent = sent.unwrap();
    assert!(sent.total < Duration::from_secs(30), "nothing is waited for that does not come");
    assert!(sent.downtime_exceeded && sent.progress.expected_downtime_ms() > Some(20), "{sent:?}");
    let forecast = &sent.progress.forecast;
    assert!(matches!(forecast, Forecast::Stuck(_)) && forecast.to_string().contains("dev0"), "{forecast}");
    assert!(sent.device_downtimes[0].bytes >= bytes as u64, "{:?}", sent.device_downtimes);
}

#[test]
fn state_that_the_next_rounds_bring_is_no_reason_to_give_up() {
    let mut vm = FakeVm::new(5);
    let machine = vm.machine();
    // Three quarters of a second of it, and none of it has to be read early.
    machine.devices.lock().unwrap().add(Busy::telling(48 * MIB)).unwrap();
    let (_takers, devices) = takers(1);
    let (sent, _received) = moves(&mut vm, &machine, &mut Vmm::new(devices), |options| options);
    let sent = sent.unwrap();
    assert_eq!(sent.device_state_bytes, 48 * MIB as u64);
    assert!(sent.device_precopy_bytes > 24 * MIB as u64, "{sent:?}");
}

#[test]
fn a_slow_device_beside_a_fast_one_is_not_stopped_before_its_state_went() {
    // 64 KiB in 100 ms is less than any device may do for long; 64 KiB in 30 ms is far from what is assumed before anything was measured.
    for (tells, bytes, ms) in [(false, MIB, 100), (true, 3 * MIB, 30)] {
        let mut vm = FakeVm::new(5);
        let fast = pattern(9 * MIB, 1);
        let machine = source(&vm, &[&fast], |_, _| ());
        let slow = Busy { reading: Duration::from_millis(ms), ..Busy::new(bytes, tells) };
        let slow = Device::new("dev1", Box::new(slow)).kind("fake").maps_only_ram();
        machine.devices.lock().unwrap().add(slow).unwrap();
        let (_takers, devices) = takers(2);
        let (sent, _received) = moves(&mut vm, &machine, &mut Vmm::new(devices), |options| options);
        let sent = sent.unwrap();
        let share = sent.device_downtimes.iter().find(|share| share.device == "dev1").unwrap();
        assert!(share.bytes < bytes as u64 / 4, "{sent:?}");
        assert!(sent.downtime < Duration::from_secs(2), "{:?}", sent.downtime);
    }
}
