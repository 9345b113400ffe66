// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The dirty bitmap of a type1 container.
//!
//! `VFIO_IOMMU_DIRTY_PAGES` has the number of a feature call on a device and of a memory registration on an sPAPR container:
//! nothing here may be issued on another kind of descriptor.

use std::io;
use std::os::fd::AsRawFd;

use vfio_bindings::bindings::vfio::{
    VFIO_DMA_UNMAP_FLAG_GET_DIRTY_BITMAP, VFIO_IOMMU_DIRTY_PAGES_FLAG_GET_BITMAP,
    VFIO_IOMMU_DIRTY_PAGES_FLAG_START, VFIO_IOMMU_DIRTY_PAGES_FLAG_STOP, vfio_bitmap,
    vfio_iommu_type1_dirty_bitmap_get, vfio_iommu_type1_info,
};

use super::{Argument, bitmap_bytes, opcode};
use crate::granule::Granule;
use crate::range::IovaRange;
use crate::sys::ioctl;

pub(crate) const IOMMU_GET_INFO: ioctl::Opcode = opcode(12);
pub(crate) const IOMMU_UNMAP_DMA: ioctl::Opcode = opcode(14);
pub(crate) const IOMMU_DIRTY_PAGES: ioctl::Opcode = opcode(17);

/// `struct vfio_iommu_type1_dma_unmap` after its header, with what its `data` holds.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
struct Unmap<T> {
    iova: u64,
    size: u64,
    data: T,
}

/// More than any kernel's capability chain takes.
const INFO_BYTES_MAX: usize = 64 << 10;

/// Reads `struct vfio_iommu_type1_info` with the capability chain behind it.
pub(crate) fn iommu_info(container: &impl AsRawFd) -> io::Result<Vec<u8>> {
    let mut bytes = size_of::<vfio_iommu_type1_info>();
    loop {
        let mut words = vec![0u64; bytes.div_ceil(8)];
        words[0] = u64::from_ne_bytes(header((words.len() * 8).min(INFO_BYTES_MAX)));
        // SAFETY: the kernel writes no more than the size in the header, which is no more than `words` holds.
        unsafe { ioctl::with_mut(container, IOMMU_GET_INFO, words.as_mut_slice()) }?;
        let info: Vec<u8> = words.iter().flat_map(|word| word.to_ne_bytes()).collect();
        let wanted = usize::try_from(u32::from_ne_bytes([info[0], info[1], info[2], info[3]])).unwrap_or(0);
        if wanted <= info.len() || info.len() >= INFO_BYTES_MAX {
            return Ok(info);
        }
        bytes = wanted.min(INFO_BYTES_MAX);
    }
}

/// The first two fields of the structure: its size, and no flags.
fn header(argsz: usize) -> [u8; 8] {
    let mut bytes = [0; 8];
    bytes[..4].copy_from_slice(&u32::try_from(argsz).expect("at most 64 KiB").to_ne_bytes());
    bytes
}

/// Switches the container's dirty log on, or does nothing where it is on.
pub(crate) fn dirty_pages_start(container: &impl AsRawFd) -> io::Result<()> {
    switch(container, VFIO_IOMMU_DIRTY_PAGES_FLAG_START)
}

/// Switches the container's dirty log off, or does nothing where it is off.
pub(crate) fn dirty_pages_stop(container: &impl AsRawFd) -> io::Result<()> {
    switch(container, VFIO_IOMMU_DIRTY_PAGES_FLAG_STOP)
}

fn switch(container: &impl AsRawFd, flag: u32) -> io::Result<()> {
    // SAFETY: the kernel reads the header during the call.
    unsafe { ioctl::with_ref(container, IOMMU_DIRTY_PAGES, &Argument::new(flag, ())) }.map(drop)
}

/// Reads and clears the dirty bits of the mappings in `range`, which bisects none.
///
/// `words` must be zero and as many as `range` takes: the kernel overwrites the words of mappings and leaves those of holes.
pub(crate) fn dirty_pages_bitmap(
    container: &impl AsRawFd,
    range: IovaRange,
    granule: Granule,
    words: &mut [u64],
) -> io::Result<()> {
    let bitmap = bitmap_of(range, granule, words);
    let get = vfio_iommu_type1_dirty_bitmap_get { iova: range.start(), size: range.len(), bitmap };
    let mut argument = Argument::new(VFIO_IOMMU_DIRTY_PAGES_FLAG_GET_BITMAP, get);
    // SAFETY: the kernel writes one bit per granule of `range`, which `words` was checked to hold, during the call.
    unsafe { ioctl::with_mut(container, IOMMU_DIRTY_PAGES, &mut argument) }.map(drop)
}

/// Takes down the mappings in `range`, which bisects none, having read their dirty bits; returns the bytes unmapped.
///
/// As for [`dirty_pages_bitmap`], `words` must be zero.
pub(crate) fn unmap_with_bitmap(
    container: &impl AsRawFd,
    range: IovaRange,
    granule: Granule,
    words: &mut [u64],
) -> io::Result<u64> {
    let data = bitmap_of(range, granule, words);
    let unmap = Unmap { iova: range.start(), size: range.len(), data };
    let mut argument = Argument::new(VFIO_DMA_UNMAP_FLAG_GET_DIRTY_BITMAP, unmap);
    // SAFETY: as for GET; taking memory away from devices harms nobody.
    unsafe { ioctl::with_mut(container, IOMMU_UNMAP_DMA, &mut argument) }?;
    Ok(argument.payload.size)
}

