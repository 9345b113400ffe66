// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What the first pass leaves out, and that nothing is missing for it.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use proptest::prelude::*;
use vfio_migration::iova::IovaMap;
use vfio_migration::layout::Layout;
use vfio_migration::precopy::TimeoutStrategy;
use vfio_migration::range::GpaRange;
use vfio_migration::source::{Cover, DirtySource, Reports, Sink, SourceError};
use vfio_migration::transfer::{Sender, Sent};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

use crate::both_ends::{Vmm, loopback, moves};
use crate::frames::MEMORY;
use crate::options;
use crate::peer::{Fault, Peer, Transcript};
use crate::vm::{FakeVm, LOW, Machine, Memory, PAGE, PAGES, empty_memory, page_gpa, sparse_memory};

/// Bytes of pages 0 to 2, which the tests write: data, zeros, nothing.
const DATA: u64 = 0;
const ZERO: u64 = 1;
const HOLE: u64 = 2;
/// A page far from them, so that the pass is not empty.
const ANCHOR: u64 = PAGES - 1;

/// A memfd with a page of data, one of zeros, and holes.
fn sparse_vm() -> FakeVm {
    let memory = sparse_memory();
    memory.write_obj(7_u64, GuestAddress(page_gpa(DATA) + 8)).unwrap();
    memory.write_obj(0_u64, GuestAddress(page_gpa(ZERO))).unwrap();
    memory.write_obj(9_u8, GuestAddress(page_gpa(ANCHOR) + PAGE - 1)).unwrap();
    FakeVm::with_memory(memory, 0)
}

pub(crate) type Act = Box<dyn FnMut(&Memory) -> Vec<u64> + Send>;

/// A source that writes memory itself, at the worst of times, and reports what it is told to.
pub(crate) struct Meddler {
    memory: Arc<Memory>,
    pub(crate) before_read: Act,
    pub(crate) collect: Act,
}

impl Meddler {
    pub(crate) fn idle(vm: &FakeVm) -> Self {
        let memory = Arc::clone(&vm.memory);
        Self { memory, before_read: Box::new(|_| Vec::new()), collect: Box::new(|_| Vec::new()) }
    }
}

impl DirtySource for Meddler {
    fn id(&self) -> &str {
        "meddler"
    }

    fn reports(&self) -> Reports {
        Reports::Component
    }

    fn cover(&self) -> Cover {
        Cover { ranges: vec![GpaRange::new(LOW.0, LOW.1).unwrap()], precise: true }
    }

    fn start(&mut self, _layout: &Layout, _iova: &IovaMap) -> Result<(), SourceError> {
        Ok(())
    }

    fn collect(&mut self, sink: &mut Sink<'_>) -> Result<(), SourceError> {
        let pages = (self.collect)(&self.memory);
        pages.into_iter().for_each(|page| sink.gpa_range(GpaRange::new(page_gpa(page), PAGE).unwrap()));
        Ok(())
    }

    fn before_read(&mut self, _chunk: &[GpaRange]) -> Result<(), SourceError> {
        (self.before_read)(&self.memory);
        Ok(())
    }

    fn stop(&mut self) -> Result<(), SourceError> {
        Ok(())
    }
}

/// Writes without a trace in the memory's own dirty bitmap, as a guest or a device does.
fn write_unseen(memory: &Memory, page: u64, value: u8) {
    memory.write_slice(&[value; PAGE as usize], GuestAddress(page_gpa(page))).unwrap();
    let (region, offset) = memory.to_region_addr(GuestAddress(page_gpa(page))).unwrap();
    region.get_mmap().bitmap().reset_addr_range(offset.0 as usize, PAGE as usize);
}

fn send_to_peer(vm: &mut FakeVm, meddler: Meddler, receiver_reads_zero: bool) -> (Sent, Transcript) {
    let machine = Machine::from(vm.builder().source(Box::new(meddler)).build().unwrap());
    let peer = Peer::unix(Fault::None);
    let options = options(&peer).receiver_reads_zero(receiver_reads_zero);
    let sent = Sender::new(options).send(vm, &machine.tracker, &machine.devices).unwrap();
    let (transcript, outcome) = peer.end();
    outcome.unwrap();
    (sent, transcript)
}

