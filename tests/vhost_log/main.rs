// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! vhost-user's dirty log with a back end in a process of its own, which writes a VM's RAM and speaks the protocol's own messages.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on panics")]

use std::collections::BTreeSet;
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use rustix::fs::{MemfdFlags, memfd_create};
use vfio_migration::granule::Granule;
use vfio_migration::iova::IovaMap;
use vfio_migration::layout::Layout;
use vfio_migration::ledger::{ChunkLimits, CursorId, Ledger, Start};
use vfio_migration::range::GpaRange;
use vfio_migration::source::{
    DirtySource, LogBase, LogBaseAnswer, SourceError, VhostUserBackEnd, VhostUserError, VhostUserLog,
};
use vm_memory::{FileOffset, MmapRegion, VolatileMemory};

mod message;

use message::{Request, VHOST_F_LOG_ALL, VHOST_VRING_F_LOG};

/// Set for the process that plays the back end.
const BACK_END: &str = "VFIO_MIGRATION_TEST_VHOST_BACK_END";

const PAGE: usize = 4096;
const PAGES: usize = 1000;

/// The page of the used ring; the back end logs it for rings with `VHOST_VRING_F_LOG` alone.
const USED_RING: usize = 998;

/// Whether the back end ever writes `page` as a buffer: not one page in five.
fn is_buffer(page: usize) -> bool {
    !page.is_multiple_of(5) && page != USED_RING
}

fn map(file: OwnedFd, offset: u64, bytes: usize) -> MmapRegion<()> {
    MmapRegion::from_file(FileOffset::new(File::from(file), offset), bytes).unwrap()
}

/// A page's first word.
fn word(ram: &MmapRegion<()>, page: usize) -> &AtomicU64 {
    ram.get_atomic_ref(page * PAGE).unwrap()
}

/// What a back end has been told.
#[derive(Default)]
struct BackEnd {
    ram: Option<MmapRegion<()>>,
    log: Option<MmapRegion<()>>,
    log_all: bool,
    log_used_ring: bool,
    running: bool,
    random: u64,
}

impl BackEnd {
    /// Heeds one message; returns false when the front end has hung up.
    fn serve(&mut self, socket: &UnixStream) -> bool {
        let Some(message) = message::receive(socket).unwrap() else { return false };
        let payload = message.payload;
        match message.request {
            Request::SetMemTable => self.ram = Some(map(message.fd.unwrap(), 0, PAGES * PAGE)),
            Request::SetLogBase => {
                let bytes = usize::try_from(payload[0]).unwrap();
                self.log = Some(map(message.fd.unwrap(), payload[1], bytes));
            }
            Request::SetFeatures => self.log_all = payload[0] & VHOST_F_LOG_ALL != 0,
            Request::SetVringAddr => {
                self.log_used_ring = payload[0] & VHOST_VRING_F_LOG != 0;
                assert_eq!(payload[1], (USED_RING * PAGE) as u64);
            }
            Request::SetVringEnable => self.running = true,
            Request::GetVringBase => self.running = false,
        }
        message::send(socket, message.request, &[0], None).unwrap();
        true
    }

    fn work(&mut self) {
        let ram = self.ram.as_ref().unwrap();
        self.random = self.random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        let page = usize::try_from(self.random >> 33).unwrap() % PAGES;
        if is_buffer(page) {
            word(ram, page).fetch_add(1, Ordering::SeqCst);
            self.log_page(page, true);
            word(ram, USED_RING).fetch_add(1, Ordering::SeqCst);
            self.log_page(USED_RING, self.log_used_ring);
        }
    }

    fn log_page(&self, page: usize, wanted: bool) {
        if let Some(log) = self.log.as_ref().filter(|_| wanted && self.log_all) {
            let byte: &AtomicU8 = log.get_atomic_ref(page / 8).unwrap();
            byte.fetch_or(1 << (page % 8), Ordering::SeqCst);
        }
    }
}

