// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Writes a snapshot, full or differential.

use std::io::{self, Read};
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use vm_memory::GuestMemoryBackend;

use super::announced::AnnouncedRam;
use super::changed_pages::ChangedPages;
use super::full_pages::{FullPages, block_bytes_while_written};
use super::laid_out::SettleError;
use super::sparse_file::{FillError, from_memory, from_stream};
use crate::layout::Layout;
use crate::range::GpaRange;
use crate::snapshot::disk::{ManifestUse, ReadError, StagedDir, WriteError};
use crate::snapshot::format::{
    BlockTable, CHANGES_FILE, CONFIG_FILE, Changes, Digest, MANIFEST_FILE, MEMORY_FILE, Manifest, Placement,
    STATE_FILE, SnapshotLimits, VmConfig, VmState, WORK_FILE,
};
use crate::snapshot::parallel;
use crate::snapshot::read::SnapshotChain;
use crate::threads::ThreadStart;
use crate::units::{Bytes, Millis};
use crate::vm::ReadableCheck;

/// The snapshot that a differential differs from.
#[derive(Debug, Clone)]
pub enum Base {
    /// One that is not read. The pages to come are those that changed since it was taken, as a ledger's cursor knows them.
    Named(Digest),
    /// One that is read and compared with. All pages may come; those that equal it are left out.
    Compared(Arc<SnapshotChain>),
}

impl Base {
    /// Opens the snapshot to compare with: `paths` as for [`SnapshotChain::open`].
    ///
    /// # Errors
    /// The snapshots are not a chain, or the one on top has no manifest to name it.
    pub fn open<P: AsRef<Path>>(
        paths: impl IntoIterator<Item = P>,
        limits: &SnapshotLimits,
    ) -> Result<Self, ReadError> {
        let chain = SnapshotChain::open(paths, limits)?;
        chain.top().expect_manifest(ManifestUse::Name)?;
        Ok(Self::Compared(Arc::new(chain)))
    }

    /// Returns what names the base, and the base if it is to be compared with.
    fn resolve(self) -> Result<(Digest, Option<Arc<SnapshotChain>>), WriteError> {
        match self {
            Self::Named(digest) => Ok((digest, None)),
            Self::Compared(chain) => match chain.digest() {
                Some(digest) => Ok((digest, Some(chain))),
                None => {
                    let source = chain.top().obstacle();
                    Err(WriteError::UnnamedBase { path: chain.path().to_owned(), source })
                }
            },
        }
    }
}

/// The pages of the snapshot.
#[derive(Debug)]
enum PageFile {
    /// All of them.
    Full(FullPages),
    /// Those that differ from the base that the digest names.
    Differential(Digest, Box<ChangedPages>),
}

impl PageFile {
    /// The file that holds them for now.
    fn name(&self) -> &'static str {
        match self {
            Self::Full(_) => MEMORY_FILE,
            Self::Differential(..) => WORK_FILE,
        }
    }

    fn placement(&self) -> &Placement {
        match self {
            Self::Full(pages) => pages.placement(),
            Self::Differential(_, pages) => pages.placement(),
        }
    }

    fn fill(
        &self,
        range: GpaRange,
        read: impl FnMut(GpaRange, &mut [u8]) -> io::Result<()>,
    ) -> Result<(), FillError> {
        match self {
            Self::Full(pages) => pages.fill(range, read),
            Self::Differential(_, pages) => pages.fill(range, read),
        }
    }

    fn update(
        &self,
        range: GpaRange,
        read: impl FnMut(GpaRange, &mut [u8]) -> io::Result<()>,
    ) -> Result<u64, FillError> {
        match self {
            Self::Full(pages) => pages.update(range, read),
            Self::Differential(_, pages) => pages.update(range, read),
        }
    }

    fn stored(&self) -> io::Result<Vec<GpaRange>> {
        match self {
            Self::Full(pages) => pages.stored(),
            Self::Differential(_, pages) => pages.stored(),
        }
    }

    fn sync_until(&self, until: Option<Instant>) -> io::Result<()> {
        match self {
            Self::Full(pages) => pages.sync_until(until),
            Self::Differential(_, pages) => pages.sync_until(until),
        }
    }
}