/// How often a page went over the wire.
fn times_sent(transcript: &Transcript, page: u64) -> usize {
    let gpa = page_gpa(page);
    let ranges = transcript.of(MEMORY).into_iter().flat_map(|seen| &seen.table);
    ranges.filter(|(start, length)| (*start..start + length).contains(&gpa)).count()
}

fn last_sent(transcript: &Transcript, page: u64) -> u8 {
    transcript.pages[&page_gpa(page)][0]
}

#[test]
fn holes_and_zeros_stay_at_home_and_are_counted() {
    let mut vm = sparse_vm();
    let meddler = Meddler::idle(&vm);
    let (sent, transcript) = send_to_peer(&mut vm, meddler, true);
    assert_eq!(sent.progress.skipped_zero_bytes, PAGE);
    assert_eq!(sent.progress.skipped_hole_bytes, (PAGES - 3) * PAGE);
    // Page 3 is what the capture writes.
    let on_the_wire: Vec<_> = (0..PAGES).filter(|&page| times_sent(&transcript, page) > 0).collect();
    assert_eq!(on_the_wire, [DATA, 3, ANCHOR]);
}

#[test]
fn a_receiver_that_may_not_read_zero_gets_everything() {
    let mut vm = sparse_vm();
    let meddler = Meddler::idle(&vm);
    let (sent, transcript) = send_to_peer(&mut vm, meddler, false);
    assert_eq!((sent.progress.skipped_hole_bytes, sent.progress.skipped_zero_bytes), (0, 0));
    transcript.assert_equals(&vm);
}

#[test]
fn c36_a_page_that_changes_after_the_first_pass_is_sent_whatever_it_reads() {
    let mut vm = sparse_vm();
    let mut first = true;
    let mut meddler = Meddler::idle(&vm);
    meddler.collect = Box::new(move |memory| {
        if !std::mem::take(&mut first) {
            return Vec::new();
        }
        write_unseen(memory, DATA, 0);
        write_unseen(memory, ZERO, 5);
        // Dirty, and zero as before.
        vec![DATA, ZERO, HOLE]
    });
    let (_, transcript) = send_to_peer(&mut vm, meddler, true);
    assert_eq!([DATA, ZERO, HOLE].map(|page| times_sent(&transcript, page)), [2, 1, 1]);
    assert_eq!([DATA, ZERO, HOLE].map(|page| last_sent(&transcript, page)), [0, 5, 0]);
}

#[test]
fn c2_a_page_written_while_its_standing_bit_is_cleared_is_looked_at_after_that() {
    // Nobody reports the page again: had anybody looked before the clear, it would be lost.
    let mut vm = sparse_vm();
    let mut meddler = Meddler::idle(&vm);
    let mut first = true;
    meddler.before_read = Box::new(move |memory| {
        if std::mem::take(&mut first) {
            write_unseen(memory, HOLE, 6);
            write_unseen(memory, ZERO, 4);
        }
        Vec::new()
    });
    let (_, transcript) = send_to_peer(&mut vm, meddler, true);
    assert_eq!([ZERO, HOLE].map(|page| times_sent(&transcript, page)), [1, 1]);
    assert_eq!([ZERO, HOLE].map(|page| last_sent(&transcript, page)), [4, 6]);
}

#[test]
fn a_vm_that_is_one_hole_is_moved_within_its_downtime() {
    let mut vm = FakeVm::with_memory(sparse_memory(), 0);
    let device = crate::vm::FakeDevice::new(&vm.log, b"state that takes bandwidth");
    let device = vfio_migration::device::Device::new("device", Box::new(device));
    let machine = vm.machine().with_device(device);
    let peer = Peer::unix(Fault::None);
    let sent = Sender::new(options(&peer)).send(&mut vm, &machine.tracker, &machine.devices).unwrap();
    peer.end().1.unwrap();
    assert_eq!(sent.progress.skipped_hole_bytes, PAGES * PAGE - (256 << 10), "all but one chunk");
}

