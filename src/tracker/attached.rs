// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A source, and whose writes it reports.

use crate::source::DirtySource;

/// Names one IOVA address space of a [`Tracker`](super::Tracker).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct SpaceId(pub(super) usize);

impl SpaceId {
    /// The space where IOVA equals GPA, which is always there.
    pub const IDENTITY: Self = Self(0);
}

/// A source, with whom it speaks for.
pub(super) struct Attached {
    pub(super) source: Box<dyn DirtySource>,
    pub(super) space: SpaceId,
    /// The devices whose writes it reports, where it reports devices'.
    pub(super) devices: Vec<String>,
    pub(super) precise: bool,
}

impl Attached {
    pub(super) fn new(space: SpaceId, devices: Vec<String>, source: Box<dyn DirtySource>) -> Self {
        let precise = source.cover().precise;
        Self { source, space, devices, precise }
    }
}
