// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What it takes to reach a device that nobody has opened: container, group, iommufd.

use std::ffi::CString;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use vfio_bindings::bindings::vfio::{VFIO_TYPE1v2_IOMMU, vfio_device_bind_iommufd, vfio_group_status};

use super::opcode;
use crate::sys::ioctl;

const GET_API_VERSION: ioctl::Opcode = opcode(0);
const CHECK_EXTENSION: ioctl::Opcode = opcode(1);
const SET_IOMMU: ioctl::Opcode = opcode(2);
const GROUP_GET_STATUS: ioctl::Opcode = opcode(3);
const GROUP_SET_CONTAINER: ioctl::Opcode = opcode(4);
const GROUP_GET_DEVICE_FD: ioctl::Opcode = opcode(6);
const DEVICE_BIND_IOMMUFD: ioctl::Opcode = opcode(18);

const GROUP_FLAGS_VIABLE: u32 = 1;

/// Reads the container interface's version.
pub(crate) fn api_version(container: &impl AsRawFd) -> io::Result<i32> {
    // SAFETY: the call takes no argument.
    unsafe { ioctl::with_val(container, GET_API_VERSION, 0) }
}

/// Whether the container knows the IOMMU model or extension of this number.
pub(crate) fn has_extension(container: &impl AsRawFd, extension: u32) -> io::Result<bool> {
    // SAFETY: the argument is a number.
    unsafe { ioctl::with_val(container, CHECK_EXTENSION, extension.into()) }.map(|answer| answer > 0)
}

/// Makes the container one of model TYPE1v2; it must hold a group.
pub(crate) fn set_type1v2(container: &impl AsRawFd) -> io::Result<()> {
    // SAFETY: the argument is a number.
    unsafe { ioctl::with_val(container, SET_IOMMU, VFIO_TYPE1v2_IOMMU.into()) }.map(drop)
}

/// Whether every device of the group is bound to VFIO or to no driver.
pub(crate) fn group_is_viable(group: &impl AsRawFd) -> io::Result<bool> {
    let mut status = vfio_group_status { argsz: 8, flags: 0 };
    // SAFETY: the kernel writes the structure during the call.
    unsafe { ioctl::with_mut(group, GROUP_GET_STATUS, &mut status) }?;
    Ok(status.flags & GROUP_FLAGS_VIABLE != 0)
}

/// Puts the group into the container.
pub(crate) fn set_container(group: &impl AsRawFd, container: &impl AsRawFd) -> io::Result<()> {
    // SAFETY: the kernel reads the descriptor's number during the call.
    unsafe { ioctl::with_ref(group, GROUP_SET_CONTAINER, &container.as_raw_fd()) }.map(drop)
}

/// Opens the device of this name, as sysfs spells it.
pub(crate) fn group_device(group: &impl AsRawFd, name: &str) -> io::Result<OwnedFd> {
    let name = CString::new(name).map_err(io::Error::other)?;
    // SAFETY: the kernel reads a string that ends in a zero byte, during the call.
    let fd = unsafe { ioctl::with_mut(group, GROUP_GET_DEVICE_FD, &mut name.into_bytes_with_nul()[..]) }?;
    // SAFETY: the kernel just opened the descriptor for the caller, and nobody else.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Binds a device's own character device to an iommufd; returns the number it has there.
pub(crate) fn bind_iommufd(device: &impl AsRawFd, iommufd: &impl AsRawFd) -> io::Result<u32> {
    let mut bind = vfio_device_bind_iommufd {
        // The fields up to `out_devid`: what every kernel that has the call knows.
        argsz: 16,
        iommufd: iommufd.as_raw_fd(),
        ..Default::default()
    };
    // SAFETY: the kernel reads and writes the structure during the call.
    unsafe { ioctl::with_mut(device, DEVICE_BIND_IOMMUFD, &mut bind) }?;
    Ok(bind.out_devid)
}

#[cfg(test)]
mod tests {
    use std::mem::{offset_of, size_of};

    use super::*;

    #[test]
    fn structures_have_the_kernels_layout() {
        assert_eq!(size_of::<vfio_group_status>(), 8);
        assert_eq!(offset_of!(vfio_device_bind_iommufd, iommufd), 8);
        assert_eq!(offset_of!(vfio_device_bind_iommufd, out_devid), 12);
        assert_eq!(offset_of!(vfio_device_bind_iommufd, token_uuid_ptr), 16);
    }

    #[test]
    fn opcodes_are_the_kernels() {
        assert_eq!(
            [GET_API_VERSION, CHECK_EXTENSION, SET_IOMMU, GROUP_GET_STATUS, GROUP_SET_CONTAINER],
            [0x3b64, 0x3b65, 0x3b66, 0x3b67, 0x3b68]
        );
        assert_eq!((GROUP_GET_DEVICE_FD, DEVICE_BIND_IOMMUFD), (0x3b6a, 0x3b76));
    }
}
