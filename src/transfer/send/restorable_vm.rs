// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The VM at its source, and what has to be set back there when the migration fails.

use std::sync::Arc;
use std::time::{Duration, Instant};

use vm_migration::Snapshot;

use super::downtime::Switchover;
use super::error::{SendError, VmOperation};
use crate::vm::{Backing, Captured, Vm, VmError};

/// The VM, and what was done to it.
pub(super) struct RestorableVm<'a, V: Vm> {
    vm: &'a mut V,
    /// It was paused before, and stays so whatever happens.
    stays_paused: bool,
    paused: Option<Instant>,
    released: bool,
    throttle_percent: u8,
}

/// How a VM stands at its source.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Standing {
    pub(super) is_paused: bool,
    /// Share of their time that the vCPUs have lost.
    pub(super) throttle_percent: u8,
}

impl<'a, V: Vm> RestorableVm<'a, V> {
    pub(super) fn new(vm: &'a mut V, stays_paused: bool) -> Self {
        Self { vm, stays_paused, paused: None, released: false, throttle_percent: 0 }
    }

    pub(super) fn memory(&self) -> Arc<V::Memory> {
        self.vm.memory()
    }

    pub(super) fn backing(&self) -> Backing {
        self.vm.backing()
    }

    pub(super) fn config(&mut self) -> Result<Vec<u8>, SendError> {
        self.vm.config().map_err(failed(VmOperation::Config))
    }

    pub(super) fn standing(&self) -> Standing {
        Standing { is_paused: self.is_paused(), throttle_percent: self.throttle_percent }
    }

    /// Whether it was stopped for the switchover.
    pub(super) fn is_paused(&self) -> bool {
        self.paused.is_some()
    }

    /// Until when the stopped VM may stand still, which is for `timeout`; `None` while it runs, and without one.
    pub(super) fn switchover(&self, timeout: Option<Duration>) -> Option<Switchover> {
        Some(Switchover::new(self.paused?, timeout?))
    }

    pub(super) fn throttle(&mut self, percent: u8) {
        log::info!("Taking {percent} % of the vCPUs' time away");
        self.throttle_percent = percent;
        self.vm.throttle(percent);
    }

    /// Stops the vCPUs, at `now`.
    pub(super) fn pause(&mut self, now: Instant) -> Result<(), SendError> {
        self.paused = Some(now);
        self.vm.pause().map_err(failed(VmOperation::Pause))
    }

    /// Lets the vCPUs run again, since the switchover is taken back.
    pub(super) fn run_on(&mut self) -> Result<(), SendError> {
        self.vm.resume().map_err(failed(VmOperation::Resume))?;
        self.paused = None;
        Ok(())
    }

    /// Captures the stopped VM, with the state of its devices.
    pub(super) fn state(&mut self, devices: Snapshot) -> Result<Captured, SendError> {
        self.vm.state(devices).map_err(failed(VmOperation::State))
    }

    /// Lets go of what the receiver takes when it is given State.
    pub(super) fn release(&mut self) -> Result<(), SendError> {
        self.released = true;
        self.vm.release().map_err(failed(VmOperation::Release))
    }

    /// Undoes what was done to the VM and, between the throttling and the rest, by `set_back_devices` to its devices; goes on when
    /// one part of it fails.
    pub(super) fn restore(
        &mut self,
        set_back_devices: impl FnOnce(bool) -> Result<(), SendError>,
    ) -> Result<(), SendError> {
        if std::mem::take(&mut self.throttle_percent) > 0 {
            self.vm.throttle(0);
        }
        let devices = set_back_devices(self.stays_paused);
        let reclaimed = match std::mem::take(&mut self.released) {
            true => self.vm.reclaim(),
            false => Ok(()),
        };
        reclaimed.map_err(failed(VmOperation::Reclaim))?;
        let vm = match self.paused.take() {
            Some(_) if !self.stays_paused => self.vm.resume(),
            _ => Ok(()),
        };
        devices?;
        vm.map_err(failed(VmOperation::Resume))
    }
}

fn failed(operation: VmOperation) -> impl FnOnce(VmError) -> SendError {
    move |source| SendError::Vm { operation, source }
}
