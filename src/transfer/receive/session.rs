// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The main connection of a migration, from Start to Complete.

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use super::context::{Context, Source, TICK};
use super::destination::{Completion, Destination, Received};
use super::device_streams::DeviceStreams;
use super::error::{Part, ReceiveError, Step};
use super::message::{
    answer, check_empty, decode, read_descriptor, read_devices, read_text, refuse, take_device_state,
    take_memory,
};
use super::store::PageStore;
use crate::device::{DeviceSet, StreamIdentity, compare_identities};
use crate::error::Chain;
use crate::sync::lock;
use crate::transfer::connection::{Connection, Head};
use crate::transfer::frame::{
    Command, Features, HEADER_BYTES, MOST_DEVICES, PIECE_HEAD_BYTES, ReceiverLimits, Request, Response,
    Status, encode_devices,
};
use crate::transfer::limits::{LEAST_PIECE_BYTES, PeerLimits};
use crate::units::Count;
use crate::units::{Bytes, Millis};
use crate::vm::VmError;

/// Receives the VM of `source` into `destination`, and answers what fails with Error.
pub(super) fn receive(
    source: Source,
    destination: &mut dyn Destination,
    context: Context<'_>,
) -> Result<Received, ReceiveError> {
    let Source { connection, entry, first } = source;
    let mut session =
        Session { connection, context, began: Instant::now(), step: Step::Nothing, answered: false };
    entry.admit_main();
    let outcome = session.run(first, destination);
    drop(entry);
    let linger = context.limits.linger;
    match outcome {
        Err(error) if context.connections.is_stopped() => {
            log::debug!("Stopped in the middle of the migration: {}", Chain(&error));
            session.connection.close(Duration::ZERO);
            Err(ReceiveError::Stopped)
        }
        outcome => {
            if let Err(error) = &outcome {
                log::info!("Receiving the VM ended: {}", Chain(error));
            }
            if !session.answered {
                refuse(&mut session.connection, linger);
            }
            session.connection.close(linger);
            Ok(Received { received_bytes: context.connections.received_bytes(), ..outcome? })
        }
    }
}

struct Session<'a> {
    connection: Connection,
    context: Context<'a>,
    began: Instant,
    step: Step,
    /// Whether no request waits for its answer.
    answered: bool,
}

