// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The recipes of `docs/offload.md` work as pasted; a source, or a VMM that waits, stands for Cloud Hypervisor.

use std::fs;
use std::process::Command;

use super::*;
use crate::frames::COMPLETE;
use crate::local_send::{chain, memory_of};
use crate::on_demand::take_state;
use crate::readme::{paste, succeeded, wait_for};
use crate::vmm::Vmm;

const PAGE_TEXT: &str = include_str!("../../../../docs/offload.md");

/// What a receiver of a restore begins with.
const RECEIVER: &str =
    "ch-remote --api-socket /tmp/new.sock receive-migration receiver_url=unix:/tmp/restore.sock";

/// The recipe that begins with `words`, and the block after it, in a place of their own.
fn recipe(words: &str, place: &Place) -> (String, String) {
    let root = place.root().to_str().unwrap();
    let mut blocks =
        PAGE_TEXT.split("```\n").skip(1).step_by(2).skip_while(|block| !block.starts_with(words));
    let mut next = || {
        let block = blocks.next().unwrap().trim().replace("/tmp/", &format!("{root}/"));
        block.replace("/run/", &format!("{root}/")).replace("/var/lib/", &format!("{root}/"))
    };
    (next(), next())
}

/// Sends a VM, as `local=on` does; returns the last answer.
fn send(socket: &Path) -> Option<u16> {
    let (mut source, memory) = (Source::start(socket), guest());
    assert_eq!(source.pass(0, &[memory.as_fd()]), Some(OK));
    assert_eq!(source.ask(&one_slot()), Some(OK));
    source.finish()
}

#[test]
fn a_checkpoint_of_a_vm_that_runs_on() {
    let place = Place::new();
    let (command, other_side) = recipe("vfio-migrate receive unix:/tmp/checkpoint.sock", &place);
    let socket = place.path("checkpoint.sock");
    let url = format!("destination_url=unix:{},local=on,preserve_source=on", socket.display());
    assert!(other_side.contains(&url), "{other_side}");
    let receiver = paste(&command, &place);
    wait_for(&socket);
    // So the source's VM runs on.
    assert_eq!(send(&socket), Some(ERROR));
    succeeded(receiver);
    assert_sound(&place.path("monday"));
}

#[test]
fn a_service_that_keeps_every_vm() {
    let place = Place::new();
    let (command, _) = recipe("mkdir -p /var/lib/", &place);
    // The shell becomes the service, which gets the signal.
    let service = paste(&command.replace("vfio-migrate receive", "exec vfio-migrate receive"), &place);
    wait_for(&place.path("vfio-migrate.sock"));
    assert_eq!(send(&place.path("vfio-migrate.sock")), Some(ERROR));
    Command::new("kill").arg(service.id().to_string()).status().unwrap();
    succeeded(service);
    let kept: Vec<_> =
        place.path("vfio-migrate").read_dir().unwrap().map(|entry| entry.unwrap().path()).collect();
    assert_eq!(kept.len(), 1);
    assert_sound(&kept[0]);
}

/// A full snapshot and two differentials, called as in the recipes; and the memory that so many of them make up.
fn week(place: &Place, days: usize) -> Vec<u8> {
    let (dirs, _) = chain(place, 2);
    for (dir, day) in dirs.iter().zip(["sunday", "monday", "tuesday"]) {
        fs::rename(dir, place.path(day)).unwrap();
    }
    memory_of(&place.path(&format!("vm-{}", days - 1)))
}

#[test]
fn a_restore_of_a_chain() {
    let place = Place::new();
    let memory = week(&place, 3);
    let (waiting, command) = recipe(RECEIVER, &place);
    let socket = place.path("restore.sock");
    assert!(waiting.ends_with(&format!("receiver_url=unix:{}", socket.display())), "{waiting}");
    let vmm = Vmm::bind(&socket);
    let sender = paste(&command, &place);
    let mut line = vmm.accept();
    while line.next().is_some() {
        line.answer(OK);
    }
    succeeded(sender);
    assert!(line.passed.memory() == memory, "memory differs");
}

#[test]
fn a_restore_on_demand() {
    let place = Place::new();
    let memory = week(&place, 2);
    let socket = place.path("restore.sock");
    let (plain, _) = recipe(RECEIVER, &place);
    let (waiting, command) = recipe(&format!("{RECEIVER},memory_mode=postcopy"), &place);
    assert_eq!(waiting, format!("{plain},memory_mode=postcopy"));
    let vmm = Vmm::bind(&socket);
    let sender = paste(&command, &place);
    let (mut line, mut faults) = take_state(&vmm);
    assert_eq!(faults.ask(0, 4096), Some(OK));
    line.answer(OK);
    assert_eq!(line.next(), Some(COMPLETE));
    line.answer(OK);
    for gpa in (0..memory.len() as u64).step_by(4096) {
        assert_eq!(faults.ask(gpa, 4096), Some(OK));
    }
    drop(faults);
    succeeded(sender);
    assert!(line.passed.memory() == memory, "memory differs");
}
