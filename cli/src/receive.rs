// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! `vfio-migrate receive`: a running VM becomes a snapshot directory; `serve` has the many.

use std::cell::RefCell;
use std::io::PipeReader;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver as NoteReceiver, Sender, channel};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use indicatif::HumanBytes;
use vfio_migration::error::Chain;
use vfio_migration::offload::{CopyProgress, LocalOptions};
use vfio_migration::snapshot::{Base, DestinationOptions, Digest, SnapshotDestination, describe};
use vfio_migration::transfer::connection::Listener;
use vfio_migration::transfer::receive::{Receiver, ReceiverHandle};
use vfio_migration::transfer::tls::ServerTls;
use vfio_migration::transfer::url::{Endpoint, Url};

use crate::args::ReceiveArguments;
use crate::devices::device_lines;
use crate::event::Event;
use crate::exit::Exit;
use crate::failure::Failure;
use crate::host::HostError;
use crate::manager::{passed_listener, tell_ready, tell_stopping};
use crate::on_paused::{Note, PausedCommand, hand_on};
use crate::output::Output;
use crate::serve::serve;
use crate::signals::stop_flag;
use crate::watch::{Watcher, watch};

/// What a source of a checkpoint sees, and what its operator has to know.
const CHECKPOINT_NOTE: &str = "The source will be told that the migration failed: so its VM runs on. A Cloud Hypervisor \
    source has let go of its disk locks by then and does not take them again: keep other VMs from its disks yourself.";

/// The same on this host.
const LOCAL_CHECKPOINT_NOTE: &str = "The source will be told that the migration failed: so its VM runs on. With \
    preserve_source=on a Cloud Hypervisor source keeps its disk locks; without it, it has let go of them by then and does not \
    take them again: keep other VMs from its disks yourself. Without local=on memory comes as bytes.";

/// What a source that gives its VM away sees.
const MOVE_NOTE: &str = "When the snapshot is safe on disk the source is told that the VM has moved, and ends it. A Cloud \
    Hypervisor source lets go of its disk locks before that; should the migration fail late, its VM runs on without them.";

/// The same on this host.
const LOCAL_MOVE_NOTE: &str = "When the snapshot is safe on disk the source is told that the VM has moved, and ends it. A Cloud \
    Hypervisor source lets go of its disk locks before that; should the migration fail late, its VM runs on without them. \
    With local=on,preserve_source=on it keeps them, and its VM stands paused in the end, until `ch-remote resume`. Without \
    local=on memory comes as bytes.";

/// A snapshot that is whole and safe on disk.
pub(crate) struct Kept {
    digest: Digest,
    confirmed: bool,
    received_bytes: u64,
    /// Whether memory came as descriptors.
    passed: bool,
}

/// Receives one VM or several and tells how it goes.
pub(crate) fn receive(arguments: &ReceiveArguments) -> ExitCode {
    let mut output = Output::new(arguments.json);
    let outcome = match (&arguments.serve, &arguments.into) {
        (Some(folder), _) => serve(arguments, folder, &mut output),
        (None, Some(into)) => receive_into(arguments, into, &mut output),
        (None, None) => unreachable!("the command line has one of them"),
    };
    tell_stopping();
    outcome.unwrap_or_else(|failure| output.fail(&failure))
}

fn receive_into(arguments: &ReceiveArguments, into: &Path, output: &mut Output) -> Result<ExitCode, Failure> {
    output.check_name(into)?;
    let desk = Desk::open(arguments)?;
    let absolute = absolute(into)?;
    let mut reception = desk.prepare(Arc::new(absolute.into()))?;
    let mut destination = SnapshotDestination::create(into, reception.options())?;
    let listener = desk.listen()?;
    tell_listening(arguments, into, &listener, output);
    let kept = desk.receive(&listener, &mut destination, &reception, output)?;
    Ok(tell_kept(arguments, into, &kept, output))
}

/// Returns the absolute form of `path`.
pub(crate) fn absolute(path: &Path) -> Result<PathBuf, HostError> {
    std::path::absolute(path).map_err(|source| HostError::Path { path: path.to_owned(), source })
}

/// What the migrations of one command have in common.
pub(crate) struct Desk<'a> {
    arguments: &'a ReceiveArguments,
    /// The socket of a service manager, until somebody listens on it.
    passed: RefCell<Option<Listener>>,
    receiver: Receiver,
    stop: Arc<AtomicBool>,
}

/// What a migration begins with.
pub(crate) struct Reception {
    options: Option<DestinationOptions>,
    pub(crate) notes: Sender<Note>,
    noted: NoteReceiver<Note>,
    copying: CopyProgress,
}

impl Reception {
    /// How the destination is made.
    pub(crate) fn options(&mut self) -> DestinationOptions {
        self.options.take().unwrap_or_default()
    }
}

