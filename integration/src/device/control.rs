// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The device's driver: what a VMM or a test does with its registers, through a client.

use vfio_migration::vfio_user::{Client, Error};

use super::registers;
use super::stream::{Stream, Window};

/// Describes what the device's registers say.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Status {
    /// Whether the engine is switched on.
    pub running: bool,
    /// Seed and windows.
    pub stream: Stream,
    /// The next position of the stream.
    pub position: u64,
    /// Positions whose page was not mapped.
    pub missed: u64,
    /// One number for the whole state that migrates.
    pub digest: u64,
}

/// Switches the engine off, begins `stream` at position 0 and sets the rate.
///
/// # Errors
///
/// Those of the client; EINVAL for more than [`super::MAX_WINDOWS`] windows.
pub fn program(client: &mut Client, stream: &Stream, pages_per_second: u64) -> Result<(), Error> {
    write(client, registers::CONTROL, 0)?;
    write(client, registers::WINDOW_COUNT, stream.windows.len() as u64)?;
    for (index, window) in stream.windows.iter().enumerate() {
        write(client, registers::window(index) + 8, 0)?;
        write(client, registers::window(index), window.iova())?;
        write(client, registers::window(index) + 8, window.length())?;
    }
    write(client, registers::SEED, stream.seed)?;
    write(client, registers::RATE, pages_per_second)
}

/// Switches the engine on or off.
///
/// # Errors
///
/// Those of the client.
pub fn run(client: &mut Client, on: bool) -> Result<(), Error> {
    write(client, registers::CONTROL, u64::from(on))
}

/// Passes `positions` positions at once; they are written and logged when this returns.
///
/// # Errors
///
/// Those of the client; EBUSY while the device is stopped, EINVAL for more than 2^20 positions.
pub fn step(client: &mut Client, positions: u64) -> Result<(), Error> {
    write(client, registers::STEP, positions)
}

/// Reads all registers, in any migration state.
///
/// # Errors
///
/// Those of the client.
pub fn status(client: &mut Client) -> Result<Status, Error> {
    let count = read(client, registers::WINDOW_COUNT)?;
    let windows = (0..usize::try_from(count).unwrap_or(0).min(super::MAX_WINDOWS)).map(|index| {
        let (iova, length) = (registers::window(index), registers::window(index) + 8);
        let window = Window::new(read(client, iova)?, read(client, length)?);
        Ok(window.unwrap_or_default())
    });
    let windows = windows.collect::<Result<_, Error>>()?;
    Ok(Status {
        running: read(client, registers::CONTROL)? == 1,
        stream: Stream { seed: read(client, registers::SEED)?, windows },
        position: read(client, registers::POSITION)?,
        missed: read(client, registers::MISSED)?,
        digest: read(client, registers::DIGEST)?,
    })
}

fn read(client: &mut Client, register: u64) -> Result<u64, Error> {
    let mut bytes = [0; 8];
    client.region_read(0, register, &mut bytes)?;
    Ok(u64::from_le_bytes(bytes))
}

fn write(client: &mut Client, register: u64, value: u64) -> Result<(), Error> {
    client.region_write(0, register, &value.to_le_bytes())
}
