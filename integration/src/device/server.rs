// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The device's end of the socket: messages in, replies out.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use vfio_migration::vfio_user::feature::{
    FEATURE_GET, FEATURE_PROBE, FEATURE_SET, Feature, FeatureHeader, LoggingControl, LoggingReport,
    MIGRATION_PRE_COPY, MIGRATION_STOP_COPY, MigState, MigrationFeature,
};
use vfio_migration::vfio_user::message::{
    DEVICE_FLAGS_RESET, DeviceInfo, DmaMap, DmaUnmap, HEADER_BYTES, Header, MessageKind, MigData,
    REGION_INFO_FLAG_READ, REGION_INFO_FLAG_WRITE, RegionAccess, RegionInfo, VfioUserCommand,
};
use vfio_migration::vfio_user::version::{
    MAX_DATA_XFER_BYTES, MigrationCapability, PeerCapabilities, Version,
};
use vmm_sys_util::sock_ctrl_msg::ScmSocket;
use zerocopy::IntoBytes;

use super::config::{Behaviour, DeviceConfig, Fault, When};
use super::memory::MAX_DMA_MAPS;
use super::registers::REGION_BYTES;
use super::state::State;
use super::stream::PAGE_BYTES;
use super::worker::Shared;
use super::{Errno, ServeError};

/// As many regions as a PCI device has; only the first has a size.
const NUM_REGIONS: u32 = 9;
/// Room for the fixed part of a request.
const FIXED_REQUEST_BYTES: u64 = 128 << 10;

/// Answers the requests of one client.
pub(super) struct Server {
    socket: UnixStream,
    config: DeviceConfig,
    device: Arc<Shared>,
    /// What the client takes in one message; none before VERSION.
    client_xfer_bytes: Option<u64>,
    received: Vec<(u16, u64)>,
}

/// Is one request as it came.
struct Request {
    header: Header,
    payload: Vec<u8>,
    file: Option<File>,
}

/// Says what a fault makes of a request.
enum Fate {
    Answered,
    Refused(Errno),
    Fatal(ServeError),
}

impl Server {
    pub(super) fn new(socket: UnixStream, config: DeviceConfig, device: Arc<Shared>) -> Self {
        Server { socket, config, device, client_xfer_bytes: None, received: Vec::new() }
    }

    /// Answers until the client hangs up.
    pub(super) fn run(&mut self) -> Result<(), ServeError> {
        while let Some(mut request) = self.receive()? {
            let is_whole = request.payload.len() == request.header.payload_bytes();
            let outcome = match self.fate(request.header.command()) {
                Fate::Answered if !is_whole => Err(Errno(libc::EINVAL)),
                Fate::Answered => self.answer(&mut request),
                Fate::Refused(errno) => Err(errno),
                Fate::Fatal(error) => return Err(error),
            };
            if request.header.kind() == (MessageKind::Command { no_reply: true }) {
                continue;
            }
            match self.reply(&request.header, outcome) {
                Err(error) if error.kind() == io::ErrorKind::BrokenPipe => return Ok(()),
                sent => sent?,
            }
        }
        Ok(())
    }

    /// Receives one request; `None` when the client has hung up.
    fn receive(&mut self) -> Result<Option<Request>, ServeError> {
        let mut bytes = [0; HEADER_BYTES];
        let (mut filled, mut file) = (0, None);
        while filled < HEADER_BYTES {
            let received = self.socket.recv_with_fd(&mut bytes[filled..]);
            let (read, passed) = received.map_err(|error| io::Error::from_raw_os_error(error.errno()))?;
            if read == 0 {
                return if filled == 0 { Ok(None) } else { Err(ServeError::Truncated) };
            }
            filled += read;
            file = file.or(passed);
        }
        let header = Header::decode(&bytes)?;
        if !matches!(header.kind(), MessageKind::Command { .. }) {
            return Err(ServeError::NotARequest);
        }
        let (size, limit) = (header.payload_bytes() as u64, self.xfer_bytes() + FIXED_REQUEST_BYTES);
        if size > limit {
            return Err(ServeError::TooLong { size, limit });
        }
        let payload = self.receive_payload(header.payload_bytes())?;
        Ok(Some(Request { header, payload, file }))
    }

