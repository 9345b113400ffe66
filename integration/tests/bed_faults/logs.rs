// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A device's DMA log that fails.

use vfio_migration::transfer::SourceVm;
use vfio_migration_integration::bed::{Here, Moving, Parameter, migrate};

use crate::{assert_arrived, assert_moves, assert_runs_on, degradations, running, setups};

#[test]
fn c07_sticky_log_error_in_mid_precopy_loses_no_page() {
    let Some([source, destination]) = setups("sticky log error") else { return };
    let _device = Parameter::set("vfio_fixture", "fault_device", source.edu.as_deref().unwrap()).unwrap();
    let mut source = running(source);
    let mut destination = Here::new(destination).unwrap();
    let mut fault = None;
    let sent = migrate(&mut source, &mut destination, Moving::default(), |_| {
        fault = Some(Parameter::fixture("fault_log_report", "1").unwrap());
    });
    let sent = sent.unwrap();
    let degradations = degradations(&sent);
    assert_eq!(degradations.len(), 1, "{degradations:?}");
    assert!(degradations[0].contains("device-log:edu0") && degradations[0].contains("Input/output error"));
    assert_arrived(&source, &destination);
}

#[test]
fn log_that_does_not_start_aborts_and_the_next_attempt_succeeds() {
    let Some([source, destination]) = setups("log that does not start") else { return };
    let _device = Parameter::set("vfio_fixture", "fault_device", source.edu.as_deref().unwrap()).unwrap();
    let mut source = running(source);
    {
        let _fault = Parameter::fixture("fault_log_start", "5").unwrap();
        let mut destination = Here::new(destination.clone()).unwrap();
        let error = migrate(&mut source, &mut destination, Moving::default(), |_| {}).unwrap_err();
        assert_eq!(error.source_vm(), SourceVm::AsBefore, "{}", crate::chain(&error));
        assert!(crate::chain(&error).contains("device-log:edu0"), "{}", crate::chain(&error));
    }
    assert_runs_on(&source);
    assert_moves(&mut source, destination);
}
