// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What the demo's processes do. Each ends when its parent is gone.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, Receiver};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, Builder};
use std::time::{Duration, Instant};

use anyhow::Context;
use serde::{Deserialize, Serialize};
use vfio_migration::error::Chain;
use vfio_migration::migratable::MigratableDevice;
use vfio_migration::precopy::{Blame, Forecast, TimeoutStrategy};
use vfio_migration::source::KvmLogMode;
use vfio_migration::transfer::connection::Listener;
use vfio_migration::transfer::limits::PeerLimits;
use vfio_migration::transfer::receive::Receiver as MigrationReceiver;
use vfio_migration::transfer::{DowntimeParts, PinningReceiver, SendOptions, Sender, SenderHandle, Sent};
use vfio_migration::vm::Vm;
use vm_migration::Pausable;

use super::control::{Command, Control, DeviceSetup, Event, Health, MachineSetup, Role};
use super::report::{DeviceReport, DowntimeReport, MigrationFigures, Progress, SourceReport};
use super::run::millis;
use super::side::Side;
use super::vm::DestinationVm;
use crate::device::{DeviceConfig, DmaDevice};
use crate::vmm::{Machine, Phase, RamLayout};

/// How often a source tells how far it is.
const PROGRESS_PERIOD: Duration = Duration::from_millis(10);