    /// Receives a message's body, or as much of it as one `recv` brings.
    fn receive_payload(&mut self, bytes: usize) -> io::Result<Vec<u8>> {
        let mut payload = vec![0; bytes];
        if self.config.behaviour == Behaviour::LibvfioUser && bytes > 0 {
            let received = self.socket.read(&mut payload)?;
            payload.truncate(received);
        } else {
            self.socket.read_exact(&mut payload)?;
        }
        Ok(payload)
    }

    fn reply(&mut self, request: &Header, outcome: Result<Vec<u8>, Errno>) -> io::Result<()> {
        let (kind, payload) = match outcome {
            Ok(payload) => (MessageKind::Reply, payload),
            Err(Errno(errno)) => (MessageKind::ErrorReply { errno }, Vec::new()),
        };
        let header = Header::new(request.id(), request.command(), kind, payload.len());
        let mut message = header.map_err(io::Error::other)?.encode().to_vec();
        message.extend_from_slice(&payload);
        self.socket.write_all(&message)
    }

    /// Counts the request and returns what the configured faults make of it.
    fn fate(&mut self, command: u16) -> Fate {
        let index = self.received.iter().position(|(known, _)| *known == command);
        let index = index.unwrap_or_else(|| {
            self.received.push((command, 0));
            self.received.len() - 1
        });
        self.received[index].1 += 1;
        let (of_this, of_all) = (self.received[index].1, self.received.iter().map(|(_, n)| n).sum::<u64>());
        let is_now = |when: &When| match when.command {
            None => when.nth == of_all,
            Some(wanted) => wanted == command && when.nth == of_this,
        };
        for fault in &self.config.faults {
            match fault {
                Fault::Die(when) if is_now(when) => return Fate::Fatal(ServeError::Died),
                Fault::Stall(when) if is_now(when) => return Fate::Fatal(self.stall()),
                Fault::Refuse { when, errno } if is_now(when) => return Fate::Refused(Errno(*errno)),
                _ => {}
            }
        }
        Fate::Answered
    }

    /// Reads and answers nothing until the client hangs up.
    fn stall(&self) -> ServeError {
        let drained = io::copy(&mut &self.socket, &mut io::sink());
        drained.map_or_else(ServeError::Socket, |_| ServeError::Died)
    }

    fn answer(&mut self, request: &mut Request) -> Result<Vec<u8>, Errno> {
        let command = VfioUserCommand::from_wire(request.header.command()).ok_or(Errno(libc::EINVAL))?;
        let payload = request.payload.as_slice();
        if command != VfioUserCommand::Version && self.client_xfer_bytes.is_none() {
            return Err(Errno(libc::EINVAL));
        }
        match command {
            VfioUserCommand::Version => self.version(payload),
            VfioUserCommand::DmaMap => self.dma_map(payload, request.file.take()),
            VfioUserCommand::DmaUnmap => self.dma_unmap(payload),
            VfioUserCommand::DeviceGetInfo => device_info(payload),
            VfioUserCommand::DeviceGetRegionInfo => region_info(payload),
            VfioUserCommand::RegionRead => self.region_read(payload),
            VfioUserCommand::RegionWrite => self.region_write(payload),
            VfioUserCommand::DeviceReset => {
                self.device.change(|engine| engine.reset())?;
                Ok(Vec::new())
            }
            VfioUserCommand::DmaRead | VfioUserCommand::DmaWrite => Err(Errno(libc::EINVAL)),
            VfioUserCommand::DeviceFeature => self.feature(payload),
            VfioUserCommand::MigDataRead => self.read_data(payload),
            VfioUserCommand::MigDataWrite => self.write_data(payload),
        }
    }

    fn version(&mut self, payload: &[u8]) -> Result<Vec<u8>, Errno> {
        let client = Version::decode(payload)?;
        let migration = MigrationCapability { pgsize: Some(PAGE_BYTES as u64), max_bitmap_size: None };
        let ours = Version::current(PeerCapabilities {
            max_msg_fds: Some(1),
            max_data_xfer_size: Some(self.xfer_bytes()),
            pgsizes: Some(PAGE_BYTES as u64),
            max_dma_maps: Some(MAX_DMA_MAPS as u64),
            migration: self.config.migration.then_some(migration),
            twin_socket: None,
        });
        if client.major != ours.major || client.capabilities.data_xfer_bytes() == 0 {
            return Err(Errno(libc::EINVAL));
        }
        self.client_xfer_bytes = Some(client.capabilities.data_xfer_bytes());
        Ok(Version { minor: ours.minor.min(client.minor), ..ours }.encode())
    }

