// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What the fixtures' parameters promise: capabilities, limits, and faults at a chosen step.

use std::fs;
use std::io::{self, Read, Write};

use crate::kernel::*;
use crate::mdev::{BURST, POSITION, WRITE_AT, open_mdev, stream_pages};

/// A module's parameter with a value that lasts as long as this.
struct Parameter {
    path: String,
    before: String,
}

impl Parameter {
    fn set(module: &str, name: &str, value: &str) -> Self {
        let path = format!("/sys/module/{module}/parameters/{name}");
        let before = fs::read_to_string(&path).unwrap();
        fs::write(&path, value).unwrap();
        Self { path, before }
    }

    fn fixture(name: &str, value: u64) -> Self {
        Self::set("vfio_fixture", name, &value.to_string())
    }
}

impl Drop for Parameter {
    fn drop(&mut self) {
        fs::write(&self.path, &self.before).unwrap();
    }
}

fn errno<T: std::fmt::Debug>(result: io::Result<T>) -> i32 {
    result.unwrap_err().raw_os_error().unwrap()
}

#[test]
fn failed_report_sticks_until_the_log_is_stopped() {
    let Some([name, _]) = two("sticky log error", "dirty_mdev") else { return };
    let device = open_mdev(&name, 0);
    device.start_log();
    let _second = Parameter::fixture("fault_log_report", 2);
    assert!(device.log().is_empty());
    device.write(WRITE_AT, IOVA).unwrap();
    assert_eq!(errno(device.try_log()), libc::EIO);
    assert_eq!(errno(device.try_log()), libc::EIO, "the fault was one, but it sticks");
    device.stop_log();
    device.start_log();
    assert!(device.log().is_empty());
}

#[test]
fn fault_is_for_the_device_that_is_named() {
    let Some([named, other]) = two("fault of one device", "dirty_mdev") else { return };
    let _device = Parameter::set("vfio_fixture", "fault_device", &named);
    let _start = Parameter::fixture("fault_log_start", 5);
    assert_eq!(errno(open_mdev(&named, 0).try_start_log()), libc::EIO);
    open_mdev(&other, 0).try_start_log().unwrap();
}

#[test]
fn coarse_granule_widens_what_is_reported() {
    let Some([name, _]) = two("log granule", "dirty_mdev") else { return };
    let _granule = Parameter::fixture("log_granule", 4 * PAGE as u64);
    let device = open_mdev(&name, 0);
    assert_eq!(device.try_start_log().unwrap(), 4 * PAGE as u64);
    device.write(WRITE_AT, IOVA + 9 * PAGE as u64).unwrap();
    assert_eq!(device.log(), [8, 9, 10, 11]);
    assert!(device.log().is_empty());
}

#[test]
fn log_refuses_what_exceeds_its_limits() {
    let Some([name, _]) = two("log limits", "dirty_mdev") else { return };
    let device = open_mdev(&name, 0);
    let length = Parameter::fixture("log_max_length", (PAGES * PAGE) as u64 - 1);
    assert_eq!(errno(device.try_start_log()), libc::EOPNOTSUPP);
    drop(length);

    let page = PAGE as u64;
    let two_ranges = [IOVA, page, IOVA + 8 * page, page];
    let _ranges = Parameter::fixture("log_max_ranges", 1);
    assert_eq!(errno(device.start_log_of(&two_ranges)), libc::E2BIG);
    device.start_log_of(&two_ranges[2..]).unwrap();
    device.write(WRITE_AT, IOVA).unwrap();
    device.write(WRITE_AT, IOVA + 8 * page).unwrap();
    assert_eq!(device.log(), [8], "what no range covers is not logged");
}

