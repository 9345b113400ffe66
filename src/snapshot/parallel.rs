// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Works on many items at once, on as many threads as the machine has processors for.

use std::panic::resume_unwind;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;

use crate::threads::ThreadStart;

/// How many threads this process may run at once.
pub(crate) fn processors() -> usize {
    thread::available_parallelism().map_or(1, usize::from)
}

/// Does `work` for each of `items`, on this thread and at most so many others, which do `start` first, that `threads` take part.
///
/// If a thread cannot be started, the others do its share. Once `work` has failed, no further item is begun.
///
/// # Errors
/// An error of `work`; which one, if it failed on several threads, is not said.
///
/// # Panics
/// `work` panicked.
pub(crate) fn for_each<T: Sync, E: Send>(
    items: &[T],
    threads: usize,
    start: ThreadStart,
    work: impl Fn(&T) -> Result<(), E> + Sync,
) -> Result<(), E> {
    let (next, stopped) = (AtomicUsize::new(0), AtomicBool::new(false));
    let take_part = || {
        while !stopped.load(Ordering::Relaxed) {
            let Some(item) = items.get(next.fetch_add(1, Ordering::Relaxed)) else { break };
            work(item).inspect_err(|_| stopped.store(true, Ordering::Relaxed))?;
        }
        Ok(())
    };
    thread::scope(|scope| {
        let others: Vec<_> = (1..threads.min(items.len()))
            .map_while(|_| start.spawn_scoped(scope, "snapshot-part", take_part).ok())
            .collect();
        let ours = take_part();
        let joined =
            others.into_iter().map(|other| other.join().unwrap_or_else(|panic| resume_unwind(panic)));
        joined.fold(ours, Result::and)
    })
}

#[cfg(test)]
mod tests {
    use std::io;
    use std::sync::Barrier;

    use super::*;

    #[test]
    fn every_item_has_its_turn_once_however_many_threads() {
        for threads in [0, 1, 2, 3, 16] {
            for count in [0, 1, 2, 100] {
                let turns: Vec<_> = (0..count).map(|_| AtomicUsize::new(0)).collect();
                let note = |turn: &AtomicUsize| {
                    turn.fetch_add(1, Ordering::Relaxed);
                    Ok::<_, io::Error>(())
                };
                for_each(&turns, threads, ThreadStart::NOTHING, note).unwrap();
                assert!(
                    turns.into_iter().all(|turn| turn.into_inner() == 1),
                    "{count} items, {threads} threads"
                );
            }
        }
    }

    #[test]
    fn as_many_threads_work_at_once_as_were_asked_for() {
        let together = Barrier::new(3);
        // Waits for ever unless three wait at the same time.
        for_each(&[(); 3], 3, ThreadStart::NOTHING, |()| {
            together.wait();
            Ok::<_, io::Error>(())
        })
        .unwrap();
    }

    #[test]
    fn nothing_is_begun_after_a_failure() {
        let begun = AtomicUsize::new(0);
        let items: Vec<_> = (0..1000).collect();
        let error = for_each(&items, 1, ThreadStart::NOTHING, |&item| {
            begun.fetch_add(1, Ordering::Relaxed);
            if item == 3 { Err(io::Error::other("fourth")) } else { Ok(()) }
        });
        assert_eq!(error.unwrap_err().to_string(), "fourth");
        assert_eq!(begun.into_inner(), 4);
    }

    #[test]
    fn a_failure_on_one_thread_stops_the_others() {
        let begun = AtomicUsize::new(0);
        let items: Vec<_> = (0..10_000).collect();
        let error = for_each(&items, 4, ThreadStart::NOTHING, |&item| {
            begun.fetch_add(1, Ordering::Relaxed);
            thread::sleep(std::time::Duration::from_millis(1));
            if item == 0 { Err(io::Error::other("first")) } else { Ok(()) }
        });
        assert_eq!(error.unwrap_err().to_string(), "first");
        // The other three have seconds of work left.
        assert!(begun.into_inner() < items.len());
    }
}
