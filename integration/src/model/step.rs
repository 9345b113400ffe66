// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What each action does: the library's part is done by the library.

use vfio_migration::device::{DeviceState, next_state};
use vfio_migration::ledger::{ChunkLimits, CursorId, Start};
use vfio_migration::source::PluggedRam;
use vfio_migration::tracker::TrackerError;

use super::action::Action;
use super::machine::{Answer, CAPABILITIES, Flight, Machine, Phase, Pieces, Receiver, STREAMING};
use super::world::{DEVICES, KVM, Set, gpa_of, iova_of, lock, mapping_of, pages_of};
use super::{Mutation, Scenario};

impl Machine {
    /// Does `action`.
    ///
    /// # Errors
    /// What must not happen, happened.
    pub(super) fn step(&mut self, action: Action) -> Result<(), String> {
        match action {
            Action::Write(page) => self.write(page),
            Action::Dma(device, slot) => self.dma(device, slot),
            Action::Peer(device) => self.peer(device)?,
            Action::Map(slot, page) => self.map(slot, page),
            Action::Unmap(slot) => self.unmap(slot, None),
            Action::UnmapUnread(slot, device) => self.unmap(slot, Some(device)),
            Action::Plug(page) => self.plug(page),
            Action::Unplug(page) => self.unplug(page),
            Action::Begin(to) => self.begin(to),
            Action::Collect => self.collect(None),
            Action::CollectUnread(device) => self.collect(Some(device)),
            Action::Take(to) => self.take(to),
            Action::TakeUncleared(to) => self.take_uncleared(to),
            Action::Send(to, chunk) => self.send(to, chunk),
            Action::Ack(to, chunk) => self.acknowledge(to, chunk),
            Action::Lose(to, chunk) => self.lose(to, chunk),
            Action::Piece(to) => self.piece(to),
            Action::Reset => self.reset(),
            Action::Reenter => self.go(STREAMING, DeviceState::PreCopy),
            Action::Fail(to) => self.fail(to),
            Action::Pause(to) => self.pause(to),
            Action::Halt(device) => self.go(device, DeviceState::StopCopy),
            Action::CollectFinal => self.collect_final(),
            Action::BackOut => self.phase = Phase::HandBack,
            Action::Capture(page) => self.capture(page),
            Action::CollectRest => self.collect_rest(),
            Action::Release => (self.released, self.phase) = (true, Phase::Released),
            Action::Complete => self.complete(),
            Action::Accept(by) => {
                self.receiver(by).answer = Answer::Accepted;
                self.check_taken_over(by)?;
            }
            Action::Refuse(by) => self.receiver(by).answer = Answer::Refused,
            Action::Hear => self.hear(),
            Action::Silence => self.hear_nothing(),
            Action::Wake(device) => self.wake(device),
            Action::Resume => self.resume()?,
        }
        self.check()
    }

    /// Changes a page: every copy of it that was made is old now.
    fn touch(&mut self, page: u8) {
        for receiver in &mut self.receivers {
            receiver.held &= !(1 << page);
            let sent = receiver.flights.iter_mut().filter_map(|flight| flight.sent.as_mut());
            sent.for_each(|current| *current &= !(1 << page));
        }
    }

    fn write(&mut self, page: u8) {
        self.touch(page);
        lock(&self.world).vcpu_wrote(page);
    }

    fn dma(&mut self, device: u8, slot: u8) {
        let page = lock(&self.world).table[usize::from(slot)];
        if let Some(page) = page {
            self.touch(page);
            lock(&self.world).device_wrote(usize::from(device), slot);
        }
        self.captured[usize::from(device)] = false;
    }

    fn peer(&mut self, device: u8) -> Result<(), String> {
        let other = usize::from(1 - device);
        self.captured[other] = false;
        match self.devices[other].is_stopped() {
            true => Err(format!(
                "device {} writes to device {}, which stands still",
                DEVICES[1 - other],
                DEVICES[other]
            )),
            false => Ok(()),
        }
    }

    fn map(&mut self, slot: u8, page: u8) {
        lock(&self.world).table[usize::from(slot)] = Some(page);
        self.tracker.map(self.space, mapping_of(slot, page)).expect("the slot is free");
    }

