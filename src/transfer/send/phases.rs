// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A migration, phase by phase, as its source sees it.

use std::sync::Mutex;
use std::time::{Duration, Instant};

use super::control::Control;
use super::copier::{Copier, Pass, chunk_limits};
use super::device_precopy::DevicePrecopy;
use super::downtime::DowntimeClock;
use super::error::{SendError, SourceVm};
use super::logging;
use super::meter::Meter;
use super::options::SendOptions;
use super::payload::StatePayload;
use super::pinning::Pinning;
use super::progress::{Phase, SenderHandle};
use super::restorable_vm::RestorableVm;
use super::sent::Sent;
use super::tracking::Tracking;
use crate::device::{DeviceSet, compare_identities};
use crate::precopy::{Decision, Observation, millis};
use crate::tracker::Tracker;
use crate::transfer::frame::Features;
use crate::units::Bytes;
use crate::vm::Vm;

/// Dirty bytes under which another round at once would be a waste.
const IDLE_BYTES: u64 = 1 << 20;

/// The pause between two rounds when there is next to nothing to send and the switchover waits for something else.
const IDLE_PAUSE: Duration = Duration::from_millis(10);

/// One attempt to move a VM: who takes part, and what is measured.
pub(super) struct Session<'a, V: Vm> {
    options: &'a SendOptions,
    migration: &'a SenderHandle,
    vm: RestorableVm<'a, V>,
    devices: DevicePrecopy<'a>,
    tracking: Tracking<'a>,
    pinning: Pinning,
    meter: Meter<'a>,
    clock: DowntimeClock,
}

impl<'a, V: Vm> Session<'a, V> {
    pub(super) fn new(
        options: &'a SendOptions,
        vm: &'a mut V,
        tracker: &'a Mutex<Tracker>,
        devices: &'a Mutex<DeviceSet>,
        migration: &'a SenderHandle,
    ) -> Self {
        let tracking = Tracking::new(tracker, migration);
        Self {
            options,
            migration,
            vm: RestorableVm::new(vm, options.complete_paused),
            devices: DevicePrecopy::new(devices, migration, options.limits.state_bytes),
            pinning: Pinning::new(options.pinning_receiver, options.receiver_reads_zero),
            meter: Meter::new(migration, options.policy, &tracking),
            tracking,
            clock: DowntimeClock::default(),
        }
    }

    /// Moves the VM, or leaves it as it was.
    pub(super) fn migrate(mut self) -> Result<Sent, SendError> {
        let outcome = self.attempt();
        self.migration.enter(match outcome.as_ref().map_err(SendError::source_vm) {
            Ok(_) => Phase::Completed,
            Err(SourceVm::PausedForSafety) => Phase::OutcomeUnknown,
            Err(SourceVm::AsBefore | SourceVm::Stuck) => Phase::Abandoned,
        });
        logging::outcome(&outcome, self.meter.rounds());
        outcome
    }

    fn attempt(&mut self) -> Result<Sent, SendError> {
        let ram_bytes = self.tracking.look().layout().bytes();
        self.migration.update(|progress| progress.ram_bytes = ram_bytes);
        self.migration.enter(Phase::Connecting);
        logging::began(self.options, ram_bytes);
        let mut control = Control::connect(self.options, self.migration)?;
        let outcome = self.converse(&mut control);
        let outcome =
            outcome.map_err(|failure| recover(failure, &mut self.vm, &self.devices, &mut self.tracking));
        if outcome.is_err() {
            control.abandon();
        }
        outcome
    }

    /// The conversation with the receiver, from the first word to the last.
    fn converse(&mut self, control: &mut Control<'_>) -> Result<Sent, SendError> {
        let agreed = self.agree(control)?;
        self.describe(control, agreed)?;
        self.arm()?;
        self.copy_memory(control)?;
        let state = self.capture(control)?;
        self.copy_rest(control)?;
        self.hand_over(&state, control)?;
        Ok(self.retire())
    }

    /// Agrees on the protocol, and with a receiver of this crate on its limits and on streams for the devices' states.
    fn agree(&mut self, control: &mut Control<'_>) -> Result<Features, SendError> {
        let own = self.devices.stream_identities();
        let offered = match (self.devices.is_empty(), own.is_empty()) {
            (true, _) => Features::NONE,
            (false, true) => Features::LIMITS,
            (false, false) => Features::LIMITS | Features::DEVICE_STREAMS | Features::DEVICES_OF_CONFIG,
        };
        let (agreed, limits) = control.start(offered)?;
        let Some(limits) = limits else { return Ok(Features::NONE) };
        self.devices.heed_limits(limits);
        if agreed.contains(Features::DEVICE_STREAMS) && !agreed.contains(Features::DEVICES_OF_CONFIG) {
            self.compare_devices(control)?;
        }
        Ok(agreed)
    }

