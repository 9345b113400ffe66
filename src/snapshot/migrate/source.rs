// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A snapshot on disk as the VM that a sender sends.

use std::fs::File;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use thiserror::Error;
use vm_memory::GuestRegionCollectionError;
use vm_migration::Snapshot;

use crate::granule::Granule;
use crate::layout::{Layout, LayoutError};
use crate::snapshot::disk::files::{expect_length, named};
use crate::snapshot::format::elsewhere::Elsewhere;
use crate::snapshot::format::placement::PlacementError;
use crate::snapshot::migrate::checking::Checking;
use crate::snapshot::read::dir::{OpenError, SnapshotDir};
use crate::snapshot::read::placed::{PlacedMemory, regions};
use crate::vm::{Backing, Captured, Vm, VmError};

/// Why a snapshot cannot be sent.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum SourceError {
    /// Part of the memory is not in the snapshot: a receiver would run the VM without it.
    #[error("{path} lacks memory that the VM has: {elsewhere}", path = .path.display())]
    Elsewhere {
        /// The snapshot.
        path: PathBuf,
        /// Where the memory is.
        elsewhere: Elsewhere,
    },
    /// There is no memory.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// The memory is not of whole pages.
    #[error("Cannot divide the memory of {path} into pages", path = .path.display())]
    Pages {
        /// The snapshot.
        path: PathBuf,
        /// Which part.
        source: PlacementError,
    },
    /// The memory cannot be laid out on this host.
    #[error("Cannot lay out the memory of {path}", path = .path.display())]
    Layout {
        /// The snapshot.
        path: PathBuf,
        /// Why.
        source: LayoutError,
    },
    /// The file cannot be opened a second time.
    #[error("Cannot share {path}", path = .path.display())]
    Share {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Its file cannot be read or was cut off, or a block of a snapshot with a manifest was altered: then the source is an
    /// [`Altered`](crate::snapshot::Altered).
    #[error("Cannot send {path}", path = .path.display())]
    Check {
        /// The snapshot.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The ranges do not make up a guest's memory.
    #[error("Cannot gather the memory of {path}", path = .path.display())]
    Gather {
        /// The snapshot.
        path: PathBuf,
        /// Why.
        source: GuestRegionCollectionError,
    },
}

/// A snapshot on disk that plays the source of a migration: a VM that stands still.
///
/// Its memory is read from the file, and has no address in this process; holes of the file are holes of the memory.
/// With a manifest, every block is checked against it while the memory is sent, by threads of the source; [`Vm::pause`]
/// waits for them and fails where one was altered, before the receiver has the VM.
///
/// A file that is cut off while it is sent, or that the disk cannot read, ends the migration with an error that names it.
#[derive(Debug)]
pub struct SnapshotSource {
    dir: Arc<SnapshotDir>,
    /// From the first word to the receiver until the VM is paused.
    checking: Option<Checking>,
    layout: Layout,
    file: Arc<File>,
    memory: Arc<PlacedMemory>,
}

impl SnapshotSource {
    /// Makes a VM of `dir`.
    ///
    /// # Errors
    /// Memory is missing, is not of whole pages of 4 KiB, or was cut off.
    pub fn new(dir: SnapshotDir) -> Result<Self, SourceError> {
        let path = || dir.path().to_owned();
        let elsewhere = dir.elsewhere();
        if !elsewhere.is_empty() {
            return Err(SourceError::Elsewhere { path: path(), elsewhere });
        }
        let file = dir.memory()?;
        check_length(&dir)?;
        let page = dir.placement().page(Granule::host_page());
        let page = page.map_err(|source| SourceError::Pages { path: path(), source })?;
        let layout = Layout::new(dir.placement().ranges(), page)
            .map_err(|source| SourceError::Layout { path: path(), source })?;
        let file =
            file.try_clone().map_err(|source| SourceError::Share { path: dir.memory_path(), source })?;
        let file = Arc::new(file);
        let regions = regions(&file, dir.memory_path(), dir.placement());
        let memory = PlacedMemory::from_regions(regions)
            .map_err(|source| SourceError::Gather { path: path(), source })?;
        Ok(Self { dir: Arc::new(dir), checking: None, layout, file, memory: Arc::new(memory) })
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

    fn begin_check(&mut self) -> Result<(), SourceError> {
        self.give_up_check();
        self.checking = Some(Checking::start(&self.dir).map_err(unsound(&self.dir))?);
        Ok(())
    }

    fn end_check(&mut self) -> Result<(), SourceError> {
        let checked = self.checking.take().map_or(Ok(()), Checking::finish);
        checked.map_err(unsound(&self.dir))?;
        check_length(&self.dir)
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
    let checked = expect_length(dir.memory()?, dir.placement().bytes());
    checked.map_err(named(|| dir.memory_path())).map_err(unsound(dir))
}

fn unsound(dir: &SnapshotDir) -> impl FnOnce(io::Error) -> SourceError {
    |source| SourceError::Check { path: dir.path().to_owned(), source }
}

impl Vm for SnapshotSource {
    type Memory = PlacedMemory;

    fn memory(&self) -> Arc<Self::Memory> {
        Arc::clone(&self.memory)
    }

    fn backing(&self) -> Backing {
        let extents = self.dir.placement().ascending().iter();
        extents.fold(Backing::default(), |backing, extent| {
            backing.shared_file(extent.range, Arc::clone(&self.file), extent.offset)
        })
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
