// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The VFIO and iommufd sources, and kernel devices, each under a seccomp filter of just its list in `vfio_migration::syscalls`.
//!
//! Runs inside the test bed: `integration/testbed/run --test bed_confined`. Elsewhere each test says that it was skipped.
#![expect(clippy::unwrap_used, reason = "a test's own steps must succeed")]

#[expect(dead_code, reason = "the other tests in the bed use the rest")]
#[path = "../bed_sources/bed.rs"]
mod bed;
#[expect(dead_code, reason = "the smoke test uses the rest")]
#[path = "../bed_smoke/kernel.rs"]
mod kernel;
#[path = "../bed_sources/mock.rs"]
mod mock;

use std::os::fd::AsFd;

use vfio_migration::device::{DataRead, DeviceIo, DeviceState, KernelDevice};
use vfio_migration::iova::{IovaMap, Mapping};
use vfio_migration::range::{GpaRange, IovaRange};
use vfio_migration::source::{ContainerLog, DeviceLog, DirtySource, HwptLog, Meaning, Sink};
use vfio_migration::syscalls;
use vfio_migration_integration::confined::{Confinement, check};

use bed::{BYTES, Tracked, layout, open_mdev, set, write};
use kernel::{IOVA, two};
use mock::Mock;

/// Starts, has the device write outside of the filter, collects, and lets the mapping go as `unmap` does.
fn session<S: DirtySource>(
    confinement: &Confinement,
    mut source: S,
    device_writes: impl FnOnce(),
    unmap: impl FnOnce(&mut S, &mut Sink<'_>) + Send,
) {
    let source = confinement.run(|| {
        source.start(&layout(), &IovaMap::Identity).unwrap();
        source
    });
    let mut tracked = Tracked::started(source);
    device_writes();
    confinement.run(|| {
        assert_eq!(tracked.pages(), set([3]));
        let Tracked { source, ledger, iova, .. } = &mut tracked;
        unmap(source, &mut ledger.sink(0, iova));
        source.stop().unwrap();
    });
}

/// What comes before the VMM's own unmap.
fn harvest(source: &mut impl DirtySource, sink: &mut Sink<'_>) {
    let whole = Mapping::identity(GpaRange::new(IOVA, BYTES).unwrap());
    source.unmapped(&whole, sink).unwrap();
}

#[test]
fn container_log() {
    check("container_log", syscalls::CONTAINER_LOG, &[], |confinement| {
        let Some([name, _]) = two("container source, confined", "dirty_mdev") else { return };
        let device = open_mdev(&name);
        let container = device.container.as_fd();
        let source =
            confinement.run(|| ContainerLog::new("container", container, 3, Meaning::Written).unwrap());
        let whole = IovaRange::new(IOVA, BYTES).unwrap();
        let unmap = |source: &mut ContainerLog<_>, sink: &mut Sink<'_>| {
            assert_eq!(source.unmap_with_bitmap(whole, sink).unwrap(), BYTES);
        };
        session(confinement, source, || write(&device, [3]), unmap);
    });
}

#[test]
fn device_log() {
    check("device_log", syscalls::DEVICE_LOG, &[], |confinement| {
        let Some([name, _]) = two("device log, confined", "dirty_mdev") else { return };
        let device = open_mdev(&name);
        let source = confinement.run(|| DeviceLog::new("device-log", device.file.as_fd()).unwrap());
        session(confinement, source, || write(&device, [3]), harvest);
    });
}

#[test]
fn hwpt_log() {
    check("hwpt_log", syscalls::HWPT_LOG, &[], |confinement| {
        let Some(mock) = Mock::new("page table, confined", true) else { return };
        let source: HwptLog<_> = mock.log();
        session(confinement, source, || mock.write(&[6]), harvest);
    });
}

/// Reads until there is nothing now, or nothing more.
fn read_all(device: &mut dyn DeviceIo, image: &mut Vec<u8>) {
    let mut buffer = [0; 4096];
    while let DataRead::Bytes(bytes) = device.read_data(&mut buffer).unwrap() {
        image.extend(&buffer[..bytes]);
    }
}

#[test]
fn kernel_device() {
    check("kernel_device", syscalls::KERNEL_DEVICE, &[], |confinement| {
        let Some([name, _]) = two("device state, confined", "dirty_mdev") else { return };
        let device = open_mdev(&name);
        confinement.run(|| {
            let mut io = KernelDevice::new(device.file.as_fd()).unwrap();
            let mut image = Vec::new();
            io.set_state(DeviceState::PreCopy).unwrap();
            io.precopy_info().unwrap().unwrap();
            read_all(&mut io, &mut image);
            io.data_size().unwrap().unwrap();
            io.set_state(DeviceState::StopCopy).unwrap();
            read_all(&mut io, &mut image);
            io.set_state(DeviceState::Stop).unwrap();
            io.set_state(DeviceState::Resuming).unwrap();
            io.write_data(&image).unwrap();
            io.set_state(DeviceState::Stop).unwrap();
            io.reset().unwrap();
            assert_eq!(io.state().unwrap(), DeviceState::Running);
        });
    });
}
