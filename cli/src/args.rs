// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The command line.

use std::ffi::OsString;
use std::path::PathBuf;
use std::time::Duration;

use clap::builder::{PossibleValuesParser, RangedU64ValueParser, TypedValueParser};
use clap::{Args, Parser, Subcommand, ValueEnum};
use clap_complete::Shell;
use log::LevelFilter;
use vfio_migration::precopy::TimeoutStrategy;
use vfio_migration::transfer::limits::{ConnectionCount, ConnectionCountError, PeerLimits};
use vfio_migration::transfer::url::Url;

#[cfg(feature = "demo")]
pub(crate) mod demo;
mod snapshot;

pub(crate) use snapshot::{
    ApplyArguments, CreateArguments, DiffArguments, SizeLimits, SnapshotArguments, SnapshotCommand,
};

/// What the help and the manual page of each command that moves or stores anything end with.
const EXIT_STATUS: &str = "Exit status: 0 done, 1 compared snapshots differ, or nothing was altered but \
    a config.json was edited, 2 usage or over a limit, 3 the other side failed, \
    4 something on this host failed, 5 verification failed, 6 outcome unknown: the VM may be on either side, \
    130 given up on request.";

/// Live-migrates, stores and checks VMs with pass-through devices.
#[derive(Debug, Parser)]
#[command(
    name = "vfio-migrate",
    version,
    propagate_version = true,
    max_term_width = 100,
    after_help = EXIT_STATUS
)]
pub(crate) struct Arguments {
    /// Log level on stderr.
    #[arg(long, global = true, default_value = "warn", value_name = "LEVEL", ignore_case = true)]
    #[arg(value_parser = log_levels())]
    pub(crate) log_level: LevelFilter,
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Receives a running VM into a snapshot directory: the other side of `ch-remote send-migration`.
    ///
    /// Writes what Cloud Hypervisor restores with --restore source_url=file://DIR, and a manifest beside it that
    /// `snapshot verify` checks every byte against. DIR appears whole and safe on disk, or not at all.
    ///
    /// What the operator of a Cloud Hypervisor source sees: `ch-remote send-migration` returns at once, the migration
    /// goes on by itself. Before it sends the VM's state the source lets go of its disk locks. When DIR is safe the
    /// source is told so and its VM ends. With --checkpoint it is told that the migration failed instead, which it
    /// logs as an error, and its VM runs on, but without the disk locks: keep other VMs from its disks yourself.
    ///
    /// Refused: VMs with writable disks, unless --on-paused or --memory-only is given; VMs with vDPA devices, which
    /// would stay suspended at the source; sources that send memory on demand (postcopy).
    ///
    /// Over a UNIX socket, a source on this host may pass its memory as descriptors (local=on). It is copied while the VM
    /// runs, and what changed meanwhile when it is paused. Without preserve_source=on all is as above. With it the source
    /// keeps its disk locks; its VM stays paused until `ch-remote resume`, or, with --checkpoint, runs on by itself.
    #[command(after_help = EXIT_STATUS)]
    Receive(ReceiveArguments),
    /// Sends a snapshot directory to a VMM that waits in `ch-remote receive-migration`, or to `vfio-migrate receive`.
    ///
    /// DIR is a full snapshot, written by `receive`, `snapshot apply` or Cloud Hypervisor. It stays as it is.
    #[command(after_help = EXIT_STATUS)]
    Send(SendArguments),
    /// Checks, compares and rebuilds snapshots on disk.
    #[command(after_help = EXIT_STATUS)]
    Snapshot(SnapshotArguments),
    /// Moves a real KVM guest and its DMA-ing device to another process, and proves that every byte arrived.
    ///
    /// Starts a source and a destination process, each with a device in a process of its own that writes guest memory behind
    /// KVM's back; migrates; compares both sides' RAM byte for byte at the switchover; lets the guest and the device go on and
    /// check themselves. Prints who dirtied what. Without a usable /dev/kvm a software vCPU stands in, and says so.
    #[cfg(feature = "demo")]
    Demo(demo::DemoArguments),
    /// Reports what this host and each VFIO device on it support, and what prevents a migration.
    ///
    /// Looks at KVM, the container interface, iommufd, and every unused device bound to a VFIO driver. Without
    /// privileges it reports what it can and names what it could not see. Opening a device may reset it.
    Probe {
        /// Print one JSON object.
        #[arg(long)]
        json: bool,
    },
    /// Prints a completion script for a shell.
    Completions {
        /// The shell.
        shell: Shell,
    },
    /// Prints this tool's manual page.
    Man {
        /// Write the pages of every command into this directory instead.
        #[arg(long, value_name = "DIR")]
        into: Option<PathBuf>,
    },
}

