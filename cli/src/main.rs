// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! `vfio-migrate`: live-migrates, stores and checks VMs with pass-through devices.
#![expect(clippy::print_stdout, reason = "a command-line tool prints")]

mod args;
mod demo;
mod event;
mod exit;
mod failure;
mod group;
mod on_paused;
mod output;
mod probe;
mod receive;
mod send;
mod shell;
mod signals;
mod snapshot;

use std::process::ExitCode;

use clap::Parser;
use env_logger::Target;

use args::{Arguments, Command};
use output::LogSink;
use vfio_migration_integration::demo::{LOG_VARIABLE, PROCESS_ARGUMENT, process_main};

fn main() -> ExitCode {
    if std::env::args_os().nth(1).is_some_and(|word| word == PROCESS_ARGUMENT) {
        env_logger::init_from_env(env_logger::Env::new().filter_or(LOG_VARIABLE, "warn"));
        return process_main();
    }
    let Arguments { log_level, command } = Arguments::parse();
    let sink = Target::Pipe(Box::new(LogSink));
    env_logger::Builder::new().filter_level(log_level).target(sink).init();
    match command {
        Command::Receive(arguments) => receive::receive(&arguments),
        Command::Send(arguments) => send::send(&arguments),
        Command::Snapshot(command) => snapshot::snapshot(&command),
        Command::Demo(arguments) => demo::demo(arguments, log_level),
        Command::Probe { json } => probe::probe(json),
        Command::Completions { shell } => shell::completions(shell),
        Command::Man { into } => shell::man(into.as_deref()),
    }
}
