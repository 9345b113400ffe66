// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Reading snapshots: full ones, differentials, and chains of them; every byte can be checked against its digest.

mod altered;
mod chain;
mod differential;
mod documents;
mod either;
mod full;
mod placed;
mod reader;

pub use self::altered::Altered;
pub use self::chain::SnapshotChain;
pub use self::differential::Differential;
pub use self::documents::read_config;
pub(crate) use self::documents::{Configuration, Documents, open_manifest};
pub(crate) use self::either::Snapshot;
pub use self::full::FullSnapshot;
pub(crate) use self::placed::regions;
pub use self::placed::{PlacedMemory, PlacedRegion};
pub(crate) use self::reader::{CheckedBits, MemoryReader};
