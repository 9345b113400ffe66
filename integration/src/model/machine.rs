// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A VM that is being migrated: the real tracker and arc table, driven step by step as a sender drives them.

use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::{Arc, Mutex};

use vfio_migration::device::{Capabilities, DeviceState};
use vfio_migration::granule::Granule;
use vfio_migration::iova::IovaMap;
use vfio_migration::layout::Layout;
use vfio_migration::ledger::{Chunk, ChunkLimits, CursorId, Outstanding};
use vfio_migration::range::GpaRange;
use vfio_migration::tracker::{SpaceId, Tracker};

use super::action::Action;
use super::world::{
    DEVICES, KvmSource, LogSource, QuietVmm, Set, Shared, TableSource, World, gpa_of, lock, mapping_of,
    members, pages_of,
};
use super::{Mutation, Scenario};

/// Optional states of the two devices.
pub(super) const CAPABILITIES: [Capabilities; 2] =
    [Capabilities { p2p: true, pre_copy: false }, Capabilities { p2p: true, pre_copy: true }];

/// The device whose state streams where states do: the one with PRE_COPY.
pub(super) const STREAMING: u8 = 1;

/// What a receiver holds of a device's state that streams.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub(super) enum Pieces {
    #[default]
    Nothing,
    /// Pieces of the session that the device is in.
    Current,
    /// Pieces of a session that is over, among them or alone.
    Old,
}

/// How far the migration is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Phase {
    /// There is none.
    Idle,
    /// Pages are copied, the VM runs.
    Precopy,
    /// The vCPUs are paused, the devices are being stopped.
    Stopping,
    /// All is collected, the last pages are copied.
    Last,
    /// The state is captured.
    Captured,
    /// What the capture wrote is copied.
    Rest,
    /// Nothing is missing, and what the receiver takes is released.
    Released,
    /// Complete is on its way.
    Completing,
    /// The source is set going again.
    HandBack,
    /// The VM runs elsewhere.
    Moved,
    /// The source stays paused, since the receiver may run the VM.
    Unknown,
}

/// What a receiver made of Complete.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub(super) enum Answer {
    /// It was not asked.
    #[default]
    None,
    /// It has not answered yet.
    Open,
    /// It runs the VM.
    Accepted,
    /// It does not and never will.
    Refused,
}

/// A chunk on its way.
#[derive(Debug)]
pub(super) struct Flight {
    pub(super) pages: Set,
    pub(super) chunk: Option<Chunk>,
    /// Pages whose bytes are the source's still; `None` until they are read.
    pub(super) sent: Option<Set>,
}

/// A receiver, and what the source knows of it.
#[derive(Debug, Default)]
pub(super) struct Receiver {
    pub(super) cursor: Option<CursorId>,
    pub(super) is_used: bool,
    /// Pages of which it holds what the source holds.
    pub(super) held: Set,
    pub(super) flights: Vec<Flight>,
    /// Where the round is.
    pub(super) position: u64,
    pub(super) answer: Answer,
    /// What it holds of the streaming device's state.
    pub(super) pieces: Pieces,
}

/// A VM with its migration.
pub(super) struct Machine {
    pub(super) scenario: Scenario,
    pub(super) mutation: Option<Mutation>,
    pub(super) world: Shared,
    pub(super) tracker: Tracker,
    pub(super) space: SpaceId,
    pub(super) phase: Phase,
    pub(super) vcpus_run: bool,
    pub(super) devices: Vec<DeviceState>,
    /// Whether what was captured of a device is what it holds.
    pub(super) captured: Vec<bool>,
    pub(super) released: bool,
    /// The receiver that is switched over to.
    pub(super) target: u8,
    pub(super) receivers: Vec<Receiver>,
}

impl Machine {
    pub(super) fn new(scenario: &Scenario, mutation: Option<Mutation>) -> Self {
        let scenario = *scenario;
        let ram = low_bits(scenario.ram_pages);
        let table: Vec<_> = (0..scenario.slots)
            .map(|slot| Some(scenario.page_of(slot)).filter(|page| ram >> page & 1 == 1))
            .collect();
        let world = Arc::new(Mutex::new(World::new(ram, table, &scenario, mutation)));
        let (tracker, space) = track(&scenario, &world);
        let devices = if scenario.devices { DEVICES.len() } else { 0 };
        Self {
            scenario,
            mutation,
            world,
            tracker,
            space,
            phase: Phase::Idle,
            vcpus_run: true,
            devices: vec![DeviceState::Running; devices],
            captured: vec![false; devices],
            released: false,
            target: 0,
            receivers: (0..scenario.receivers).map(|_| Receiver::default()).collect(),
        }
    }

