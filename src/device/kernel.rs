// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Kernel VFIO: migration v2 over any VFIO device descriptor.

use std::fs::File;
use std::io::{self, ErrorKind, Read, Write};
use std::os::fd::AsRawFd;

use thiserror::Error;
use vfio_bindings::bindings::vfio::{VFIO_MIGRATION_P2P, VFIO_MIGRATION_PRE_COPY, VFIO_MIGRATION_STOP_COPY};

use super::{Capabilities, DataRead, DeviceError, DeviceIo, DeviceOperation, DeviceState, PrecopyInfo};
use crate::sys::vfio::device as sys;

/// Why a kernel device cannot be migrated, or failed.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum KernelDeviceError {
    /// The device's driver has no migration v2, or none that saves the device's state.
    #[error("Device cannot be migrated")]
    NotMigratable(#[source] io::Error),
    /// The device offers migration without STOP_COPY.
    #[error("Device offers migration flags {flags:#x}, without STOP_COPY")]
    NoStopCopy {
        /// `VFIO_MIGRATION_*`.
        flags: u64,
    },
    /// The kernel named a state that this library does not know.
    #[error("Device is in unknown state {number}")]
    UnknownState {
        /// What the kernel said.
        number: u32,
    },
    /// The move is blocked: some kernels loop forever over it.
    #[error("Device cannot move from {from} to {to}")]
    NoArc {
        /// Where the device is.
        from: DeviceState,
        /// Where it was to go.
        to: DeviceState,
    },
    /// A data session ended or began unexpectedly: something else reset the device.
    #[error("Device is out of sync: its data session changed while it moved to {to}")]
    OutOfSync {
        /// Where the device went.
        to: DeviceState,
    },
    /// The device is in no state with a data session.
    #[error("Device has no data session")]
    NoSession,
}

/// A kernel VFIO device, by any descriptor of it.
///
/// Does not close the device; a data session it opened closes with it.
#[derive(Debug)]
pub struct KernelDevice<F> {
    device: F,
    capabilities: Capabilities,
    session: Option<Session>,
}

/// An open data descriptor and what it is for.
#[derive(Debug)]
struct Session {
    kind: Kind,
    data: File,
    /// More data comes after the next end: the device is in PRE_COPY or PRE_COPY_P2P.
    goes_on: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Saving,
    Resuming,
}

impl Kind {
    /// The data session that belongs to a state.
    fn of(state: DeviceState) -> Option<Self> {
        match state {
            DeviceState::PreCopy | DeviceState::PreCopyP2p | DeviceState::StopCopy => Some(Self::Saving),
            DeviceState::Resuming => Some(Self::Resuming),
            _ => None,
        }
    }
}

/// Whether a state's end of data is not the last.
fn goes_on(state: DeviceState) -> bool {
    matches!(state, DeviceState::PreCopy | DeviceState::PreCopyP2p)
}

/// What a move did to the data session.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Outcome {
    /// It goes on.
    Kept,
    /// It ended, or there was none.
    Ended,
    /// One began.
    Began,
    /// The kernel's session differs from the expected one.
    OutOfSync,
}

/// Returns what a successful move from `before` to `to` did to the data session; `descriptor` is whether the kernel
/// returned one.
fn outcome(before: Option<Kind>, to: DeviceState, descriptor: bool) -> Outcome {
    match (before, Kind::of(to), descriptor) {
        (Some(old), Some(new), false) if old == new => Outcome::Kept,
        (_, None, false) => Outcome::Ended,
        (Some(old), Some(new), true) if old != new => Outcome::Began,
        (None, Some(_), true) => Outcome::Began,
        _ => Outcome::OutOfSync,
    }
}

/// Whether the move must never be requested of a kernel.
fn is_forbidden(from: DeviceState, to: DeviceState) -> bool {
    from == DeviceState::StopCopy && goes_on(to)
}

impl<F: AsRawFd + Send> KernelDevice<F> {
    /// Asks `device` what it offers; changes nothing.
    ///
    /// # Errors
    /// The device cannot be migrated.
    pub fn new(device: F) -> Result<Self, KernelDeviceError> {
        let flags = sys::migration_flags(&device).map_err(KernelDeviceError::NotMigratable)?;
        let has = |flag: u32| flags & u64::from(flag) != 0;
        if !has(VFIO_MIGRATION_STOP_COPY) {
            return Err(KernelDeviceError::NoStopCopy { flags });
        }
        let capabilities =
            Capabilities { p2p: has(VFIO_MIGRATION_P2P), pre_copy: has(VFIO_MIGRATION_PRE_COPY) };
        Ok(Self { device, capabilities, session: None })
    }

