// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The command line.

use clap::{Args, Parser, Subcommand};
use log::LevelFilter;
use vfio_migration_integration::demo::{Inject, Transport};

/// Live-migrates, stores and checks VMs with pass-through devices.
#[derive(Debug, Parser)]
#[command(
    version,
    max_term_width = 100,
    after_help = "Exit status: 0 done, 2 usage, 3 the other side failed, \
    4 something on this host failed, 5 verification failed, 130 given up on request."
)]
pub(crate) struct Arguments {
    /// How much to tell on stderr: off, error, warn, info, debug or trace.
    #[arg(long, global = true, default_value = "warn", value_name = "LEVEL")]
    pub(crate) log_level: LevelFilter,
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Moves a real KVM guest and its DMA-ing device to another process, and proves that every byte arrived.
    ///
    /// Starts a source and a destination process, each with a device in a process of its own that writes guest memory behind
    /// KVM's back; migrates; compares both sides' RAM byte for byte at the switchover; lets the guest and the device go on and
    /// check themselves. Prints who dirtied what. Without a usable /dev/kvm a software vCPU stands in, and says so.
    Demo(DemoArguments),
    /// Tells what this host, and each VFIO device on it, can do for a migration, and what stands in the way.
    ///
    /// Looks at KVM, the container interface, iommufd, and every device that a VFIO driver holds and nobody uses. Works
    /// unprivileged as far as it can, and says what it could not see. Opening a device may reset it.
    Probe {
        /// Print one JSON object.
        #[arg(long)]
        json: bool,
    },
}

#[derive(Debug, Args)]
pub(crate) struct DemoArguments {
    /// Guest RAM, a number of bytes with K, M or G behind it.
    #[arg(long, default_value = "256M", value_name = "SIZE", value_parser = size)]
    pub(crate) memory: u64,
    /// Pages a second that the guest writes.
    #[arg(long, default_value_t = 2000, value_name = "PAGES")]
    pub(crate) guest_dirty_rate: u32,
    /// Pages a second that the device writes.
    #[arg(long, default_value_t = 2000, value_name = "PAGES")]
    pub(crate) device_dirty_rate: u32,
    /// State inside the device, a number of bytes with K, M or G behind it.
    #[arg(long, default_value = "1M", value_name = "SIZE", value_parser = size)]
    pub(crate) device_state: u64,
    /// Longest acceptable downtime, in milliseconds.
    #[arg(long, default_value_t = 300, value_name = "MS")]
    pub(crate) downtime_ms: u64,
    /// Longest acceptable migration, in seconds.
    #[arg(long, default_value_t = 60, value_name = "S", value_parser = clap::value_parser!(u64).range(1..=86_400))]
    pub(crate) timeout_s: u64,
    /// How the two processes are connected: tcp, tcp:PORT or unix.
    #[arg(long, default_value = "tcp", value_name = "HOW")]
    pub(crate) transport: Transport,
    /// Do without KVM even where there is one.
    #[arg(long)]
    pub(crate) no_kvm: bool,
    /// Print one JSON object instead of the report, and no progress bar.
    #[arg(long)]
    pub(crate) json: bool,
    /// What memory content, device stream and injected faults depend on.
    #[arg(long, default_value_t = 1, value_name = "N")]
    pub(crate) seed: u64,
    /// Let something go wrong: corrupt-page, forget-SOURCE (kvm-log, vmm-writes, device-log), kill-destination@round=N.
    #[arg(long, value_name = "FAULT")]
    pub(crate) inject: Option<Inject>,
}

/// Parses a number of bytes with K, M, G, T or nothing behind it.
fn size(text: &str) -> Result<u64, String> {
    let (digits, shift) = match text.trim_end_matches(['i', 'B']) {
        t if t.ends_with(['K', 'k']) => (&t[..t.len() - 1], 10),
        t if t.ends_with(['M', 'm']) => (&t[..t.len() - 1], 20),
        t if t.ends_with(['G', 'g']) => (&t[..t.len() - 1], 30),
        t if t.ends_with(['T', 't']) => (&t[..t.len() - 1], 40),
        t => (t, 0),
    };
    let number: u64 = digits.parse().map_err(|_| "not a number of bytes such as 64M".to_owned())?;
    number.checked_mul(1 << shift).ok_or_else(|| "more bytes than 64 bits can count".to_owned())
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Arguments::command().debug_assert();
    }

    #[test]
    fn sizes_parse_or_say_why_not() {
        assert_eq!(size("64M"), Ok(64 << 20));
        assert_eq!(size("2GiB"), Ok(2 << 30));
        assert_eq!(size("4096"), Ok(4096));
        assert!(size("").is_err());
        assert!(size("-1M").is_err());
        assert!(size("99999999999G").unwrap_err().contains("64 bits"));
    }
}
