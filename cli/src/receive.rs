// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! `vfio-migrate receive`: a running VM becomes a snapshot directory.

use std::io::PipeReader;
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver as NoteReceiver, Sender, channel};
use std::thread::{self, Builder};
use std::time::{Duration, Instant};

use indicatif::HumanBytes;
use vfio_migration::error::Chain;
use vfio_migration::offload::{CopyProgress, LocalOptions};
use vfio_migration::snapshot::{
    Base, DestinationOptions, Digest, PassThrough, SnapshotDestination, describe,
};
use vfio_migration::transfer::connection::Listener;
use vfio_migration::transfer::receive::{ReceiveError, Received, Receiver, ReceiverHandle};
use vfio_migration::transfer::tls::ServerTls;
use vfio_migration::transfer::url::{Endpoint, Url};

use crate::args::ReceiveArguments;
use crate::devices::device_lines;
use crate::event::Event;
use crate::exit::Exit;
use crate::failure::Failure;
use crate::host::HostError;
use crate::on_paused::{Note, PausedCommand, hand_on};
use crate::output::Output;
use crate::signals::stop_flag;

/// How often the receiver is looked at.
const TICK: Duration = Duration::from_millis(50);

/// What a source of a checkpoint sees, and what its operator has to know.
const CHECKPOINT_NOTE: &str = "The source will be told that the migration failed: so its VM runs on. A Cloud Hypervisor \
    source has let go of its disk locks by then and does not take them again: keep other VMs from its disks yourself.";

/// What a source that gives its VM away sees.
const MOVE_NOTE: &str = "When the snapshot is safe on disk the source is told that the VM has moved, and ends it. A Cloud \
    Hypervisor source lets go of its disk locks before that; should the migration fail late, its VM runs on without them.";

/// A snapshot that is whole and safe on disk.
struct Kept {
    digest: Digest,
    confirmed: bool,
    received_bytes: u64,
}

/// Receives a VM into a directory and tells how it goes.
pub(crate) fn receive(arguments: &ReceiveArguments) -> ExitCode {
    let mut output = Output::new(arguments.json);
    let kept = match try_receive(arguments, &mut output) {
        Ok(kept) => kept,
        Err(failure) => return output.fail(&failure),
    };
    // What is kept is kept, whether or not it can be described.
    let limits = arguments.sizes.of_snapshot();
    let devices = describe(&arguments.into, &limits).map(|found| found.devices);
    let devices = devices.inspect_err(|error| log::warn!("{}; its devices are not known", Chain(error)));
    tell_kept(arguments, &kept, devices.ok().as_deref(), &mut output);
    if kept.confirmed || arguments.checkpoint { ExitCode::SUCCESS } else { Exit::OutcomeUnknown.into() }
}

fn try_receive(arguments: &ReceiveArguments, output: &mut Output) -> Result<Kept, Failure> {
    output.check_name(&arguments.into)?;
    let stop = stop_flag()?;
    let tls = arguments.tls_dir.as_deref().map(ServerTls::from_directory).transpose()?;
    let receiver = Receiver::new(arguments.limits(), tls);
    let (notes, noted) = channel();
    let options = options(arguments, receiver.handle(), notes)?;
    let copying = options.local.progress.clone();
    let mut destination = SnapshotDestination::create(&arguments.into, options)?;
    let listener = Listener::bind(&arguments.url)?;
    tell_listening(arguments, &listener, output);
    let inbox = Inbox { stop: &stop, notes: &noted, copying: &copying };
    let received = watch(&receiver, &listener, &mut destination, inbox, output)?;
    let received_bytes = receiver.handle().received_bytes();
    match (received, destination.kept()) {
        (Ok(received), Some(digest)) => Ok(Kept { digest, confirmed: received.confirmed, received_bytes }),
        (Err(error), _) => Err(error.into()),
        (Ok(_), None) => unreachable!("a destination that completed has kept the snapshot"),
    }
}

