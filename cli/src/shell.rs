// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What a distribution packs beside the tool: completions and manual pages, made from the command line itself.

use std::io;
use std::path::Path;
use std::process::ExitCode;

use clap::CommandFactory;
use clap_complete::Shell;

use crate::args::Arguments;
use crate::exit::Exit;
use crate::failure::Failure;
use crate::output::Output;
use crate::printer::STDOUT;

/// Prints what makes `shell` complete the tool's words.
pub(crate) fn completions(shell: Shell) -> ExitCode {
    let mut command = Arguments::command();
    let name = command.get_name().to_owned();
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut command, &name, &mut script);
    if shell == Shell::Bash {
        script = with_reachable_states(&script, &name);
    }
    STDOUT.print(script);
    ExitCode::SUCCESS
}

/// Mends a script for bash that completes nothing behind a command: clap_complete 4.6 spells the hyphen of a tool's `name` one way
/// where the script changes its state and another way where it looks the state up.
fn with_reachable_states(script: &[u8], name: &str) -> Vec<u8> {
    let [changed, looked_up] = ["__", "__subcmd__"].map(|hyphen| name.replace('-', hyphen));
    String::from_utf8_lossy(script).replace(&looked_up, &changed).into_bytes()
}

/// Prints the tool's own manual page, or writes those of every command into the directory `into`.
pub(crate) fn man(into: Option<&Path>) -> ExitCode {
    let command = Arguments::command();
    if let Some(into) = into {
        let written = clap_mangen::generate_to(command, into);
        return written.map_or_else(|error| fail(into, &error), |()| ExitCode::SUCCESS);
    }
    let mut page = Vec::new();
    clap_mangen::Man::new(command).render(&mut page).expect("memory takes every write");
    STDOUT.print(page);
    ExitCode::SUCCESS
}

fn fail(into: &Path, error: &io::Error) -> ExitCode {
    let message = format!("Cannot write the manual pages into {}: {error}", into.display());
    Output::new(false).fail(&Failure { exit: Exit::Io, message })
}
