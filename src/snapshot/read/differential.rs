// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Reads differentials, and the memory that a full snapshot and differentials on top of it make up.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};

use thiserror::Error;

use crate::range::GpaRange;
use crate::snapshot::disk::files::{CHANGES_FILE, FileError, MANIFEST_FILE, open_sized, read_named};
use crate::snapshot::format::digest::Digest;
use crate::snapshot::format::document::VmConfig;
use crate::snapshot::format::elsewhere::Elsewhere;
use crate::snapshot::format::limits::Limits;
use crate::snapshot::format::manifest::{Changes, Covered, Manifest};
use crate::snapshot::format::placement::{Placement, PlacementError};
use crate::snapshot::format::state::VmState;
use crate::snapshot::read::checked::{CheckedBits, CheckedMemory};
use crate::snapshot::read::dir::{Configuration, Documents, OpenError, SnapshotDir, open_manifest};
use crate::snapshot::write::memory_file::read_placed;

/// Why snapshots do not stand on each other.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum ChainError {
    /// A snapshot cannot be read.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// There is no snapshot at all.
    #[error("No snapshot is named")]
    Empty,
    /// The full snapshot has no manifest, so nothing names it.
    #[error("{path} has no {MANIFEST_FILE} to name it", path = .path.display())]
    Unnamed {
        /// The snapshot.
        path: PathBuf,
        /// Why [`seal`](crate::snapshot::seal()) gives it none, if that is so.
        source: Option<PlacementError>,
    },
    /// The differential was made on top of something else.
    #[error("{path} is a differential to {base}, not to {below}", path = .path.display(), below = .below.display())]
    WrongBase {
        /// The differential.
        path: PathBuf,
        /// What it needs.
        base: Digest,
        /// What was given.
        below: PathBuf,
    },
}

/// A differential on disk: configuration, state, and the pages that differ from its base.
#[derive(Debug)]
pub struct Differential {
    path: PathBuf,
    documents: Documents,
    manifest: Manifest,
    changes: Changes,
    pages: File,
    checked: CheckedBits,
}

impl Differential {
    /// Opens the differential at `path` and checks that its parts fit together; the pages' bytes are not read.
    ///
    /// # Errors
    /// A file is missing, damaged, exceeds `limits` or is of another version, or one does not fit the others.
    pub fn open(path: &Path, limits: &Limits) -> Result<Self, OpenError> {
        Self::open_as(path, Configuration::AsSealed, limits)
    }

    pub(crate) fn open_as(
        path: &Path,
        configuration: Configuration<'_>,
        limits: &Limits,
    ) -> Result<Self, OpenError> {
        let full = || OpenError::Full { path: path.to_owned() };
        let manifest = open_manifest(path, limits)?.ok_or_else(|| {
            let source = io::ErrorKind::NotFound.into();
            OpenError::File(FileError::Open { path: path.join(MANIFEST_FILE), source })
        })?;
        let changes = manifest.changes.clone().ok_or_else(full)?;
        let documents = Documents::open(path, Some(&manifest), configuration, limits)?;
        let pages = open_sized(&path.join(CHANGES_FILE), changes.runs.bytes())?;
        let checked = CheckedBits::none(&manifest.blocks);
        Ok(Self { path: path.to_owned(), documents, manifest, changes, pages, checked })
    }

    /// The directory.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// What names this differential on its base.
    pub fn digest(&self) -> Digest {
        self.manifest.digest()
    }

    /// What names the snapshot that this one differs from.
    pub fn base(&self) -> Digest {
        self.changes.base
    }

    /// `config.json`.
    pub fn config(&self) -> &VmConfig {
        &self.documents.config
    }

    /// `state.json`.
    pub fn state(&self) -> &VmState {
        &self.documents.state
    }

    /// Pages that differ from the base and are not zero, and where they lie in `memory-changes`; ascending.
    pub fn changed(&self) -> &Placement {
        &self.changes.runs
    }

