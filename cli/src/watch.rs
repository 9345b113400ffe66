// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Works on a thread of its own, while the main one shows progress and heeds signals.

use std::panic::resume_unwind;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, Builder};
use std::time::Duration;

use crate::host::HostError;
use crate::output::Output;

/// How often it is looked how far the work is.
const TICK: Duration = Duration::from_millis(50);

/// What the main thread does meanwhile.
pub(crate) trait Watcher {
    /// The first signal has come.
    fn stop(&mut self, output: &Output);

    /// Looks how far the work is.
    fn look(&mut self, output: &mut Output);
}

/// Does `work` on a thread, whose `name` says what it does, until it is done, while `watcher` looks, and is told once `stop` is raised.
pub(crate) fn watch<T: Send>(
    name: &'static str,
    work: impl FnOnce() -> T + Send,
    stop: &AtomicBool,
    watcher: &mut impl Watcher,
    output: &mut Output,
) -> Result<T, HostError> {
    thread::scope(|scope| {
        let working = Builder::new().name(name.into()).spawn_scoped(scope, work);
        let working = working.map_err(|source| HostError::Thread { purpose: name, source })?;
        let mut told = false;
        while !working.is_finished() {
            if !told && stop.load(Ordering::Relaxed) {
                told = true;
                watcher.stop(output);
            }
            watcher.look(output);
            thread::sleep(TICK);
        }
        Ok(working.join().unwrap_or_else(|panic| resume_unwind(panic)))
    })
}
