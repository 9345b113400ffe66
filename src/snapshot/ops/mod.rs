// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What is done with snapshots that lie on disk: a file for each command of the tool.

mod apply;
mod compare;
mod describe;
mod error;
mod seal;
mod subtract;
mod verify;

pub use self::apply::apply;
pub use self::compare::{Differences, compare};
pub use self::describe::{Description, SnapshotKind, describe};
pub use self::error::OperationError;
pub(crate) use self::error::lay_out;
#[cfg(test)]
pub(crate) use self::seal::seal_opened;
pub use self::seal::{reseal, seal};
pub use self::subtract::subtract;
pub use self::verify::{VerifyFinding, VerifyReport, verify};
