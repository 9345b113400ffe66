// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Devices that refuse a move, a read or a write while their states are half-way, on several connections.

use std::sync::Arc;

use vfio_migration::device::{DeviceIo, DeviceState, KernelDevice};
use vfio_migration::transfer::SourceVm;
use vfio_migration_integration::bed::{BedSetup, Here, Moving, Parameter, migrate};

use crate::{assert_moves, assert_runs_on, chain, running, setups};

const STATE_BYTES: u64 = 1 << 20;
const HALF_WAY: &str = "500000";

/// What the engine of one end does.
#[derive(Debug, Clone, Copy)]
enum Fault {
    /// It refuses to go from one state to another.
    Arc(DeviceState, DeviceState),
    /// As that, and ends in ERROR.
    FatalArc(DeviceState, DeviceState),
    /// Its state cannot be read, or written, beyond a byte.
    Data,
}

impl Fault {
    fn inject(self, of: &str, data: &str) -> Vec<Parameter> {
        let number = |state: DeviceState| state as u32;
        let mut set = vec![Parameter::fixture("fault_device", of).unwrap()];
        match self {
            Self::Arc(from, to) | Self::FatalArc(from, to) => {
                let arc = number(from) << 4 | number(to);
                let is_fatal = if matches!(self, Self::FatalArc(..)) { "Y" } else { "N" };
                set.push(Parameter::fixture("fault_arc", &arc.to_string()).unwrap());
                set.push(Parameter::fixture("fault_arc_fatal", is_fatal).unwrap());
            }
            Self::Data => set.push(Parameter::fixture(data, HALF_WAY).unwrap()),
        }
        set
    }
}

fn moving() -> Moving {
    Moving { bytes_per_second: 64 << 20, connections: 4, ..Moving::default() }
}

/// The state of the engine as the kernel tells it.
fn engine_state(here: &Here) -> DeviceState {
    let device = Arc::clone(here.side.engine().pass_through().device());
    KernelDevice::new(device).unwrap().state().unwrap()
}

/// Fails to move a VM: neither end has a device in a session, and the destination's holds nothing.
#[track_caller]
fn assert_fails(source: &mut Here, destination: &BedSetup, fault: Fault, [of, data]: [&str; 2]) {
    let mut to = Here::new(destination.clone()).unwrap();
    let injected = fault.inject(of, data);
    let error = migrate(source, &mut to, moving(), |_| {}).unwrap_err();
    drop(injected);
    assert_eq!(error.source_vm(), SourceVm::AsBefore, "{fault:?}: {}", chain(&error));
    assert_eq!(engine_state(source), DeviceState::Running, "{fault:?}");
    assert_eq!(engine_state(&to), DeviceState::Running, "{fault:?}: it was reset");
    assert_eq!(to.side.engine().position().unwrap(), 0, "{fault:?}");
}

#[test]
fn every_failing_call_of_a_source_with_streams_half_way_leaves_its_vm_running() {
    use DeviceState::{PreCopy, PreCopyP2p, Running, StopCopy};
    let Some([source, destination]) = setups("source with streams half-way") else { return };
    let _padding = Parameter::fixture("state_padding", &STATE_BYTES.to_string()).unwrap();
    let of = [&*source.mdev.clone(), "fault_read_at"];
    let mut source = running(source);
    let arcs = [(Running, PreCopy), (PreCopy, PreCopyP2p), (PreCopyP2p, StopCopy)];
    for fault in arcs.map(|(from, to)| Fault::Arc(from, to)) {
        assert_fails(&mut source, &destination, fault, of);
    }
    // It is read again from its begin once the device has stopped, and fails again.
    assert_fails(&mut source, &destination, Fault::Data, of);
    assert_runs_on(&source);
    // Only a reset helps: the VM runs on with a device that has forgotten all.
    assert_fails(&mut source, &destination, Fault::FatalArc(PreCopyP2p, StopCopy), of);
    assert_eq!(source.side.engine().position().unwrap(), 0);
    assert_moves(&mut source, destination);
}

#[test]
fn every_failing_call_of_a_destination_with_streams_half_way_leaves_nothing_behind() {
    use DeviceState::{Resuming, Running, RunningP2p, Stop};
    let Some([source, destination]) = setups("destination with streams half-way") else { return };
    let _padding = Parameter::fixture("state_padding", &STATE_BYTES.to_string()).unwrap();
    let mut source = running(source);
    for fault in [
        Fault::Arc(Running, RunningP2p),
        Fault::Arc(RunningP2p, Stop),
        Fault::Arc(Stop, Resuming),
        Fault::Arc(Resuming, Stop),
        Fault::FatalArc(Resuming, Stop),
        Fault::Data,
    ] {
        assert_fails(&mut source, &destination, fault, [&destination.mdev, "fault_write_at"]);
    }
    assert_runs_on(&source);
    assert_moves(&mut source, destination);
}
