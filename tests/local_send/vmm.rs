// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A VMM that waits for a VM whose memory comes as descriptors, in bytes spelled out here: as `docs/offload.md` says, and no further.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::time::Duration;

use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
use serde_json::Value;

use crate::frames::{FOR_FAULTS, OK, PAGE_FAULT, message, request};

/// The longest that a sender may say nothing.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

/// One slot, as Config has it.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Slot {
    pub(crate) number: u32,
    pub(crate) gpa: u64,
    pub(crate) size: u64,
    pub(crate) offset: u64,
}

/// What a sender said and passed.
#[derive(Debug, Default)]
pub(crate) struct Passed {
    /// The commands, in their order.
    pub(crate) commands: Vec<u16>,
    pub(crate) files: BTreeMap<u32, File>,
    pub(crate) config: Value,
    pub(crate) state: Vec<u8>,
}

impl Passed {
    pub(crate) fn slots(&self) -> Vec<Slot> {
        let mappings = self.config["memory_manager_data"]["guest_ram_mappings"].as_array().unwrap();
        let number = |mapping: &Value, name: &str| mapping[name].as_u64().unwrap_or(0);
        let slot = |mapping: &Value| Slot {
            number: u32::try_from(number(mapping, "slot")).unwrap(),
            gpa: number(mapping, "gpa"),
            size: number(mapping, "size"),
            offset: number(mapping, "file_offset"),
        };
        mappings.iter().map(slot).collect()
    }

    /// Reads guest memory, which is all in one slot.
    pub(crate) fn read(&self, gpa: u64, bytes: &mut [u8]) -> std::io::Result<()> {
        let slot = self.slots().into_iter().find(|slot| (slot.gpa..slot.gpa + slot.size).contains(&gpa));
        let slot = slot.unwrap();
        self.files[&slot.number].read_exact_at(bytes, slot.offset + (gpa - slot.gpa))
    }

    /// All memory, slot after slot, ascending.
    pub(crate) fn memory(&self) -> Vec<u8> {
        let mut slots = self.slots();
        slots.sort_by_key(|slot| slot.gpa);
        let mut memory = Vec::new();
        for slot in slots {
            let start = memory.len();
            memory.resize(start + usize::try_from(slot.size).unwrap(), 0);
            self.read(slot.gpa, &mut memory[start..]).unwrap();
        }
        memory
    }

    /// Bytes that the memory takes up.
    pub(crate) fn allocated(&self) -> u64 {
        self.files.values().map(|file| file.metadata().unwrap().blocks() * 512).sum()
    }
}

/// A waiting VMM.
pub(crate) struct Vmm {
    pub(crate) listener: UnixListener,
}

impl Vmm {
    /// Binds a socket at `path` and listens.
    pub(crate) fn bind(path: &Path) -> Self {
        Self { listener: UnixListener::bind(path).unwrap() }
    }

    pub(crate) fn accept(&self) -> Line {
        Line::of(self.listener.accept().unwrap().0)
    }
}

/// The main connection.
pub(crate) struct Line {
    pub(crate) stream: UnixStream,
    pub(crate) passed: Passed,
}

impl Line {
    pub(crate) fn of(stream: UnixStream) -> Self {
        stream.set_nonblocking(false).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        Self { stream, passed: Passed::default() }
    }

    /// Takes the next message; returns its command, or `None` when the sender has closed the connection.
    pub(crate) fn next(&mut self) -> Option<u16> {
        let mut head = [0; 16];
        // No further than the head: descriptors come with what is behind it.
        self.stream.read_exact(&mut head).ok()?;
        let command = u16::from_le_bytes([head[0], head[1]]);
        let length = u64::from_le_bytes(head[8..].try_into().unwrap());
        // Byte for byte what a sender of Cloud Hypervisor's says.
        assert_eq!(head.to_vec(), request(command, length));
        self.passed.commands.push(command);
        match command {
            7 => {
                assert_eq!(length, 4);
                let (number, memory) = self.descriptor()?;
                assert!(self.passed.files.insert(number, memory.into()).is_none(), "slot {number} twice");
            }
            2 => self.passed.config = serde_json::from_slice(&self.payload(length)?).unwrap(),
            3 => self.passed.state = self.payload(length)?,
            _ => assert_eq!(length, 0, "command {command}"),
        }
        Some(command)
    }

    fn payload(&mut self, length: u64) -> Option<Vec<u8>> {
        let mut payload = vec![0; usize::try_from(length).unwrap()];
        self.stream.read_exact(&mut payload).ok()?;
        Some(payload)
    }

    /// Takes the four bytes of a slot, which one descriptor rides on; `None` when the connection was closed before them.
    fn descriptor(&mut self) -> Option<(u32, OwnedFd)> {
        let (mut number, mut descriptors) = ([0; 4], Vec::new());
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(4))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let mut parts = [IoSliceMut::new(&mut number)];
        let came = recvmsg(&self.stream, &mut parts, &mut control, RecvFlags::CMSG_CLOEXEC).ok()?;
        if came.bytes == 0 {
            return None;
        }
        assert_eq!(came.bytes, 4, "the descriptor rides on all four bytes");
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(rights) = message {
                descriptors.extend(rights);
            }
        }
        assert_eq!(descriptors.len(), 1);
        Some((u32::from_le_bytes(number), descriptors.pop().unwrap()))
    }

    /// Answers with `status`; a sender that has gone away is no failure of the test's VMM.
    pub(crate) fn answer(&mut self, status: u16) {
        let _ = self.stream.write_all(&request(status, 0));
    }

    /// Answers everything with Ok until `last` has come, and leaves that unanswered. Returns whether it came.
    pub(crate) fn answer_until(&mut self, last: u16) -> bool {
        while let Some(command) = self.next() {
            if command == last {
                return true;
            }
            self.answer(OK);
        }
        false
    }
}

/// The connection that pages are asked for on.
pub(crate) struct Faults(pub(crate) UnixStream);

impl Faults {
    pub(crate) fn accept(vmm: &Vmm) -> Self {
        let (mut stream, _) = vmm.listener.accept().unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        let mut role = [0; 2];
        stream.read_exact(&mut role).unwrap();
        assert_eq!(role, FOR_FAULTS);
        Self(stream)
    }

    /// Asks for a page, and returns the status of the answer.
    pub(crate) fn ask(&mut self, gpa: u64, length: u64) -> Option<u16> {
        let range = [gpa.to_le_bytes(), length.to_le_bytes()].concat();
        let _ = self.0.write_all(&message(PAGE_FAULT, &range));
        let mut answer = [0; 16];
        self.0.read_exact(&mut answer).ok()?;
        assert_eq!(answer[2..], [0; 14], "no payload");
        Some(u16::from_le_bytes([answer[0], answer[1]]))
    }
}
