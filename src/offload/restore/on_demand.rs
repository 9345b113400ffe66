// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Hands a VM over before its memory is there: pages come when they are asked for, and ahead of that.

use std::io::Write;
use std::thread::{self, ScopedJoinHandle};
use std::time::{Duration, Instant};

use super::LocalSender;
use super::asked::Asked;
use super::error::LocalSendError;
use super::exchange::Exchange;
use super::faults::FaultServer;
use super::handle::{Hold, LocalSenderHandle};
use super::memory::VmMemory;
use super::prefetch::Prefetch;
use super::supply::Supply;
use crate::range::{GpaRange, subtract};
use crate::snapshot::{ChainBlocks, parallel};
use crate::transfer::connection::Connection;
use crate::transfer::frame::{Command, ConnectionRole};
use crate::transfer::limits::GUEST_PAGE_BYTES;
use crate::transfer::url::Url;

/// How often the wait for the first request looks whether it has come.
const TICK: Duration = Duration::from_millis(1);

/// How long a receiver that has taken State may wait before it asks for its first page; it asks at once.
const FIRST_FAULT: Duration = Duration::from_secs(10);

impl LocalSender {
    /// Hands the VM over, and serves its faults until all of its memory was asked for.
    pub(super) fn serve(
        &self,
        exchange: &mut Exchange<'_>,
        url: &Url,
        (blocks, memory): (&ChainBlocks<'_>, &VmMemory),
    ) -> Result<(), LocalSendError> {
        let supply = Supply::of(blocks, memory, &self.handle);
        // The receiver registers none of these ranges, and so never asks for them.
        self.fill_hotpluggable(&supply)?;
        self.begin(exchange, memory)?;
        let mut connection = Connection::connect(url, None, exchange.limits)?;
        let role = ConnectionRole::Fault.to_bytes();
        let announced = connection.write_all(&role);
        announced.map_err(|source| LocalSendError::Line { command: Command::PageFault, source })?;
        self.handle.hold_on(Hold { memory: memory.clone(), faults: connection.handle() });
        let asked = Asked::nothing(self.asked_for());
        let prefetch = Prefetch::default();
        let server = FaultServer::new(connection, (&supply, memory), &prefetch, &self.handle, asked);
        thread::scope(|scope| {
            let start = self.options.snapshot_limits.thread_start;
            let serving = start.spawn_scoped(scope, "restore-faults", || server.serve());
            let serving = serving.map_err(LocalSendError::Thread)?;
            for _ in 0..parallel::processors() {
                let work = || prefetch.work(&supply);
                if let Err(error) = start.spawn_scoped(scope, "restore-prefetch", work) {
                    log::warn!("Cannot start a thread that writes prefetch: {error}");
                }
            }
            let served = self.hand_over(exchange, &prefetch, serving);
            prefetch.end();
            // All is decided: it has its memory, or lost it.
            self.handle.let_go();
            served
        })
    }

    fn fill_hotpluggable(&self, supply: &Supply<'_>) -> Result<(), LocalSendError> {
        let mut scratch = Vec::new();
        self.hotpluggable.iter().try_for_each(|&range| {
            self.handle.check()?;
            supply.bring_data(range, &mut scratch).map_err(LocalSendError::Fill)
        })
    }

    /// The memory that the receiver asks for.
    fn asked_for(&self) -> Vec<GpaRange> {
        let mut ranges: Vec<_> = self.slots.iter().map(|slot| slot.range).collect();
        self.hotpluggable.iter().for_each(|&range| subtract(&mut ranges, range));
        ranges
    }

    /// Sends State and Complete, and waits until all is served.
    fn hand_over(
        &self,
        exchange: &mut Exchange<'_>,
        prefetch: &Prefetch,
        serving: ScopedJoinHandle<'_, Result<(), LocalSendError>>,
    ) -> Result<(), LocalSendError> {
        let result = |serving: ScopedJoinHandle<'_, _>| {
            serving.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        };
        let prepared = exchange
            .ask(Command::State, self.chain.state().text())
            .and_then(|()| await_first_fault(&self.handle, || serving.is_finished(), FIRST_FAULT))
            .and_then(|()| if prefetch.has_ended() { Err(self.gone()) } else { Ok(()) })
            .and_then(|()| self.handle.pass_the_point_of_no_return());
        if let Err(error) = prepared {
            exchange.abandon();
            prefetch.end();
            // What ended the requests for pages is why State was refused, if anything did.
            return Err(match result(serving) {
                Err(cause) if !matches!(cause, LocalSendError::Gone { .. }) => cause,
                _ => error,
            });
        }
        let completed = exchange.ask(self.complete(), &[]);
        if matches!(completed, Err(LocalSendError::Refused { .. })) {
            prefetch.end();
        } else if !self.handle.is_aborted() {
            // Where it is not known whether the VM runs, it is served as if it did.
            self.handle.note_handed_over();
            prefetch.hand_over();
        }
        let served = result(serving);
        match (completed, served) {
            (Ok(()), served) | (Err(LocalSendError::Stopped), served @ Err(_)) => served,
            // The memory was taken away: whatever the receiver did not say, it does not run the VM.
            (Err(error), Err(cause)) if error.is_outcome_unknown() => Err(cause),
            (Err(error), _) => Err(error),
        }
    }