#[derive(Debug, Args)]
pub(crate) struct ReceiveArguments {
    /// Address to listen on: unix:PATH or tcp:HOST:PORT; port 0 is any free one [default: the socket that a service manager
    /// passes, LISTEN_FDS].
    pub(crate) url: Option<Url>,
    /// The snapshot to be: absent, or an empty directory.
    #[arg(long, value_name = "DIR", required_unless_present = "serve")]
    pub(crate) into: Option<PathBuf>,
    /// Receive one VM after the other, each into a new directory of DIR: TIME-VM, the time in UTC, and platform.uuid of the
    /// VM or, if it has none, the beginning of a digest of its configuration. Ends on request, or see --max-failures.
    #[arg(long, value_name = "DIR", conflicts_with_all = ["into", "base"])]
    pub(crate) serve: Option<PathBuf>,
    /// With --serve, end after the first VM, whether or not it was received.
    #[arg(long, requires = "serve")]
    pub(crate) once: bool,
    /// With --serve, end when so many VMs in a row could not be received because something on this host failed. What sources
    /// do wrong does not count.
    #[arg(long, requires = "serve", default_value_t = 10, value_name = "N")]
    #[arg(value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) max_failures: u32,
    /// Let the source's VM run on: once all is safe on disk, answer its last message with an error.
    #[arg(long)]
    pub(crate) checkpoint: bool,
    /// Run CMD in a shell while the VM is paused and its disks are quiet, for example to snapshot them.
    /// VFIO_MIGRATE_INTO is the path that DIR will have. If CMD fails or times out, if the source disconnects, or if
    /// vfio-migrate is cancelled or killed, nothing is kept and the source's VM runs on: CMD and its children get
    /// SIGTERM, 2 s later SIGKILL, and 1 s later the VM resumes. Processes in a session or process group of their own
    /// (setsid, sudo with use_pty) and those of another user are not reached. Output of CMD goes to stderr.
    #[arg(long, value_name = "CMD")]
    pub(crate) on_paused: Option<OsString>,
    /// Longest that CMD may take, in seconds; the VM is paused meanwhile. Cloud Hypervisor waits that long, other
    /// sources may time out earlier.
    #[arg(long, requires = "on_paused", default_value_t = 60, value_name = "S", value_parser = seconds())]
    pub(crate) on_paused_timeout: u64,
    /// Accept a VM with writable disks without storing them.
    #[arg(long)]
    pub(crate) memory_only: bool,
    /// Longest that memory is copied while the VM runs, in seconds, of a source that passes it as descriptors (local=on). Such
    /// a Cloud Hypervisor takes no other API call meanwhile, and ends if its guest reboots.
    #[arg(long, default_value_t = 300, value_name = "S", value_parser = seconds())]
    pub(crate) warm_timeout: u64,
    /// Do not copy memory while the VM runs, but all of it when it is paused, of a source that passes it as descriptors.
    #[arg(long, conflicts_with = "warm_timeout")]
    pub(crate) no_warm_copy: bool,
    /// Store only what differs from the snapshot DIR. If that is a differential itself, repeat the option for its
    /// whole chain, the full one first.
    #[arg(long, value_name = "DIR")]
    pub(crate) base: Vec<PathBuf>,
    /// Mutual TLS, with ca-cert.pem, server-cert.pem and server-key.pem from DIR.
    #[arg(long, value_name = "DIR")]
    pub(crate) tls_dir: Option<PathBuf>,
    /// Most additional connections that the source may open, 1 to 128.
    #[arg(long, default_value = "128", value_name = "N", value_parser = connections)]
    pub(crate) connections: ConnectionCount,
    #[command(flatten)]
    pub(crate) sizes: SizeLimits,
    #[command(flatten)]
    pub(crate) patience: Patience,
    /// Print events as JSON lines.
    #[arg(long)]
    pub(crate) json: bool,
}

impl ReceiveArguments {
    /// The limits for the source.
    pub(crate) fn limits(&self) -> PeerLimits {
        let limits = self.patience.limits();
        // Who serves waits for as long as it takes.
        let source_wait = if self.serve.is_some() { Duration::MAX } else { limits.source_wait };
        PeerLimits {
            connections: self.connections,
            state_bytes: self.sizes.state_limit,
            source_wait,
            ..limits
        }
    }
}

#[derive(Debug, Args)]
pub(crate) struct Patience {
    /// Longest silence of the other side between messages, in seconds; also the time in which 64 KiB of a message
    /// have to move [default: 120 between messages, 30 within one]. The answer to the last message may take 1 h in
    /// any case, since a receiver may first write everything to disk.
    #[arg(long, value_name = "S", value_parser = seconds())]
    pub(crate) idle_timeout: Option<u64>,
}

