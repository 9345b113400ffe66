// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Stores that are slow, fail or panic: none is mistaken for the connection or its source.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use std::{io, thread};

use vfio_migration::granule::Granule;
use vfio_migration::layout::Layout;
use vfio_migration::range::GpaRange;
use vfio_migration::transfer::frame::MemoryTable;
use vfio_migration::transfer::limits::{Pace, PeerLimits};
use vfio_migration::transfer::receive::{PageStore, Pages, ReceiveError};

use crate::frames::memory;
use crate::peer::{REGION, Vmm, begun_on_two, quick, receive_on_pair, receive_on_tcp, text_of};

/// A store that works slowly, or not at all.
pub(crate) struct Difficult {
    layout: Layout,
    time: Option<Duration>,
    pub(crate) begun: AtomicBool,
    pub(crate) done: AtomicBool,
}

impl Difficult {
    pub(crate) fn new(time: Option<Duration>) -> Arc<Self> {
        let layout = Layout::new([GpaRange::new(0, REGION).unwrap()], Granule::KIB_4).unwrap();
        Arc::new(Self { layout, time, begun: AtomicBool::new(false), done: AtomicBool::new(false) })
    }
}

impl PageStore for Difficult {
    fn layout(&self) -> &Layout {
        &self.layout
    }

    fn fill(&self, _table: &MemoryTable, pages: &mut Pages<'_>) -> io::Result<()> {
        let Some(time) = self.time else { return Err(io::ErrorKind::StorageFull.into()) };
        self.begun.store(true, Ordering::Release);
        thread::sleep(time);
        io::copy(pages, &mut io::sink())?;
        self.done.store(true, Ordering::Release);
        Ok(())
    }
}

#[test]
fn a_store_that_fails_is_not_mistaken_for_the_connection() {
    let mut vmm = Vmm { store: Some(Difficult::new(None)), ..Vmm::new() };
    let (received, answer) = receive_on_pair(quick(), &mut vmm, |mut peer| {
        peer.begin();
        peer.ask(&memory(&[(0, &[1; 4096])]))
    });
    assert_eq!(answer, Some(2));
    assert_eq!(
        text_of(&received.unwrap_err()),
        "Destination cannot keep the pages of Memory: no storage space"
    );
}

/// A store that panics, at whoever fills it.
struct Broken(Layout);

impl PageStore for Broken {
    fn layout(&self) -> &Layout {
        &self.0
    }

    fn fill(&self, _table: &MemoryTable, _pages: &mut Pages<'_>) -> io::Result<()> {
        panic!("this store is broken")
    }
}

#[test]
fn a_store_that_panics_on_another_connections_thread_is_an_error_in_good_time() {
    let store: Arc<dyn PageStore> = Arc::new(Broken(Difficult::new(None).layout.clone()));
    let mut vmm = Vmm { store: Some(store), ..Vmm::new() };
    let (received, answers) = receive_on_tcp(quick(), &mut vmm, |listener| {
        let (mut main, mut additional) = begun_on_two(listener);
        additional.send(&memory(&[(0, &[1; 4096])]));
        [additional.answer(), main.answer()]
    });
    assert_eq!(answers, [None, None]);
    assert!(matches!(received.unwrap_err(), ReceiveError::Store { .. }));
    assert_eq!(vmm.calls.last().unwrap(), "abandoned");
}

#[test]
fn a_slow_store_is_not_mistaken_for_a_slow_source() {
    let limits = PeerLimits { pace: Pace { window: Duration::from_millis(100), bytes: 1 << 20 }, ..quick() };
    let mut vmm = Vmm { store: Some(Difficult::new(Some(Duration::from_millis(300)))), ..Vmm::new() };
    let (received, ()) = receive_on_pair(limits, &mut vmm, |mut peer| {
        peer.begin();
        peer.say(&[memory(&[(0, &[1; 4096])]), memory(&[(0, &[1; 4096])])]);
        peer.end();
    });
    received.unwrap();
}

#[test]
fn a_slow_store_is_not_mistaken_for_a_silent_source() {
    let limits = PeerLimits { idle_timeout: Duration::from_millis(200), ..quick() };
    let mut vmm = Vmm { store: Some(Difficult::new(Some(Duration::from_millis(600)))), ..Vmm::new() };
    let (received, ()) = receive_on_tcp(limits, &mut vmm, |listener| {
        let (mut main, mut additional) = begun_on_two(listener);
        assert_eq!(additional.ask(&memory(&[(0, &[1; 4096])])), Some(1));
        main.end();
    });
    assert_eq!(received.unwrap().memory_messages, 1);
}
