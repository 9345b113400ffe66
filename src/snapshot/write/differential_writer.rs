// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Writes a differential snapshot.

use std::io::{self, Read};
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use vm_memory::GuestMemoryBackend;

use crate::layout::Layout;
use crate::range::GpaRange;
use crate::snapshot::disk::files::CHANGES_FILE;
use crate::snapshot::disk::staging::{StagedDir, StagingError, WORK_FILE};
use crate::snapshot::format::digest::Digest;
use crate::snapshot::format::document::VmConfig;
use crate::snapshot::format::limits::Limits;
use crate::snapshot::format::manifest::{Changes, Manifest};
use crate::snapshot::format::placement::Placement;
use crate::snapshot::format::state::VmState;
use crate::snapshot::read::differential::{Chain, ChainError};
use crate::snapshot::write::changed_pages::{ChangedPages, SettleError};
use crate::snapshot::write::feed::{FeedError, from_memory, from_stream};
use crate::snapshot::write::writer::{Announced, WriteError, publish};
use crate::units::{Bytes, Millis};
use crate::vm::ReadableCheck;

/// The snapshot that a differential differs from.
#[derive(Debug, Clone)]
pub enum Base {
    /// One that is not at hand. The pages to come are those that changed since it was taken, as a ledger's cursor knows them.
    Named(Digest),
    /// One that is. All pages may come; those that equal it are left out.
    Compared(Arc<Chain>),
}

impl Base {
    /// Opens the snapshot to compare with: `paths` as for [`Chain::open`].
    ///
    /// # Errors
    /// The chain is none, or nothing names what is on top of it.
    pub fn open<P: AsRef<Path>>(
        paths: impl IntoIterator<Item = P>,
        limits: &Limits,
    ) -> Result<Self, ChainError> {
        let chain = Chain::open(paths, limits)?;
        match chain.digest() {
            Some(_) => Ok(Self::Compared(Arc::new(chain))),
            None => {
                let source = chain.full().obstacle();
                Err(ChainError::Unnamed { path: chain.path().to_owned(), source })
            }
        }
    }
}

/// A differential being written: takes whole pages in any order, from any number of threads.
///
/// A page that never comes is as in the base. Nothing lies under the final name before [`DifferentialWriter::finish`] returns;
/// dropped before, it leaves nothing behind.
///
/// [`crate::snapshot`] shows how it gets every page that changed since its base, whoever wrote it, and no other.
#[derive(Debug)]
pub struct DifferentialWriter {
    staged: StagedDir,
    announced: Announced,
    base: Digest,
    pages: ChangedPages,
    readable: ReadableCheck,
    limits: Limits,
}

impl DifferentialWriter {
    /// Begins a differential to `base` that will be the directory `target`, of a VM with the RAM `announced`.
    ///
    /// # Errors
    /// `target` is there and not an empty directory, cannot be made, the RAM exceeds `limits`, or nothing names the base.
    pub fn create(
        target: &Path,
        announced: Announced,
        base: Base,
        limits: Limits,
    ) -> Result<Self, WriteError> {
        Self::begin(StagedDir::create(target)?, announced, base, limits)
    }

    pub(crate) fn begin(
        staged: StagedDir,
        announced: Announced,
        base: Base,
        limits: Limits,
    ) -> Result<Self, WriteError> {
        let (base, chain) = match base {
            Base::Named(digest) => (digest, None),
            Base::Compared(chain) => match chain.digest() {
                Some(digest) => (digest, Some(chain)),
                None => {
                    let source = chain.full().obstacle();
                    return Err(WriteError::UnnamedBase { path: chain.path().to_owned(), source });
                }
            },
        };
        let placement = Placement::of_layout(announced.layout(), &limits)?;
        let work = staged.make_file(WORK_FILE)?;
        let pages =
            ChangedPages::new(work, placement, announced.layout().host_page(), chain, limits.thread_start)
                .map_err(|source| staged.write_error(WORK_FILE, source))?;
        Ok(Self { staged, announced, base, pages, readable: ReadableCheck::default(), limits })
    }

