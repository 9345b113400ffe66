// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The library on real VFIO, iommufd and KVM: what its tests inside the test bed share.
//!
//! ```text
//!            ┌── control ── source process ────── KVM, edu, dirty_mdev
//!  parent ───┤                   │ TCP
//!            └── control ── destination process ─ KVM, the other edu, the other dirty_mdev
//! ```
//! As in [`crate::demo`], the parent made both sides' memfds and compares them itself. The devices are the kernel modules of
//! `resources/modules`; `docs/testbed.md` says how to run it.

mod driver;
mod edu;
mod engine;
mod facts;
mod here;
mod mirror;
mod mock;
mod pair;
mod parameter;
mod pass_through;
mod served;
mod side;
mod territory;

pub use driver::Driver;
pub use edu::{Edu, EduDma};
pub use engine::{Engine, EngineStream};
pub use facts::Bed;
pub use here::{Here, migrate};
pub use mirror::{Mirror, differing};
pub use mock::MockDomain;
pub use pair::{Moving, Pair, process_main};
pub use parameter::Parameter;
pub use pass_through::{Bus, PassThrough};
pub use side::{BedSetup, BedSide};
pub use territory::Territory;
