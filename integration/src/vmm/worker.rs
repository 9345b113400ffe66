// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A thread that works, parks when asked to, and is known to have parked.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

/// What a worker's thread does while it is not parked.
pub(super) trait Job: Send + 'static {
    /// Why the work cannot go on.
    type Error: Send + Sync + 'static;

    /// Works until `gate` no longer wants it to.
    fn run(&mut self, gate: &Gate) -> Result<(), Self::Error>;
}

/// Gets a thread out of whatever it waits for outside of its gate.
pub(super) type Kick = Box<dyn Fn(&JoinHandle<()>) + Send + Sync>;

#[derive(Clone, Copy, PartialEq, Eq)]
enum Wanted {
    Park,
    Run,
    Exit,
}

struct Inner {
    wanted: Wanted,
    parked: bool,
}

/// Where a worker's thread waits, and where it looks whether it should.
pub(super) struct Gate {
    inner: Mutex<Inner>,
    changed: Condvar,
    /// `wanted == Run`, to be read without the lock.
    running: AtomicBool,
}

impl Gate {
    fn new() -> Self {
        Self {
            inner: Mutex::new(Inner { wanted: Wanted::Park, parked: true }),
            changed: Condvar::new(),
            running: AtomicBool::new(false),
        }
    }

    /// Tells whether the work should go on.
    pub(super) fn wants_run(&self) -> bool {
        self.running.load(Ordering::SeqCst)
    }

    /// Sleeps until `deadline`, or until the work should stop.
    pub(super) fn sleep_until(&self, deadline: Instant) {
        let mut inner = lock(&self.inner);
        while inner.wanted == Wanted::Run {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return;
            }
            inner = self.changed.wait_timeout(inner, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    fn want(&self, wanted: Wanted) {
        let mut inner = lock(&self.inner);
        inner.wanted = wanted;
        self.running.store(wanted == Wanted::Run, Ordering::SeqCst);
        self.changed.notify_all();
    }

    /// Parks the calling thread until there is work; `false` means that it should end.
    fn park(&self) -> bool {
        let mut inner = lock(&self.inner);
        inner.parked = true;
        self.changed.notify_all();
        while inner.wanted == Wanted::Park {
            inner = self.changed.wait(inner).unwrap_or_else(PoisonError::into_inner);
        }
        inner.parked = false;
        inner.wanted == Wanted::Run
    }

    fn wait_parked(&self, patience: Duration) -> bool {
        let (inner, _) = self
            .changed
            .wait_timeout_while(lock(&self.inner), patience, |inner| !inner.parked)
            .unwrap_or_else(PoisonError::into_inner);
        inner.parked
    }
}

/// A job on a thread of its own. It starts parked; dropping the worker ends the thread.
pub(super) struct Worker<J: Job> {
    shared: Arc<Shared<J>>,
    kick: Kick,
    thread: Option<JoinHandle<()>>,
}

struct Shared<J: Job> {
    job: Mutex<J>,
    gate: Gate,
    failure: Mutex<Option<Arc<J::Error>>>,
}

impl<J: Job> Worker<J> {
    /// Starts a parked thread for `job`.
    pub(super) fn spawn(name: &str, job: J, kick: Kick) -> std::io::Result<Self> {
        let shared = Arc::new(Shared { job: Mutex::new(job), gate: Gate::new(), failure: Mutex::new(None) });
        let theirs = Arc::clone(&shared);
        let thread = thread::Builder::new().name(name.to_owned()).spawn(move || theirs.work())?;
        Ok(Self { shared, kick, thread: Some(thread) })
    }

    /// Lets the work go on.
    pub(super) fn unpark(&self) {
        self.shared.gate.want(Wanted::Run);
    }

    /// Asks the thread to park and returns at once.
    pub(super) fn ask_to_park(&self) {
        self.interrupt(Wanted::Park);
    }

    /// Waits until the thread has parked; `false` when it had not within `patience`.
    pub(super) fn wait_parked(&self, patience: Duration) -> bool {
        self.shared.gate.wait_parked(patience)
    }

    /// Why the work stopped by itself, if it did.
    pub(super) fn failure(&self) -> Option<Arc<J::Error>> {
        lock(&self.shared.failure).clone()
    }

    /// The job, between two stretches of work: waits while the thread is at work.
    pub(super) fn job(&self) -> MutexGuard<'_, J> {
        lock(&self.shared.job)
    }

    fn interrupt(&self, wanted: Wanted) {
        self.shared.gate.want(wanted);
        if let Some(thread) = &self.thread {
            (self.kick)(thread);
        }
    }
}

impl<J: Job> Shared<J> {
    fn work(&self) {
        while self.gate.park() {
            let outcome = lock(&self.job).run(&self.gate);
            if let Err(error) = outcome {
                *lock(&self.failure) = Some(Arc::new(error));
                self.gate.want(Wanted::Park);
            }
        }
    }
}

impl<J: Job> Drop for Worker<J> {
    fn drop(&mut self) {
        self.interrupt(Wanted::Exit);
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            log::error!("A worker thread panicked");
        }
    }
}

/// Locks what a panicking thread may have held: the panic itself is reported where the thread is joined.
pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Counter {
        turns: u64,
        fail_at: Option<u64>,
    }

    impl Job for Counter {
        type Error = u64;

        fn run(&mut self, gate: &Gate) -> Result<(), u64> {
            while gate.wants_run() {
                self.turns += 1;
                if self.fail_at == Some(self.turns) {
                    return Err(self.turns);
                }
                gate.sleep_until(Instant::now() + Duration::from_secs(60));
            }
            Ok(())
        }
    }

    fn worker(fail_at: Option<u64>) -> Worker<Counter> {
        Worker::spawn("counter", Counter { turns: 0, fail_at }, Box::new(|_| {})).unwrap()
    }

    fn wait_until(what: impl Fn() -> bool) {
        let start = Instant::now();
        while !what() {
            assert!(start.elapsed() < Duration::from_secs(5));
            thread::yield_now();
        }
    }

    #[test]
    fn parking_ends_a_long_sleep_and_leaves_the_job_where_it_was() {
        let worker = worker(None);
        worker.unpark();
        wait_until(|| !worker.wait_parked(Duration::ZERO));
        worker.ask_to_park();
        assert!(worker.wait_parked(Duration::from_secs(5)));
        assert!(worker.job().turns <= 1);
    }

    #[test]
    fn a_worker_that_was_never_started_is_parked() {
        let worker = worker(None);
        worker.ask_to_park();
        assert!(worker.wait_parked(Duration::from_secs(5)));
        assert_eq!(worker.job().turns, 0);
    }

    #[test]
    fn a_job_that_fails_parks_and_keeps_its_error() {
        let worker = worker(Some(1));
        worker.unpark();
        wait_until(|| worker.failure().is_some());
        assert_eq!(worker.failure().as_deref(), Some(&1));
        assert!(worker.wait_parked(Duration::from_secs(5)));
    }
}
