// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Write-back throttle: brings a file to disk while it is being written, so that little is left to do when the VM is paused.
//!
//! Back-pressure: writers that are ahead of the disk wait here while the VM runs, instead of at the end while it is paused. They may be
//! as far ahead as the disk can catch up with in [`CATCH_UP`].

use std::fs::File;
use std::io;
use std::ops::RangeInclusive;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::sync;
use crate::threads::ThreadStart;

/// Bytes written that begin a sync.
const FLUSH_BYTES: u64 = 8 << 20;

/// The least and the most bytes that may be missing on disk before writers wait.
const MISSING_BYTES: RangeInclusive<u64> = 2 * FLUSH_BYTES..=1 << 30;

/// How long the disk may take to catch up.
const CATCH_UP: Duration = Duration::from_millis(100);

/// Syncs the bytes of a file.
type SyncBytes = Box<dyn Fn() -> io::Result<()> + Send>;

#[derive(Debug)]
struct State {
    /// Bytes written since the last sync began.
    written: u64,
    /// Bytes that the sync under way covers.
    syncing: u64,
    /// Bytes that may be missing on disk before writers wait.
    most: u64,
    /// How long those who write may wait for the disk; `None`: for as long as it takes.
    until: Option<Instant>,
    /// Whether to sync what there is, however little.
    hurried: bool,
    over: bool,
    /// Why a sync failed: the last one.
    failed: Option<io::Error>,
}

impl Default for State {
    fn default() -> Self {
        let most = *MISSING_BYTES.start();
        Self { written: 0, syncing: 0, most, until: None, hurried: false, over: false, failed: None }
    }
}

impl State {
    fn is_due(&self) -> bool {
        self.written >= FLUSH_BYTES || self.hurried
    }

    /// Learns how fast the disk is from a sync of enough bytes, which took `time`.
    fn note_sync(&mut self, time: Duration) {
        let synced = std::mem::take(&mut self.syncing);
        if synced >= FLUSH_BYTES {
            let caught_up = u128::from(synced) * CATCH_UP.as_nanos() / time.as_nanos().max(1);
            let caught_up = u64::try_from(caught_up).unwrap_or(u64::MAX);
            self.most = caught_up.clamp(*MISSING_BYTES.start(), *MISSING_BYTES.end());
        }
    }

    fn is_full(&self) -> bool {
        self.written + self.syncing >= self.most && self.failed.is_none()
    }
}

#[derive(Debug, Default)]
struct Shared {
    state: Mutex<State>,
    /// There may be something to sync, or nothing more to come.
    due: Condvar,
    /// A sync has ended.
    synced: Condvar,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        sync::lock(&self.state)
    }

    fn end(&self) {
        self.lock().over = true;
        self.due.notify_one();
    }

    /// Syncs whenever it is due, until it is over or a sync fails; one that panics has failed.
    fn run(&self, sync: &SyncBytes) {
        let mut failed = false;
        while !failed && self.await_due() {
            let begun = Instant::now();
            let panicked = |_| Err(io::Error::other("The syncing thread panicked"));
            let outcome = catch_unwind(AssertUnwindSafe(sync)).unwrap_or_else(panicked);
            failed = outcome.is_err();
            let mut state = self.lock();
            state.note_sync(begun.elapsed());
            state.failed = outcome.err();
            self.synced.notify_all();
        }
    }

    /// Waits until there is something to sync; `false` if nothing more will come.
    fn await_due(&self) -> bool {
        let waiting = |state: &mut State| !state.is_due() && !state.over;
        let state = self.due.wait_while(self.lock(), waiting);
        let mut state = state.unwrap_or_else(PoisonError::into_inner);
        state.syncing = std::mem::take(&mut state.written);
        std::mem::take(&mut state.hurried) || !state.over
    }
}

/// The throttle: a thread that syncs a file each time [`FLUSH_BYTES`] were written to it.
#[derive(Debug)]
pub(crate) struct WriteBack {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

impl WriteBack {
    /// Starts the thread.
    ///
    /// # Errors
    /// The system has no descriptor or thread left.
    pub(crate) fn start(file: &File, threads: ThreadStart) -> io::Result<Self> {
        let file = file.try_clone()?;
        Self::with(Box::new(move || file.sync_data()), threads)
    }

