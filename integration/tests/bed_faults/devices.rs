// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Devices that are reset, taken away, or refuse to move, while the VM does.

use std::fs;
use std::thread::{self, JoinHandle, sleep};
use std::time::Duration;

use vfio_migration::transfer::SourceVm;
use vfio_migration_integration::bed::{Here, Moving, Parameter, migrate};

use crate::{assert_arrived, assert_moves, assert_runs_on, chain, degradations, running, setups};

/// The guest's driver resets its device while it hands out its state: what was read is worthless, and memory is not.
#[test]
fn c30_device_reset_in_mid_precopy_arrives_as_it_is_after_the_reset() {
    let Some([source, destination]) = setups("reset of the mediated device") else { return };
    let mut source = running(source);
    let mut destination = Here::new(destination).unwrap();
    let before = source.side.engine().position().unwrap();
    assert!(before > 0);
    let sent = migrate(&mut source, &mut destination, Moving::default(), |side| {
        side.engine().pass_through().device().reset();
    });
    let degradations = degradations(&sent.unwrap());
    assert_eq!(degradations.len(), 1, "{degradations:?}");
    assert!(degradations[0].contains("\"mdev0\": Device left its data session"), "{degradations:?}");
    assert_eq!(source.side.engine().position().unwrap(), 0, "reset");
    assert_arrived(&source, &destination);
}

#[test]
fn c30_edu_reset_in_mid_precopy_loses_no_page() {
    let Some([source, destination]) = setups("reset of edu") else { return };
    let mut source = running(source);
    let mut destination = Here::new(destination).unwrap();
    let sent = migrate(&mut source, &mut destination, Moving::default(), |side| {
        side.edu().unwrap().pass_through().device().reset();
    });
    let degradations = degradations(&sent.unwrap());
    assert!(degradations.iter().all(|degradation| degradation.contains("edu0")), "{degradations:?}");
    assert_arrived(&source, &destination);
    let marks = |here: &Here| here.side.edu().unwrap().marks().unwrap();
    assert_eq!(marks(&source), marks(&destination));
}

/// Unbinding waits for whoever has the device open; until then the device works, and so the VM moves.
#[test]
fn device_unbound_in_mid_precopy_moves_before_it_goes() {
    let Some([setup, destination]) = setups("unbinding edu") else { return };
    let address = setup.edu.clone().unwrap();
    let mut source = running(setup.clone());
    let unbinding = {
        let mut destination = Here::new(destination.clone()).unwrap();
        let mut unbinding = None;
        let sent = migrate(&mut source, &mut destination, Moving::default(), |_| {
            unbinding = Some(unbind(&address));
            sleep(Duration::from_millis(100));
        });
        assert_eq!(degradations(&sent.unwrap()), Vec::<String>::new());
        assert_arrived(&source, &destination);
        unbinding.unwrap()
    };
    assert!(!unbinding.is_finished(), "it waits for the source");
    drop(source);
    unbinding.join().unwrap();
    fs::write("/sys/bus/pci/drivers/edu_vfio/bind", &address).unwrap();
    assert_moves(&mut running(setup), destination);
}

fn unbind(address: &str) -> JoinHandle<()> {
    let address = address.to_owned();
    thread::spawn(move || fs::write("/sys/bus/pci/drivers/edu_vfio/unbind", address).unwrap())
}

#[test]
fn device_that_does_not_stop_aborts_and_the_next_attempt_loses_nothing() {
    let Some([source, destination]) = setups("device that does not stop") else { return };
    let _device = Parameter::set("vfio_fixture", "fault_device", &source.mdev).unwrap();
    let mut source = running(source);
    {
        const PRE_COPY_P2P_TO_STOP_COPY: &str = "115";
        let _fault = Parameter::fixture("fault_arc", PRE_COPY_P2P_TO_STOP_COPY).unwrap();
        let mut destination = Here::new(destination.clone()).unwrap();
        let error = migrate(&mut source, &mut destination, Moving::default(), |_| {}).unwrap_err();
        assert_eq!(error.source_vm(), SourceVm::AsBefore, "{}", chain(&error));
        assert!(chain(&error).contains("mdev0"), "{}", chain(&error));
    }
    assert_runs_on(&source);
    assert_moves(&mut source, destination);
}
