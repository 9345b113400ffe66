// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What can happen next.

use std::fmt;

use super::machine::STREAMING;
use super::world::DEVICES;

/// One step of somebody.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Action {
    /// A vCPU writes a page.
    Write(u8),
    /// A device writes through an IOVA slot.
    Dma(u8, u8),
    /// A device writes to the other one.
    Peer(u8),
    /// The guest maps a slot to a page.
    Map(u8, u8),
    /// The guest unmaps a slot.
    Unmap(u8),
    /// The guest unmaps a slot whose bits a device's log cannot tell.
    UnmapUnread(u8, u8),
    /// RAM comes.
    Plug(u8),
    /// RAM goes.
    Unplug(u8),
    /// A migration to a receiver that holds nothing begins.
    Begin(u8),
    /// All precise sources are collected.
    Collect,
    /// The same, and a device's log cannot be read.
    CollectUnread(u8),
    /// A chunk for a receiver is taken.
    Take(u8),
    /// The same, and KVM cannot clear its bits.
    TakeUncleared(u8),
    /// The bytes of one of its chunks are read and sent.
    Send(u8, u8),
    /// A chunk arrived, and that is acknowledged.
    Ack(u8, u8),
    /// A chunk did not arrive.
    Lose(u8, u8),
    /// A piece of the streaming device's state arrives at a receiver.
    Piece(u8),
    /// Something resets the streaming device, which then runs.
    Reset,
    /// The streaming device enters PRE_COPY once more: its state begins anew.
    Reenter,
    /// The migration to a receiver fails.
    Fail(u8),
    /// The vCPUs are paused, to switch over to a receiver.
    Pause(u8),
    /// A device goes one arc towards its stop.
    Halt(u8),
    /// All sources are collected, with everything stopped.
    CollectFinal,
    /// The switchover would take too long after all.
    BackOut,
    /// The states are captured, which may write a page.
    Capture(Option<u8>),
    /// The sources are collected after the capture.
    CollectRest,
    /// The VMM lets go of what the receiver takes.
    Release,
    /// State and Complete are sent.
    Complete,
    /// The receiver takes over.
    Accept(u8),
    /// The receiver refuses.
    Refuse(u8),
    /// The sender reads the answer.
    Hear,
    /// The sender waits in vain for an answer.
    Silence,
    /// A device goes one arc back towards RUNNING.
    Wake(u8),
    /// The vCPUs run on.
    Resume,
}

impl Action {
    /// Whether the protocol itself goes on with it, rather than the guest, a device or a fault.
    pub(super) fn is_progress(self) -> bool {
        !matches!(
            self,
            Self::Write(_)
                | Self::Dma(..)
                | Self::Peer(_)
                | Self::Map(..)
                | Self::Unmap(_)
                | Self::UnmapUnread(..)
                | Self::Plug(_)
                | Self::Unplug(_)
                | Self::CollectUnread(_)
                | Self::TakeUncleared(_)
                | Self::Lose(..)
                | Self::Reset
                | Self::Fail(_)
                | Self::BackOut
        )
    }
}

impl fmt::Display for Action {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = |device: u8| DEVICES[usize::from(device)];
        match *self {
            Self::Write(page) => write!(f, "a vCPU writes page {page}"),
            Self::Dma(device, slot) => write!(f, "device {} writes through IOVA slot {slot}", name(device)),
            Self::Peer(device) => write!(f, "device {} writes to device {}", name(device), name(1 - device)),
            Self::Map(slot, page) => write!(f, "the guest maps IOVA slot {slot} to page {page}"),
            Self::Unmap(slot) => write!(f, "the guest unmaps IOVA slot {slot}"),
            Self::UnmapUnread(slot, device) => {
                write!(
                    f,
                    "the guest unmaps IOVA slot {slot}, of which device {}'s log cannot be read",
                    name(device)
                )
            }
            Self::Plug(page) => write!(f, "page {page} is plugged in"),
            Self::Unplug(page) => write!(f, "page {page} is unplugged"),
            Self::Begin(to) => write!(f, "a migration to receiver {to} begins"),
            Self::Collect => f.write_str("the sources are collected"),
            Self::CollectUnread(device) => {
                write!(f, "the sources are collected, device {}'s log cannot be read", name(device))
            }
            Self::Take(to) => write!(f, "a chunk for receiver {to} is taken"),
            Self::TakeUncleared(to) => {
                write!(f, "a chunk for receiver {to} is taken, and KVM cannot clear its bits")
            }
            Self::Send(to, chunk) => write!(f, "chunk {chunk} of receiver {to} is read and sent"),
            Self::Ack(to, chunk) => {
                write!(f, "chunk {chunk} arrives at receiver {to}, which acknowledges it")
            }
            Self::Lose(to, chunk) => write!(f, "chunk {chunk} of receiver {to} is lost"),
            Self::Piece(to) => {
                write!(f, "a piece of device {}'s state arrives at receiver {to}", name(STREAMING))
            }
            Self::Reset => write!(f, "device {} is reset", name(STREAMING)),
            Self::Reenter => write!(f, "device {} enters PRE_COPY again", name(STREAMING)),
            Self::Fail(to) => write!(f, "the migration to receiver {to} fails"),
            Self::Pause(to) => write!(f, "the vCPUs are paused, to switch over to receiver {to}"),
            Self::Halt(device) => write!(f, "device {} goes an arc towards STOP_COPY", name(device)),
            Self::CollectFinal => f.write_str("all sources are collected, everything is stopped"),
            Self::BackOut => f.write_str("the switchover is taken back"),
            Self::Capture(None) => f.write_str("the VM's state is captured"),
            Self::Capture(Some(page)) => write!(f, "the VM's state is captured, which writes page {page}"),
            Self::CollectRest => f.write_str("the sources are collected after the capture"),
            Self::Release => f.write_str("what the receiver takes is released"),
            Self::Complete => f.write_str("State and Complete are sent"),
            Self::Accept(to) => write!(f, "receiver {to} runs the VM"),
            Self::Refuse(to) => write!(f, "receiver {to} refuses"),
            Self::Hear => f.write_str("the answer to Complete is read"),
            Self::Silence => f.write_str("no answer to Complete is heard"),
            Self::Wake(device) => write!(f, "device {} goes an arc towards RUNNING", name(device)),
            Self::Resume => f.write_str("the vCPUs are resumed"),
        }
    }
}
