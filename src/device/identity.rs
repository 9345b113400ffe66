// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The identity of a streamed device, compared between both ends.

use derive_more::Display;
use thiserror::Error;

/// What two ends compare before a device's state streams from one to the other.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StreamIdentity {
    /// The device's name in its VM: `net0`.
    pub name: String,
    /// What it is: `15b3:101e mlx5`.
    pub model: String,
    /// Its firmware; empty where that does not matter.
    pub firmware: String,
    /// The version of the stream that its driver writes and reads.
    pub stream_version: u32,
}

/// A property in which both ends have to agree.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Display)]
pub enum IdentityField {
    /// [`StreamIdentity::model`].
    #[display("model")]
    Model,
    /// [`StreamIdentity::firmware`].
    #[display("firmware")]
    Firmware,
    /// [`StreamIdentity::stream_version`].
    #[display("stream version")]
    StreamVersion,
}

/// How the devices of the two ends differ.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum IdentityMismatch {
    /// Both ends have a device of this name, but it is not the same one.
    #[error(
        "Device {name:?} has {field} {source_has:?} at the source and {destination_has:?} at the destination"
    )]
    Differs {
        /// The device.
        name: String,
        /// In what it differs.
        field: IdentityField,
        /// What it is at the source.
        source_has: String,
        /// What it is at the destination.
        destination_has: String,
    },
    /// The destination lacks a device.
    #[error("Destination has no device {name:?}")]
    NotAtDestination {
        /// The device.
        name: String,
    },
    /// The source lacks a device.
    #[error("Source has no device {name:?}, which the destination has")]
    NotAtSource {
        /// The device.
        name: String,
    },
}

/// Compares what the source has with what the destination has, whatever their order.
///
/// # Errors
/// The first difference.
pub fn compare_identities(
    source: &[StreamIdentity],
    destination: &[StreamIdentity],
) -> Result<(), IdentityMismatch> {
    for ours in source {
        let theirs = destination.iter().find(|theirs| theirs.name == ours.name);
        let theirs = theirs.ok_or_else(|| IdentityMismatch::NotAtDestination { name: ours.name.clone() })?;
        compare(ours, theirs)?;
    }
    let known = |name: &str| source.iter().any(|ours| ours.name == name);
    match destination.iter().find(|theirs| !known(&theirs.name)) {
        Some(theirs) => Err(IdentityMismatch::NotAtSource { name: theirs.name.clone() }),
        None => Ok(()),
    }
}

fn compare(source: &StreamIdentity, destination: &StreamIdentity) -> Result<(), IdentityMismatch> {
    let versions = [source, destination].map(|identity| identity.stream_version.to_string());
    let fields = [
        (IdentityField::Model, &source.model, &destination.model),
        (IdentityField::Firmware, &source.firmware, &destination.firmware),
        (IdentityField::StreamVersion, &versions[0], &versions[1]),
    ];
    match fields.into_iter().find(|(_, source, destination)| source != destination) {
        Some((field, source_has, destination_has)) => Err(IdentityMismatch::Differs {
            name: source.name.clone(),
            field,
            source_has: source_has.clone(),
            destination_has: destination_has.clone(),
        }),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn identity(name: &str) -> StreamIdentity {
        StreamIdentity {
            name: name.into(),
            model: "15b3:101e mlx5".into(),
            firmware: "22.41.1000".into(),
            stream_version: 3,
        }
    }

    #[test]
    fn the_same_devices_in_another_order_agree() {
        let [a, b] = ["a", "b"].map(identity);
        assert_eq!(compare_identities(&[a.clone(), b.clone()], &[b, a]), Ok(()));
    }

    #[test]
    fn each_difference_is_named() {
        type Change = fn(&mut StreamIdentity);
        let changes: [(&str, Change); 3] = [
            ("model", |identity| identity.model = "8086:1889 iavf".into()),
            ("firmware", |identity| identity.firmware.clear()),
            ("stream version", |identity| identity.stream_version = 4),
        ];
        for (field, change) in changes {
            let mut other = identity("net0");
            change(&mut other);
            let error = compare_identities(&[identity("net0")], &[other]).unwrap_err();
            assert!(error.to_string().starts_with(&format!("Device \"net0\" has {field} ")), "{error}");
        }
        let lacks = |source: &[StreamIdentity], destination: &[StreamIdentity]| {
            compare_identities(source, destination).unwrap_err().to_string()
        };
        assert_eq!(lacks(&[identity("a")], &[]), "Destination has no device \"a\"");
        assert_eq!(lacks(&[], &[identity("a")]), "Source has no device \"a\", which the destination has");
    }
}
