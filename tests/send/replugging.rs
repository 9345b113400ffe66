// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! RAM that goes, and comes again, at the worst moments of a migration.

use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use vfio_migration::precopy::TimeoutStrategy;
use vfio_migration::transfer::{SendError, SendOptions, Sender, Sent};
use vfio_migration::vm::UserfaultError;
use vm_memory::bitmap::AtomicBitmap;
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestAddressSpace, GuestRegionMmap, MmapRegion};

use crate::peer::{Fault, Peer, Transcript};
use crate::plugging::{UNPLUGGED, Vmm, region};
use crate::userfault::FILLING;
use crate::userfault::handler::Handler;
use crate::vm::PAGE;

/// Sends `vmm`'s VM as `change` says, and has `meanwhile` happen once the first chunk is acknowledged.
fn send_while(
    vmm: &Vmm,
    fault: Fault,
    change: impl FnOnce(SendOptions) -> SendOptions,
    meanwhile: impl FnOnce(),
) -> (Sent, Transcript) {
    let peer = Peer::unix(fault);
    let sent = try_send_while(vmm, &peer, change, meanwhile).unwrap();
    let (transcript, outcome) = peer.end();
    outcome.unwrap();
    (sent, transcript)
}

fn try_send_while(
    vmm: &Vmm,
    peer: &Peer,
    change: impl FnOnce(SendOptions) -> SendOptions,
    meanwhile: impl FnOnce(),
) -> Result<Sent, SendError> {
    let mut vm = vmm.vm();
    let options = crate::options(peer).downtime(Duration::from_millis(2000));
    let sender = Sender::new(change(options));
    let migration = sender.handle();
    thread::scope(|scope| {
        let sending = scope.spawn(|| sender.send(&mut vm, &vmm.tracker, &vmm.devices));
        while migration.progress().acknowledged_bytes == 0 {
            assert!(!sending.is_finished(), "it ended before the first acknowledgement");
            thread::sleep(Duration::from_millis(1));
        }
        meanwhile();
        sending.join().unwrap()
    })
}

/// RAM in the place of that which can be unplugged, with something in every page.
fn filled() -> Arc<GuestRegionMmap<AtomicBitmap>> {
    let (ram, file) = region(UNPLUGGED);
    for page in 0..UNPLUGGED.1 / PAGE {
        file.write_all_at(&(page ^ 0xf111).to_le_bytes(), page * PAGE).unwrap();
    }
    ram
}

#[test]
fn ram_plugged_in_filled_where_other_ram_was_arrives() {
    let vmm = Vmm::new();
    let (_, transcript) = send_while(
        &vmm,
        Fault::None,
        |options| options.rate_limit(Some(8 << 20)).unwrap(),
        || {
            vmm.unplug_ram();
            vmm.plug(filled());
        },
    );
    vmm.assert_arrived(&transcript);
    assert!(transcript.pages.contains_key(&UNPLUGGED.0));
}

#[test]
fn c49_ram_plugged_in_that_only_another_mapping_of_its_file_fills_is_refused_by_name() {
    let vmm = Vmm::new();
    let (ram, file) = region(UNPLUGGED);
    let bytes = usize::try_from(UNPLUGGED.1).unwrap();
    let other = MmapRegion::<()>::from_file(FileOffset::new(file, 0), bytes).unwrap();
    let Some(_handler) = Handler::serve(&[(other.as_ptr() as u64, UNPLUGGED.1)], FILLING) else { return };
    let peer = Peer::unix(Fault::None);
    let replug = || {
        vmm.unplug_ram();
        vmm.plug(ram);
    };
    let error = try_send_while(&vmm, &peer, |options| options.rate_limit(Some(8 << 20)).unwrap(), replug)
        .unwrap_err();
    drop(peer.end());
    let SendError::Userfault(UserfaultError::OtherMapping { range }) = error else { panic!("{error}") };
    assert_eq!((range.start(), range.len()), UNPLUGGED);
}

#[test]
fn ram_unplugged_with_pages_pending_is_not_waited_for() {
    let vmm = Vmm::new();
    for page in 0..UNPLUGGED.1 / PAGE {
        vmm.memory.memory().write_obj(page ^ 0x901e, GuestAddress(UNPLUGGED.0 + page * PAGE)).unwrap();
    }
    let (_, transcript) = send_while(
        &vmm,
        Fault::None,
        |options| options.rate_limit(Some(8 << 20)).unwrap(),
        || vmm.unplug_ram(),
    );
    vmm.assert_arrived(&transcript);
    assert!(!transcript.pages.contains_key(&(UNPLUGGED.0 + UNPLUGGED.1 - PAGE)), "it went before its turn");
}

#[test]
fn ram_unplugged_with_pages_in_flight_ends_no_migration() {
    let vmm = Vmm::new();
    for page in 0..UNPLUGGED.1 / PAGE {
        vmm.memory.memory().write_obj(page ^ 0x901e, GuestAddress(UNPLUGGED.0 + page * PAGE)).unwrap();
    }
    // Every chunk is on its way by the time that the first is acknowledged.
    let slow = Fault::Slow(Duration::from_millis(100));
    let (_, transcript) = send_while(
        &vmm,
        slow,
        |options| options.chunk_bytes(2 << 20).unwrap(),
        || {
            vmm.unplug_ram();
            vmm.plug(filled());
        },
    );
    vmm.assert_arrived(&transcript);
}

#[test]
fn ram_that_goes_between_a_take_and_the_look_at_the_memory_ends_no_migration() {
    let vmm = Arc::new(Vmm::new());
    let peer = Peer::unix(Fault::None);
    let sender = Sender::new(crate::options(&peer).chunk_bytes(64 << 20).unwrap());
    let (migration, gone) = (sender.handle(), AtomicBool::new(false));
    let mut vm = vmm.vm();
    let world = Arc::clone(&vmm);
    vm.on_memory = Box::new(move || {
        if migration.progress().round == 0 || gone.load(Ordering::Relaxed) {
            return;
        }
        if let Ok(mut tracker) = world.tracker.try_lock() {
            world.unplug_from(&mut tracker);
            gone.store(true, Ordering::Relaxed);
        }
    });
    sender.send(&mut vm, &vmm.tracker, &vmm.devices).unwrap();
    let (transcript, outcome) = peer.end();
    outcome.unwrap();
    vmm.assert_arrived(&transcript);
}

#[test]
fn ram_that_comes_and_goes_all_the_time_upsets_no_figures() {
    let vmm = Vmm::new();
    let (sent, transcript) = send_while(
        &vmm,
        Fault::None,
        |options| {
            let options = options.rate_limit(Some(256 << 20)).unwrap().downtime(Duration::from_millis(1));
            options.max_rounds(Some(200)).timeout_strategy(TimeoutStrategy::Ignore)
        },
        || {
            let until = Instant::now() + Duration::from_secs(1);
            let ram = filled();
            while Instant::now() < until {
                vmm.while_running(|| {
                    vmm.unplug_ram();
                    vmm.plug(Arc::clone(&ram));
                    for page in 0..300 {
                        vmm.memory.memory().write_obj(page, GuestAddress(page * PAGE)).unwrap();
                    }
                });
            }
        },
    );
    vmm.assert_arrived(&transcript);
    assert!(sent.progress.round > 20, "{} rounds", sent.progress.round);
}
