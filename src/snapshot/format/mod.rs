// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What a snapshot's files say: Cloud Hypervisor's documents, the manifest and its digests. Pure: no file is touched here.

pub(super) mod blocks;
pub(super) mod config;
pub(super) mod config_message;
pub(super) mod digest;
pub(super) mod elsewhere;
pub(super) mod error;
pub(super) mod limits;
pub(super) mod list;
pub(super) mod manifest;
pub(super) mod names;
pub(super) mod passthrough;
pub(super) mod placement;
pub(super) mod state;
pub(super) mod tree;
