// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Parts of the library under seccomp filters that are made of just their published lists.
//!
//! A test runs itself again in a process of its own: once with the whole list, then once without each of its entries, which has to
//! kill that process. So no list lacks an entry, and none has one too many.
//!
//! Whoever changes what a part calls finds it out with `CONFINED_WITHOUT=anything strace -f BINARY TEST --exact`, which kills nothing.

use std::collections::BTreeMap;
use std::env;
use std::io::{self, Write};
use std::os::unix::process::ExitStatusExt;
use std::process::{Command, Output};
use std::thread;

use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule,
};
use vfio_migration::syscalls::{RUNTIME, Syscall};

/// Tells a process that it is to be confined, and by which entry less; [`WHOLE`] by none.
const WITHOUT: &str = "CONFINED_WITHOUT";
const WHOLE: &str = "nothing";
const UNCONFINED: &str = "anything";

/// What the allocator calls to give memory back to the kernel from any arena but the first. A process that is confined has one arena, so
/// that these are missed where the library needs them.
const OF_ARENAS: [libc::c_long; 3] = [libc::SYS_openat, libc::SYS_read, libc::SYS_close];
const ARENAS: (&str, &str) = ("MALLOC_ARENA_MAX", "1");

/// What a test does under a filter.
pub struct Confinement {
    filter: BpfProgram,
}

impl Confinement {
    /// Does `work` on a thread that is killed, and its process with it, by any other call than the list's.
    ///
    /// # Panics
    /// The kernel refuses the filter.
    pub fn run<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        let confined = || {
            seccompiler::apply_filter(&self.filter).expect("the kernel has seccomp");
            work()
        };
        thread::scope(|scope| {
            scope.spawn(confined).join().expect("a panic under the filter kills the process")
        })
    }
}

/// Runs `work`, which is all of the test `name`, with the lists `own` and `given` (of what the part is given), then without each entry of
/// `own` in turn.
///
/// # Panics
/// The work does not succeed under the lists, or does without an entry.
pub fn check(name: &str, own: &[Syscall], given: &[Syscall], work: impl FnOnce(&Confinement)) {
    let Ok(without) = env::var(WITHOUT) else { return check_each(name, own) };
    let entry = without.parse().ok().map(|index: usize| own[index]);
    let others = if without == UNCONFINED { SeccompAction::Allow } else { SeccompAction::KillProcess };
    work(&confinement([own, given, &runtime()].concat(), entry, others));
}

fn check_each(name: &str, own: &[Syscall]) {
    let whole = again(name, WHOLE);
    let told = String::from_utf8_lossy(&whole.stderr);
    if let Some(skipped) = told.lines().find(|line| line.contains("SKIPPED")) {
        // Straight to the stream: the test runner swallows what a passing test prints.
        let _nobody_listens = writeln!(io::stderr(), "{skipped}");
        return;
    }
    assert!(whole.status.success(), "under its list: {}\n{told}", whole.status);
    for (index, entry) in own.iter().enumerate().filter(|(_, entry)| !runtime().contains(entry)) {
        let status = again(name, &index.to_string()).status;
        assert_eq!(status.signal(), Some(libc::SIGSYS), "without {entry:?}: {status}");
    }
}

/// What every thread may call here: [`RUNTIME`] for an allocator with one arena, but for `fcntl`, of which [`confinement`] lets
/// through what a build with debug assertions asks.
fn runtime() -> Vec<Syscall> {
    let of_library =
        |entry: &&Syscall| OF_ARENAS.contains(&entry.number()) || entry.number() == libc::SYS_fcntl;
    RUNTIME.iter().filter(|entry| !of_library(entry)).copied().collect()
}

/// Runs the test `name` of this binary in a process of its own.
fn again(name: &str, without: &str) -> Output {
    let binary = env::current_exe().expect("a test has a binary");
    let mut command = Command::new(binary);
    command
        .args([name, "--exact", "--nocapture", "--test-threads=1"])
        .env(WITHOUT, without)
        .env(ARENAS.0, ARENAS.1);
    command.output().expect("the test's own binary runs")
}

fn confinement(mut allowed: Vec<Syscall>, without: Option<Syscall>, others: SeccompAction) -> Confinement {
    allowed.retain(|entry| Some(*entry) != without);
    let mut rules = BTreeMap::<i64, Vec<SeccompRule>>::new();
    for entry in allowed {
        let of_number = rules.entry(entry.number()).or_default();
        of_number.extend(entry.request().map(second_argument_is));
    }
    rules.entry(libc::SYS_fcntl).or_insert_with(|| vec![second_argument_is(libc::F_GETFD.cast_unsigned())]);
    let allow = if others == SeccompAction::Allow { SeccompAction::Log } else { SeccompAction::Allow };
    let arch = env::consts::ARCH.try_into().expect("seccompiler knows this architecture");
    let filter = SeccompFilter::new(rules, others, allow, arch);
    Confinement { filter: filter.and_then(TryInto::try_into).expect("the lists make a filter") }
}

fn second_argument_is(value: u32) -> SeccompRule {
    let condition = SeccompCondition::new(1, SeccompCmpArgLen::Dword, SeccompCmpOp::Eq, value.into());
    condition.and_then(|condition| SeccompRule::new(vec![condition])).expect("a call has a second argument")
}
