// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A migration, phase by phase, as its source sees it.

use std::sync::{Mutex, MutexGuard};
use std::time::{Duration, Instant};

use super::connections::{Lanes, Pipeline};
use super::control::{Control, Switchover};
use super::downtime::{DowntimeClock, DowntimeParts};
use super::error::{SendError, SourceVm, VmOperation};
use super::meter::Measured;
use super::options::SendOptions;
use super::payload::StatePayload;
use super::pinning::Populated;
use super::progress::{Migration, Phase};
use super::sent::Sent;
use super::zero_filter::ZeroFilter;
use crate::device::DeviceSet;
use crate::ledger::{CursorId, Start};
use crate::precopy::{Decision, Policy};
use crate::source::choose;
use crate::sync::lock;
use crate::tracker::{Tracker, TrackerError, locked};
use crate::units::Bytes;
use crate::vm::{Backing, HoleWatch, UserfaultError, Vm, VmError};

/// How long chunks on their way may still be acknowledged after a failure or a cancellation.
const GRACE: Duration = Duration::from_millis(400);

/// One attempt to move a VM: who takes part, what was changed of them, what was measured.
pub(super) struct Session<'a, V: Vm> {
    pub(super) options: &'a SendOptions,
    pub(super) policy: Policy,
    pub(super) vm: &'a mut V,
    tracker: &'a Mutex<Tracker>,
    devices: &'a Mutex<DeviceSet>,
    pub(super) migration: &'a Migration,
    hole_watch: HoleWatch,
    clock: DowntimeClock,
    pub(super) undo: Undo,
    pub(super) measured: Measured,
    pub(super) populated: Populated,
    /// Whether pass-through devices write the VM's memory, whoever moves their state.
    pub(super) has_devices: bool,
    pub(super) began: Instant,
}

/// What has to be undone when the migration fails.
#[derive(Debug, Default)]
pub(super) struct Undo {
    pub(super) cursor: Option<CursorId>,
    pub(super) devices_touched: bool,
    pub(super) vm_paused: Option<Instant>,
    vm_released: bool,
    pub(super) throttle_percent: u8,
}

impl<'a, V: Vm> Session<'a, V> {
    pub(super) fn new(
        options: &'a SendOptions,
        vm: &'a mut V,
        tracker: &'a Mutex<Tracker>,
        devices: &'a Mutex<DeviceSet>,
        migration: &'a Migration,
    ) -> Self {
        let before = lock(tracker).attribution().map(|(id, pages)| (id.to_owned(), pages)).collect();
        let measured = Measured::new(before, options.bandwidth);
        Self {
            options,
            policy: options.policy(vm.can_throttle()),
            hole_watch: HoleWatch::default(),
            clock: DowntimeClock::default(),
            vm,
            tracker,
            devices,
            migration,
            undo: Undo::default(),
            measured,
            populated: Populated::default(),
            has_devices: false,
            began: Instant::now(),
        }
    }

