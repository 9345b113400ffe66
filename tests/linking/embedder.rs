// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A VMM that links the library, whichever `vm-migration` is in its tree.

use std::sync::{Arc, Mutex};

use vfio_migration::granule::Granule;
use vfio_migration::layout::Layout;
use vfio_migration::migratable::MigratableDevice;
use vfio_migration::range::GpaRange;
use vfio_migration::tracker::Tracker;
use vm_migration::{Migratable, MigratableError};

/// What the VMM does with any of its components: the library's are of the VMM's own trait.
pub fn dirty_bytes(component: &mut dyn Migratable) -> Result<u64, MigratableError> {
    component.start_dirty_log()?;
    let table = component.dirty_log()?;
    component.stop_dirty_log()?;
    Ok(table.regions().iter().map(|range| range.length).sum())
}

pub fn clean_device() -> Result<u64, Box<dyn std::error::Error>> {
    let layout = Layout::new([GpaRange::new(0, 1 << 20)?], Granule::KIB_4)?;
    let tracker = Arc::new(Mutex::new(Tracker::builder(layout).build()?));
    Ok(dirty_bytes(&mut MigratableDevice::new("vm", tracker, Arc::default()))?)
}