/// Becomes the process that the parent, behind standard input, says it is to be.
pub fn process_main() -> ExitCode {
    let run = || -> anyhow::Result<()> {
        let stdin = std::io::stdin().as_fd().try_clone_to_owned().context("No standard input")?;
        let mut control = Control::new(UnixStream::from(stdin));
        match control.receive()?.context("The parent is gone")? {
            Role::Source(setup) => Child::be(Party::Source, control, |control| host(setup, control)),
            Role::Destination(setup) => {
                Child::be(Party::Destination, control, |control| host(setup, control))
            }
            Role::Device(setup) => {
                let socket = control.receive_descriptor()?;
                exit_with_parent(control)
                    .context("Cannot start the thread that waits for the parent's end")?;
                let DeviceSetup { state_bytes, state_changes_per_second } = setup;
                let config =
                    DeviceConfig { state_bytes, state_changes_per_second, ..DeviceConfig::default() };
                Ok(DmaDevice::serve(UnixStream::from(OwnedFd::from(socket)), config)?)
            }
        }
    };
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            log::error!("{error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Ends this process when the other end of `control` is closed.
fn exit_with_parent(mut control: Control) -> io::Result<()> {
    Builder::new().name("parent".into()).spawn(move || {
        while let Ok(Some(_)) = control.receive::<serde_json::Value>() {}
        std::process::exit(0);
    })?;
    Ok(())
}

/// Which end of a migration a process is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Party {
    Source,
    Destination,
}

/// A VM that a process hosts, whatever its devices are.
pub(crate) trait Hosted {
    /// The machine.
    fn machine(&self) -> &Arc<Machine>;

    /// The VM as its sender sees it.
    fn source(&self) -> impl Vm;

    /// Boots the guest, programs the devices, and lets all run.
    fn start(&self) -> anyhow::Result<()>;

    /// Lets run what runs neither in the guest nor in a device, in a VM that has arrived.
    fn go_on(&self) -> anyhow::Result<()>;

    /// Lets the guest make `passes` more passes, then looks at what guest, VMM and devices wrote.
    fn check(&self, passes: u64) -> anyhow::Result<Health>;
}

/// A source or destination process.
pub(crate) struct Child<S> {
    side: S,
    devices: MigratableDevice,
    events: Arc<Mutex<Control>>,
    commands: Receiver<Command>,
    migration: Arc<Mutex<SenderHandle>>,
}

impl<S: Hosted> Child<S> {
    /// Makes the VM and does what the parent says until it is gone; what goes wrong, the parent is told.
    pub(crate) fn be(
        party: Party,
        mut control: Control,
        host: impl FnOnce(&mut Control) -> anyhow::Result<(S, MigratableDevice)>,
    ) -> anyhow::Result<()> {
        let migration = Arc::new(Mutex::new(SenderHandle::new()));
        let hosted = host(&mut control).and_then(|(side, devices)| {
            let commands = listen(control.try_clone()?, Arc::clone(&migration));
            Ok((side, devices, commands.context("Cannot start the thread that takes commands")?))
        });
        let (side, devices, commands) = match hosted {
            Ok(hosted) => hosted,
            Err(error) => {
                let event = Event::Failed { error: format!("{error:#}"), guest_runs: false };
                return control.send(&event).context("The parent is gone");
            }
        };
        let child = Self { side, devices, events: Arc::new(Mutex::new(control)), commands, migration };
        match party {
            Party::Source => child.be_source(),
            Party::Destination => child.be_destination(),
        }
    }

    fn be_source(mut self) -> anyhow::Result<()> {
        self.answer(|child| child.side.start().map(|()| Event::Ready))?;
        while let Ok(command) = self.commands.recv() {
            self.answer(|child| match command {
                Command::Migrate { url, downtime_ms, timeout_s, bandwidth_bytes_per_s, insist, sparse } => {
                    let strategy = if insist { TimeoutStrategy::Ignore } else { TimeoutStrategy::Cancel };
                    let pinning = if sparse { PinningReceiver::Unheeded } else { PinningReceiver::default() };
                    let options = SendOptions::new(url.parse()?)
                        .downtime(Duration::from_millis(downtime_ms))
                        .timeout(Duration::from_secs(timeout_s))
                        .timeout_strategy(strategy)
                        .pinning_receiver(pinning)
                        .rate_limit(bandwidth_bytes_per_s)?;
                    child.migrate(Sender::new(options), downtime_ms)
                }
                Command::Check { passes } => child.side.check(passes).map(Event::Health),
                other => anyhow::bail!("A source cannot {other:?}"),
            })?;
        }
        Ok(())
    }

    fn be_destination(mut self) -> anyhow::Result<()> {
        while let Ok(command) = self.commands.recv() {
            self.answer(|child| match command {
                Command::Listen { url } => child.receive(&url),
                Command::Run => child.run(),
                Command::Check { passes } => child.side.check(passes).map(Event::Health),
                other => anyhow::bail!("A destination cannot {other:?}"),
            })?;
        }
        Ok(())
    }

    /// Tells the parent how a command ended.
    fn answer(&mut self, command: impl FnOnce(&mut Self) -> anyhow::Result<Event>) -> anyhow::Result<()> {
        let event = command(self).unwrap_or_else(|error| Event::Failed {
            error: format!("{error:#}"),
            guest_runs: self.side.machine().phase() == Phase::Running,
        });
        self.tell(&event)
    }

    fn tell(&self, event: &Event) -> anyhow::Result<()> {
        let mut events = self.events.lock().unwrap_or_else(PoisonError::into_inner);
        events.send(event).context("The parent is gone")
    }

    fn migrate(&mut self, sender: Sender, downtime_ms: u64) -> anyhow::Result<Event> {
        let migration = sender.handle();
        *self.migration.lock().unwrap_or_else(PoisonError::into_inner) = migration.clone();
        let mut vm = self.side.source();
        let (over, events) = (AtomicBool::new(false), &self.events);
        let sent = thread::scope(|scope| -> anyhow::Result<_> {
            let reporting = Builder::new().name("progress".into()).spawn_scoped(scope, || {
                while !over.load(Ordering::SeqCst) {
                    let event = Event::Progress(progress_of(&migration));
                    let mut events = events.lock().unwrap_or_else(PoisonError::into_inner);
                    if events.send(&event).is_err() {
                        return;
                    }
                    drop(events);
                    thread::sleep(PROGRESS_PERIOD);
                }
            });
            reporting.context("Cannot start the thread that tells of progress")?;
            let sent = sender.send(&mut vm, self.devices.tracker(), self.devices.devices());
            over.store(true, Ordering::SeqCst);
            Ok(sent?)
        })?;
        Ok(Event::Migrated(figures_of(&sent, downtime_ms)))
    }

    fn receive(&mut self, url: &str) -> anyhow::Result<Event> {
        let listener = Listener::bind(&url.parse()?)?;
        self.tell(&Event::Listening { url: listener.url().to_string() })?;
        let mut vm = DestinationVm::new(self.side.machine(), &mut self.devices);
        let received = MigrationReceiver::new(PeerLimits::default(), None).receive(&listener, &mut vm)?;
        let devices_load_us = micros(vm.devices_load());
        Ok(Event::Received { socket_bytes: received.received_bytes, devices_load_us })
    }

    fn run(&mut self) -> anyhow::Result<Event> {
        let started = Instant::now();
        self.devices.resume()?;
        self.side.machine().start()?;
        let resume_us = micros(started.elapsed());
        self.side.go_on()?;
        Ok(Event::Running { resume_us })
    }
}

/// Makes the VM of a process from the descriptors that follow its role: the device's socket, then RAM.
fn host(setup: MachineSetup, control: &mut Control) -> anyhow::Result<(Side, MigratableDevice)> {
    let socket = control.receive_descriptor().context("Cannot receive the device's socket")?;
    let files = receive_ram(&setup.layout()?, control)?;
    let side = Side::new(setup, UnixStream::from(OwnedFd::from(socket)), files)?;
    let devices = side.migratable(KvmLogMode::ManualAtRead)?;
    Ok((side, devices))
}

/// Takes a memfd for each region of the guest's RAM.
pub(crate) fn receive_ram(layout: &RamLayout, control: &mut Control) -> anyhow::Result<Vec<File>> {
    let files = layout.regions().iter().map(|_| control.receive_descriptor()).collect::<Result<_, _>>();
    files.context("Cannot receive the guest's RAM")
}

/// Hands on the parent's commands; a Cancel reaches the migration under way at once. Ends the process with its parent.
fn listen(mut control: Control, migration: Arc<Mutex<SenderHandle>>) -> io::Result<Receiver<Command>> {
    let (sender, commands) = mpsc::channel();
    Builder::new().name("commands".into()).spawn(move || {
        while let Ok(Some(command)) = control.receive() {
            match command {
                Command::Cancel => {
                    migration.lock().unwrap_or_else(PoisonError::into_inner).cancel();
                }
                command => {
                    let _process_is_ending = sender.send(command);
                }
            }
        }
        std::process::exit(0);
    })?;
    Ok(commands)
}

fn progress_of(migration: &SenderHandle) -> Progress {
    let progress = migration.progress();
    Progress {
        round: progress.round,
        sent_bytes: progress.sent_bytes,
        acknowledged_bytes: progress.acknowledged_bytes,
        skipped_bytes: progress.skipped_bytes(),
        left_bytes: progress.left_bytes(),
        bytes_per_second: progress.seen.bandwidth,
        expected_downtime_ms: progress.expected_downtime_ms(),
    }
}

/// Tells that the VM stood still for longer than it should have, and why if that was foreseen.
fn remark(sent: &Sent, downtime_ms: u64) -> Option<String> {
    let exceeded = format!("Downtime limit of {downtime_ms} ms exceeded");
    sent.downtime_exceeded.then(|| match &sent.progress.forecast {
        Forecast::Stuck(Blame::DeviceState { bytes, .. }) => {
            format!("{exceeded}: device state of {} MiB is to blame", bytes >> 20)
        }
        Forecast::Stuck(blame) => format!("{exceeded}: {blame}"),
        _ => exceeded,
    })
}

fn figures_of(sent: &Sent, downtime_ms: u64) -> MigrationFigures {
    let source = |source: &vfio_migration::transfer::SourceProgress| SourceReport {
        id: source.id.clone(),
        pages: source.attribution.pages,
        exclusive_pages: source.attribution.exclusive_pages,
    };
    MigrationFigures {
        rounds: sent.progress.round,
        unique_dirty_bytes: sent.unique_dirty_bytes,
        skipped_hole_bytes: sent.progress.skipped_hole_bytes,
        skipped_zero_bytes: sent.progress.skipped_zero_bytes,
        downtime_us: micros(sent.downtime),
        downtime: downtime_of(&sent.downtime_parts),
        total_us: micros(sent.total),
        sources: sent.progress.sources.iter().map(source).collect(),
        device: DeviceReport {
            state_bytes: sent.device_state_bytes,
            precopy_bytes: sent.device_precopy_bytes,
            downtime_ms: millis(
                sent.device_downtimes.iter().map(|share| micros(share.took)).max().unwrap_or(0),
            ),
        },
        late_bytes: sent.device_downtimes.iter().map(|share| (share.device.clone(), share.bytes)).collect(),
        degradations: sent.progress.degradations.iter().map(degradation).collect(),
        remark: remark(sent, downtime_ms),
    }
}

fn downtime_of(parts: &DowntimeParts) -> DowntimeReport {
    let ms = |part| millis(micros(part));
    DowntimeReport {
        pause_ms: ms(parts.pause),
        devices_stop_ms: ms(parts.devices_stop),
        last_collect_ms: ms(parts.last_collect),
        last_pages_ms: ms(parts.last_pages),
        devices_save_ms: ms(parts.devices_save),
        capture_ms: ms(parts.capture),
        state_ms: ms(parts.state),
        devices_load_ms: 0.0,
        complete_ms: ms(parts.complete),
        resume_ms: 0.0,
    }
}

fn degradation(degradation: &vfio_migration::transfer::SendDegradation) -> String {
    let error = Chain(&*degradation.error);
    match degradation.times {
        1 => error.to_string(),
        times => format!("{error} ({times} times)"),
    }
}

fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}
