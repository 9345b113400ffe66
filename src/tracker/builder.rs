// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The builder of a [`Tracker`]: its sources and address spaces.

use thiserror::Error;

use super::{Attached, Mappings, OnFailure, SpaceId, Tracker, TrackerError, VmMappings};
use crate::iova::IovaMap;
use crate::layout::Layout;
use crate::ledger::Ledger;
use crate::source::{DirtySource, Reports, choose};

/// Names the sources and address spaces of a [`Tracker`].
#[must_use = "a builder does nothing until it builds"]
pub struct TrackerBuilder {
    pub(super) layout: Layout,
    pub(super) spaces: Vec<IovaMap>,
    pub(super) sources: Vec<Attached>,
    mappings: Option<Mappings>,
    pub(super) allow_imprecise: bool,
    on_failure: OnFailure,
    pub(super) degradations: Vec<choose::SpaceDegradation>,
}

/// Names an imprecise source in a migration's degradations.
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
        Self {
            layout,
            spaces: vec![IovaMap::Identity],
            sources: Vec::new(),
            mappings: None,
            allow_imprecise: false,
            on_failure: OnFailure::default(),
            degradations: Vec::new(),
        }
    }

    /// Sets the closure that returns what really maps the VM's memory. It is called at the start of every session and
    /// when RAM is plugged in, with the tracker locked.
    ///
    /// Every source needs it: the VM's RAM is compared with the layout, and what the sources cover with what can be
    /// written; a difference is refused by name. This finds RAM that was plugged in without a call of
    /// [`Tracker::add_ram`]. Where only the VMM and its own components write, return [`VmMappings::of_memory`].
    pub fn mappings(self, mappings: impl Fn() -> VmMappings + Send + 'static) -> Self {
        Self { mappings: Some(Box::new(mappings)), ..self }
    }

    /// Adds a source whose addresses are guest-physical, or IOVAs equal to them.
    pub fn source(self, source: Box<dyn DirtySource>) -> Self {
        self.source_of(SpaceId::IDENTITY, [] as [&str; 0], source)
    }

    /// Adds a source that reports IOVAs of `space`, and what these devices write.
    ///
    /// # Panics
    /// `space` was not made by this builder.
    pub fn source_of(
        mut self,
        space: SpaceId,
        devices: impl IntoIterator<Item = impl Into<String>>,
        source: Box<dyn DirtySource>,
    ) -> Self {
        assert!(space.0 < self.spaces.len(), "a space of another builder");
        self.sources.push(Attached::new(space, devices.into_iter().map(Into::into).collect(), source));
        self
    }

    /// Adds the IOVA space of a virtual IOMMU, with the mappings that stand.
    pub fn space(&mut self, map: IovaMap) -> SpaceId {
        self.spaces.push(map);
        SpaceId(self.spaces.len() - 1)
    }

    /// Allows imprecise sources, which report all pages that could have been written; [`TrackerBuilder::build`]
    /// refuses them otherwise. The memory they cover is sent in the last round, while the VM is paused, and each is
    /// named as a degradation.
    pub fn allow_imprecise(mut self) -> Self {
        self.allow_imprecise = true;
        self
    }

    /// Sets what the failure of a source does to a migration; [`OnFailure::Widen`] by default.
    pub fn on_failure(self, on_failure: OnFailure) -> Self {
        Self { on_failure, ..self }
    }

    /// Builds it, with no log running.
    ///
    /// # Errors
    /// Two sources share an id; an imprecise one was not allowed, or is used beside a precise one for the same device
    /// or beside one whose devices are not named; or there are sources, but no [`TrackerBuilder::mappings`].
    pub fn build(self) -> Result<Tracker, TrackerError> {
        check_sources(&self.sources, self.allow_imprecise, self.mappings.is_some())?;
        Ok(Tracker {
            ledger: Ledger::new(self.layout, self.sources.len()),
            spaces: self.spaces,
            sources: self.sources,
            mappings: self.mappings,
            allow_imprecise: self.allow_imprecise,
            on_failure: self.on_failure,
            degradations: self.degradations,
            tracking: false,
        })
    }
}

/// Checks that sources go together.
pub(super) fn check_sources(
    sources: &[Attached],
    allow_imprecise: bool,
    has_mappings: bool,
) -> Result<(), TrackerError> {
    for (at, attached) in sources.iter().enumerate() {
        let id = || attached.source.id().to_owned();
        if sources[..at].iter().any(|other| other.source.id() == attached.source.id()) {
            return Err(TrackerError::TwoSources { id: id() });
        }
        if !has_mappings {
            return Err(TrackerError::NoMappings { id: id() });
        }
        if !attached.precise && !allow_imprecise {
            return Err(TrackerError::Imprecise { id: id() });
        }
    }
    let imprecise = sources.iter().filter(|attached| !attached.precise);
    imprecise.into_iter().try_for_each(|attached| check_imprecise(attached, sources))
}

/// Checks that no imprecise source reports a device that a precise one reports too (C64).
fn check_imprecise(imprecise: &Attached, sources: &[Attached]) -> Result<(), TrackerError> {
    let id = |attached: &Attached| attached.source.id().to_owned();
    let others = sources.iter().filter(|other| other.precise && other.source.reports() == Reports::Devices);
    for other in others {
        if imprecise.devices.is_empty() || other.devices.is_empty() {
            return Err(TrackerError::DevicesNotNamed { id: id(imprecise) });
        }
        if let Some(device) = imprecise.devices.iter().find(|device| other.devices.contains(device)) {
            let (imprecise, precise) = (id(imprecise), id(other));
            return Err(TrackerError::ImpreciseBesidePrecise { imprecise, precise, device: device.clone() });
        }
    }
    Ok(())
}
