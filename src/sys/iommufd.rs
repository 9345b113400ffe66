// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! `linux/iommufd.h`: dirty tracking in hardware page tables, over any iommufd descriptor.
//!
//! iommufd-ioctls has neither of its calls.

use std::io;
use std::os::fd::AsRawFd;

use iommufd_bindings::{
    iommu_hw_info, iommu_hwpt_get_dirty_bitmap, iommu_hwpt_set_dirty_tracking,
    iommufd_hw_capabilities_IOMMU_HW_CAP_DIRTY_TRACKING as HW_CAP_DIRTY_TRACKING,
    iommufd_hwpt_get_dirty_bitmap_flags_IOMMU_HWPT_GET_DIRTY_BITMAP_NO_CLEAR as NO_CLEAR,
    iommufd_hwpt_set_dirty_tracking_flags_IOMMU_HWPT_DIRTY_TRACKING_ENABLE as ENABLE,
};

use super::ioctl;
use crate::granule::Granule;
use crate::range::IovaRange;

const GET_HW_INFO: ioctl::Opcode = ioctl::io(b';', 138);
pub(crate) const HWPT_SET_DIRTY_TRACKING: ioctl::Opcode = ioctl::io(b';', 139);
pub(crate) const HWPT_GET_DIRTY_BITMAP: ioctl::Opcode = ioctl::io(b';', 140);

/// Whether a read of dirty bits leaves them set.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Afterwards {
    /// The bits are cleared, and the IOTLB is flushed so that the next write sets them again.
    Clear,
    /// The bits stay: the mapping is about to go.
    Keep,
}

/// Switches dirty tracking of a page table on or off. Switching on clears every bit, even where it was on.
pub(crate) fn set_dirty_tracking(iommufd: &impl AsRawFd, hwpt_id: u32, on: bool) -> io::Result<()> {
    let set = iommu_hwpt_set_dirty_tracking {
        size: 16,
        flags: if on { ENABLE } else { 0 },
        hwpt_id,
        __reserved: 0,
    };
    // SAFETY: the kernel reads the structure during the call.
    unsafe { ioctl::with_ref(iommufd, HWPT_SET_DIRTY_TRACKING, &set) }.map(drop)
}

/// Adds the dirty bits of `range`, which is mapped throughout, to `words`; bit 0 stands for its first granule.
pub(crate) fn dirty_bitmap(
    iommufd: &impl AsRawFd,
    hwpt_id: u32,
    range: IovaRange,
    granule: Granule,
    afterwards: Afterwards,
    words: &mut [u64],
) -> io::Result<()> {
    let needed = granule.bits_for(range.len()).div_ceil(64);
    assert!(words.len() as u64 >= needed, "the kernel writes one bit per granule of the range");
    let mut get = iommu_hwpt_get_dirty_bitmap {
        size: 48,
        hwpt_id,
        flags: if afterwards == Afterwards::Keep { NO_CLEAR } else { 0 },
        __reserved: 0,
        iova: range.start(),
        length: range.len(),
        page_size: granule.bytes(),
        data: words.as_mut_ptr() as u64,
    };
    // SAFETY: the kernel sets one bit per granule of `range` in `words`, which was checked to hold them, during the call.
    unsafe { ioctl::with_mut(iommufd, HWPT_GET_DIRTY_BITMAP, &mut get) }.map(drop)
}

/// Whether the IOMMU behind a bound device can track dirty pages.
pub(crate) fn tracks_dirty_pages(iommufd: &impl AsRawFd, device_id: u32) -> io::Result<bool> {
    let mut info = iommu_hw_info { size: 40, dev_id: device_id, ..empty_hw_info() };
    // SAFETY: the kernel writes the structure during the call, and nothing else: `data_len` is zero.
    unsafe { ioctl::with_mut(iommufd, GET_HW_INFO, &mut info) }?;
    Ok(info.out_capabilities & u64::from(HW_CAP_DIRTY_TRACKING) != 0)
}

fn empty_hw_info() -> iommu_hw_info {
    iommu_hw_info {
        size: 0,
        flags: 0,
        dev_id: 0,
        data_len: 0,
        data_uptr: 0,
        __bindgen_anon_1: iommufd_bindings::iommu_hw_info__bindgen_ty_1 { in_data_type: 0 },
        out_max_pasid_log2: 0,
        __reserved: [0; 3],
        out_capabilities: 0,
    }
}

#[cfg(test)]
mod tests {
    use std::mem::{offset_of, size_of};

    use super::*;

    #[test]
    fn structures_have_the_kernels_layout() {
        assert_eq!(offset_of!(iommu_hwpt_set_dirty_tracking, hwpt_id), 8);
        assert_eq!(size_of::<iommu_hwpt_set_dirty_tracking>(), 16);
        assert_eq!(offset_of!(iommu_hwpt_get_dirty_bitmap, hwpt_id), 4);
        assert_eq!(offset_of!(iommu_hwpt_get_dirty_bitmap, flags), 8);
        assert_eq!(offset_of!(iommu_hwpt_get_dirty_bitmap, iova), 16);
        assert_eq!(offset_of!(iommu_hwpt_get_dirty_bitmap, length), 24);
        assert_eq!(offset_of!(iommu_hwpt_get_dirty_bitmap, page_size), 32);
        assert_eq!(offset_of!(iommu_hwpt_get_dirty_bitmap, data), 40);
        assert_eq!(size_of::<iommu_hwpt_get_dirty_bitmap>(), 48);
        assert_eq!(offset_of!(iommu_hw_info, dev_id), 8);
        assert_eq!(offset_of!(iommu_hw_info, out_capabilities), 32);
        assert_eq!(size_of::<iommu_hw_info>(), 40);
    }

    #[test]
    fn flags_are_the_kernels() {
        assert_eq!((ENABLE, NO_CLEAR, HW_CAP_DIRTY_TRACKING), (1, 1, 1));
    }

    #[test]
    fn opcodes_are_the_kernels() {
        assert_eq!(GET_HW_INFO, 0x3b8a);
        assert_eq!(HWPT_SET_DIRTY_TRACKING, 0x3b8b);
        assert_eq!(HWPT_GET_DIRTY_BITMAP, 0x3b8c);
    }
}
