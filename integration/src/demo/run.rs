// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The demo itself: starts the processes, lets one machine move, compares, and lets it run on.

use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::process::Command as Program;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::time::{Duration, Instant};

use vfio_migration::error::Chain;

use super::checks::{check_fault, check_host_memory};
use super::compare::compare;
use super::control::{Command, DeviceSetup, Event, Health, MachineSetup, Role};
use super::error::DemoError;
use super::options::{DemoOptions, Inject, Transport};
use super::process::{Process, Who};
use super::proxy::flip_a_bit;
use super::report::{MigrationFigures, Progress, Report};
use super::side::source_names;
use super::{LOG_VARIABLE, PROCESS_ARGUMENT};
use crate::vmm::{AreaKind, Map, Memory, PAGE_BYTES, RamLayout, Split, probe_kvm};

/// Passes the guest makes over its pages, after it moved, before it is believed to be well.
const CHECKED_PASSES: u64 = 2;

/// How long a process may take over anything but a migration.
const PATIENCE: Duration = Duration::from_secs(120);

/// How long a migration may overrun its own timeout before the demo gives up on the source.
const GRACE: Duration = Duration::from_secs(30);

/// What the demo tells while it runs.
#[derive(Debug, Clone)]
pub enum Note {
    /// Something worth a line.
    Said(String),
    /// How far the migration is.
    Progress(Progress),
    /// The migration is over; what follows is the comparison.
    Moved,
}

/// One machine: its memory, as this process sees it, and the processes it is made of. The machine goes before its device.
struct Side {
    machine: Process,
    _device: Process,
    memory: Memory,
}

struct Demo<'a> {
    options: &'a DemoOptions,
    notify: &'a mut dyn FnMut(Note),
    stop: &'a AtomicBool,
    layout: RamLayout,
    kvm: bool,
    source: Option<Side>,
    events: Receiver<(Who, Option<Event>)>,
    sender: Sender<(Who, Option<Event>)>,
    folder: tempfile::TempDir,
    attempts: u32,
    booted: bool,
}

/// A migration that arrived, both machines standing still.
struct Switchover {
    destination: Side,
    figures: MigrationFigures,
    arrived: Arrived,
}

/// What the destination's receiver measured.
#[derive(Clone, Copy)]
struct Arrived {
    socket_bytes: u64,
    devices_load_us: u64,
}

/// Runs the demo. Raising `stop` abandons the migration; the source's guest runs on, then everything ends.
///
/// # Errors
/// Whatever kept the machine from moving, or moved wrongly; no process is left behind.
pub fn run(
    options: &DemoOptions,
    stop: &AtomicBool,
    notify: &mut dyn FnMut(Note),
) -> Result<Report, DemoError> {
    let mut demo = Demo::new(options, stop, notify)?;
    demo.start_source()?;
    let mut moved = demo.migrate()?;
    let mut report = demo.compare(&moved)?;
    if let Some(gpa) = report.wrong_gpa {
        return Err(DemoError::Different { gpa, report: Box::new(report) });
    }
    demo.source = None;
    let resume_us = demo.run_destination(&mut moved.destination)?;
    let health = demo.check(Who::Destination(demo.attempts), Some(&mut moved.destination))?;
    report.downtime.resume_ms = millis(resume_us);
    report.downtime_ms = to_micros(report.downtime_ms + millis(resume_us));
    report.total_ms = to_micros(report.total_ms + millis(resume_us));
    report.verified = is_well(&health);
    if report.verified { Ok(report) } else { Err(DemoError::Unwell { health, report: Box::new(report) }) }
}

impl<'a> Demo<'a> {
    fn new(
        options: &'a DemoOptions,
        stop: &'a AtomicBool,
        notify: &'a mut dyn FnMut(Note),
    ) -> Result<Self, DemoError> {
        check_fault(options)?;
        let lay_out = if options.sparse { RamLayout::sparse } else { RamLayout::new };
        let layout = lay_out(options.memory_bytes, Split::default())?;
        check_host_memory(options, &layout)?;
        let kvm = !options.no_kvm && kvm_or_why_not(notify);
        if let Some(Inject::Forget(source)) = &options.inject
            && !source_names(kvm).contains(&source.as_str())
        {
            return Err(DemoError::NoSuchSource {
                source_name: source.clone(),
                known: source_names(kvm).join(", "),
            });
        }
        let (sender, events) = mpsc::channel();
        let folder = tempfile::tempdir().map_err(DemoError::Folder)?;
        Ok(Self {
            options,
            notify,
            stop,
            layout,
            kvm,
            source: None,
            events,
            sender,
            folder,
            attempts: 0,
            booted: false,
        })
    }

