// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The command line of the demo.

use clap::Args;
use vfio_migration_integration::demo::{Inject, Transport};

use super::{seconds, size};

#[derive(Debug, Args)]
pub(crate) struct DemoArguments {
    /// Guest RAM, 16M to 128G, or to 16T with --sparse: a number of bytes with K, M, G or T behind it.
    #[arg(long, default_value = "256M", value_name = "SIZE", value_parser = size)]
    pub(crate) memory: u64,
    /// Leave most of the RAM unpopulated, so that it may exceed the host's: each of the two regions has only what
    /// guest, device and VMM write (38 MiB at most) and 16 MiB that nobody writes. The device reaches what is below 4
    /// GiB. More than 128G needs --no-kvm.
    #[arg(long)]
    pub(crate) sparse: bool,
    /// Pages a second that the guest writes.
    #[arg(long, default_value_t = 2000, value_name = "PAGES")]
    pub(crate) guest_dirty_rate: u32,
    /// Pages a second that the device writes.
    #[arg(long, default_value_t = 2000, value_name = "PAGES")]
    pub(crate) device_dirty_rate: u32,
    /// State inside the device, a number of bytes with K, M or G behind it.
    #[arg(long, default_value = "1M", value_name = "SIZE", value_parser = size)]
    pub(crate) device_state: u64,
    /// Percent of that state that the device rewrites in each second.
    #[arg(long, default_value_t = 0, value_name = "PERCENT", value_parser = clap::value_parser!(u8).range(..=100))]
    pub(crate) device_state_changes: u8,
    /// Longest acceptable downtime, in milliseconds.
    #[arg(long, default_value_t = 300, value_name = "MS")]
    pub(crate) downtime_ms: u64,
    /// Longest the guest is copied while it runs, in seconds. Then it is stopped and moved, however long the downtime
    /// gets; 30 s later the demo gives up.
    #[arg(long, default_value_t = 60, value_name = "S", value_parser = seconds())]
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
    /// Seed of memory content, device stream and injected faults.
    #[arg(long, default_value_t = 1, value_name = "N")]
    pub(crate) seed: u64,
    /// Inject a fault: corrupt-page, forget-SOURCE (kvm-log, vmm-writes, device-log), kill-destination@round=N with N
    /// from 2 to 100.
    #[arg(long, value_name = "FAULT")]
    pub(crate) inject: Option<Inject>,
}
