// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Finds altered bytes.

use std::fmt;
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
    /// A file is missing, is not a regular file, or has another size.
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
    /// Whether `config.json` was edited: it is the configuration of a VM, but not the one that the manifest was made for. That is not
    /// damage.
    pub config_edited: bool,
    /// Memory of the VM that was not checked, because it is in files outside the snapshot.
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
/// A file cannot be read to its end or exceeds `limits`, or there is no manifest. Findings up to then are lost.
pub fn verify(path: &Path, limits: &SnapshotLimits) -> Result<VerifyReport, ReadError> {
    let began = Instant::now();
    let mut check = Check { dir: path, limits, report: VerifyReport::default() };
    if let Some(manifest) = check.manifest()? {
        check.files(&manifest)?;
    }
    let report = check.report;
    log::info!(
        "Checked {} of {} in {}, findings: {}",
        Bytes(report.bytes),
        path.display(),
        Millis(began.elapsed()),
        report.findings.len(),
    );
    Ok(report)
}

/// A check under way.
struct Check<'a> {
    dir: &'a Path,
    limits: &'a SnapshotLimits,
    report: VerifyReport,
}

impl Check<'_> {
    /// Reads the manifest; `None` where it is damaged, so that nothing else can be checked.
    fn manifest(&mut self) -> Result<Option<Manifest>, ReadError> {
        let path = self.dir.join(MANIFEST_FILE);
        let bytes = match read_bounded(&path, self.limits.manifest_bytes) {
            Err(error) if error.is_absent() => return Err(no_manifest(self.dir, self.limits)),
            read => self.found(read)?,
        };
        let Some(bytes) = bytes else { return Ok(None) };
        self.report.bytes += bytes.len() as u64;
        match Manifest::parse(&bytes, self.limits) {
            Ok(manifest) => Ok(Some(manifest)),
            Err(FormatError::Memory(error)) => Err(ReadError::Read { path, source: error.into() }),
            Err(source @ FormatError::OverLimit { .. }) => Err(ReadError::Format { path, source }),
            Err(source) => {
                self.report.findings.push(VerifyFinding::Manifest(ReadError::Format { path, source }));
                Ok(None)
            }
        }
    }

    /// Checks everything that `manifest` covers.
    fn files(&mut self, manifest: &Manifest) -> Result<(), ReadError> {
        let config = self.config(manifest)?;
        self.state(manifest.state)?;
        match &manifest.changes {
            None if manifest.memory.bytes() == 0 => {}
            None => self.memory(MEMORY_FILE, manifest, &manifest.memory)?,
            Some(changes) => self.memory(CHANGES_FILE, manifest, &changes.runs)?,
        }
        if self.report.is_damaged() { Ok(()) } else { self.listing(manifest, config.as_ref()) }
    }

    /// Returns what was read of a file, or notes what is wrong with it.
    ///
    /// # Errors
    /// This host cannot read the file, or it exceeds the limits: the file may be sound.
    fn found<T>(&mut self, read: Result<T, ReadError>) -> Result<Option<T>, ReadError> {
        match read.map_err(ReadError::unread) {
            Ok(read) => Ok(Some(read)),
            Err(Ok(error) | Err(error @ ReadError::TooLarge { .. })) => Err(error),
            Err(Err(error)) => {
                self.report.findings.push(VerifyFinding::File(error));
                Ok(None)
            }
        }
    }

    /// Checks `config.json`, and returns the configuration in it, edited or not.
    fn config(&mut self, manifest: &Manifest) -> Result<Option<VmConfig>, ReadError> {
        let text = self.found(read_bounded(&self.dir.join(CONFIG_FILE), self.limits.config_bytes))?;
        let Some(text) = text else { return Ok(None) };
        self.report.bytes += text.len() as u64;
        let config = VmConfig::parse(&text, self.limits).ok();
        match &config {
            _ if Covered::of(&text) == manifest.config => {}
            Some(_) => self.report.config_edited = true,
            None => self.report.findings.push(VerifyFinding::Text { name: CONFIG_FILE }),
        }
        Ok(config)
    }

    fn state(&mut self, covered: Covered) -> Result<(), ReadError> {
        let path = self.dir.join(STATE_FILE);
        let Some(file) = self.found(open_sized(&path, covered.bytes))? else { return Ok(()) };
        let mut hasher = blake3::Hasher::new();
        let read = io::copy(&mut (&file).take(covered.bytes), &mut hasher);
        self.report.bytes += read.map_err(|source| ReadError::Read { path, source })?;
        if covered.digest != hasher.finalize().into() {
            self.report.findings.push(VerifyFinding::Text { name: STATE_FILE });
        }
        Ok(())
    }

    fn memory(
        &mut self,
        name: &'static str,
        manifest: &Manifest,
        placement: &Placement,
    ) -> Result<(), ReadError> {
        let path = self.dir.join(name);
        let Some(file) = self.found(open_sized(&path, placement.bytes()))? else { return Ok(()) };
        let (table, checked) = (&manifest.blocks, CheckedBits::none(&manifest.blocks));
        let digests = Some((table, &checked));
        let memory = MemoryReader { dir: self.dir, name, file: &file, placement, digests };
        let mut blocks = memory.blocks(table.block_bytes);
        loop {
            match blocks.next_block() {
                Ok(None) => return Ok(()),
                Ok(Some(block)) => self.report.bytes += block.length,
                Err(error) => match Altered::of(&error) {
                    Some(altered) => altered.ranges.iter().for_each(|&range| self.altered(name, range)),
                    None => return Err(ReadError::Read { path, source: error }),
                },
            }
        }
    }

    /// Notes altered memory; joins it to the last finding where the two touch.
    fn altered(&mut self, name: &'static str, range: GpaRange) {
        if let Some(VerifyFinding::Memory { range: last, .. }) = self.report.findings.last_mut()
            && last.end() == range.start()
        {
            *last = GpaRange::from_bounds(last.start(), range.end()).expect("it only grows");
        } else {
            self.report.findings.push(VerifyFinding::Memory { name, range });
        }
    }

    /// Checks that the state lists the same memory as the manifest: both may be sound and still not belong together.
    fn listing(&mut self, manifest: &Manifest, config: Option<&VmConfig>) -> Result<(), ReadError> {
        let text = self.found(read_bounded(&self.dir.join(STATE_FILE), self.limits.state_bytes))?;
        let Some(text) = text else { return Ok(()) };
        let state = VmState::parse(text, self.limits).ok();
        let fitting = state.filter(|state| state.memory().ranges().eq(manifest.memory.ranges()));
        match (fitting, config) {
            (Some(state), Some(config)) => self.report.elsewhere = Elsewhere::of(config, &state),
            (Some(_), None) => {}
            (None, _) => self.report.findings.push(VerifyFinding::Text { name: STATE_FILE }),
        }
        Ok(())
    }
}

fn no_manifest(path: &Path, limits: &SnapshotLimits) -> ReadError {
    if let Err(source) = std::fs::metadata(path) {
        return ReadError::Read { path: path.to_owned(), source };
    }
    let source = FullSnapshot::open(path, limits).ok().and_then(|full| full.stored().obstacle());
    ReadError::NoManifest { path: path.to_owned(), needed: ManifestUse::Verify, source }
}
