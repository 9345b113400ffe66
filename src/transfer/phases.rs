// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A migration, phase by phase, as its source sees it.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::control::Control;
use super::exchange::PeerError;
use super::lanes::{Event, Lanes, Pipeline};
use super::progress::{Migration, Phase, Progress, SourceProgress};
use super::rounds::{Bandwidth, Pace, SourceRates, rate};
use super::send::{SendError, SendOptions, Sent, SourceVm, Step, VmOperation};
use crate::device::{Basis, Estimate};
use crate::ledger::{Attribution, Chunk, ChunkLimits, CursorId, Outstanding, Start};
use crate::migratable::MigratableDevice;
use crate::precopy::{CancelReason, Decision, DeviceLeft, Forecast, Observation, Policy, TimeoutStrategy};
use crate::vm::{Vm, VmError};

/// How often a waiting engine looks whether it was cancelled or its time is up.
const TICK: Duration = Duration::from_millis(20);

/// How long chunks on their way may still be acknowledged after a failure or a cancellation.
const GRACE: Duration = Duration::from_millis(400);

/// Bytes of device state read in one round while the devices run.
const DEVICE_BUDGET_BYTES: u64 = 64 << 20;

/// Ranges in one chunk's table.
const CHUNK_RANGES: usize = 1 << 16;

/// Chunks a bandwidth cap is spread over in a second.
const PACED_CHUNKS_PER_SECOND: u64 = 20;

/// Dirty bytes under which another round at once would be a waste.
const IDLE_BYTES: u64 = 1 << 20;

/// The pause between two rounds when there is next to nothing to send and the switchover waits for something else.
const IDLE_PAUSE: Duration = Duration::from_millis(10);

/// One attempt to move a VM: who takes part, what was changed of them, what was measured.
pub(super) struct Session<'a, V: Vm> {
    options: &'a SendOptions,
    policy: Policy,
    vm: &'a mut V,
    machine: &'a mut MigratableDevice,
    migration: &'a Migration,
    memory: Arc<V::Memory>,
    undo: Undo,
    measured: Measured,
    began: Instant,
}

/// What has to be undone when the migration fails.
#[derive(Debug, Default)]
struct Undo {
    cursor: Option<CursorId>,
    devices_touched: bool,
    vm_paused: Option<Instant>,
    throttle_percent: u8,
}

#[derive(Debug)]
struct Measured {
    rounds: u32,
    back_outs: u32,
    bandwidth: Bandwidth,
    dirty_rate: u64,
    collected: Instant,
    source_rates: SourceRates,
    attribution_before: Vec<Attribution>,
    pace: Option<Pace>,
}

