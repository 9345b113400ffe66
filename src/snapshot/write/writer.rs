// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Writes a full snapshot.

use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::time::Instant;

use thiserror::Error;
use vm_memory::GuestMemoryBackend;

use crate::granule::Granule;
use crate::layout::Layout;
use crate::range::GpaRange;
use crate::snapshot::disk::files::{CONFIG_FILE, MANIFEST_FILE, MEMORY_FILE, STATE_FILE};
use crate::snapshot::disk::staging::{StagedDir, StagingError, WORK_FILE};
use crate::snapshot::format::digest::Digest;
use crate::snapshot::format::document::VmConfig;
use crate::snapshot::format::document_error::DocumentError;
use crate::snapshot::format::limits::Limits;
use crate::snapshot::format::manifest::Manifest;
use crate::snapshot::format::placement::{Placement, PlacementError};
use crate::snapshot::format::state::VmState;
use crate::snapshot::parallel;
use crate::snapshot::write::feed::{FeedError, from_memory, from_stream};
use crate::snapshot::write::memory_file::MemoryFile;
use crate::threads::ThreadStart;
use crate::units::{Bytes, Count, Millis};
use crate::vm::ReadableCheck;

/// Why no snapshot was written. Nothing lies under its name.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum WriteError {
    /// The directory could not be made, filled or moved to its name.
    #[error(transparent)]
    Staging(#[from] StagingError),
    /// Configuration or state are not what they should be.
    #[error(transparent)]
    Document(#[from] DocumentError),
    /// The VM's RAM exceeds the limits.
    #[error("Cannot place the VM's RAM")]
    Placement(#[from] PlacementError),
    /// The state speaks of memory that the VM did not announce.
    #[error("state.json lists memory {range}, which was not announced as RAM")]
    Unannounced {
        /// The memory.
        range: GpaRange,
    },
    /// The state leaves out memory that cannot be unplugged, as the memory of a zone that shares a named file.
    #[error("state.json leaves out memory {range}, so a snapshot would lack it")]
    LeftOut {
        /// The memory.
        range: GpaRange,
    },
    /// A file would be larger than what is read with the same limits.
    #[error("{name} of {path} would have {}, the limit is {limit}", Count(.bytes, "byte"), path = .path.display())]
    Unreadable {
        /// The file.
        name: &'static str,
        /// The directory to be.
        path: PathBuf,
        /// Bytes it would have.
        bytes: u64,
        /// The limit.
        limit: u64,
    },
    /// Nothing names the snapshot to differ from.
    #[error("{path} has no manifest to name it, so nothing can be a differential to it", path = .path.display())]
    UnnamedBase {
        /// The snapshot.
        path: PathBuf,
        /// Why [`seal`](crate::snapshot::seal()) gives it none, if that is so.
        source: Option<PlacementError>,
    },
}

/// The RAM of a VM as it is announced before its state is known.
#[derive(Debug, Clone)]
pub struct Announced {
    layout: Layout,
    hotpluggable: Placement,
}

impl Announced {
    /// All of `layout` is memory of the VM.
    pub fn all(layout: Layout) -> Self {
        Self { layout, hotpluggable: Placement::default() }
    }

    /// All of `layout` is memory of the VM but for those parts of `hotpluggable` that its state does not list.
    ///
    /// # Errors
    /// The parts overlap, or exceed `limits`.
    pub fn with_hotpluggable(
        layout: Layout,
        hotpluggable: &[GpaRange],
        limits: &Limits,
    ) -> Result<Self, PlacementError> {
        Ok(Self { layout, hotpluggable: Placement::new(hotpluggable.iter().copied(), limits)? })
    }

    /// The VM's RAM.
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// Returns where memory goes once the `state` is known: ascending, and only what the state lists.
    pub(crate) fn settle(
        &self,
        state: &VmState,
        placement: &Placement,
        limits: &Limits,
    ) -> Result<Placement, WriteError> {
        let listed = state.memory();
        if let Some(range) = listed.ranges().flat_map(|range| placement.missing(range)).next() {
            return Err(WriteError::Unannounced { range });
        }
        if placement.same_memory(listed) {
            return Ok(placement.clone());
        }
        // A manifest would list them, and nobody would read it.
        listed.check_pages(self.layout.host_page())?;
        let mut left_out = placement.ranges().flat_map(|range| listed.missing(range));
        if let Some(range) = left_out.find(|&range| !self.hotpluggable.holds(range)) {
            return Err(WriteError::LeftOut { range });
        }
        Ok(Placement::new(listed.ascending().iter().map(|extent| extent.range), limits)?)
    }
}

/// A full snapshot being written: takes pages in any order, from any number of threads.
///
/// Nothing lies under the final name before [`SnapshotWriter::finish`] returns; dropped before, it leaves nothing behind.
///
/// ```
/// use vfio_migration::{granule::Granule, layout::Layout, range::GpaRange, snapshot::*};
/// let parent = tempfile::tempdir()?;
/// let ram = GpaRange::new(0, 1 << 20)?;
/// let layout = Layout::new([ram], Granule::host_page())?;
/// let writer = SnapshotWriter::create(&parent.path().join("snapshot"), Announced::all(layout), Limits::default())?;
/// writer.fill(ram, &mut [7; 1 << 20].as_slice())?;
/// # let memory = r#"{\"memory_ranges\":{\"data\":[{\"gpa\":0,\"length\":1048576}]}}"#;
/// # let child = format!(r#"{{"snapshots":{{}},"snapshot_data":{{"state":"{memory}"}}}}"#);
/// # let state = format!(r#"{{"snapshots":{{"memory-manager":{child}}},"snapshot_data":null}}"#);
/// let digest = writer.finish(br#"{"memory":{"size":1048576}}"#, state.as_bytes())?;
/// assert_eq!(SnapshotDir::open(&parent.path().join("snapshot"), &Limits::default())?.digest(), Some(digest));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct SnapshotWriter {
    staged: StagedDir,
    announced: Announced,
    memory: MemoryFile,
    readable: ReadableCheck,
    limits: Limits,
}

impl SnapshotWriter {
    /// Begins a snapshot that will be the directory `target`, of a VM with the RAM `announced`.
    ///
    /// # Errors
    /// `target` is there and not an empty directory, cannot be made, or the RAM exceeds `limits`.
    pub fn create(target: &Path, announced: Announced, limits: Limits) -> Result<Self, WriteError> {
        Self::begin(StagedDir::create(target)?, announced, limits)
    }

    pub(crate) fn begin(staged: StagedDir, announced: Announced, limits: Limits) -> Result<Self, WriteError> {
        let placement = Placement::of_layout(&announced.layout, &limits)?;
        let memory =
            memory_file(&staged, MEMORY_FILE, placement, announced.layout.host_page(), limits.thread_start)?;
        Ok(Self { staged, announced, memory, readable: ReadableCheck::default(), limits })
    }

    /// The VM's RAM.
    pub fn layout(&self) -> &Layout {
        &self.announced.layout
    }

    /// Writes the bytes of `range` that `from` supplies, one after the other; later bytes replace earlier ones.
    ///
    /// Memory that is never filled reads as zero and takes no space.
    ///
    /// # Errors
    /// `range` is not all RAM, `from` fails or ends early, or the disk is full. Part of the bytes may be written.
    pub fn fill(&self, range: GpaRange, from: &mut dyn Read) -> io::Result<()> {
        self.memory.fill(range, from_stream(from)).map_err(|error| self.fill_error(error))
    }

    /// Writes `ranges` of guest memory, read through its own mapping: a userfaultfd registered for that fills what is missing. The first
    /// call looks for userfaultfds that fill it elsewhere.
    ///
    /// # Errors
    /// A range is not all RAM, the disk is full, or a userfaultfd fills `memory` through another mapping of its file only, so that
    /// what is missing would be read as zeros ([`UserfaultError`](crate::vm::UserfaultError)).
    pub fn copy_from<M: GuestMemoryBackend>(
        &self,
        ranges: impl IntoIterator<Item = GpaRange>,
        memory: &M,
    ) -> io::Result<()> {
        self.readable.check(memory).map_err(io::Error::other)?;
        let filled = ranges.into_iter().try_for_each(|range| self.memory.fill(range, from_memory(memory)));
        filled.map_err(|error| self.fill_error(error))
    }

    fn fill_error(&self, error: FeedError) -> io::Error {
        error.into_io(|source| self.staged.write_error(MEMORY_FILE, source))
    }

    /// Completes the snapshot with the texts of `config.json` and `state.json` and moves it to its name, safe on disk.
    ///
    /// The state's list of memory ranges is put in ascending order where it is not. Returns what names the snapshot.
    ///
    /// # Errors
    /// Nothing lies under the final name.
    pub fn finish(self, config: &[u8], state: &[u8]) -> Result<Digest, WriteError> {
        let config = VmConfig::parse(config, &self.limits)?;
        let state = VmState::parse(state.to_vec(), &self.limits)?;
        self.complete(&config, state, Vec::new())
    }

    /// Checks that `state` fits what was announced.
    pub(crate) fn check(&self, state: &VmState) -> Result<(), WriteError> {
        self.announced.settle(state, self.memory.placement(), &self.limits).map(drop)
    }

    /// Begins to bring to disk what was written until now; does not wait for it.
    pub(crate) fn hurry(&self) {
        self.memory.hurry();
    }

    /// Completes the snapshot; it also answers to the names `aliases`.
    pub(crate) fn complete(
        self,
        config: &VmConfig,
        state: VmState,
        aliases: Vec<Digest>,
    ) -> Result<Digest, WriteError> {
        let Self { staged, announced, memory, limits, .. } = self;
        let placement = announced.settle(&state, memory.placement(), &limits)?;
        let state = state.relist(&placement)?;
        let page = announced.layout.host_page();
        let threads = limits.thread_start;
        let same = placement == *memory.placement();
        let memory = if same { memory } else { shrink(&staged, memory, placement, page, threads)? };
        let (began, bytes) = (Instant::now(), memory.placement().bytes());
        let blocks = memory.finish().map_err(|source| staged.write_error(MEMORY_FILE, source))?;
        log::info!("Memory of {} is hashed and safe on disk after {}", Bytes(bytes), Millis(began.elapsed()));
        let manifest = Manifest { aliases, ..Manifest::of_full(page, config, &state, blocks) };
        publish(staged, config, &state, &manifest, &limits)
    }
}

/// Adds the texts and the manifest to a directory whose pages are on disk already, and moves it to its name.
pub(crate) fn publish(
    staged: StagedDir,
    config: &VmConfig,
    state: &VmState,
    manifest: &Manifest,
    limits: &Limits,
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
    // All at once: a journal brings them to disk in one go, and a VM may be waiting.
    parallel::for_each(&files, files.len(), limits.thread_start, |&(name, content)| {
        staged.write_file(name, content)
    })?;
    staged.publish()?;
    log::info!("Snapshot {digest} is safe under its name after {}", Millis(began.elapsed()));
    Ok(digest)
}

fn memory_file(
    staged: &StagedDir,
    name: &'static str,
    placement: Placement,
    page: Granule,
    threads: ThreadStart,
) -> Result<MemoryFile, StagingError> {
    let file = staged.make_file(name)?;
    MemoryFile::new(file, placement, page, threads).map_err(|source| staged.write_error(name, source))
}

/// Leaves out the memory that `placement` leaves out.
fn shrink(
    staged: &StagedDir,
    memory: MemoryFile,
    placement: Placement,
    page: Granule,
    threads: ThreadStart,
) -> Result<MemoryFile, StagingError> {
    let lost = |source| staged.write_error(MEMORY_FILE, source);
    memory.check_written().map_err(lost)?;
    let smaller = memory_file(staged, WORK_FILE, placement, page, threads)?;
    memory.copy_to(&smaller).map_err(|error| match error {
        FeedError::Read(source) => lost(source),
        FeedError::Write(source) => staged.write_error(WORK_FILE, source),
    })?;
    memory.give_up().map_err(lost)?;
    staged.replace_file(WORK_FILE, MEMORY_FILE)?;
    Ok(smaller)
}
