// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! `vfio-migrate`: live-migrates, stores and checks VMs with pass-through devices.

mod args;
mod demo;
mod devices;
mod event;
mod exit;
mod failure;
mod group;
mod host;
mod on_paused;
mod output;
mod printer;
mod probe;
mod receive;
mod send;
mod shell;
mod signals;
mod snapshot;
mod terminal;

use std::process::ExitCode;

use clap::Parser;
use env_logger::{Builder, Env, Target};

use args::{Arguments, Command};
use exit::Exit;
use output::{LogSink, finish};
use printer::Reader;
use vfio_migration_integration::demo::{LOG_VARIABLE, PROCESS_ARGUMENT, process_main};

fn main() -> ExitCode {
    signals::survive_file_size_limit();
    let sink = Target::Pipe(Box::new(LogSink));
    if std::env::args_os().nth(1).is_some_and(|word| word == PROCESS_ARGUMENT) {
        Builder::from_env(Env::new().filter_or(LOG_VARIABLE, "warn")).target(sink).init();
        let code = process_main();
        finish(Reader::Any);
        return code;
    }
    match Arguments::try_parse() {
        Ok(Arguments { log_level, command }) => {
            Builder::new().filter_level(log_level).target(sink).init();
            run(command, log_level)
        }
        Err(error) => {
            let code = output::usage(&error);
            finish(Reader::Pager);
            code
        }
    }
}

fn run(command: Command, log_level: log::LevelFilter) -> ExitCode {
    let (reader, prints) = match &command {
        Command::Receive(_) | Command::Send(_) | Command::Demo(_) => (Reader::Any, false),
        Command::Snapshot(_) | Command::Probe { .. } => (Reader::Pager, false),
        Command::Completions { .. } | Command::Man { .. } => (Reader::Pager, true),
    };
    let code = match command {
        Command::Receive(arguments) => receive::receive(&arguments),
        Command::Send(arguments) => send::send(&arguments),
        Command::Snapshot(command) => snapshot::snapshot(&command),
        Command::Demo(arguments) => demo::demo(arguments, log_level),
        Command::Probe { json } => probe::probe(json),
        Command::Completions { shell } => shell::completions(shell),
        Command::Man { into } => shell::man(into.as_deref()),
    };
    // Only where to print is the work itself does it matter that somebody got it.
    if finish(reader) || !prints { code } else { Exit::Io.into() }
}