impl<'a, V: Vm> Session<'a, V> {
    pub(super) fn new(
        options: &'a SendOptions,
        vm: &'a mut V,
        machine: &'a mut MigratableDevice,
        migration: &'a Migration,
    ) -> Self {
        let began = Instant::now();
        let measured = Measured {
            rounds: 0,
            back_outs: 0,
            bandwidth: Bandwidth::default(),
            dirty_rate: 0,
            collected: began,
            source_rates: SourceRates::default(),
            attribution_before: machine.attribution().map(|(_, attribution)| attribution).collect(),
            pace: options.bandwidth.map(Pace::new),
        };
        Self {
            options,
            policy: options.policy(vm.can_throttle()),
            memory: vm.memory(),
            vm,
            machine,
            migration,
            undo: Undo::default(),
            measured,
            began,
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
        outcome
    }

    fn attempt(&mut self) -> Result<Sent, SendError> {
        let ram_bytes = self.machine.layout().bytes();
        self.migration.update(|progress| progress.ram_bytes = ram_bytes);
        self.migration.enter(Phase::Connecting);
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
        control.config(&self.describe()?)?;
        self.arm()?;
        self.copy_memory(control)?;
        let state = self.capture()?;
        self.copy_rest(control)?;
        control.state(&state)?;
        control.complete(self.options.complete_paused)?;
        Ok(self.retire())
    }

    fn describe(&mut self) -> Result<Vec<u8>, SendError> {
        self.vm.config().map_err(vm_failed(VmOperation::Config))
    }

    /// Switches every source on, before the first page is copied (C1), and lets devices begin to hand out their state.
    fn arm(&mut self) -> Result<(), SendError> {
        self.undo.cursor = Some(self.machine.begin(Start::Empty)?);
        self.measured.collected = Instant::now();
        self.look_at_sources(Duration::ZERO);
        self.start_device_precopy()
    }

    /// Copies all memory on all connections; the VM runs at first, and stands still at the end.
    fn copy_memory(&mut self, control: &mut Control<'_>) -> Result<(), SendError> {
        let connections = control.open_lanes()?;
        let SendOptions { window, ref limits, .. } = *self.options;
        let pipeline = Pipeline { window, answer_timeout: limits.answer_timeout };
        let lanes = Lanes::start(connections, &self.memory, pipeline, self.migration);
        let mut lanes = lanes.map_err(SendError::Thread)?;
        let copied = self.copy_until_stopped(&mut lanes);
        control.take_back(lanes.stop(GRACE));
        copied
    }

    fn copy_until_stopped(&mut self, lanes: &mut Lanes) -> Result<(), SendError> {
        loop {
            self.precopy(lanes)?;
            if self.stop()? {
                return self.round(lanes);
            }
            self.run_on()?;
        }
    }

    /// Makes passes over memory while the VM runs, until it may be stopped.
    fn precopy(&mut self, lanes: &mut Lanes) -> Result<(), SendError> {
        self.migration.enter(Phase::Precopy);
        loop {
            self.round(lanes)?;
            let seen = self.take_stock();
            if self.options.complete_paused {
                return Ok(());
            }
            match self.policy.decide(&seen) {
                Decision::SwitchOver { .. } => return Ok(()),
                Decision::Cancel { reason } => return Err(SendError::GivenUp(reason)),
                Decision::ContinueThrottled(percent) => self.throttle(percent),
                Decision::Continue if seen.pending_bytes < IDLE_BYTES => self.heed(lanes, IDLE_PAUSE)?,
                Decision::Continue => {}
            }
        }
    }

    /// Makes one pass: sends every page pending now, and waits for the last acknowledgement.
    fn round(&mut self, lanes: &mut Lanes) -> Result<(), SendError> {
        let Some(cursor) = self.undo.cursor else { return Ok(()) };
        let began = Instant::now();
        self.measured.rounds += 1;
        let round = self.measured.rounds;
        self.migration.update(|progress| progress.round = round);
        self.machine.begin_round(cursor);
        let mut bytes = 0;
        while !self.is_cut_short() {
            self.await_room(lanes)?;
            let Some(chunk) = self.machine.take(cursor, self.chunk_limits())? else { break };
            bytes += chunk.bytes();
            self.dispatch(lanes, chunk);
        }
        while !lanes.is_drained() {
            self.heed(lanes, TICK)?;
        }
        self.measured.bandwidth.record(bytes, began.elapsed());
        Ok(())
    }

    fn chunk_limits(&self) -> ChunkLimits {
        let paced = self.options.bandwidth.filter(|_| self.undo.vm_paused.is_none());
        let slice = paced.map_or(u64::MAX, |cap| cap / PACED_CHUNKS_PER_SECOND);
        ChunkLimits { bytes: self.options.chunk_bytes.min(slice), ranges: CHUNK_RANGES }
    }

    fn dispatch(&mut self, lanes: &mut Lanes, chunk: Chunk) {
        if let Some(pace) = &mut self.measured.pace {
            pace.spend(chunk.bytes(), Instant::now());
        }
        lanes.send(chunk);
    }

    /// Waits until another chunk may be taken: for the window, and while the VM runs for the bandwidth cap.
    fn await_room(&mut self, lanes: &mut Lanes) -> Result<(), SendError> {
        loop {
            let pace = self.measured.pace.as_ref().filter(|_| self.undo.vm_paused.is_none());
            let wait = pace.map_or(Duration::ZERO, |pace| pace.wait(Instant::now()));
            match lanes.has_room() {
                true if wait.is_zero() => return self.heed(lanes, Duration::ZERO),
                true => self.heed(lanes, wait.min(TICK))?,
                false => self.heed(lanes, TICK)?,
            }
        }
    }

    /// Takes in what the connections have to tell, waiting no longer than `patience`, and looks whether to go on at all.
    fn heed(&mut self, lanes: &mut Lanes, patience: Duration) -> Result<(), SendError> {
        let mut event = lanes.next_event(patience);
        while let Some(told) = event {
            match told {
                Event::Acknowledged(chunk) => self.machine.commit(chunk),
                Event::Failed(source) => return Err(self.peer_failed(source)),
                Event::Died => return Err(SendError::ThreadDied),
            }
            event = lanes.next_event(Duration::ZERO);
        }
        let left_bytes = self.left().pending_bytes + self.left().in_flight_bytes;
        self.migration.update(|progress| progress.left_bytes = left_bytes);
        self.migration.check()?;
        self.check_time()
    }

    fn peer_failed(&self, source: PeerError) -> SendError {
        match self.migration.check() {
            Err(cancelled) => cancelled.into(),
            Ok(()) => SendError::Peer { step: Step::Memory, source },
        }
    }

    /// Gives up in the middle of a round when the time is up and the VM still runs.
    fn check_time(&self) -> Result<(), SendError> {
        match self.time_is_up() && self.policy.timeout_strategy == TimeoutStrategy::Cancel {
            true => {
                let timeout_ms = self.policy.timeout_ms;
                Err(SendError::GivenUp(CancelReason::TimedOut { timeout_ms }))
            }
            false => Ok(()),
        }
    }

    fn time_is_up(&self) -> bool {
        self.undo.vm_paused.is_none() && self.elapsed_ms() >= self.policy.timeout_ms
    }

    /// Whether to end a round early, because the switchover comes whatever is left.
    fn is_cut_short(&self) -> bool {
        self.policy.timeout_strategy == TimeoutStrategy::Ignore && self.time_is_up()
    }

    fn elapsed_ms(&self) -> u64 {
        u64::try_from(self.began.elapsed().as_millis()).unwrap_or(u64::MAX)
    }

    fn left(&self) -> Outstanding {
        self.undo.cursor.and_then(|cursor| self.machine.outstanding(cursor)).unwrap_or_default()
    }

    /// Collects between two rounds, reads what devices hand out, and measures.
    fn take_stock(&mut self) -> Observation {
        let left_over = self.left().pending_bytes;
        self.collect();
        let since = self.measured.collected.elapsed();
        self.measured.collected = Instant::now();
        self.measured.dirty_rate = rate(self.left().pending_bytes - left_over, since);
        self.look_at_sources(since);
        self.step_device_precopy();
        let estimate = self.machine.devices().estimate();
        let seen = self.observe(estimate);
        self.publish(&seen);
        seen
    }

    fn collect(&mut self) {
        for error in self.machine.collect() {
            self.migration.degrade(error);
        }
    }

    fn look_at_sources(&mut self, since: Duration) {
        let page_bytes = self.machine.layout().host_page().bytes();
        self.measured.source_rates.look(self.machine.attribution(), page_bytes, since);
    }

    /// A device whose PRE_COPY fails hands out its whole state in the downtime.
    fn step_device_precopy(&mut self) {
        if let Err(error) = self.machine.devices().precopy_step(DEVICE_BUDGET_BYTES) {
            self.migration.degrade(error);
        }
    }

    fn start_device_precopy(&mut self) -> Result<(), SendError> {
        self.undo.devices_touched = true;
        Ok(self.machine.devices().start_precopy()?)
    }

    fn observe(&mut self, estimate: Estimate) -> Observation {
        let Outstanding { pending_bytes, in_flight_bytes } = self.left();
        Observation {
            pending_bytes,
            in_flight_bytes,
            bandwidth: self.measured.bandwidth.rate(),
            dirty_rate: self.measured.dirty_rate,
            device: self.device_left(estimate),
            device_initial_bytes: estimate.initial_bytes,
            elapsed_ms: self.elapsed_ms(),
            rounds: self.measured.rounds,
            throttle_percent: self.undo.throttle_percent,
            back_outs: self.measured.back_outs,
        }
    }

    /// What the State message will carry of the devices. All their state is in it, what PRE_COPY brought too, as base64.
    fn device_left(&mut self, estimate: Estimate) -> DeviceLeft {
        let bytes = self.machine.devices().precopy_bytes().saturating_add(estimate.stop_copy_bytes);
        let encoded = bytes.div_ceil(3).saturating_mul(4);
        match estimate.basis {
            Basis::Told => DeviceLeft::Exact(encoded),
            Basis::Guessed => DeviceLeft::Estimate(encoded),
            Basis::Unknown => DeviceLeft::Unknown,
        }
    }

    fn publish(&mut self, seen: &Observation) {
        let forecast = Forecast::new(&self.policy, seen, &self.measured.source_rates.rates());
        let sources = self.attribution();
        self.migration.update(|progress| {
            *progress = Progress {
                left_bytes: seen.pending_bytes + seen.in_flight_bytes,
                bandwidth: seen.bandwidth,
                dirty_rate: seen.dirty_rate,
                expected_downtime_ms: seen.expected_downtime_ms(),
                throttle_percent: seen.throttle_percent,
                sources,
                forecast,
                ..std::mem::take(progress)
            };
        });
    }

    /// What each source reported since this attempt began.
    fn attribution(&self) -> Vec<SourceProgress> {
        let before = &self.measured.attribution_before;
        let sources = self.machine.attribution().zip(before);
        sources
            .map(|((id, now), before)| SourceProgress {
                id: id.to_owned(),
                attribution: Attribution {
                    pages: now.pages - before.pages,
                    exclusive_pages: now.exclusive_pages - before.exclusive_pages,
                },
            })
            .collect()
    }

    fn throttle(&mut self, percent: u8) {
        self.undo.throttle_percent = percent;
        self.vm.throttle(percent);
    }

    /// Stops the vCPUs, then all devices, and collects what both wrote until then (C3, C5).
    ///
    /// Returns whether to go through with it, now that the sizes are certain (C38).
    fn stop(&mut self) -> Result<bool, SendError> {
        self.migration.enter(Phase::SwitchOver);
        self.undo.vm_paused = Some(Instant::now());
        self.vm.pause().map_err(vm_failed(VmOperation::Pause))?;
        let estimate = self.machine.devices().stop_for_copy()?;
        for error in self.machine.collect_final() {
            self.migration.degrade(error);
        }
        let seen = self.observe(estimate);
        self.publish(&seen);
        if self.options.complete_paused {
            return Ok(true);
        }
        match self.policy.confirm(&seen) {
            Decision::SwitchOver { .. } => Ok(true),
            Decision::Cancel { reason } => Err(SendError::GivenUp(reason)),
            Decision::Continue | Decision::ContinueThrottled(_) => Ok(false),
        }
    }

    /// Takes a switchover back: devices first, then the vCPUs.
    fn run_on(&mut self) -> Result<(), SendError> {
        self.machine.devices().run()?;
        self.vm.resume().map_err(vm_failed(VmOperation::Resume))?;
        self.undo.vm_paused = None;
        self.measured.back_outs += 1;
        self.start_device_precopy()
    }

    /// Captures the stopped VM: the JSON text of State.
    fn capture(&mut self) -> Result<Vec<u8>, SendError> {
        let devices = self.machine.devices().save()?;
        let state = self.vm.state(devices).map_err(vm_failed(VmOperation::State))?;
        Ok(serde_json::to_vec(&state)?)
    }

    /// Sends what capturing wrote (C4), on the control connection, with every other one drained and gone.
    ///
    /// Imprecise sources have nothing to add: they speak of devices, and those stand still.
    fn copy_rest(&mut self, control: &mut Control<'_>) -> Result<(), SendError> {
        self.collect();
        let Some(cursor) = self.undo.cursor else { return Ok(()) };
        self.machine.begin_round(cursor);
        while let Some(chunk) = self.machine.take(cursor, self.chunk_limits())? {
            match control.memory(&*self.memory, &chunk) {
                Ok(()) => self.machine.commit(chunk),
                Err(failure) => {
                    self.machine.roll_back(chunk);
                    return Err(failure);
                }
            }
        }
        Ok(())
    }

    /// Closes the books on a VM that has moved.
    fn retire(&mut self) -> Sent {
        let downtime = self.undo.vm_paused.map_or(Duration::ZERO, |paused| paused.elapsed());
        let total = self.began.elapsed();
        let cursor = self.undo.cursor.take();
        let unique_dirty_bytes = cursor.and_then(|cursor| self.machine.dirtied_bytes(cursor)).unwrap_or(0);
        let devices = self.machine.devices();
        let (device_state_bytes, device_precopy_bytes) = (devices.state_bytes(), devices.precopy_bytes());
        if let Err(error) = devices.retire() {
            self.migration.degrade(error);
        }
        if let Some(Err(error)) = cursor.map(|cursor| self.machine.end(cursor)) {
            self.migration.degrade(error);
        }
        let sources = self.attribution();
        let progress = self.migration.progress();
        Sent {
            rounds: self.measured.rounds,
            bytes_sent: progress.sent_bytes,
            unique_dirty_bytes,
            downtime,
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
        let _logs_off = self.undo.cursor.take().map(|cursor| self.machine.end(cursor));
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
            (true, false) => self.machine.devices().run(),
            (true, true) => self.machine.devices().stop(),
        };
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