    /// The VM's RAM.
    pub fn layout(&self) -> &Layout {
        self.announced.layout()
    }

    /// Takes the bytes of `range` that `from` supplies, one after the other; later bytes replace earlier ones.
    ///
    /// # Errors
    /// `range` is not all RAM or not of whole pages, `from` fails or ends early, or the disk is full.
    pub fn fill(&self, range: GpaRange, from: &mut dyn Read) -> io::Result<()> {
        self.pages.fill(range, from_stream(from)).map_err(|error| self.fill_error(error))
    }

    /// Takes `ranges` of guest memory: those of the chunks that a ledger's cursor for this base hands out. It is read as by
    /// [`SnapshotWriter::copy_from`](crate::snapshot::SnapshotWriter::copy_from).
    ///
    /// # Errors
    /// A range is not all RAM or not of whole pages, the disk is full, or a userfaultfd fills `memory` through another mapping of
    /// its file only.
    pub fn copy_from<M: GuestMemoryBackend>(
        &self,
        ranges: impl IntoIterator<Item = GpaRange>,
        memory: &M,
    ) -> io::Result<()> {
        self.readable.check(memory).map_err(io::Error::other)?;
        let filled = ranges.into_iter().try_for_each(|range| self.pages.fill(range, from_memory(memory)));
        filled.map_err(|error| self.fill_error(error))
    }

    fn fill_error(&self, error: FeedError) -> io::Error {
        error.into_io(|source| self.staged.write_error(WORK_FILE, source))
    }

    /// Completes the differential with the texts of `config.json` and `state.json` and moves it to its name, safe on disk.
    ///
    /// Takes time in proportion to the pages that differ. Returns what names the differential.
    ///
    /// # Errors
    /// Nothing lies under the final name.
    pub fn finish(self, config: &[u8], state: &[u8]) -> Result<Digest, WriteError> {
        let config = VmConfig::parse(config, &self.limits)?;
        let state = VmState::parse(state.to_vec(), &self.limits)?;
        self.complete(&config, state)
    }

    /// Takes a page that never comes for zero, as a source leaves it out whose receiver's memory reads zero; before any page comes.
    pub(crate) fn presume_zeros(&self) -> Result<(), StagingError> {
        self.pages.presume_zeros().map_err(|source| self.staged.write_error(WORK_FILE, source))
    }

    /// Checks that `state` fits what was announced.
    pub(crate) fn check(&self, state: &VmState) -> Result<(), WriteError> {
        self.announced.settle(state, self.pages.placement(), &self.limits).map(drop)
    }

    /// Begins to bring to disk what was written until now; does not wait for it.
    pub(crate) fn hurry(&self) {
        self.pages.hurry();
    }

    pub(crate) fn complete(self, config: &VmConfig, state: VmState) -> Result<Digest, WriteError> {
        let Self { staged, announced, base, pages, limits, .. } = self;
        let memory = announced.settle(&state, pages.placement(), &limits)?;
        let state = state.relist(&memory)?;
        let began = Instant::now();
        let into = staged.make_file(CHANGES_FILE)?;
        let settled = pages.settle(&memory, &into).map_err(|error| match error {
            SettleError::Work(source) => staged.write_error(WORK_FILE, source).into(),
            SettleError::Copy(source) => staged.write_error(CHANGES_FILE, source).into(),
            SettleError::Placement(source) => WriteError::Placement(source),
        })?;
        log::info!(
            "{} that changed, of {} of memory, are hashed and safe on disk after {}",
            Bytes(settled.runs.bytes()),
            Bytes(memory.bytes()),
            Millis(began.elapsed()),
        );
        staged.remove_file(WORK_FILE)?;
        let changes = Changes { base, runs: settled.runs, zero_runs: settled.zero_runs };
        let page = announced.layout().host_page();
        let changes = Some(changes);
        let manifest = Manifest { changes, ..Manifest::of_full(page, config, &state, settled.blocks) };
        publish(staged, config, &state, &manifest, &limits)
    }
}
