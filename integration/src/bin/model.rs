// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Explores all that can happen in a migration, with the library's own ledger, cursors, journals and device states.

use std::io::{self, Write};
use std::process::ExitCode;

use clap::{Parser, ValueEnum};
use vfio_migration_integration::model::{LARGE, Mutation, SMALL, Scenario, explore};

/// Exit status where a mistake that was made on purpose was not found.
const NOT_FOUND: u8 = 3;

const EXIT_STATUS: &str = "Exit status:
  0  nothing that must not happen can happen; of --list: done
  1  it can: the shortest way to it is printed
  2  usage
  3  the mistake of --mutation was made, and the scenario does not find it: each shows in one of them, which is the one explored
     unless --scenario names another";

/// Explores all that can happen in a migration: no page is lost, and never do two VMs run.
#[derive(Debug, Parser)]
#[command(after_help = EXIT_STATUS)]
struct Arguments {
    /// List the mutations, one a line.
    #[arg(long, exclusive = true)]
    list: bool,
    /// Make one mistake, which has to be found: one that --list prints.
    #[arg(long, value_name = "NAME", hide_possible_values = true)]
    mutation: Option<Mutation>,
    /// Explore only this scenario.
    #[arg(long, value_name = "NAME", value_parser = names())]
    scenario: Option<String>,
}

fn scenarios() -> impl Iterator<Item = Scenario> {
    SMALL.into_iter().chain(LARGE)
}

fn names() -> Vec<&'static str> {
    scenarios().map(|scenario| scenario.name).collect()
}

fn main() -> io::Result<ExitCode> {
    let arguments = Arguments::parse();
    let mut out = io::stdout().lock();
    if arguments.list {
        for mutation in Mutation::value_variants() {
            writeln!(out, "{mutation}")?;
        }
        return Ok(ExitCode::SUCCESS);
    }
    let asked = arguments.scenario.as_deref().or(arguments.mutation.map(Mutation::scenario));
    for scenario in scenarios().filter(|scenario| asked.is_none_or(|name| scenario.name == name)) {
        match explore(&scenario, arguments.mutation) {
            Ok(explored) => writeln!(
                out,
                "{:<14} {:>8} states {:>10} transitions, depth {:>3}, {:>6.1} s; handed over in {}",
                scenario.name,
                explored.states,
                explored.transitions,
                explored.depth,
                explored.time.as_secs_f64(),
                explored.handed_over
            )?,
            Err(violation) => {
                writeln!(out, "Scenario {}:\n{violation}", scenario.name)?;
                return Ok(ExitCode::from(1));
            }
        }
    }
    if let Some(mutation) = arguments.mutation {
        let scenario = mutation.scenario();
        writeln!(out, "{mutation} is not found here; it shows in scenario {scenario}")?;
        return Ok(ExitCode::from(NOT_FOUND));
    }
    Ok(ExitCode::SUCCESS)
}
