// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Printing of the demo: a live bar, then a report or one JSON object.

use std::process::ExitCode;

use indicatif::{HumanBytes, ProgressBar, ProgressDrawTarget, ProgressStyle};
use log::LevelFilter;
use vfio_migration_integration::demo::{DemoError, DemoOptions, Note, Progress, Report, chain, run};

use crate::args::DemoArguments;
use crate::exit::Exit;
use crate::signals::stop_flag;

/// Runs the demo and prints how it goes.
pub(crate) fn demo(arguments: DemoArguments, log_level: LevelFilter) -> ExitCode {
    let json = arguments.json;
    match try_demo(arguments, log_level) {
        Ok(report) => {
            print(&report, json);
            ExitCode::SUCCESS
        }
        Err(error) => fail(&error, json),
    }
}

fn try_demo(arguments: DemoArguments, log_level: LevelFilter) -> Result<Report, DemoError> {
    let stop = stop_flag().map_err(DemoError::Spawn)?;
    let mut display = Display::new(arguments.json);
    let options = DemoOptions {
        program: std::env::current_exe().map_err(DemoError::Spawn)?,
        log_level: log_level.to_string(),
        memory_bytes: arguments.memory,
        guest_dirty_rate: arguments.guest_dirty_rate,
        device_dirty_rate: arguments.device_dirty_rate,
        device_state_bytes: arguments.device_state,
        downtime_ms: arguments.downtime_ms,
        timeout_s: arguments.timeout_s,
        transport: arguments.transport,
        no_kvm: arguments.no_kvm,
        seed: arguments.seed,
        inject: arguments.inject,
    };
    let report = run(&options, &stop, &mut |note| display.show(&note));
    display.finish();
    report
}

/// Lines and the live bar, on stderr.
struct Display {
    bar: Option<ProgressBar>,
    json: bool,
}

impl Display {
    fn new(json: bool) -> Self {
        Self { bar: None, json }
    }

    fn show(&mut self, note: &Note) {
        match note {
            Note::Said(text) => match &self.bar {
                Some(bar) => bar.suspend(|| eprintln!("{text}")),
                None => eprintln!("{text}"),
            },
            Note::Progress(progress) if !self.json => self.advance(progress),
            Note::Progress(_) => {}
            Note::Moved => self.finish(),
        }
    }

    fn advance(&mut self, progress: &Progress) {
        let bar = self.bar.get_or_insert_with(|| {
            let style = ProgressStyle::with_template("{bar:30} {msg}").expect("a literal template");
            ProgressBar::with_draw_target(Some(1), ProgressDrawTarget::stderr()).with_style(style)
        });
        bar.set_length(progress.sent_bytes + progress.left_bytes);
        bar.set_position(progress.sent_bytes);
        let downtime = match progress.expected_downtime_ms {
            Some(ms) => format!("{ms} ms"),
            None => "unknown".to_owned(),
        };
        bar.set_message(format!(
            "round {}, sent {}, left {}, {}/s, expected downtime {downtime}",
            progress.round,
            HumanBytes(progress.sent_bytes),
            HumanBytes(progress.left_bytes),
            HumanBytes(progress.bytes_per_second),
        ));
    }

    fn finish(&mut self) {
        if let Some(bar) = self.bar.take() {
            bar.finish();
        }
    }
}

fn print(report: &Report, json: bool) {
    if json {
        println!("{}", serde_json::to_string(report).expect("a report is plain data"));
        return;
    }
    let guest = if report.kvm { "KVM guest" } else { "guest on a software vCPU (no KVM)" };
    println!("Moved a {guest} with {} of RAM in {} rounds", HumanBytes(report.ram_bytes), report.rounds);
    println!(
        "  {} over the wire, {} of RAM dirtied on the way; downtime {:.1} ms, total {:.1} ms",
        HumanBytes(report.bytes_sent),
        HumanBytes(report.unique_dirty_bytes),
        report.downtime_ms,
        report.total_ms
    );
    let parts = report.downtime.parts().map(|(name, ms)| format!("{name} {ms:.1}"));
    println!("  downtime in ms: {}", parts.join(", "));
    println!(
        "  left out of the first round: {} that nobody ever wrote, {} that reads zero",
        HumanBytes(report.skipped_hole_bytes),
        HumanBytes(report.skipped_zero_bytes)
    );
    println!(
        "  device state {}, {} of it before the switchover",
        HumanBytes(report.device.state_bytes),
        HumanBytes(report.device.precopy_bytes)
    );
    println!("\n  {:<20} {:>12} {:>17}", "who dirtied", "pages", "only they dirtied");
    for source in &report.sources {
        println!("  {:<20} {:>12} {:>17}", source.id, source.pages, source.exclusive_pages);
    }
    for degradation in &report.degradations {
        println!("  degraded: {degradation}");
    }
    println!("\n  {} pages compared at the switchover", report.pages_compared);
    println!("  source      {}", report.source_digest);
    println!("  destination {}", report.destination_digest);
    if report.verified {
        println!("verified: every byte equal; the guest and the device go on where they stopped");
    }
}

fn fail(error: &DemoError, json: bool) -> ExitCode {
    if let DemoError::Different { report, .. } | DemoError::Unwell { report, .. } = error {
        print(report, json);
    }
    let text = chain(error);
    if json && !matches!(error, DemoError::Different { .. } | DemoError::Unwell { .. }) {
        println!("{}", serde_json::json!({ "verified": false, "error": &text }));
    }
    eprintln!("error: {text}");
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
    exit.into()
}