    fn xfer_bytes(&self) -> u64 {
        self.config.max_data_xfer_bytes.clamp(1, MAX_DATA_XFER_BYTES)
    }

    fn dma_map(&self, payload: &[u8], file: Option<File>) -> Result<Vec<u8>, Errno> {
        let request = DmaMap::decode(payload)?;
        self.device.change(|engine| engine.map(&request, file))?;
        Ok(Vec::new())
    }

    fn dma_unmap(&self, payload: &[u8]) -> Result<Vec<u8>, Errno> {
        let request = DmaUnmap::decode(payload)?;
        self.device.change(|engine| engine.unmap(request.iova.get(), request.size.get()))?;
        Ok(request.as_bytes().to_vec())
    }

    fn region_read(&self, payload: &[u8]) -> Result<Vec<u8>, Errno> {
        let access = RegionAccess::decode(payload)?;
        let mut reply = access.as_bytes().to_vec();
        for offset in self.register_offsets(&access)? {
            let value = self.device.change(|engine| engine.read_register(offset))?;
            reply.extend_from_slice(&value.to_le_bytes());
        }
        Ok(reply)
    }

    fn region_write(&self, payload: &[u8]) -> Result<Vec<u8>, Errno> {
        let (access, data) = RegionAccess::decode_with_data(payload)?;
        for (offset, bytes) in self.register_offsets(&access)?.zip(data.as_chunks::<8>().0) {
            self.device.change(|engine| engine.write_register(offset, u64::from_le_bytes(*bytes)))?;
        }
        Ok(access.as_bytes().to_vec())
    }

    /// Returns the registers an access touches, all of it checked.
    fn register_offsets(&self, access: &RegionAccess) -> Result<impl Iterator<Item = u64> + use<>, Errno> {
        let (offset, count) = (access.offset.get(), u64::from(access.count.get()));
        let end = offset.checked_add(count).filter(|end| *end <= REGION_BYTES);
        let whole = offset.is_multiple_of(8) && count.is_multiple_of(8) && count <= self.xfer_bytes();
        match end {
            Some(end) if access.region.get() == 0 && whole => Ok((offset..end).step_by(8)),
            _ => Err(Errno(libc::EINVAL)),
        }
    }

    fn feature(&self, payload: &[u8]) -> Result<Vec<u8>, Errno> {
        let (header, data) = FeatureHeader::decode(payload)?;
        let flags = header.flags.get();
        let feature = Feature::from_flags(flags).ok_or(Errno(libc::ENOTTY))?;
        let supported = match feature {
            Feature::Migration if self.config.migration => FEATURE_GET,
            Feature::MigDeviceState if self.config.migration => FEATURE_GET | FEATURE_SET,
            Feature::DmaLoggingStart | Feature::DmaLoggingStop if self.config.dma_logging => FEATURE_SET,
            Feature::DmaLoggingReport if self.config.dma_logging => FEATURE_GET,
            _ => return Err(Errno(libc::ENOTTY)),
        };
        let methods = flags & (FEATURE_GET | FEATURE_SET);
        if methods & !supported != 0 {
            return Err(Errno(libc::EINVAL));
        }
        if flags & FEATURE_PROBE != 0 {
            return Ok(payload.to_vec());
        }
        let answer = match (feature, methods) {
            (Feature::Migration, FEATURE_GET) => self.migration(),
            (Feature::MigDeviceState, FEATURE_GET) => self.state(),
            (Feature::MigDeviceState, FEATURE_SET) => self.set_state(data)?,
            (Feature::DmaLoggingStart, FEATURE_SET) => self.start_logging(data)?,
            (Feature::DmaLoggingStop, FEATURE_SET) => {
                self.device.change(|engine| engine.stop_logging());
                Vec::new()
            }
            (Feature::DmaLoggingReport, FEATURE_GET) => self.report(data, header.argsz.get())?,
            _ => return Err(Errno(libc::EINVAL)),
        };
        let argsz =
            u32::try_from(size_of::<FeatureHeader>() + answer.len()).map_err(|_| Errno(libc::E2BIG))?;
        if methods == FEATURE_GET && header.argsz.get() < argsz {
            return Err(Errno(libc::EINVAL));
        }
        let reply = FeatureHeader { argsz: argsz.into(), ..header };
        Ok([reply.as_bytes(), &answer].concat())
    }

