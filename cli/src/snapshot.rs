// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! `vfio-migrate snapshot`: what can be done with snapshots that lie on disk.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;

use indicatif::HumanBytes;
use serde::Serialize;
use vfio_migration::error;
use vfio_migration::snapshot::{
    Description, Differences, Digest, Elsewhere, FullSnapshot, MANIFEST_FILE, ReadError, SnapshotChain,
    SnapshotKind, SnapshotLimits, VerifyReport, apply, compare, describe, reseal, seal, subtract, verify,
};

use crate::args::{ApplyArguments, CreateArguments, DiffArguments, SnapshotArguments, SnapshotCommand};
use crate::devices::device_lines;
use crate::exit::Exit;
use crate::failure::{Failure, ODD, TAKE_EDITED};
use crate::output::{Output, counted};

/// What somebody did who prepares a restore on another host.
const EDITED: &str = "config.json was edited since its manifest was made";

/// Does what `arguments` say and prints what came of it.
pub(crate) fn snapshot(arguments: &SnapshotArguments) -> ExitCode {
    let SnapshotArguments { limits, command } = arguments;
    let limits = limits.of_snapshot();
    let mut output = Output::new(command.json());
    let done = match command {
        SnapshotCommand::Info { dir, .. } => info(dir, &limits, &mut output),
        SnapshotCommand::Verify { dir, .. } => check(dir, &limits, &mut output),
        SnapshotCommand::Diff(arguments) => diff(arguments, &limits, &mut output),
        SnapshotCommand::Create(arguments) => create(arguments, &limits, &mut output),
        SnapshotCommand::Apply(arguments) => flatten(arguments, &limits, &mut output),
        SnapshotCommand::Seal { dir, edited_config: false, .. } => name(dir, &limits, &mut output),
        SnapshotCommand::Seal { dir, edited_config: true, .. } => rename(dir, &limits, &mut output),
    };
    done.unwrap_or_else(|failure| output.fail(&failure))
}

/// A snapshot that was written or given a name.
#[derive(Serialize)]
struct Written<'a> {
    path: &'a Path,
    digest: Digest,
}

impl Written<'_> {
    fn tell(&self, output: &mut Output) -> ExitCode {
        output.result(self, || format!("{} {}", self.digest, self.path.display()));
        ExitCode::SUCCESS
    }
}

fn info(dir: &Path, limits: &SnapshotLimits, output: &mut Output) -> Result<ExitCode, Failure> {
    let description = describe(dir, limits)?;
    output.result(&description, || description_text(&description));
    Ok(ExitCode::SUCCESS)
}

fn description_text(description: &Description) -> String {
    let mut lines = match &description.kind {
        SnapshotKind::Full { populated_bytes } => {
            vec![format!("full snapshot, {} of its memory populated", HumanBytes(*populated_bytes))]
        }
        SnapshotKind::Differential { base, changed_bytes, zeroed_bytes, runs } => vec![
            format!("differential to {base}"),
            format!(
                "changed {}, zeroed {}, in {}",
                HumanBytes(*changed_bytes),
                HumanBytes(*zeroed_bytes),
                counted(*runs as u64, "run")
            ),
        ],
        _ => vec!["snapshot of another kind".to_owned()],
    };
    lines.push(match (description.digest, &description.obstacle) {
        (Some(digest), _) => format!("named {digest}"),
        (None, None) => "no name: it has no manifest; `snapshot seal` gives it one".to_owned(),
        (None, Some(obstacle)) => format!("no name, for it can have no manifest: {obstacle}; {ODD}"),
    });
    lines.extend(description.aliases.iter().map(|alias| format!("equals {alias}")));
    lines.push(format!(
        "memory {} in {}, config.json {}, state.json {}",
        HumanBytes(description.memory_bytes),
        counted(description.memory_ranges as u64, "range"),
        HumanBytes(description.config_bytes),
        HumanBytes(description.state_bytes)
    ));
    lines.extend(elsewhere_line(&description.elsewhere));
    lines.extend(description.config_edited.then(|| format!("{EDITED}; {TAKE_EDITED}")));
    lines.extend(device_lines(&description.devices));
    lines.join("\n")
}

/// What is to be kept beside a snapshot that lacks memory.
fn elsewhere_line(elsewhere: &Elsewhere) -> Option<String> {
    let line = || format!("not in the snapshot: {elsewhere}, to be kept as it was with the snapshot");
    (!elsewhere.is_empty()).then(line)
}

fn check(dir: &Path, limits: &SnapshotLimits, output: &mut Output) -> Result<ExitCode, Failure> {
    let report = verify(dir, limits)?;
    output.result(&report, || report_text(dir, &report));
    Ok(match () {
        () if report.is_damaged() => Exit::Verification.into(),
        () if report.config_edited => Exit::Different.into(),
        () => ExitCode::SUCCESS,
    })
}

