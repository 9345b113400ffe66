// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! `vfio-migrate receive --serve`: one VM after the other, each into a directory that is named by time and VM.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::mpsc::Sender;
use std::sync::{Arc, OnceLock};

use jiff::Timestamp;
use vfio_migration::snapshot::{Digest, NameSnapshot, SnapshotDestination, VmConfig};

use crate::args::ReceiveArguments;
use crate::exit::Exit;
use crate::failure::Failure;
use crate::manager::tell_status;
use crate::on_paused::Note;
use crate::output::Output;
use crate::receive::{Desk, absolute, tell_kept, tell_listening};

/// Longest name of a VM in that of a directory.
const NAME_CHARACTERS: usize = 64;

/// Characters of a digest that stands for a name.
const DIGEST_CHARACTERS: usize = 8;

/// What came of the VMs so far.
#[derive(Debug, Default)]
struct Tally {
    kept: u64,
    failed: u64,
    /// Failures of this host since a VM was kept.
    in_a_row: u32,
}

/// Receives VMs into new directories of `folder` until it is asked to end, or this host fails too often.
pub(crate) fn serve(
    arguments: &ReceiveArguments,
    folder: &Path,
    output: &mut Output,
) -> Result<ExitCode, Failure> {
    output.check_name(folder)?;
    let desk = Desk::open(arguments)?;
    let folder = absolute(folder)?;
    if !folder.is_dir() {
        let message = format!("Cannot serve into {}: it is no directory", folder.display());
        return Err(Failure { exit: Exit::Usage, message });
    }
    let listener = desk.listen()?;
    tell_listening(arguments, &folder, &listener, output);
    let mut tally = Tally::default();
    loop {
        let into = Arc::new(OnceLock::new());
        let mut reception = desk.prepare(Arc::clone(&into))?;
        let name = name_in(folder.clone(), Arc::clone(&into), reception.notes.clone());
        let mut destination = SnapshotDestination::named_by(name, reception.options());
        let outcome = desk.receive(&listener, &mut destination, &reception, output);
        let ending = match (outcome, into.get()) {
            (Ok(kept), Some(into)) => {
                (tally.kept, tally.in_a_row) = (tally.kept + 1, 0);
                let code = tell_kept(arguments, into, &kept, output);
                // It may have been asked to end when that was too late for this VM.
                (arguments.once || desk.is_stopped()).then_some(Ok(code))
            }
            // As it was asked to, and no VM has come.
            (Err(_), None) if desk.is_stopped() => Some(Ok(ExitCode::SUCCESS)),
            (Err(failure), _) => {
                tally.failed += 1;
                tally.in_a_row += u32::from(failure.exit == Exit::Io);
                let is_last = arguments.once || desk.is_stopped() || tally.in_a_row >= arguments.max_failures;
                if !is_last {
                    output.fail(&failure);
                }
                is_last.then_some(Err(failure))
            }
            (Ok(_), None) => unreachable!("what is kept has a name"),
        };
        if let Some(ending) = ending {
            return ending;
        }
        tell_status(&format!("Waiting on {}; {} kept, {} failed", listener.url(), tally.kept, tally.failed));
    }
}

/// Names the directory of a VM by time and VM, and tells of the name.
fn name_in(folder: PathBuf, into: Arc<OnceLock<PathBuf>>, notes: Sender<Note>) -> NameSnapshot {
    Box::new(move |config| {
        let name = format!("{}-{}", Timestamp::now().strftime("%Y%m%dT%H%M%SZ"), vm_name(config));
        let path = into.get_or_init(|| unused(&folder, &name)).clone();
        // Where nobody listens, nobody needs to know.
        let _ = notes.send(Note::Named { into: path.clone(), vm: config.uuid().map(str::to_owned) });
        path
    })
}

/// Returns a path in `folder` where nothing is: `name`, or with a number behind it.
fn unused(folder: &Path, name: &str) -> PathBuf {
    let numbered = (2_u32..).map(|number| folder.join(format!("{name}-{number}")));
    let mut paths = std::iter::once(folder.join(name)).chain(numbered);
    paths.find(|path| path.symlink_metadata().is_err()).expect("there is no end of numbers")
}

/// Returns what a VM is called in a file name: its `platform.uuid`, or where that is no fit one the beginning of a digest of its
/// configuration.
fn vm_name(config: &VmConfig) -> String {
    let is_fit = |name: &&str| {
        let is_plain = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '_';
        !name.is_empty() && name.len() <= NAME_CHARACTERS && name.chars().all(is_plain)
    };
    config.uuid().filter(is_fit).map_or_else(
        || {
            let digest = Digest::of(config.text().as_bytes()).to_string();
            format!("vm{}", digest.chars().take(DIGEST_CHARACTERS).collect::<String>())
        },
        str::to_owned,
    )
}