    fn migration(&self) -> Vec<u8> {
        let pre_copy = if self.config.pre_copy { MIGRATION_PRE_COPY } else { 0 };
        MigrationFeature { flags: (MIGRATION_STOP_COPY | pre_copy).into() }.as_bytes().to_vec()
    }

    fn state(&self) -> Vec<u8> {
        let state = self.device.change(|engine| engine.state());
        MigState { device_state: (state as u32).into(), data_fd: 0.into() }.as_bytes().to_vec()
    }

    fn set_state(&self, data: &[u8]) -> Result<Vec<u8>, Errno> {
        let wanted = MigState::decode(data)?;
        let state = State::from_wire(wanted.device_state.get()).ok_or(Errno(libc::EINVAL))?;
        self.device.change(|engine| engine.set_state(state))?;
        Ok(data.to_vec())
    }

    fn start_logging(&self, data: &[u8]) -> Result<Vec<u8>, Errno> {
        let (control, ranges) = LoggingControl::decode(data)?;
        let chosen = self.device.change(|engine| engine.start_logging(control.page_size.get(), ranges))?;
        let answer = LoggingControl { page_size: chosen.into(), ..control };
        Ok([answer.as_bytes(), ranges.as_bytes()].concat())
    }

    fn report(&self, data: &[u8], argsz: u32) -> Result<Vec<u8>, Errno> {
        let request = LoggingReport::decode(data)?;
        let needed = size_of::<FeatureHeader>() + size_of::<LoggingReport>() + request.bitmap_bytes()?;
        if (argsz as usize) < needed {
            return Err(Errno(libc::EINVAL));
        }
        let (iova, length, page_size) = (request.iova.get(), request.length.get(), request.page_size.get());
        let bitmap = self.device.change(|engine| engine.report(iova, length, page_size))?;
        Ok([request.as_bytes(), bitmap.as_bytes()].concat())
    }

    fn read_data(&self, payload: &[u8]) -> Result<Vec<u8>, Errno> {
        let request = MigData::decode(payload)?;
        let size = request.size.get();
        let limit = self.xfer_bytes().min(self.client_xfer_bytes.unwrap_or(0));
        let room = u64::from(request.argsz.get()).saturating_sub(size_of::<MigData>() as u64);
        if u64::from(size) > limit.min(room) {
            return Err(Errno(libc::EINVAL));
        }
        let piece_bytes = self.config.state_piece_bytes.unwrap_or(u64::MAX).min(size.into());
        let data =
            self.device.change(|engine| engine.read_data(usize::try_from(piece_bytes).unwrap_or(0)))?;
        let size = u32::try_from(data.len()).map_err(|_| Errno(libc::E2BIG))?;
        let header = MigData { argsz: (size + 8).into(), size: size.into() };
        Ok([header.as_bytes(), &data].concat())
    }

    fn write_data(&self, payload: &[u8]) -> Result<Vec<u8>, Errno> {
        let data = MigData::decode_with_data(payload)?;
        if data.len() as u64 > self.xfer_bytes() {
            return Err(Errno(libc::EINVAL));
        }
        self.device.change(|engine| engine.write_data(data))?;
        Ok(Vec::new())
    }
}

fn device_info(payload: &[u8]) -> Result<Vec<u8>, Errno> {
    DeviceInfo::decode(payload)?;
    let info = DeviceInfo {
        argsz: 16.into(),
        flags: DEVICE_FLAGS_RESET.into(),
        num_regions: NUM_REGIONS.into(),
        num_irqs: 0.into(),
    };
    Ok(info.as_bytes().to_vec())
}

fn region_info(payload: &[u8]) -> Result<Vec<u8>, Errno> {
    let index = RegionInfo::decode(payload)?.index.get();
    if index >= NUM_REGIONS {
        return Err(Errno(libc::EINVAL));
    }
    let (flags, size) = match index {
        0 => (REGION_INFO_FLAG_READ | REGION_INFO_FLAG_WRITE, REGION_BYTES),
        _ => (0, 0),
    };
    let info = RegionInfo {
        argsz: 32.into(),
        flags: flags.into(),
        index: index.into(),
        cap_offset: 0.into(),
        size: size.into(),
        offset: 0.into(),
    };
    Ok(info.as_bytes().to_vec())
}
