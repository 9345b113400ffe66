// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Printing of what this host, and each VFIO device on it, can do for a migration.

use std::fmt::{self, Write};
use std::process::ExitCode;

use indicatif::HumanBytes;
use vfio_migration::probe::{
    ContainerFacts, DeviceProbe, KvmFacts, LogFacts, ProbeFinding, ProbeReport, ProbedDevice, Roots, Seen,
    evaluate, read,
};

use crate::output::Output;

/// Looks at this host and prints what it found.
pub(crate) fn probe(json: bool) -> ExitCode {
    let report = evaluate(read(&Roots::default()));
    Output::new(json).result(&report, || text(&report));
    ExitCode::SUCCESS
}

/// The report for a person, with no line break at its end.
fn text(report: &ProbeReport) -> String {
    let mut text = String::new();
    write_report(report, &mut text).expect("memory takes every write");
    text.truncate(text.trim_end().len());
    text
}

fn write_report(report: &ProbeReport, text: &mut String) -> fmt::Result {
    let facts = &report.facts;
    writeln!(text, "{:<12} Linux {}", "kernel", facts.kernel)?;
    writeln!(text, "{:<12} {}", "KVM", seen(&facts.kvm, kvm))?;
    writeln!(text, "{:<12} {}", "containers", seen(&facts.container, container))?;
    writeln!(text, "{:<12} {}", "iommufd", seen(&facts.iommufd, |_| "there".to_owned()))?;
    if facts.devices.is_empty() {
        writeln!(text, "{:<12} none is held by a VFIO driver", "devices")?;
    }
    for device in &facts.devices {
        write_device(device, text)?;
    }
    write_findings("blocker", &report.blockers, text)?;
    write_findings("degradation", &report.degradations, text)?;
    write_findings("unseen", &report.unseen, text)?;
    if report.blockers.is_empty() && report.degradations.is_empty() && report.unseen.is_empty() {
        writeln!(text, "\nNothing stands in the way.")?;
    }
    Ok(())
}

fn seen<T>(seen: &Seen<T>, describe: impl Fn(&T) -> String) -> String {
    match seen {
        Seen::Seen(found) => describe(found),
        Seen::Absent => "absent".to_owned(),
        Seen::Unseen { reason } => format!("could not be looked at: {reason}"),
    }
}

fn kvm(facts: &KvmFacts) -> String {
    let ring = match facts.ring_max_bytes {
        Some(bytes) => format!("dirty ring of up to {}", HumanBytes(bytes.into())),
        None => "no dirty ring".to_owned(),
    };
    format!(
        "manual protection {}, initially set {}, {ring}",
        yes(facts.manual_protect),
        yes(facts.initially_set)
    )
}

fn container(facts: &ContainerFacts) -> String {
    if facts.type1v2 { "type 1 version 2" } else { "no type 1 version 2, so no dirty bitmap" }.to_owned()
}

fn write_device(device: &ProbedDevice, text: &mut String) -> fmt::Result {
    let driver = device.driver.as_deref().unwrap_or("no driver");
    writeln!(text, "\n{} ({driver})", device.name)?;
    match &device.probe {
        Seen::Seen(probe) => write_probe(probe, text),
        other => writeln!(text, "  {}", seen(other, |_| String::new())),
    }
}

fn write_probe(probe: &DeviceProbe, text: &mut String) -> fmt::Result {
    let migration = match &probe.migration {
        Some(facts) => format!(
            "STOP_COPY {}, P2P {}, PRE_COPY {}, state of {}",
            yes(facts.stop_copy),
            yes(facts.p2p),
            yes(facts.pre_copy),
            facts.stop_copy_bytes.map_or("unknown size".to_owned(), |bytes| HumanBytes(bytes).to_string()),
        ),
        None => "none".to_owned(),
    };
    let log = match &probe.log {
        LogFacts::Absent => "none".to_owned(),
        LogFacts::Unreportable => "there, but this kernel cannot report it".to_owned(),
        LogFacts::Fails { reason } => format!("does not start: {reason}"),
        LogFacts::Works { granule_bytes } => format!("works, a bit for {}", HumanBytes(*granule_bytes)),
    };
    let bitmap = match &probe.container_bitmap {
        Some(facts) => format!("page sizes {:#x}, up to {}", facts.page_sizes, HumanBytes(facts.max_bytes)),
        None => "none".to_owned(),
    };
    let tracks = match probe.page_table_tracks {
        Some(tracks) => yes(tracks),
        None => "could not be asked",
    };
    writeln!(text, "  migration         {migration}")?;
    writeln!(text, "  DMA log           {log}")?;
    writeln!(text, "  container bitmap  {bitmap}")?;
    writeln!(text, "  page table tracks {tracks}")
}

fn write_findings(kind: &str, findings: &[ProbeFinding], text: &mut String) -> fmt::Result {
    for finding in findings {
        writeln!(
            text,
            "\n{kind} {} ({})\n  {}\n  {}",
            finding.code, finding.subject, finding.reason, finding.remedy
        )?;
    }
    Ok(())
}

fn yes(answer: bool) -> &'static str {
    if answer { "yes" } else { "no" }
}
