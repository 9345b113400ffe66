// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A device's interface, for more than one thread: its set moves the device, and a stream reads or writes its state meanwhile.

use std::sync::{Arc, Mutex, MutexGuard};

use super::DeviceIo;
use crate::sync::lock;

/// A device's interface; locked for one call at a time.
#[derive(Clone)]
pub(super) struct SharedIo(Arc<Mutex<Box<dyn DeviceIo>>>);

impl SharedIo {
    pub(super) fn new(io: Box<dyn DeviceIo>) -> Self {
        Self(Arc::new(Mutex::new(io)))
    }

    /// Locks the interface. A panic of an earlier holder does not matter: what state the device is in is read from the device.
    pub(super) fn lock(&self) -> MutexGuard<'_, Box<dyn DeviceIo>> {
        lock(&self.0)
    }
}
