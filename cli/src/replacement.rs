// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The configuration that a stored VM is sent with in place of its own.

use vfio_migration::error::Chain;
use vfio_migration::snapshot::{ReadError, VmConfig, read_config};

use crate::args::SendArguments;
use crate::exit::Exit;
use crate::failure::Failure;

/// Reads the file of `--config`, if there is one: its text, and what it says.
pub(crate) fn read_replacement(arguments: &SendArguments) -> Result<Option<(Vec<u8>, VmConfig)>, Failure> {
    let limits = arguments.sizes.of_snapshot();
    let Some(path) = &arguments.config else { return Ok(None) };
    let text = read_config(path, &limits).map_err(|error| unread(&error))?;
    match VmConfig::parse(&text, &limits) {
        Ok(config) => Ok(Some((text, config))),
        Err(error) => {
            let message = format!("Cannot take {} for a config.json: {}", path.display(), Chain(&error));
            Err(Failure { exit: Exit::Usage, message })
        }
    }
}

/// A file that was named on its own is no part of a snapshot, and so never a damaged one.
fn unread(error: &ReadError) -> Failure {
    let is_io = matches!(error, ReadError::Open { .. } | ReadError::Read { .. });
    Failure { exit: if is_io { Exit::Io } else { Exit::Usage }, message: Chain(error).to_string() }
}
