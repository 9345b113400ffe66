// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What a distribution packs beside the tool: completions and manual pages, made from the command line itself.

use std::io;
use std::path::Path;
use std::process::ExitCode;

use clap::CommandFactory;
use clap_complete::Shell;

use crate::args::Arguments;
use crate::output::Output;

/// Prints what makes `shell` complete the tool's words.
pub(crate) fn completions(shell: Shell) -> ExitCode {
    let mut command = Arguments::command();
    let name = command.get_name().to_owned();
    clap_complete::generate(shell, &mut command, name, &mut io::stdout());
    ExitCode::SUCCESS
}

/// Prints the tool's own manual page, or writes those of every command into the directory `into`.
pub(crate) fn man(into: Option<&Path>) -> ExitCode {
    let command = Arguments::command();
    let written = match into {
        Some(into) => clap_mangen::generate_to(command, into),
        None => clap_mangen::Man::new(command).render(&mut io::stdout()),
    };
    match written {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => Output::new(false).fail(&error.into()),
    }
}
