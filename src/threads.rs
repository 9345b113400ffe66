// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The one place where the library starts threads: each does first what the embedder wants done on it.

use std::fmt;
use std::io;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread::{Builder, JoinHandle, Scope, ScopedJoinHandle};

/// The stack of a thread, as the standard library makes it, and what an error needs to be told.
const ROOM_BYTES: usize = (2 << 20) + (1 << 20);

/// A hook that runs first on every thread of the library: to block signals, apply a seccomp filter, or choose
/// processors.
///
/// A thread inherits the filters, signal mask and processors of the thread that starts it. [`std::thread::current`] has its name.
///
/// ```
/// use vfio_migration::threads::ThreadStart;
/// use vfio_migration::transfer::{SendOptions, url::Url};
/// fn confine() {
///     // ... apply the filter made of `vfio_migration::syscalls` ...
/// }
/// let options = SendOptions::new(Url::tcp("192.0.2.7", 4444)?).thread_start(ThreadStart::new(&confine));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Copy, Default)]
pub struct ThreadStart(Option<&'static (dyn Fn() + Send + Sync)>);

impl ThreadStart {
    /// Nothing.
    pub const NOTHING: Self = Self(None);

    /// Runs `hook`; the thread that starts another one waits for it. If the hook panics, the thread counts as one
    /// that could not be started: its work fails, or other threads do it.
    pub const fn new(hook: &'static (dyn Fn() + Send + Sync)) -> Self {
        Self(Some(hook))
    }

    /// Starts a thread of this name that does `work`.
    ///
    /// # Errors
    /// The system has no thread or no memory left, or the hook panicked.
    pub(crate) fn spawn<T: Send + 'static>(
        self,
        name: impl Into<String>,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> io::Result<JoinHandle<T>> {
        expect_room()?;
        let (ready, begun) = sync_channel(1);
        let thread = Builder::new().name(name.into()).spawn(move || self.and_then(ready, work))?;
        if self.is_over(&begun) { Ok(thread) } else { Err(panicked(thread.join())) }
    }

    /// Starts a thread of this name that does `work`, and waits for nothing, the hook included. Where the hook panics, `work` is not done.
    ///
    /// # Errors
    /// The system has no thread or no memory left.
    #[cfg(feature = "transfer")]
    pub(crate) fn detach(
        self,
        name: impl Into<String>,
        work: impl FnOnce() + Send + 'static,
    ) -> io::Result<()> {
        expect_room()?;
        let run = move || {
            self.first();
            work();
        };
        Builder::new().name(name.into()).spawn(run).map(drop)
    }

    /// Starts a thread of this name that does `work` within `scope`.
    ///
    /// # Errors
    /// As [`ThreadStart::spawn`].
    pub(crate) fn spawn_scoped<'scope, T: Send + 'scope>(
        self,
        scope: &'scope Scope<'scope, '_>,
        name: impl Into<String>,
        work: impl FnOnce() -> T + Send + 'scope,
    ) -> io::Result<ScopedJoinHandle<'scope, T>> {
        expect_room()?;
        let (ready, begun) = sync_channel(1);
        let thread =
            Builder::new().name(name.into()).spawn_scoped(scope, move || self.and_then(ready, work))?;
        // Joined, or the whole scope panics for it.
        if self.is_over(&begun) { Ok(thread) } else { Err(panicked(thread.join())) }
    }

    /// Runs the hook on the current thread.
    fn first(self) {
        if let Some(hook) = self.0 {
            hook();
        }
    }

    fn and_then<T>(self, ready: SyncSender<()>, work: impl FnOnce() -> T) -> T {
        self.first();
        let _nobody_waits_without_a_hook = ready.send(());
        drop(ready);
        work()
    }

    /// Waits for the hook, if there is one; `false` where it panicked.
    fn is_over(self, begun: &Receiver<()>) -> bool {
        self.0.is_none() || begun.recv().is_ok()
    }
}

/// Checks that the next thread does not get the last of the memory, so that nobody could even say so.
fn expect_room() -> io::Result<()> {
    Ok(Vec::<u8>::new().try_reserve_exact(ROOM_BYTES)?)
}

/// Makes an error of a thread whose hook panicked.
fn panicked<T>(_thread: std::thread::Result<T>) -> io::Error {
    io::Error::other("what it does first (ThreadStart) panicked")
}

impl fmt::Debug for ThreadStart {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("ThreadStart").field(&self.0.map(|_| "hook")).finish()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::thread;

    use super::*;

    static STARTED: AtomicUsize = AtomicUsize::new(0);
    static COUNT: ThreadStart = ThreadStart::new(&|| {
        STARTED.fetch_add(1, Ordering::Relaxed);
    });

    #[test]
    fn the_hook_comes_first_on_a_thread_that_has_its_name() {
        let work = || (STARTED.load(Ordering::Relaxed), thread::current().name().map(str::to_owned));
        let alone = COUNT.spawn("alone", work).unwrap().join().unwrap();
        assert_eq!(alone, (1, Some("alone".to_owned())));
        let within =
            thread::scope(|scope| COUNT.spawn_scoped(scope, "within", work).unwrap().join().unwrap());
        assert_eq!(within, (2, Some("within".to_owned())));
        let without = ThreadStart::NOTHING.spawn("without", work).unwrap().join().unwrap();
        assert_eq!(without.0, 2);
    }

    #[test]
    fn a_thread_whose_hook_panics_was_not_started() {
        static PANIC: ThreadStart = ThreadStart::new(&|| panic!("no filter for this thread"));
        let alone = PANIC.spawn("alone", || unreachable!("the hook comes first")).unwrap_err();
        assert!(alone.to_string().contains("panicked"));
        thread::scope(|scope| {
            let within = PANIC.spawn_scoped(scope, "within", || unreachable!("the hook comes first"));
            assert!(within.unwrap_err().to_string().contains("panicked"));
        });
    }
}
