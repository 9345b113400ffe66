// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! `linux/vfio.h`: dirty logging and migration, over any container, group or device descriptor.
//!
//! vfio-ioctls has no `VFIO_IOMMU_DIRTY_PAGES`, allocates a bitmap for each report, and keeps the descriptors to itself.

use crate::granule::Granule;
use crate::range::IovaRange;

use super::ioctl;

pub(crate) mod container;
pub(crate) mod device;
pub(crate) mod open;

/// The number of `VFIO_TYPE` `VFIO_BASE + number`.
const fn opcode(number: u8) -> ioctl::Opcode {
    ioctl::io(vfio_bindings::bindings::vfio::VFIO_TYPE, 100 + number)
}

/// What most VFIO ioctls take: a header that tells its own size, and what follows it.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
struct Argument<T> {
    argsz: u32,
    flags: u32,
    payload: T,
}

impl<T> Argument<T> {
    fn new(flags: u32, payload: T) -> Self {
        const { assert!(size_of::<Self>() == 8 + size_of::<T>() && size_of::<Self>() < 4096) };
        #[expect(clippy::cast_possible_truncation, reason = "less than a page, as checked above")]
        let argsz = size_of::<Self>() as u32;
        Self { argsz, flags, payload }
    }
}

/// Returns the bytes of `words`, having checked that the kernel's bitmap of `range` fits them.
fn bitmap_bytes(range: IovaRange, granule: Granule, words: &[u64]) -> u64 {
    let needed = granule.bits_for(range.len()).div_ceil(64);
    assert!(words.len() as u64 >= needed, "the kernel writes one bit per granule of the range");
    size_of_val(words) as u64
}