/// A snapshot being written, full or a differential to a base: takes pages in any order, from any number of threads.
///
/// Nothing lies under the final name before [`SnapshotWriter::finish`] returns; dropped before, it leaves nothing behind.
///
/// In a full snapshot, memory that never comes reads as zero and takes no space. In a differential, a page that never comes is as in
/// the base; [`crate::snapshot`] shows how it gets every page that changed since then, whoever wrote it, and no other.
///
/// ```
/// use vfio_migration::{granule::Granule, layout::Layout, range::GpaRange, snapshot::*};
/// let parent = tempfile::tempdir()?;
/// let ram = GpaRange::new(0, 1 << 20)?;
/// let layout = Layout::new([ram], Granule::host_page())?;
/// let writer = SnapshotWriter::create(&parent.path().join("snapshot"), AnnouncedRam::all(layout), None, SnapshotLimits::default())?;
/// writer.fill(ram, &mut [7; 1 << 20].as_slice())?;
/// # let memory = r#"{\"memory_ranges\":{\"data\":[{\"gpa\":0,\"length\":1048576}]}}"#;
/// # let child = format!(r#"{{"snapshots":{{}},"snapshot_data":{{"state":"{memory}"}}}}"#);
/// # let state = format!(r#"{{"snapshots":{{"memory-manager":{child}}},"snapshot_data":null}}"#);
/// let digest = writer.finish(br#"{"memory":{"size":1048576}}"#, state.as_bytes())?;
/// assert_eq!(FullSnapshot::open(&parent.path().join("snapshot"), &SnapshotLimits::default())?.digest(), Some(digest));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct SnapshotWriter {
    staged: StagedDir,
    announced: AnnouncedRam,
    pages: PageFile,
    readable: ReadableCheck,
    limits: SnapshotLimits,
}

impl SnapshotWriter {
    /// Begins a snapshot that will be the directory `target`, of a VM with the RAM `announced`: a differential to `base`, or a full
    /// one.
    ///
    /// # Errors
    /// `target` is there and not an empty directory, cannot be made, the RAM exceeds `limits`, or nothing names the base.
    pub fn create(
        target: &Path,
        announced: AnnouncedRam,
        base: Option<Base>,
        limits: SnapshotLimits,
    ) -> Result<Self, WriteError> {
        Self::begin(StagedDir::create(target)?, announced, base, limits)
    }

    pub(crate) fn begin(
        staged: StagedDir,
        announced: AnnouncedRam,
        base: Option<Base>,
        limits: SnapshotLimits,
    ) -> Result<Self, WriteError> {
        let base = base.map(Base::resolve).transpose()?;
        let placement = Placement::of_layout(announced.layout(), &limits)?;
        let (page, threads) = (announced.layout().host_page(), limits.thread_start);
        let (name, made) = match base {
            None => {
                let file = staged.make_file(MEMORY_FILE)?;
                (
                    MEMORY_FILE,
                    FullPages::new(file, placement, page, announced.expected_bytes(), threads)
                        .map(PageFile::Full),
                )
            }
            Some((digest, chain)) => {
                let work = staged.make_file(WORK_FILE)?;
                let pages = ChangedPages::new(work, placement, page, chain, threads);
                (WORK_FILE, pages.map(|pages| PageFile::Differential(digest, Box::new(pages))))
            }
        };
        let pages = made.map_err(|source| staged.write_error(name, source))?;
        Ok(Self { staged, announced, pages, readable: ReadableCheck::default(), limits })
    }

    /// The VM's RAM.
    pub fn layout(&self) -> &Layout {
        self.announced.layout()
    }

    /// Writes the bytes of `range` that `from` supplies, one after the other; later bytes replace earlier ones.
    ///
    /// # Errors
    /// `range` is not all RAM, or not of whole pages where that of a differential has to be; `from` fails or ends early, or the disk is
    /// full. Part of the bytes may be written.
    pub fn fill(&self, range: GpaRange, from: &mut dyn Read) -> io::Result<()> {
        self.pages.fill(range, from_stream(from)).map_err(|error| self.fill_error(error))
    }

    /// Writes `ranges` of guest memory, for a differential those of the chunks that a ledger's cursor for its base hands out.
    ///
    /// They are read through `memory`'s own mapping: a userfaultfd registered for that fills what is missing. The first call looks for
    /// userfaultfds that fill it elsewhere.
    ///
    /// # Errors
    /// As [`SnapshotWriter::fill`], or a userfaultfd fills `memory` through another mapping of its file only, so that what is missing
    /// would be read as zeros ([`UserfaultError`](crate::vm::UserfaultError)).
    pub fn copy_from<M: GuestMemoryBackend>(
        &self,
        ranges: impl IntoIterator<Item = GpaRange>,
        memory: &M,
    ) -> io::Result<()> {
        self.readable.check(memory).map_err(io::Error::other)?;
        let filled = ranges.into_iter().try_for_each(|range| self.pages.fill(range, from_memory(memory)));
        filled.map_err(|error| self.fill_error(error))
    }

