// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Stands for the guest's driver of a device: a thread that rings doorbells, and is at rest when told to be.

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

const PERIOD: Duration = Duration::from_millis(5);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Wanted {
    Rest,
    Run,
    End,
}

/// A driver's thread. Ends when dropped.
#[derive(Debug)]
pub struct Driver {
    wanted: Arc<Mutex<Wanted>>,
    thread: Option<JoinHandle<()>>,
}

impl Driver {
    /// Starts a thread, at rest, that calls `step` every few milliseconds while it is to run.
    pub fn spawn(mut step: impl FnMut() -> io::Result<()> + Send + 'static) -> Self {
        let wanted = Arc::new(Mutex::new(Wanted::Rest));
        let theirs = Arc::clone(&wanted);
        let drive = move || {
            loop {
                let wanted = lock(&theirs);
                match *wanted {
                    Wanted::End => return,
                    Wanted::Rest => {}
                    Wanted::Run => {
                        if let Err(error) = step() {
                            log::warn!("The device refuses: {error}");
                        }
                    }
                }
                drop(wanted);
                thread::sleep(PERIOD);
            }
        };
        Self { wanted, thread: Some(thread::spawn(drive)) }
    }

    /// Lets it run, or brings it to rest: then no step is under way when this returns.
    pub fn run(&self, run: bool) {
        *lock(&self.wanted) = if run { Wanted::Run } else { Wanted::Rest };
    }
}

fn lock(wanted: &Mutex<Wanted>) -> MutexGuard<'_, Wanted> {
    wanted.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Drop for Driver {
    fn drop(&mut self) {
        *lock(&self.wanted) = Wanted::End;
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            log::error!("A driver's thread panicked");
        }
    }
}
