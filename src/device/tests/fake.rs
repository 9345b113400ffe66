// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Scripted devices that share a log, a clock of calls, and at most one fault.

use std::io;
use std::sync::{Arc, Mutex, MutexGuard};

use crate::device::{
    Capabilities, DataRead, Device, DeviceError, DeviceIo, DeviceOperation, DeviceState, PrecopyInfo, path,
};

/// What happens at the call at which the fault is due.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Effect {
    /// The call fails and changes nothing.
    Fails,
    /// A move fails after its first arc, another call as in `Fails`.
    FailsHalfway,
    /// The call fails and leaves the device in ERROR.
    Breaks,
    /// Something else resets the device: before the call, or after it if it moves the device.
    IsReset,
}

/// What a device has to say in PRE_COPY.
#[derive(Debug, Clone)]
pub(crate) enum Turn {
    Bytes(Vec<u8>),
    Pause,
}

#[derive(Debug, Clone)]
pub(crate) struct Script {
    pub(super) capabilities: Capabilities,
    /// What it says in PRE_COPY, and in STOP_COPY all at once if it was not asked there.
    pub(super) turns: Vec<Turn>,
    /// What it says in STOP_COPY only.
    pub(super) rest: Vec<u8>,
    /// Most bytes of one read.
    pub(super) segment: usize,
    /// Whether it tells sizes.
    pub(super) tells: bool,
}

impl Script {
    /// The whole stream, which any uninterrupted session brings.
    pub(super) fn stream(&self) -> Vec<u8> {
        let turns = self.turns.iter().filter_map(|turn| match turn {
            Turn::Bytes(bytes) => Some(bytes),
            Turn::Pause => None,
        });
        turns.flatten().chain(&self.rest).copied().collect()
    }
}

/// One fake device's inner life, as the test sees it.
pub(crate) struct Inside {
    pub(super) script: Script,
    pub(super) state: DeviceState,
    /// What is still to be read.
    pub(super) left: Vec<Turn>,
    /// What was written to it in RESUMING, and whether it was accepted.
    pub(super) written: Vec<u8>,
    pub(super) loaded: Option<Vec<u8>>,
    /// What it accepts.
    pub(super) expects: Option<Vec<u8>>,
    /// Something else moved it: where it is then proves nothing.
    pub(super) excused: bool,
    /// A reset leaves it in the state in which it is.
    pub(super) ignores_reset: bool,
    /// It was reset and has not been touched since: it runs, but has nothing to do.
    blank: bool,
}

#[derive(Default)]
pub(crate) struct World {
    pub(super) devices: Vec<Inside>,
    /// States entered, in order, with the device that entered them.
    pub(crate) log: Vec<(usize, DeviceState)>,
    pub(super) calls: usize,
    pub(super) fault: Option<(usize, Effect)>,
    /// How the order across devices was broken.
    pub(super) violations: Vec<String>,
}

impl World {
    pub(super) fn states(&self) -> Vec<DeviceState> {
        self.devices.iter().map(|device| device.state).collect()
    }

    fn enter(&mut self, index: usize, state: DeviceState) {
        let device = &mut self.devices[index];
        if device.state == DeviceState::Resuming && state == DeviceState::Stop {
            device.loaded = Some(device.written.clone());
        }
        if state == DeviceState::Resuming {
            device.written.clear();
            device.loaded = None;
        }
        if state.is_saving() && !device.state.is_saving() {
            device.left = device.script.turns.clone();
        }
        if state == DeviceState::StopCopy {
            let unread: Vec<Vec<u8>> = std::mem::take(&mut device.left)
                .into_iter()
                .filter_map(|turn| match turn {
                    Turn::Bytes(bytes) => Some(bytes),
                    Turn::Pause => None,
                })
                .collect();
            let rest = [unread.concat(), device.script.rest.clone()].concat();
            device.left = vec![Turn::Bytes(rest)];
        }
        (device.state, device.blank) = (state, false);
        self.log.push((index, state));
        self.check_order();
    }

    /// No device that can be quiescent is stopped while another that can be is not.
    fn check_order(&mut self) {
        let counts = |device: &&Inside| device.script.capabilities.p2p && !device.excused && !device.blank;
        let p2p: Vec<_> = self.devices.iter().filter(counts).map(|device| device.state).collect();
        let stopped = p2p.iter().any(|state| state.is_stopped());
        if stopped && p2p.iter().any(|state| state.is_running()) {
            self.violations.push(format!("{:?} after {:?}", self.states(), self.log));
        }
    }

    /// Counts a call; tells whether it has to fail, and how.
    fn call(&mut self, index: usize) -> Option<Effect> {
        let now = self.calls;
        self.calls += 1;
        let (_, effect) = self.fault.filter(|&(at, _)| at == now)?;
        match effect {
            Effect::IsReset => {
                self.devices[index].excused = true;
                Some(effect)
            }
            Effect::Breaks => {
                self.enter(index, DeviceState::Error);
                Some(effect)
            }
            other => Some(other),
        }
    }

    fn reset(&mut self, index: usize) {
        let device = &mut self.devices[index];
        (device.left, device.loaded) = (Vec::new(), None);
        device.written.clear();
        if device.ignores_reset {
            return;
        }
        (device.state, device.blank) = (DeviceState::Running, true);
        self.log.push((index, DeviceState::Running));
    }
}

struct Fake {
    world: Arc<Mutex<World>>,
    index: usize,
    capabilities: Capabilities,
}

