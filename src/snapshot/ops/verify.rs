// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Finds altered bytes.

use std::fmt;
use std::fs::File;
use std::io::{self, Read};
use std::path::Path;
use std::time::Instant;

use serde::{Serialize, Serializer};

use crate::error::Chain;
use crate::range::GpaRange;
use crate::snapshot::disk::{ManifestUse, ReadError, open_sized, read_bounded};
use crate::snapshot::format::{
    CHANGES_FILE, CONFIG_FILE, Covered, Elsewhere, FormatError, MANIFEST_FILE, MEMORY_FILE, Manifest,
    Placement, STATE_FILE, SnapshotLimits, VmConfig, VmState,
};
use crate::snapshot::read::{Altered, CheckedBits, FullSnapshot, MemoryReader};
use crate::units::{Bytes, Millis};

/// Something in a snapshot that is not as it was written.
#[derive(Debug)]
#[non_exhaustive]
pub enum VerifyFinding {
    /// A file is missing, is no file, or has another size.
    File(ReadError),
    /// The manifest is damaged; nothing else was checked.
    Manifest(ReadError),
    /// Bytes of `config.json` or `state.json` were altered.
    Text {
        /// The file.
        name: &'static str,
    },
    /// Bytes of the memory were altered.
    Memory {
        /// The file that holds them.
        name: &'static str,
        /// Guest memory among whose bytes the altered ones are.
        range: GpaRange,
    },
}

impl fmt::Display for VerifyFinding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File(error) => Chain(error).fmt(f),
            Self::Manifest(error) => {
                write!(f, "{MANIFEST_FILE} is damaged: ")?;
                Chain(error).fmt(f)
            }
            Self::Text { name } => write!(f, "{name} was altered"),
            Self::Memory { name, range } => write!(f, "Memory at GPA {range} in {name} was altered"),
        }
    }
}

impl Serialize for VerifyFinding {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

/// What a check found.
#[derive(Debug, Default, Serialize)]
#[non_exhaustive]
pub struct VerifyReport {
    /// What is wrong; empty for a snapshot as it was written.
    pub findings: Vec<VerifyFinding>,
    /// Whether `config.json` is the configuration of a VM, and not the one that the manifest was made for: no damage, somebody
    /// edited it.
    pub config_edited: bool,
    /// Memory of the VM that nobody checked, because it is in files of its own.
    pub elsewhere: Elsewhere,
    /// Bytes that were read and compared.
    pub bytes: u64,
}

impl VerifyReport {
    /// Whether everything in the snapshot is as it was written.
    pub fn is_clean(&self) -> bool {
        !self.is_damaged() && !self.config_edited
    }

    /// Whether something is wrong. An edited configuration is not.
    pub fn is_damaged(&self) -> bool {
        !self.findings.is_empty()
    }
}

/// Checks every byte of the snapshot at `path`, full or differential, against its manifest.
///
/// # Errors
/// A file cannot be read to its end or exceeds `limits`, or there is no manifest. What was found so far is not known.
pub fn verify(path: &Path, limits: &SnapshotLimits) -> Result<VerifyReport, ReadError> {
    let began = Instant::now();
    let mut report = VerifyReport::default();
    let bytes = match read_bounded(&path.join(MANIFEST_FILE), limits.manifest_bytes) {
        Err(error) if error.is_absent() => return Err(no_manifest(path, limits)),
        Err(error) => return report.file(error).map(|()| report),
        Ok(bytes) => bytes,
    };
    report.bytes += bytes.len() as u64;
    let manifest = match Manifest::parse(&bytes, limits) {
        Ok(manifest) => manifest,
        Err(FormatError::Memory(error)) => {
            return Err(ReadError::Read { path: path.join(MANIFEST_FILE), source: error.into() });
        }
        Err(source) => {
            let is_limit = matches!(source, FormatError::OverLimit { .. });
            let error = ReadError::Format { path: path.join(MANIFEST_FILE), source };
            if is_limit {
                return Err(error);
            }
            report.findings.push(VerifyFinding::Manifest(error));
            return Ok(report);
        }
    };
    let config = report.config(path, &manifest, limits)?;
    report.text(path, STATE_FILE, manifest.state)?;
    match &manifest.changes {
        None if manifest.memory.bytes() == 0 => {}
        None => report.memory(path, MEMORY_FILE, &manifest, &manifest.memory)?,
        Some(changes) => report.memory(path, CHANGES_FILE, &manifest, &changes.runs)?,
    }
    if !report.is_damaged() {
        report.listing(path, &manifest, config.as_ref(), limits)?;
    }
    log::info!(
        "Checked {} of {} in {}, findings: {}",
        Bytes(report.bytes),
        path.display(),
        Millis(began.elapsed()),
        report.findings.len(),
    );
    Ok(report)
}

impl VerifyReport {
    /// Notes what is wrong with a file, unless it is this host that cannot read it, or it is only too large.
    fn file(&mut self, error: ReadError) -> Result<(), ReadError> {
        let error = match error.unread() {
            // If it is only too large, it may be sound: nobody has looked.
            Ok(error) | Err(error @ ReadError::TooLarge { .. }) => return Err(error),
            Err(error) => error,
        };
        self.findings.push(VerifyFinding::File(error));
        Ok(())
    }