impl Session<'_> {
    fn run(&mut self, first: Request, destination: &mut dyn Destination) -> Result<Received, ReceiveError> {
        let is_late = destination.makes_devices_of_config();
        let set = if is_late { None } else { destination.device_streams() };
        let most = set.as_ref().map_or(MOST_DEVICES, |set| lock(set).names().count());
        let streams = match (is_late || set.is_some()) && can_stream(most, self.context.limits) {
            true if is_late => Features::DEVICE_STREAMS | Features::DEVICES_OF_CONFIG,
            true => Features::DEVICE_STREAMS,
            false => Features::NONE,
        };
        let features = self.start(first, Features::LIMITS | streams)?;
        let agreed = features.is_some_and(|features| features.contains(Features::DEVICE_STREAMS));
        let devices = set.filter(|_| agreed).map(|set| self.devices(set)).transpose()?;
        let (config, is_local) = self.descriptors(destination)?;
        let store = match agreed && is_late {
            true => self.config_of_devices(config, destination)?,
            false => self.config(config, destination, devices)?,
        };
        let state = if is_local { self.next_of(&[Command::State])? } else { self.memory(store.as_ref())? };
        let device_bytes = self.state(state, destination)?;
        let (paused, completion, confirmed) = self.complete(destination)?;

        let memory = self.context.gate.memory();
        Ok(Received {
            received_bytes: 0,
            memory_messages: memory.messages,
            memory_ranges: memory.ranges,
            memory_bytes: memory.bytes,
            device_bytes,
            connections: self.context.gate.connections(),
            features,
            paused,
            completion,
            confirmed,
        })
    }

    /// Takes the Start, and agrees to what both ends know: with a source that would not hear of limits, to nothing.
    fn start(&mut self, first: Request, own: Features) -> Result<Option<Features>, ReceiveError> {
        let first = self.admit(first)?;
        first.version().map_err(|source| ReceiveError::Start { source })?;
        check_empty(first)?;
        let features = first.offered().map(|offered| agree(offered, own));
        let response = features.map_or(Response::new(Status::Ok), Response::ok_agreeing);
        match features {
            Some(features) if features.contains(Features::LIMITS) => {
                let limits = ReceiverLimits::from(self.context.limits).to_bytes();
                self.answer_with(first, response, &limits)?;
            }
            _ => self.answer(first, response)?,
        }
        log::info!("Receiving a VM from {}", self.connection.peer());
        self.step = Step::Start;
        Ok(features)
    }

    /// Tells the source of the destination's devices, and compares them with the source's.
    fn devices(&mut self, set: Arc<Mutex<DeviceSet>>) -> Result<Listed, ReceiveError> {
        let request = self.next_of(&[Command::Devices])?;
        let (listed, own) = self.lists(request, &set)?;
        self.answer_devices(request, &own)?;
        compare_identities(&listed, &own)?;
        Ok(Listed { set, listed })
    }

    /// Reads the source's list of devices; returns it, and the destination's own.
    fn lists(&mut self, request: Request, set: &Mutex<DeviceSet>) -> Result<Lists, ReceiveError> {
        Ok((read_devices(&mut self.connection, request)?, lock(set).stream_identities()))
    }

    fn answer_devices(&mut self, request: Request, own: &[StreamIdentity]) -> Result<(), ReceiveError> {
        let mut list = Vec::new();
        encode_devices(own, &mut list)?;
        self.answer_with(request, Response::new(Status::Ok), &list)
    }

    /// Takes descriptors of memory until Config comes; returns that, and whether there were any.
    fn descriptors(&mut self, destination: &mut dyn Destination) -> Result<(Request, bool), ReceiveError> {
        let commands = [Command::Config, Command::MemoryFd];
        let taken = destination.takes_descriptors() && self.connection.carries_descriptors();
        let commands = if taken { &commands[..] } else { &commands[..1] };
        let mut is_local = false;
        loop {
            let request = self.next_of(commands)?;
            if request.command() == Command::Config {
                return Ok((request, is_local));
            }
            let (slot, memory) = read_descriptor(&mut self.connection, request)?;
            destination.descriptor(slot, memory).map_err(|source| refused(request, source))?;
            is_local = true;
            self.answer_ok(request)?;
        }
    }

    /// Hands the Config over, and lets additional connections come before the source knows.
    fn config(
        &mut self,
        request: Request,
        destination: &mut dyn Destination,
        devices: Option<Listed>,
    ) -> Result<Arc<dyn PageStore>, ReceiveError> {
        let store = self.lay_out(request, destination)?;
        self.open(&store, devices)?;
        self.answer_ok(request)?;
        Ok(store)
    }

    /// As [`Session::config`] for a destination that makes its devices of the Config: tells the source of them afterwards, and lets
    /// additional connections come before it knows.
    fn config_of_devices(
        &mut self,
        request: Request,
        destination: &mut dyn Destination,
    ) -> Result<Arc<dyn PageStore>, ReceiveError> {
        let store = self.lay_out(request, destination)?;
        self.answer_ok(request)?;
        let set = destination.device_streams().unwrap_or_default();
        let request = self.next_of(&[Command::Devices])?;
        let (listed, own) = self.lists(request, &set)?;
        let same = compare_identities(&listed, &own);
        if same.is_ok() {
            self.open(&store, Some(Listed { set, listed }))?;
        }
        self.answer_devices(request, &own)?;
        Ok(same.map(|()| store)?)
    }

    fn lay_out(
        &mut self,
        request: Request,
        destination: &mut dyn Destination,
    ) -> Result<Arc<dyn PageStore>, ReceiveError> {
        let text = read_text(&mut self.connection, request, self.context.limits)?;
        let store = destination.config(&text).map_err(|source| refused(request, source))?;
        log::info!("Took the VM's configuration, {}; its memory is next", Bytes(text.len() as u64));
        self.step = Step::Config;
        Ok(store)
    }

    /// Lets memory come, and the states of `devices`.
    fn open(&self, store: &Arc<dyn PageStore>, devices: Option<Listed>) -> Result<(), ReceiveError> {
        let begin = |Listed { set, listed }| DeviceStreams::begin(set, &listed, self.context.limits);
        let devices = devices.map(begin).transpose()?.map(Arc::new);
        self.context.gate.open(Arc::clone(store), devices);
        Ok(())
    }

    /// Takes Memory until State comes.
    ///
    /// What came on other connections before the source sent Memory here is older, so it goes first.
    fn memory(&mut self, store: &dyn PageStore) -> Result<Request, ReceiveError> {
        let Context { gate, limits, .. } = self.context;
        let (mut buffer, devices) = (Vec::new(), gate.devices());
        let commands = [Command::Memory, Command::State, Command::DeviceState];
        let commands = if devices.is_some() { &commands[..] } else { &commands[..2] };
        loop {
            let request = self.next_of(commands)?;
            match (request.command(), &devices) {
                (Command::State, _) => return Ok(request),
                (Command::DeviceState, Some(devices)) => {
                    take_device_state(&mut self.connection, request, devices, limits)?;
                }
                _ => {
                    gate.drain()?;
                    take_memory(&mut self.connection, request, store, gate, limits, &mut buffer)?;
                }
            }
            self.answer_ok(request)?;
        }
    }

    /// Hands the State over when the last page of every connection is in place, and the last piece of every device's state; returns the
    /// bytes of these.
    fn state(&mut self, request: Request, destination: &mut dyn Destination) -> Result<u64, ReceiveError> {
        self.context.gate.seal()?;
        let devices = self.context.gate.devices();
        self.log_memory();
        let began = Instant::now();
        let text = read_text(&mut self.connection, request, self.context.limits)?;
        let bytes = Bytes(text.len() as u64);
        let taking = self.context.connections.take_state();
        let taken = destination.state(text).map_err(|source| refused(request, source));
        drop(taking);
        let device_bytes = devices.as_ref().map_or(0, |devices| devices.bytes());
        match devices {
            Some(devices) => devices.check_taken(taken)?,
            None => taken?,
        }
        log::info!("Took the VM's state, {bytes}, in {}", Millis(began.elapsed()));
        self.step = Step::State;
        self.answer_ok(request)?;
        Ok(device_bytes)
    }

    /// Completes the VM; returns whether it stays paused, which side has it, and whether the source was told that it has moved.
    fn complete(
        &mut self,
        destination: &mut dyn Destination,
    ) -> Result<(bool, Completion, bool), ReceiveError> {
        let request = self.next_of(&[Command::Complete, Command::CompletePaused])?;
        check_empty(request)?;
        // The last look: what fails on another connection from here on fails too late.
        self.context.gate.check()?;
        if !self.context.connections.commit() {
            return Err(ReceiveError::Stopped);
        }
        let paused = request.command() == Command::CompletePaused;
        let began = Instant::now();
        let completion = destination.complete(paused).map_err(|source| refused(request, source))?;
        log::info!("Completed the VM in {}", Millis(began.elapsed()));
        self.answered = true;
        if completion == Completion::Checkpointed {
            refuse(&mut self.connection, self.context.limits.linger);
            return Ok((paused, completion, false));
        }
        // Even where another connection has failed meanwhile: the VM is here.
        let told = answer(&mut self.connection, request.command(), Response::new(Status::Ok), &[]);
        if let Err(error) = &told {
            log::warn!("The VM runs here, but its source may not know: {}", Chain(error));
        }
        Ok((paused, completion, told.is_ok()))
    }

    /// Waits for the next request, which has to be one of `commands`.
    fn next_of(&mut self, commands: &[Command]) -> Result<Request, ReceiveError> {
        let request = decode(self.await_head()?)?;
        let request = self.admit(request)?;
        let command = request.command();
        match command {
            _ if commands.contains(&command) => Ok(request),
            Command::MemoryFd => Err(ReceiveError::LocalMemory),
            Command::PageFault => Err(ReceiveError::Postcopy),
            _ => Err(ReceiveError::OutOfOrder { command, step: self.step }),
        }
    }

    /// Waits for a request's head as long as bytes arrive on any connection, or Memory is under way on another one.
    ///
    /// That one keeps a pace of its own while it waits for the source, and is quiet for as long as the store needs.
    fn await_head(&mut self) -> Result<[u8; HEADER_BYTES], ReceiveError> {
        let Context { gate, connections, limits, .. } = self.context;
        let (mut bytes, mut since) = (connections.received_bytes(), Instant::now());
        loop {
            let head = self.connection.await_head(TICK);
            self.answered = matches!(head, Ok(Head::Silence | Head::End));
            // Where another connection has failed, that is why this one ends.
            gate.check()?;
            match head.map_err(|source| ReceiveError::Read { part: Part::Head, source })? {
                Head::Bytes(head) => return Ok(head),
                Head::End => return Err(ReceiveError::Closed { step: self.step }),
                Head::Silence => {}
            }
            let now = connections.received_bytes();
            if now != bytes || gate.is_taking_memory() {
                (bytes, since) = (now, Instant::now());
            } else if since.elapsed() >= limits.idle_timeout {
                return Err(ReceiveError::Idle { waited: since.elapsed(), step: self.step });
            }
        }
    }

    /// Lets every request pass but Abandon, which may come at any point.
    fn admit(&mut self, request: Request) -> Result<Request, ReceiveError> {
        if request.command() == Command::Abandon {
            check_empty(request)?;
            self.answer_ok(request)?;
            return Err(ReceiveError::Abandoned { step: self.step });
        }
        Ok(request)
    }

    /// Tells what memory came before the State.
    fn log_memory(&self) {
        let gate = self.context.gate;
        let memory = gate.memory();
        log::info!(
            "Took {} of memory in {}, additional connections: {}; {} since the source came",
            Bytes(memory.bytes),
            Count(&memory.messages, "message"),
            gate.connections(),
            Millis(self.began.elapsed()),
        );
    }

    fn answer_ok(&mut self, request: Request) -> Result<(), ReceiveError> {
        self.answer(request, Response::new(Status::Ok))
    }

    fn answer(&mut self, request: Request, response: Response) -> Result<(), ReceiveError> {
        self.answer_with(request, response, &[])
    }

    fn answer_with(
        &mut self,
        request: Request,
        response: Response,
        payload: &[u8],
    ) -> Result<(), ReceiveError> {
        // Where another connection has failed, this is the answer that can say so.
        self.context.gate.check()?;
        self.answered = true;
        answer(&mut self.connection, request.command(), response, payload)
    }
}

