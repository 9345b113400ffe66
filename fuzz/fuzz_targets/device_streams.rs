// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Lists of devices and pieces of their states: any bytes are refused or written back; pieces in any order, repeated, of any device and
//! session, end soon, and a device is given what came of its state in order or nothing that stays.

#![no_main]

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};

use libfuzzer_sys::fuzz_target;
use vfio_migration::device::{
    Capabilities, DataRead, Device, DeviceError, DeviceIo, DeviceSet, DeviceState, PrecopyInfo,
};
use vfio_migration::transfer::connection::Connection;
use vfio_migration::transfer::frame::{check_piece, decode_devices, encode_devices};
use vfio_migration::transfer::limits::PeerLimits;
use vfio_migration::transfer::receive::{Completion, Destination, GuestPages, PageStore, Receiver};
use vfio_migration::vm::VmError;
use vm_memory::{GuestAddress, GuestMemoryMmap};

/// Most pieces of one input: a socket pair holds them without anybody reading.
const PIECES: usize = 512;

/// A device that takes anything in, as long as it is the next byte: each is its place in the state.
struct Counts {
    state: DeviceState,
    written: u64,
}

impl DeviceIo for Counts {
    fn capabilities(&self) -> Capabilities {
        Capabilities { p2p: true, pre_copy: true }
    }

    fn state(&mut self) -> Result<DeviceState, DeviceError> {
        Ok(self.state)
    }

    fn set_state(&mut self, state: DeviceState) -> Result<(), DeviceError> {
        self.state = state;
        Ok(())
    }

    fn read_data(&mut self, _buffer: &mut [u8]) -> Result<DataRead, DeviceError> {
        unreachable!("nothing is saved")
    }

    fn write_data(&mut self, data: &[u8]) -> Result<(), DeviceError> {
        assert_eq!(self.state, DeviceState::Resuming);
        for byte in data {
            assert_eq!(*byte, self.written.to_le_bytes()[0], "bytes come in order");
            self.written += 1;
        }
        Ok(())
    }

    fn precopy_info(&mut self) -> Result<Option<PrecopyInfo>, DeviceError> {
        Ok(None)
    }

    fn data_size(&mut self) -> Result<Option<u64>, DeviceError> {
        Ok(None)
    }

    fn reset(&mut self) -> Result<(), DeviceError> {
        (self.state, self.written) = (DeviceState::Running, 0);
        Ok(())
    }
}

struct Vmm(Arc<Mutex<DeviceSet>>);

impl Destination for Vmm {
    fn device_streams(&mut self) -> Option<Arc<Mutex<DeviceSet>>> {
        Some(Arc::clone(&self.0))
    }

    fn config(&mut self, _json: &[u8]) -> Result<Arc<dyn PageStore>, VmError> {
        let memory = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), 1 << 16)])?;
        Ok(Arc::new(GuestPages::new(Arc::new(memory))?))
    }

    fn state(&mut self, _json: Vec<u8>) -> Result<(), VmError> {
        Ok(())
    }

    fn complete(&mut self, _paused: bool) -> Result<Completion, VmError> {
        Ok(Completion::Moved)
    }

    fn abandoned(&mut self) {}
}

fn message(command: u16, payload: &[u8]) -> Vec<u8> {
    [&command.to_le_bytes()[..], &[0; 6], &(payload.len() as u64).to_le_bytes(), payload].concat()
}

/// Makes a piece of eight bytes of input; its own bytes are what belongs at its position.
fn piece(input: [u8; 8]) -> Vec<u8> {
    let [device, session, index, position, flags, version, length, damage] = input;
    let position = u64::from(position);
    let data: Vec<u8> = (position..position + u64::from(length % 8)).map(|at| at.to_le_bytes()[0]).collect();
    let mut head = vec![device, 0, flags, 0, session, 0, 0, 0];
    head.extend(u64::from(index).to_le_bytes());
    head.extend(position.to_le_bytes());
    head.extend([version, 0, 0, 0]);
    let checksum = crc32c::crc32c(&[&head[..], &data].concat()) ^ u32::from(damage == 255);
    head.extend(checksum.to_le_bytes());
    message(0x8002, &[&head[..], &data].concat())
}

fuzz_target!(|input: &[u8]| {
    if let Ok(devices) = decode_devices(input) {
        let mut again = Vec::new();
        encode_devices(&devices, &mut again).expect("what was decoded is within the limits");
        assert_eq!(again, input);
    }
    let _ = check_piece(input);

    let counts = || Box::new(Counts { state: DeviceState::Running, written: 0 });
    let devices = ["a", "b"].map(|name| Device::new(name, counts()));
    let set = Arc::new(Mutex::new(DeviceSet::new(devices.into()).expect("two devices with P2P")));
    let (limits, (near, mut far)) =
        (PeerLimits::default(), UnixStream::pair().expect("two descriptors are free"));
    let list = encode_list(&set);
    let mut said = [&[1, 0, 0, 0, b'v', b'M', 3, 0][..], &[0; 8], &message(0x8001, &list)].concat();
    said.extend(message(2, b"{}"));
    said.extend(input.as_chunks().0.iter().take(PIECES).flat_map(|&input| piece(input)));
    said.extend(message(3, b"{}"));
    far.write_all(&said).expect("the socket holds the input");
    far.shutdown(Shutdown::Write).expect("the socket is open");
    let connection = Connection::from_unix(near, &limits).expect("a socket takes its settings");
    let received = Receiver::new(limits, None).receive_from(connection, &mut Vmm(Arc::clone(&set)));
    assert!(received.is_err(), "no Complete came");
    let _ = far.read_to_end(&mut Vec::new());
});

fn encode_list(set: &Mutex<DeviceSet>) -> Vec<u8> {
    let mut list = Vec::new();
    let own = set.lock().expect("nobody panicked").stream_identities();
    encode_devices(&own, &mut list).expect("two short names");
    list
}
