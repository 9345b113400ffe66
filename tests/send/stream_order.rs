// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! In which order three devices move while their states stream, and what the VM and its receiver do in between.

use std::time::Duration;

use vfio_migration::device::{
    Capabilities, DataRead, Device, DeviceError, DeviceIo, DeviceState, PrecopyInfo,
};
use vfio_migration::iova::IovaMap;
use vfio_migration::layout::Layout;
use vfio_migration::source::{Cover, DirtySource, Reports, Sink, SourceError};
use vfio_migration::transfer::limits::ConnectionCount;

use crate::log_of;
use crate::streams::{Taker, Vmm, moves, pattern};
use crate::vm::{FakeDevice, FakeVm, Log, Machine, note};

/// A device that notes its moves under its name.
struct Named {
    name: String,
    io: Box<dyn DeviceIo>,
    log: Log,
}

impl DeviceIo for Named {
    fn capabilities(&self) -> Capabilities {
        self.io.capabilities()
    }

    fn state(&mut self) -> Result<DeviceState, DeviceError> {
        self.io.state()
    }

    fn set_state(&mut self, state: DeviceState) -> Result<(), DeviceError> {
        note(&self.log, format!("{} {state}", self.name));
        self.io.set_state(state)
    }

    fn read_data(&mut self, buffer: &mut [u8]) -> Result<DataRead, DeviceError> {
        self.io.read_data(buffer)
    }

    fn write_data(&mut self, data: &[u8]) -> Result<(), DeviceError> {
        self.io.write_data(data)
    }

    fn precopy_info(&mut self) -> Result<Option<PrecopyInfo>, DeviceError> {
        self.io.precopy_info()
    }

    fn data_size(&mut self) -> Result<Option<u64>, DeviceError> {
        self.io.data_size()
    }

    fn reset(&mut self) -> Result<(), DeviceError> {
        note(&self.log, format!("{} reset", self.name));
        self.io.reset()
    }
}

/// A source that notes when it is asked.
struct Collected(Log);

impl DirtySource for Collected {
    fn id(&self) -> &str {
        "collected"
    }

    fn reports(&self) -> Reports {
        Reports::Component
    }

    fn cover(&self) -> Cover {
        Cover { ranges: vec![], precise: true }
    }

    fn start(&mut self, _: &Layout, _: &IovaMap) -> Result<(), SourceError> {
        Ok(())
    }

    fn collect(&mut self, _: &mut Sink<'_>) -> Result<(), SourceError> {
        note(&self.0, "collect");
        Ok(())
    }

    fn stop(&mut self) -> Result<(), SourceError> {
        Ok(())
    }
}

const NAMES: [&str; 3] = ["dev0", "dev1", "dev2"];

/// A VM of three devices and a destination for it, with one log.
fn both(vm: &FakeVm) -> (Machine, Vmm) {
    let (log, name) = (&vm.log, |name: &str| name.to_owned());
    let source = Box::new(Collected(log.clone()));
    let machine: Machine = vm.builder().source(source).build().unwrap().into();
    for (index, own) in NAMES.iter().enumerate() {
        let state = pattern(1_000_000 + index, 7);
        let mut io = FakeDevice::new(&Log::default(), &state);
        io.size = Some(state.len() as u64);
        let io = Named { name: name(own), io: Box::new(io), log: log.clone() };
        let device = Device::new(*own, Box::new(io)).kind("fake");
        machine.devices.lock().unwrap().add(device).unwrap();
    }
    let there = NAMES.map(|own| {
        let io = Named { name: format!("there {own}"), io: Box::new(Taker::new()), log: log.clone() };
        Device::new(own, Box::new(io)).kind("fake")
    });
    let mut vmm = Vmm::new(there.into());
    vmm.log = log.clone();
    (machine, vmm)
}

fn at(log: &[String], step: &str) -> usize {
    let at = log.iter().rposition(|noted| noted == step);
    at.unwrap_or_else(|| panic!("{step} in {log:#?}"))
}

/// Where the devices of `side` last moved to a state.
fn all_at(log: &[String], side: &str, state: DeviceState) -> Vec<usize> {
    NAMES.iter().map(|name| at(log, &format!("{side}{name} {state}"))).collect()
}