    /// The receiver has ended, though it had asked for memory.
    fn gone(&self) -> LocalSendError {
        let all: u64 = self.asked_for().into_iter().map(GpaRange::len).sum();
        let asked = self.handle.progress().faults.asked_bytes;
        LocalSendError::Gone { pages: all.saturating_sub(asked) / GUEST_PAGE_BYTES }
    }
}

/// Waits until the first request has come, and for as long as it takes to answer it: a receiver that asks for nothing within `patience` would
/// run the VM on zeros.
fn await_first_fault(
    handle: &LocalSenderHandle,
    has_ended: impl Fn() -> bool,
    patience: Duration,
) -> Result<(), LocalSendError> {
    let began = Instant::now();
    while !handle.has_served() {
        handle.check()?;
        if has_ended() || (began.elapsed() > patience && !handle.is_asked()) {
            return Err(LocalSendError::NotOnDemand);
        }
        thread::sleep(TICK);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const MOMENT: Duration = Duration::from_millis(30);

    #[test]
    fn a_first_page_that_comes_slowly_is_waited_for_and_one_that_nobody_asks_for_is_not() {
        let handle = LocalSenderHandle::default();
        let error = await_first_fault(&handle, || false, MOMENT).unwrap_err();
        assert!(matches!(error, LocalSendError::NotOnDemand), "{error}");
        handle.begin_fault(Instant::now());
        thread::scope(|scope| {
            let waiting = scope.spawn(|| await_first_fault(&handle, || false, MOMENT));
            thread::sleep(MOMENT * 5);
            assert!(!waiting.is_finished(), "the disk is slow");
            handle.note_fault(false, MOMENT * 5);
            waiting.join().unwrap().unwrap();
        });
    }

    #[test]
    fn a_first_page_that_never_comes_is_waited_for_until_the_sender_is_given_up() {
        let handle = LocalSenderHandle::default();
        handle.begin_fault(Instant::now());
        thread::scope(|scope| {
            let waiting = scope.spawn(|| await_first_fault(&handle, || false, MOMENT));
            thread::sleep(MOMENT * 3);
            assert!(handle.cancel());
            assert!(matches!(waiting.join().unwrap(), Err(LocalSendError::Stopped)));
        });
        let handle = LocalSenderHandle::default();
        handle.begin_fault(Instant::now());
        let ended = await_first_fault(&handle, || true, Duration::MAX).unwrap_err();
        assert!(matches!(ended, LocalSendError::NotOnDemand), "{ended}");
    }
}
