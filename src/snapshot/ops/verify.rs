// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Finds altered bytes.

use std::fmt;
use std::fs::File;
use std::io::{self, ErrorKind, Read};
use std::path::{Path, PathBuf};
use std::time::Instant;

use serde::{Serialize, Serializer};

use crate::error::Chain;
use crate::range::GpaRange;
use crate::snapshot::disk::files::{
    CHANGES_FILE, CONFIG_FILE, FileError, MANIFEST_FILE, MEMORY_FILE, STATE_FILE, open_sized, read_bounded,
};
use crate::snapshot::format::blocks::BlockTable;
use crate::snapshot::format::document::VmConfig;
use crate::snapshot::format::elsewhere::Elsewhere;
use crate::snapshot::format::limits::Limits;
use crate::snapshot::format::manifest::{Covered, Manifest, ManifestError};
use crate::snapshot::format::placement::{Placement, PlacementError};
use crate::snapshot::format::state::VmState;
use crate::snapshot::read::altered::Altered;
use crate::snapshot::read::block_reader::{Block, BlockReader};
use crate::snapshot::read::dir::{OpenError, SnapshotDir};
use crate::units::{Bytes, Millis};

/// Why a snapshot could not be checked to the end. What was found so far is not known.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum VerifyError {
    /// A file is there, and this host cannot read it: nothing is known of what is in it.
    #[error("Cannot read {path}", path = .path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A file, or the memory, is larger than the caller allows; nobody has looked whether it is sound.
    #[error(transparent)]
    OverLimit(OpenError),
    /// The snapshot has no manifest; only its structure could be checked.
    #[error("{path} has no {MANIFEST_FILE} to check against", path = .path.display())]
    NoManifest {
        /// The snapshot.
        path: PathBuf,
        /// Why [`seal`](crate::snapshot::seal()) gives it none, if that is so.
        source: Option<PlacementError>,
    },
}