/// Makes a device of each script.
pub(super) fn devices(scripts: Vec<Script>) -> (Vec<Device>, Arc<Mutex<World>>) {
    let world = Arc::new(Mutex::new(World::default()));
    let make = |script| {
        let io = interface(script, &world);
        let index = world.lock().unwrap().devices.len() - 1;
        Device::new(format!("dev{index}"), io).kind("fake")
    };
    let devices = scripts.into_iter().map(make).collect();
    (devices, world)
}

/// Makes the interface of a device in `world`.
pub(super) fn interface(script: Script, world: &Arc<Mutex<World>>) -> Box<dyn DeviceIo> {
    let mut inside = world.lock().unwrap();
    let (index, capabilities) = (inside.devices.len(), script.capabilities);
    inside.devices.push(Inside {
        script,
        state: DeviceState::Running,
        left: Vec::new(),
        written: Vec::new(),
        loaded: None,
        expects: None,
        excused: false,
        ignores_reset: false,
        blank: false,
    });
    Box::new(Fake { world: Arc::clone(world), index, capabilities })
}

fn failure(operation: DeviceOperation, errno: i32) -> DeviceError {
    DeviceError::new(operation, io::Error::from_raw_os_error(errno))
}

impl Fake {
    /// Begins a call that a fault can only make fail.
    fn begin(&self, operation: DeviceOperation) -> Result<MutexGuard<'_, World>, DeviceError> {
        let mut world = self.world.lock().unwrap();
        match world.call(self.index) {
            None => Ok(world),
            Some(Effect::IsReset) => {
                world.reset(self.index);
                Ok(world)
            }
            Some(_) => Err(failure(operation, libc::EIO)),
        }
    }
}

impl DeviceIo for Fake {
    fn capabilities(&self) -> Capabilities {
        self.capabilities
    }

    fn state(&mut self) -> Result<DeviceState, DeviceError> {
        Ok(self.begin(DeviceOperation::State)?.devices[self.index].state)
    }

    fn set_state(&mut self, target: DeviceState) -> Result<(), DeviceError> {
        let mut world = self.world.lock().unwrap();
        let fault = world.call(self.index);
        let now = world.devices[self.index].state;
        if now == DeviceState::Error {
            return Err(failure(DeviceOperation::SetState(target), libc::EINVAL));
        }
        let arcs = path(now, target, self.capabilities).expect("a refused arc is never asked for");
        let arcs: Vec<_> = arcs.collect();
        if let Some(effect) = fault.filter(|effect| *effect != Effect::IsReset) {
            if effect == Effect::FailsHalfway && arcs.len() > 1 {
                world.enter(self.index, arcs[0]);
            }
            return Err(failure(DeviceOperation::SetState(target), libc::EIO));
        }
        for state in arcs {
            let device = &world.devices[self.index];
            let refused = device.expects.as_ref().is_some_and(|expected| *expected != device.written);
            if device.state == DeviceState::Resuming && refused {
                return Err(failure(DeviceOperation::SetState(target), libc::EINVAL));
            }
            world.enter(self.index, state);
        }
        if fault.is_some() {
            world.reset(self.index);
        }
        Ok(())
    }

    fn read_data(&mut self, buffer: &mut [u8]) -> Result<DataRead, DeviceError> {
        let mut world = self.begin(DeviceOperation::ReadData)?;
        let device = &mut world.devices[self.index];
        let segment = device.script.segment;
        if !device.state.is_saving() {
            return Err(failure(DeviceOperation::ReadData, libc::ENODEV));
        }
        loop {
            match device.left.first_mut() {
                None if device.state == DeviceState::StopCopy => return Ok(DataRead::End),
                None => return Ok(DataRead::NothingNow),
                Some(Turn::Pause) => {
                    device.left.remove(0);
                    return Ok(DataRead::NothingNow);
                }
                Some(Turn::Bytes(bytes)) if bytes.is_empty() => drop(device.left.remove(0)),
                Some(Turn::Bytes(bytes)) => {
                    let count = bytes.len().min(segment).min(buffer.len());
                    buffer[..count].copy_from_slice(&bytes[..count]);
                    bytes.drain(..count);
                    return Ok(DataRead::Bytes(count));
                }
            }
        }
    }

    fn write_data(&mut self, data: &[u8]) -> Result<(), DeviceError> {
        let mut world = self.begin(DeviceOperation::WriteData)?;
        let device = &mut world.devices[self.index];
        if device.state != DeviceState::Resuming {
            return Err(failure(DeviceOperation::WriteData, libc::ENODEV));
        }
        device.written.extend_from_slice(data);
        Ok(())
    }

    fn precopy_info(&mut self) -> Result<Option<PrecopyInfo>, DeviceError> {
        let world = self.begin(DeviceOperation::PrecopyInfo)?;
        let device = &world.devices[self.index];
        if !matches!(device.state, DeviceState::PreCopy | DeviceState::PreCopyP2p) {
            return Err(failure(DeviceOperation::PrecopyInfo, libc::EINVAL));
        }
        let initial = device.left.iter().take_while(|turn| matches!(turn, Turn::Bytes(_)));
        let bytes = |turn: &Turn| match turn {
            Turn::Bytes(bytes) => bytes.len() as u64,
            Turn::Pause => 0,
        };
        let initial_bytes = initial.map(bytes).sum();
        Ok(device.script.tells.then_some(PrecopyInfo { initial_bytes, dirty_bytes: 0 }))
    }

    fn data_size(&mut self) -> Result<Option<u64>, DeviceError> {
        let world = self.begin(DeviceOperation::DataSize)?;
        let device = &world.devices[self.index];
        Ok(device.script.tells.then(|| device.script.stream().len() as u64))
    }

    fn reset(&mut self) -> Result<(), DeviceError> {
        let mut world = self.begin(DeviceOperation::Reset)?;
        world.reset(self.index);
        Ok(())
    }
}