impl<'a> Desk<'a> {
    pub(crate) fn open(arguments: &'a ReceiveArguments) -> Result<Self, Failure> {
        // First of all, before there are threads: it takes it out of the environment.
        let passed = if arguments.url.is_none() { Some(passed_listener()?) } else { None };
        let stop = stop_flag()?;
        let tls = arguments.tls_dir.as_deref().map(ServerTls::from_directory).transpose()?;
        let receiver = Receiver::new(arguments.limits(), tls);
        Ok(Self { arguments, passed: RefCell::new(passed), receiver, stop })
    }

    /// Listens where sources are to connect.
    pub(crate) fn listen(&self) -> Result<Listener, Failure> {
        match (self.passed.take(), &self.arguments.url) {
            (Some(passed), _) => Ok(passed),
            (None, Some(url)) => Ok(Listener::bind(url)?),
            (None, None) => unreachable!("without a URL a socket was passed"),
        }
    }

    /// Whether the command was asked to end.
    pub(crate) fn is_stopped(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }

    /// Prepares to receive into the directory that is called `into` when the VM is paused, at the latest.
    pub(crate) fn prepare(&self, into: Arc<OnceLock<PathBuf>>) -> Result<Reception, Failure> {
        let (notes, noted) = channel();
        let options = options(self.arguments, into, self.receiver.handle(), notes.clone())?;
        let copying = options.local.progress.clone();
        Ok(Reception { options: Some(options), notes, noted, copying })
    }

    /// Receives a VM.
    pub(crate) fn receive(
        &self,
        listener: &Listener,
        destination: &mut SnapshotDestination,
        reception: &Reception,
        output: &mut Output,
    ) -> Result<Kept, Failure> {
        let handle = self.receiver.handle();
        let mut watched = Watched { handle: handle.clone(), reception, rate: Rate::new(), printed: None };
        let receiver = &self.receiver;
        let received =
            watch("receives", || receiver.receive(listener, destination), &self.stop, &mut watched, output)?;
        watched.tell_notes(output);
        let received_bytes = handle.received_bytes();
        match (received, destination.kept()) {
            (Ok(received), Some(digest)) => {
                let passed = reception.copying.total_bytes() > 0;
                Ok(Kept { digest, confirmed: received.confirmed, received_bytes, passed })
            }
            (Err(error), _) => Err(error.into()),
            (Ok(_), None) => unreachable!("a destination that completed has kept the snapshot"),
        }
    }
}

fn options(
    arguments: &ReceiveArguments,
    into: Arc<OnceLock<PathBuf>>,
    receiver: ReceiverHandle,
    notes: Sender<Note>,
) -> Result<DestinationOptions, Failure> {
    let limits = arguments.sizes.of_snapshot();
    let base = match arguments.base.is_empty() {
        true => None,
        false => Some(Base::open(&arguments.base, &limits)?),
    };
    let limit = Duration::from_secs(arguments.on_paused_timeout);
    let (told, copying) = (notes.clone(), CopyProgress::default());
    let local = LocalOptions {
        warm_timeout: (!arguments.no_warm_copy).then(|| Duration::from_secs(arguments.warm_timeout)),
        receiver: Some(receiver.clone()),
        progress: copying.clone(),
        // Where nobody listens, nobody needs to know.
        observer: Some(Box::new(move |event| drop(told.send(Note::Local(event))))),
    };
    let on_paused = arguments.on_paused.clone();
    let on_paused =
        on_paused.map(|command| PausedCommand { command, into, limit, receiver, copying, notes }.hook());
    Ok(DestinationOptions {
        base,
        checkpoint: arguments.checkpoint,
        memory_only: arguments.memory_only,
        on_paused,
        local,
        limits,
    })
}

/// A receiver that is looked at.
struct Watched<'a> {
    handle: ReceiverHandle,
    reception: &'a Reception,
    rate: Rate,
    /// What the command prints that the VM waits for.
    printed: Option<PipeReader>,
}

impl Watched<'_> {
    fn tell_notes(&mut self, output: &Output) {
        tell_notes(&self.reception.noted, &mut self.printed, output);
    }
}

impl Watcher for Watched<'_> {
    fn stop(&mut self, output: &Output) {
        give_up(&self.handle, output);
    }

    fn look(&mut self, output: &mut Output) {
        self.tell_notes(output);
        let copying = &self.reception.copying;
        match copying.total_bytes() {
            0 => tell_progress(&self.handle, &mut self.rate, output),
            data_bytes => tell_copying(copying.done_bytes(), data_bytes, output),
        }
    }
}

/// Tells of the command that the VM waits for: what there is to tell, and what it `printed`.
fn tell_notes(notes: &NoteReceiver<Note>, printed: &mut Option<PipeReader>, output: &Output) {
    printed.iter().for_each(hand_on);
    for note in notes.try_iter() {
        printed.iter().for_each(hand_on);
        *printed = note.tell(output).or(printed.take());
    }
}

