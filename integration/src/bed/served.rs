// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A vfio-user device in a process of its own, beside the devices of the kernel.

use std::ops::Range;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, PoisonError};

use anyhow::Context;
use vfio_migration::device::{Device, VfioUserDevice};
use vfio_migration::source::{DirtySource, VfioUserSource};
use vfio_migration::vfio_user::SharedClient;

use crate::demo::side::{connect, wrong_pages};
use crate::device::{DeviceConfig, DmaDevice, Stream, Window, control};
use crate::vmm::Machine;

/// Set, to the bytes of its state, for a process that is to be the device.
const SERVED_VARIABLE: &str = "VFIO_MIGRATION_BED_DEVICE";

/// Pages a second that it writes.
const RATE: u64 = 50;

/// The device, connected. Its process ends when it is dropped.
pub(super) struct Served {
    process: Child,
    client: SharedClient,
    stream: Stream,
}

impl Served {
    /// Starts this test program once more, as a device with so much state that writes to `windows` of the machine's RAM.
    pub(super) fn start(
        state_bytes: u64,
        machine: &Machine,
        seed: u64,
        windows: &[Range<u64>],
    ) -> anyhow::Result<Self> {
        let (ours, theirs) = UnixStream::pair()?;
        let process = Command::new(std::env::current_exe()?)
            .args(["--exact", "process", "--ignored", "--nocapture"])
            .env(SERVED_VARIABLE, state_bytes.to_string())
            .stdin(Stdio::from(OwnedFd::from(theirs)))
            .stdout(Stdio::null())
            .spawn()?;
        let client = connect(ours, machine.regions()).context("Cannot connect the device")?;
        let windows: Option<_> =
            windows.iter().map(|range| Window::new(range.start, range.end - range.start)).collect();
        Ok(Self { process, client, stream: Stream { seed, windows: windows.context("No whole pages")? } })
    }

    /// Serves, in the process that was started so, until the client is gone; returns whether this is one.
    pub(super) fn serve() -> anyhow::Result<bool> {
        let Some(bytes) = std::env::var_os(SERVED_VARIABLE) else { return Ok(false) };
        let state_bytes =
            bytes.to_str().and_then(|bytes| bytes.parse().ok()).context("No number of bytes")?;
        let stdin = std::io::stdin().as_fd().try_clone_to_owned().context("No standard input")?;
        let config = DeviceConfig { state_bytes, ..DeviceConfig::default() };
        DmaDevice::serve(UnixStream::from(stdin), config)?;
        Ok(true)
    }

    /// The log of its DMA.
    pub(super) fn source(&self, id: &str) -> anyhow::Result<Box<dyn DirtySource>> {
        Ok(Box::new(VfioUserSource::new(id, Arc::clone(&self.client))?))
    }

    /// Its state.
    pub(super) fn device(&self, name: &str) -> anyhow::Result<Device> {
        let device = VfioUserDevice::new(Arc::clone(&self.client))?;
        Ok(Device::new(name, Box::new(device)).maps_only_ram())
    }

    /// Programs it and lets it run.
    pub(super) fn begin(&self) -> anyhow::Result<()> {
        let mut client = self.client.lock().unwrap_or_else(PoisonError::into_inner);
        control::program(&mut client, &self.stream, RATE)?;
        Ok(control::run(&mut client, true)?)
    }

    /// The pages in which its stream, from its first word on, does not stand in the machine's memory; it has to have written some.
    pub(super) fn wrong_pages(&self, machine: &Machine) -> anyhow::Result<Vec<u64>> {
        let mut client = self.client.lock().unwrap_or_else(PoisonError::into_inner);
        let (position, wrong) = wrong_pages(&mut client, &self.stream, machine)?;
        anyhow::ensure!(position > 0, "The vfio-user device wrote nothing");
        Ok(wrong)
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}
