// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Explores all that can happen in a migration, with the library's own ledger, cursors, journals and device states.

use std::io::{self, Write};
use std::process::ExitCode;

use clap::{Parser, ValueEnum};
use vfio_migration_integration::model::{LARGE, Mutation, SMALL, Scenario, explore};

/// Explores all that can happen in a migration: no page is lost, and never do two VMs run.
///
/// Exits 0 if that holds, 1 with the shortest way to what must not happen.
#[derive(Debug, Parser)]
struct Arguments {
    /// List the mutations, one a line.
    #[arg(long, exclusive = true)]
    list: bool,
    /// Make one mistake, which has to be found.
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
    Ok(ExitCode::SUCCESS)
}
