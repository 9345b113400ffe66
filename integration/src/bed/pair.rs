// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Two processes and their parent, between which a VM moves.

use std::collections::BTreeSet;
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::net::UnixStream;
use std::process::Command as Program;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, Receiver};
use std::time::{Duration, Instant};
use std::{fs, thread};

use anyhow::{Context, bail};
use serde::{Deserialize, Serialize};

use super::mirror::differing;
use super::served::Served;
use super::side::{BedSetup, BedSide};
use crate::demo::child::{Child, Party, receive_ram};
use crate::demo::control::{Command, Control, Event};
use crate::demo::process::{Process, Who};
use crate::demo::{Health, MigrationFigures};
use crate::vmm::{Memory, RamLayout, Split};

/// How long a process may take over one thing: the emulated machine is slow.
const PATIENCE: Duration = Duration::from_secs(120);

#[derive(Debug, Serialize, Deserialize)]
struct Role {
    party: Party,
    setup: BedSetup,
}

/// Set for a process that has a parent.
const PROCESS_VARIABLE: &str = "VFIO_MIGRATION_BED_PROCESS";

/// Becomes the process that the parent, behind standard input, says it is to be; without a parent it does nothing.
///
/// # Errors
/// The parent is gone.
pub fn process_main() -> anyhow::Result<()> {
    if Served::serve()? {
        return Ok(());
    }
    if std::env::var_os(PROCESS_VARIABLE).is_none() {
        return Ok(());
    }
    let stdin = io::stdin().as_fd().try_clone_to_owned().context("No standard input")?;
    let mut control = Control::new(UnixStream::from(stdin));
    let Role { party, setup } = control.receive()?.context("The parent is gone")?;
    Child::be(party, control, |control| {
        let files = receive_ram(&RamLayout::new(setup.memory_bytes, Split::default())?, control)?;
        let side = BedSide::new(setup, files)?;
        let devices = side.migratable()?;
        Ok((side, devices))
    })
}

/// How a VM is to be moved.
#[derive(Debug, Clone, Copy)]
pub struct Moving {
    /// Milliseconds the VM may stand still.
    pub downtime_ms: u64,
    /// Bytes of memory sent per second, so that there is time for several rounds.
    pub bytes_per_second: u64,
    /// Connections, for a VM that moves within this process; between two there is one.
    pub connections: u64,
    /// Seconds until it is given up.
    pub timeout_s: u64,
}

impl Default for Moving {
    /// As befits the emulated machine.
    fn default() -> Self {
        Self { downtime_ms: 700, bytes_per_second: 8 << 20, connections: 1, timeout_s: 90 }
    }
}

/// A source whose VM runs, and a destination that waits for it. Both end when dropped.
pub struct Pair {
    source: Process,
    destination: Process,
    memories: [Memory; 2],
    events: Receiver<(Who, Option<Event>)>,
    /// What one process told while the other was waited for.
    kept: Vec<(Who, Event)>,
}

impl Pair {
    /// Starts both: this test program once more, where an ignored test named `process` calls [`process_main`].
    ///
    /// # Errors
    /// A process does not start, or cannot set up its VM.
    pub fn start(source: &BedSetup, destination: &BedSetup) -> anyhow::Result<Self> {
        let this_program = std::env::current_exe()?;
        let layout = RamLayout::new(source.memory_bytes, Split::default())?;
        let memories = [Memory::create(&layout)?, Memory::create(&layout)?];
        let spawn = |party, setup: &BedSetup, memory: &Memory| {
            let files = memory.regions().iter().map(|region| &*region.file as &dyn AsRawFd);
            let role = Role { party, setup: setup.clone() };
            let mut program = Program::new(&this_program);
            program.args(["--exact", "process", "--ignored", "--nocapture"]).env(PROCESS_VARIABLE, "1");
            Process::spawn(program, &role, &files.collect::<Vec<_>>())
        };
        let (sender, events) = mpsc::channel();
        let started = spawn(Party::Source, source, &memories[0])?;
        started.listen(Who::Source, sender.clone())?;
        let waiting = spawn(Party::Destination, destination, &memories[1])?;
        waiting.listen(DESTINATION, sender)?;
        let mut pair = Self { source: started, destination: waiting, memories, events, kept: Vec::new() };
        pair.wait(Who::Source, |event| matches!(event, Event::Ready).then_some(()))?;
        Ok(pair)
    }

    /// Lets the source's VM check itself; it goes on running.
    ///
    /// # Errors
    /// It cannot.
    pub fn check_source(&mut self, passes: u64) -> anyhow::Result<Health> {
        self.source.send(&Command::Check { passes })?;
        self.wait(Who::Source, health)
    }

    /// Lets the destination's VM, which runs, check itself.
    ///
    /// # Errors
    /// It cannot.
    pub fn check_destination(&mut self, passes: u64) -> anyhow::Result<Health> {
        self.destination.send(&Command::Check { passes })?;
        self.wait(DESTINATION, health)
    }

