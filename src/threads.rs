// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The one place where the library starts threads: each does first what the embedder wants done on it.

use std::fmt;
use std::io;
use std::thread::{Builder, JoinHandle, Scope, ScopedJoinHandle};

/// What a thread of the library does before anything else: block signals, take on a seccomp filter, choose processors.
///
/// A thread inherits the filters, signal mask and processors of the thread that starts it. [`std::thread::current`] has its name.
///
/// ```
/// use vfio_migration::threads::ThreadStart;
/// use vfio_migration::transfer::{SendOptions, url::Url};
/// fn confine() {
///     // ... apply the filter made of `vfio_migration::syscalls` ...
/// }
/// let mut options = SendOptions::new(Url::tcp("192.0.2.7", 4444)?);
/// options.thread_start = ThreadStart::new(&confine);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Copy, Default)]
pub struct ThreadStart(Option<&'static (dyn Fn() + Send + Sync)>);

impl ThreadStart {
    /// Nothing.
    pub const NOTHING: Self = Self(None);

    /// What `hook` does. A hook that panics ends its thread, which fails what the thread was to do.
    pub const fn new(hook: &'static (dyn Fn() + Send + Sync)) -> Self {
        Self(Some(hook))
    }

    /// Starts a thread of this name that does `work`.
    pub(crate) fn spawn<T: Send + 'static>(
        self,
        name: impl Into<String>,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> io::Result<JoinHandle<T>> {
        Builder::new().name(name.into()).spawn(move || self.and_then(work))
    }

    /// Starts a thread of this name that does `work` within `scope`.
    pub(crate) fn spawn_scoped<'scope, T: Send + 'scope>(
        self,
        scope: &'scope Scope<'scope, '_>,
        name: impl Into<String>,
        work: impl FnOnce() -> T + Send + 'scope,
    ) -> io::Result<ScopedJoinHandle<'scope, T>> {
        Builder::new().name(name.into()).spawn_scoped(scope, move || self.and_then(work))
    }

    fn and_then<T>(self, work: impl FnOnce() -> T) -> T {
        if let Some(hook) = self.0 {
            hook();
        }
        work()
    }
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
}