    /// Starts a thread that calls `sync`.
    pub(crate) fn with(sync: SyncBytes, threads: ThreadStart) -> io::Result<Self> {
        let shared = Arc::<Shared>::default();
        let of_thread = Arc::clone(&shared);
        let thread = threads.spawn("snapshot-sync", move || of_thread.run(&sync))?;
        Ok(Self { shared, thread: Some(thread) })
    }

    /// Notes that `bytes` more were written, and waits while too many are not on disk yet (back-pressure).
    ///
    /// # Errors
    /// A sync failed: bytes written before it may be lost for good.
    pub(crate) fn wrote(&self, bytes: u64) -> io::Result<()> {
        let mut state = self.shared.lock();
        state.written += bytes;
        if state.is_due() {
            self.shared.due.notify_one();
        }
        while state.is_full() {
            let Some(left) = left_of(state.until) else { break };
            (state, _) = self.shared.synced.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner);
        }
        state.failed.as_ref().map_or(Ok(()), |error| Err(same(error)))
    }

    /// Has those who write wait for the disk no longer than `until`; `None`: for as long as it takes.
    pub(crate) fn wait_until(&self, until: Option<Instant>) {
        self.shared.lock().until = until;
    }

    /// Begins to sync what was written until now; does not wait for it.
    pub(crate) fn hurry(&self) {
        self.shared.lock().hurried = true;
        self.shared.due.notify_one();
    }

    /// Syncs what was written until now, and waits for it, but no longer than `until`; the sync goes on then.
    ///
    /// # Errors
    /// A sync failed: bytes written before it may be lost for good.
    pub(crate) fn sync_until(&self, until: Option<Instant>) -> io::Result<()> {
        self.hurry();
        let mut state = self.shared.lock();
        while state.failed.is_none() && (state.hurried || state.written + state.syncing > 0) {
            let Some(left) =
                until.map_or(Some(Duration::MAX), |until| until.checked_duration_since(Instant::now()))
            else {
                return Ok(());
            };
            let waited = self.shared.synced.wait_timeout(state, left);
            (state, _) = waited.unwrap_or_else(PoisonError::into_inner);
        }
        state.failed.as_ref().map_or(Ok(()), |error| Err(same(error)))
    }

    /// Ends the thread. What was written since its last sync is the caller's to sync.
    ///
    /// # Errors
    /// A sync failed: bytes written before it may be lost for good.
    pub(crate) fn finish(mut self) -> io::Result<()> {
        self.shared.end();
        let thread = self.thread.take().expect("only this takes it, once");
        thread.join().map_err(|_| io::Error::other("The syncing thread panicked"))?;
        self.shared.lock().failed.take().map_or(Ok(()), Err)
    }
}

impl Drop for WriteBack {
    /// Does not wait for a sync: the file is being dropped.
    fn drop(&mut self) {
        self.shared.end();
    }
}

/// How long there is `until` then; `None` once it is over.
fn left_of(until: Option<Instant>) -> Option<Duration> {
    until.map_or(Some(Duration::MAX), |until| until.checked_duration_since(Instant::now()))
}

