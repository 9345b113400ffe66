// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The first SIGINT, SIGTERM, SIGHUP or SIGQUIT asks to stop, a later one ends the tool; a file that grows too large ends nothing.

use std::fs;
use std::process;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::Builder;
use std::time::{Duration, Instant};

use signal_hook::consts::{SIGHUP, SIGINT, SIGQUIT, SIGTERM, SIGXFSZ};
use signal_hook::flag;
use signal_hook::iterator::Signals;

use crate::exit::Exit;
use crate::host::HostError;

/// How long after the first signal others count as the same wish: `timeout` sends one to the tool and one to its group.
const SAME_WISH: Duration = Duration::from_millis(300);

/// Lets a write beyond the limit on the size of files (`ulimit -f`) fail with EFBIG, instead of ending this process.
///
/// A handler that does nothing, and not SIG_IGN: a command that is run gets the signal as it knows it.
pub(crate) fn survive_file_size_limit() {
    if let Err(error) = flag::register(SIGXFSZ, Arc::default()) {
        log::debug!("Cannot survive SIGXFSZ: {error}");
    }
}

/// Returns a flag that the first signal to end raises; a later one exits at once.
pub(crate) fn stop_flag() -> Result<Arc<AtomicBool>, HostError> {
    stop_flag_or(exit)
}

/// The signals that ask to end. SIGHUP and SIGQUIT stay without effect where they were when this began, as `nohup` has it.
fn heeded() -> Vec<i32> {
    let ignored = fs::read_to_string("/proc/self/status").map_or(0, |status| ignored_in(&status));
    let optional = [SIGHUP, SIGQUIT].into_iter().filter(|signal| ignored >> (signal - 1) & 1 == 0);
    [SIGINT, SIGTERM].into_iter().chain(optional).collect()
}

/// The ignored signals of a process by its status, one bit each.
fn ignored_in(status: &str) -> u64 {
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok()).unwrap_or(0)
}

/// Exits at once.
pub(crate) fn exit() {
    process::exit(Exit::Cancelled as i32);
}

/// Returns a flag that the first signal to end raises; each later one does `again`.
pub(crate) fn stop_flag_or(again: impl Fn() + Send + 'static) -> Result<Arc<AtomicBool>, HostError> {
    let stop = Arc::new(AtomicBool::new(false));
    let raised = Arc::clone(&stop);
    let mut signals = Signals::new(heeded()).map_err(HostError::Signals)?;
    let heed = move || {
        let mut last: Option<Instant> = None;
        for _ in signals.forever() {
            match last {
                Some(last) if last.elapsed() < SAME_WISH => continue,
                Some(_) => again(),
                None => raised.store(true, Ordering::Relaxed),
            }
            last = Some(Instant::now());
        }
    };
    let started = Builder::new().name("signals".into()).spawn(heed);
    started.map_err(|source| HostError::Thread { purpose: "heeds signals", source })?;
    Ok(stop)
}
