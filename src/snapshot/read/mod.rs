// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Reading snapshots: full ones, differentials, and chains of them; every byte can be checked against its digest.
//!
//! `stored` opens a directory of either kind; `reader` reads its memory block by block; `full` and `differential` are snapshots, `chain`
//! several of them as one; `placed` fills guest memory from them; `altered` is a byte that was changed.

mod altered;
mod blocks;
mod chain;
mod differential;
mod full;
mod placed;
mod reader;
mod stored;

pub use self::altered::Altered;
pub(crate) use self::blocks::ChainBlocks;
pub use self::chain::SnapshotChain;
pub use self::differential::Differential;
pub use self::full::FullSnapshot;
pub(crate) use self::placed::regions;
pub use self::placed::{PlacedMemory, PlacedRegion};
pub(crate) use self::reader::{CheckedBits, MemoryReader};
pub use self::stored::read_config;
pub(crate) use self::stored::{Configuration, Stored, open_manifest};
