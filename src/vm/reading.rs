// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Guest memory read through its regions, which need not have an address in this process: that of a stored VM is in a file.

use std::io;

use thiserror::Error;
use vm_memory::guest_memory::Error as MemoryError;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use crate::range::GpaRange;

/// Guest memory that cannot be read.
#[derive(Debug, Error)]
#[error("Cannot read memory {range}")]
#[non_exhaustive]
pub struct UnreadableMemory {
    /// The memory.
    pub range: GpaRange,
    /// Why.
    pub source: io::Error,
}

/// Whether the memory at `gpa` has an address in this process, or is no memory at all.
pub(crate) fn has_address<M: GuestMemoryBackend>(memory: &M, gpa: u64) -> bool {
    let first = memory.get_slices(GuestAddress(gpa), 1).next();
    !matches!(first, Some(Err(MemoryError::HostAddressNotAvailable)))
}

/// Reads the memory of `range` into `bytes`, which is as long.
///
/// # Errors
/// Some of it is no memory, or its region cannot read it.
pub(crate) fn read_memory<M: GuestMemoryBackend>(
    memory: &M,
    range: GpaRange,
    bytes: &mut [u8],
) -> Result<(), UnreadableMemory> {
    let mut rest = bytes;
    let mut gpa = GuestAddress(range.start());
    while !rest.is_empty() {
        let read = match memory.to_region_addr(gpa) {
            None => Err(MemoryError::InvalidGuestAddress(gpa)),
            Some((region, at)) => {
                let left = usize::try_from(region.len() - at.0).unwrap_or(usize::MAX);
                let (now, later) = rest.split_at_mut(left.min(rest.len()));
                rest = later;
                gpa.0 += now.len() as u64;
                region.read_slice(now, at)
            }
        };
        read.map_err(|error| match error {
            MemoryError::IOError(source) => UnreadableMemory { range, source },
            other => UnreadableMemory { range, source: io::Error::other(other) },
        })?;
    }
    Ok(())
}
