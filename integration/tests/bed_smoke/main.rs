// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Shows that the test bed's devices do what the tests of the library count on, with nothing of the library in between.
//!
//! Runs inside the bed: `integration/testbed/run`. Elsewhere each test says that it was skipped.

#![expect(clippy::unwrap_used, reason = "a test's own steps must succeed")]

mod edu;
mod faults;
mod iommufd;
mod kernel;
mod mdev;

use std::fs;

use kernel::bed;

#[test]
fn the_scenario_has_what_it_says() {
    let Some(bed) = bed("scenario") else { return };
    let kvm = kvm_ioctls::Kvm::new().is_ok_and(|kvm| kvm.create_vm().is_ok());
    assert_eq!(kvm, bed["scenario"] != "no-kvm");
    let vfio = fs::exists("/dev/vfio/vfio").unwrap() && fs::exists("/dev/iommu").unwrap();
    assert_eq!(vfio, bed["scenario"] != "no-vfio");
}