    fn start_source(&mut self) -> Result<(), DemoError> {
        let guest = if self.kvm { "a KVM guest" } else { "a guest on a software vCPU" };
        let populated = match self.options.sparse {
            true => format!(", {} MiB of it populated", Map::new(&self.layout).populated_bytes() >> 20),
            false => String::new(),
        };
        self.say(format!("Starting {guest} with {} MiB of RAM{populated}", self.options.memory_bytes >> 20));
        self.source = Some(self.start(Role::Source, Who::Source)?);
        self.wait_for("the source to boot", Who::Source, |event| {
            matches!(event, Event::Ready).then_some(())
        })?;
        self.booted = true;
        Ok(())
    }

    /// Starts a machine's two processes, connected to each other and to this one.
    fn start(&self, role: fn(MachineSetup) -> Role, who: Who) -> Result<Side, DemoError> {
        let memory = Memory::create(&self.layout)?;
        let (machine_end, device_end) = UnixStream::pair().map_err(DemoError::Spawn)?;
        let device_role = Role::Device(DeviceSetup {
            state_bytes: self.options.device_state_bytes,
            state_changes_per_second: self.options.device_state_changes_per_second,
        });
        let device = Process::spawn(self.program(&device_role), &device_role, &[&device_end])
            .map_err(DemoError::Spawn)?;
        let mut descriptors: Vec<&dyn AsRawFd> = vec![&machine_end];
        descriptors.extend(memory.regions().iter().map(|region| &*region.file as &dyn AsRawFd));
        let role = role(self.setup());
        let machine = Process::spawn(self.program(&role), &role, &descriptors).map_err(DemoError::Spawn)?;
        machine.listen(who, self.sender.clone()).map_err(DemoError::Spawn)?;
        Ok(Side { machine, _device: device, memory })
    }

    fn program(&self, role: &Role) -> Program {
        let mut program = Program::new(&self.options.program);
        program.args([PROCESS_ARGUMENT, role.name()]).env(LOG_VARIABLE, &self.options.log_level);
        program
    }

    fn setup(&self) -> MachineSetup {
        let forget = match &self.options.inject {
            Some(Inject::Forget(source)) => Some(source.clone()),
            _ => None,
        };
        MachineSetup {
            memory_bytes: self.options.memory_bytes,
            sparse: self.options.sparse,
            kvm: self.kvm,
            guest_rate: self.options.guest_dirty_rate,
            device_rate: self.options.device_dirty_rate,
            seed: self.options.seed,
            forget,
        }
    }

    /// Migrates to a fresh destination; after one that was killed on purpose, to another.
    fn migrate(&mut self) -> Result<Switchover, DemoError> {
        let Some(Inject::KillDestination { round }) = self.options.inject else { return self.attempt(None) };
        match self.attempt(Some(round)) {
            Err(DemoError::Migration { error, guest_runs: true }) => {
                self.say(format!("The source reports: {error}"));
            }
            Ok(_) => return Err(DemoError::Survived { round }),
            Err(error) => return Err(error),
        }
        let health = self.check(Who::Source, None)?;
        if !is_well(&health) {
            return Err(DemoError::SourceUnwell { health });
        }
        self.say(format!(
            "The source's guest runs on: {} passes, no wrong page; second attempt",
            health.passes
        ));
        self.attempt(None)
    }

    fn attempt(&mut self, kill_in_round: Option<u32>) -> Result<Switchover, DemoError> {
        self.attempts += 1;
        let who = Who::Destination(self.attempts);
        let mut destination = self.start(Role::Destination, who)?;
        let listen = Command::Listen { url: self.listen_url() };
        destination.machine.send(&listen).map_err(DemoError::Control)?;
        let url = self.wait_for("the destination to listen", who, |event| match event {
            Event::Listening { url } => Some(url),
            _ => None,
        })?;
        let url = self.corrupted(url)?;
        self.say(format!("Migrating to {url}"));
        let started = Instant::now();
        self.command_source(&Command::Migrate {
            url,
            downtime_ms: if kill_in_round.is_some() { 0 } else { self.options.downtime_ms },
            timeout_s: self.options.timeout_s,
            bandwidth_bytes_per_s: self.slow_enough(kill_in_round.is_some()),
            insist: kill_in_round.is_none(),
            sparse: self.options.sparse,
        })?;
        let deadline = started + Duration::from_secs(self.options.timeout_s) + GRACE;
        let (figures, arrived) = self.follow(who, &mut destination, kill_in_round, deadline)?;
        (self.notify)(Note::Moved);
        if let Some(remark) = &figures.remark {
            self.say(remark.clone());
        }
        Ok(Switchover { destination, figures, arrived })
    }

