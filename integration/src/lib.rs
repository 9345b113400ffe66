// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The machinery that whole-VM tests and the demo run on: a minimal VMM with a real KVM guest.
//!
//! Unpublished: nothing here is part of the library's interface.

pub mod bed;
pub mod confined;
pub mod demo;
pub mod device;
pub mod kvm_modes;
pub mod model;
mod skip;
pub mod vmm;

pub use skip::{skip, skipped};