/// Clones an error.
fn same(error: &io::Error) -> io::Error {
    let told = || io::Error::new(error.kind(), error.to_string());
    error.raw_os_error().map_or_else(told, io::Error::from_raw_os_error)
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering};
    use std::sync::mpsc::{Receiver, Sender, channel};
    use std::thread;

    use super::*;

    /// A throttle whose syncs each wait for a word from the test; counts them.
    fn scripted() -> (WriteBack, Sender<io::Result<()>>, Arc<AtomicU32>) {
        let (say, said): (_, Receiver<io::Result<()>>) = channel();
        let syncs = Arc::<AtomicU32>::default();
        let counted = Arc::clone(&syncs);
        let sync = move || {
            counted.fetch_add(1, Ordering::SeqCst);
            said.recv().unwrap_or(Ok(()))
        };
        (WriteBack::with(Box::new(sync), ThreadStart::NOTHING).unwrap(), say, syncs)
    }

    #[test]
    fn writers_ahead_of_the_disk_wait_for_it() {
        let (write_back, say, _) = scripted();
        write_back.wrote(MISSING_BYTES.start() - 1).unwrap();
        thread::scope(|scope| {
            let writer = scope.spawn(|| write_back.wrote(1));
            thread::sleep(Duration::from_millis(50));
            assert!(!writer.is_finished(), "more than may be missing is not on disk");
            say.send(Ok(())).unwrap();
            say.send(Ok(())).unwrap();
            writer.join().unwrap().unwrap();
        });
        drop(say);
        write_back.finish().unwrap();
    }

    #[test]
    fn a_fast_disk_lets_writers_go_further_ahead_than_a_slow_one() {
        let most = |bytes, millis| {
            let mut state = State { syncing: bytes, ..State::default() };
            state.note_sync(Duration::from_millis(millis));
            assert_eq!(state.syncing, 0);
            state.most
        };
        assert_eq!(most(128 << 20, 50), 256 << 20);
        assert_eq!(most(8 << 20, 80), 16 << 20, "100 MiB/s");
        assert_eq!(most(32 << 20, 0), 1 << 30);
        assert_eq!(most(1 << 20, 1), 16 << 20, "too few bytes to tell");
    }

    #[test]
    fn little_is_synced_only_in_a_hurry() {
        let (write_back, say, syncs) = scripted();
        write_back.wrote(1).unwrap();
        thread::sleep(Duration::from_millis(20));
        assert_eq!(syncs.load(Ordering::SeqCst), 0);
        write_back.hurry();
        say.send(Ok(())).unwrap();
        write_back.finish().unwrap();
        assert_eq!(syncs.load(Ordering::SeqCst), 1);
    }

    #[test]
    fn writers_wait_for_a_disk_that_hangs_no_longer_than_they_may() {
        let (write_back, say, _) = scripted();
        let began = Instant::now();
        write_back.wait_until(began.checked_add(Duration::from_millis(50)));
        for _ in 0..4 {
            write_back.wrote(*MISSING_BYTES.start()).unwrap();
        }
        assert!(began.elapsed() >= Duration::from_millis(50) && began.elapsed() < Duration::from_secs(20));
        drop(say);
        write_back.finish().unwrap();
    }

    #[test]
    fn a_sync_is_waited_for_until_its_time_is_over_and_goes_on_then() {
        let (write_back, say, syncs) = scripted();
        write_back.wrote(1).unwrap();
        let began = Instant::now();
        write_back.sync_until(began.checked_add(Duration::from_millis(50))).unwrap();
        assert!(began.elapsed() >= Duration::from_millis(50), "the disk hangs");
        thread::scope(|scope| {
            let waiting = scope.spawn(|| write_back.sync_until(None));
            thread::sleep(Duration::from_millis(50));
            assert!(!waiting.is_finished(), "there is time");
            drop(say);
            waiting.join().unwrap().unwrap();
        });
        assert!(syncs.load(Ordering::SeqCst) > 0);
        write_back.finish().unwrap();

        let (write_back, say, _) = scripted();
        write_back.wrote(1).unwrap();
        say.send(Err(io::ErrorKind::StorageFull.into())).unwrap();
        assert_eq!(write_back.sync_until(None).unwrap_err().kind(), io::ErrorKind::StorageFull);
    }

    #[test]
    fn a_sync_that_panics_lets_no_writer_wait_and_is_told_at_the_end() {
        let write_back = WriteBack::with(Box::new(|| panic!("no disk")), ThreadStart::NOTHING).unwrap();
        let (report, failed) = channel();
        thread::spawn(move || {
            let error = (0..4).find_map(|_| write_back.wrote(*MISSING_BYTES.start()).err());
            report.send((error.unwrap(), write_back)).unwrap();
        });
        let (error, write_back) =
            failed.recv_timeout(Duration::from_secs(10)).expect("nobody waits for the dead");
        assert!(error.to_string().contains("panicked"), "{error}");
        assert!(write_back.finish().unwrap_err().to_string().contains("panicked"));
    }

    #[test]
    fn a_failed_sync_lets_no_writer_wait_and_is_told_at_the_end() {
        let (write_back, say, _) = scripted();
        say.send(Err(io::ErrorKind::StorageFull.into())).unwrap();
        let failed = (0..4).find_map(|_| write_back.wrote(*MISSING_BYTES.start()).err());
        assert_eq!(failed.unwrap().kind(), io::ErrorKind::StorageFull);
        assert_eq!(write_back.finish().unwrap_err().kind(), io::ErrorKind::StorageFull);
    }
}