    /// The tracker, for the next step; an error once a thread died in the middle of one.
    pub(super) fn tracker(&self) -> Result<MutexGuard<'a, Tracker>, TrackerError> {
        locked(self.tracker)
    }

    /// The tracker, to be asked how it stands.
    pub(super) fn look(&self) -> MutexGuard<'a, Tracker> {
        lock(self.tracker)
    }

    pub(super) fn devices(&self) -> MutexGuard<'a, DeviceSet> {
        lock(self.devices)
    }

    /// Moves the VM, or leaves it as it was.
    pub(super) fn migrate(mut self) -> Result<Sent, SendError> {
        let outcome = self.attempt();
        self.migration.enter(match outcome.as_ref().map_err(SendError::source_vm) {
            Ok(_) => Phase::Completed,
            Err(SourceVm::PausedForSafety) => Phase::OutcomeUnknown,
            Err(SourceVm::AsBefore | SourceVm::Stuck) => Phase::Abandoned,
        });
        self.log_outcome(&outcome);
        outcome
    }

    fn attempt(&mut self) -> Result<Sent, SendError> {
        let ram_bytes = self.look().layout().bytes();
        self.migration.update(|progress| progress.ram_bytes = ram_bytes);
        self.migration.enter(Phase::Connecting);
        self.log_begin(ram_bytes);
        let mut control = Control::connect(self.options, self.migration)?;
        let outcome = self.converse(&mut control).or_else(|failure| self.recover(failure));
        if outcome.is_err() {
            control.abandon();
        }
        outcome
    }

    /// The conversation with the receiver, from the first word to the last.
    fn converse(&mut self, control: &mut Control<'_>) -> Result<Sent, SendError> {
        control.start()?;
        let config = self.describe()?;
        let ram_bytes = self.look().layout().bytes();
        control.config(&config, self.populating_time(ram_bytes))?;
        self.arm()?;
        self.log_armed();
        self.copy_memory(control)?;
        self.end_part(|parts| &mut parts.last_pages);
        control.hurry(self.switchover());
        let state = self.capture()?;
        self.end_part(|parts| &mut parts.capture);
        self.copy_rest(control)?;
        self.end_part(|parts| &mut parts.last_pages);
        self.release()?;
        control.state(&state)?;
        self.end_part(|parts| &mut parts.state);
        control.complete(self.options.complete_paused)?;
        self.end_part(|parts| &mut parts.complete);
        Ok(self.retire())
    }

    fn describe(&mut self) -> Result<Vec<u8>, SendError> {
        let config = self.vm.config().map_err(vm_failed(VmOperation::Config))?;
        Ok(self.heed_pinning(config))
    }

    /// Switches every source on, before the first page is copied (C1), and lets devices begin to hand out their state.
    fn arm(&mut self) -> Result<(), SendError> {
        let mut tracker = self.tracker()?;
        tracker.check_memory(&*self.vm.memory())?;
        self.undo.cursor = Some(tracker.begin(Start::Empty)?);
        let told = |degradation: &&choose::Degradation| {
            !matches!(degradation, choose::Degradation::Imprecise { .. })
        };
        tracker.space_degradations().iter().filter(told).for_each(|one| self.migration.degrade(one.clone()));
        tracker.imprecise_sources().for_each(|source| self.migration.degrade(source));
        drop(tracker);
        self.start_measuring();
        self.start_device_precopy()
    }

    /// Copies all memory on all connections; the VM runs at first, and stands still at the end.
    fn copy_memory(&mut self, control: &mut Control<'_>) -> Result<(), SendError> {
        let connections = control.open_lanes()?;
        let pipeline = Pipeline {
            window: self.options.pipelined_chunks(),
            answer_timeout: self.options.limits.answer_timeout,
        };
        let sieve = self.sieve()?;
        let lanes = Lanes::start(connections, sieve, pipeline, self.migration, self.options.thread_start);
        let mut lanes = lanes.map_err(SendError::Thread)?;
        let copied = self.copy_until_stopped(&mut lanes);
        let taken_back = control.take_back(lanes.stop(GRACE));
        copied.and(taken_back)
    }

    /// Makes what finds the pages that need not be sent; memory that a userfaultfd fills has no holes to it.
    fn sieve(&mut self) -> Result<Option<ZeroFilter>, SendError> {
        let backing = match HoleWatch::begin(&*self.vm.memory(), self.vm.backing()) {
            Ok((watch, backing)) => {
                self.hole_watch = watch;
                backing
            }
            Err(unknown @ UserfaultError::Smaps(_)) => {
                self.migration.degrade(unknown);
                self.hole_watch = HoleWatch::blind();
                Backing::default()
            }
            Err(unreadable) => return Err(unreadable.into()),
        };
        let host_page = self.look().layout().host_page();
        Ok(self.may_leave_out().then(|| ZeroFilter::new(backing, host_page)))
    }

    /// Makes sure that what was left out of a round as holes were some.
    pub(super) fn check_holes(&mut self) -> Result<(), SendError> {
        let hole_bytes = self.migration.progress().skipped_hole_bytes;
        let plugs = self.undo.cursor.map_or(0, |cursor| self.look().plugs(cursor));
        if let Some(unknown) = self.hole_watch.check(&*self.vm.memory(), hole_bytes, plugs)? {
            self.migration.degrade(unknown);
        }
        Ok(())
    }

    fn copy_until_stopped(&mut self, lanes: &mut Lanes<V::Memory>) -> Result<(), SendError> {
        loop {
            self.precopy(lanes)?;
            if self.stop()? {
                self.round(lanes)?;
                self.log_last_round();
                return Ok(());
            }
            self.run_on()?;
        }
    }

    /// Stops the vCPUs, then all devices, and collects what both wrote until then (C3, C5).
    ///
    /// Returns whether to go through with it, now that the sizes are certain (C38).
    fn stop(&mut self) -> Result<bool, SendError> {
        self.migration.enter(Phase::SwitchOver);
        let paused = Instant::now();
        self.undo.vm_paused = Some(paused);
        self.clock.start(paused);
        self.vm.pause().map_err(vm_failed(VmOperation::Pause))?;
        self.end_part(|parts| &mut parts.pause);
        let estimate = self.devices().stop_for_copy()?;
        let estimate = self.check_state_fits(estimate)?;
        self.end_part(|parts| &mut parts.devices_stop);
        let failures = self.tracker()?.collect_final();
        self.bear(failures)?;
        let seen = self.observe_and_publish(estimate);
        self.end_part(|parts| &mut parts.last_collect);
        self.log_stopped(&seen);
        if self.options.complete_paused {
            return Ok(true);
        }
        match self.policy.confirm(&seen) {
            Decision::SwitchOver { .. } => Ok(true),
            Decision::Cancel { reason } => Err(SendError::GivenUp(reason)),
            Decision::Continue | Decision::ContinueThrottled(_) => Ok(false),
        }
    }

    /// Ends a part of the downtime.
    fn end_part(&mut self, of: impl FnOnce(&mut DowntimeParts) -> &mut Duration) {
        self.clock.end_part(Instant::now(), of);
    }

    /// Takes a switchover back: devices first, then the vCPUs.
    fn run_on(&mut self) -> Result<(), SendError> {
        log::info!("Taking the switchover back: it would take too long");
        self.devices().run()?;
        self.vm.resume().map_err(vm_failed(VmOperation::Resume))?;
        self.undo.vm_paused = None;
        self.measured.back_outs += 1;
        self.start_device_precopy()
    }

    /// Until when the stopped VM may stand still; `None` while it runs, and where it was paused before.
    pub(super) fn switchover(&self) -> Option<Switchover> {
        Some(Switchover::new(self.undo.vm_paused?, self.options.switchover_timeout()?))
    }

    /// Captures the stopped VM: what State carries.
    fn capture(&mut self) -> Result<StatePayload, SendError> {
        let devices = self.devices().save()?;
        let state = self.vm.state(devices).map_err(vm_failed(VmOperation::State))?;
        let payload = self.check_captured(StatePayload::new(state)?)?;
        log::debug!("Captured a state of {}", Bytes(payload.bytes()));
        Ok(payload)
    }

    /// Lets go of what the receiver takes when it is given State.
    fn release(&mut self) -> Result<(), SendError> {
        self.undo.vm_released = true;
        self.vm.release().map_err(vm_failed(VmOperation::Release))
    }

    /// Sends what capturing wrote (C4), on the control connection, with every other one drained and gone.
    ///
    /// Imprecise sources have nothing to add: they speak of devices, and those stand still.
    fn copy_rest(&mut self, control: &mut Control<'_>) -> Result<(), SendError> {
        self.collect()?;
        self.end_part(|parts| &mut parts.last_collect);
        let Some(cursor) = self.undo.cursor else { return Ok(()) };
        self.tracker()?.begin_round(cursor);
        let limits = self.chunk_limits(1);
        loop {
            let Some((chunk, memory)) = self.take(cursor, limits)? else { return Ok(()) };
            let copied = control.memory(&*memory, &chunk);
            match copied {
                Ok(()) => self.look().commit(chunk),
                Err(failure) => {
                    self.look().roll_back(chunk);
                    return Err(failure);
                }
            }
        }
    }

    /// Closes the books on a VM that has moved.
    fn retire(&mut self) -> Sent {
        let downtime_parts = self.clock.parts();
        let downtime = downtime_parts.total();
        let total = self.began.elapsed();
        let cursor = self.undo.cursor.take();
        let unique_dirty_bytes = cursor.and_then(|cursor| self.look().dirtied_bytes(cursor)).unwrap_or(0);
        let mut devices = self.devices();
        let (device_state_bytes, device_precopy_bytes) = (devices.state_bytes(), devices.precopy_bytes());
        if let Err(error) = devices.retire() {
            self.migration.degrade(error);
        }
        drop(devices);
        if let Some(Err(error)) = cursor.map(|cursor| self.look().end(cursor)) {
            self.migration.degrade(error);
        }
        self.note_missed_downtime(downtime);
        let sources = self.attribution();
        let progress = self.migration.progress();
        Sent {
            rounds: self.measured.rounds,
            bytes_sent: progress.sent_bytes,
            skipped_hole_bytes: progress.skipped_hole_bytes,
            skipped_zero_bytes: progress.skipped_zero_bytes,
            unique_dirty_bytes,
            downtime,
            downtime_parts,
            downtime_exceeded: self.is_missed(downtime),
            populated: self.populated,
            forecast: progress.forecast,
            total,
            sources,
            device_state_bytes,
            device_precopy_bytes,
            degradations: progress.degradations,
            back_outs: self.measured.back_outs,
            throttle_percent: self.undo.throttle_percent,
        }
    }

    /// Sets everything going again after a failure, devices before vCPUs, unless the receiver may run the VM.
    fn recover(&mut self, failure: SendError) -> Result<Sent, SendError> {
        let _logs_off = self.undo.cursor.take().map(|cursor| self.look().end(cursor));
        if failure.source_vm() == SourceVm::PausedForSafety {
            return Err(failure);
        }
        match self.set_going() {
            Ok(()) => Err(failure),
            Err(recovery) => Err(SendError::Stuck { failure: failure.into(), recovery: recovery.into() }),
        }
    }

    /// Undoes what was done to the VM, going on when one part of it fails.
    fn set_going(&mut self) -> Result<(), SendError> {
        if std::mem::take(&mut self.undo.throttle_percent) > 0 {
            self.vm.throttle(0);
        }
        let devices = match (self.undo.devices_touched, self.options.complete_paused) {
            (false, _) => Ok(()),
            (true, false) => self.devices().run(),
            (true, true) => self.devices().stop(),
        };
        let reclaimed = match std::mem::take(&mut self.undo.vm_released) {
            true => self.vm.reclaim(),
            false => Ok(()),
        };
        reclaimed.map_err(vm_failed(VmOperation::Reclaim))?;
        let vm = match self.undo.vm_paused.take() {
            Some(_) if !self.options.complete_paused => self.vm.resume(),
            _ => Ok(()),
        };
        devices?;
        vm.map_err(vm_failed(VmOperation::Resume))
    }
}

fn vm_failed(operation: VmOperation) -> impl FnOnce(VmError) -> SendError {
    move |source| SendError::Vm { operation, source }
}
