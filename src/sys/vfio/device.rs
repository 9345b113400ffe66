// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! `VFIO_DEVICE_FEATURE`: DMA logging and migration v2 of one device.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use vfio_bindings::bindings::vfio::{
    VFIO_DEVICE_FEATURE_DMA_LOGGING_REPORT, VFIO_DEVICE_FEATURE_DMA_LOGGING_START,
    VFIO_DEVICE_FEATURE_DMA_LOGGING_STOP, VFIO_DEVICE_FEATURE_GET, VFIO_DEVICE_FEATURE_MIG_DATA_SIZE,
    VFIO_DEVICE_FEATURE_MIG_DEVICE_STATE, VFIO_DEVICE_FEATURE_MIGRATION, VFIO_DEVICE_FEATURE_PROBE,
    VFIO_DEVICE_FEATURE_SET, vfio_device_feature_dma_logging_control, vfio_device_feature_dma_logging_range,
    vfio_device_feature_dma_logging_report, vfio_device_feature_mig_data_size, vfio_device_feature_mig_state,
    vfio_device_feature_migration, vfio_precopy_info,
};

use super::{Argument, bitmap_bytes, opcode};
use crate::granule::Granule;
use crate::range::IovaRange;
use crate::sys::ioctl;

pub(crate) const DEVICE_RESET: ioctl::Opcode = opcode(11);
pub(crate) const DEVICE_FEATURE: ioctl::Opcode = opcode(17);
pub(crate) const MIG_GET_PRECOPY_INFO: ioctl::Opcode = opcode(21);

/// Whether `error` is a kernel's way of saying that it does not know a feature: older ones say `EINVAL`.
pub(crate) fn is_absent(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::ENOTTY | libc::EINVAL))
}

/// Asks whether the device has all three DMA-logging features; changes nothing.
pub(crate) fn probe_dma_logging(device: &impl AsRawFd) -> io::Result<()> {
    probe(device, VFIO_DEVICE_FEATURE_SET | VFIO_DEVICE_FEATURE_DMA_LOGGING_START)?;
    probe(device, VFIO_DEVICE_FEATURE_SET | VFIO_DEVICE_FEATURE_DMA_LOGGING_STOP)?;
    probe(device, VFIO_DEVICE_FEATURE_GET | VFIO_DEVICE_FEATURE_DMA_LOGGING_REPORT)
}

fn probe(device: &impl AsRawFd, flags: u32) -> io::Result<()> {
    // SAFETY: the kernel reads the header during the call.
    unsafe { ioctl::with_ref(device, DEVICE_FEATURE, &Argument::new(flags | VFIO_DEVICE_FEATURE_PROBE, ())) }
        .map(drop)
}

/// Starts logging the device's writes to `ranges`, a bit for `granule` if it can; returns the bytes per bit it chose.
pub(crate) fn dma_logging_start(
    device: &impl AsRawFd,
    granule: Granule,
    ranges: &[IovaRange],
) -> io::Result<u64> {
    let range = |range: &IovaRange| vfio_device_feature_dma_logging_range {
        iova: range.start(),
        length: range.len(),
    };
    let list: Vec<_> = ranges.iter().map(range).collect();
    let control = vfio_device_feature_dma_logging_control {
        page_size: granule.bytes(),
        num_ranges: u32::try_from(list.len()).map_err(|_| io::Error::from_raw_os_error(libc::E2BIG))?,
        __reserved: 0,
        ranges: list.as_ptr() as u64,
    };
    let flags = VFIO_DEVICE_FEATURE_SET | VFIO_DEVICE_FEATURE_DMA_LOGGING_START;
    let mut argument = Argument::new(flags, control);
    // SAFETY: the kernel writes the header back, and reads `num_ranges` ranges from `list`, which lives through the call.
    unsafe { ioctl::with_mut(device, DEVICE_FEATURE, &mut argument) }?;
    Ok(argument.payload.page_size)
}

