// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What a device is told at its start: its size, what it offers, how it misbehaves.

use serde::{Deserialize, Serialize};

/// Describes one device; serialisable, so that a parent can hand it to a device process.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct DeviceConfig {
    /// Size of the internal state that migrates, in bytes.
    pub state_bytes: u64,
    /// Bytes of that state that change in each second while the device is on.
    pub state_changes_per_second: u64,
    /// Whether the state can be read while the device runs.
    pub pre_copy: bool,
    /// Whether the device can be migrated at all.
    pub migration: bool,
    /// Whether the device logs its DMA.
    pub dma_logging: bool,
    /// The granule of the DMA log in bytes whatever the client wishes; none follows the wish.
    pub log_page_bytes: Option<u64>,
    /// Most bytes of data in one message.
    pub max_data_xfer_bytes: u64,
    /// Most bytes of state in one answer, however many are asked for and left; none hands out as many as asked.
    pub state_piece_bytes: Option<u64>,
    /// To the letter of the protocol, or as the common C library reads it.
    pub behaviour: Behaviour,
    /// What goes wrong, and when.
    pub faults: Vec<Fault>,
}

impl Default for DeviceConfig {
    fn default() -> Self {
        DeviceConfig {
            state_bytes: 256 << 10,
            state_changes_per_second: 0,
            pre_copy: true,
            migration: true,
            dma_logging: true,
            log_page_bytes: None,
            max_data_xfer_bytes: 1 << 20,
            state_piece_bytes: None,
            behaviour: Behaviour::Strict,
            faults: Vec::new(),
        }
    }
}

/// Says how the device reads the protocol.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Behaviour {
    /// To the letter: the log covers the ranges of START, which may come once.
    Strict,
    /// As libvfio-user: START logs every mapped region and may come again with the same page size; REPORT names
    /// exactly one mapped region. A message's body is read with one `recv`, and what comes later is taken for the next
    /// message. DEVICE_RESET is refused in STOP and STOP_COPY, and in PRE_COPY and RESUMING leaves the state as it is.
    LibvfioUser,
}

/// Picks one message among those the device receives.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct When {
    /// Only messages with this command count; none counts all.
    #[serde(default)]
    pub command: Option<u16>,
    /// The first is number 1.
    pub nth: u64,
}

/// Names something that goes wrong.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Fault {
    /// The device closes its socket instead of answering.
    Die(When),
    /// The device never answers again.
    Stall(When),
    /// The device refuses one message.
    Refuse {
        /// Which.
        when: When,
        /// With this errno.
        errno: i32,
    },
    /// Reports fail with EIO after this many, until logging is stopped.
    ReportError {
        /// How many succeed.
        after: u64,
    },
    /// Reading migration data fails with EIO once it reaches this byte.
    DataReadError {
        /// Offset in the stream of one session.
        at_byte: u64,
    },
    /// One bit of the migration data is flipped.
    CorruptData {
        /// Offset in the stream of one session.
        at_byte: u64,
    },
    /// Every so many writes, one is left out of the log.
    ForgetWrites {
        /// One of this many.
        every: u64,
    },
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn config_survives_its_way_to_another_process() {
        let config = DeviceConfig {
            behaviour: Behaviour::LibvfioUser,
            log_page_bytes: Some(65536),
            faults: vec![
                Fault::Die(When { command: Some(16), nth: 3 }),
                Fault::Refuse { when: When { command: None, nth: 1 }, errno: 5 },
                Fault::ReportError { after: 2 },
            ],
            ..DeviceConfig::default()
        };
        let json = serde_json::to_string(&config).unwrap();
        assert_eq!(serde_json::from_str::<DeviceConfig>(&json).unwrap(), config);
        assert_eq!(serde_json::from_str::<DeviceConfig>("{}").unwrap(), DeviceConfig::default());
        assert!(serde_json::from_str::<DeviceConfig>(r#"{"state_byte":1}"#).is_err());
    }
}
