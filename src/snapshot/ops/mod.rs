// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What is done with snapshots that lie on disk.

pub(super) mod apply;
pub(super) mod compare;
pub(super) mod describe;
pub(super) mod error;
pub(super) mod seal;
pub(super) mod subtract;
pub(super) mod verify;