    /// Writes the bytes of `range` that `read` supplies piece by piece.
    pub(crate) fn fill_with(
        &self,
        range: GpaRange,
        read: impl FnMut(GpaRange, &mut [u8]) -> io::Result<()>,
    ) -> io::Result<()> {
        self.pages.fill(range, read).map_err(|error| self.fill_error(error))
    }

    /// Writes those pages of `range` that are not as they were stored already; returns how many bytes were written.
    pub(crate) fn update_with(
        &self,
        range: GpaRange,
        read: impl FnMut(GpaRange, &mut [u8]) -> io::Result<()>,
    ) -> io::Result<u64> {
        self.pages.update(range, read).map_err(|error| self.fill_error(error))
    }

    /// The memory that is stored as data, and not as a hole.
    pub(crate) fn stored(&self) -> io::Result<Vec<GpaRange>> {
        self.pages.stored().map_err(|error| self.fill_error(FillError::Write(error)))
    }

    /// Does what can be done of [`SnapshotWriter::finish`] before the last pages come, if it takes no longer than `until`.
    pub(crate) fn prepare(&self, until: Option<Instant>) -> Result<(), WriteError> {
        let PageFile::Differential(_, pages) = &self.pages else { return Ok(()) };
        let into = self.staged.make_file(CHANGES_FILE)?;
        match pages.lay_out(into, until).map_err(|error| settle_error(&self.staged, error))? {
            true => Ok(()),
            false => self.staged.remove_file(CHANGES_FILE),
        }
    }

    /// Has those who write wait for a slow disk no longer than `until`; `None`: for as long as it takes.
    pub(crate) fn wait_until(&self, until: Option<Instant>) {
        match &self.pages {
            PageFile::Full(pages) => pages.wait_until(until),
            PageFile::Differential(_, pages) => pages.wait_until(until),
        }
    }

    /// Brings to disk what was written until now, and waits for it, but no longer than `until`.
    pub(crate) fn sync_until(&self, until: Option<Instant>) -> io::Result<()> {
        self.pages.sync_until(until).map_err(|error| self.fill_error(FillError::Write(error)))
    }

    /// Bytes of memory that one digest of a full snapshot covers.
    pub(crate) fn block_bytes(&self) -> u64 {
        let expected = self.announced.expected_bytes();
        block_bytes_while_written(self.layout().bytes(), expected, self.layout().host_page())
    }

    /// What the threads that write do first.
    pub(crate) fn threads(&self) -> ThreadStart {
        self.limits.thread_start
    }

    fn fill_error(&self, error: FillError) -> io::Error {
        error.into_io(|source| self.staged.write_error(self.pages.name(), source))
    }

    /// Completes the snapshot with the texts of `config.json` and `state.json` and moves it to its name, safe on disk.
    ///
    /// The state's list of memory ranges is put in ascending order where it is not. A differential takes time in proportion to the
    /// pages that differ. Returns what names the snapshot.
    ///
    /// # Errors
    /// Nothing lies under the final name.
    pub fn finish(self, config: &[u8], state: &[u8]) -> Result<Digest, WriteError> {
        let config = VmConfig::parse(config, &self.limits)?;
        let state = VmState::parse(state.to_vec(), &self.limits)?;
        Ok(self.complete(&config, state, Vec::new())?.digest)
    }

    /// Counts pages that never come as zero pages; call it before any page comes. A source leaves zero pages out if the receiver's memory
    /// reads as zero.
    pub(crate) fn presume_zeros(&self) -> Result<(), WriteError> {
        match &self.pages {
            PageFile::Full(_) => Ok(()),
            PageFile::Differential(_, pages) => {
                pages.presume_zeros().map_err(|source| self.staged.write_error(WORK_FILE, source))
            }
        }
    }

    /// Checks that `state` fits what was announced.
    pub(crate) fn check(&self, state: &VmState) -> Result<(), WriteError> {
        self.announced.settle(state, self.pages.placement(), &self.limits).map(drop)
    }

