// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Fallible allocation: memory that this process does not get is an error, and does not end the process.

use std::collections::TryReserveError;
use std::io;

/// Memory that is left free, so that an error can still be reported.
const HEADROOM_BYTES: usize = 1 << 20;

/// Makes room for so many more items in `list`, and no more than that.
///
/// A large reservation fails unless enough is left to report an error.
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

/// Appends to a list whose final length is not known.
pub(super) fn push<T>(list: &mut Vec<T>, item: T) -> io::Result<()> {
    list.try_reserve(1)?;
    list.push(item);
    Ok(())
}

/// Checks that memory is left before a small allocation that is made many times.
pub(super) fn expect_headroom() -> Result<(), TryReserveError> {
    Vec::<u8>::new().try_reserve_exact(HEADROOM_BYTES)
}

/// A number of bytes or items that are in memory, as an index.
pub(super) fn index(number: u64) -> usize {
    usize::try_from(number).expect("what is in memory has an index")
}
