// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The library's sources, devices and probe against a real kernel: the rules they must keep, and each question that the reviewers of
//! `VFIO_IOMMU_DIRTY_PAGES` asked.
//!
//! Runs inside the test bed: `integration/testbed/run --test bed_sources`. Elsewhere each test says that it was skipped.

#![expect(clippy::unwrap_used, reason = "a test's own steps must succeed")]
#![expect(unsafe_code, reason = "memory slots of a real VM")]

mod bed;
mod container;
mod device;
mod device_log;
mod exact;
#[expect(dead_code, reason = "the library's own tests use the rest")]
#[path = "../../../tests/guest/mod.rs"]
mod guest;
mod hwpt;
#[expect(dead_code, reason = "the smoke test uses the rest")]
#[path = "../bed_smoke/kernel.rs"]
mod kernel;
mod kvm;
mod mock;
mod probe;
mod seed;
mod storm;
