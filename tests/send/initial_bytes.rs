// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What devices want read before they stop, while their states stream.

use std::time::Duration;

use vfio_migration::precopy::{CancelReason, Obstacle};
use vfio_migration::transfer::{SendError, SourceVm};

use crate::log_of;
use crate::streams::{Vmm, moves, source, takers};
use crate::vm::FakeVm;

#[test]
fn c47_a_device_that_always_wants_more_read_is_what_the_timeout_names() {
    let mut vm = FakeVm::new(0);
    let machine = source(&vm, &[b"a state"], |_, io| io.restless = true);
    let mut vmm = Vmm::new(takers(1).1);
    let limit = Duration::from_secs(1);
    let (sent, received) = moves(&mut vm, &machine, &mut vmm, |options| options.timeout(limit));
    received.unwrap_err();
    let error = sent.unwrap_err();
    let SendError::GivenUp(CancelReason::TimedOut { obstacle, .. }) = &error else { panic!("{error}") };
    assert_eq!(*obstacle, Obstacle::InitialBytes { bytes: 1 });
    let named = "device state of a size that nobody tells was to be read before the devices stop";
    assert!(error.to_string().contains(named), "{error}");
    assert_eq!(error.source_vm(), SourceVm::AsBefore);
    let log = log_of(&vm.log);
    assert!(!log.iter().any(|step| step == "pause" || step == "STOP_COPY"), "{log:?}");
}
