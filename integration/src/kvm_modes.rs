// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What each way to learn of a KVM guest's writes costs: in pages sent again, in the drain, and in the vCPU's own time.

use std::fmt;
use std::fs;
use std::sync::{Arc, OnceLock};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use kvm_ioctls::VmFd;
use vfio_migration::ledger::{ChunkLimits, CursorId, Start};
use vfio_migration::source::{DirtySource, GuestMemoryLog, Harvester, KvmLog, KvmLogMode, KvmRing, RingSize};
use vfio_migration::tracker::Tracker;

use crate::demo::side::slots;
use crate::demo::vm::{layout_of, mappings_of};
use crate::vmm::{
    CpuKind, ExitHook, Machine, MachineConfig, Memory, PAGE_BYTES, RamLayout, Rate, Split, VcpuExitKind,
};

/// Bytes of the dirty ring: 65,536 entries, the most that KVM offers on most hosts.
const RING_BYTES: u32 = 1 << 20;

/// Guest memory taken at once, so that a round has many chunks.
const CHUNK: ChunkLimits = ChunkLimits { bytes: 256 << 10, ranges: 4096 };

/// How long a round lasts; its chunks are spread over most of it.
const ROUND: Duration = Duration::from_millis(250);
/// The part of a round in which pages are read, at an even pace.
const READING: Duration = Duration::from_millis(200);

/// A way to learn of a guest's writes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Tracking {
    /// `KVM_GET_DIRTY_LOG` clears what it reports.
    GetClears,
    /// One `KVM_CLEAR_DIRTY_LOG` of all that was reported, at each report.
    ClearAtReport,
    /// A `KVM_CLEAR_DIRTY_LOG` for each chunk, right before its bytes are read.
    ClearAtRead,
    /// The dirty ring.
    Ring,
}

impl Tracking {
    /// All of them, in the order of the table.
    pub const ALL: [Self; 4] = [Self::GetClears, Self::ClearAtReport, Self::ClearAtRead, Self::Ring];

    fn mode(self) -> Option<KvmLogMode> {
        match self {
            Self::GetClears => Some(KvmLogMode::AtReport),
            Self::ClearAtReport => Some(KvmLogMode::ManualAtReport),
            Self::ClearAtRead => Some(KvmLogMode::ManualAtRead),
            Self::Ring => None,
        }
    }
}

impl fmt::Display for Tracking {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::GetClears => "GET clears all",
            Self::ClearAtReport => "CLEAR at report",
            Self::ClearAtRead => "CLEAR at read",
            Self::Ring => "ring",
        })
    }
}

/// A running guest, and a tracker over it unless it runs untracked.
struct Subject {
    tracked: Option<(Tracker, CursorId)>,
    machine: Machine,
}

impl Subject {
    /// Boots a guest with `ram_bytes` that writes at `rate`, tracked as said from the start.
    fn start(tracking: Option<Tracking>, ram_bytes: u64, rate: Rate) -> anyhow::Result<Self> {
        let memory = Memory::create(&RamLayout::sparse(ram_bytes, Split::default())?)?;
        let has_ring = tracking == Some(Tracking::Ring);
        let cpu = CpuKind::Kvm { dirty_ring_bytes: has_ring.then_some(RING_BYTES) };
        let harvester: Arc<OnceLock<Harvester<Arc<VmFd>>>> = Arc::default();
        let mut config = MachineConfig::new(memory, cpu);
        config.guest_rate = rate;
        config.vmm_rate = Rate::PagesPerSecond(0);
        config.exit_hook = has_ring.then(|| harvest_when_full(Arc::clone(&harvester)));
        let machine = Machine::new(config)?;
        machine.boot()?;
        let tracked = match tracking {
            None => None,
            Some(tracking) => {
                let mut tracker = tracker(&machine, tracking, &harvester)?;
                let cursor = tracker.begin(Start::Copied)?;
                Some((tracker, cursor))
            }
        };
        machine.start()?;
        Ok(Self { tracked, machine })
    }

    fn tracked(&mut self) -> anyhow::Result<(&mut Tracker, CursorId)> {
        let (tracker, cursor) = self.tracked.as_mut().context("The guest is not tracked")?;
        Ok((tracker, *cursor))
    }