    /// Has the devices' states stream, if the receiver has the same devices.
    fn compare_devices(&mut self, control: &mut Control<'_>) -> Result<(), SendError> {
        let own = self.devices.stream_identities();
        compare_identities(&own, &control.devices(&own)?)?;
        self.devices.begin_streams(&own);
        self.meter.expect_streams();
        Ok(())
    }

    /// Describes the VM to the receiver, which lays out its memory, and perhaps makes its devices.
    fn describe(&mut self, control: &mut Control<'_>, agreed: Features) -> Result<(), SendError> {
        let config = self.vm.config()?;
        let has_devices = !self.devices.is_empty() || self.tracking.look().has_devices();
        let config = self.pinning.heed(config, has_devices);
        let ram_bytes = self.tracking.look().layout().bytes();
        control.config(&config, self.pinning.populating_time(ram_bytes))?;
        match agreed.contains(Features::DEVICE_STREAMS | Features::DEVICES_OF_CONFIG) {
            true => self.compare_devices(control),
            false => Ok(()),
        }
    }

    /// Switches every source on, before the first page is copied (C1), and lets devices begin to hand out their state.
    fn arm(&mut self) -> Result<(), SendError> {
        self.tracking.begin(|| self.vm.memory())?;
        self.meter.start(&self.tracking);
        self.tracking.name_standing_pages();
        self.devices.start()?;
        logging::armed(&self.meter.attribution(&self.tracking));
        Ok(())
    }

    /// Copies all memory on all connections; the VM runs at first, and stands still at the end.
    fn copy_memory(&mut self, control: &mut Control<'_>) -> Result<(), SendError> {
        let connections = control.open_connections()?;
        let may_leave_out = self.pinning.may_leave_out();
        let (vm, tracking) = (&self.vm, &self.tracking);
        let copier = Copier::start(connections, self.options, may_leave_out, vm, tracking, self.migration);
        let mut copier = copier?.keeping_to(self.devices.limits());
        let copied = self.copy_until_stopped(&mut copier);
        let taken_back = control.take_back(copier.stop());
        copied.and(taken_back)?;
        self.clock.end_part(|parts| &mut parts.last_pages);
        Ok(())
    }

    fn copy_until_stopped(&mut self, copier: &mut Copier<'a, V>) -> Result<(), SendError> {
        loop {
            self.precopy(copier)?;
            if self.stop()? {
                let readers = self.devices.final_readers()?;
                let pass = Pass { vm: &self.vm, tracking: &self.tracking, meter: &mut self.meter };
                let reads = copier.round(pass, readers)?;
                self.devices.finish(reads)?;
                logging::last_round(&self.meter);
                return Ok(());
            }
            self.run_on()?;
        }
    }

    /// Makes passes over memory while the VM runs, until it may be stopped.
    fn precopy(&mut self, copier: &mut Copier<'a, V>) -> Result<(), SendError> {
        self.migration.enter(Phase::Precopy);
        loop {
            let readers = self.devices.readers()?;
            let pass = Pass { vm: &self.vm, tracking: &self.tracking, meter: &mut self.meter };
            let reads = copier.round(pass, readers)?;
            self.devices.finish_round(reads)?;
            let seen = self.take_stock()?;
            if self.options.complete_paused {
                return Ok(());
            }
            let decision = match self.options.policy.decide(&seen) {
                // Devices may have begun another piece of their state that they want read first (C37).
                Decision::SwitchOver { .. } => {
                    let devices = self.devices.estimate_anew()?;
                    self.options.policy.decide(&self.meter.observe(
                        &self.tracking,
                        self.vm.standing(),
                        &devices,
                    ))
                }
                decision => decision,
            };
            log::debug!("After round {}: {decision:?}", seen.rounds);
            match decision {
                Decision::SwitchOver { .. } => return Ok(()),
                Decision::Cancel { reason } => return Err(SendError::GivenUp(reason)),
                Decision::ContinueThrottled(percent) => self.vm.throttle(percent),
                Decision::Continue if seen.pending_bytes < IDLE_BYTES => {
                    let pass = Pass { vm: &self.vm, tracking: &self.tracking, meter: &mut self.meter };
                    copier.pause(pass, IDLE_PAUSE)?;
                }
                Decision::Continue => {}
            }
        }
    }

    /// Collects between two rounds, and measures.
    fn take_stock(&mut self) -> Result<Observation, SendError> {
        let collected_bytes = self.tracking.collect()?;
        self.meter.collected(&self.tracking, collected_bytes);
        self.tracking.name_standing_pages();
        let devices = self.devices.estimate()?;
        let seen = self.meter.observe(&self.tracking, self.vm.standing(), &devices);
        logging::round(&self.meter, &seen);
        Ok(seen)
    }