    /// Whether this place does it wrong.
    pub(super) fn mutated(&self, mutation: Mutation) -> bool {
        self.mutation == Some(mutation)
    }

    pub(super) fn receiver(&mut self, number: u8) -> &mut Receiver {
        &mut self.receivers[usize::from(number)]
    }

    pub(super) fn limits(&self) -> ChunkLimits {
        ChunkLimits { bytes: self.scenario.chunk_pages * Granule::KIB_4.bytes(), ..ChunkLimits::NONE }
    }

    /// Whether a device may start DMA to another one, and so none may be stopped.
    pub(super) fn is_any_unquiescent(&self) -> bool {
        self.devices.iter().any(|device| device.is_running())
    }

    pub(super) fn is_any_stopped(&self) -> bool {
        self.devices.iter().any(|device| device.is_stopped())
    }

    pub(super) fn is_all(&self, state: DeviceState) -> bool {
        self.devices.iter().all(|&device| device == state)
    }

    /// Whether a receiver has acknowledged all that is known to be dirty.
    pub(super) fn is_drained(&self, number: u8) -> bool {
        let receiver = &self.receivers[usize::from(number)];
        let Some(left) = receiver.cursor.and_then(|cursor| self.tracker.outstanding(cursor)) else {
            return false;
        };
        match self.mutated(Mutation::StateBeforeDrained) {
            true => left.pending_bytes == 0,
            false => left == Outstanding::default() && receiver.flights.is_empty(),
        }
    }

    /// Whether nothing has to happen any more.
    pub(super) fn is_over(&self) -> bool {
        matches!(self.phase, Phase::Moved | Phase::Unknown)
    }

    /// Whether a receiver runs the VM.
    pub(super) fn is_handed_over(&self) -> bool {
        self.receivers.iter().any(|receiver| receiver.answer == Answer::Accepted)
    }

    /// What must hold whatever happens.
    pub(super) fn check(&self) -> Result<(), String> {
        let running = self.receivers.iter().filter(|receiver| receiver.answer == Answer::Accepted).count();
        let devices_run = self.devices.iter().any(|device| !device.is_stopped());
        if running > 1 || (running == 1 && (self.vcpus_run || devices_run)) {
            return Err("both run: the receiver has the VM, and it runs elsewhere, too".to_owned());
        }
        if self.vcpus_run && self.is_any_stopped() {
            return Err("a vCPU runs while a device of its VM stands still".to_owned());
        }
        if self.vcpus_run && self.released {
            return Err("the VM runs without what was released for the receiver".to_owned());
        }
        Ok(())
    }

    /// Compares what a receiver that takes over holds with what the source holds.
    pub(super) fn check_taken_over(&self, number: u8) -> Result<(), String> {
        let ram = lock(&self.world).ram;
        let stale = ram & !self.receivers[usize::from(number)].held;
        if stale != 0 {
            let pages: Vec<_> = members(stale).collect();
            return Err(format!("receiver {number} runs with old content in pages {pages:?}"));
        }
        if self.scenario.streams && self.receivers[usize::from(number)].pieces != Pieces::Current {
            let device = DEVICES[usize::from(STREAMING)];
            return Err(format!("receiver {number} runs with pieces of device {device} of another session"));
        }
        match self.captured.iter().zip(DEVICES).find(|(captured, _)| !**captured) {
            Some((_, device)) => Err(format!("receiver {number} runs with an old state of device {device}")),
            None => Ok(()),
        }
    }

    /// How things stand, for a reader.
    pub(super) fn summary(&self) -> String {
        let ram = lock(&self.world).ram;
        let devices: String = self.devices.iter().map(|device| format!(", {device}")).collect();
        let vcpus = if self.vcpus_run { "run" } else { "paused" };
        let mut text = format!("{:?}: vCPUs {vcpus}{devices}", self.phase);
        for (number, receiver) in self.receivers.iter().enumerate().filter(|(_, receiver)| receiver.is_used) {
            let list = |pages: Set| members(pages).map(|page| page.to_string()).collect::<Vec<_>>().join(" ");
            let on_way = receiver.flights.iter().fold(0, |all, flight| all | flight.pages);
            let current = list(receiver.held & ram);
            text += &format!("; receiver {number} has {{{current}}}, on their way {{{}}}", list(on_way));
        }
        text
    }