    /// Pages that are zero and were not, or perhaps were not, in the base; ascending.
    pub fn zeroed(&self) -> impl Iterator<Item = GpaRange> + Clone {
        self.changes.zero_runs.ranges()
    }

    /// Whether `config.json` is another than the one that the manifest was made for.
    pub(crate) fn is_edited(&self) -> bool {
        self.documents.is_edited(&self.manifest)
    }

    /// `config.json` as it was when it was read.
    pub(crate) fn config_file(&self) -> Covered {
        self.documents.config_file
    }

    pub(crate) fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    pub(crate) fn pages(&self) -> &File {
        &self.pages
    }

    fn checked(&self) -> CheckedMemory<'_> {
        CheckedMemory {
            dir: &self.path,
            name: CHANGES_FILE,
            file: &self.pages,
            placement: &self.changes.runs,
            manifest: &self.manifest,
            checked: &self.checked,
        }
    }

    /// Lays this differential over the memory of `range` as its base has it, but for the pages in the file.
    fn overlay_zeros(&self, range: GpaRange, buffer: &mut [u8]) {
        let zeroed = self.changes.zero_runs.locate(range).map(|extent| extent.range);
        let absent = self.documents.state.memory().missing(range);
        for zero in zeroed.chain(absent) {
            part(range, zero, buffer).fill(0);
        }
    }
}

/// Returns the bytes of `inner` in a buffer that holds `outer`.
fn part(outer: GpaRange, inner: GpaRange, buffer: &mut [u8]) -> &mut [u8] {
    let at = |gpa: u64| usize::try_from(gpa - outer.start()).expect("the buffer is in memory");
    &mut buffer[at(inner.start())..at(inner.end())]
}

/// A full snapshot with differentials on top, each made on what lies below it.
#[derive(Debug)]
pub struct Chain {
    full: SnapshotDir,
    differentials: Vec<Differential>,
}

impl Chain {
    /// Opens the full snapshot that `paths` begins with and the differentials that follow it, lowest first.
    ///
    /// # Errors
    /// There is none, one cannot be read, or one was made on top of something else.
    pub fn open<P: AsRef<Path>>(
        paths: impl IntoIterator<Item = P>,
        limits: &Limits,
    ) -> Result<Self, ChainError> {
        let mut paths = paths.into_iter();
        let first = paths.next().ok_or(ChainError::Empty)?;
        let mut chain = Self::of(SnapshotDir::open(first.as_ref(), limits)?);
        for path in paths {
            chain = chain.with(Differential::open(path.as_ref(), limits)?)?;
        }
        Ok(chain)
    }

    /// Makes a chain of a full snapshot alone.
    pub fn of(full: SnapshotDir) -> Self {
        Self { full, differentials: Vec::new() }
    }

    /// Lays `differential` on top.
    ///
    /// # Errors
    /// It was made on top of something else.
    pub fn with(mut self, differential: Differential) -> Result<Self, ChainError> {
        let fits = match self.differentials.last() {
            Some(top) => top.manifest().answers_to(differential.base()),
            None => {
                let (path, source) = (self.full.path().to_owned(), self.full.obstacle());
                let unnamed = || ChainError::Unnamed { path, source };
                self.full.manifest().ok_or_else(unnamed)?.answers_to(differential.base())
            }
        };
        if !fits {
            return Err(ChainError::WrongBase {
                path: differential.path().to_owned(),
                base: differential.base(),
                below: self.path().to_owned(),
            });
        }
        self.differentials.push(differential);
        Ok(self)
    }

    /// The lowest snapshot.
    pub fn full(&self) -> &SnapshotDir {
        &self.full
    }

    /// The differentials, lowest first.
    pub fn differentials(&self) -> &[Differential] {
        &self.differentials
    }

    /// The directory on top.
    pub fn path(&self) -> &Path {
        self.differentials.last().map_or(self.full.path(), Differential::path)
    }

    /// What names the snapshot on top; `None` for a full snapshot with no manifest.
    pub fn digest(&self) -> Option<Digest> {
        self.differentials.last().map_or(self.full.digest(), |top| Some(top.digest()))
    }