impl Patience {
    fn limits(&self) -> PeerLimits {
        let mut limits = PeerLimits::default();
        if let Some(seconds) = self.idle_timeout {
            let timeout = Duration::from_secs(seconds);
            limits.idle_timeout = timeout;
            limits.answer_timeout = timeout;
            limits.pace.window = timeout;
            limits.handshake_timeout = limits.handshake_timeout.min(timeout);
        }
        limits
    }
}

#[derive(Debug, Args)]
pub(crate) struct SendArguments {
    /// Where the receiver waits: unix:PATH or tcp:HOST:PORT.
    pub(crate) url: Url,
    /// The full snapshot to send; with --local, repeat the option for the differentials on top of it. It must not change
    /// meanwhile. Every byte is checked against the manifest while it
    /// is sent; if one was altered, the receiver does not run the VM. A snapshot without a manifest is sent
    /// unchecked.
    #[arg(long, value_name = "DIR", required = true)]
    pub(crate) from: Vec<PathBuf>,
    /// Send FILE as the VM's configuration, in place of DIR's config.json: for a host where disks, taps and files
    /// have other names. To send an edited config.json of DIR, name it here, or accept it first with `snapshot seal
    /// --edited-config`.
    #[arg(long, value_name = "FILE")]
    pub(crate) config: Option<PathBuf>,
    /// Connections that carry memory, 1 to 128; more than one needs TCP.
    #[arg(long, default_value = "1", value_name = "N", value_parser = connections)]
    pub(crate) connections: ConnectionCount,
    /// Mutual TLS, with ca-cert.pem, client-cert.pem and client-key.pem from DIR.
    #[arg(long, value_name = "DIR")]
    pub(crate) tls_dir: Option<PathBuf>,
    /// Pass memory as descriptors to a Cloud Hypervisor on this host, over unix:PATH. Then --from may be repeated: a
    /// full snapshot and the differentials on top of it, which are applied as they are read.
    #[arg(long, conflicts_with_all = ["connections", "tls_dir", "bandwidth", "all_pages", "downtime_ms", "timeout_s", "timeout_strategy"])]
    pub(crate) local: bool,
    /// Hand the VM over before its memory is there, to a Cloud Hypervisor in `receive-migration` with
    /// memory_mode=postcopy: pages come when they are asked for, each checked before that, and ahead of it. Until the last
    /// one this process has to stay: SIGINT, SIGTERM, SIGHUP and SIGQUIT wait for it, a second one ends the VM.
    #[arg(long, requires = "local")]
    pub(crate) on_demand: bool,
    /// Leave the VM paused at the receiver.
    #[arg(long)]
    pub(crate) paused: bool,
    /// Longest acceptable downtime, in milliseconds; of no effect on a stored VM, which does not run.
    #[arg(long, default_value_t = 300, value_name = "MS")]
    pub(crate) downtime_ms: u64,
    /// Longest acceptable migration, in seconds.
    #[arg(long, default_value_t = 3600, value_name = "S", value_parser = clap::value_parser!(u64).range(1..))]
    pub(crate) timeout_s: u64,
    /// What to do when --timeout-s is over.
    #[arg(long, default_value = "cancel", value_name = "WHAT")]
    pub(crate) timeout_strategy: Strategy,
    /// Rate limit for memory while the VM runs, in bytes per second, as a number with K, M or G; after --timeout-s the
    /// rest goes at full speed [default: no limit].
    #[arg(long, value_name = "SIZE", value_parser = size)]
    pub(crate) bandwidth: Option<u64>,
    /// Send holes and zero pages too, for a receiver whose memory does not read zero. Always on if DIR's
    /// configuration has a memory zone backed by a file.
    #[arg(long)]
    pub(crate) all_pages: bool,
    /// How memory moves: precopy. Postcopy is refused.
    #[arg(long, default_value = "precopy", value_name = "MODE", value_parser = precopy)]
    memory_mode: MemoryMode,
    #[command(flatten)]
    pub(crate) sizes: SizeLimits,
    #[command(flatten)]
    pub(crate) patience: Patience,
    /// Print events as JSON lines.
    #[arg(long)]
    pub(crate) json: bool,
}

impl SendArguments {
    /// The limits for the receiver; no limit on the time for State, since a stored VM has no downtime.
    pub(crate) fn limits(&self) -> PeerLimits {
        let state_bytes = self.sizes.state_limit;
        PeerLimits { switchover_timeout: Duration::MAX, state_bytes, ..self.patience.limits() }
    }
}

/// How memory moves.
#[derive(Debug, Clone, Copy)]
enum MemoryMode {
    /// Copied while the VM runs.
    Precopy,
}

/// What happens when time is up.
#[derive(Debug, Clone, Copy, ValueEnum)]
pub(crate) enum Strategy {
    /// Give up.
    Cancel,
    /// Go through with it.
    Ignore,
}

