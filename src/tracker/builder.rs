// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Naming the sources and address spaces of a [`Tracker`].

use thiserror::Error;

use super::{Attached, SpaceId, Tracker, TrackerError};
use crate::iova::IovaMap;
use crate::layout::Layout;
use crate::ledger::Ledger;
use crate::source::DirtySource;

/// Names the sources and address spaces of a [`Tracker`].
#[must_use = "a builder does nothing until it builds"]
pub struct TrackerBuilder {
    layout: Layout,
    spaces: Vec<IovaMap>,
    sources: Vec<Attached>,
    allow_imprecise: bool,
}

/// Names a source whose reports say what could have been written, for the migration's degradations.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error(
    "Dirty source {id} reports every page its devices could have written; they are sent in the last round"
)]
pub struct ImpreciseSource {
    /// The source.
    pub id: String,
}

impl TrackerBuilder {
    pub(super) fn new(layout: Layout) -> Self {
        Self { layout, spaces: vec![IovaMap::Identity], sources: Vec::new(), allow_imprecise: false }
    }

    /// Adds a source whose addresses are guest-physical, or IOVAs equal to them.
    pub fn source(self, source: Box<dyn DirtySource>) -> Self {
        self.source_in(SpaceId::IDENTITY, source)
    }

    /// Adds a source that reports IOVAs of `space`.
    ///
    /// # Panics
    /// `space` was not made by this builder.
    pub fn source_in(mut self, space: SpaceId, source: Box<dyn DirtySource>) -> Self {
        assert!(space.0 < self.spaces.len(), "a space of another builder");
        let precise = source.cover().precise;
        self.sources.push(Attached { source, space, precise });
        self
    }

    /// Adds the IOVA space of a virtual IOMMU, with the mappings that stand.
    pub fn space(&mut self, map: IovaMap) -> SpaceId {
        self.spaces.push(map);
        SpaceId(self.spaces.len() - 1)
    }

    /// Allows sources that cannot tell written pages from pages that could have been written, which [`TrackerBuilder::build`] refuses
    /// otherwise. What they cover is sent in the last round, while the VM stands still, and each is named as a degradation.
    pub fn allow_imprecise(mut self) -> Self {
        self.allow_imprecise = true;
        self
    }

    /// Builds it, with no log running.
    ///
    /// # Errors
    /// Two sources share an id, or one is imprecise and that was not allowed.
    pub fn build(self) -> Result<Tracker, TrackerError> {
        let ids: Vec<_> = self.sources.iter().map(|attached| attached.source.id()).collect();
        if let Some((_, id)) = ids.iter().enumerate().find(|(at, id)| ids[..*at].contains(id)) {
            return Err(TrackerError::TwoSources { id: (*id).to_owned() });
        }
        if let Some(attached) =
            self.sources.iter().find(|attached| !attached.precise && !self.allow_imprecise)
        {
            return Err(TrackerError::Imprecise { id: attached.source.id().to_owned() });
        }
        Ok(Tracker {
            ledger: Ledger::new(self.layout, self.sources.len()),
            spaces: self.spaces,
            sources: self.sources,
            tracking: false,
        })
    }
}
