// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Module parameters, through which faults are injected.

use std::fs;
use std::io;

/// A module's parameter with a value that lasts as long as this.
#[derive(Debug)]
pub struct Parameter {
    path: String,
    before: String,
}

impl Parameter {
    /// Sets parameter `name` of `module`.
    ///
    /// # Errors
    /// There is no such parameter, or it refuses the value.
    pub fn set(module: &str, name: &str, value: &str) -> io::Result<Self> {
        let path = format!("/sys/module/{module}/parameters/{name}");
        let before = fs::read_to_string(&path)?;
        fs::write(&path, value)?;
        Ok(Self { path, before })
    }

    /// Sets a parameter that all fixtures share.
    ///
    /// # Errors
    /// As [`Parameter::set`].
    pub fn fixture(name: &str, value: &str) -> io::Result<Self> {
        Self::set("vfio_fixture", name, value)
    }
}

impl Drop for Parameter {
    fn drop(&mut self) {
        if let Err(error) = fs::write(&self.path, &self.before) {
            log::error!("Cannot restore {}: {error}", self.path);
        }
    }
}