fn options(
    arguments: &ReceiveArguments,
    receiver: ReceiverHandle,
    notes: Sender<Note>,
) -> Result<DestinationOptions, Failure> {
    let limits = arguments.sizes.of_snapshot();
    let base = match arguments.base.is_empty() {
        true => None,
        false => Some(Base::open(&arguments.base, &limits)?),
    };
    let lost = |source| HostError::Path { path: arguments.into.clone(), source };
    let into = std::path::absolute(&arguments.into).map_err(lost)?;
    let limit = Duration::from_secs(arguments.on_paused_timeout);
    let told = notes.clone();
    let local = LocalOptions {
        warm_timeout: (!arguments.no_warm_copy).then(|| Duration::from_secs(arguments.warm_timeout)),
        receiver: Some(receiver.clone()),
        progress: CopyProgress::default(),
        // Where nobody listens, nobody needs to know.
        observer: Some(Box::new(move |event| drop(told.send(Note::Local(event))))),
    };
    let on_paused = arguments.on_paused.clone();
    let on_paused = on_paused.map(|command| PausedCommand { command, into, limit, receiver, notes }.hook());
    Ok(DestinationOptions {
        base,
        checkpoint: arguments.checkpoint,
        memory_only: arguments.memory_only,
        on_paused,
        local,
        limits,
    })
}

/// What comes to the thread that does not receive.
#[derive(Clone, Copy)]
struct Inbox<'a> {
    /// Raised by the first signal.
    stop: &'a AtomicBool,
    /// What there is to tell of the command that the VM waits for.
    notes: &'a NoteReceiver<Note>,
    /// How far memory is copied that came as descriptors.
    copying: &'a CopyProgress,
}

/// Receives on a thread of its own, while this one shows progress and heeds signals.
fn watch(
    receiver: &Receiver,
    listener: &Listener,
    destination: &mut SnapshotDestination,
    inbox: Inbox<'_>,
    output: &mut Output,
) -> Result<Result<Received, ReceiveError>, HostError> {
    thread::scope(|scope| {
        let receive = || receiver.receive(listener, destination);
        let receiving = Builder::new().name("receive".into()).spawn_scoped(scope, receive);
        let receiving = receiving.map_err(|source| HostError::Thread { purpose: "receives", source })?;
        let handle = receiver.handle();
        let mut rate = Rate::new();
        let mut printed = None;
        let mut asked = false;
        while !receiving.is_finished() {
            if !asked && inbox.stop.load(Ordering::Relaxed) {
                asked = true;
                give_up(&handle, output);
            }
            tell_notes(inbox.notes, &mut printed, output);
            match inbox.copying.total_bytes() {
                0 => tell_progress(&handle, &mut rate, output),
                data_bytes => tell_copying(inbox.copying.done_bytes(), data_bytes, output),
            }
            thread::sleep(TICK);
        }
        tell_notes(inbox.notes, &mut printed, output);
        Ok(receiving.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
    })
}

/// Tells of the command that the VM waits for: what there is to tell, and what it `printed`.
fn tell_notes(notes: &NoteReceiver<Note>, printed: &mut Option<PipeReader>, output: &Output) {
    printed.iter().for_each(hand_on);
    for note in notes.try_iter() {
        printed.iter().for_each(hand_on);
        *printed = note.tell(output).or(printed.take());
    }
}

fn tell_listening(arguments: &ReceiveArguments, listener: &Listener, output: &Output) {
    let url = listener.url();
    let note = if arguments.checkpoint { CHECKPOINT_NOTE } else { MOVE_NOTE };
    let tls = arguments.tls_dir.as_ref().map_or("", |_| ",tls_dir=DIR");
    output.tell(&Event::Listening { url: url.to_string(), into: &arguments.into }, || {
        format!(
            "Waiting for a source on {url}. On its side:\n\
             \x20 ch-remote --api-socket SOCKET send-migration destination_url={}{tls}\n{note}",
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
    if handle.stop() {
        output.remark("Giving up; the source's VM runs on");
    } else {
        output.remark("Too late to give up: the snapshot is being completed");
    }
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

fn tell_kept(
    arguments: &ReceiveArguments,
    kept: &Kept,
    devices: Option<&[PassThrough]>,
    output: &mut Output,
) {
    let &Kept { digest, confirmed, received_bytes } = kept;
    let (into, checkpoint) = (arguments.into.as_path(), arguments.checkpoint);
    output.result(&Event::Kept { into, digest, checkpoint, confirmed, received_bytes, devices }, || {
        let path = into.display();
        let fate = match (checkpoint, confirmed) {
            (true, _) => "The source was told that the migration failed; its VM runs on",
            (false, true) => "The source was told that the VM has moved",
            (false, false) => {
                "Outcome unknown: the source may not know that the VM has moved; where it still holds the VM, end it there"
            }
        };
        let kept = format!("Kept {path} ({digest}), {} received", HumanBytes(received_bytes));
        [vec![kept], device_lines(devices.unwrap_or_default()), vec![fate.to_owned()]].concat().join("\n")
    });
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