/// Checks that all of `first` come before any of `then`.
#[track_caller]
fn assert_before(log: &[String], first: &[usize], then: &[usize]) {
    assert!(first.iter().max() < then.iter().min(), "{first:?} before {then:?} in {log:#?}");
}

#[test]
fn c3_c5_c33_all_devices_are_quiescent_before_any_stops_and_all_stop_before_the_last_collect() {
    for connections in [1, 4] {
        let mut vm = FakeVm::new(5);
        let (machine, mut vmm) = both(&vm);
        let (sent, received) = moves(&mut vm, &machine, &mut vmm, |options| {
            let options = options.connections(ConnectionCount::new(connections).unwrap()).unwrap();
            options.downtime(Duration::from_secs(10))
        });
        sent.unwrap();
        received.unwrap();
        vmm.devices.devices().lock().unwrap().run().unwrap();
        let log = log_of(&vm.log);
        let quiescent = all_at(&log, "", DeviceState::PreCopyP2p);
        let stopped = all_at(&log, "", DeviceState::StopCopy);
        let collects = log.iter().enumerate().filter(|(_, step)| *step == "collect").map(|(index, _)| index);
        let captured = at(&log, "state");
        let (before, after): (Vec<_>, Vec<_>) = collects.partition(|&index| index < captured);
        assert_before(&log, &[at(&log, "pause")], &quiescent);
        assert_before(&log, &quiescent, &stopped);
        assert_before(&log, &stopped, &[*before.last().unwrap()]);
        assert_eq!(after.len(), 1, "once more for what capturing wrote (C4)");
        // C33: leaving STOP_COPY is no part of the downtime.
        assert_before(&log, &[at(&log, "complete")], &all_at(&log, "", DeviceState::Stop));
        // Resumed the other way round.
        let loaded = all_at(&log, "there ", DeviceState::Stop);
        let woken = all_at(&log, "there ", DeviceState::RunningP2p);
        assert_before(&log, &loaded, &woken);
        assert_before(&log, &woken, &all_at(&log, "there ", DeviceState::Running));
    }
}

#[test]
fn c5_a_source_that_goes_on_resumes_in_the_opposite_order() {
    let mut vm = FakeVm::new(5);
    vm.fail_state = true;
    let (machine, mut vmm) = both(&vm);
    let (sent, received) =
        moves(&mut vm, &machine, &mut vmm, |options| options.downtime(Duration::from_secs(10)));
    assert!(sent.is_err() && received.is_err());
    let log = log_of(&vm.log);
    let woken = all_at(&log, "", DeviceState::RunningP2p);
    let running = all_at(&log, "", DeviceState::Running);
    assert_before(&log, &all_at(&log, "", DeviceState::StopCopy), &woken);
    assert_before(&log, &woken, &running);
    assert_before(&log, &running, &[at(&log, "resume")]);
}

#[test]
fn c34_no_device_is_touched_before_the_configuration_nor_before_what_a_vmm_wants_restored_first() {
    for streams in [true, false] {
        let mut vm = FakeVm::new(5);
        let (machine, mut vmm) = both(&vm);
        vmm.streams = streams;
        let (sent, received) =
            moves(&mut vm, &machine, &mut vmm, |options| options.downtime(Duration::from_secs(10)));
        sent.unwrap();
        received.unwrap();
        let log = log_of(&vm.log);
        let resuming = all_at(&log, "there ", DeviceState::Resuming);
        assert_before(&log, &[at(&log, "config")], &resuming);
        // What streams is in the devices by then, and they accept it only afterwards.
        let accepted = all_at(&log, "there ", DeviceState::Stop);
        assert_before(&log, &[at(&log, "interrupt controller")], &accepted);
        // Where the VMM wants it first even of their bytes, it offers no streams.
        assert_eq!(resuming[0] < at(&log, "interrupt controller"), streams, "{log:#?}");
        if !streams {
            assert_before(&log, &[at(&log, "interrupt controller")], &resuming);
        }
    }
}
