// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The register map of region 0: 64-bit little-endian registers, accessed whole.

use super::stream::MAX_WINDOWS;

/// Size of region 0, in bytes.
pub const REGION_BYTES: u64 = 0x1000;
/// What the `ID` register reads.
pub const ID_VALUE: u64 = u64::from_le_bytes(*b"DMAdemo1");

/// Reads [`ID_VALUE`].
pub const ID: u64 = 0x00;
/// Bit 0 switches the engine on.
pub const CONTROL: u64 = 0x08;
/// The stream's seed; writing it begins the stream anew at position 0.
pub const SEED: u64 = 0x10;
/// Pages to write each second.
pub const RATE: u64 = 0x18;
/// The next position of the stream; read only.
pub const POSITION: u64 = 0x20;
/// Positions whose page was not mapped; read only.
pub const MISSED: u64 = 0x28;
/// One number for the whole state that migrates; read only.
pub const DIGEST: u64 = 0x30;
/// Writing `n` passes `n` positions before the write is answered, whether the engine is on or off.
pub const STEP: u64 = 0x38;
/// How many windows there are.
pub const WINDOW_COUNT: u64 = 0x40;

const WINDOWS: u64 = 0x80;
const WINDOW_BYTES: u64 = 16;

/// Tells whether writing the register changes what the stream is, which a running engine does not allow.
pub(super) fn shapes_stream(offset: u64) -> bool {
    matches!(offset, SEED | WINDOW_COUNT | WINDOWS..)
}

/// Returns the register with the first IOVA of window `index`; its length follows.
pub const fn window(index: usize) -> u64 {
    WINDOWS + index as u64 * WINDOW_BYTES
}

/// Returns the window a register belongs to, and whether it is the one with the length.
pub(super) fn window_of(offset: u64) -> Option<(usize, bool)> {
    let index = usize::try_from(offset.checked_sub(WINDOWS)? / WINDOW_BYTES).ok()?;
    (index < MAX_WINDOWS).then_some((index, !offset.is_multiple_of(WINDOW_BYTES)))
}