    /// Collects; returns how many pages were reported, and how long it took.
    fn collect(&mut self) -> anyhow::Result<(u64, Duration)> {
        let (tracker, _) = self.tracked()?;
        let reported = |tracker: &Tracker| tracker.attribution().map(|(_, pages)| pages.pages).sum::<u64>();
        let (before, began) = (reported(tracker), Instant::now());
        let failures = tracker.collect();
        let took = began.elapsed();
        match failures.into_iter().next() {
            Some(failure) => bail!(failure),
            None => Ok((reported(tracker) - before, took)),
        }
    }

    /// Sends what is pending, its chunks spread evenly over `time`; returns the pages.
    fn send(&mut self, time: Duration) -> anyhow::Result<u64> {
        let (tracker, cursor) = self.tracked()?;
        let all_bytes = tracker.outstanding(cursor).map_or(0, |left| left.pending_bytes).max(1);
        let (began, mut sent_bytes) = (Instant::now(), 0);
        tracker.begin_round(cursor);
        while let Some(chunk) = tracker.take(cursor, CHUNK)? {
            sent_bytes += chunk.bytes();
            tracker.commit(chunk);
            let due = began + time.mul_f64(share(sent_bytes, all_bytes).min(1.0));
            thread::sleep(due.saturating_duration_since(Instant::now()));
        }
        Ok(sent_bytes / PAGE_BYTES)
    }
}

#[expect(clippy::cast_precision_loss, reason = "figures for people")]
fn share(part: u64, whole: u64) -> f64 {
    part as f64 / whole as f64
}

fn tracker(
    machine: &Machine,
    tracking: Tracking,
    harvester: &OnceLock<Harvester<Arc<VmFd>>>,
) -> anyhow::Result<Tracker> {
    let vm = machine.vm_fd().context("A software machine has no log")?;
    let slots = slots(machine)?;
    let source: Box<dyn DirtySource> = match tracking.mode() {
        Some(mode) => Box::new(KvmLog::new(Arc::clone(vm), slots, mode)),
        None => {
            let size = RingSize::enabled_elsewhere(vm, RING_BYTES)?;
            let mut ring = KvmRing::new(Arc::clone(vm), slots, size);
            ring.add_vcpu(&machine.vcpu_fd().context("A software machine has no ring")?)?;
            let _only_ring_of_this_machine = harvester.set(ring.harvester());
            Box::new(ring)
        }
    };
    let mappings = mappings_of(machine, Vec::new())?;
    let builder = Tracker::builder(layout_of(machine)?).mappings(move || mappings.clone());
    let vmm_writes = GuestMemoryLog::new(Arc::new(machine.memory().clone()));
    Ok(builder.source(source).source(Box::new(vmm_writes)).build()?)
}

fn harvest_when_full(harvester: Arc<OnceLock<Harvester<Arc<VmFd>>>>) -> ExitHook {
    Arc::new(move |exit| {
        if exit == VcpuExitKind::DirtyRingFull
            && let Some(Err(error)) = harvester.get().map(Harvester::harvest)
        {
            log::warn!("Cannot harvest the dirty ring: {error}");
        }
    })
}

/// Pages of an average round.
#[derive(Debug, Clone, Copy)]
pub struct Pages {
    /// Pages that the guest wrote; the same one counts every time.
    pub written: u64,
    /// Pages that were sent.
    pub sent: u64,
}

/// What is sent in a round of a quarter of a second, after the first, of a guest that writes `pages_per_second` of `ram_bytes`: the
/// mean of so many `rounds`.
///
/// # Errors
/// KVM lacks what the way needs, or fails.
pub fn pages_per_round(
    tracking: Tracking,
    ram_bytes: u64,
    pages_per_second: u32,
    rounds: u32,
) -> anyhow::Result<Pages> {
    let mut subject = Subject::start(Some(tracking), ram_bytes, Rate::PagesPerSecond(pages_per_second))?;
    let mut round = || {
        let began = Instant::now();
        subject.collect()?;
        let sent = subject.send(READING)?;
        thread::sleep((began + ROUND).saturating_duration_since(Instant::now()));
        anyhow::Ok((sent, subject.machine.pages_written()?))
    };
    let (_, written_before) = round()?;
    let (mut sent, mut written) = (0, written_before);
    for _ in 0..rounds {
        let (pages, so_far) = round()?;
        (sent, written) = (sent + pages, so_far);
    }
    Ok(Pages { written: (written - written_before) / u64::from(rounds), sent: sent / u64::from(rounds) })
}

