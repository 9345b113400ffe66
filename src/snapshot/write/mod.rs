// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Writing snapshots, full and differential, from any number of threads.

mod announced;
mod changed_pages;
mod full_pages;
mod page_cells;
mod sparse_file;
mod writer;

pub use self::announced::AnnouncedRam;
pub use self::writer::{Base, SnapshotWriter};