    fn unmap(&mut self, slot: u8, failing: Option<u8>) {
        if self.mutated(Mutation::UnmapBeforeHarvest) {
            lock(&self.world).unmap(slot);
        }
        lock(&self.world).failing = failing.map(usize::from);
        let world = &self.world;
        let unmapped = self.tracker.unmap(self.space, iova_of(slot), || {
            lock(world).unmap(slot);
            Ok::<(), TrackerError>(())
        });
        let _degradations = unmapped.expect("the slot is mapped");
        lock(&self.world).failing = None;
    }

    fn plug(&mut self, page: u8) {
        self.touch(page);
        lock(&self.world).ram |= 1 << page;
        let ram = PluggedRam { gpa: gpa_of(page), kvm_slot: None };
        self.tracker.add_ram(&ram).expect("every source takes RAM in");
        if self.mutated(Mutation::PluggedNotPending) {
            for number in 0..self.receivers.len() {
                self.forget_pending(number, |pages| pages == 1 << page);
            }
        }
    }

    fn unplug(&mut self, page: u8) {
        lock(&self.world).ram &= !(1 << page);
        let removed = self.tracker.remove_ram(gpa_of(page), || Ok::<(), TrackerError>(()));
        removed.expect("the page is a region of its own");
    }

    fn begin(&mut self, to: u8) {
        let kept = self.receiver(to).cursor;
        let begun = kept.unwrap_or_else(|| self.tracker.begin(Start::Empty).expect("all RAM is covered"));
        *self.receiver(to) = Receiver { cursor: Some(begun), is_used: true, ..Receiver::default() };
        self.phase = Phase::Precopy;
        self.start_device_precopy();
    }

    fn start_device_precopy(&mut self) {
        for (device, capabilities) in (0..).zip(CAPABILITIES).take(self.devices.len()) {
            if capabilities.pre_copy {
                self.go(device, DeviceState::PreCopy);
            }
        }
    }

    fn collect(&mut self, failing: Option<u8>) {
        lock(&self.world).failing = failing.map(usize::from);
        self.collected(|machine| drop(machine.tracker.collect()));
        lock(&self.world).failing = None;
    }

    /// Collects; where that is mutated, for the first cursor only.
    fn collected(&mut self, collect: impl FnOnce(&mut Self)) {
        if !self.mutated(Mutation::OneCursorOnly) {
            return collect(self);
        }
        let before: Vec<_> =
            (0..self.receivers.len()).map(|number| self.forget_pending(number, |_| false)).collect();
        collect(self);
        for (number, &pending) in before.iter().enumerate().skip(1) {
            self.forget_pending(number, |pages| pages & pending == 0);
        }
    }

    /// Commits those pending pages, not sent, of which `which` says so; returns what was pending. For mutations only.
    fn forget_pending(&mut self, number: usize, which: impl Fn(Set) -> bool) -> Set {
        let Some(cursor) = self.receivers[number].cursor else { return 0 };
        self.receivers[number].position = 0;
        self.tracker.begin_round(cursor);
        let one = ChunkLimits { bytes: gpa_of(0).len(), ..ChunkLimits::NONE };
        let mut chunks = Vec::new();
        // No source hears of it: bytes are not read.
        let before = lock(&self.world).clone();
        while let Some(chunk) = self.tracker.take(cursor, one).expect("no source fails here") {
            chunks.push(chunk);
        }
        *lock(&self.world) = before;
        let mut all = 0;
        for chunk in chunks {
            let pages = pages_of(chunk.ranges());
            all |= pages;
            if which(pages) { self.tracker.commit(chunk) } else { self.tracker.roll_back(chunk) }
        }
        self.tracker.begin_round(cursor);
        all
    }

    fn take(&mut self, to: u8) {
        let (limits, cursor) = (self.limits(), self.receiver(to).cursor);
        let Some(cursor) = cursor else { return };
        let taken = self.take_or_begin_round(to, cursor, limits);
        if let Some(chunk) = taken {
            let end = chunk.ranges().last().map_or(0, |range| range.end());
            let flight = Flight { pages: pages_of(chunk.ranges()), chunk: Some(chunk), sent: None };
            let receiver = self.receiver(to);
            receiver.position = end;
            receiver.flights.push(flight);
        }
    }

