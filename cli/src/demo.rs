// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Printing of the demo: a live bar, then a report or one JSON object.

use std::fmt::Write;
use std::process::ExitCode;
use std::sync::atomic::AtomicBool;

use env_logger::{Builder, Env, Target};
use indicatif::HumanBytes;
use serde_json::json;
use vfio_migration::error::Chain;
use vfio_migration_integration::demo::{
    DemoError, DemoOptions, LOG_VARIABLE, Note, PROCESS_ARGUMENT, Progress, Report, process_main, run,
};

use crate::args::demo::DemoArguments;
use crate::exit::Exit;
use crate::output::{Output, counted};
use crate::signals::stop_flag;

/// Where this process is one that a demo started, is that: the demo runs this program again for each.
pub(crate) fn process(sink: Target) -> Option<ExitCode> {
    if std::env::args_os().nth(1).is_none_or(|word| word != PROCESS_ARGUMENT) {
        return None;
    }
    Builder::from_env(Env::new().filter_or(LOG_VARIABLE, "warn")).target(sink).init();
    Some(process_main())
}

/// Runs the demo and prints how it goes.
pub(crate) fn demo(arguments: DemoArguments) -> ExitCode {
    let mut output = Output::new(arguments.json);
    let stop = match stop_flag() {
        Ok(stop) => stop,
        Err(error) => return refuse(&Chain(&error).to_string(), Exit::Io, &mut output),
    };
    match try_demo(arguments, &stop, &mut output) {
        Ok(report) => {
            output.result(&report, || text(&report));
            ExitCode::SUCCESS
        }
        Err(error) => fail(&error, &mut output),
    }
}

fn try_demo(arguments: DemoArguments, stop: &AtomicBool, output: &mut Output) -> Result<Report, DemoError> {
    let json = arguments.json;
    let options = DemoOptions {
        program: std::env::current_exe().map_err(DemoError::Spawn)?,
        log_level: log::max_level().to_string(),
        memory_bytes: arguments.memory,
        sparse: arguments.sparse,
        guest_dirty_rate: arguments.guest_dirty_rate,
        device_dirty_rate: arguments.device_dirty_rate,
        device_state_bytes: arguments.device_state,
        device_state_changes_per_second: arguments.device_state / 100
            * u64::from(arguments.device_state_changes),
        downtime_ms: arguments.downtime_ms,
        timeout_s: arguments.timeout_s,
        transport: arguments.transport,
        no_kvm: arguments.no_kvm,
        seed: arguments.seed,
        inject: arguments.inject,
    };
    run(&options, stop, &mut |note| match note {
        Note::Said(text) => output.remark(&text),
        Note::Progress(progress) if !json => draw(&progress, output),
        Note::Progress(_) => {}
        Note::Moved => output.clear(),
    })
}

/// Draws how far the migration is.
fn draw(progress: &Progress, output: &mut Output) {
    let downtime = match progress.expected_downtime_ms {
        Some(ms) => format!("{ms} ms"),
        None => "unknown".to_owned(),
    };
    let message = format!(
        "round {}, sent {}, left {}, {}/s, expected downtime {downtime}",
        progress.round,
        HumanBytes(progress.sent_bytes),
        HumanBytes(progress.left_bytes),
        HumanBytes(progress.bytes_per_second),
    );
    output.draw(progress.sent_bytes, Some(progress.sent_bytes + progress.left_bytes), message);
}

/// The report for a person, with no line break at its end.
fn text(report: &Report) -> String {
    let mut text = String::new();
    write_figures(report, &mut text).expect("memory takes every write");
    text.truncate(text.trim_end().len());
    text
}

fn write_figures(report: &Report, text: &mut String) -> std::fmt::Result {
    let guest = if report.kvm { "KVM guest" } else { "guest on a software vCPU (no KVM)" };
    let (ram, rounds) = (HumanBytes(report.ram_bytes), counted(report.rounds, "round"));
    writeln!(text, "Moved a {guest} with {ram} of RAM in {rounds}")?;
    writeln!(
        text,
        "  {} over the wire, {} of RAM dirtied on the way; downtime {:.1} ms, total {:.1} ms",
        HumanBytes(report.bytes_sent),
        HumanBytes(report.unique_dirty_bytes),
        report.downtime_ms,
        report.total_ms
    )?;
    let parts = report.downtime.parts().map(|(name, ms)| format!("{name} {ms:.1}"));
    writeln!(text, "  downtime in ms: {}", parts.join(", "))?;
    writeln!(
        text,
        "  left out of the first round: {} that nobody ever wrote, {} that reads zero",
        HumanBytes(report.skipped_hole_bytes),
        HumanBytes(report.skipped_zero_bytes)
    )?;
    writeln!(
        text,
        "  device state {}, {} of it before the switchover; the rest took {:.1} ms, beside the last pages",
        HumanBytes(report.device.state_bytes),
        HumanBytes(report.device.precopy_bytes),
        report.device.downtime_ms
    )?;
    writeln!(text, "\n  {:<20} {:>12} {:>17}", "who dirtied", "pages", "only they dirtied")?;
    for source in &report.sources {
        writeln!(text, "  {:<20} {:>12} {:>17}", source.id, source.pages, source.exclusive_pages)?;
    }
    write_outcome(report, text)
}

fn write_outcome(report: &Report, text: &mut String) -> std::fmt::Result {
    for degradation in &report.degradations {
        writeln!(text, "  degraded: {degradation}")?;
    }
    writeln!(text, "\n  {} compared at the switchover", counted(report.pages_compared, "page"))?;
    writeln!(text, "  source      {}", report.source_digest)?;
    writeln!(text, "  destination {}", report.destination_digest)?;
    if report.verified {
        writeln!(text, "verified: every byte equal; the guest and the device go on where they stopped")?;
    }
    Ok(())
}

/// Tells that there is no report, and why.
fn refuse(message: &str, exit: Exit, output: &mut Output) -> ExitCode {
    if output.is_json() {
        output.result(&json!({ "verified": false, "error": message }), String::new);
    }
    output.remark(&format!("error: {message}"));
    exit.into()
}

fn fail(error: &DemoError, output: &mut Output) -> ExitCode {
    let exit = match error {
        DemoError::Contradiction(_)
        | DemoError::NoSuchSource { .. }
        | DemoError::HostTooSmall { .. }
        | DemoError::Memory(_) => Exit::Usage,
        DemoError::Migration { .. }
        | DemoError::NotKilled { .. }
        | DemoError::Survived { .. }
        | DemoError::TooEarly { .. } => Exit::Peer,
        DemoError::Different { .. } | DemoError::Unwell { .. } | DemoError::SourceUnwell { .. } => {
            Exit::Verification
        }
        DemoError::Cancelled { .. } => Exit::Cancelled,
        _ => Exit::Io,
    };
    if let DemoError::Different { report, .. } | DemoError::Unwell { report, .. } = error {
        output.result(report, || text(report));
        output.remark(&format!("error: {}", Chain(error)));
        return exit.into();
    }
    refuse(&Chain(error).to_string(), exit, output)
}
