// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What may happen next.

use vfio_migration::device::DeviceState;

use super::Mutation;
use super::action::Action;
use super::machine::{Answer, Machine, Phase, STREAMING};
use super::world::{lock, members};

impl Machine {
    /// What the guest may do while its vCPUs run, and what its operator may plug.
    pub(super) fn guest_actions(&self, actions: &mut Vec<Action>) {
        if !self.vcpus_run {
            return;
        }
        let world = lock(&self.world).clone();
        actions.extend(members(world.ram).filter(|_| !self.scenario.quiet_vcpus).map(Action::Write));
        if self.scenario.remaps {
            for (slot, page) in (0..).zip(&world.table) {
                match page {
                    Some(_) => {
                        actions.push(Action::Unmap(slot));
                        let faults = (0..2).filter(|_| self.scenario.faults);
                        actions.extend(faults.map(|device| Action::UnmapUnread(slot, device)));
                    }
                    None => {
                        let page = self.scenario.page_of(slot);
                        actions.extend(members(world.ram & 1 << page).map(|page| Action::Map(slot, page)));
                    }
                }
            }
        }
        if self.scenario.streams && self.devices[usize::from(STREAMING)].is_running() {
            actions.push(Action::Reset);
        }
        if let Some(page) = self.scenario.pluggable() {
            let is_there = world.ram >> page & 1 == 1;
            let is_mapped = world.table.contains(&Some(page));
            match is_there {
                true if is_mapped => {}
                true => actions.push(Action::Unplug(page)),
                false => actions.push(Action::Plug(page)),
            }
        }
    }

    /// What devices do on their own.
    pub(super) fn device_actions(&self, actions: &mut Vec<Action>) {
        let world = lock(&self.world);
        for (device, state) in (0..).zip(&self.devices).filter(|(_, state)| !state.is_stopped()) {
            let mapped = (0..).zip(&world.table).filter(|(_, page)| page.is_some());
            actions.extend(mapped.map(|(slot, _)| Action::Dma(device, slot)));
            if state.is_running() {
                actions.push(Action::Peer(device));
            }
        }
    }

    /// What the sender may do with the VM.
    pub(super) fn sender_actions(&self, actions: &mut Vec<Action>) {
        match self.phase {
            Phase::Idle | Phase::Moved | Phase::Unknown => {}
            Phase::Precopy => {
                actions.push(Action::Collect);
                if self.scenario.streams && self.devices[usize::from(STREAMING)] == DeviceState::Running {
                    actions.push(Action::Reenter);
                }
                let faults = (0..).zip(&self.devices).filter(|_| self.scenario.faults);
                actions.extend(faults.map(|(device, _)| Action::CollectUnread(device)));
                let early = self.mutated(Mutation::DevicesBeforeVcpus);
                actions.extend(
                    (0..).zip(&self.devices).filter(|_| early).map(|(device, _)| Action::Halt(device)),
                );
            }
            Phase::Stopping if self.is_all(DeviceState::StopCopy) => actions.push(Action::CollectFinal),
            Phase::Stopping => self.halts(actions),
            Phase::Last if self.is_drained(self.target) => {
                actions.extend([Action::Capture(None), Action::BackOut]);
                actions.extend(members(lock(&self.world).ram).map(|page| Action::Capture(Some(page))));
            }
            Phase::Last => actions.push(Action::BackOut),
            Phase::Captured => actions.push(Action::CollectRest),
            Phase::Rest if self.is_drained(self.target) => actions.push(Action::Release),
            Phase::Rest => {}
            Phase::Released => actions.push(Action::Complete),
            Phase::Completing => {
                if self.receivers[usize::from(self.target)].answer != Answer::Open {
                    actions.push(Action::Hear);
                }
                actions.push(Action::Silence);
            }
            Phase::HandBack => self.wakes(actions),
        }
    }

    /// No device is stopped before all are P2P-quiescent.
    fn halts(&self, actions: &mut Vec<Action>) {
        let quiesce_first = self.is_any_unquiescent() && !self.mutated(Mutation::StopBeforeP2p);
        let halts = (0..).zip(&self.devices).filter(|(_, state)| match quiesce_first {
            true => state.is_running(),
            false => **state != DeviceState::StopCopy,
        });
        actions.extend(halts.map(|(device, _)| Action::Halt(device)));
    }

    /// No device runs without restraint before all are P2P-quiescent, and no vCPU before all devices run.
    fn wakes(&self, actions: &mut Vec<Action>) {
        let wake_first = self.is_any_stopped() && !self.mutated(Mutation::RunBeforeAllWoke);
        let wakes = (0..).zip(&self.devices).filter(|(_, state)| match wake_first {
            true => state.is_stopped(),
            false => **state != DeviceState::Running,
        });
        let before = actions.len();
        actions.extend(wakes.map(|(device, _)| Action::Wake(device)));
        if actions.len() == before || self.mutated(Mutation::VcpusBeforeDevices) {
            actions.push(Action::Resume);
        }
    }

    /// What may happen between the source and one receiver.
    pub(super) fn receiver_actions(&self, number: u8, actions: &mut Vec<Action>) {
        let receiver = &self.receivers[usize::from(number)];
        if receiver.answer == Answer::Open {
            actions.extend([Action::Accept(number), Action::Refuse(number)]);
        }
        let Some(cursor) = receiver.cursor.filter(|_| receiver.is_used) else {
            if matches!(self.phase, Phase::Idle | Phase::Precopy) {
                actions.push(Action::Begin(number));
            }
            return;
        };
        let is_target = self.target == number;
        let is_copied = match self.phase {
            Phase::Precopy => true,
            Phase::Last | Phase::Rest => is_target,
            _ => false,
        };
        let may_fail = match self.phase {
            Phase::Precopy => true,
            Phase::Stopping | Phase::Last | Phase::Captured | Phase::Rest | Phase::Released => is_target,
            _ => false,
        };
        if may_fail {
            actions.push(Action::Fail(number));
        }
        if self.phase == Phase::Precopy && receiver.flights.is_empty() {
            actions.push(Action::Pause(number));
        }
        let left = self.tracker.outstanding(cursor).unwrap_or_default();
        if is_copied && left.pending_bytes > 0 && receiver.flights.len() < self.scenario.window {
            actions.push(Action::Take(number));
        }
        let streams = self.scenario.streams && self.phase == Phase::Precopy;
        if streams && self.devices[usize::from(STREAMING)] == DeviceState::PreCopy {
            actions.push(Action::Piece(number));
        }
        let is_takeable = left.pending_bytes > left.in_flight_bytes;
        if is_copied && is_takeable && self.scenario.faults {
            actions.push(Action::TakeUncleared(number));
        }
        for (chunk, flight) in (0..).zip(&receiver.flights).filter(|_| is_copied) {
            match flight.sent {
                None => actions.push(Action::Send(number, chunk)),
                Some(_) => actions.extend([Action::Ack(number, chunk), Action::Lose(number, chunk)]),
            }
        }
    }
}