    fn take_or_begin_round(
        &mut self,
        to: u8,
        cursor: CursorId,
        limits: ChunkLimits,
    ) -> Option<vfio_migration::ledger::Chunk> {
        let taken = self.tracker.take(cursor, limits).expect("no source fails here");
        if taken.is_some() {
            return taken;
        }
        self.receiver(to).position = 0;
        self.tracker.begin_round(cursor);
        self.tracker.take(cursor, limits).expect("no source fails here")
    }

    /// Finds that KVM does not clear its bits: nothing may be read, all is pending as before.
    fn take_uncleared(&mut self, to: u8) {
        let (limits, cursor) = (self.limits(), self.receiver(to).cursor);
        let Some(cursor) = cursor else { return };
        self.receiver(to).position = 0;
        self.tracker.begin_round(cursor);
        lock(&self.world).failing = Some(KVM);
        self.tracker.take(cursor, limits).expect_err("KVM fails");
        lock(&self.world).failing = None;
        self.tracker.begin_round(cursor);
    }

    /// Reads a chunk's bytes, which go on their way.
    fn send(&mut self, to: u8, chunk: u8) {
        let commits_now = self.mutated(Mutation::CommitOnSend);
        let flight = &mut self.receiver(to).flights[usize::from(chunk)];
        flight.sent = Some(flight.pages);
        let committed = if commits_now { flight.chunk.take() } else { None };
        if let Some(chunk) = committed {
            self.tracker.commit(chunk);
        }
        if self.mutated(Mutation::DrainAfterRead) {
            lock(&self.world).drain_late();
        }
    }

    fn acknowledge(&mut self, to: u8, chunk: u8) {
        let receiver = self.receiver(to);
        let Flight { pages, chunk, sent } = receiver.flights.remove(usize::from(chunk));
        receiver.held = receiver.held & !pages | sent.unwrap_or(0);
        if let Some(chunk) = chunk {
            self.tracker.commit(chunk);
        }
        if self.mutated(Mutation::ClearAfterRead) {
            lock(&self.world).clear_late(pages);
        }
    }

    fn lose(&mut self, to: u8, chunk: u8) {
        let chunk = self.receiver(to).flights.remove(usize::from(chunk)).chunk;
        let Some(chunk) = chunk else { return };
        match self.mutation {
            Some(Mutation::DropRollback) => self.tracker.commit(chunk),
            Some(Mutation::ForgetLostChunk) => drop(chunk),
            _ => self.tracker.roll_back(chunk),
        }
    }

    /// Brings a piece of the streaming device's state; the first of another session makes a receiver drop what it has.
    fn piece(&mut self, to: u8) {
        let keeps = self.mutated(Mutation::KeepOldPieces);
        let pieces = &mut self.receiver(to).pieces;
        if *pieces != Pieces::Old || !keeps {
            *pieces = Pieces::Current;
        }
    }

    /// Resets the streaming device, which leaves its session.
    fn reset(&mut self) {
        self.end_saving();
        self.captured[usize::from(STREAMING)] = false;
        self.devices[usize::from(STREAMING)] = DeviceState::Running;
    }

    /// Ends the streaming device's saving session: what came of it is worthless.
    fn end_saving(&mut self) {
        let held = self.receivers.iter_mut().filter(|receiver| receiver.pieces == Pieces::Current);
        held.for_each(|receiver| receiver.pieces = Pieces::Old);
    }

    /// Ends the session with a receiver, which never runs the VM, and sets the source going.
    fn fail(&mut self, to: u8) {
        self.end_session(to);
        let goes_on = self.vcpus_run && self.resting_phase() == Phase::Precopy;
        self.phase = if goes_on { Phase::Precopy } else { Phase::HandBack };
    }

    fn end_session(&mut self, to: u8) {
        let keeps_cursor = self.mutated(Mutation::AckForAnother);
        let receiver = self.receiver(to);
        let flights = std::mem::take(&mut receiver.flights);
        let cursor = if keeps_cursor { receiver.cursor } else { receiver.cursor.take() };
        (receiver.is_used, receiver.position) = (false, 0);
        match cursor {
            Some(_) if keeps_cursor => {
                let chunks = flights.into_iter().filter_map(|flight| flight.chunk);
                chunks.for_each(|chunk| self.tracker.roll_back(chunk));
            }
            Some(cursor) => self.tracker.end(cursor).expect("every source stops"),
            None => {}
        }
    }

