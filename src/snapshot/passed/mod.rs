// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Memory that a source passes as descriptors: checked before it is believed, copied while the VM runs, and what changed once it is
//! paused.
//!
//! Descriptors are read with `pread`, never mapped: their owner may cut them off at any time.

mod seen;
mod slots;
mod warm;

pub(crate) use self::seen::Seen;
pub use self::slots::SlotError;
pub(crate) use self::slots::{PassedSlots, SlotFiles};
pub(crate) use self::warm::{Copied, Ended, Watch, copy, copy_warm, update};
pub use self::warm::{CopyProgress, LocalEvent, LocalOptions};