/// Is the body of a back end, which [`FrontEnd::spawn`] runs this very test binary for.
#[test]
#[ignore = "the body of the back ends that other tests start"]
fn back_end_process() {
    if std::env::var_os(BACK_END).is_none() {
        let _nobody_listens = writeln!(io::stderr(), "{BACK_END} is not set: this is no test of its own");
        return;
    }
    let socket = UnixStream::from(std::io::stdin().as_fd().try_clone_to_owned().unwrap());
    let mut back_end = BackEnd::default();
    loop {
        let asked = message::waits(&socket, !back_end.running);
        if asked && !back_end.serve(&socket) {
            return;
        }
        for _ in 0..50 {
            if back_end.running {
                back_end.work();
            }
        }
    }
}

/// The VMM's end of the connection, and the RAM that both have mapped.
struct FrontEnd {
    child: Child,
    connection: Connection,
    ram: MmapRegion<()>,
}

/// What [`VhostUserLog`] sends its messages by.
#[derive(Clone)]
struct Connection {
    socket: Arc<UnixStream>,
    stopped: Arc<AtomicBool>,
}

impl FrontEnd {
    fn spawn() -> Self {
        let file = File::from(memfd_create("guest-ram", MemfdFlags::CLOEXEC).unwrap());
        file.set_len((PAGES * PAGE) as u64).unwrap();
        let (socket, theirs) = UnixStream::pair().unwrap();
        socket.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
        let child = Command::new(std::env::current_exe().unwrap())
            .args(["--ignored", "--exact", "back_end_process", "--nocapture"])
            .env(BACK_END, "1")
            .stdin(Stdio::from(OwnedFd::from(theirs)))
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        let ram = map(file.as_fd().try_clone_to_owned().unwrap(), 0, PAGES * PAGE);
        let connection = Connection { socket: Arc::new(socket), stopped: Arc::default() };
        connection.ask(Request::SetMemTable, &[], Some(file.as_fd())).unwrap();
        Self { child, connection, ram }
    }

    /// Stops the rings, as a VMM does before it lets its back end go.
    fn stop_rings(&self) {
        self.connection.ask(Request::GetVringBase, &[], None).unwrap();
        self.connection.stopped.store(true, Ordering::SeqCst);
    }

    fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

impl Drop for FrontEnd {
    fn drop(&mut self) {
        let _may_have_ended = self.child.kill();
        let _reaped = self.child.wait();
    }
}

impl Connection {
    fn ask(&self, request: Request, payload: &[u64], fd: Option<BorrowedFd<'_>>) -> io::Result<()> {
        message::send(&self.socket, request, payload, fd)?;
        match message::receive(&self.socket)? {
            Some(answer) if answer.request == request && answer.payload[0] == 0 => Ok(()),
            answer => Err(io::Error::other(format!("{request:?} was answered by {answer:?}"))),
        }
    }
}

impl VhostUserBackEnd for Connection {
    fn set_log_base(&mut self, log: LogBase<'_>) -> Result<LogBaseAnswer, VhostUserError> {
        if self.stopped.load(Ordering::SeqCst) {
            return Ok(LogBaseAnswer::Stopped);
        }
        self.ask(Request::SetLogBase, &[log.mmap_size(), log.mmap_offset()], Some(log.fd()))?;
        Ok(LogBaseAnswer::Taken)
    }

    fn log_all(&mut self, on: bool) -> Result<(), VhostUserError> {
        let features = if on { VHOST_F_LOG_ALL } else { 0 };
        Ok(self.ask(Request::SetFeatures, &[features], None)?)
    }

