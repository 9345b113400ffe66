// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! How the demo's processes talk: length-prefixed JSON over a socket pair, with descriptors beside it.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

use super::report::{MigrationFigures, Progress};
use crate::vmm::{MemoryError, RamLayout, Split};

/// What a child process is to be. Descriptors follow: the devices' sockets first, then a memfd for each RAM region.
#[derive(Debug, Serialize, Deserialize)]
pub(super) enum Role {
    Source(MachineSetup),
    Destination(MachineSetup),
    Device(DeviceSetup),
}

impl Role {
    /// What a list of processes shows.
    pub(super) fn name(&self) -> &'static str {
        match self {
            Self::Source(_) => "source",
            Self::Destination(_) => "destination",
            Self::Device(_) => "device",
        }
    }
}

/// The machine of a source or destination process.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct MachineSetup {
    /// Guest RAM.
    pub memory_bytes: u64,
    /// Whether most of it stays unpopulated, and the device reaches the region below 4 GiB only.
    pub sparse: bool,
    /// Whether KVM runs the guest, or a software vCPU.
    pub kvm: bool,
    /// Pages a second that the guest stamps.
    pub guest_rate: u32,
    /// Pages a second that the device writes.
    pub device_rate: u32,
    /// What memory content and the device's stream depend on.
    pub seed: u64,
    /// A source whose reports are thrown away, for a demo that must fail.
    pub forget: Option<String>,
}

impl MachineSetup {
    /// Where its RAM lies.
    ///
    /// # Errors
    /// No machine has that much, or that little.
    pub fn layout(&self) -> Result<RamLayout, MemoryError> {
        let lay_out = if self.sparse { RamLayout::sparse } else { RamLayout::new };
        lay_out(self.memory_bytes, Split::default())
    }
}

/// The device of a device process.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct DeviceSetup {
    pub(super) state_bytes: u64,
    pub(super) state_changes_per_second: u64,
}

/// What the parent asks of a child.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum Command {
    /// Source: migrate to `url`; `insist` on it even where the downtime limit cannot be kept; `sparse` memory is not to be
    /// populated by the destination.
    Migrate {
        url: String,
        downtime_ms: u64,
        timeout_s: u64,
        bandwidth_bytes_per_s: Option<u64>,
        insist: bool,
        sparse: bool,
    },
    /// Source: give up the migration under way.
    Cancel,
    /// Destination: bind to `url` and wait for a source.
    Listen { url: String },
    /// Destination: run the VM that arrived.
    Run,
    /// Either: let the guest check `passes` more passes over its pages, then tell how it fares.
    Check { passes: u64 },
}

/// What a child tells its parent.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum Event {
    /// The process is set up. For a source: and its guest runs.
    Ready,
    /// Destination: the URL to migrate to.
    Listening { url: String },
    /// Source: how far it is.
    Progress(Progress),
    /// Source: all has arrived; the source's VM stays paused.
    Migrated(MigrationFigures),
    /// The command failed; `guest_runs` tells whether the VM of this process runs.
    Failed { error: String, guest_runs: bool },
    /// Destination: all has arrived and the VM is ready to run, but paused; its devices took so long to load their state.
    Received { socket_bytes: u64, devices_load_us: u64 },
    /// Destination: the VM runs; resuming it took so long.
    Running { resume_us: u64 },
    /// How the guest, the VMM's writer and the device fare.
    Health(Health),
}

/// What the VM's own checks found.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Health {
    /// Passes the guest has made over its pages, since boot.
    pub passes: u64,
    /// Pages whose stamp was not what the guest had written there.
    pub wrong_pages: Vec<u64>,
    /// Records the VMM found changed.
    pub wrong_records: Vec<u64>,
    /// Where the device's pseudo-random stream stands.
    pub device_position: u64,
    /// Pages that are not what the device's stream says it wrote there last.
    pub wrong_device_pages: Vec<u64>,
}

/// One end of the channel between the demo and one of its processes.
#[derive(Debug)]
pub(crate) struct Control {
    stream: UnixStream,
}

/// The longest message either side takes.
const MAX_MESSAGE_BYTES: usize = 1 << 20;

impl Control {
    pub(crate) fn new(stream: UnixStream) -> Self {
        Self { stream }
    }

    /// Another handle on the same channel.
    pub(crate) fn try_clone(&self) -> io::Result<Self> {
        Ok(Self { stream: self.stream.try_clone()? })
    }

    pub(crate) fn send(&mut self, message: &impl Serialize) -> io::Result<()> {
        let text = serde_json::to_vec(message)?;
        let length = u32::try_from(text.len()).map_err(io::Error::other)?;
        let mut bytes = length.to_le_bytes().to_vec();
        bytes.extend_from_slice(&text);
        self.stream.write_all(&bytes)
    }

    /// Waits for the next message; `None` when the other side is gone.
    pub(crate) fn receive<T: DeserializeOwned>(&mut self) -> io::Result<Option<T>> {
        let mut length = [0; 4];
        match self.stream.read_exact(&mut length) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
            Err(error) => return Err(error),
        }
        let length = usize::try_from(u32::from_le_bytes(length)).map_err(io::Error::other)?;
        if length > MAX_MESSAGE_BYTES {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "control message too long"));
        }
        let mut text = vec![0; length];
        self.stream.read_exact(&mut text)?;
        Ok(Some(serde_json::from_slice(&text)?))
    }

    pub(crate) fn send_descriptor(&mut self, descriptor: &impl AsRawFd) -> io::Result<()> {
        let sent = self.stream.send_with_fd(&[0u8][..], descriptor.as_raw_fd());
        sent.map(drop).map_err(io::Error::from)
    }

    pub(crate) fn receive_descriptor(&mut self) -> io::Result<File> {
        let (_, file) = self.stream.recv_with_fd(&mut [0u8]).map_err(io::Error::from)?;
        file.ok_or_else(|| {
            io::Error::new(io::ErrorKind::InvalidData, "control message without its descriptor")
        })
    }
}
