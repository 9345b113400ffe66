// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A snapshot on disk as the VM that a sender sends.

use std::fs::File;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use thiserror::Error;
use vm_memory::mmap::{MmapRegionBuilder, MmapRegionError};
use vm_memory::{FileOffset, GuestAddress, GuestMemoryMmap, GuestRegionCollectionError, GuestRegionMmap};
use vm_migration::Snapshot;

use super::checking::Checking;
use super::dir::SnapshotDir;
use super::files::{MEMORY_FILE, expect_length};
use super::placement::Extent;
use crate::granule::Granule;
use crate::layout::{Layout, LayoutError};
use crate::range::GpaRange;
use crate::vm::{Backing, Captured, Vm, VmError};

/// Why a snapshot cannot be sent.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum SourceError {
    /// The memory cannot be laid out on this host.
    #[error("Cannot lay out the snapshot's memory")]
    Layout(#[from] LayoutError),
    /// The file cannot be opened a second time.
    #[error("Cannot share memory-ranges")]
    Share(#[source] io::Error),
    /// A part of the file cannot be mapped.
    #[error("Cannot map memory {range}")]
    Map {
        /// The memory.
        range: GpaRange,
        /// Why.
        source: MmapRegionError,
    },
    /// The file was cut off, or a block of a snapshot with a manifest was altered: then the source is an
    /// [`Altered`](super::Altered).
    #[error("Cannot send {path}", path = .path.display())]
    Check {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The mappings do not make up a guest's memory.
    #[error("Cannot gather the snapshot's memory")]
    Gather(#[source] GuestRegionCollectionError),
}

/// A snapshot on disk that plays the source of a migration: a VM that stands still.
///
/// Its memory is the file itself, mapped to be read: nothing may write to it, and holes of the file are holes of the memory.
/// With a manifest, every block is checked against it while the memory is sent, by threads of the source; [`Vm::pause`]
/// waits for them and fails where one was altered, before the receiver has the VM.
///
/// The file must not be cut off while it is sent: to read a mapping behind the end of its file may kill the process with SIGBUS.
#[derive(Debug)]
pub struct SnapshotSource {
    dir: Arc<SnapshotDir>,
    /// From the first word to the receiver until the VM is paused.
    checking: Option<Checking>,
    layout: Layout,
    memory: Arc<GuestMemoryMmap<()>>,
}

impl SnapshotSource {
    /// Maps the memory of `dir`.
    ///
    /// # Errors
    /// The memory is not of whole pages of this host, was cut off, or cannot be mapped.
    pub fn new(dir: SnapshotDir) -> Result<Self, SourceError> {
        let layout = Layout::new(dir.placement().ranges(), Granule::host_page())?;
        check_length(&dir)?;
        let file = Arc::new(dir.memory().try_clone().map_err(SourceError::Share)?);
        let extents = dir.placement().ascending();
        let regions: Result<Vec<_>, _> = extents.iter().map(|&extent| map(&file, extent)).collect();
        let memory = GuestMemoryMmap::from_arc_regions(regions?).map_err(SourceError::Gather)?;
        Ok(Self { dir: Arc::new(dir), checking: None, layout, memory: Arc::new(memory) })
    }

    /// The VM's RAM.
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// Whether the memory of a VM that is made with the snapshot's configuration reads zero: none of it is a named file's.
    ///
    /// See [`SendOptions::receiver_reads_zero`](crate::transfer::SendOptions::receiver_reads_zero).
    pub fn receiver_reads_zero(&self) -> bool {
        self.dir.config().file_zones().is_empty()
    }

    /// The snapshot.
    pub fn dir(&self) -> &SnapshotDir {
        &self.dir
    }

    /// Checks that the file was not cut off, which shows as a failed connection while it is sent.
    ///
    /// # Errors
    /// [`SourceError::Check`]: it was.
    pub fn check_length(&self) -> Result<(), SourceError> {
        check_length(&self.dir)
    }

    fn begin_check(&mut self) -> Result<(), SourceError> {
        self.give_up_check();
        self.checking = Some(Checking::start(&self.dir).map_err(unsound(&self.dir))?);
        Ok(())
    }

    fn end_check(&mut self) -> Result<(), SourceError> {
        let checked = self.checking.take().map_or(Ok(()), Checking::finish);
        checked.map_err(unsound(&self.dir))?;
        self.check_length()
    }

    fn give_up_check(&self) {
        self.checking.iter().for_each(Checking::give_up);
    }
}

impl Drop for SnapshotSource {
    fn drop(&mut self) {
        self.give_up_check();
    }
}

fn check_length(dir: &SnapshotDir) -> Result<(), SourceError> {
    expect_length(dir.memory(), dir.placement().bytes()).map_err(unsound(dir))
}

fn unsound(dir: &SnapshotDir) -> impl FnOnce(io::Error) -> SourceError {
    |source| SourceError::Check { path: dir.path().join(MEMORY_FILE), source }
}

fn map(file: &Arc<File>, extent: Extent) -> Result<Arc<GuestRegionMmap<()>>, SourceError> {
    let failed = |source| SourceError::Map { range: extent.range, source };
    let size =
        usize::try_from(extent.range.len()).map_err(|_| failed(MmapRegionError::InvalidOffsetLength))?;
    let mapping = MmapRegionBuilder::new(size)
        .with_file_offset(FileOffset::from_arc(Arc::clone(file), extent.offset))
        .with_mmap_prot(libc::PROT_READ)
        .with_mmap_flags(libc::MAP_SHARED | libc::MAP_NORESERVE)
        .build()
        .map_err(failed)?;
    let region = GuestRegionMmap::new(mapping, GuestAddress(extent.range.start()));
    region.map(Arc::new).ok_or_else(|| failed(MmapRegionError::InvalidOffsetLength))
}

impl Vm for SnapshotSource {
    type Memory = GuestMemoryMmap<()>;

    fn memory(&self) -> Arc<Self::Memory> {
        Arc::clone(&self.memory)
    }

    fn backing(&self) -> Backing {
        Backing::of_mmap(&self.memory)
    }

    /// Tells the configuration, and begins to check the memory.
    fn config(&mut self) -> Result<Vec<u8>, VmError> {
        self.begin_check()?;
        Ok(self.dir.config_message()?)
    }

    /// Waits until the memory is checked. The VM stands still anyway.
    fn pause(&mut self) -> Result<(), VmError> {
        Ok(self.end_check()?)
    }

    /// Does nothing: the VM never runs here.
    fn resume(&mut self) -> Result<(), VmError> {
        Ok(())
    }

    /// Returns the text as it was stored, the state of pass-through devices in it.
    fn state(&mut self, _devices: Snapshot) -> Result<Captured, VmError> {
        Ok(Captured::Text(self.dir.state().shared_text()))
    }

    fn can_throttle(&self) -> bool {
        false
    }

    fn throttle(&mut self, _percent: u8) {}
}
