// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What the tool says: results on standard output; a bar, remarks and errors on standard error.
//!
//! Nothing here waits for whoever reads, and nothing here fails: that output cannot be written is no reason to leave a VM
//! paused or the work undone.

use std::io::{self, IsTerminal, Write};
use std::path::Path;
use std::process::ExitCode;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;

use crate::event::Event;
use crate::exit::Exit;
use crate::failure::Failure;
use crate::printer::{Reader, STDERR, STDOUT};
use crate::terminal::BARS;

/// How often programs are told of progress.
const PROGRESS_PERIOD: Duration = Duration::from_secs(1);

/// Standard error for the log, without tearing a bar. Where nobody reads it, lines are left out and counted.
#[derive(Debug)]
pub(crate) struct LogSink;

/// Lines that were left out since the last one that was not.
static LEFT_OUT: AtomicU64 = AtomicU64::new(0);

impl Write for LogSink {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let lost = LEFT_OUT.swap(0, Ordering::Relaxed);
        let mut text = Vec::new();
        if lost > 0 {
            text = format!("({} left out here, which nobody read)\n", counted(lost, "message")).into_bytes();
        }
        text.extend_from_slice(bytes);
        if !BARS.suspend(|| STDERR.offer(text)) {
            LEFT_OUT.fetch_add(lost + 1, Ordering::Relaxed);
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// A number of things: `1 range`, `2 ranges`.
pub(crate) fn counted(number: impl Into<u64>, thing: &str) -> String {
    match number.into() {
        1 => format!("1 {thing}"),
        number => format!("{number} {thing}s"),
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

    /// Whether a program is talked to.
    #[cfg(feature = "demo")]
    pub(crate) fn is_json(&self) -> bool {
        self.json
    }

    /// Checks that a program can be told of `path`: JSON has room for UTF-8 alone.
    pub(crate) fn check_name(&self, path: &Path) -> Result<(), Failure> {
        if !self.json || path.to_str().is_some() {
            return Ok(());
        }
        let message = format!(
            "Cannot name {} in JSON: it is not UTF-8; leave --json out, or rename it",
            path.display()
        );
        Err(Failure { exit: Exit::Usage, message })
    }

    /// Tells what happened: `event` to a program, `text` to a person.
    pub(crate) fn tell(&self, event: &Event<'_>, text: impl FnOnce() -> String) {
        if self.json {
            STDOUT.print(json_line(event));
        } else {
            self.remark(&text());
        }
    }

    /// Tells a person something that is no result.
    pub(crate) fn remark(&self, text: &str) {
        BARS.suspend(|| STDERR.print(format!("{text}\n")));
    }

    /// Tells the result: `result` to a program, `text` to a person.
    pub(crate) fn result(&mut self, result: &impl Serialize, text: impl FnOnce() -> String) {
        self.clear();
        STDOUT.print(if self.json { json_line(result) } else { text() + "\n" });
    }

    /// Shows progress: a bar, `position` of `length` bytes or a spinner where the length is unknown, or now and then `event`.
    pub(crate) fn progress(
        &mut self,
        event: &Event<'_>,
        position: u64,
        length: Option<u64>,
        message: impl FnOnce() -> String,
    ) {
        if !self.json {
            self.draw(position, length, message());
        } else if self.told.elapsed() >= PROGRESS_PERIOD {
            self.told = Instant::now();
            // Where nobody reads, the next one makes good for it.
            STDOUT.offer(json_line(event));
        }
    }

    /// Draws a bar, or a spinner where the length is unknown.
    pub(crate) fn draw(&mut self, position: u64, length: Option<u64>, message: String) {
        let bar = self.bar.get_or_insert_with(|| BARS.add(bar(length)));
        length.into_iter().for_each(|length| bar.set_length(length));
        bar.set_message(message);
        bar.set_position(position);
    }

    /// Tells that the command failed; returns its exit status.
    pub(crate) fn fail(&mut self, failure: &Failure) -> ExitCode {
        self.clear();
        let Failure { exit, message } = failure;
        if self.json {
            STDOUT.print(json_line(&Event::Failed { class: *exit, exit: *exit as u8, message }));
        }
        self.remark(&format!("error: {message}"));
        (*exit).into()
    }

    /// Takes the bar away.
    pub(crate) fn clear(&mut self) {
        if let Some(bar) = self.bar.take() {
            bar.finish_and_clear();
        }
    }
}

/// Prints what the parser of the command line says; returns the exit status.
pub(crate) fn usage(error: &clap::Error) -> ExitCode {
    let (printer, is_terminal) = match error.use_stderr() {
        true => (&STDERR, io::stderr().is_terminal()),
        false => (&STDOUT, io::stdout().is_terminal()),
    };
    let text = error.render();
    printer.print(if is_terminal { text.ansi().to_string() } else { text.to_string() });
    ExitCode::from(u8::try_from(error.exit_code()).unwrap_or(Exit::Usage as u8))
}

/// Waits until all that was said is written, as far as anybody reads it; returns whether standard output is complete.
pub(crate) fn finish(reader: Reader) -> bool {
    let written = STDOUT.finish(reader);
    match &written {
        Err(unwritten) if !unwritten.is_enough() => {
            STDERR.print(format!("Cannot write all of standard output: {unwritten}\n"));
        }
        _ => {}
    }
    // Nobody is left to be told.
    let _unwritten = STDERR.finish(Reader::Any);
    written.map_or_else(|unwritten| unwritten.is_enough(), |()| true)
}

fn bar(length: Option<u64>) -> ProgressBar {
    let template =
        if length.is_some() { "{bar:30} {percent:>3}% {wide_msg}" } else { "{spinner} {wide_msg}" };
    let style = ProgressStyle::with_template(template).expect("a literal template");
    ProgressBar::no_length().with_style(style)
}

fn json_line(value: &impl Serialize) -> String {
    // A name that is not UTF-8 is refused at the start; should one slip through, the work is not undone for it.
    let text = serde_json::to_string(value)
        .unwrap_or_else(|error| serde_json::json!({ "error": error.to_string() }).to_string());
    text + "\n"
}
