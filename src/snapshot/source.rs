// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A snapshot on disk as the VM that a sender sends.

use std::fs::File;
use std::io;
use std::sync::Arc;

use thiserror::Error;
use vm_memory::mmap::{MmapRegionBuilder, MmapRegionError};
use vm_memory::{FileOffset, GuestAddress, GuestMemoryMmap, GuestRegionCollectionError, GuestRegionMmap};
use vm_migration::Snapshot;

use super::dir::SnapshotDir;
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
    /// The mappings do not make up a guest's memory.
    #[error("Cannot gather the snapshot's memory")]
    Gather(#[source] GuestRegionCollectionError),
}

/// A snapshot on disk that plays the source of a migration: a VM that stands still.
///
/// Its memory is the file itself, mapped to be read: nothing may write to it, and holes of the file are holes of the memory.
/// The file must not be cut off while it is sent.
#[derive(Debug)]
pub struct SnapshotSource {
    dir: SnapshotDir,
    layout: Layout,
    memory: Arc<GuestMemoryMmap<()>>,
}

impl SnapshotSource {
    /// Maps the memory of `dir`.
    ///
    /// # Errors
    /// The memory is not of whole pages of this host, or cannot be mapped.
    pub fn new(dir: SnapshotDir) -> Result<Self, SourceError> {
        let layout = Layout::new(dir.placement().ranges(), Granule::host_page())?;
        let file = Arc::new(dir.memory().try_clone().map_err(SourceError::Share)?);
        let extents = dir.placement().ascending();
        let regions: Result<Vec<_>, _> = extents.iter().map(|&extent| map(&file, extent)).collect();
        let memory = GuestMemoryMmap::from_arc_regions(regions?).map_err(SourceError::Gather)?;
        Ok(Self { dir, layout, memory: Arc::new(memory) })
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

    fn config(&mut self) -> Result<Vec<u8>, VmError> {
        Ok(self.dir.config_message()?)
    }

    /// Does nothing: the VM stands still.
    fn pause(&mut self) -> Result<(), VmError> {
        Ok(())
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
