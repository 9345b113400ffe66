// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Naming the parts of a [`MigratableDevice`].

use thiserror::Error;

use super::{Attached, MigratableDevice, MigratableDeviceError, SpaceId};
use crate::device::{Device, DeviceSet};
use crate::iova::IovaMap;
use crate::layout::Layout;
use crate::ledger::Ledger;
use crate::source::DirtySource;

/// Names the parts of a [`MigratableDevice`].
#[must_use = "a builder does nothing until it builds"]
pub struct Builder {
    id: String,
    layout: Layout,
    spaces: Vec<IovaMap>,
    sources: Vec<Attached>,
    devices: Vec<Device>,
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

impl Builder {
    pub(super) fn new(id: String, layout: Layout, spaces: Vec<IovaMap>) -> Self {
        Self { id, layout, spaces, sources: Vec::new(), devices: Vec::new(), allow_imprecise: false }
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

    /// Allows sources that cannot tell written pages from pages that could have been written, which [`Builder::build`] refuses
    /// otherwise. What they cover is sent in the last round, while the VM stands still, and each is named as a degradation.
    pub fn allow_imprecise(mut self) -> Self {
        self.allow_imprecise = true;
        self
    }

    /// Adds a device whose state moves.
    pub fn device(mut self, device: Device) -> Self {
        self.devices.push(device);
        self
    }

    /// Builds it, with no log running.
    ///
    /// # Errors
    /// Two sources share an id, one is imprecise and that was not allowed, or the devices cannot be migrated together.
    pub fn build(self) -> Result<MigratableDevice, MigratableDeviceError> {
        let ids: Vec<_> = self.sources.iter().map(|attached| attached.source.id()).collect();
        if let Some((_, id)) = ids.iter().enumerate().find(|(at, id)| ids[..*at].contains(id)) {
            return Err(MigratableDeviceError::TwoSources { id: (*id).to_owned() });
        }
        if let Some(attached) =
            self.sources.iter().find(|attached| !attached.precise && !self.allow_imprecise)
        {
            return Err(MigratableDeviceError::Imprecise { id: attached.source.id().to_owned() });
        }
        Ok(MigratableDevice {
            id: self.id,
            ledger: Ledger::new(self.layout, self.sources.len()),
            spaces: self.spaces,
            sources: self.sources,
            devices: DeviceSet::new(self.devices)?,
            logging: false,
            migrating: false,
            paused: false,
            session: None,
        })
    }
}
