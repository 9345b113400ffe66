// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What an additional connection is for.

use std::io::{Read, Write};

use super::error::WireError;
use super::{read_message, write_message};
use crate::MigratableError;

/// Says what an additional connection carries; its first two bytes, which are not answered.
#[repr(u16)]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum ConnectionRole {
    /// Nothing; keeps a zeroed message from having a meaning.
    #[default]
    Invalid = 0,
    /// Memory requests while the virtual machine runs at the source.
    PrecopyMemory = 1,
    /// Page faults while it already runs at the destination.
    Fault = 2,
}

impl ConnectionRole {
    /// Writes the 2 bytes of the role.
    ///
    /// # Errors
    ///
    /// [`MigratableError::MigrateSocket`] when writing fails; a part may have been written.
    pub fn write_to(self, fd: &mut dyn Write) -> Result<(), MigratableError> {
        write_message(fd, &(self as u16).to_le_bytes())
    }

    /// Reads a role of 2 bytes.
    ///
    /// # Errors
    ///
    /// [`MigratableError::MigrateSocket`] when reading fails or the stream ends before the last byte,
    /// [`MigratableError::MigrateReceive`] when the role is unknown.
    pub fn read_from(fd: &mut dyn Read) -> Result<ConnectionRole, MigratableError> {
        u16::from_le_bytes(read_message(fd, "connection role")?).try_into()
    }
}

impl TryFrom<u16> for ConnectionRole {
    type Error = MigratableError;

    fn try_from(role: u16) -> Result<Self, MigratableError> {
        Ok(match role {
            0 => Self::Invalid,
            1 => Self::PrecopyMemory,
            2 => Self::Fault,
            role => return Err(WireError::UnknownRole { role }.refused()),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_role_is_read_as_it_is_written_and_no_other_is_known() {
        let known: Vec<u16> = (0..=u16::MAX)
            .filter(|&code| ConnectionRole::try_from(code).is_ok_and(|role| role as u16 == code))
            .collect();
        assert_eq!(known, [0, 1, 2]);
        assert!((3..=u16::MAX).all(|code| ConnectionRole::try_from(code).is_err()));
    }
}
