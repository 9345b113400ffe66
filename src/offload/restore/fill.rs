// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Fills a VM's memory from a snapshot, on all processors.

use super::error::LocalSendError;
use super::handle::LocalSenderHandle;
use super::memory::VmMemory;
use crate::snapshot::ChainBlocks;
use crate::snapshot::parallel;
use crate::threads::ThreadStart;

/// Blocks that a thread takes at a time.
const BLOCKS_AT_ONCE: usize = 64;

/// Reads all blocks, checks each, and writes to `memory` what is not zero.
///
/// # Errors
/// The snapshot cannot be read, a block was altered, there is no memory left, or the sender was given up.
pub(super) fn all(
    blocks: &ChainBlocks<'_>,
    memory: &VmMemory,
    handle: &LocalSenderHandle,
    threads: ThreadStart,
) -> Result<(), LocalSendError> {
    let with_data: Vec<_> = (0..blocks.count()).filter(|&number| !blocks.is_zeros(number)).collect();
    let turns: Vec<_> = with_data.chunks(BLOCKS_AT_ONCE).collect();
    parallel::for_each(&turns, parallel::processors(), threads, |turn| {
        handle.check()?;
        let mut buffer = Vec::new();
        let parts = blocks.read_many(turn, &mut buffer).map_err(LocalSendError::Fill)?;
        handle.add_filled(memory.write_data(&parts).map_err(LocalSendError::Fill)?);
        Ok(())
    })
}