/// A drain of a guest that has written about a hundred pages since the last one.
#[derive(Debug, Clone, Copy)]
pub struct Drain {
    /// Pages that were dirty.
    pub pages: u64,
    /// How long it took to have them in the ledger.
    pub took: Duration,
}

/// Drains a guest with `ram_bytes` again and again: the median of so many `drains`.
///
/// # Errors
/// As [`pages_per_round`].
pub fn drain(tracking: Tracking, ram_bytes: u64, drains: usize) -> anyhow::Result<Drain> {
    const LEAST_PAGES: u64 = 100;
    let mut subject = Subject::start(Some(tracking), ram_bytes, Rate::PagesPerSecond(10_000))?;
    let mut seen = Vec::with_capacity(drains);
    for _ in 0..drains {
        let until = subject.machine.pages_written()? + LEAST_PAGES;
        while subject.machine.pages_written()? < until {
            subject.machine.health()?;
            thread::sleep(Duration::from_millis(1));
        }
        let (pages, took) = subject.collect()?;
        seen.push(Drain { pages, took });
        subject.send(Duration::ZERO)?;
    }
    seen.sort_unstable_by_key(|drain| drain.took);
    seen.get(drains / 2).copied().context("A median of no drains")
}

/// Pages that a guest stamps in a second of its vCPU thread's own processor time, at full speed for `time`, while it is tracked as said
/// and drained every tenth of a second.
///
/// # Errors
/// As [`pages_per_round`].
pub fn pages_per_cpu_second(
    tracking: Option<Tracking>,
    ram_bytes: u64,
    time: Duration,
) -> anyhow::Result<f64> {
    const PERIOD: Duration = Duration::from_millis(100);
    let mut subject = Subject::start(tracking, ram_bytes, Rate::Unlimited)?;
    let (pages, cpu) = (subject.machine.pages_written()?, vcpu_time()?);
    let until = Instant::now() + time;
    while Instant::now() < until {
        thread::sleep(PERIOD);
        if tracking.is_some() {
            subject.collect()?;
            subject.send(Duration::ZERO)?;
        }
    }
    let (pages, cpu) = (subject.machine.pages_written()? - pages, vcpu_time()? - cpu);
    Ok(share(pages, 1) / cpu.as_secs_f64())
}

/// Processor time that the only vCPU of this process has used.
fn vcpu_time() -> anyhow::Result<Duration> {
    for task in fs::read_dir("/proc/self/task")? {
        let task = task?.path();
        if fs::read_to_string(task.join("comm"))?.trim() == "vcpu" {
            let stat = fs::read_to_string(task.join("schedstat"))?;
            let nanos = stat.split_whitespace().next().context("No time in schedstat")?;
            return Ok(Duration::from_nanos(nanos.parse()?));
        }
    }
    bail!("There is no thread named vcpu")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vmm::probe_kvm;

    const RAM_BYTES: u64 = 64 << 20;

    #[test]
    fn every_way_is_measured_and_finds_what_the_guest_writes() {
        if let Err(error) = probe_kvm() {
            return crate::skip(error);
        }
        for tracking in Tracking::ALL {
            let sent = pages_per_round(tracking, RAM_BYTES, 10_000, 2).unwrap();
            assert!(sent.sent > 100 && sent.written > 100, "{tracking}: {sent:?}");
            let drain = drain(tracking, RAM_BYTES, 5).unwrap();
            assert!(drain.pages >= 100, "{tracking}: {drain:?}");
        }
        for tracking in [None, Some(Tracking::ClearAtRead)] {
            assert!(pages_per_cpu_second(tracking, RAM_BYTES, Duration::from_millis(200)).unwrap() > 1000.0);
        }
    }
}