    fn session(&self, operation: DeviceOperation) -> Result<&Session, DeviceError> {
        let session = self.session.as_ref().ok_or(KernelDeviceError::NoSession);
        session.map_err(|cause| DeviceError::new(operation, cause))
    }

    fn ask_state(&self) -> Result<DeviceState, DeviceError> {
        let number = sys::device_state(&self.device)
            .map_err(|cause| DeviceError::new(DeviceOperation::State, cause))?;
        DeviceState::from_uapi(number).ok_or_else(|| {
            DeviceError::new(DeviceOperation::State, KernelDeviceError::UnknownState { number })
        })
    }

    fn try_set_state(&mut self, to: DeviceState) -> Result<(), DeviceError> {
        let operation = DeviceOperation::SetState(to);
        // Keeps the session: one that a reset has ended meanwhile is out of sync, not a new one.
        let from = self.ask_state()?;
        if is_forbidden(from, to) {
            return Err(DeviceError::new(operation, KernelDeviceError::NoArc { from, to }));
        }
        let began = sys::set_device_state(&self.device, to as u32)
            .map_err(|cause| DeviceError::new(operation, cause))?;
        let before = self.session.as_ref().map(|session| session.kind);
        match (outcome(before, to, began.is_some()), Kind::of(to), began) {
            (Outcome::Kept, ..) => self.session.iter_mut().for_each(|session| session.goes_on = goes_on(to)),
            (Outcome::Ended, ..) => self.session = None,
            (Outcome::Began, Some(kind), Some(data)) => {
                self.session = Some(Session { kind, data: File::from(data), goes_on: goes_on(to) });
            }
            _ => {
                self.session = None;
                return Err(DeviceError::new(operation, KernelDeviceError::OutOfSync { to }));
            }
        }
        Ok(())
    }
}

impl<F: AsRawFd + Send> DeviceIo for KernelDevice<F> {
    fn capabilities(&self) -> Capabilities {
        self.capabilities
    }

    /// Also ends the data session that a reset has taken away, since the caller sees it here.
    fn state(&mut self) -> Result<DeviceState, DeviceError> {
        let state = self.ask_state()?;
        self.session.take_if(|session| Kind::of(state) != Some(session.kind));
        Ok(state)
    }

    fn set_state(&mut self, state: DeviceState) -> Result<(), DeviceError> {
        self.try_set_state(state)
    }

    fn read_data(&mut self, buffer: &mut [u8]) -> Result<DataRead, DeviceError> {
        let operation = DeviceOperation::ReadData;
        let session = self.session(operation)?;
        let read = data_read(&session.data, buffer, session.goes_on);
        read.map_err(|cause| DeviceError::new(operation, cause))
    }

    fn write_data(&mut self, data: &[u8]) -> Result<(), DeviceError> {
        let operation = DeviceOperation::WriteData;
        (&self.session(operation)?.data).write_all(data).map_err(|cause| DeviceError::new(operation, cause))
    }

    fn precopy_info(&mut self) -> Result<Option<PrecopyInfo>, DeviceError> {
        let operation = DeviceOperation::PrecopyInfo;
        if !self.capabilities.pre_copy {
            return Ok(None);
        }
        let (initial_bytes, dirty_bytes) = sys::precopy_info(&self.session(operation)?.data)
            .map_err(|cause| DeviceError::new(operation, cause))?;
        Ok(Some(PrecopyInfo { initial_bytes, dirty_bytes }))
    }

    fn data_size(&mut self) -> Result<Option<u64>, DeviceError> {
        match sys::stop_copy_length(&self.device) {
            Ok(bytes) => Ok(Some(bytes)),
            Err(error) if sys::is_absent(&error) => Ok(None),
            Err(error) => Err(DeviceError::new(DeviceOperation::DataSize, error)),
        }
    }

    fn reset(&mut self) -> Result<(), DeviceError> {
        self.session = None;
        sys::reset(&self.device).map_err(|cause| DeviceError::new(DeviceOperation::Reset, cause))
    }
}

