// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The RAM that a VM announces, compared with what its state lists at the end.

use crate::layout::Layout;
use crate::range::GpaRange;
use crate::snapshot::disk::WriteError;
use crate::snapshot::format::{Placement, PlacementError, SnapshotLimits, VmState};

/// The RAM of a VM as it is announced before its state is known.
#[derive(Debug, Clone)]
pub struct AnnouncedRam {
    layout: Layout,
    hotpluggable: Placement,
    /// Bytes of `hotpluggable` that the state will probably list.
    plugged_bytes: u64,
}

impl AnnouncedRam {
    /// All of `layout` is memory of the VM.
    pub fn all(layout: Layout) -> Self {
        Self { layout, hotpluggable: Placement::default(), plugged_bytes: 0 }
    }

    /// All of `layout` is memory of the VM but for those parts of `hotpluggable` that its state does not list.
    ///
    /// # Errors
    /// The parts overlap, or exceed `limits`.
    pub fn with_hotpluggable(
        layout: Layout,
        hotpluggable: &[GpaRange],
        limits: &SnapshotLimits,
    ) -> Result<Self, PlacementError> {
        let hotpluggable = Placement::new(hotpluggable.iter().copied(), limits)?;
        Ok(Self { layout, plugged_bytes: hotpluggable.bytes(), hotpluggable })
    }

    /// So many bytes of what is hotpluggable are probably plugged, all unless told: a right guess saves time once the state is known.
    #[must_use]
    pub fn plugged_bytes(self, plugged_bytes: u64) -> Self {
        Self { plugged_bytes: plugged_bytes.min(self.hotpluggable.bytes()), ..self }
    }

    /// Bytes of memory that the state will probably list.
    pub(crate) fn expected_bytes(&self) -> u64 {
        self.layout.bytes() - (self.hotpluggable.bytes() - self.plugged_bytes).min(self.layout.bytes())
    }

    /// The VM's RAM.
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// Returns where memory goes once the `state` is known: ascending, and only what the state lists.
    pub(crate) fn settle(
        &self,
        state: &VmState,
        placement: &Placement,
        limits: &SnapshotLimits,
    ) -> Result<Placement, WriteError> {
        let listed = state.memory();
        if let Some(range) = listed.ranges().flat_map(|range| placement.missing(range)).next() {
            return Err(WriteError::Unannounced { range });
        }
        if placement.same_memory(listed) {
            return Ok(placement.clone());
        }
        // A manifest that listed them could not be read.
        listed.check_pages(self.layout.host_page())?;
        let mut left_out = placement.ranges().flat_map(|range| listed.missing(range));
        if let Some(range) = left_out.find(|&range| !self.hotpluggable.holds(range)) {
            return Err(WriteError::LeftOut { range });
        }
        Ok(Placement::new(listed.ascending().iter().map(|extent| extent.range), limits)?)
    }
}