    fn log_used_rings(&mut self, on: bool) -> Result<(), VhostUserError> {
        let flags = if on { VHOST_VRING_F_LOG } else { 0 };
        Ok(self.ask(Request::SetVringAddr, &[flags, (USED_RING * PAGE) as u64], None)?)
    }
}

/// A receiver's copy of the RAM, and what it lacks.
struct Migration {
    log: VhostUserLog<Connection>,
    ledger: Ledger,
    cursor: CursorId,
    copy: Vec<u64>,
}

impl Migration {
    /// Switches the log on, lets the back end run, and copies all RAM once.
    fn begin(front_end: &FrontEnd) -> Self {
        let ram = GpaRange::new(0, (PAGES * PAGE) as u64).unwrap();
        let layout = Layout::new([ram], Granule::KIB_4).unwrap();
        let mut log = VhostUserLog::new("disk0", front_end.connection.clone());
        log.start(&layout, &IovaMap::Identity).unwrap();
        front_end.connection.ask(Request::SetVringEnable, &[1], None).unwrap();
        let mut ledger = Ledger::new(layout, 1);
        let cursor = ledger.open(Start::Empty);
        let mut migration = Self { log, ledger, cursor, copy: vec![0; PAGES] };
        assert_eq!(migration.copy_round(front_end).len(), PAGES);
        migration
    }

    /// Collects as a tracker does: what a failed source covers is dirty.
    fn collect(&mut self) -> Result<(), SourceError> {
        let answer = self.log.collect(&mut self.ledger.sink(0, &IovaMap::Identity));
        if answer.is_err() {
            let mut sink = self.ledger.sink(0, &IovaMap::Identity);
            self.log.cover().ranges.into_iter().for_each(|range| sink.gpa_range(range));
        }
        self.ledger.absorb();
        answer
    }

    /// Copies what is pending; returns which pages that was.
    fn copy_round(&mut self, front_end: &FrontEnd) -> BTreeSet<usize> {
        self.ledger.begin_round(self.cursor);
        let Some(chunk) = self.ledger.take(self.cursor, ChunkLimits::NONE) else { return BTreeSet::new() };
        let page = |gpa: u64| usize::try_from(gpa).unwrap() / PAGE;
        let pages: BTreeSet<_> =
            chunk.ranges().iter().flat_map(|range| page(range.start())..page(range.end())).collect();
        self.ledger.commit(chunk);
        for &page in &pages {
            self.copy[page] = word(&front_end.ram, page).load(Ordering::SeqCst);
        }
        pages
    }

    /// Copies a few rounds while the back end works, none of which holds a page that it does not write.
    fn precopy(&mut self, front_end: &FrontEnd) {
        for _ in 0..8 {
            thread::sleep(Duration::from_millis(5));
            self.collect().unwrap();
            let pages = self.copy_round(front_end);
            assert!(pages.iter().all(|&page| is_buffer(page) || page == USED_RING), "{pages:?}");
        }
    }

    fn assert_whole(&self, front_end: &FrontEnd) {
        for (page, &copied) in self.copy.iter().enumerate() {
            assert_eq!(copied, word(&front_end.ram, page).load(Ordering::SeqCst), "page {page}");
        }
        assert!(self.copy[USED_RING] > 1000, "the back end has been at work");
    }
}

#[test]
fn c24_c25_nothing_of_a_back_end_in_another_process_is_lost_when_it_is_stopped_and_then_gone() {
    let mut front_end = FrontEnd::spawn();
    let mut migration = Migration::begin(&front_end);
    migration.precopy(&front_end);
    front_end.stop_rings();
    front_end.kill();
    migration.collect().unwrap();
    let last = migration.copy_round(&front_end);
    assert!(last.contains(&USED_RING), "the last log outlives the process");
    migration.assert_whole(&front_end);
    assert!(migration.copy_round(&front_end).is_empty());
}

#[test]
fn a_back_end_that_dies_is_a_failed_read_of_all_ram() {
    let mut front_end = FrontEnd::spawn();
    let mut migration = Migration::begin(&front_end);
    migration.precopy(&front_end);
    front_end.kill();
    let error = migration.collect().unwrap_err();
    assert!(error.cause.to_string().starts_with("Back end does not take a log of "), "{}", error.cause);
    assert_eq!(migration.copy_round(&front_end).len(), PAGES);
    migration.assert_whole(&front_end);
    migration.log.stop().unwrap_err();
}