    /// Begins to bring to disk what was written until now; does not wait for it.
    pub(crate) fn hurry(&self) {
        match &self.pages {
            PageFile::Full(pages) => pages.hurry(),
            PageFile::Differential(_, pages) => pages.hurry(),
        }
    }

    /// Completes the snapshot; it also answers to the names `aliases`.
    pub(crate) fn complete(
        self,
        config: &VmConfig,
        state: VmState,
        aliases: Vec<Digest>,
    ) -> Result<Completed, WriteError> {
        let Self { staged, announced, pages, limits, .. } = self;
        let memory = announced.settle(&state, pages.placement(), &limits)?;
        let state = state.relist(&memory)?;
        let page = announced.layout().host_page();
        let began = Instant::now();
        let (changes, blocks, moved_bytes) = match pages {
            PageFile::Full(mut pages) => {
                let moved = if memory == *pages.placement() { Ok(0) } else { pages.keep(memory) };
                let moved = moved.map_err(|source| staged.write_error(MEMORY_FILE, source))?;
                let bytes = pages.placement().bytes();
                let blocks = pages.finish().map_err(|source| staged.write_error(MEMORY_FILE, source))?;
                log::info!(
                    "Memory of {} is hashed and safe on disk after {}",
                    Bytes(bytes),
                    Millis(began.elapsed())
                );
                (None, blocks, moved)
            }
            PageFile::Differential(base, pages) => {
                let (changes, blocks, moved) = settle(&staged, base, *pages, &memory)?;
                log::info!(
                    "{} that changed, of {} of memory, are hashed and safe on disk after {}",
                    Bytes(changes.runs.bytes()),
                    Bytes(memory.bytes()),
                    Millis(began.elapsed()),
                );
                (Some(changes), blocks, moved)
            }
        };
        let manifest = Manifest { changes, aliases, ..Manifest::of_full(page, config, &state, blocks) };
        let digest = publish(staged, config, &state, &manifest, &limits)?;
        Ok(Completed { digest, moved_bytes })
    }
}

/// A snapshot that is whole and safe on disk.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Completed {
    /// What names it.
    pub(crate) digest: Digest,
    /// Bytes that were moved to leave out memory which was announced and is none.
    pub(crate) moved_bytes: u64,
}

/// Puts those of the pages that differ and lie in `memory` back to back, unless they are.
fn settle(
    staged: &StagedDir,
    base: Digest,
    pages: ChangedPages,
    memory: &Placement,
) -> Result<(Changes, BlockTable, u64), WriteError> {
    let settled = pages.settle(base, memory, || staged.make_file(CHANGES_FILE));
    let settled = settled.map_err(|error| settle_error(staged, error))?;
    staged.remove_file(WORK_FILE)?;
    Ok(settled)
}

fn settle_error(staged: &StagedDir, error: SettleError) -> WriteError {
    match error {
        SettleError::Work(source) => staged.write_error(WORK_FILE, source),
        SettleError::Copy(source) => staged.write_error(CHANGES_FILE, source),
        SettleError::Placement(source) => WriteError::Placement(source),
        SettleError::Make(error) => error,
    }
}

/// Adds the texts and the manifest to a directory whose pages are on disk already, and moves it to its name.
fn publish(
    staged: StagedDir,
    config: &VmConfig,
    state: &VmState,
    manifest: &Manifest,
    limits: &SnapshotLimits,
) -> Result<Digest, WriteError> {
    let began = Instant::now();
    let (bytes, digest) =
        manifest.encode().map_err(|source| staged.write_error(MANIFEST_FILE, source.into()))?;
    let within = |name, bytes: &[u8], limit| match bytes.len() as u64 {
        bytes if bytes <= limit => Ok(()),
        bytes => Err(WriteError::Unreadable { name, path: staged.target().to_owned(), bytes, limit }),
    };
    within(STATE_FILE, state.text(), limits.state_bytes)?;
    within(MANIFEST_FILE, &bytes, limits.manifest_bytes)?;
    let files =
        [(CONFIG_FILE, config.text().as_bytes()), (STATE_FILE, state.text()), (MANIFEST_FILE, &bytes)];
    // All at once: a journaling file system syncs them together, and a paused VM may be waiting.
    parallel::for_each(&files, files.len(), limits.thread_start, |&(name, content)| {
        staged.write_file(name, content)
    })?;
    staged.publish()?;
    log::info!("Snapshot {digest} is safe under its name after {}", Millis(began.elapsed()));
    Ok(digest)
}
