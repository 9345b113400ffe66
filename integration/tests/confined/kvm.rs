// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! KVM's dirty log and ring, of a real guest.

use std::sync::Arc;

use vfio_migration::iova::IovaMap;
use vfio_migration::ledger::{Ledger, Start};
use vfio_migration::range::GpaRange;
use vfio_migration::source::{DirtySource, KvmLog, KvmLogMode, KvmRing};
use vfio_migration::syscalls;
use vfio_migration_integration::confined::{Confinement, check};

use crate::guest::{Guest, PAGE, collect, taken};

const START: u64 = 16 << 20;
const PAGES: u64 = 300;

fn guest(ring_bytes: Option<u32>) -> Option<Guest> {
    Guest::new(&[(START, PAGES * PAGE)], ring_bytes)
}

/// Everything a session does with a source, under the filter; what the guest writes, outside of it.
fn session(confinement: &Confinement, guest: &mut Guest, mut source: impl DirtySource) {
    let layout = guest.layout();
    let mut ledger = Ledger::new(layout.clone(), 1);
    let cursor = ledger.open(Start::Copied);
    let all = [GpaRange::new(START, PAGES * PAGE).unwrap()];
    confinement.run(|| source.start(&layout, &IovaMap::Identity).unwrap());
    confinement.run(|| source.before_read(&all).unwrap());
    let written = [START, START + 299 * PAGE];
    guest.write(written, || panic!("two pages fill no ring"));
    confinement.run(|| collect(&mut source, &mut ledger));
    assert!(taken(&mut ledger, cursor).is_superset(&written.into()));
    confinement.run(|| {
        source.before_read(&all).unwrap();
        source.stop().unwrap();
        drop(source);
    });
}

fn log(mode: KvmLogMode) -> impl Fn(&Confinement) {
    move |confinement| {
        let Some(mut guest) = guest(None) else { return };
        let source = KvmLog::new(Arc::clone(&guest.vm), guest.slots(), mode);
        session(confinement, &mut guest, source);
    }
}

#[test]
fn kvm_log_at_report() {
    let name = "kvm::kvm_log_at_report";
    check(name, syscalls::KVM_LOG_AT_REPORT, &[], log(KvmLogMode::AtReport));
}

#[test]
fn kvm_log_manual_at_report() {
    let name = "kvm::kvm_log_manual_at_report";
    check(name, syscalls::KVM_LOG_MANUAL, &[], log(KvmLogMode::ManualAtReport));
}

#[test]
fn kvm_log_manual_at_read() {
    let name = "kvm::kvm_log_manual_at_read";
    check(name, syscalls::KVM_LOG_MANUAL, &[], log(KvmLogMode::ManualAtRead));
}

#[test]
fn kvm_ring() {
    check("kvm::kvm_ring", syscalls::KVM_RING, &[], |confinement| {
        let Some(mut guest) = guest(Some(16 << 10)) else { return };
        let ring = guest.ring.unwrap();
        let mut source = KvmRing::new(Arc::clone(&guest.vm), guest.slots(), ring);
        confinement.run(|| source.add_vcpu(&guest.vcpu).unwrap());
        let harvester = source.harvester();
        session(confinement, &mut guest, source);
        confinement.run(|| harvester.harvest().unwrap());
    });
}