/// Tells that a source may come, also the service manager.
pub(crate) fn tell_listening(
    arguments: &ReceiveArguments,
    into: &Path,
    listener: &Listener,
    output: &Output,
) {
    let url = listener.url();
    tell_ready(&format!("Waiting on {url}"));
    let is_local = matches!(url.endpoint(), Endpoint::Unix(_));
    let (note, options) = match (is_local, arguments.checkpoint) {
        (true, true) => (LOCAL_CHECKPOINT_NOTE, ",local=on,preserve_source=on"),
        (true, false) => (LOCAL_MOVE_NOTE, ",local=on"),
        (false, true) => (CHECKPOINT_NOTE, ""),
        (false, false) => (MOVE_NOTE, ""),
    };
    let tls = arguments.tls_dir.as_ref().map_or("", |_| ",tls_dir=DIR");
    output.tell(&Event::Listening { url: url.to_string(), into }, || {
        format!(
            "Waiting for a source on {url}. On its side:\n\
             \x20 ch-remote --api-socket SOCKET send-migration destination_url={}{options}{tls}\n{note}",
            seen_from_source(url)
        )
    });
}

/// Returns what a source calls the place: an address that stands for all of this host's is none to it.
fn seen_from_source(url: &Url) -> String {
    match url.endpoint() {
        Endpoint::Tcp { host: "0.0.0.0" | "::", port } => format!("tcp:THIS-HOST:{port}"),
        _ => url.to_string(),
    }
}

fn give_up(handle: &ReceiverHandle, output: &Output) {
    let has_source = handle.received_bytes() > 0;
    output.remark(match (handle.stop(), has_source) {
        (true, true) => "Giving up; the source's VM runs on",
        (true, false) => "Giving up; no source has come",
        (false, _) => "Too late to give up: the snapshot is being completed",
    });
}

fn tell_progress(handle: &ReceiverHandle, rate: &mut Rate, output: &mut Output) {
    let received_bytes = handle.received_bytes();
    let bytes_per_second = rate.look(received_bytes);
    if received_bytes == 0 {
        return;
    }
    output.progress(&Event::Receiving { received_bytes, bytes_per_second }, received_bytes, None, || {
        format!("received {}, {}/s", HumanBytes(received_bytes), HumanBytes(bytes_per_second))
    });
}

/// Tells how far memory is copied that came as descriptors, or compared.
fn tell_copying(copied_bytes: u64, data_bytes: u64, output: &mut Output) {
    output.progress(&Event::Copying { copied_bytes, data_bytes }, copied_bytes, Some(data_bytes), || {
        format!("{} of {}", HumanBytes(copied_bytes), HumanBytes(data_bytes))
    });
}

/// Tells of a snapshot that is kept as `into`; returns what the command ends with after it.
pub(crate) fn tell_kept(
    arguments: &ReceiveArguments,
    into: &Path,
    kept: &Kept,
    output: &mut Output,
) -> ExitCode {
    // What is kept is kept, whether or not it can be described.
    let devices = describe(into, &arguments.sizes.of_snapshot()).map(|found| found.devices);
    let devices = devices.inspect_err(|error| log::warn!("{}; its devices are not known", Chain(error)));
    let devices = devices.ok();
    let &Kept { digest, confirmed, received_bytes, passed } = kept;
    let (checkpoint, devices) = (arguments.checkpoint, devices.as_deref());
    output.result(&Event::Kept { into, digest, checkpoint, confirmed, received_bytes, devices }, || {
        let path = into.display();
        let fate = match (checkpoint, confirmed) {
            (true, _) => "The source was told that the migration failed; its VM runs on",
            (false, true) if passed => {
                "The source was told that the VM has moved: it ends it, or holds it paused with preserve_source=on"
            }
            (false, true) => "The source was told that the VM has moved",
            (false, false) => {
                "Outcome unknown: the source may not know that the VM has moved; where it still holds the VM, end it there"
            }
        };
        let kept = format!("Kept {path} ({digest}), {} received", HumanBytes(received_bytes));
        [vec![kept], device_lines(devices.unwrap_or_default()), vec![fate.to_owned()]].concat().join("\n")
    });
    if confirmed || checkpoint { ExitCode::SUCCESS } else { Exit::OutcomeUnknown.into() }
}

/// Bytes per second over the last moments.
struct Rate {
    since: Instant,
    bytes: u64,
    per_second: u64,
}

impl Rate {
    /// How long a moment is.
    const MOMENT: Duration = Duration::from_millis(500);

    fn new() -> Self {
        Self { since: Instant::now(), bytes: 0, per_second: 0 }
    }

    /// Takes in that `bytes` have come so far. The time before the first ones does not count.
    fn look(&mut self, bytes: u64) -> u64 {
        if bytes == 0 {
            self.since = Instant::now();
        }
        let millis = u64::try_from(self.since.elapsed().as_millis()).unwrap_or(u64::MAX);
        if self.since.elapsed() >= Self::MOMENT {
            self.per_second = (bytes - self.bytes).saturating_mul(1000) / millis;
            (self.since, self.bytes) = (Instant::now(), bytes);
        }
        self.per_second
    }
}
