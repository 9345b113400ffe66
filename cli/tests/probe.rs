// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! `probe` as its user runs it, on whatever host this is.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::process::Command;

use vfio_migration::probe::{ProbeReport, Seen};

fn probe(arguments: &[&str]) -> String {
    let output =
        Command::new(env!("CARGO_BIN_EXE_vfio-migrate")).arg("probe").args(arguments).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn the_json_is_the_librarys_report_and_agrees_with_kvm() {
    let report: ProbeReport = serde_json::from_str(&probe(&["--json"])).unwrap();
    let usable = vfio_migration_integration::vmm::probe_kvm().is_ok();
    assert_eq!(matches!(report.facts.kvm, Seen::Seen(_)), usable);
    for finding in report.blockers.iter().chain(&report.degradations).chain(&report.unseen) {
        assert!(!finding.code.contains(' '), "codes are for machines: {}", finding.code);
        assert!(!finding.reason.is_empty() && !finding.remedy.is_empty(), "{}", finding.code);
    }
}

#[test]
fn the_text_names_every_finding() {
    let report: ProbeReport = serde_json::from_str(&probe(&["--json"])).unwrap();
    let text = probe(&[]);
    for part in ["KVM", "containers", "iommufd"] {
        assert!(text.contains(part), "{text}");
    }
    for finding in report.blockers.iter().chain(&report.degradations).chain(&report.unseen) {
        assert!(text.contains(&finding.code) && text.contains(&finding.remedy), "{text}");
    }
}
