// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Where the tool says things: results on standard output; a bar, remarks and errors on standard error.

use std::io::{self, Write};
use std::process::ExitCode;
use std::sync::LazyLock;
use std::time::{Duration, Instant};

use indicatif::{MultiProgress, ProgressBar, ProgressStyle};
use serde::Serialize;

use crate::event::Event;
use crate::failure::Failure;

/// The bars on the terminal; whoever else writes there makes them step aside.
static BARS: LazyLock<MultiProgress> = LazyLock::new(MultiProgress::new);

/// How often programs are told of progress.
const PROGRESS_PERIOD: Duration = Duration::from_secs(1);

/// Standard error for the log, without tearing a bar.
#[derive(Debug)]
pub(crate) struct LogSink;

impl Write for LogSink {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        BARS.suspend(|| io::stderr().write(bytes))
    }

    fn flush(&mut self) -> io::Result<()> {
        io::stderr().flush()
    }
}

/// What one command tells, to a person or to a program.
#[derive(Debug)]
pub(crate) struct Output {
    json: bool,
    bar: Option<ProgressBar>,
    told: Instant,
}

impl Output {
    /// Talks to a program where `json` is set: JSON lines on standard output instead of sentences, and no bar.
    pub(crate) fn new(json: bool) -> Self {
        Self { json, bar: None, told: Instant::now() }
    }

    /// Tells what happened: `event` to a program, `text` to a person.
    pub(crate) fn tell(&self, event: &Event<'_>, text: impl FnOnce() -> String) {
        if self.json {
            print_json(event);
        } else {
            self.remark(&text());
        }
    }

    /// Tells a person something that is no result.
    pub(crate) fn remark(&self, text: &str) {
        BARS.suspend(|| eprintln!("{text}"));
    }

    /// Tells the result: `result` to a program, `text` to a person.
    pub(crate) fn result(&mut self, result: &impl Serialize, text: impl FnOnce() -> String) {
        self.clear();
        if self.json {
            print_json(result);
        } else {
            println!("{}", text());
        }
    }

    /// Shows progress: a bar, `position` of `length` bytes or a spinner where the length is unknown, or now and then `event`.
    pub(crate) fn progress(
        &mut self,
        event: &Event<'_>,
        position: u64,
        length: Option<u64>,
        message: impl FnOnce() -> String,
    ) {
        if self.json {
            if self.told.elapsed() >= PROGRESS_PERIOD {
                self.told = Instant::now();
                print_json(event);
            }
            return;
        }
        let bar = self.bar.get_or_insert_with(|| BARS.add(bar(length.is_some())));
        if let Some(length) = length {
            bar.set_length(length);
        }
        bar.set_position(position);
        bar.set_message(message());
        bar.tick();
    }

    /// Tells that the command failed; returns its exit status.
    pub(crate) fn fail(&mut self, failure: &Failure) -> ExitCode {
        self.clear();
        if self.json {
            let Failure { exit, message } = failure;
            print_json(&Event::Failed { class: *exit, exit: *exit as u8, message });
        }
        self.remark(&format!("error: {}", failure.message));
        failure.exit.into()
    }

    fn clear(&mut self) {
        if let Some(bar) = self.bar.take() {
            bar.finish_and_clear();
        }
    }
}

fn bar(bounded: bool) -> ProgressBar {
    let template = if bounded { "{bar:30} {percent:>3}% {msg}" } else { "{spinner} {msg}" };
    let style = ProgressStyle::with_template(template).expect("a literal template");
    ProgressBar::no_length().with_style(style)
}

fn print_json(value: &impl Serialize) {
    let text = serde_json::to_string(value).expect("what is told is plain data");
    // Nobody may listen any more; that is no reason to leave the work undone.
    let _ = writeln!(io::stdout(), "{text}");
}
