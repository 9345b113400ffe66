// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Whole snapshots against naive models of guest memory.

mod bad_input;
mod differential;
mod field;
mod full;
mod guest;
mod manifest;
mod passed;
mod state;
mod verify;