/// Something in a snapshot that is not as it was written.
#[derive(Debug)]
#[non_exhaustive]
pub enum Finding {
    /// A file is missing, is no file, or has another size.
    File(FileError),
    /// The manifest is damaged; nothing else was checked.
    Manifest(OpenError),
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

impl fmt::Display for Finding {
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

impl Serialize for Finding {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

/// What a check found.
#[derive(Debug, Default, Serialize)]
#[non_exhaustive]
pub struct Report {
    /// What is wrong; empty for a snapshot as it was written.
    pub findings: Vec<Finding>,
    /// Whether `config.json` is the configuration of a VM, and not the one that the manifest was made for: no damage, somebody
    /// edited it.
    pub config_edited: bool,
    /// Memory of the VM that nobody checked, because it is in files of its own.
    pub elsewhere: Elsewhere,
    /// Bytes that were read and compared.
    pub bytes: u64,
}

impl Report {
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
/// A file cannot be read to its end or exceeds `limits`, or there is no manifest.
pub fn verify(path: &Path, limits: &Limits) -> Result<Report, VerifyError> {
    let began = Instant::now();
    let mut report = Report::default();
    let bytes = match read_bounded(&path.join(MANIFEST_FILE), limits.manifest_bytes) {
        Err(FileError::Open { source, .. }) if source.kind() == ErrorKind::NotFound => {
            std::fs::metadata(path).map_err(|source| VerifyError::Read { path: path.to_owned(), source })?;
            let source = SnapshotDir::open(path, limits).ok().and_then(|dir| dir.obstacle());
            return Err(VerifyError::NoManifest { path: path.to_owned(), source });
        }
        Err(error) => return report.file(error).map(|()| report),
        Ok(bytes) => bytes,
    };
    report.bytes += bytes.len() as u64;
    let manifest = match Manifest::parse(&bytes, limits) {
        Ok(manifest) => manifest,
        Err(ManifestError::Memory(error)) => {
            let path = path.join(MANIFEST_FILE);
            return Err(VerifyError::Read { path, source: io::Error::from(error) });
        }
        Err(source) => {
            let is_limit = matches!(source, ManifestError::OverLimit { .. });
            let error = OpenError::Manifest { path: path.to_owned(), source };
            if is_limit {
                return Err(VerifyError::OverLimit(error));
            }
            report.findings.push(Finding::Manifest(error));
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

impl Report {
    /// Notes what is wrong with a file, unless it is this host that cannot read it, or it is only too large.
    fn file(&mut self, error: FileError) -> Result<(), VerifyError> {
        match error.unread() {
            Ok((path, source)) => Err(VerifyError::Read { path, source }),
            // It may be sound: nobody has looked.
            Err(error @ FileError::TooLarge { .. }) => Err(VerifyError::OverLimit(error.into())),
            Err(error) => {
                self.findings.push(Finding::File(error));
                Ok(())
            }
        }
    }

    /// Opens a file of the size the manifest says; a file of another size is a finding.
    fn open(&mut self, path: &Path, expected: u64) -> Result<Option<File>, VerifyError> {
        open_sized(path, expected).map_or_else(|error| self.file(error).map(|()| None), |file| Ok(Some(file)))
    }

    /// Checks `config.json`, and returns the configuration in it: one that was edited since it was sealed still is one.
    fn config(
        &mut self,
        dir: &Path,
        manifest: &Manifest,
        limits: &Limits,
    ) -> Result<Option<VmConfig>, VerifyError> {
        let text = match read_bounded(&dir.join(CONFIG_FILE), limits.config_bytes) {
            Err(error) => return self.file(error).map(|()| None),
            Ok(text) => text,
        };
        self.bytes += text.len() as u64;
        let config = VmConfig::parse(&text, limits).ok();
        match &config {
            _ if Covered::of(&text) == manifest.config => {}
            Some(_) => self.config_edited = true,
            None => self.findings.push(Finding::Text { name: CONFIG_FILE }),
        }
        Ok(config)
    }

    fn text(&mut self, dir: &Path, name: &'static str, covered: Covered) -> Result<(), VerifyError> {
        let path = dir.join(name);
        let Some(file) = self.open(&path, covered.bytes)? else { return Ok(()) };
        let mut hasher = blake3::Hasher::new();
        let read = io::copy(&mut (&file).take(covered.bytes), &mut hasher);
        self.bytes += read.map_err(|source| VerifyError::Read { path, source })?;
        if covered.digest != hasher.finalize().into() {
            self.findings.push(Finding::Text { name });
        }
        Ok(())
    }

    fn memory(
        &mut self,
        dir: &Path,
        name: &'static str,
        manifest: &Manifest,
        placement: &Placement,
    ) -> Result<(), VerifyError> {
        let path = dir.join(name);
        let Some(file) = self.open(&path, placement.bytes())? else { return Ok(()) };
        let mut blocks = CheckedBlocks::new(&file, name, manifest, placement);
        loop {
            match blocks.next_block() {
                Ok(None) => break,
                Ok(Some(block)) => self.bytes += block.length,
                Err(error) => match Altered::of(&error) {
                    Some(altered) => altered.ranges.iter().for_each(|&range| self.altered(name, range)),
                    None => return Err(VerifyError::Read { path, source: error }),
                },
            }
        }
        Ok(())
    }

    /// Notes altered memory, joined to what was noted just before where the two touch.
    fn altered(&mut self, name: &'static str, range: GpaRange) {
        if let Some(Finding::Memory { range: last, .. }) = self.findings.last_mut()
            && last.end() == range.start()
        {
            *last = GpaRange::from_bounds(last.start(), range.end()).expect("it only grows");
        } else {
            self.findings.push(Finding::Memory { name, range });
        }
    }

    /// Checks that the state lists the memory that the manifest does: both may be sound and yet not belong together.
    fn listing(
        &mut self,
        dir: &Path,
        manifest: &Manifest,
        config: Option<&VmConfig>,
        limits: &Limits,
    ) -> Result<(), VerifyError> {
        let text = match read_bounded(&dir.join(STATE_FILE), limits.state_bytes) {
            Err(error) => return self.file(error),
            Ok(text) => text,
        };
        let state = VmState::parse(text, limits).ok();
        let fitting = state.filter(|state| state.memory().ranges().eq(manifest.memory.ranges()));
        match (fitting, config) {
            (Some(state), Some(config)) => self.elsewhere = Elsewhere::of(config, &state),
            (Some(_), None) => {}
            (None, _) => self.findings.push(Finding::Text { name: STATE_FILE }),
        }
        Ok(())
    }
}

/// Reads the blocks of a file in order and checks each against its digest; holes are not read.
pub(crate) struct CheckedBlocks<'a> {
    blocks: BlockReader<'a>,
    name: &'static str,
    table: &'a BlockTable,
    placement: &'a Placement,
}

impl<'a> CheckedBlocks<'a> {
    /// Reads `file`, called `name`, which holds memory as `placement` says, against the digests of `manifest`.
    pub(crate) fn new(
        file: &'a File,
        name: &'static str,
        manifest: &'a Manifest,
        placement: &'a Placement,
    ) -> Self {
        let table = &manifest.blocks;
        let blocks = BlockReader::new(file, placement.bytes(), table.block_bytes);
        Self { blocks, name, table, placement }
    }

    /// Reads the next block; `None` behind the last one. Its bytes, if it is no hole, are as they were written.
    ///
    /// # Errors
    /// The file cannot be read; or the block was altered, then the error holds [`Altered`] and the next call goes on behind it.
    pub(crate) fn next_block(&mut self) -> io::Result<Option<Block<'_>>> {
        let Some(block) = self.blocks.next_block()? else { return Ok(None) };
        if block.bytes.and_then(BlockTable::entry) == self.table.digests[block.index] {
            return Ok(Some(block));
        }
        let ranges = self.placement.gpas(block.offset, block.length);
        Err(Altered::new(self.name.into(), ranges).into())
    }
}
