// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Dirty sources that fail, are gone or imprecise.

use std::time::Duration;

use vfio_migration::transfer::{SendError, Sender, SourceVm};

use crate::frames::{ABANDON, CONFIG, MEMORY, START};
use crate::peer::{Fault, Peer};
use crate::vm::{FakeVm, Machine, PAGE, PAGES, Report, ScriptedSource};
use crate::{assert_retry_loses_nothing, log_of, options, send};

#[test]
fn a_failing_source_is_a_degradation_and_loses_nothing() {
    let mut vm = FakeVm::new(20);
    let script = [Report::Fail, Report::Fail, Report::Fail];
    let source = ScriptedSource::new(&vm.log, script);
    let machine = Machine::from(vm.builder().source(Box::new(source)).build().unwrap());
    let peer = Peer::unix(Fault::None);
    let sender = Sender::new(options(&peer));
    let migration = sender.handle();
    let sent = sender.send(&mut vm, &machine.tracker, &machine.devices).unwrap();
    peer.end().0.assert_equals(&vm);
    // A busy machine may miss the downtime limit, too.
    for degradations in [sent.progress.degradations, migration.progress().degradations] {
        let told: Vec<_> = degradations.iter().map(ToString::to_string).collect();
        let of_source: Vec<_> = told.iter().filter(|text| text.contains("scripted")).collect();
        assert_eq!(of_source, ["Dirty source scripted cannot report dirty pages (3 times)"]);
    }
}

#[test]
fn a_source_that_is_gone_ends_the_migration_at_once() {
    for before in [0, 2] {
        let mut vm = FakeVm::new(2000);
        let script = (0..before).map(|_| Report::Fail).chain([Report::Gone]);
        let source = ScriptedSource::new(&vm.log, script);
        let machine = Machine::from(vm.builder().source(Box::new(source)).build().unwrap());
        let peer = Peer::unix(Fault::Slow(Duration::from_millis(2)));
        let sender = Sender::new(options(&peer).downtime(Duration::from_millis(1)));
        let migration = sender.handle();
        let error = sender.send(&mut vm, &machine.tracker, &machine.devices).unwrap_err();
        let SendError::Tracking(cause) = &error else { panic!("{error:?}") };
        let source = std::error::Error::source(cause.as_ref()).unwrap().to_string();
        assert_eq!(source, "Dirty source scripted cannot report dirty pages");
        assert_eq!(migration.progress().round, before + 1);
        assert_eq!(error.source_vm(), SourceVm::AsBefore);
        assert!(vm.makes_progress());
        assert_eq!(peer.end().0.commands().last(), Some(&ABANDON));
    }
}

#[test]
fn a_source_that_does_not_start_stops_the_migration_before_any_page() {
    let mut vm = FakeVm::new(5);
    let mut source = ScriptedSource::new(&vm.log, []);
    source.fail_start = true;
    let machine = Machine::from(vm.builder().source(Box::new(source)).build().unwrap());
    let peer = Peer::unix(Fault::None);
    let error = send(&peer, &mut vm, &machine).unwrap_err();
    assert!(matches!(error, SendError::Tracking(_)), "{error}");
    let (transcript, _) = peer.end();
    assert_eq!(transcript.commands(), [START, CONFIG, ABANDON]);
    assert_retry_loses_nothing(&mut vm, &machine);
}

#[test]
fn a_source_that_cannot_clear_ends_the_migration_and_a_retry_loses_nothing() {
    let mut vm = FakeVm::new(5);
    for chunks in [0, 7, 24] {
        let mut source = ScriptedSource::new(&vm.log, []);
        source.fail_before_read = Some(chunks);
        let machine = Machine::from(vm.builder().source(Box::new(source)).build().unwrap());
        let peer = Peer::unix(Fault::None);
        let error = send(&peer, &mut vm, &machine).unwrap_err();
        assert!(matches!(error, SendError::Tracking(_)), "{error}");
        assert_eq!(peer.end().0.commands().last(), Some(&ABANDON));
        assert_retry_loses_nothing(&mut vm, &machine);
        vfio_migration::vm::Vm::resume(&mut vm).unwrap();
    }
}

/// C1.
#[test]
fn sources_are_on_before_the_first_page_and_off_at_the_end() {
    let mut vm = FakeVm::new(0);
    let source = ScriptedSource::new(&vm.log, []);
    let machine = Machine::from(vm.builder().source(Box::new(source)).build().unwrap());
    send(&Peer::unix(Fault::None), &mut vm, &machine).unwrap();
    assert_eq!(*vm.log.lock().unwrap(), ["source on", "pause", "state", "source off"]);
}

#[test]
fn pages_of_an_imprecise_source_go_over_once_in_the_last_round() {
    let mut vm = FakeVm::new(0);
    let mut source = ScriptedSource::new(&vm.log, [Report::Pages(0..512)]);
    source.precise = false;
    let machine = Machine::from(vm.builder().source(Box::new(source)).build().unwrap());
    let peer = Peer::unix(Fault::None);
    let options = options(&peer).downtime(Duration::from_millis(5000));
    let sent = Sender::new(options).send(&mut vm, &machine.tracker, &machine.devices).unwrap();
    assert_eq!((sent.progress.round, sent.progress.seen.back_outs), (2, 0));
    assert_eq!(sent.progress.degradations.len(), 1, "it is named as a degradation");
    assert!(sent.progress.degradations[0].error.to_string().contains("could have written"));
    let (transcript, _) = peer.end();
    let bytes: u64 = transcript.of(MEMORY).iter().flat_map(|seen| &seen.table).map(|range| range.1).sum();
    assert_eq!(
        bytes,
        (PAGES + 512 + 1) * PAGE,
        "all RAM, what the device may have written, what the capture wrote"
    );
    transcript.assert_equals(&vm);
}

#[test]
fn an_imprecise_source_that_covers_more_than_the_limit_allows_never_stops_the_vm() {
    let mut vm = FakeVm::new(0);
    let mut source = ScriptedSource::new(&vm.log, []);
    source.precise = false;
    let machine = Machine::from(vm.builder().source(Box::new(source)).build().unwrap());
    let peer = Peer::unix(Fault::Slow(Duration::from_millis(20)));
    let options = options(&peer).downtime(Duration::from_millis(20)).timeout(Duration::from_secs(1));
    let error = Sender::new(options).send(&mut vm, &machine.tracker, &machine.devices).unwrap_err();
    assert!(matches!(error, SendError::GivenUp(_)), "{error}");
    assert!(!log_of(&vm.log).contains(&"pause".to_owned()));
}
