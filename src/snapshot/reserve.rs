// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Memory of this process that is asked for before it is needed: what cannot be had is an error, not the end of the process.

use std::collections::TryReserveError;
use std::io;

/// What an error needs to be told.
const HEADROOM_BYTES: usize = 1 << 20;

/// Makes room for so many more items in `list`, and no more than that.
///
/// What takes much leaves enough for an error to be told.
pub(super) fn reserve<T>(list: &mut Vec<T>, more: usize) -> Result<(), TryReserveError> {
    list.try_reserve_exact(more)?;
    let is_large = more.saturating_mul(size_of::<T>()) >= HEADROOM_BYTES;
    if is_large { expect_headroom() } else { Ok(()) }
}

/// Makes a buffer of zeros.
pub(super) fn zeros(bytes: usize) -> io::Result<Vec<u8>> {
    let mut buffer = Vec::new();
    resize(&mut buffer, bytes)?;
    Ok(buffer)
}

/// Makes `buffer` as long as `bytes`; what is new is zeros.
pub(super) fn resize(buffer: &mut Vec<u8>, bytes: usize) -> io::Result<()> {
    reserve(buffer, bytes.saturating_sub(buffer.len()))?;
    buffer.resize(bytes, 0);
    Ok(())
}

/// Makes a list of `count` items.
pub(super) fn list_of<T>(count: usize, items: impl Iterator<Item = T>) -> io::Result<Vec<T>> {
    let mut list = Vec::new();
    reserve(&mut list, count)?;
    list.extend(items.take(count));
    Ok(list)
}

/// Appends to a list of which nobody knows how long it gets.
pub(super) fn push<T>(list: &mut Vec<T>, item: T) -> io::Result<()> {
    list.try_reserve(1)?;
    list.push(item);
    Ok(())
}

/// Checks that some memory is left, before a little of it is taken once more.
pub(super) fn expect_headroom() -> Result<(), TryReserveError> {
    Vec::<u8>::new().try_reserve_exact(HEADROOM_BYTES)
}

/// A number of bytes or items that are in memory, as an index.
pub(super) fn index(number: u64) -> usize {
    usize::try_from(number).expect("what is in memory has an index")
}