/// Reads once; distinguishes the end (no bytes) from a temporary end (`ENOMSG`).
///
/// Where the state `goes_on`, no bytes are nothing for now as well: the kernel's own sample driver answers so.
fn data_read(mut data: impl Read, buffer: &mut [u8], goes_on: bool) -> io::Result<DataRead> {
    loop {
        return match data.read(buffer) {
            Ok(0) if goes_on => Ok(DataRead::NothingNow),
            Ok(0) => Ok(DataRead::End),
            Ok(bytes) => Ok(DataRead::Bytes(bytes)),
            Err(error) if error.raw_os_error() == Some(libc::ENOMSG) => Ok(DataRead::NothingNow),
            Err(error) if error.kind() == ErrorKind::Interrupted => continue,
            Err(error) => Err(error),
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Scripted(Vec<io::Result<usize>>);

    impl Read for Scripted {
        fn read(&mut self, _buffer: &mut [u8]) -> io::Result<usize> {
            self.0.remove(0)
        }
    }

    fn errno<T>(errno: i32) -> io::Result<T> {
        Err(io::Error::from_raw_os_error(errno))
    }

    fn broken() -> KernelDevice<File> {
        let device = File::open("/dev/null").unwrap();
        KernelDevice { device, capabilities: Capabilities { p2p: true, pre_copy: true }, session: None }
    }

    #[test]
    fn c29_nothing_now_is_not_the_end() {
        let mut script =
            Scripted(vec![Ok(3), errno(libc::ENOMSG), errno(libc::EINTR), Ok(0), errno(libc::EIO)]);
        let mut next = || data_read(&mut script, &mut [0; 8], false);
        assert_eq!(next().unwrap(), DataRead::Bytes(3));
        assert_eq!(next().unwrap(), DataRead::NothingNow);
        assert_eq!(next().unwrap(), DataRead::End);
        assert_eq!(next().unwrap_err().raw_os_error(), Some(libc::EIO));
        let in_precopy = data_read(Scripted(vec![Ok(0)]), &mut [0; 8], true);
        assert_eq!(in_precopy.unwrap(), DataRead::NothingNow);
    }

    #[test]
    fn c30_a_session_that_begins_where_one_goes_on_is_out_of_sync() {
        for before in [None, Some(Kind::Saving), Some(Kind::Resuming)] {
            for to in DeviceState::ALL {
                for descriptor in [false, true] {
                    let expected = match (Kind::of(to), descriptor) {
                        (None, false) => Outcome::Ended,
                        (None, true) => Outcome::OutOfSync,
                        (Some(kind), false) if before == Some(kind) => Outcome::Kept,
                        (Some(_), false) => Outcome::OutOfSync,
                        (Some(kind), true) if before == Some(kind) => Outcome::OutOfSync,
                        (Some(_), true) => Outcome::Began,
                    };
                    assert_eq!(outcome(before, to, descriptor), expected, "{before:?} {to} {descriptor}");
                }
            }
        }
    }

    #[test]
    fn the_moves_kernels_loop_over_are_never_asked_for() {
        let forbidden: Vec<_> = DeviceState::ALL
            .into_iter()
            .flat_map(|from| DeviceState::ALL.map(|to| (from, to)))
            .filter(|&(from, to)| is_forbidden(from, to))
            .collect();
        let stop_copy = DeviceState::StopCopy;
        assert_eq!(forbidden, [(stop_copy, DeviceState::PreCopy), (stop_copy, DeviceState::PreCopyP2p)]);
    }

    #[test]
    fn a_descriptor_that_is_no_device_is_not_migratable() {
        let device = KernelDevice::new(File::open("/dev/null").unwrap());
        assert!(matches!(device, Err(KernelDeviceError::NotMigratable(_))));
    }

    #[test]
    fn data_is_neither_read_nor_written_without_a_session() {
        let mut device = broken();
        let no_session = |error: DeviceError| error.cause.to_string() == "Device has no data session";
        assert!(no_session(device.read_data(&mut [0; 8]).unwrap_err()));
        assert!(no_session(device.write_data(&[1]).unwrap_err()));
        assert!(no_session(device.precopy_info().unwrap_err()));
    }

    #[test]
    fn a_device_without_precopy_or_sizes_has_no_such_questions() {
        let mut device = broken();
        device.capabilities.pre_copy = false;
        assert_eq!(device.precopy_info().unwrap(), None);
        assert_eq!(device.data_size().unwrap(), None);
    }
}