/// Stops logging the device's writes.
pub(crate) fn dma_logging_stop(device: &impl AsRawFd) -> io::Result<()> {
    let flags = VFIO_DEVICE_FEATURE_SET | VFIO_DEVICE_FEATURE_DMA_LOGGING_STOP;
    // SAFETY: the kernel reads the header during the call.
    unsafe { ioctl::with_ref(device, DEVICE_FEATURE, &Argument::new(flags, ())) }.map(drop)
}

/// Adds the device's writes to `range` since its last report to `words`, bit 0 for the first granule, and clears its log.
pub(crate) fn dma_logging_report(
    device: &impl AsRawFd,
    range: IovaRange,
    granule: Granule,
    words: &mut [u64],
) -> io::Result<()> {
    let _checked = bitmap_bytes(range, granule, words);
    let report = vfio_device_feature_dma_logging_report {
        iova: range.start(),
        length: range.len(),
        page_size: granule.bytes(),
        bitmap: words.as_mut_ptr() as u64,
    };
    let flags = VFIO_DEVICE_FEATURE_GET | VFIO_DEVICE_FEATURE_DMA_LOGGING_REPORT;
    // SAFETY: the kernel sets one bit per granule of `range` in `words`, which was checked to hold them, during the call.
    unsafe { ioctl::with_mut(device, DEVICE_FEATURE, &mut Argument::new(flags, report)) }.map(drop)
}

/// Reads the device's `VFIO_MIGRATION_*` flags.
pub(crate) fn migration_flags(device: &impl AsRawFd) -> io::Result<u64> {
    let flags = VFIO_DEVICE_FEATURE_GET | VFIO_DEVICE_FEATURE_MIGRATION;
    let mut argument = Argument::new(flags, vfio_device_feature_migration::default());
    // SAFETY: the kernel writes the structure during the call.
    unsafe { ioctl::with_mut(device, DEVICE_FEATURE, &mut argument) }?;
    Ok(argument.payload.flags)
}

/// Reads the number of the device's state.
pub(crate) fn device_state(device: &impl AsRawFd) -> io::Result<u32> {
    let flags = VFIO_DEVICE_FEATURE_GET | VFIO_DEVICE_FEATURE_MIG_DEVICE_STATE;
    let mut argument = Argument::new(flags, vfio_device_feature_mig_state::default());
    // SAFETY: the kernel writes the structure during the call.
    unsafe { ioctl::with_mut(device, DEVICE_FEATURE, &mut argument) }?;
    Ok(argument.payload.device_state)
}

/// Moves the device to the state of this number; returns the descriptor of a session that began on the way.
pub(crate) fn set_device_state(device: &impl AsRawFd, state: u32) -> io::Result<Option<OwnedFd>> {
    let flags = VFIO_DEVICE_FEATURE_SET | VFIO_DEVICE_FEATURE_MIG_DEVICE_STATE;
    let payload = vfio_device_feature_mig_state { device_state: state, data_fd: -1 };
    let mut argument = Argument::new(flags, payload);
    // SAFETY: the kernel reads and writes the structure during the call.
    unsafe { ioctl::with_mut(device, DEVICE_FEATURE, &mut argument) }?;
    let data_fd = argument.payload.data_fd;
    // SAFETY: a number that is not negative is a descriptor the kernel just opened for the caller, and nobody else's.
    Ok((data_fd >= 0).then(|| unsafe { OwnedFd::from_raw_fd(data_fd) }))
}

/// Reads the device's estimate of the bytes STOP_COPY would bring.
pub(crate) fn stop_copy_length(device: &impl AsRawFd) -> io::Result<u64> {
    let flags = VFIO_DEVICE_FEATURE_GET | VFIO_DEVICE_FEATURE_MIG_DATA_SIZE;
    let mut argument = Argument::new(flags, vfio_device_feature_mig_data_size::default());
    // SAFETY: the kernel writes the structure during the call.
    unsafe { ioctl::with_mut(device, DEVICE_FEATURE, &mut argument) }?;
    Ok(argument.payload.stop_copy_length)
}

