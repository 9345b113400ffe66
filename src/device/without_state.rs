// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Stand-in without the feature `device-state`: the VMM moves devices' state itself, so the set is always empty.

use thiserror::Error;
use vm_migration::Snapshot;

/// What can go wrong with the state of devices without the feature `device-state`.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum DeviceSetError {
    /// A snapshot holds the state of a device, and nothing here takes it.
    #[error("Snapshot holds the state of device {name:?}, which takes the feature `device-state`")]
    Unclaimed {
        /// The device.
        name: String,
    },
}

/// The devices of a VM whose state moves: none without the feature `device-state`, so whatever is to happen to all of them has.
#[derive(Debug, Default)]
pub struct DeviceSet(());

#[expect(
    clippy::unnecessary_wraps,
    clippy::unused_self,
    reason = "the signatures are those of the set with devices"
)]
impl DeviceSet {
    pub(crate) fn stop(&mut self) -> Result<(), DeviceSetError> {
        Ok(())
    }

    pub(crate) fn stop_for_copy(&mut self) -> Result<(), DeviceSetError> {
        Ok(())
    }

    pub(crate) fn run(&mut self) -> Result<(), DeviceSetError> {
        Ok(())
    }

    pub(crate) fn abort_to_running(&mut self) -> Result<(), DeviceSetError> {
        Ok(())
    }

    pub(crate) fn save(&mut self) -> Result<Snapshot, DeviceSetError> {
        Ok(Snapshot::default())
    }

    /// Refuses a snapshot of anything but no devices.
    pub(crate) fn load(&mut self, tree: &Snapshot) -> Result<(), DeviceSetError> {
        match tree.snapshots.keys().next() {
            Some(name) => Err(DeviceSetError::Unclaimed { name: name.clone() }),
            None => Ok(()),
        }
    }

    pub(crate) fn retire(&mut self) -> Result<(), DeviceSetError> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_devices_state_that_nothing_takes_is_refused() {
        let mut none = DeviceSet::default();
        let mut tree = none.save().unwrap();
        none.load(&tree).unwrap();
        tree.add_snapshot("net0".to_owned(), Snapshot::default());
        let DeviceSetError::Unclaimed { name } = none.load(&tree).unwrap_err();
        assert_eq!(name, "net0");
    }
}
