// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What is told of a VM's pass-through devices.

use std::fs;
use std::io::Write;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::thread;

use serde_json::{Value, json};
use vfio_migration::snapshot::{CONFIG_FILE, MANIFEST_FILE, STATE_FILE};

use crate::stored::Place;
use crate::tool::{Tool, run};

const HINT: &str = "Cloud Hypervisor takes it with receive-migration vfio_fds=[net0@FD],iommufd_fd=FD";

/// Stores a VM with a device of an iommufd, or of a group, whose saved state has 3000 bytes.
fn stored_with_device(place: &Place, iommufd: bool) -> PathBuf {
    let dir = place.stored("dir", 1);
    fs::remove_file(dir.join(MANIFEST_FILE)).unwrap();
    let edit = |name: &str, change: &dyn Fn(&mut Value)| {
        let mut value: Value = serde_json::from_slice(&fs::read(dir.join(name)).unwrap()).unwrap();
        change(&mut value);
        fs::write(dir.join(name), value.to_string()).unwrap();
    };
    edit(CONFIG_FILE, &|config| {
        config["platform"] = json!({"num_pci_segments": 1, "iommufd": iommufd});
        config["devices"] =
            json!([{"path": "/sys/bus/pci/devices/0000:01:00.1", "id": "net0", "iommu": false}]);
    });
    edit(STATE_FILE, &|state| {
        let blob = json!({"blob": "AAAA".repeat(1000)}).to_string();
        let saved = json!({"snapshots": {}, "snapshot_data": {"state": blob}});
        let common = json!({"snapshots": {"vfio_migration": saved}, "snapshot_data": {"state": "{}"}});
        let device = json!({"snapshots": {"vfio_common": common}, "snapshot_data": null});
        let manager = &mut state["snapshots"]["device-manager"];
        if manager.is_null() {
            *manager = json!({"snapshots": {}, "snapshot_data": null});
        }
        manager["snapshots"]["net0"] = device;
    });
    dir
}

fn info(dir: &Path) -> (Value, String) {
    let dir = dir.to_str().unwrap();
    let told = run(["snapshot", "info", dir, "--json"]).succeeded().last();
    (told, run(["snapshot", "info", dir]).succeeded().stdout)
}

#[test]
fn c68_info_and_receive_tell_the_devices_and_what_takes_their_vm() {
    for (iommufd, interface, way) in [
        (
            true,
            "iommufd",
            "to send it, the receiver needs receive-migration with vfio_fds=[net0@FD],iommufd_fd=FD",
        ),
        (
            false,
            "vfio-group",
            "Cloud Hypervisor only restores it from disk: net0 must be at the same address",
        ),
    ] {
        let place = Place::new();
        let dir = stored_with_device(&place, iommufd);
        let (told, text) = info(&dir);
        let device = json!({
            "id": "net0", "interface": interface, "path": "/sys/bus/pci/devices/0000:01:00.1", "state_bytes": 3000
        });
        assert_eq!(told["devices"], json!([device]));
        assert!(text.contains("device net0: VFIO") && text.contains("2.93 KiB of saved state"), "{text}");
        assert!(text.contains(way), "{text}");

        let (receiver, url) = Tool::receive("tcp:127.0.0.1:0", &place.path("into"), &[]);
        Tool::send(&url, &dir, &[]).end().succeeded();
        let kept = receiver.end().succeeded();
        assert_eq!(kept.last()["devices"], json!([device]));
        assert_eq!(kept.stderr.contains("that no receiver can be handed: net0"), !iommufd, "{kept:?}");
    }
}

#[test]
fn c68_a_refused_config_names_ids_descriptors_and_options() {
    for (iommufd, words) in [(true, HINT), (false, "over receive-migration without platform.iommufd")] {
        let place = Place::new();
        let dir = stored_with_device(&place, iommufd);
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("tcp:{}", listener.local_addr().unwrap());
        let refusing = thread::spawn(move || refuse_config(&listener));
        let ended = Tool::send(&url, &dir, &[]).end().failed(3, "Receiver refused");
        assert!(ended.stderr.contains("net0") && ended.stderr.contains(words), "{ended:?}");
        refusing.join().unwrap();
    }
}

/// Says yes to Start and no to Config.
fn refuse_config(listener: &TcpListener) {
    let (mut stream, _) = listener.accept().unwrap();
    for status in [1u16, 2] {
        let mut request = [0; 16];
        std::io::Read::read_exact(&mut stream, &mut request).unwrap();
        let length = u64::from_le_bytes(request[8..].try_into().unwrap());
        std::io::copy(&mut std::io::Read::take(&stream, length), &mut std::io::sink()).unwrap();
        let mut answer = [0; 16];
        answer[..2].copy_from_slice(&status.to_le_bytes());
        stream.write_all(&answer).unwrap();
    }
}
