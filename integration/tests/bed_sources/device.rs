// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Migration v2 of kernel devices.

use std::os::fd::{AsFd, BorrowedFd};

use crate::bed::*;
use crate::kernel::{Device, two};
use vfio_migration::device::{DataRead, DeviceIo, DeviceState, KernelDevice, KernelDeviceError};

fn kernel_device(device: &Device) -> KernelDevice<BorrowedFd<'_>> {
    KernelDevice::new(device.file.as_fd()).unwrap()
}

/// Reads until there is nothing now, or nothing more.
fn read(device: &mut dyn DeviceIo, image: &mut Vec<u8>) -> DataRead {
    let mut buffer = [0; 1000];
    loop {
        match device.read_data(&mut buffer).unwrap() {
            DataRead::Bytes(bytes) => image.extend(&buffer[..bytes]),
            end => return end,
        }
    }
}

/// Saves through PRE_COPY; the device ends in STOP_COPY.
fn save(device: &mut dyn DeviceIo) -> Vec<u8> {
    let mut image = Vec::new();
    // mtty keeps the state in which its last user left it.
    device.set_state(DeviceState::Running).unwrap();
    device.set_state(DeviceState::PreCopy).unwrap();
    let before = device.precopy_info().unwrap().unwrap();
    assert!(before.initial_bytes > 0);
    assert_eq!(read(device, &mut image), DataRead::NothingNow, "c29: more will come");
    assert_eq!(device.precopy_info().unwrap().unwrap().initial_bytes, 0, "they were read");
    device.set_state(DeviceState::StopCopy).unwrap();
    assert_eq!(read(device, &mut image), DataRead::End, "c29: that was all");
    image
}

fn load(device: &mut dyn DeviceIo, image: &[u8]) {
    device.set_state(DeviceState::Resuming).unwrap();
    image.chunks(777).for_each(|segment| device.write_data(segment).unwrap());
    device.set_state(DeviceState::Stop).unwrap();
    device.set_state(DeviceState::Running).unwrap();
}

#[test]
fn an_mdev_moves_through_precopy_and_its_engine_continues() {
    let Some([source, destination]) = two("mdev as DeviceIo", "dirty_mdev") else { return };
    let _padding = Parameter::fixture("state_padding", 100_000);
    let (source, destination) = (open_mdev(&source), open_mdev(&destination));
    source.write(BURST, 50).unwrap();
    let mut io = kernel_device(&source);
    assert!(io.capabilities().p2p && io.capabilities().pre_copy);
    assert!(io.data_size().unwrap().unwrap() > 100_000);
    let image = save(&mut io);
    load(&mut kernel_device(&destination), &image);
    assert_eq!(destination.read(POSITION), 50);
    io.set_state(DeviceState::Running).unwrap();
    assert_eq!(io.state().unwrap(), DeviceState::Running);
}

#[test]
fn edu_and_mtty_move_too() {
    for (kind, bus) in [("edu_vfio", "pci"), ("mtty", "mdev")] {
        let Some([source, destination]) = two(&format!("{kind} as DeviceIo"), kind) else { continue };
        let (source, destination) = (Device::open(bus, &source), Device::open(bus, &destination));
        let image = save(&mut kernel_device(&source));
        let mut io = kernel_device(&destination);
        load(&mut io, &image);
        assert_eq!(io.state().unwrap(), DeviceState::Running, "{kind}");
    }
}

#[test]
fn c30_a_reset_behind_our_back_is_out_of_sync_and_not_taken_for_a_session_that_goes_on() {
    let Some([name, _]) = two("asynchronous reset", "dirty_mdev") else { return };
    let device = open_mdev(&name);
    let mut io = kernel_device(&device);
    io.set_state(DeviceState::PreCopy).unwrap();
    read(&mut io, &mut Vec::new());
    device.reset();
    let error = io.set_state(DeviceState::StopCopy).unwrap_err();
    let cause = error.cause.downcast_ref();
    assert!(matches!(cause, Some(KernelDeviceError::OutOfSync { to: DeviceState::StopCopy })), "{cause:?}");
    io.read_data(&mut [0; 8]).unwrap_err();
    io.set_state(DeviceState::Running).unwrap();
}

#[test]
fn going_back_from_stop_copy_to_precopy_is_refused_without_asking_the_kernel() {
    let Some([name, _]) = two("the forbidden arc", "dirty_mdev") else { return };
    let device = open_mdev(&name);
    let mut io = kernel_device(&device);
    io.set_state(DeviceState::StopCopy).unwrap();
    for to in [DeviceState::PreCopy, DeviceState::PreCopyP2p] {
        let error = io.set_state(to).unwrap_err();
        assert!(matches!(error.cause.downcast_ref(), Some(KernelDeviceError::NoArc { .. })));
    }
    assert_eq!(io.state().unwrap(), DeviceState::StopCopy);
    assert_eq!(read(&mut io, &mut Vec::new()), DataRead::End, "the session goes on");
}

#[test]
fn c31_c32_a_failed_move_tells_where_the_device_is_and_a_reset_helps() {
    let Some([name, _]) = two("failed arc as DeviceIo", "dirty_mdev") else { return };
    let device = open_mdev(&name);
    let mut io = kernel_device(&device);
    let arc = Parameter::fixture("fault_arc", 5 << 4 | 1);
    io.set_state(DeviceState::StopCopy).unwrap_err();
    assert_eq!(io.state().unwrap(), DeviceState::RunningP2p);
    drop(arc);
    io.set_state(DeviceState::Resuming).unwrap();
    io.write_data(&[0; 64]).unwrap();
    io.set_state(DeviceState::Stop).unwrap_err();
    io.reset().unwrap();
    assert_eq!(io.state().unwrap(), DeviceState::Running);
    io.write_data(&[0]).unwrap_err();
}

#[test]
fn a_read_that_fails_is_an_error_not_an_end() {
    let Some([name, _]) = two("failed read as DeviceIo", "dirty_mdev") else { return };
    let _padding = Parameter::fixture("state_padding", 10_000);
    let device = open_mdev(&name);
    let _fault = Parameter::fixture("fault_read_at", 4_000);
    let mut io = kernel_device(&device);
    io.set_state(DeviceState::StopCopy).unwrap();
    let (mut buffer, mut bytes) = ([0; 1000], 0);
    let error = loop {
        match io.read_data(&mut buffer) {
            Ok(DataRead::Bytes(read)) => bytes += read,
            Ok(end) => panic!("{end:?} after {bytes} bytes"),
            Err(error) => break error,
        }
    };
    assert_eq!(bytes, 4_000);
    assert_eq!(error.to_string(), "Device cannot hand out its migration data");
    io.set_state(DeviceState::Running).unwrap();
}
