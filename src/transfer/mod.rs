// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Moving a VM between hosts.

mod progress;

pub use progress::{Degradation, Migration, Phase, Progress, SourceProgress};
