// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What a person is told of a VM's pass-through devices: which there are, and what Cloud Hypervisor takes their VM by.

use indicatif::HumanBytes;
use vfio_migration::snapshot::{Interface, PassThrough};

/// A line for each device, and one for what can be done with the VM; none for a VM without devices.
pub(crate) fn device_lines(devices: &[PassThrough]) -> Vec<String> {
    let mut lines: Vec<_> = devices.iter().map(device_line).collect();
    lines.extend(way(devices));
    lines
}

fn device_line(device: &PassThrough) -> String {
    let interface = match device.interface {
        Interface::VfioGroup => "VFIO group",
        Interface::Iommufd => "VFIO in an iommufd",
        Interface::VfioUser => "vfio-user",
        _ => "another interface",
    };
    let path =
        device.path.as_deref().map_or("by a descriptor".to_owned(), |path| path.escape_debug().to_string());
    let state = match device.state_bytes {
        Some(bytes) => format!("{} of saved state", HumanBytes(bytes)),
        None => "no saved state".to_owned(),
    };
    format!("device {device}: {interface}, {path}, {state}")
}

/// How Cloud Hypervisor takes a VM with these devices.
fn way(devices: &[PassThrough]) -> Option<String> {
    if devices.is_empty() {
        return None;
    }
    Some(match receive_options(devices) {
        Some(options) => format!("to send it, the receiver needs receive-migration with {options}"),
        None => format!("Cloud Hypervisor only restores it from disk: {}", obstacle(devices)),
    })
}

/// The options of `receive-migration` that hand a receiver these devices; `None` where there is a device that it cannot be handed.
fn receive_options(devices: &[PassThrough]) -> Option<String> {
    let sendable = !devices.is_empty() && devices.iter().all(PassThrough::is_sendable);
    let fds: Vec<_> = devices.iter().map(|device| format!("{device}@FD")).collect();
    sendable.then(|| format!("vfio_fds=[{}],iommufd_fd=FD", fds.join(",")))
}

/// Why these devices cannot be handed to a receiver.
fn obstacle(devices: &[PassThrough]) -> String {
    let named = |interface| {
        let found = devices.iter().filter(|device| device.interface == interface);
        let ids: Vec<_> = found.map(ToString::to_string).collect();
        (!ids.is_empty()).then(|| ids.join(", "))
    };
    let group = named(Interface::VfioGroup).map(|ids| {
        format!("{ids} must be at the same address, for its configuration lacks platform.iommufd")
    });
    let user = named(Interface::VfioUser).map(|ids| format!("{ids} must be served at the same socket"));
    let unnamed = named(Interface::Iommufd).map(|ids| format!("each of {ids} needs an id"));
    let obstacles: Vec<_> = [group, user].into_iter().flatten().collect();
    if obstacles.is_empty() { unnamed.unwrap_or_default() } else { obstacles.join("; ") }
}

/// What a receiver that refuses a VM with these devices may lack; `None` for a VM without devices.
pub(crate) fn refusal_hint(devices: &[PassThrough]) -> Option<String> {
    if devices.is_empty() {
        return None;
    }
    Some(match receive_options(devices) {
        Some(options) => {
            format!(
                "the VM has pass-through devices: Cloud Hypervisor takes it with receive-migration {options}"
            )
        }
        None => format!(
            "the VM has pass-through devices: Cloud Hypervisor takes none such over receive-migration without \
             platform.iommufd, only --restore from disk; {}",
            obstacle(devices)
        ),
    })
}

#[cfg(test)]
mod tests {
    use vfio_migration::snapshot::{SnapshotLimits, VmConfig};

    use super::*;

    fn devices(fields: &str) -> Vec<PassThrough> {
        let config = format!(r#"{{"memory":{{"size":1}},{fields}}}"#);
        VmConfig::parse(config.as_bytes(), &SnapshotLimits::default()).unwrap().devices().to_vec()
    }

    #[test]
    fn c68_devices_of_an_iommufd_are_sent_with_a_descriptor_for_each_id() {
        let devices =
            devices(r#""platform":{"iommufd":true},"devices":[{"id":"net0","path":"/net"},{"id":"gpu0"}]"#);
        let lines = device_lines(&devices).join("\n");
        let expected = "device net0: VFIO in an iommufd, /net, no saved state\n\
            device gpu0: VFIO in an iommufd, by a descriptor, no saved state\n\
            to send it, the receiver needs receive-migration with vfio_fds=[net0@FD,gpu0@FD],iommufd_fd=FD";
        assert_eq!(lines, expected);
        assert!(
            refusal_hint(&devices)
                .unwrap()
                .ends_with("receive-migration vfio_fds=[net0@FD,gpu0@FD],iommufd_fd=FD")
        );
    }

    #[test]
    fn c68_devices_of_groups_are_only_restored_and_it_is_said_what_is_lacking() {
        let devices = devices(
            r#""devices":[{"id":"net0","path":"/net"}],"user_devices":[{"id":"nvme0","socket":"/s"}]"#,
        );
        for text in [device_lines(&devices).join("\n"), refusal_hint(&devices).unwrap()] {
            assert!(text.contains("platform.iommufd") && text.contains("restore"), "{text}");
            assert!(text.contains("net0 must be at the same address") && text.contains("nvme0"), "{text}");
        }
        assert!(device_lines(&[]).is_empty() && refusal_hint(&[]).is_none());
    }
}
