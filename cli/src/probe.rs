// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Printing of what this host, and each VFIO device on it, can do for a migration.

use std::process::ExitCode;

use indicatif::HumanBytes;
use vfio_migration::probe::{
    ContainerFacts, Device, DeviceProbe, Finding, KvmFacts, LogFacts, Report, Roots, Seen, evaluate, read,
};

/// Looks at this host and prints what it found.
pub(crate) fn probe(json: bool) -> ExitCode {
    let report = evaluate(read(&Roots::default()));
    if json {
        println!("{}", serde_json::to_string(&report).expect("a report is plain data"));
    } else {
        print(&report);
    }
    ExitCode::SUCCESS
}

fn print(report: &Report) {
    let facts = &report.facts;
    println!("{:<12} Linux {}", "kernel", facts.kernel);
    println!("{:<12} {}", "KVM", seen(&facts.kvm, kvm));
    println!("{:<12} {}", "containers", seen(&facts.container, container));
    println!("{:<12} {}", "iommufd", seen(&facts.iommufd, |_| "there".to_owned()));
    if facts.devices.is_empty() {
        println!("{:<12} none is held by a VFIO driver", "devices");
    }
    for device in &facts.devices {
        print_device(device);
    }
    print_findings("blocker", &report.blockers);
    print_findings("degradation", &report.degradations);
    print_findings("unseen", &report.unseen);
    if report.blockers.is_empty() && report.degradations.is_empty() && report.unseen.is_empty() {
        println!("\nNothing stands in the way.");
    }
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

fn print_device(device: &Device) {
    let driver = device.driver.as_deref().unwrap_or("no driver");
    println!("\n{} ({driver})", device.name);
    match &device.probe {
        Seen::Seen(probe) => print_probe(probe),
        other => println!("  {}", seen(other, |_| String::new())),
    }
}

fn print_probe(probe: &DeviceProbe) {
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
    println!("  migration         {migration}");
    println!("  DMA log           {log}");
    println!("  container bitmap  {bitmap}");
    println!("  page table tracks {tracks}");
}

fn print_findings(kind: &str, findings: &[Finding]) {
    for finding in findings {
        println!(
            "\n{kind} {} ({})\n  {}\n  {}",
            finding.code, finding.subject, finding.reason, finding.remedy
        );
    }
}

fn yes(answer: bool) -> &'static str {
    if answer { "yes" } else { "no" }
}
