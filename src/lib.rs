// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Live migration and snapshots of VMs with pass-through devices.

mod bitmap;
pub mod device;
pub mod granule;
pub mod iova;
pub mod layout;
pub mod ledger;
pub mod precopy;
pub mod range;
pub mod source;
pub mod table;
pub mod transfer;
pub mod vm;

mod sys;
