// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Into memory that nobody has touched, and into memory that is populated.

use std::sync::Arc;
use std::time::Duration;

use rustix::time::{ClockId, clock_gettime};
use vm_memory::{Bytes, GuestAddress};

use crate::throughput::{BYTES, copy_plainly, migrate};
use crate::vm::{Memory, PAGE, Vmm, memory, populated, ranges_of};
use crate::way::Way;
use crate::{RUNS, gib_per_second, median};

const LEAST_INTO_FRESH: f64 = 1.15;
const LEAST_INTO_POPULATED: f64 = 1.0;
const MOST_CPU: f64 = 1.2;

/// What one transfer took: time, and processor time of this process, both ends together.
#[derive(Clone, Copy)]
struct Cost {
    time: Duration,
    cpu: Duration,
}

pub(crate) fn holds() -> bool {
    let source = populated(BYTES);
    println!(
        "memory: {} MiB, sender to receiver against plain sockets, processor time of both ends",
        BYTES >> 20
    );
    let misses = [Way::Unix, Way::Tcp(1), Way::Tcp(4)].map(|way| {
        let rounds = [(); RUNS].map(|()| round(way, &source));
        let ratios = |of: fn(&Round) -> f64| median(rounds.each_ref().map(of));
        let fresh = ratios(|round| round.plain_fresh.time.as_secs_f64() / round.ahead.time.as_secs_f64());
        let faults = ratios(|round| round.plain_fresh.time.as_secs_f64() / round.faults.time.as_secs_f64());
        let gained = ratios(|round| round.faults.time.as_secs_f64() / round.ahead.time.as_secs_f64());
        let fresh_cpu = ratios(|round| round.ahead.cpu.as_secs_f64() / round.plain_fresh.cpu.as_secs_f64());
        let full = ratios(|round| round.plain_full.time.as_secs_f64() / round.full.time.as_secs_f64());
        let cpu = ratios(|round| round.full.cpu.as_secs_f64() / round.plain_full.cpu.as_secs_f64());
        println!(
            "  {way:<7}  into fresh memory {fresh:.2} of plain sockets (at least {LEAST_INTO_FRESH} wanted), {faults:.2} by faults: \
             allocating ahead gains {gained:.2}; processor time {fresh_cpu:.2}"
        );
        println!(
            "  {way:<7}  into populated memory {full:.2} (at least {LEAST_INTO_POPULATED} wanted); processor time {cpu:.2} \
             (at most {MOST_CPU} wanted)"
        );
        fresh < LEAST_INTO_FRESH || full < LEAST_INTO_POPULATED || cpu > MOST_CPU
    });
    !misses.contains(&true)
}

/// One time each, one right after the other.
struct Round {
    plain_fresh: Cost,
    ahead: Cost,
    faults: Cost,
    plain_full: Cost,
    full: Cost,
}

fn round(way: Way, source: &Arc<Memory>) -> Round {
    let fresh = || memory(&ranges_of(source));
    let full = fresh();
    (0..BYTES).step_by(PAGE as usize).for_each(|gpa| full.write_obj(1_u8, GuestAddress(gpa)).unwrap());
    let plain = |memory: Arc<Memory>| cost(|| copy_plainly(way, source, &memory));
    let ours = |mut vmm: Vmm| cost(|| migrate(way, source, &mut vmm).0);
    let round = Round {
        plain_fresh: plain(fresh()),
        ahead: ours(Vmm::new(fresh())),
        faults: ours(Vmm::by_faults(fresh())),
        plain_full: plain(Arc::clone(&full)),
        full: ours(Vmm::new(full)),
    };
    let told = [&round.plain_fresh, &round.ahead, &round.faults, &round.plain_full, &round.full]
        .map(|cost| format!("{:.2} GiB/s {:.2} s", gib_per_second(BYTES, cost.time), cost.cpu.as_secs_f64()));
    println!(
        "  {way:<7}  fresh: plain {}, ahead {}, faults {}; populated: plain {}, ours {}",
        told[0], told[1], told[2], told[3], told[4]
    );
    round
}

/// What `transfer` costs, which tells itself how long it took.
fn cost(transfer: impl FnOnce() -> Duration) -> Cost {
    let before = cpu_time();
    let time = transfer();
    Cost { time, cpu: cpu_time() - before }
}

fn cpu_time() -> Duration {
    clock_gettime(ClockId::ProcessCPUTime).try_into().unwrap()
}