    /// Hashes all that decides on what can happen, the tracker's bits among it, which are found by taking them.
    pub(super) fn fingerprint(mut self) -> u128 {
        let mut receivers: Vec<_> = (0..self.receivers.len()).map(|number| self.take_bits(number)).collect();
        if !self.mutated(Mutation::OneCursorOnly) {
            // Receivers differ by what they hold and by who is switched over to, not by number.
            receivers.sort_unstable();
        }
        let halves = [0u8, 1].map(|half| {
            let mut hasher = DefaultHasher::new();
            (half, &receivers, &*lock(&self.world)).hash(&mut hasher);
            (self.phase, self.vcpus_run, self.released).hash(&mut hasher);
            (&self.devices, &self.captured).hash(&mut hasher);
            u128::from(hasher.finish())
        });
        halves[0] << 64 | halves[1]
    }

    /// Returns what tells one receiver's state from another's: pages pending in this round, in the next one, and while in
    /// flight; the round's position; chunks on their way, in no order; and whether it is the target.
    fn take_bits(&mut self, number: usize) -> impl Hash + Ord + use<> {
        let (cursor, position) = (self.receivers[number].cursor, self.receivers[number].position);
        let mut pending = [0; 3];
        if let Some(cursor) = cursor {
            // The world does not see this: its hash is not taken yet, so it must not be touched.
            let before = lock(&self.world).clone();
            pending[0] = self.take_all(cursor);
            self.tracker.begin_round(cursor);
            pending[1] = self.take_all(cursor);
            let chunks = self.receivers[number].flights.iter_mut().filter_map(|flight| flight.chunk.take());
            let chunks: Vec<_> = chunks.collect();
            chunks.into_iter().for_each(|chunk| self.tracker.commit(chunk));
            self.tracker.begin_round(cursor);
            pending[2] = self.take_all(cursor);
            *lock(&self.world) = before;
        }
        let receiver = &self.receivers[number];
        let flights = receiver.flights.iter().map(|flight| (flight.pages, flight.sent));
        let mut flights: Vec<_> = flights.collect();
        flights.sort_unstable();
        let known = (receiver.is_used, receiver.held, receiver.answer, receiver.pieces, cursor.is_some());
        (number == usize::from(self.target), known, position, pending, flights)
    }

    /// Takes all that can be taken; the tracker is of no further use.
    fn take_all(&mut self, cursor: CursorId) -> Set {
        let chunk = self.tracker.take(cursor, ChunkLimits::NONE).expect("no source fails here");
        chunk.map_or(0, |chunk| pages_of(chunk.ranges()))
    }

    /// Returns everything that may happen now.
    pub(super) fn enabled(&self) -> Vec<Action> {
        let mut actions = Vec::new();
        self.guest_actions(&mut actions);
        self.device_actions(&mut actions);
        self.sender_actions(&mut actions);
        for (number, _) in (0..).zip(&self.receivers) {
            self.receiver_actions(number, &mut actions);
        }
        actions
    }
}

/// Builds the real tracker over the world's sources.
fn track(scenario: &Scenario, world: &Shared) -> (Tracker, SpaceId) {
    let ram = lock(world).ram;
    let last = members(ram).last().map_or(0, |page| gpa_of(page).end());
    let ram = GpaRange::from_bounds(0, last).expect("there is RAM");
    let layout = Layout::new([ram], Granule::KIB_4).expect("pages are RAM");
    let (below, with_devices) = (Arc::clone(world), scenario.devices);
    let mut builder = Tracker::builder(layout)
        .mappings(move || lock(&below).mappings(with_devices))
        .source(Box::new(KvmSource(Arc::clone(world))));
    let mut space = SpaceId::IDENTITY;
    if scenario.devices {
        let mut journal = IovaMap::journal();
        for (slot, page) in (0..).zip(&lock(world).table) {
            page.map(|page| journal.map(mapping_of(slot, page)).expect("slots are disjoint"));
        }
        space = builder.space(journal);
        builder = builder.source_of(space, [DEVICES[0]], Box::new(TableSource(Arc::clone(world)))).source_of(
            space,
            [DEVICES[1]],
            Box::new(LogSource(Arc::clone(world))),
        );
    }
    builder = builder.source(Box::new(QuietVmm(Arc::clone(world))));
    if scenario.imprecise {
        builder = builder.allow_imprecise();
    }
    (builder.build().expect("the sources go together"), space)
}

fn low_bits(count: u8) -> Set {
    (0..count).fold(0, |all, bit| all | 1 << bit)
}
