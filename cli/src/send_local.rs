// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! `vfio-migrate send --local`: a stored VM's memory goes to a VMM on this host as descriptors.

use std::process::ExitCode;
use std::thread;
use std::time::Duration;

use indicatif::HumanBytes;
use vfio_migration::error::Chain;
use vfio_migration::offload::{
    FaultProgress, LocalSendError, LocalSendOptions, LocalSendProgress, LocalSender, LocalSenderHandle,
    LocalSent,
};
use vfio_migration::snapshot::{PassThrough, SnapshotChain};
use vfio_migration::transfer::frame::Command;
use vfio_migration::transfer::url::Endpoint;

use crate::args::SendArguments;
use crate::devices::refusal_hint;
use crate::event::{Event, Faults};
use crate::exit::Exit;
use crate::failure::Failure;
use crate::output::Output;
use crate::replacement::read_replacement;
use crate::signals::{exit, stop_flag_or};
use crate::watch::{Watcher, watch};

/// How long a page may be waited for before that is told.
const SLOW: Duration = Duration::from_secs(3);

/// How long a sender may take to say that the VM was ended on request.
const LAST_WORDS: Duration = Duration::from_secs(2);

/// What a receiver may lack that refused State before it asked for a page.
const NO_FAULT_HINT: &str = "it asked for no page: without memory_mode=postcopy a receiver takes no memory on demand, only without --on-demand";

/// Sends the VM, and tells how it goes.
pub(crate) fn send_local(arguments: &SendArguments) -> ExitCode {
    let mut output = Output::new(arguments.json);
    match try_send(arguments, &mut output) {
        Ok(sent) => {
            tell_sent(arguments, sent, &mut output);
            ExitCode::SUCCESS
        }
        Err(failure) => output.fail(&failure),
    }
}

fn try_send(arguments: &SendArguments, output: &mut Output) -> Result<LocalSent, Failure> {
    if !matches!(arguments.url.endpoint(), Endpoint::Unix(_)) {
        let message = "Descriptors pass over a UNIX socket only (unix:PATH)".to_owned();
        return Err(Failure { exit: Exit::Usage, message });
    }
    let snapshot_limits = arguments.sizes.of_snapshot();
    let config = read_replacement(arguments)?.map(|(_, config)| config);
    let chain = SnapshotChain::open(&arguments.from, &snapshot_limits)?;
    let devices = config.as_ref().unwrap_or(chain.config()).devices().to_vec();
    let (paused, on_demand, limits) = (arguments.paused, arguments.on_demand, arguments.limits());
    let options = LocalSendOptions { config, paused, on_demand, limits, snapshot_limits };
    let sender = LocalSender::new(chain, options)?;
    let (handle, looked_at) = (sender.handle(), sender.handle());
    let stop = stop_flag_or(move || {
        if on_demand && handle.is_too_late() {
            handle.abort();
            // The VM has ended; the sender may say so, unless it waits for a disk.
            thread::sleep(LAST_WORDS);
        }
        exit();
    })?;
    let mut watched = Watched { arguments, handle: sender.handle(), handed_over: false, slow: false };
    let sent = watch("sends", move || sender.send(&arguments.url), &stop, &mut watched, output)?;
    let asks_for_none = on_demand && looked_at.progress().faults.served == 0;
    sent.map_err(|error| failure(error, &devices, asks_for_none))
}

/// A sender that is looked at.
struct Watched<'a> {
    arguments: &'a SendArguments,
    handle: LocalSenderHandle,
    /// Whether it was told that the VM was handed over, and that a page is slow to come.
    handed_over: bool,
    slow: bool,
}

impl Watcher for Watched<'_> {
    fn stop(&mut self, output: &Output) {
        tell_stopping(&self.handle, self.arguments.on_demand, output);
    }

    fn look(&mut self, output: &mut Output) {
        let progress = self.handle.progress();
        if let Some(took) = progress.handed_over.filter(|_| self.arguments.on_demand && !self.handed_over) {
            self.handed_over = true;
            tell_handed_over(self.arguments, took, output);
        }
        let is_slow = progress.faults.waiting.is_some_and(|waiting| waiting >= SLOW);
        if is_slow && !self.slow {
            output.remark(
                "The VM waits for a page that cannot be read yet: does the disk of the snapshot answer?",
            );
        }
        self.slow = is_slow;
        tell_progress(&progress, output);
    }
}

