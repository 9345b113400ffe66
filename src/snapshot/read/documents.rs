// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The configuration and the state of a snapshot of either kind, checked against its manifest.

use std::borrow::Cow;
use std::path::Path;

use crate::snapshot::disk::{ReadError, read_bounded};
use crate::snapshot::format::{
    CONFIG_FILE, Covered, MANIFEST_FILE, Manifest, STATE_FILE, SnapshotLimits, VmConfig, VmState,
};

/// Which configuration a snapshot is read with.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Configuration<'a> {
    /// That of `config.json`, if it is the one that the manifest was made for.
    AsSealed,
    /// That of `config.json`, edited or not.
    AsItStands,
    /// This text; `config.json` is not looked at.
    Given(&'a [u8]),
}

/// Configuration and state of a snapshot.
#[derive(Debug, Clone)]
pub(crate) struct Documents {
    pub(crate) config: VmConfig,
    /// The text that `config` was read from, with whatever blanks somebody left around it.
    pub(crate) config_file: Covered,
    pub(crate) state: VmState,
}

impl Documents {
    /// Reads both, and checks them against the manifest where there is one.
    pub(crate) fn open(
        path: &Path,
        manifest: Option<&Manifest>,
        configuration: Configuration<'_>,
        limits: &SnapshotLimits,
    ) -> Result<Self, ReadError> {
        let text = match configuration {
            Configuration::Given(text) => Cow::Borrowed(text),
            _ => Cow::Owned(read_bounded(&path.join(CONFIG_FILE), limits.config_bytes)?),
        };
        let state = read_bounded(&path.join(STATE_FILE), limits.state_bytes)?;
        let altered = |name| ReadError::Altered { path: path.to_owned(), name };
        let wrong = |source| ReadError::Format { path: path.to_owned(), source };
        if manifest.is_some_and(|manifest| Covered::of(&state) != manifest.state) {
            return Err(altered(STATE_FILE));
        }
        let config_file = Covered::of(&text);
        let is_sealed = manifest.is_none_or(|manifest| config_file == manifest.config);
        let config = match VmConfig::parse(&text, limits) {
            Ok(_) if !is_sealed && matches!(configuration, Configuration::AsSealed) => {
                return Err(ReadError::EditedConfig { path: path.to_owned() });
            }
            // What was sealed could be read.
            Err(_) if !is_sealed && !matches!(configuration, Configuration::Given(_)) => {
                return Err(altered(CONFIG_FILE));
            }
            parsed => parsed.map_err(wrong)?,
        };
        let state = VmState::parse(state, limits).map_err(wrong)?;
        if manifest.is_some_and(|manifest| !manifest.memory.ranges().eq(state.memory().ranges())) {
            return Err(altered(STATE_FILE));
        }
        Ok(Self { config, config_file, state })
    }

    /// Whether the configuration is not the one that `manifest` was made for.
    pub(crate) fn is_edited(&self, manifest: &Manifest) -> bool {
        self.config_file != manifest.config
    }
}

/// Reads the text of a configuration out of the file at `path`, to be given to
/// [`FullSnapshot::open_with_config`](crate::snapshot::FullSnapshot::open_with_config).
///
/// # Errors
/// It is not a regular file, cannot be read, or is longer than `limits` say.
pub fn read_config(path: &Path, limits: &SnapshotLimits) -> Result<Vec<u8>, ReadError> {
    read_bounded(path, limits.config_bytes)
}

/// Reads the manifest of the snapshot at `path`, if it has one.
pub(crate) fn open_manifest(path: &Path, limits: &SnapshotLimits) -> Result<Option<Manifest>, ReadError> {
    let bytes = match read_bounded(&path.join(MANIFEST_FILE), limits.manifest_bytes) {
        Err(error) if error.is_absent() => return Ok(None),
        read => read?,
    };
    let wrong = |source| ReadError::Format { path: path.join(MANIFEST_FILE), source };
    Manifest::parse(&bytes, limits).map(Some).map_err(wrong)
}