    /// Stops the vCPUs, then all devices, and collects what both wrote until then (C3, C5).
    ///
    /// Returns whether to go through with it, now that the sizes are certain (C38).
    fn stop(&mut self) -> Result<bool, SendError> {
        self.migration.enter(Phase::SwitchOver);
        let paused = Instant::now();
        self.clock.start(paused);
        self.vm.pause(paused)?;
        self.clock.end_part(|parts| &mut parts.pause);
        let devices = self.devices.stop()?;
        self.clock.end_part(|parts| &mut parts.devices_stop);
        self.tracking.collect_final()?;
        let seen = self.meter.observe(&self.tracking, self.vm.standing(), &devices);
        self.clock.end_part(|parts| &mut parts.last_collect);
        logging::stopped(&self.meter, &seen);
        if self.options.complete_paused {
            return Ok(true);
        }
        match self.options.policy.confirm(&seen) {
            Decision::SwitchOver { .. } => Ok(true),
            Decision::Cancel { reason } => Err(SendError::GivenUp(reason)),
            Decision::Continue | Decision::ContinueThrottled(_) => Ok(false),
        }
    }

    /// Takes a switchover back: devices first, then the vCPUs.
    fn run_on(&mut self) -> Result<(), SendError> {
        log::info!("Taking the switchover back: it would take too long");
        self.devices.run_on()?;
        self.vm.run_on()?;
        self.meter.count_back_out();
        self.devices.start()
    }

    /// Captures the stopped VM: what State carries. From here on the receiver is hurried.
    fn capture(&mut self, control: &mut Control<'_>) -> Result<StatePayload, SendError> {
        control.hurry(self.vm.switchover(self.options.switchover_timeout()));
        let devices = self.devices.save()?;
        self.clock.end_part(|parts| &mut parts.devices_save);
        let state = self.vm.state(devices)?;
        let payload = self.devices.check_captured(StatePayload::new(state)?)?;
        log::debug!("Captured a state of {}", Bytes(payload.bytes()));
        self.clock.end_part(|parts| &mut parts.capture);
        Ok(payload)
    }

    /// Sends what capturing wrote (C4), on the control connection, with every other one drained and gone.
    ///
    /// Imprecise sources have nothing to add: they speak of devices, and those stand still.
    fn copy_rest(&mut self, control: &mut Control<'_>) -> Result<(), SendError> {
        self.tracking.collect()?;
        self.clock.end_part(|parts| &mut parts.last_collect);
        self.tracking.begin_round()?;
        let limits = chunk_limits(self.options, &self.tracking, 1);
        while let Some((chunk, memory)) = self.tracking.take(limits, || self.vm.memory())? {
            control.memory(&*memory, &chunk)?;
            self.tracking.commit(chunk);
        }
        self.clock.end_part(|parts| &mut parts.last_pages);
        Ok(())
    }

    /// Hands the VM over: its state, then the word to run it.
    fn hand_over(&mut self, state: &StatePayload, control: &mut Control<'_>) -> Result<(), SendError> {
        self.vm.release()?;
        control.state(state)?;
        self.clock.end_part(|parts| &mut parts.state);
        control.complete(self.options.complete_paused)?;
        self.clock.end_part(|parts| &mut parts.complete);
        Ok(())
    }

    /// Ends tracking for a VM that has moved, and reports the result.
    fn retire(&mut self) -> Sent {
        let downtime_parts = self.clock.parts();
        let downtime = downtime_parts.total();
        let total = self.meter.elapsed();
        let unique_dirty_bytes = self.tracking.dirtied_bytes();
        let device_downtimes = self.devices.take_downtimes();
        let (device_state_bytes, device_precopy_bytes) = self.devices.retire();
        if let Some(Err(error)) = self.tracking.end() {
            self.migration.degrade(error);
        }
        let downtime_exceeded = self.options.is_exceeded_by(downtime);
        if downtime_exceeded {
            let progress = self.migration.progress();
            self.migration.degrade(self.pinning.explain(
                downtime,
                millis(self.options.policy.downtime),
                &progress,
            ));
        }
        let sources = self.meter.attribution(&self.tracking);
        self.migration.update(|progress| (progress.phase, progress.sources) = (Phase::Completed, sources));
        Sent {
            progress: self.migration.progress(),
            unique_dirty_bytes,
            downtime,
            downtime_parts,
            downtime_exceeded,
            populated: self.pinning.populated(),
            total,
            device_state_bytes,
            device_precopy_bytes,
            device_downtimes,
        }
    }
}

/// Sets everything going again after a failure, devices before vCPUs, unless the receiver may run the VM.
fn recover<V: Vm>(
    failure: SendError,
    vm: &mut RestorableVm<'_, V>,
    devices: &DevicePrecopy<'_>,
    tracking: &mut Tracking<'_>,
) -> SendError {
    let _logs_off = tracking.end();
    devices.end_streams();
    if failure.source_vm() == SourceVm::PausedForSafety {
        return failure;
    }
    match vm.restore(|stays_paused| devices.restore(stays_paused)) {
        Ok(()) => failure,
        Err(recovery) => SendError::Stuck { failure: failure.into(), recovery: recovery.into() },
    }
}