/// What of `offered` a destination agrees to that has `own`: to nothing with a source that would not hear of limits, and to no streams
/// with one that cannot wait for the devices until the Config has come.
fn agree(offered: Features, own: Features) -> Features {
    let waits = offered.contains(own & Features::DEVICES_OF_CONFIG);
    match offered.contains(Features::LIMITS) {
        true if waits => offered & own,
        true => Features::LIMITS,
        false => Features::NONE,
    }
}

/// The source's devices, and the destination's.
type Lists = (Vec<StreamIdentity>, Vec<StreamIdentity>);

/// Whether so many devices can take their states in as streams within `limits`.
fn can_stream(devices: usize, limits: &PeerLimits) -> bool {
    let least_bytes = LEAST_PIECE_BYTES + PIECE_HEAD_BYTES as u64;
    let has_room = limits.device_queue_bytes / least_bytes >= devices as u64;
    devices <= MOST_DEVICES && limits.device_piece_bytes >= LEAST_PIECE_BYTES && has_room
}

/// The devices of both ends: the destination's, and how the source lists its own.
struct Listed {
    set: Arc<Mutex<DeviceSet>>,
    listed: Vec<StreamIdentity>,
}

fn refused(request: Request, source: VmError) -> ReceiveError {
    ReceiveError::Destination { command: request.command(), source }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn features_are_agreed_on_with_what_they_need() {
        let (limits, streams, late) =
            (Features::LIMITS, Features::DEVICE_STREAMS, Features::DEVICES_OF_CONFIG);
        let all = limits | streams | late;
        for (offered, own, agreed) in [
            (all, all, all),
            (all, limits | streams, limits | streams),
            (all, limits, limits),
            (limits | streams, all, limits),
            (limits | late, all, limits | late),
            (streams | late, all, Features::NONE),
            (Features::from_bits(u16::MAX), all, all),
            (Features::NONE, all, Features::NONE),
        ] {
            assert_eq!(agree(offered, own), agreed, "{offered:?} {own:?}");
        }
    }

    #[test]
    fn so_many_devices_stream_as_their_least_pieces_fit() {
        let limits = |device_piece_bytes, device_queue_bytes| PeerLimits {
            device_piece_bytes,
            device_queue_bytes,
            ..PeerLimits::default()
        };
        let least = LEAST_PIECE_BYTES + PIECE_HEAD_BYTES as u64;
        assert!(can_stream(MOST_DEVICES, &PeerLimits::default()));
        assert!(!can_stream(MOST_DEVICES + 1, &PeerLimits::default()));
        assert!(can_stream(3, &limits(LEAST_PIECE_BYTES, 3 * least)));
        assert!(!can_stream(3, &limits(LEAST_PIECE_BYTES - 1, 3 * least)));
        assert!(!can_stream(3, &limits(LEAST_PIECE_BYTES, 3 * least - 1)));
    }
}
