// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! `vfio-migrate send`: a snapshot directory becomes a VM in a waiting VMM.

use std::process::ExitCode;
use std::sync::Mutex;
use std::time::Duration;

use indicatif::HumanBytes;
use vfio_migration::error::Chain;
use vfio_migration::snapshot::{FullSnapshot, PassThrough, SnapshotSource};
use vfio_migration::tracker::Tracker;
use vfio_migration::transfer::tls::ClientTls;
use vfio_migration::transfer::url::{Endpoint, Url};
use vfio_migration::transfer::{PeerError, SendError, SendOptions, SendStep, Sender, SenderHandle, Sent};

use crate::args::SendArguments;
use crate::devices::refusal_hint;
use crate::event::Event;
use crate::exit::Exit;
use crate::failure::Failure;
use crate::output::Output;
use crate::replacement::read_replacement;
use crate::signals::stop_flag;
use crate::watch::{Watcher, watch};

/// What to do about a receiver on this host that waits for a connection to ask for pages on, and then refuses State.
const ON_DEMAND_HINT: &str =
    "a receiver that was started with memory_mode=postcopy takes no bytes: --local --on-demand sends it so";

/// Sends a snapshot and tells how it goes.
pub(crate) fn send(arguments: &SendArguments) -> ExitCode {
    let mut output = Output::new(arguments.json);
    match try_send(arguments, &mut output) {
        Ok(sent) => {
            tell_sent(arguments, &sent, &mut output);
            ExitCode::SUCCESS
        }
        Err(failure) => output.fail(&failure),
    }
}

fn try_send(arguments: &SendArguments, output: &mut Output) -> Result<Sent, Failure> {
    let stop = stop_flag()?;
    let dir = open(arguments)?;
    let devices = dir.config().devices().to_vec();
    let mut source = SnapshotSource::new(dir)?;
    let sender = Sender::new(options(arguments, &source)?);
    let tracker = Mutex::new(Tracker::builder(source.layout().clone()).build()?);
    let mut handle = sender.handle();
    let send = || sender.send(&mut source, &tracker, &Mutex::default());
    let sent = watch("sends", send, &stop, &mut handle, output)?;
    sent.map_err(|error| failure(error, &devices, &arguments.url))
}

/// Opens the snapshot, with the configuration of `--config` where there is one.
fn open(arguments: &SendArguments) -> Result<FullSnapshot, Failure> {
    let limits = arguments.sizes.of_snapshot();
    let [from] = &arguments.from[..] else {
        let message =
            "Only with --local are several --from one VM; `snapshot apply` makes one snapshot of them"
                .to_owned();
        return Err(Failure { exit: Exit::Usage, message });
    };
    match read_replacement(arguments)? {
        None => Ok(FullSnapshot::open(from, &limits)?),
        Some((text, _)) => Ok(FullSnapshot::open_with_config(from, &text, &limits)?),
    }
}

/// A stored VM stays what it is: nothing is to be resumed or ended here.
fn failure(error: SendError, devices: &[PassThrough], url: &Url) -> Failure {
    let is_local = matches!(url.endpoint(), Endpoint::Unix(_));
    let is_state = matches!(error, SendError::Peer { step: SendStep::State, .. });
    let on_demand = (is_local && is_state).then_some(ON_DEMAND_HINT);
    let refused = matches!(
        error,
        SendError::Peer {
            step: SendStep::Config | SendStep::State,
            source: PeerError::Refused | PeerError::Closed
        }
    );
    let SendError::OutcomeUnknown { source } = error else {
        let Failure { exit, message } = error.into();
        let hint = refusal_hint(devices).or_else(|| on_demand.map(str::to_owned)).filter(|_| refused);
        let hint = hint.map(|hint| format!(" ({hint})"));
        return Failure { exit, message: message + &hint.unwrap_or_default() };
    };
    let message = format!(
        "Outcome unknown: receiver did not answer whether it runs the VM; look there before it is sent again: {}",
        Chain(&source)
    );
    Failure { exit: Exit::OutcomeUnknown, message }
}

fn options(arguments: &SendArguments, source: &SnapshotSource) -> Result<SendOptions, Failure> {
    let options = SendOptions::new(arguments.url.clone())
        .connections(arguments.connections)
        .and_then(|options| options.rate_limit(arguments.bandwidth))
        .map_err(|error| Failure {
            exit: Exit::Usage,
            message: format!("Migration cannot be done as asked: {error}"),
        })?
        .downtime(Duration::from_millis(arguments.downtime_ms))
        .timeout(Duration::from_secs(arguments.timeout_s))
        .timeout_strategy(arguments.timeout_strategy.into())
        .complete_paused(arguments.paused)
        .receiver_reads_zero(source.receiver_reads_zero() && !arguments.all_pages)
        .tls(arguments.tls_dir.as_deref().map(ClientTls::from_directory).transpose()?)
        .limits(arguments.limits());
    Ok(options)
}

impl Watcher for SenderHandle {
    fn stop(&mut self, output: &Output) {
        output.remark(if self.cancel() {
            "Giving up; the receiver drops the VM"
        } else {
            "Too late to give up: waiting for the receiver to say whether it has the VM"
        });
    }

    fn look(&mut self, output: &mut Output) {
        tell_progress(self, output);
    }
}

fn tell_progress(migration: &SenderHandle, output: &mut Output) {
    let progress = migration.progress();
    if progress.ram_bytes == 0 {
        return;
    }
    let event = Event::Sending {
        phase: progress.phase.to_string(),
        round: progress.round,
        ram_bytes: progress.ram_bytes,
        sent_bytes: progress.sent_bytes,
        skipped_bytes: progress.skipped_bytes(),
        left_bytes: progress.left_bytes(),
        bytes_per_second: progress.seen.bandwidth,
    };
    let done = progress.ram_bytes.saturating_sub(progress.left_bytes());
    output.progress(&event, done, Some(progress.ram_bytes), || {
        format!(
            "{}, sent {}, left {}, {}/s",
            progress.phase,
            HumanBytes(progress.sent_bytes),
            HumanBytes(progress.left_bytes()),
            HumanBytes(progress.seen.bandwidth),
        )
    });
}

fn tell_sent(arguments: &SendArguments, sent: &Sent, output: &mut Output) {
    let event = Event::Sent {
        url: arguments.url.to_string(),
        sent_bytes: sent.progress.sent_bytes,
        skipped_bytes: sent.progress.skipped_bytes(),
        rounds: sent.progress.round,
        total_ms: sent.total.as_millis(),
    };
    output.result(&event, || {
        let state = if arguments.paused { "stands paused" } else { "is" };
        format!(
            "Sent {} to {}, where the VM {state} now: {} in {:.1} s; holes of {} and zeros of {} left out",
            arguments.from[0].display(),
            arguments.url,
            HumanBytes(sent.progress.sent_bytes),
            sent.total.as_secs_f64(),
            HumanBytes(sent.progress.skipped_hole_bytes),
            HumanBytes(sent.progress.skipped_zero_bytes),
        )
    });
}