#[test]
fn a_cap_on_bandwidth_counts_only_what_is_sent() {
    let mut vm = FakeVm::with_memory(sparse_memory(), 0);
    vm.memory.write_obj(1_u8, GuestAddress(page_gpa(0))).unwrap();
    let machine = vm.machine();
    let peer = Peer::unix(Fault::None);
    let options = options(&peer).rate_limit(Some(1 << 20)).unwrap();
    let sent = Sender::new(options).send(&mut vm, &machine.tracker, &machine.devices).unwrap();
    peer.end().1.unwrap();
    assert!(sent.total.as_secs() < 3, "6 MiB of holes at 1 MiB/s took {:?}", sent.total);
}

#[test]
fn what_a_first_pass_cut_short_did_not_reach_is_left_out_all_the_same() {
    let data_pages = LOW.1 / PAGE;
    let mut vm = FakeVm::with_memory(sparse_memory(), 0);
    (0..data_pages).for_each(|page| vm.memory.write_obj(7_u8, GuestAddress(page_gpa(page))).unwrap());
    let mut meddler = Meddler::idle(&vm);
    // Sent by then, and zero from now on.
    meddler.collect = Box::new(|memory| {
        write_unseen(memory, DATA, 0);
        vec![DATA]
    });
    let machine = Machine::from(vm.builder().source(Box::new(meddler)).build().unwrap());
    let peer = Peer::unix(Fault::None);
    let options = options(&peer)
        .rate_limit(Some(2 << 20))
        .unwrap()
        .timeout(Duration::from_secs(1))
        .timeout_strategy(TimeoutStrategy::Ignore);
    let sent = Sender::new(options).send(&mut vm, &machine.tracker, &machine.devices).unwrap();
    let (transcript, outcome) = peer.end();
    outcome.unwrap();
    assert!(times_sent(&transcript, DATA) > 1 && last_sent(&transcript, DATA) == 0);
    assert!((1..data_pages).all(|page| times_sent(&transcript, page) > 0));
    assert!((data_pages..PAGES).all(|page| times_sent(&transcript, page) == 0), "these are holes");
    assert_eq!(sent.progress.skipped_hole_bytes, (PAGES - data_pages) * PAGE);
}

#[derive(Debug, Clone, Copy)]
enum Page {
    Untouched,
    Zeroed,
    Written(u8),
}

fn page() -> impl Strategy<Value = Page> {
    prop_oneof![
        6 => Just(Page::Untouched),
        2 => Just(Page::Zeroed),
        2 => (1..=u8::MAX).prop_map(Page::Written),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]
    #[test]
    fn a_sparse_vm_that_is_written_all_the_time_arrives_whole(
        pages in prop::collection::vec(page(), PAGES as usize),
        memfd in any::<bool>(),
        connections in prop_oneof![Just(1_u64), Just(4)],
    ) {
        let memory = if memfd { sparse_memory() } else { empty_memory() };
        for (page, index) in pages.iter().zip(0..) {
            match page {
                Page::Untouched => {}
                Page::Zeroed => memory.write_obj(0_u8, GuestAddress(page_gpa(index))).unwrap(),
                Page::Written(value) => memory.write_obj(*value, GuestAddress(page_gpa(index))).unwrap(),
            }
        }
        let (mut vm, mut vmm) = (FakeVm::with_memory(memory, 20), Vmm::new(true));
        let zeroing = Zeroing::start(&vm);
        let (sent, received) = moves(&mut vm, &mut vmm, &loopback(), connections, None);
        drop(zeroing);
        received.unwrap();
        let sent = sent.unwrap();
        vmm.assert_equals(&vm);
        prop_assert!(sent.progress.skipped_bytes() > 0);
    }
}

/// A thread that makes pages zero, for as long as the VM runs.
struct Zeroing {
    over: Arc<AtomicBool>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Zeroing {
    fn start(vm: &FakeVm) -> Self {
        let over = Arc::new(AtomicBool::new(false));
        let (stop, writes) = (Arc::clone(&over), vm.writes());
        let thread = std::thread::spawn(move || {
            let mut page = 0;
            while !stop.load(Ordering::Relaxed) {
                page = (page + 131) % PAGES;
                writes.while_running(|memory| {
                    memory.write_slice(&[0; PAGE as usize], GuestAddress(page_gpa(page))).unwrap();
                });
                std::thread::sleep(std::time::Duration::from_micros(200));
            }
        });
        Self { over, thread: Some(thread) }
    }
}

impl Drop for Zeroing {
    fn drop(&mut self) {
        self.over.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            thread.join().unwrap();
        }
    }
}
