// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A snapshot on disk as the VM that a sender sends.

use std::fs::File;
use std::io;
use std::sync::Arc;

use vm_migration::Snapshot;

use super::background_check::BackgroundCheck;
use crate::layout::Layout;
use crate::snapshot::disk::{expect_length, named};
use crate::snapshot::ops::{OperationError, lay_out};
use crate::snapshot::read::{FullSnapshot, PlacedMemory, regions};
use crate::vm::{Backing, Captured, Vm, VmError};

/// A snapshot on disk as the source of a migration: a VM that is paused all the time.
///
/// Its memory is read from the file, and has no address in this process; holes of the file are holes of the memory.
/// With a manifest, every block is checked against it while the memory is sent, by threads of the source; [`Vm::pause`]
/// waits for them and fails where one was altered, before the receiver has the VM.
///
/// A file that is cut off while it is sent, or that the disk cannot read, ends the migration with an error that names it.
#[derive(Debug)]
pub struct SnapshotSource {
    snapshot: Arc<FullSnapshot>,
    /// From when the configuration is sent until the VM is paused.
    check: Option<BackgroundCheck>,
    layout: Layout,
    file: Arc<File>,
    memory: Arc<PlacedMemory>,
}

impl SnapshotSource {
    /// Makes a VM of `snapshot`.
    ///
    /// # Errors
    /// Memory is missing, is not of whole pages of 4 KiB, or was cut off.
    pub fn new(snapshot: FullSnapshot) -> Result<Self, OperationError> {
        let path = || snapshot.path().to_owned();
        let elsewhere = snapshot.elsewhere();
        if !elsewhere.is_empty() {
            return Err(OperationError::Elsewhere { path: path(), elsewhere });
        }
        let memory = snapshot.memory()?;
        check_length(&snapshot)?;
        let layout = lay_out(snapshot.path(), memory.placement)?;
        let file = memory.file.try_clone();
        let file = file.map_err(|source| OperationError::Share { path: memory.path(), source })?;
        let file = Arc::new(file);
        let memory = PlacedMemory::from_regions(regions(&file, memory.path(), snapshot.placement()))
            .map_err(|source| OperationError::Gather { path: path(), source })?;
        let memory = Arc::new(memory);
        Ok(Self { snapshot: Arc::new(snapshot), check: None, layout, file, memory })
    }

    /// The VM's RAM.
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// Whether the memory of a VM that is made with the snapshot's configuration reads zero: none of it is a named file's.
    ///
    /// See [`SendOptions::receiver_reads_zero`](crate::transfer::SendOptions::receiver_reads_zero).
    pub fn receiver_reads_zero(&self) -> bool {
        self.snapshot.config().file_zones().is_empty()
    }

    /// The snapshot.
    pub fn snapshot(&self) -> &FullSnapshot {
        &self.snapshot
    }

    fn begin_check(&mut self) -> Result<(), OperationError> {
        self.give_up_check();
        self.check = Some(BackgroundCheck::start(&self.snapshot).map_err(unsound(&self.snapshot))?);
        Ok(())
    }

    fn end_check(&mut self) -> Result<(), OperationError> {
        let checked = self.check.take().map_or(Ok(()), BackgroundCheck::finish);
        checked.map_err(unsound(&self.snapshot))?;
        check_length(&self.snapshot)
    }

    fn give_up_check(&self) {
        self.check.iter().for_each(BackgroundCheck::give_up);
    }
}

impl Drop for SnapshotSource {
    fn drop(&mut self) {
        self.give_up_check();
    }
}

fn check_length(snapshot: &FullSnapshot) -> Result<(), OperationError> {
    let memory = snapshot.memory()?;
    let checked = expect_length(memory.file, memory.placement.bytes());
    checked.map_err(named(|| memory.path())).map_err(unsound(snapshot))
}

fn unsound(snapshot: &FullSnapshot) -> impl FnOnce(io::Error) -> OperationError {
    |source| OperationError::Send { path: snapshot.path().to_owned(), source }
}

impl Vm for SnapshotSource {
    type Memory = PlacedMemory;

    fn memory(&self) -> Arc<Self::Memory> {
        Arc::clone(&self.memory)
    }

    fn backing(&self) -> Backing {
        let extents = self.snapshot.placement().ascending().iter();
        extents.fold(Backing::default(), |backing, extent| {
            backing.shared_file(extent.range, Arc::clone(&self.file), extent.offset)
        })
    }

    /// Returns the configuration, and begins to check the memory.
    fn config(&mut self) -> Result<Vec<u8>, VmError> {
        self.begin_check()?;
        Ok(self.snapshot.config_message()?)
    }

    /// Waits until the memory is checked. The VM is paused anyway.
    fn pause(&mut self) -> Result<(), VmError> {
        Ok(self.end_check()?)
    }

    /// Does nothing: the VM never runs here.
    fn resume(&mut self) -> Result<(), VmError> {
        Ok(())
    }

    /// Returns the text as it was stored, the state of pass-through devices in it.
    fn state(&mut self, _devices: Snapshot) -> Result<Captured, VmError> {
        Ok(Captured::Text(self.snapshot.state().shared_text()))
    }

    fn can_throttle(&self) -> bool {
        false
    }

    fn throttle(&mut self, _percent: u8) {}
}