impl From<Strategy> for TimeoutStrategy {
    fn from(strategy: Strategy) -> Self {
        match strategy {
            Strategy::Cancel => Self::Cancel,
            Strategy::Ignore => Self::Ignore,
        }
    }
}

/// Parses a level, and tells shells which there are.
fn log_levels() -> impl TypedValueParser<Value = LevelFilter> {
    PossibleValuesParser::new(["off", "error", "warn", "info", "debug", "trace"])
        .map(|level| level.parse().expect("one of the levels"))
}

/// Parses a number of seconds: at least one, at most a day.
fn seconds() -> RangedU64ValueParser {
    clap::value_parser!(u64).range(1..=86_400)
}

/// Parses a number of connections.
fn connections(text: &str) -> Result<ConnectionCount, String> {
    let number = text.parse().map_err(|_| "not a number".to_owned())?;
    ConnectionCount::new(number).map_err(|error: ConnectionCountError| error.to_string())
}

/// Parses the memory mode: there is one.
fn precopy(text: &str) -> Result<MemoryMode, String> {
    match text {
        "precopy" => Ok(MemoryMode::Precopy),
        "postcopy" => {
            Err("a VM with pass-through devices cannot move by postcopy: a page that is not there yet makes \
            a vCPU wait, but the DMA of a device cannot wait, it fails; a stored VM without such devices gets its memory \
            on demand with --local --on-demand"
                .to_owned())
        }
        _ => Err("not precopy".to_owned()),
    }
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

    /// The long flags of a command and of those below it.
    fn flags(command: &clap::Command) -> Vec<String> {
        let own = command.get_arguments().filter_map(|argument| argument.get_long().map(str::to_owned));
        own.chain(command.get_subcommands().flat_map(flags)).collect()
    }

    #[test]
    fn every_flag_is_in_the_page_of_the_tool() {
        let page = include_str!("../../docs/cli.md");
        let flags = flags(&Arguments::command());
        assert!(flags.iter().any(|flag| flag == "idle-timeout"));
        let missing: Vec<_> = flags.iter().filter(|flag| !page.contains(&format!("`--{flag}"))).collect();
        assert!(missing.is_empty(), "{missing:?}");
    }

    /// Cuts a command line as a shell does that knows single quotes and comments.
    fn words(line: &str) -> Vec<String> {
        let mut words = Vec::new();
        for (part, text) in line.split('\'').enumerate() {
            if part % 2 == 1 {
                words.push(text.to_owned());
            } else {
                words.extend(text.split_whitespace().take_while(|word| *word != "#").map(str::to_owned));
            }
        }
        words
    }

    #[test]
    fn every_command_in_the_pages_is_one() {
        let pages = [
            include_str!("../../README.md"),
            include_str!("../../docs/vfio.md"),
            include_str!("../../docs/other-host.md"),
            include_str!("../../docs/offload.md"),
            include_str!("../../resources/systemd/vfio-migrate.service"),
        ];
        let lines = pages.iter().flat_map(|page| page.lines());
        let lines = lines.map(|line| line.strip_prefix("ExecStart=/usr/bin/").unwrap_or(line));
        let commands = lines.filter(|line| line.starts_with("vfio-migrate "));
        let parsed = commands.map(|line| {
            Arguments::try_parse_from(words(line)).unwrap_or_else(|error| panic!("{line}: {error}"));
        });
        assert!(parsed.count() >= 12);
    }

    #[test]
    fn a_stored_vm_may_stand_still_for_as_long_as_the_receiver_answers_in_time() {
        let words = ["vfio-migrate", "send", "unix:socket", "--from", "dir", "--idle-timeout", "900"];
        let Command::Send(arguments) = Arguments::try_parse_from(words).unwrap().command else {
            panic!("send is send")
        };
        assert_eq!(arguments.limits().switchover_timeout, Duration::MAX);
        assert_eq!(arguments.limits().answer_timeout, Duration::from_secs(900));
    }

    #[test]
    fn what_has_no_effect_on_memory_that_is_passed_is_refused_and_the_way_on_demand_is_named() {
        let local = ["vfio-migrate", "send", "unix:socket", "--from", "dir", "--local"];
        assert!(Arguments::try_parse_from(local).is_ok());
        for option in [["--timeout-s", "9"], ["--timeout-strategy", "ignore"], ["--downtime-ms", "9"]] {
            let error = Arguments::try_parse_from(local.into_iter().chain(option)).unwrap_err();
            assert_eq!(error.kind(), clap::error::ErrorKind::ArgumentConflict, "{option:?}");
        }
        let postcopy = local.into_iter().chain(["--memory-mode", "postcopy"]);
        let error = Arguments::try_parse_from(postcopy).unwrap_err().to_string();
        assert!(error.contains("--local --on-demand"), "{error}");
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
