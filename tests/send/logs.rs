// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What the log and the figures tell of a migration.

use std::cell::RefCell;
use std::sync::Once;
use std::time::Duration;

use log::{Level, LevelFilter, Log, Metadata, Record};
use vfio_migration::device::{Device, DeviceState};
use vfio_migration::transfer::{DowntimeParts, Sender, Sent, SourceVm};

use crate::options;
use crate::peer::{Fault, Peer};
use crate::vm::{FakeDevice, FakeVm, Machine, Report, ScriptedSource};

thread_local! {
    /// What this thread logged.
    static LINES: RefCell<Vec<(Level, String)>> = const { RefCell::new(Vec::new()) };
}

struct Capturing;

impl Log for Capturing {
    fn enabled(&self, _: &Metadata<'_>) -> bool {
        true
    }

    fn log(&self, record: &Record<'_>) {
        LINES.with_borrow_mut(|lines| lines.push((record.level(), record.args().to_string())));
    }

    fn flush(&self) {}
}

/// Returns what `work` logs on this thread.
fn logged<T>(work: impl FnOnce() -> T) -> (T, Vec<(Level, String)>) {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        log::set_logger(&Capturing).unwrap();
        log::set_max_level(LevelFilter::Debug);
    });
    LINES.take();
    let outcome = work();
    (outcome, LINES.take())
}

fn of_level(lines: &[(Level, String)], level: Level) -> Vec<&str> {
    lines.iter().filter(|(at, _)| *at == level).map(|(_, line)| line.as_str()).collect()
}

/// Moves a VM with a source that reports pages after the first two rounds, and a device.
fn move_one(fault: Fault) -> (Result<Sent, SourceVm>, Vec<(Level, String)>) {
    let mut vm = FakeVm::new(0);
    let source = ScriptedSource::new(&vm.log, [Report::Pages(0..900), Report::Pages(0..3)]);
    let device = Device::new("net0", Box::new(FakeDevice::new(&vm.log, b"state")));
    let machine = Machine::from(vm.builder().source(Box::new(source)).build().unwrap()).with_device(device);
    let peer = Peer::unix(fault);
    let mut options = options(&peer);
    // One page each: thousands of chunks.
    options = options.chunk_bytes(4096).unwrap();
    let (sent, lines) = logged(|| Sender::new(options).send(&mut vm, &machine.tracker, &machine.devices));
    drop(peer.end());
    (sent.map_err(|error| error.source_vm()), lines)
}

#[test]
fn a_migration_logs_a_line_for_each_phase_and_round_and_none_for_a_chunk() {
    let (sent, lines) = move_one(Fault::None);
    let sent = sent.unwrap();
    let infos = of_level(&lines, Level::Info);
    let holds = |words: &[&str]| infos.iter().any(|line| words.iter().all(|word| line.contains(word)));
    assert!(holds(&["Migrating a VM with 6.0 MiB of RAM to unix:"]), "{infos:#?}");
    assert!(holds(&["tracking dirty pages with", "scripted"]), "{infos:#?}");
    assert!(
        holds(&["Round 1: sent 6.0 MiB in", "3.5 MiB dirty now at", "scripted ", "expected downtime"]),
        "{infos:#?}"
    );
    assert!(holds(&["VM stopped after"]), "{infos:#?}");
    assert!(holds(&["the last one: sent"]), "{infos:#?}");
    assert!(holds(&["VM moved", "downtime", "devices stop", "complete"]), "{infos:#?}");
    assert_eq!(infos.len(), 4 + sent.progress.round as usize, "{infos:#?}");
    assert!(lines.len() < 40, "{lines:#?}");
    assert!(!of_level(&lines, Level::Debug).is_empty());
}

#[test]
fn a_migration_that_fails_logs_why_and_where_that_leaves_the_vm() {
    let (sent, lines) = move_one(Fault::Refuse(crate::frames::STATE));
    assert_eq!(sent.unwrap_err(), SourceVm::AsBefore);
    let infos = of_level(&lines, Level::Info);
    let last = infos.last().unwrap();
    assert!(last.contains("did not move") && last.contains("as before") && last.contains("state"), "{last}");
}

#[test]
fn the_parts_of_a_downtime_add_up_to_it_and_each_is_where_it_was_spent() {
    const SLOW: Duration = Duration::from_millis(30);
    let mut vm = FakeVm::new(5);
    vm.takes = SLOW;
    let mut device = FakeDevice::new(&vm.log, b"state");
    device.slow = Some((DeviceState::RunningP2p, SLOW));
    let device = Device::new("net0", Box::new(device));
    let machine = vm.machine().with_device(device);
    let peer = Peer::unix(Fault::None);
    let sent = Sender::new(options(&peer)).send(&mut vm, &machine.tracker, &machine.devices).unwrap();
    peer.end().1.unwrap();
    let parts = sent.downtime_parts;
    assert_eq!(parts.total(), sent.downtime);
    let DowntimeParts { pause, devices_stop, capture, .. } = parts;
    assert!([pause, devices_stop, capture].into_iter().all(|part| part >= SLOW), "{parts}");
    assert!(parts.last_pages > Duration::ZERO && parts.complete > Duration::ZERO, "{parts}");
}
