// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Writing snapshots, full and differential, from any number of threads.

pub(super) mod changed_pages;
pub(super) mod differential_writer;
pub(super) mod feed;
pub(super) mod memory_file;
pub(super) mod page_cells;
pub(super) mod writer;