    /// Opens a file of the size the manifest says; a file of another size is a finding.
    fn open(&mut self, path: &Path, expected: u64) -> Result<Option<File>, ReadError> {
        open_sized(path, expected).map_or_else(|error| self.file(error).map(|()| None), |file| Ok(Some(file)))
    }

    /// Checks `config.json`, and returns the configuration in it: one that was edited since it was sealed still is one.
    fn config(
        &mut self,
        dir: &Path,
        manifest: &Manifest,
        limits: &SnapshotLimits,
    ) -> Result<Option<VmConfig>, ReadError> {
        let text = match read_bounded(&dir.join(CONFIG_FILE), limits.config_bytes) {
            Err(error) => return self.file(error).map(|()| None),
            Ok(text) => text,
        };
        self.bytes += text.len() as u64;
        let config = VmConfig::parse(&text, limits).ok();
        match &config {
            _ if Covered::of(&text) == manifest.config => {}
            Some(_) => self.config_edited = true,
            None => self.findings.push(VerifyFinding::Text { name: CONFIG_FILE }),
        }
        Ok(config)
    }

    fn text(&mut self, dir: &Path, name: &'static str, covered: Covered) -> Result<(), ReadError> {
        let path = dir.join(name);
        let Some(file) = self.open(&path, covered.bytes)? else { return Ok(()) };
        let mut hasher = blake3::Hasher::new();
        let read = io::copy(&mut (&file).take(covered.bytes), &mut hasher);
        self.bytes += read.map_err(|source| ReadError::Read { path, source })?;
        if covered.digest != hasher.finalize().into() {
            self.findings.push(VerifyFinding::Text { name });
        }
        Ok(())
    }

    fn memory(
        &mut self,
        dir: &Path,
        name: &'static str,
        manifest: &Manifest,
        placement: &Placement,
    ) -> Result<(), ReadError> {
        let path = dir.join(name);
        let Some(file) = self.open(&path, placement.bytes())? else { return Ok(()) };
        let (table, checked) = (&manifest.blocks, CheckedBits::none(&manifest.blocks));
        let memory = MemoryReader { dir, name, file: &file, placement, digests: Some((table, &checked)) };
        let mut blocks = memory.blocks(table.block_bytes);
        loop {
            match blocks.next_block() {
                Ok(None) => break,
                Ok(Some(block)) => self.bytes += block.length,
                Err(error) => match Altered::of(&error) {
                    Some(altered) => altered.ranges.iter().for_each(|&range| self.altered(name, range)),
                    None => return Err(ReadError::Read { path, source: error }),
                },
            }
        }
        Ok(())
    }

    /// Notes altered memory, joined to what was noted just before where the two touch.
    fn altered(&mut self, name: &'static str, range: GpaRange) {
        if let Some(VerifyFinding::Memory { range: last, .. }) = self.findings.last_mut()
            && last.end() == range.start()
        {
            *last = GpaRange::from_bounds(last.start(), range.end()).expect("it only grows");
        } else {
            self.findings.push(VerifyFinding::Memory { name, range });
        }
    }

    /// Checks that the state lists the memory that the manifest does: both may be sound and yet not belong together.
    fn listing(
        &mut self,
        dir: &Path,
        manifest: &Manifest,
        config: Option<&VmConfig>,
        limits: &SnapshotLimits,
    ) -> Result<(), ReadError> {
        let text = match read_bounded(&dir.join(STATE_FILE), limits.state_bytes) {
            Err(error) => return self.file(error),
            Ok(text) => text,
        };
        let state = VmState::parse(text, limits).ok();
        let fitting = state.filter(|state| state.memory().ranges().eq(manifest.memory.ranges()));
        match (fitting, config) {
            (Some(state), Some(config)) => self.elsewhere = Elsewhere::of(config, &state),
            (Some(_), None) => {}
            (None, _) => self.findings.push(VerifyFinding::Text { name: STATE_FILE }),
        }
        Ok(())
    }
}

fn no_manifest(path: &Path, limits: &SnapshotLimits) -> ReadError {
    if let Err(source) = std::fs::metadata(path) {
        return ReadError::Read { path: path.to_owned(), source };
    }
    let source = FullSnapshot::open(path, limits).ok().and_then(|full| full.obstacle());
    ReadError::NoManifest { path: path.to_owned(), needed: ManifestUse::Verify, source }
}