#[test]
fn failed_arc_leaves_the_state_or_ends_in_error() {
    let Some([name, _]) = two("failed arc", "dirty_mdev") else { return };
    let device = open_mdev(&name, 9);
    device.write(BURST, 3).unwrap();
    let arc = Parameter::fixture("fault_arc", u64::from(RUNNING_P2P << 4 | STOP));
    assert_eq!(errno(device.try_set_state(STOP_COPY)), libc::EIO);
    assert_eq!(device.state(), RUNNING_P2P);
    assert_eq!(errno(device.write(BURST, 1)), libc::EBUSY);
    device.set_state(RUNNING);
    device.write(BURST, 1).unwrap();

    let _fatal = Parameter::set("vfio_fixture", "fault_arc_fatal", "Y");
    device.try_set_state(STOP_COPY).unwrap_err();
    assert_eq!(device.state(), ERROR);
    assert_eq!(errno(device.try_set_state(RUNNING)), libc::EINVAL);
    drop(arc);
    device.reset();
    assert_eq!((device.state(), device.read(POSITION)), (RUNNING, 0));
}

#[test]
fn data_fails_from_the_chosen_byte_on() {
    let Some([name, _]) = two("data fault", "dirty_mdev") else { return };
    let _padding = Parameter::fixture("state_padding", 100_000);
    let device = open_mdev(&name, 0);
    assert!(device.data_size() > 100_000);
    {
        let _read = Parameter::fixture("fault_read_at", 70_000);
        let mut image = Vec::new();
        let read = device.set_state(STOP_COPY).unwrap().read_to_end(&mut image);
        assert_eq!((errno(read), image.len()), (libc::EIO, 70_000));
    }
    let _write = Parameter::fixture("fault_write_at", 5_000);
    let mut file = device.set_state(RESUMING).unwrap();
    assert_eq!(file.write(&[0; 8_000]).unwrap(), 5_000);
    assert_eq!(errno(file.write(&[0; 8_000])), libc::EIO);
}

#[test]
fn padded_image_loads_in_any_segments() {
    let Some([source, destination]) = two("padded image", "dirty_mdev") else { return };
    let _padding = Parameter::fixture("state_padding", 1 << 20);
    let (source, destination) = (open_mdev(&source, 77), open_mdev(&destination, 0));
    source.write(BURST, 500).unwrap();
    let image = source.save();
    assert!(image.len() > 1 << 20);
    let mut file = destination.set_state(RESUMING).unwrap();
    for segment in image.chunks(777) {
        file.write_all(segment).unwrap();
    }
    destination.set_state(RUNNING);
    assert_eq!(destination.read(POSITION), 500);
    destination.start_log();
    destination.write(BURST, 10).unwrap();
    assert_eq!(destination.log(), stream_pages(77, 500, 10));
}

#[test]
fn device_offers_what_the_parameters_say() {
    let Some([name, _]) = two("capabilities", "dirty_mdev") else { return };
    for (flags, expected) in [(1, Ok([1])), (3, Ok([3])), (7, Ok([7])), (0, Err(libc::ENOTTY))] {
        let _flags = Parameter::set("dirty_mdev", "mig_flags", &flags.to_string());
        let answer = open_mdev(&name, 0).feature(FEATURE_GET | MIGRATION, [0]);
        assert_eq!(answer.map_err(|error| error.raw_os_error().unwrap()), expected);
    }
    let _flags = Parameter::set("dirty_mdev", "mig_flags", "1");
    let _log = Parameter::set("dirty_mdev", "log_ops", "N");
    let device = open_mdev(&name, 0);
    assert_eq!(errno(device.try_set_state(PRE_COPY)), libc::EINVAL);
    device.set_state(STOP_COPY).unwrap();
    assert_eq!(errno(device.try_start_log()), libc::ENOTTY);
}

#[test]
fn reset_edu_has_forgotten_its_buffer() {
    let Some([name, _]) = two("edu reset", "edu_vfio") else { return };
    let device = crate::edu::open_edu(&name);
    device.fill(&[1; 8]);
    device.dma(IOVA, crate::edu::BUFFER, 64, crate::edu::TO_DEVICE);
    device.reset();
    device.dma(crate::edu::BUFFER, IOVA, 64, crate::edu::TO_MEMORY);
    assert_eq!(device.memory()[..8], [0; 8]);
}