/// Reads how much is left to read in PRE_COPY from the session's descriptor: initial bytes, then dirty bytes.
///
/// No flag is asked for, and none is believed: a driver that was not told to report them hands back what it was given.
pub(crate) fn precopy_info(data: &impl AsRawFd) -> io::Result<(u64, u64)> {
    let mut info = vfio_precopy_info { argsz: 24, ..Default::default() };
    // SAFETY: the kernel writes the structure during the call.
    unsafe { ioctl::with_mut(data, MIG_GET_PRECOPY_INFO, &mut info) }?;
    Ok((info.initial_bytes, info.dirty_bytes))
}

/// Resets the device.
pub(crate) fn reset(device: &impl AsRawFd) -> io::Result<()> {
    // SAFETY: the call takes no argument; a device without its state harms nobody.
    unsafe { ioctl::with_val(device, DEVICE_RESET, 0) }.map(drop)
}

#[cfg(test)]
mod tests {
    use std::mem::{offset_of, size_of};

    use vfio_bindings::bindings::vfio::{
        VFIO_MIGRATION_P2P, VFIO_MIGRATION_PRE_COPY, VFIO_MIGRATION_STOP_COPY, vfio_device_feature,
    };

    use super::*;

    #[test]
    fn structures_have_the_kernels_layout() {
        assert_eq!(size_of::<Argument<()>>(), size_of::<vfio_device_feature>());
        type Control = Argument<vfio_device_feature_dma_logging_control>;
        assert_eq!(offset_of!(Control, payload), offset_of!(vfio_device_feature, data));
        assert_eq!(offset_of!(vfio_device_feature_dma_logging_control, num_ranges), 8);
        assert_eq!(offset_of!(vfio_device_feature_dma_logging_control, ranges), 16);
        assert_eq!(size_of::<vfio_device_feature_dma_logging_control>(), 24);
        assert_eq!(offset_of!(vfio_device_feature_dma_logging_range, length), 8);
        assert_eq!(size_of::<vfio_device_feature_dma_logging_range>(), 16);
        assert_eq!(offset_of!(vfio_device_feature_dma_logging_report, length), 8);
        assert_eq!(offset_of!(vfio_device_feature_dma_logging_report, page_size), 16);
        assert_eq!(offset_of!(vfio_device_feature_dma_logging_report, bitmap), 24);
        assert_eq!(size_of::<vfio_device_feature_dma_logging_report>(), 32);
        assert_eq!(size_of::<vfio_device_feature_migration>(), 8);
        assert_eq!(offset_of!(vfio_device_feature_mig_state, data_fd), 4);
        assert_eq!(size_of::<vfio_device_feature_mig_state>(), 8);
        assert_eq!(size_of::<vfio_device_feature_mig_data_size>(), 8);
        assert_eq!(offset_of!(vfio_precopy_info, initial_bytes), 8);
        assert_eq!(offset_of!(vfio_precopy_info, dirty_bytes), 16);
        assert_eq!(size_of::<vfio_precopy_info>(), 24);
    }

    #[test]
    fn feature_and_flag_numbers_are_the_kernels() {
        let logging = (
            VFIO_DEVICE_FEATURE_DMA_LOGGING_START,
            VFIO_DEVICE_FEATURE_DMA_LOGGING_STOP,
            VFIO_DEVICE_FEATURE_DMA_LOGGING_REPORT,
        );
        assert_eq!(logging, (6, 7, 8));
        assert_eq!((VFIO_DEVICE_FEATURE_MIGRATION, VFIO_DEVICE_FEATURE_MIG_DEVICE_STATE), (1, 2));
        assert_eq!(VFIO_DEVICE_FEATURE_MIG_DATA_SIZE, 9);
        let flags = (VFIO_DEVICE_FEATURE_GET, VFIO_DEVICE_FEATURE_SET, VFIO_DEVICE_FEATURE_PROBE);
        assert_eq!(flags, (1 << 16, 1 << 17, 1 << 18));
        assert_eq!((VFIO_MIGRATION_STOP_COPY, VFIO_MIGRATION_P2P, VFIO_MIGRATION_PRE_COPY), (1, 2, 4));
    }

    #[test]
    fn opcodes_are_the_kernels() {
        assert_eq!(DEVICE_RESET, 0x3b6f);
        assert_eq!(DEVICE_FEATURE, 0x3b75);
        assert_eq!(MIG_GET_PRECOPY_INFO, 0x3b79);
    }
}