fn tell_stopping(handle: &LocalSenderHandle, on_demand: bool, output: &Output) {
    output.remark(if handle.cancel() {
        "Giving up; the receiver gets no VM"
    } else if on_demand {
        "Too late to give up: the VM needs the rest of its memory, and this ends with the last page; a second signal ends the VM"
    } else {
        "Too late to give up: waiting for the receiver to say whether it has the VM"
    });
}

fn tell_handed_over(arguments: &SendArguments, took: Duration, output: &Output) {
    let event = Event::HandedOver { url: arguments.url.to_string(), took_ms: took.as_millis() };
    output.tell(&event, || {
        let state = if arguments.paused { "stands paused" } else { "runs" };
        format!(
            "The VM {state} at {} after {:.3} s; the rest of its memory follows",
            arguments.url,
            took.as_secs_f64()
        )
    });
}

fn tell_progress(progress: &LocalSendProgress, output: &mut Output) {
    let (ram_bytes, filled_bytes) = (progress.ram_bytes, progress.filled_bytes);
    if ram_bytes == 0 {
        return;
    }
    if progress.handed_over.is_some() {
        let faults = &progress.faults;
        let event = Event::Serving(Faults::of(progress));
        output.progress(&event, faults.asked_bytes, Some(ram_bytes), || told(faults));
        return;
    }
    output.progress(&Event::Filling { ram_bytes, filled_bytes }, filled_bytes, Some(ram_bytes), || {
        format!("filled {} of at most {}", HumanBytes(filled_bytes), HumanBytes(ram_bytes))
    });
}

/// Faults in words.
fn told(faults: &FaultProgress) -> String {
    format!(
        "{} faults served, half in {:?}, 99 of 100 in {:?}; {} ahead",
        faults.served,
        faults.median,
        faults.percentile_99th,
        HumanBytes(faults.ahead_bytes),
    )
}

/// A stored VM stays what it is: nothing is to be resumed or ended here.
fn failure(error: LocalSendError, devices: &[PassThrough], asks_for_none: bool) -> Failure {
    if error.is_outcome_unknown() {
        let why = match error {
            LocalSendError::Unasked { .. } => "the VM may have ended",
            _ => "receiver did not answer whether it runs the VM",
        };
        let message =
            format!("Outcome unknown: {why}; look there before it is sent again: {}", Chain(&error));
        return Failure { exit: Exit::OutcomeUnknown, message };
    }
    let refused = matches!(error, LocalSendError::Refused { .. } | LocalSendError::Closed { .. });
    let is_state = matches!(error, LocalSendError::Refused { command } if command == Command::State);
    let asks_for_none = (asks_for_none && is_state).then_some(NO_FAULT_HINT);
    let Failure { exit, message } = error.into();
    let hint = refusal_hint(devices).or_else(|| asks_for_none.map(str::to_owned));
    let hint = hint.filter(|_| refused).map(|hint| format!(" ({hint})"));
    Failure { exit, message: message + &hint.unwrap_or_default() }
}

fn tell_sent(arguments: &SendArguments, sent: LocalSent, output: &mut Output) {
    let progress = sent.progress;
    let event = Event::Passed {
        url: arguments.url.to_string(),
        ram_bytes: progress.ram_bytes,
        filled_bytes: progress.filled_bytes,
        total_ms: sent.took.as_millis(),
        faults: arguments.on_demand.then(|| Faults::of(&progress)),
    };
    output.result(&event, || {
        let state = if arguments.paused { "stands paused now" } else { "is now" };
        let from: Vec<_> = arguments.from.iter().map(|dir| dir.display().to_string()).collect();
        let passed = format!(
            "Passed {} to {}, where the VM {state}: {} of its {} filled in {:.1} s, the rest is zeros",
            from.join(" + "),
            arguments.url,
            HumanBytes(progress.filled_bytes),
            HumanBytes(progress.ram_bytes),
            sent.took.as_secs_f64(),
        );
        let Some(last_page) = progress.faults.last_page.filter(|_| arguments.on_demand) else {
            return passed;
        };
        let last_page = last_page.as_secs_f64();
        format!("{passed}; last page written after {last_page:.1} s, {}", told(&progress.faults))
    });
}
