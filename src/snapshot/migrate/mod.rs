// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The two sides of a migration: a snapshot as its source, and as its destination.

mod background_check;
mod destination;
mod source;

pub use self::destination::{
    DestinationError, DestinationOptions, NameSnapshot, OnPaused, SnapshotDestination,
};
pub use self::source::SnapshotSource;
