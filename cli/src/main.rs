// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! `vfio-migrate`: live-migrates, stores and checks VMs with pass-through devices.

mod args;
#[cfg(feature = "demo")]
mod demo;
mod devices;
mod event;
mod exit;
mod failure;
mod group;
mod host;
mod manager;
mod on_paused;
mod output;
mod printer;
mod probe;
mod receive;
mod replacement;
mod send;
mod send_local;
mod serve;
mod shell;
mod signals;
mod snapshot;
mod terminal;
mod watch;

use std::process::ExitCode;

use clap::Parser;
use env_logger::{Builder, Target};

use args::{Arguments, Command};
use exit::Exit;
use output::{LogSink, finish};
use printer::Reader;

fn main() -> ExitCode {
    signals::survive_file_size_limit();
    #[cfg(feature = "demo")]
    if let Some(code) = demo::process(log_sink()) {
        finish(Reader::Any);
        return code;
    }
    match Arguments::try_parse() {
        Ok(Arguments { log_level, command }) => {
            Builder::new().filter_level(log_level).target(log_sink()).init();
            run(command)
        }
        Err(error) => {
            let code = output::usage(&error);
            finish(Reader::Pager);
            code
        }
    }
}

fn log_sink() -> Target {
    Target::Pipe(Box::new(LogSink))
}

fn run(command: Command) -> ExitCode {
    let (reader, prints) = match &command {
        Command::Receive(_) | Command::Send(_) => (Reader::Any, false),
        #[cfg(feature = "demo")]
        Command::Demo(_) => (Reader::Any, false),
        Command::Snapshot(_) | Command::Probe { .. } => (Reader::Pager, false),
        Command::Completions { .. } | Command::Man { .. } => (Reader::Pager, true),
    };
    let code = match command {
        Command::Receive(arguments) => receive::receive(&arguments),
        Command::Send(arguments) if arguments.local => send_local::send_local(&arguments),
        Command::Send(arguments) => send::send(&arguments),
        Command::Snapshot(command) => snapshot::snapshot(&command),
        #[cfg(feature = "demo")]
        Command::Demo(arguments) => demo::demo(arguments),
        Command::Probe { json } => probe::probe(json),
        Command::Completions { shell } => shell::completions(shell),
        Command::Man { into } => shell::man(into.as_deref()),
    };
    // Only where to print is the work itself does it matter that somebody got it.
    if finish(reader) || !prints { code } else { Exit::Io.into() }
}