    /// Moves the VM over TCP; it stands still on both sides afterwards.
    ///
    /// # Errors
    /// It did not move; the error says whether it runs on.
    pub fn migrate(&mut self, moving: Moving) -> anyhow::Result<MigrationFigures> {
        self.destination.send(&Command::Listen { url: "tcp:127.0.0.1:0".to_owned() })?;
        let url = self.wait(DESTINATION, |event| match event {
            Event::Listening { url } => Some(url),
            _ => None,
        })?;
        let bandwidth_bytes_per_s = Some(moving.bytes_per_second);
        let downtime_ms = moving.downtime_ms;
        self.source.send(&Command::Migrate {
            url,
            downtime_ms,
            timeout_s: moving.timeout_s,
            bandwidth_bytes_per_s,
            insist: false,
            sparse: false,
        })?;
        let deadline = Instant::now() + PATIENCE + Duration::from_secs(moving.timeout_s);
        let figures = self.wait_until(deadline, Who::Source, |event| match event {
            Event::Migrated(figures) => Some(figures),
            _ => None,
        })?;
        self.wait(DESTINATION, |event| matches!(event, Event::Received { .. }).then_some(()))?;
        Ok(figures)
    }

    /// Memory that the source and the destination hold to themselves, in bytes: guest RAM, which they share with this process, is none of it.
    ///
    /// # Errors
    /// A process is gone.
    pub fn own_bytes(&self) -> io::Result<[u64; 2]> {
        Ok([own_bytes(self.source.id())?, own_bytes(self.destination.id())?])
    }

    /// Calls `work`, and returns with its result the most memory that source and destination held to themselves meanwhile, as in
    /// [`Pair::own_bytes`].
    ///
    /// # Errors
    /// As [`Pair::own_bytes`].
    pub fn watch<T>(&mut self, work: impl FnOnce(&mut Self) -> T) -> io::Result<(T, [u64; 2])> {
        let ids = [self.source.id(), self.destination.id()];
        let over = AtomicBool::new(false);
        thread::scope(|scope| {
            let watching = scope.spawn(|| {
                let mut most = [0; 2];
                while !over.load(Ordering::Relaxed) {
                    for (most, id) in most.iter_mut().zip(ids) {
                        *most = own_bytes(id)?.max(*most);
                    }
                    thread::sleep(Duration::from_millis(20));
                }
                Ok(most)
            });
            let done = work(self);
            over.store(true, Ordering::Relaxed);
            watching.join().expect("watching does not panic").map(|most| (done, most))
        })
    }

    /// Returns the addresses of the pages in which the RAM of both, which stand still, differs.
    ///
    /// # Errors
    /// A memfd cannot be read.
    pub fn differing(&self) -> io::Result<BTreeSet<u64>> {
        differing(&self.memories[0], &self.memories[1])
    }

    /// Lets the VM run at the destination, which looks at its devices first.
    ///
    /// # Errors
    /// It does not run, or its devices are not as they were.
    pub fn run(&mut self) -> anyhow::Result<()> {
        self.destination.send(&Command::Run)?;
        self.wait(DESTINATION, |event| matches!(event, Event::Running { .. }).then_some(()))
    }

    /// Waits for the event that `wanted` takes; the process may tell other things before it.
    fn wait<T>(&mut self, from: Who, wanted: impl Fn(Event) -> Option<T>) -> anyhow::Result<T> {
        self.wait_until(Instant::now() + PATIENCE, from, wanted)
    }

    fn wait_until<T>(
        &mut self,
        deadline: Instant,
        from: Who,
        wanted: impl Fn(Event) -> Option<T>,
    ) -> anyhow::Result<T> {
        loop {
            if let Some(answer) = wanted(self.next(from, deadline)?) {
                return Ok(answer);
            }
        }
    }

    /// Takes the next event of one process, and keeps what the other tells meanwhile.
    fn next(&mut self, from: Who, deadline: Instant) -> anyhow::Result<Event> {
        loop {
            if let Some(at) = self.kept.iter().position(|(who, _)| *who == from) {
                return Ok(self.kept.remove(at).1);
            }
            let left = deadline.saturating_duration_since(Instant::now());
            let told = self.events.recv_timeout(left).with_context(|| format!("{from:?} does not answer"))?;
            match told {
                (who, None) => bail!("{who:?} is gone"),
                (who, Some(Event::Failed { error, guest_runs })) => {
                    bail!(
                        "{who:?} failed, its guest {}: {error}",
                        if guest_runs { "runs" } else { "stands still" }
                    )
                }
                (who, Some(event)) => self.kept.push((who, event)),
            }
        }
    }
}

const DESTINATION: Who = Who::Destination(0);

fn own_bytes(process: u32) -> io::Result<u64> {
    let status = fs::read_to_string(format!("/proc/{process}/status"))?;
    let of_line = |line: &str| line.strip_prefix("RssAnon:")?.split_whitespace().next()?.parse::<u64>().ok();
    Ok(status.lines().find_map(of_line).unwrap_or(0) << 10)
}

fn health(event: Event) -> Option<Health> {
    match event {
        Event::Health(health) => Some(health),
        _ => None,
    }
}
