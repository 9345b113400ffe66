// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! `vfio-migrate`: live-migrates, stores and checks VMs with pass-through devices.
#![expect(clippy::print_stdout, reason = "a command-line tool prints")]

mod args;
mod demo;
mod exit;
mod probe;
mod signals;

use std::process::ExitCode;

use clap::Parser;

use args::{Arguments, Command};
use vfio_migration_integration::demo::{LOG_VARIABLE, PROCESS_ARGUMENT, process_main};

fn main() -> ExitCode {
    if std::env::args_os().nth(1).is_some_and(|word| word == PROCESS_ARGUMENT) {
        env_logger::init_from_env(env_logger::Env::new().filter_or(LOG_VARIABLE, "warn"));
        return process_main();
    }
    let arguments = Arguments::parse();
    env_logger::Builder::new().filter_level(arguments.log_level).init();
    match arguments.command {
        Command::Demo(options) => demo::demo(options, arguments.log_level),
        Command::Probe { json } => probe::probe(json),
    }
}
