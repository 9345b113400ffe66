// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A dirty ring that is full all the time.

use vfio_migration_integration::bed::{BedSetup, Here, Moving, migrate};

use crate::{assert_arrived, degradations, running, setups};

/// 256 entries, and a guest that writes as fast as it can.
fn tight(setup: BedSetup, vcpu_harvests: bool) -> BedSetup {
    BedSetup { dirty_ring_bytes: Some(4096), vcpu_harvests, guest_rate: None, ..setup }
}

fn move_with_a_full_ring(test: &str, vcpu_harvests: bool) {
    let Some([source, destination]) = setups(test) else { return };
    let mut source = running(tight(source, vcpu_harvests));
    let mut destination = Here::new(tight(destination, vcpu_harvests)).unwrap();
    let patient = Moving { downtime_ms: 5000, ..Moving::default() };
    let sent = migrate(&mut source, &mut destination, patient, |_| {}).unwrap();
    // Where KVM overran the ring, all pages count as written.
    let degradations = degradations(&sent);
    assert!(degradations.iter().all(|degradation| degradation.contains("overflowed")), "{degradations:?}");
    assert!(source.side.full_ring_exits() > 0, "the ring was never full");
    assert_arrived(&source, &destination);
}

#[test]
fn c22_ring_that_the_vcpu_finds_full_loses_no_page() {
    move_with_a_full_ring("full ring", true);
}

#[test]
fn c22_ring_that_only_the_collector_empties_loses_no_page() {
    move_with_a_full_ring("full ring and no harvest by the vCPU", false);
}
