// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What the demo is asked to do.

use std::ops::RangeInclusive;
use std::path::PathBuf;
use std::str::FromStr;

use thiserror::Error;

use super::side::SOURCES;

/// Rounds that a destination can be killed in: later ones are not reached in the time that a migration has by default.
const KILL_ROUNDS: RangeInclusive<u32> = 2..=100;

/// How the two machines are connected.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Transport {
    /// TCP on loopback; port 0 takes any free one.
    Tcp {
        /// The destination's port.
        port: u16,
    },
    /// A UNIX socket in a temporary folder.
    Unix,
}

/// Something that goes wrong on purpose.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Inject {
    /// One bit of one page is flipped on its way.
    CorruptPage,
    /// One source's reports are left out of the merge.
    Forget(String),
    /// The destination is killed in this round; a second attempt goes to a fresh one.
    KillDestination {
        /// Round, 2 at least: in the first one the destination has too little of the memory.
        round: u32,
    },
}

/// Text that names no transport or no fault.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum OptionError {
    /// Not `tcp`, `tcp:PORT` or `unix`.
    #[error("Transport {0:?} is not tcp, tcp:PORT or unix")]
    Transport(String),
    /// Not a fault the demo knows.
    #[error(
        "Fault {0:?} is not corrupt-page, forget-kvm-log, forget-vmm-writes, forget-device-log or \
         kill-destination@round=N with N from 2 to 100"
    )]
    Inject(String),
}

impl FromStr for Transport {
    type Err = OptionError;

    fn from_str(text: &str) -> Result<Self, OptionError> {
        let unknown = || OptionError::Transport(text.to_owned());
        match text.split_once(':') {
            None if text == "tcp" => Ok(Self::Tcp { port: 0 }),
            None if text == "unix" => Ok(Self::Unix),
            Some(("tcp", port)) => Ok(Self::Tcp { port: port.parse().map_err(|_| unknown())? }),
            _ => Err(unknown()),
        }
    }
}

impl FromStr for Inject {
    type Err = OptionError;

    fn from_str(text: &str) -> Result<Self, OptionError> {
        if text == "corrupt-page" {
            return Ok(Self::CorruptPage);
        }
        if let Some(source) = text.strip_prefix("forget-").filter(|source| SOURCES.contains(source)) {
            return Ok(Self::Forget(source.to_owned()));
        }
        let round = text.strip_prefix("kill-destination@round=").and_then(|round| round.parse().ok());
        round
            .filter(|round| KILL_ROUNDS.contains(round))
            .map(|round| Self::KillDestination { round })
            .ok_or_else(|| OptionError::Inject(text.to_owned()))
    }
}

/// What the demo is asked to do.
#[derive(Debug, Clone)]
pub struct DemoOptions {
    /// The program that becomes each process when run with the argument [`super::PROCESS_ARGUMENT`].
    pub program: PathBuf,
    /// How much the processes tell on stderr: a level of the `log` crate.
    pub log_level: String,
    /// Guest RAM in bytes.
    pub memory_bytes: u64,
    /// Whether most of it stays unpopulated: it may be more than the host has.
    pub sparse: bool,
    /// Pages a second that the guest stamps.
    pub guest_dirty_rate: u32,
    /// Pages a second that the device writes.
    pub device_dirty_rate: u32,
    /// Bytes of state inside the device.
    pub device_state_bytes: u64,
    /// Bytes of that state that the device rewrites in each second.
    pub device_state_changes_per_second: u64,
    /// Longest acceptable downtime.
    pub downtime_ms: u64,
    /// Longest acceptable migration.
    pub timeout_s: u64,
    /// How the machines are connected.
    pub transport: Transport,
    /// Whether to do without KVM even where there is one.
    pub no_kvm: bool,
    /// What memory content, device stream and injected faults depend on.
    pub seed: u64,
    /// What goes wrong on purpose.
    pub inject: Option<Inject>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn transports_and_faults_parse_or_are_named() {
        assert_eq!("tcp:4444".parse(), Ok(Transport::Tcp { port: 4444 }));
        assert_eq!("unix".parse(), Ok(Transport::Unix));
        assert!("tcp:70000".parse::<Transport>().unwrap_err().to_string().contains("tcp:70000"));
        assert_eq!("forget-kvm-log".parse(), Ok(Inject::Forget("kvm-log".to_owned())));
        assert_eq!("kill-destination@round=2".parse(), Ok(Inject::KillDestination { round: 2 }));
        let rounds = ["0", "1", "101", "-2", ""].map(|round| format!("kill-destination@round={round}"));
        let bad = ["forget-", "forget-nobody", "kill-destination", "corrupt"].map(str::to_owned);
        for bad in bad.iter().chain(&rounds) {
            assert!(bad.parse::<Inject>().unwrap_err().to_string().contains(bad));
        }
    }
}
