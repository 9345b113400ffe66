// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Writing snapshots, full and differential, from any number of threads.
//!
//! - `writer`: the one way in, over `full_pages` (memory in place) or `changed_pages` (a work file), whose pages `laid_out` puts
//!   back to back;
//! - `sparse_file`: writes blocks of either, leaves zeros out as holes, and waits for the disk (back-pressure);
//! - `page_cells`: a page that comes in parts; `announced`: the RAM that a source said it has.

mod announced;
mod changed_pages;
mod full_pages;
mod laid_out;
mod page_cells;
mod sparse_file;
mod writer;

pub use self::announced::AnnouncedRam;
pub(crate) use self::writer::Completed;
pub use self::writer::{Base, SnapshotWriter};
