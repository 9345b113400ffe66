// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Fills a VM's memory from a snapshot, on all processors.

use std::io;

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
        let mut bytes = Vec::new();
        turn.iter().try_for_each(|&number| {
            let written = fill_block(blocks, number, memory, &mut bytes).map_err(LocalSendError::Fill)?;
            handle.add_filled(written);
            Ok(())
        })
    })
}

fn fill_block(
    blocks: &ChainBlocks<'_>,
    number: usize,
    memory: &VmMemory,
    bytes: &mut Vec<u8>,
) -> io::Result<u64> {
    blocks.read(number, bytes)?;
    let mut written = 0;
    for part in blocks.parts(number) {
        let at = usize::try_from(part.at).map_err(io::Error::other)?;
        let length = usize::try_from(part.range.len()).map_err(io::Error::other)?;
        written += memory.write_data(part.range, &bytes[at..at + length])?;
    }
    Ok(written)
}
