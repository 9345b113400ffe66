// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What can go wrong with a migratable component.

use std::io;

use thiserror::Error;

/// Names the operation on a migratable component that failed, one variant per operation.
///
/// The cause is the [source](std::error::Error::source) and is not part of the variant's own text;
/// print the whole chain to see it.
#[derive(Debug, Error)]
pub enum MigratableError {
    /// The component could not be paused.
    #[error("Cannot pause component")]
    Pause(#[source] anyhow::Error),

    /// The component could not be resumed.
    #[error("Cannot resume component")]
    Resume(#[source] anyhow::Error),

    /// The component's state could not be captured.
    #[error("Cannot take snapshot of component")]
    Snapshot(#[source] anyhow::Error),

    /// The component could not be rebuilt from its state.
    #[error("Cannot restore component from snapshot")]
    Restore(#[source] anyhow::Error),

    /// The source end of a migration failed.
    #[error("Cannot send migration")]
    MigrateSend(#[source] anyhow::Error),

    /// The destination end of a migration failed, or its peer sent what it must not.
    #[error("Cannot receive migration")]
    MigrateReceive(#[source] anyhow::Error),

    /// Reading from or writing to the peer failed.
    #[error("Cannot exchange data with migration peer")]
    MigrateSocket(#[source] io::Error),

    /// The dirty log could not be armed.
    #[error("Cannot start dirty log of component")]
    StartDirtyLog(#[source] anyhow::Error),

    /// The dirty log could not be disarmed.
    #[error("Cannot stop dirty log of component")]
    StopDirtyLog(#[source] anyhow::Error),

    /// The dirty log could not be drained.
    #[error("Cannot read dirty log of component")]
    DirtyLog(#[source] anyhow::Error),

    /// The component refused to begin a migration.
    #[error("Cannot start migration of component")]
    StartMigration(#[source] anyhow::Error),

    /// The component could not be wound up after a migration.
    #[error("Cannot complete migration of component")]
    CompleteMigration(#[source] anyhow::Error),

    /// A disk lock could not be released to the destination.
    #[error("Cannot release disk lock")]
    UnlockError(#[source] anyhow::Error),

    /// The device behind the component, named here, is gone.
    #[error("Device {0} is disconnected")]
    DeviceDisconnected(String),
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::error::Error;

    use anyhow::anyhow;

    use super::*;

    fn one_of_each() -> Vec<MigratableError> {
        let of_operation: [fn(anyhow::Error) -> MigratableError; 12] = [
            MigratableError::Pause,
            MigratableError::Resume,
            MigratableError::Snapshot,
            MigratableError::Restore,
            MigratableError::MigrateSend,
            MigratableError::MigrateReceive,
            MigratableError::StartDirtyLog,
            MigratableError::StopDirtyLog,
            MigratableError::DirtyLog,
            MigratableError::StartMigration,
            MigratableError::CompleteMigration,
            MigratableError::UnlockError,
        ];
        of_operation
            .into_iter()
            .map(|variant| variant(anyhow!("cause")))
            .chain([
                MigratableError::MigrateSocket(io::Error::other("cause")),
                MigratableError::DeviceDisconnected("net0".to_string()),
            ])
            .collect()
    }

    #[test]
    fn every_variant_has_a_text_of_its_own() {
        let errors = one_of_each();
        let texts: BTreeSet<_> = errors.iter().map(ToString::to_string).collect();
        assert_eq!(texts.len(), errors.len(), "{texts:?}");
    }

    #[test]
    fn the_cause_is_the_source_and_is_not_repeated_in_the_text() {
        for error in one_of_each() {
            assert!(!error.to_string().contains("cause"), "{error}");
            match error {
                MigratableError::DeviceDisconnected(_) => assert!(error.source().is_none()),
                _ => assert_eq!(error.source().unwrap().to_string(), "cause"),
            }
        }
    }
}
