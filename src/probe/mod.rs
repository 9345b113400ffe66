// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What this host, and each VFIO device on it, can do for a migration, and what stands in the way.
//!
//! [`read`] looks; [`evaluate`] judges, and only looks at what was read. Where something could not be looked at, the report says so
//! instead of guessing.

use serde::{Deserialize, Serialize};

mod evaluate;
mod facts;
mod read;

pub use evaluate::evaluate;
pub use facts::{
    BitmapFacts, BusKind, ContainerFacts, DeviceProbe, Facts, IommufdFacts, KvmFacts, LogFacts,
    MigrationFacts, ProbedDevice, Seen,
};
pub use read::{Roots, read};

/// What a host can do for a migration.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProbeReport {
    /// What was read.
    #[serde(flatten)]
    pub facts: Facts,
    /// What makes a migration impossible.
    pub blockers: Vec<ProbeFinding>,
    /// What makes it worse than it could be.
    pub degradations: Vec<ProbeFinding>,
    /// What could not be looked at.
    pub unseen: Vec<ProbeFinding>,
}

/// One thing that stands in the way, for machines and for people.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProbeFinding {
    /// A short name for machines; does not change.
    pub code: String,
    /// What it is about: `host`, or a device's name.
    pub subject: String,
    /// What is the case, as a sentence.
    pub reason: String,
    /// What would help, as a sentence.
    pub remedy: String,
}