    fn resting_phase(&self) -> Phase {
        match self.receivers.iter().any(|receiver| receiver.is_used) {
            true => Phase::Precopy,
            false => Phase::Idle,
        }
    }

    fn pause(&mut self, to: u8) {
        (self.vcpus_run, self.phase, self.target) = (false, Phase::Stopping, to);
        if self.mutated(Mutation::CollectBeforeStop) {
            drop(self.tracker.collect_final());
        }
        if self.mutated(Mutation::CaptureBeforeStop) {
            self.captured.fill(true);
        }
    }

    /// Moves a device one arc on its way to `goal`.
    fn go(&mut self, device: u8, goal: DeviceState) {
        let state = self.devices[usize::from(device)];
        let next = next_state(state, goal, CAPABILITIES[usize::from(device)]);
        let next = next.expect("the way there is open");
        if device == STREAMING && state.is_saving() && !next.is_saving() {
            self.end_saving();
        }
        self.devices[usize::from(device)] = next;
    }

    fn wake(&mut self, device: u8) {
        let goal = match self.devices[usize::from(device)].is_stopped() {
            true => DeviceState::RunningP2p,
            false => DeviceState::Running,
        };
        self.go(device, goal);
    }

    fn collect_final(&mut self) {
        match self.mutation {
            Some(Mutation::CollectBeforeStop) => {}
            Some(Mutation::ImpreciseOnceTooFew) => drop(self.tracker.collect()),
            _ => self.collected(|machine| drop(machine.tracker.collect_final())),
        }
        self.phase = Phase::Last;
    }

    fn capture(&mut self, page: Option<u8>) {
        if !self.mutated(Mutation::CaptureBeforeStop) {
            self.captured.fill(true);
        }
        page.into_iter().for_each(|page| self.write(page));
        // The last piece of what streams.
        self.piece(self.target);
        self.phase = Phase::Captured;
    }

    fn collect_rest(&mut self) {
        if !self.mutated(Mutation::ForgetLastCollect) && !self.mutated(Mutation::CollectBeforeStop) {
            self.collect(None);
        }
        self.phase = Phase::Rest;
    }

    fn complete(&mut self) {
        let target = self.target;
        self.receiver(target).answer = Answer::Open;
        self.phase = Phase::Completing;
    }

    fn hear(&mut self) {
        let target = self.target;
        let is_moved = self.receiver(target).answer == Answer::Accepted;
        if is_moved && !self.mutated(Mutation::ResumeAfterAnswer) {
            self.phase = Phase::Moved;
            return;
        }
        self.end_session(target);
        self.phase = Phase::HandBack;
    }

    fn hear_nothing(&mut self) {
        if !self.mutated(Mutation::ResumeAfterSilence) {
            self.phase = Phase::Unknown;
            return;
        }
        let target = self.target;
        self.end_session(target);
        self.phase = Phase::HandBack;
    }

    /// Takes back what was released, and lets the vCPUs run.
    ///
    /// # Errors
    /// The source does not run on as it was.
    fn resume(&mut self) -> Result<(), String> {
        if !self.mutated(Mutation::ResumeUnreclaimed) {
            self.released = false;
        }
        self.vcpus_run = true;
        self.captured.fill(false);
        self.phase = self.resting_phase();
        self.check()?;
        if !self.is_all(DeviceState::Running) {
            return Err("the source does not run on: a device is held back".to_owned());
        }
        if self.phase == Phase::Precopy {
            self.start_device_precopy();
        }
        Ok(())
    }
}

impl Scenario {
    /// The page that the guest maps a slot to.
    pub(super) fn page_of(&self, slot: u8) -> u8 {
        slot % (self.ram_pages + u8::from(self.plugs))
    }

    /// The page that comes and goes.
    pub(super) fn pluggable(&self) -> Option<u8> {
        self.plugs.then_some(self.ram_pages)
    }
}