/// Takes down the mappings in `range`, which bisects none; returns the bytes unmapped.
pub(crate) fn unmap(container: &impl AsRawFd, range: IovaRange) -> io::Result<u64> {
    let mut argument = Argument::new(0, Unmap { iova: range.start(), size: range.len(), data: () });
    // SAFETY: the kernel reads and writes the structure during the call; taking memory away from devices harms nobody.
    unsafe { ioctl::with_mut(container, IOMMU_UNMAP_DMA, &mut argument) }?;
    Ok(argument.payload.size)
}

fn bitmap_of(range: IovaRange, granule: Granule, words: &mut [u64]) -> vfio_bitmap {
    let size = bitmap_bytes(range, granule, words);
    vfio_bitmap { pgsize: granule.bytes(), size, data: words.as_mut_ptr() }
}

#[cfg(test)]
mod tests {
    use std::mem::{offset_of, size_of};

    use vfio_bindings::bindings::vfio::{
        vfio_iommu_type1_dirty_bitmap, vfio_iommu_type1_dma_unmap, vfio_iommu_type1_info_cap_migration,
    };

    use super::*;

    type Get = Argument<vfio_iommu_type1_dirty_bitmap_get>;

    #[test]
    fn structures_have_the_kernels_layout() {
        assert_eq!(size_of::<Argument<()>>(), size_of::<vfio_iommu_type1_dirty_bitmap>());
        assert_eq!(offset_of!(Get, payload), offset_of!(vfio_iommu_type1_dirty_bitmap, data));
        assert_eq!(offset_of!(vfio_iommu_type1_dirty_bitmap_get, size), 8);
        assert_eq!(offset_of!(vfio_iommu_type1_dirty_bitmap_get, bitmap), 16);
        assert_eq!(size_of::<vfio_iommu_type1_dirty_bitmap_get>(), 40);
        assert_eq!((offset_of!(vfio_bitmap, size), offset_of!(vfio_bitmap, data)), (8, 16));
        assert_eq!(size_of::<vfio_bitmap>(), 24);
        assert_eq!(offset_of!(vfio_iommu_type1_info, iova_pgsizes), 8);
        assert_eq!(offset_of!(vfio_iommu_type1_info, cap_offset), 16);
        assert_eq!(size_of::<vfio_iommu_type1_info>(), 24);
        assert_eq!(offset_of!(vfio_iommu_type1_info_cap_migration, pgsize_bitmap), 16);
        assert_eq!(offset_of!(vfio_iommu_type1_info_cap_migration, max_dirty_bitmap_size), 24);
        assert_eq!(size_of::<vfio_iommu_type1_info_cap_migration>(), 32);
    }

    #[test]
    fn the_unmap_argument_is_the_kernels_structure_with_the_bitmap_as_its_data() {
        type Ours = Argument<Unmap<vfio_bitmap>>;
        assert_eq!(size_of::<Argument<Unmap<()>>>(), size_of::<vfio_iommu_type1_dma_unmap>());
        let payload = offset_of!(Ours, payload);
        assert_eq!(
            payload + offset_of!(Unmap<vfio_bitmap>, iova),
            offset_of!(vfio_iommu_type1_dma_unmap, iova)
        );
        assert_eq!(
            payload + offset_of!(Unmap<vfio_bitmap>, size),
            offset_of!(vfio_iommu_type1_dma_unmap, size)
        );
        assert_eq!(
            payload + offset_of!(Unmap<vfio_bitmap>, data),
            offset_of!(vfio_iommu_type1_dma_unmap, data)
        );
    }

    #[test]
    fn argsz_counts_the_structure_but_not_the_bitmap_it_points_to() {
        let (mut words, range) = ([0u64; 2], IovaRange::new(0, 128 << 12).unwrap());
        let bitmap = bitmap_of(range, Granule::KIB_4, &mut words);
        assert_eq!((bitmap.pgsize, bitmap.size), (4096, 16));
        let get = vfio_iommu_type1_dirty_bitmap_get { iova: range.start(), size: range.len(), bitmap };
        assert_eq!(Argument::new(0, get).argsz, 48);
        assert_eq!(Argument::new(0, ()).argsz, 8);
    }

    #[test]
    #[should_panic(expected = "one bit per granule")]
    fn a_buffer_too_small_never_reaches_the_kernel() {
        bitmap_of(IovaRange::new(0, 129 << 12).unwrap(), Granule::KIB_4, &mut [0; 2]);
    }

    #[test]
    fn opcodes_are_the_kernels() {
        assert_eq!(IOMMU_GET_INFO, 0x3b70);
        assert_eq!(IOMMU_UNMAP_DMA, 0x3b72);
        assert_eq!(IOMMU_DIRTY_PAGES, 0x3b75);
    }
}