    /// `config.json` of the snapshot on top.
    pub fn config(&self) -> &VmConfig {
        self.differentials.last().map_or(self.full.config(), Differential::config)
    }

    /// `state.json` of the snapshot on top, which lists the VM's memory.
    pub fn state(&self) -> &VmState {
        self.differentials.last().map_or(self.full.state(), Differential::state)
    }

    /// Memory of the VM that is in none of the snapshots, because it is in files of its own.
    pub fn elsewhere(&self) -> Elsewhere {
        Elsewhere::of(self.config(), self.state())
    }

    /// Reads the memory of `range` as the snapshot on top has it; what the VM does not have reads as zero.
    ///
    /// The bytes are those on disk: [`verify`](crate::snapshot::verify()) tells whether they are as they were written.
    ///
    /// # Errors
    /// A file cannot be read, or was cut off since it was opened.
    ///
    /// # Panics
    /// `buffer` is shorter than `range`.
    pub fn read(&self, range: GpaRange, buffer: &mut [u8]) -> io::Result<()> {
        buffer.fill(0);
        self.full.read(range, buffer)?;
        self.differentials.iter().try_for_each(|differential| {
            differential.overlay_zeros(range, buffer);
            let path = || differential.path.join(CHANGES_FILE);
            let read = |bytes: &mut [u8], offset| read_named(&differential.pages, path, bytes, offset);
            read_placed(differential.changed(), range, buffer, read)
        })
    }

    /// Reads as [`Chain::read`] does, bytes that are as they were written; a full snapshot with no manifest is read as it is.
    ///
    /// # Errors
    /// A file cannot be read, or was cut off; or a block was altered, then the error holds [`Altered`](crate::snapshot::Altered).
    pub(crate) fn read_checked(&self, range: GpaRange, buffer: &mut [u8]) -> io::Result<()> {
        buffer.fill(0);
        match self.full.checked() {
            Some(memory) => memory.read(range, buffer)?,
            None => self.full.read(range, buffer)?,
        }
        self.differentials.iter().try_for_each(|differential| {
            differential.overlay_zeros(range, buffer);
            differential.checked().read(range, buffer)
        })
    }

    /// Checks the blocks of the full snapshot that hold any of `range` and that nobody has read yet.
    ///
    /// # Errors
    /// As [`Chain::read_checked`].
    pub(crate) fn check(&self, range: GpaRange) -> io::Result<()> {
        self.full.checked().map_or(Ok(()), |memory| memory.check_blocks(range))
    }

    /// Returns memory outside which everything reads as zero: sorted and disjoint.
    ///
    /// # Errors
    /// A file cannot be read.
    pub fn populated(&self) -> io::Result<Vec<GpaRange>> {
        let ranges = self.full.populated().collect::<io::Result<Vec<_>>>()?;
        Ok(self.with_changed(ranges))
    }

    /// Returns memory outside which everything was zero when it was written, whatever became of the files' holes since.
    ///
    /// # Errors
    /// A full snapshot with no manifest cannot be read.
    pub(crate) fn populated_as_written(&self) -> io::Result<Vec<GpaRange>> {
        let Some(full) = self.full.checked() else { return self.populated() };
        Ok(self.with_changed(full.populated().collect()))
    }

    fn with_changed(&self, mut ranges: Vec<GpaRange>) -> Vec<GpaRange> {
        ranges.extend(self.differentials.iter().flat_map(|differential| differential.changed().ranges()));
        united(ranges)
    }
}

/// Sorts and joins ranges that touch or overlap.
pub(crate) fn united(mut ranges: Vec<GpaRange>) -> Vec<GpaRange> {
    ranges.sort_unstable();
    ranges.dedup_by(|next, last| {
        let joined = next.start() <= last.end();
        if joined && next.end() > last.end() {
            *last = GpaRange::from_bounds(last.start(), next.end()).expect("it only grows");
        }
        joined
    });
    ranges
}