fn report_text(dir: &Path, report: &VerifyReport) -> String {
    let (path, checked) = (dir.display(), HumanBytes(report.bytes));
    let mut lines: Vec<_> = report.findings.iter().map(ToString::to_string).collect();
    lines.extend(report.config_edited.then(|| format!("{EDITED}; {TAKE_EDITED}")));
    lines.extend(elsewhere_line(&report.elsewhere));
    lines.push(match report.findings.len() as u64 {
        0 if report.config_edited => {
            format!("{path}: every other byte is as it was written, {checked} checked")
        }
        0 => format!("{path}: every byte is as it was written, {checked} checked"),
        number => format!("{path}: {}", counted(number, "finding")),
    });
    lines.join("\n")
}

fn diff(
    arguments: &DiffArguments,
    limits: &SnapshotLimits,
    output: &mut Output,
) -> Result<ExitCode, Failure> {
    let [first, second] =
        [&arguments.first, &arguments.second].map(|path| open_upon(&arguments.base, path, limits));
    let differences = compare(&first?, &second?)?;
    output.result(&differences, || differences_text(&differences));
    Ok(if differences.is_empty() { ExitCode::SUCCESS } else { Exit::Different.into() })
}

/// Opens the snapshot at `path`, a differential upon `base`.
fn open_upon(base: &[PathBuf], path: &Path, limits: &SnapshotLimits) -> Result<SnapshotChain, Failure> {
    match SnapshotChain::open([path], limits) {
        Err(ReadError::Differential { .. }) if !base.is_empty() => {
            Ok(SnapshotChain::open(base.iter().map(PathBuf::as_path).chain([path]), limits)?)
        }
        opened => Ok(opened?),
    }
}

fn differences_text(differences: &Differences) -> String {
    let mut lines = Vec::new();
    let texts = [("config.json", differences.config), ("state.json", differences.state)];
    lines.extend(texts.iter().filter(|(_, differs)| *differs).map(|(name, _)| format!("{name} differs")));
    lines.extend(differences.memory.iter().map(|range| format!("memory {range} differs")));
    lines
        .extend(differences.only_in_first.iter().map(|range| format!("memory {range} is in the first only")));
    lines.extend(
        differences.only_in_second.iter().map(|range| format!("memory {range} is in the second only")),
    );
    if lines.is_empty() { "no difference".to_owned() } else { lines.join("\n") }
}

fn create(
    arguments: &CreateArguments,
    limits: &SnapshotLimits,
    output: &mut Output,
) -> Result<ExitCode, Failure> {
    output.check_name(&arguments.into)?;
    let base = Arc::new(SnapshotChain::open(&arguments.base, limits)?);
    let digest =
        subtract(&open_upon(&arguments.base, &arguments.from, limits)?, base, &arguments.into, limits)?;
    Ok(Written { path: &arguments.into, digest }.tell(output))
}

fn flatten(
    arguments: &ApplyArguments,
    limits: &SnapshotLimits,
    output: &mut Output,
) -> Result<ExitCode, Failure> {
    output.check_name(&arguments.into)?;
    let chain = SnapshotChain::open(&arguments.chain, limits)?;
    let digest = apply(&chain, &arguments.into, limits)?;
    if let Some(line) = elsewhere_line(&chain.elsewhere()) {
        output.remark(&line);
    }
    Ok(Written { path: &arguments.into, digest }.tell(output))
}

fn name(dir: &Path, limits: &SnapshotLimits, output: &mut Output) -> Result<ExitCode, Failure> {
    output.check_name(dir)?;
    let sealed = dir.join(MANIFEST_FILE).exists();
    let digest = seal(dir, limits)?;
    if sealed {
        output.remark("It has had a manifest, which stays; `snapshot verify` tells whether it is true");
    }
    // The work is done: what cannot be looked at any more is only not told of.
    match FullSnapshot::open(dir, limits) {
        Ok(opened) => elsewhere_line(&opened.elsewhere()).iter().for_each(|line| output.remark(line)),
        Err(unopened) => {
            log::warn!("Cannot tell whether all memory is in it: {}", error::Chain(&unopened));
        }
    }
    Ok(Written { path: dir, digest }.tell(output))
}

fn rename(dir: &Path, limits: &SnapshotLimits, output: &mut Output) -> Result<ExitCode, Failure> {
    output.check_name(dir)?;
    let digest = reseal(dir, limits)?;
    Ok(Written { path: dir, digest }.tell(output))
}