    /// Caps the bandwidth where a fault needs time to show: a round to be killed in, a source's writes to be forgotten.
    fn slow_enough(&self, kills: bool) -> Option<u64> {
        let forgets = matches!(self.options.inject, Some(Inject::Forget(_)));
        (kills || forgets).then_some(self.options.memory_bytes)
    }

    fn listen_url(&self) -> String {
        match self.options.transport {
            Transport::Tcp { port } => format!("tcp:127.0.0.1:{port}"),
            Transport::Unix => {
                format!("unix:{}/migration-{}", self.folder.path().display(), self.attempts)
            }
        }
    }

    /// Puts the man in the middle in front of `url`, where one is asked for.
    fn corrupted(&mut self, url: String) -> Result<String, DemoError> {
        let (Some(Inject::CorruptPage), Some(address)) = (&self.options.inject, url.strip_prefix("tcp:"))
        else {
            return Ok(url);
        };
        let gpa = self.cold_byte();
        self.say(format!("A man in the middle flips a bit at GPA {gpa:#x}"));
        let proxy = flip_a_bit(address.to_owned(), gpa).map_err(DemoError::Proxy)?;
        Ok(format!("tcp:{proxy}"))
    }

    /// Picks a byte, by the seed, in a page that nobody writes after boot.
    fn cold_byte(&self) -> u64 {
        let map = Map::new(&self.layout);
        let cold: Vec<_> = map.ranges(AreaKind::Cold).collect();
        let pages: u64 = cold.iter().map(|range| (range.end - range.start) / PAGE_BYTES).sum();
        let mut page = self.options.seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) % pages;
        for range in cold {
            let here = (range.end - range.start) / PAGE_BYTES;
            if page < here {
                return range.start + page * PAGE_BYTES + self.options.seed % PAGE_BYTES;
            }
            page -= here;
        }
        unreachable!("the page was picked among these")
    }

    /// Follows a migration to its end: what the source measured, and the destination.
    fn follow(
        &mut self,
        who: Who,
        destination: &mut Side,
        mut kill_in_round: Option<u32>,
        deadline: Instant,
    ) -> Result<(MigrationFigures, Arrived), DemoError> {
        let (mut figures, mut received, mut refusal, mut cancelled) = (None, None, None, false);
        loop {
            if self.stop.load(Ordering::SeqCst) && !cancelled {
                cancelled = true;
                self.command_source(&Command::Cancel)?;
            }
            match self.next_event(deadline)? {
                None => {}
                Some((Who::Source, Some(Event::Progress(progress)))) => {
                    if kill_in_round.is_some_and(|round| progress.round >= round) {
                        kill_in_round = None;
                        self.kill(destination, &progress)?;
                    }
                    (self.notify)(Note::Progress(progress));
                }
                Some((Who::Source, Some(Event::Migrated(moved)))) => figures = Some(moved),
                Some((Who::Source, Some(Event::Failed { error, guest_runs }))) => {
                    let error = refusal.map_or(error.clone(), |why| format!("{error} (destination: {why})"));
                    return Err(match kill_in_round {
                        _ if cancelled => DemoError::Cancelled { guest_runs },
                        Some(round) => DemoError::NotKilled { round, error },
                        None => DemoError::Migration { error, guest_runs },
                    });
                }
                Some((Who::Source, None)) => return Err(DemoError::Died { who: "source" }),
                Some((from, Some(Event::Received { socket_bytes, devices_load_us }))) if from == who => {
                    received = Some(Arrived { socket_bytes, devices_load_us });
                }
                Some((from, Some(Event::Failed { error, .. }))) if from == who => refusal = Some(error),
                Some((from, None)) if from == who && figures.is_some() => {
                    return Err(DemoError::Died { who: "destination" });
                }
                Some(_) => {}
            }
            match (figures.take(), received) {
                (Some(moved), Some(arrived)) => return Ok((moved, arrived)),
                (moved, _) => figures = moved,
            }
        }
    }

    fn kill(&mut self, destination: &mut Side, progress: &Progress) -> Result<(), DemoError> {
        let (acknowledged, ram) =
            (progress.acknowledged_bytes + progress.skipped_bytes, self.options.memory_bytes);
        if acknowledged < ram / 2 {
            return Err(DemoError::TooEarly { acknowledged, ram });
        }
        self.say(format!(
            "Killing the destination in round {}: {} of {} MiB of RAM were acknowledged",
            progress.round,
            acknowledged >> 20,
            ram >> 20
        ));
        destination.machine.kill().map_err(DemoError::Control)
    }

    fn compare(&mut self, moved: &Switchover) -> Result<Report, DemoError> {
        let source = self.source.as_ref().ok_or(DemoError::Died { who: "source" })?;
        let found = compare(&source.memory, &moved.destination.memory).map_err(DemoError::Compare)?;
        let (mut figures, arrived) = (moved.figures.clone(), moved.arrived);
        figures.downtime.devices_load_ms = millis(arrived.devices_load_us);
        figures.downtime.state_ms = to_micros(figures.downtime.state_ms - figures.downtime.devices_load_ms);
        Ok(Report {
            kvm: self.kvm,
            verified: false,
            pages_compared: found.pages,
            source_digest: found.first_digest,
            destination_digest: found.second_digest,
            ram_bytes: self.options.memory_bytes,
            rounds: figures.rounds,
            bytes_sent: arrived.socket_bytes,
            unique_dirty_bytes: figures.unique_dirty_bytes,
            skipped_hole_bytes: figures.skipped_hole_bytes,
            skipped_zero_bytes: figures.skipped_zero_bytes,
            downtime_ms: millis(figures.downtime_us),
            downtime: figures.downtime,
            total_ms: millis(figures.total_us),
            sources: figures.sources,
            device: figures.device,
            wrong_gpa: found.wrong.first().copied(),
            wrong_pages: found.wrong_pages,
            degradations: figures.degradations,
            attempts: self.attempts,
        })
    }

    fn run_destination(&mut self, destination: &mut Side) -> Result<u64, DemoError> {
        destination.machine.send(&Command::Run).map_err(DemoError::Control)?;
        let who = Who::Destination(self.attempts);
        self.wait_for("the destination to run", who, |event| match event {
            Event::Running { resume_us } => Some(resume_us),
            _ => None,
        })
    }

    /// Lets the guest of one side check its pages; the source's when `destination` is none.
    fn check(&mut self, who: Who, destination: Option<&mut Side>) -> Result<Health, DemoError> {
        let command = Command::Check { passes: CHECKED_PASSES };
        match destination {
            Some(side) => side.machine.send(&command).map_err(DemoError::Control)?,
            None => self.command_source(&command)?,
        }
        self.wait_for("the guest to check its pages", who, |event| match event {
            Event::Health(health) => Some(health),
            _ => None,
        })
    }

    fn command_source(&mut self, command: &Command) -> Result<(), DemoError> {
        let source = self.source.as_mut().ok_or(DemoError::Died { who: "source" })?;
        source.machine.send(command).map_err(DemoError::Control)
    }

    /// Waits for the first event of `who` that `pick` takes.
    fn wait_for<T>(
        &mut self,
        what: &'static str,
        who: Who,
        mut pick: impl FnMut(Event) -> Option<T>,
    ) -> Result<T, DemoError> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            match self.next_event(deadline).map_err(|_| DemoError::Slow { what })? {
                Some((from, None)) if from == who => return Err(DemoError::Died { who: who.name() }),
                Some((from, Some(Event::Failed { error, guest_runs }))) if from == who => {
                    return Err(DemoError::Process { who: who.name(), error, guest_runs });
                }
                Some((from, Some(event))) if from == who => {
                    if let Some(picked) = pick(event) {
                        return Ok(picked);
                    }
                }
                _ if self.stop.load(Ordering::SeqCst) => {
                    return Err(DemoError::Cancelled { guest_runs: self.booted });
                }
                _ => {}
            }
        }
    }

    /// Waits a moment for an event.
    fn next_event(&self, deadline: Instant) -> Result<Option<(Who, Option<Event>)>, DemoError> {
        match self.events.recv_timeout(Duration::from_millis(50)) {
            Ok(event) => Ok(Some(event)),
            Err(RecvTimeoutError::Timeout) if Instant::now() < deadline => Ok(None),
            Err(_) => Err(DemoError::Slow { what: "the migration to end" }),
        }
    }

    fn say(&mut self, text: String) {
        (self.notify)(Note::Said(text));
    }
}

fn is_well(health: &Health) -> bool {
    health.wrong_pages.is_empty() && health.wrong_records.is_empty() && health.wrong_device_pages.is_empty()
}

#[expect(clippy::cast_precision_loss, reason = "figures for people; a migration is far shorter than 2^53 µs")]
pub(super) fn millis(micros: u64) -> f64 {
    micros as f64 / 1000.0
}

/// Rounds to whole microseconds: a sum of two such figures is not printed to the fifteenth digit.
fn to_micros(millis: f64) -> f64 {
    (millis * 1000.0).round() / 1000.0
}

fn kvm_or_why_not(notify: &mut dyn FnMut(Note)) -> bool {
    match probe_kvm() {
        Ok(()) => true,
        Err(error) => {
            let why = Chain(&error);
            notify(Note::Said(format!("WITHOUT KVM: {why}; a software vCPU stands in for the guest")));
            false
        }
    }
}

impl Who {
    fn name(self) -> &'static str {
        match self {
            Self::Source => "source",
            Self::Destination(_) => "destination",
        }
    }
}
