// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The demo as its user runs it: what it prints, how it fails, and what it leaves behind.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::net::TcpListener;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

/// Marks the processes of one run: inherited through the environment by all of them.
const MARK: &str = "VFIO_MIGRATE_TEST_RUN";

/// A run of the demo, and the processes that belong to it.
struct Run {
    mark: String,
    child: Child,
}

impl Run {
    fn start(arguments: &[&str]) -> Self {
        static NEXT: std::sync::atomic::AtomicU32 = std::sync::atomic::AtomicU32::new(0);
        let number = NEXT.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        let mark = format!("{}-{number}", std::process::id());
        let child = Command::new(env!("CARGO_BIN_EXE_vfio-migrate"))
            .arg("demo")
            .args(arguments)
            .env(MARK, &mark)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        Self { mark, child }
    }

    /// Processes of this run whose command line has `role`; every one for an empty role.
    fn processes(&self, role: &str) -> Vec<u32> {
        let entry = format!("{MARK}={}", self.mark);
        let numbers = std::fs::read_dir("/proc")
            .unwrap()
            .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok());
        numbers
            .filter(|pid: &u32| {
                let environ = std::fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
                let command = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
                environ.split(|&byte| byte == 0).any(|variable| variable == entry.as_bytes())
                    && (role.is_empty()
                        || command.split(|&byte| byte == 0).any(|word| word == role.as_bytes()))
            })
            .collect()
    }

    fn wait_for(&self, role: &str, count: usize) -> Vec<u32> {
        let deadline = Instant::now() + Duration::from_secs(20);
        loop {
            let found = self.processes(role);
            if found.len() == count {
                return found;
            }
            assert!(Instant::now() < deadline, "{} {role} processes instead of {count}", found.len());
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// Waits for the end, and checks that no process is left.
    fn finish(self) -> Output {
        let mark = self.mark.clone();
        let output = self.child.wait_with_output().unwrap();
        let left = Run { mark, child: Command::new("true").spawn().unwrap() };
        left.wait_for("", 0);
        output
    }
}

fn demo(arguments: &[&str]) -> Output {
    Run::start(arguments).finish()
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

fn report(output: &Output) -> Value {
    assert!(output.status.success(), "{}", stderr(output));
    serde_json::from_slice(&output.stdout).unwrap()
}

/// The words of each line, with `#` for what is a figure: it differs from run to run.
fn shape(text: &str) -> Vec<Vec<String>> {
    let is_figure =
        |word: &str| word.contains(|c: char| c.is_ascii_digit()) || ["B", "KiB", "MiB"].contains(&word);
    let words = |line: &str| {
        line.split_whitespace().map(|word| if is_figure(word) { "#" } else { word }.to_owned()).collect()
    };
    text.lines().map(words).collect()
}

#[test]
fn the_demo_says_what_the_readme_shows() {
    if !has_kvm() {
        return;
    }
    let readme = include_str!("../../README.md");
    let (_, shown) = readme.split_once("$ cargo run --release -- demo\n").unwrap();
    let (shown, _) = shown.split_once("```").unwrap();
    let output = demo(&["--memory", "64M"]);
    assert!(output.status.success(), "{}", stderr(&output));
    // How it begins is told on standard error.
    let said = shown
        .split_once("Moved a KVM guest")
        .map(|(_, report)| format!("Moved a KVM guest{report}"))
        .unwrap();
    assert_eq!(shape(&String::from_utf8(output.stdout).unwrap()), shape(&said));
}

fn kill(pid: u32, signal: &str) {
    let status = Command::new("kill").args([signal, &pid.to_string()]).status().unwrap();
    assert!(status.success());
}

fn has_kvm() -> bool {
    let usable = vfio_migration_integration::vmm::probe_kvm();
    if let Err(error) = &usable {
        vfio_migration_integration::skip(format!("its half with KVM: {error}"));
    }
    usable.is_ok()
}

#[test]
fn the_report_has_every_documented_field() {
    let mut runs = vec![("--no-kvm", false)];
    if has_kvm() {
        runs.push(("--log-level=warn", true));
    }
    for (flag, kvm) in runs {
        let report = report(&demo(&[flag, "--json", "--memory", "32M", "--seed", "5"]));
        assert_eq!(report["kvm"], kvm);
        assert_eq!(report["verified"], true);
        assert_eq!(report["pages_compared"], 8192);
        assert_eq!(report["ram_bytes"], 32 << 20);
        assert_eq!(report["source_digest"], report["destination_digest"]);
        assert_eq!(report["source_digest"].as_str().unwrap().len(), 64);
        assert!(report["rounds"].as_u64().unwrap() >= 2);
        let bytes = |field: &str| report[field].as_u64().unwrap();
        let left_out = bytes("skipped_hole_bytes") + bytes("skipped_zero_bytes");
        assert!(bytes("bytes_sent") + left_out >= 32 << 20);
        assert!(report["unique_dirty_bytes"].as_u64().unwrap() > 0);
        assert!(report["downtime_ms"].as_f64().unwrap() > 0.0);
        let parts = report["downtime"].as_object().unwrap();
        let sum: f64 = parts.values().map(|part| part.as_f64().unwrap()).sum();
        assert!(
            (sum - report["downtime_ms"].as_f64().unwrap()).abs() < 0.1,
            "{parts:?} add up to the downtime"
        );
        assert!(report["total_ms"].as_f64().unwrap() > report["downtime_ms"].as_f64().unwrap());
        assert!(report["device"]["state_bytes"].as_u64().unwrap() >= 1 << 20);
        assert!(report["device"]["precopy_bytes"].as_u64().unwrap() > 0);
        let ids: Vec<_> =
            report["sources"].as_array().unwrap().iter().map(|s| s["id"].as_str().unwrap()).collect();
        let expected: &[_] =
            if kvm { &["kvm-log", "vmm-writes", "device-log"] } else { &["vmm-writes", "device-log"] };
        assert_eq!(ids, expected);
        for source in report["sources"].as_array().unwrap() {
            assert!(source["pages"].as_u64() >= source["exclusive_pages"].as_u64());
        }
    }
}

#[test]
fn every_injected_fault_is_found_for_ten_of_ten_seeds() {
    let mut faults = vec!["corrupt-page", "forget-vmm-writes", "forget-device-log"];
    let kvm = has_kvm();
    if kvm {
        faults.push("forget-kvm-log");
    }
    for fault in faults {
        for seed in 1..=10 {
            let output = demo(&["--memory", "16M", "--inject", fault, "--seed", &seed.to_string()]);
            assert_eq!(output.status.code(), Some(5), "{fault}, seed {seed}: {}", stderr(&output));
            assert!(stderr(&output).contains("the first one at GPA 0x"), "{}", stderr(&output));
        }
    }
}

#[test]
fn a_killed_destination_leaves_the_source_running_for_a_second_attempt() {
    let output = demo(&["--memory", "64M", "--inject", "kill-destination@round=2", "--json"]);
    let report = report(&output);
    assert_eq!(report["attempts"], 2);
    assert_eq!(report["verified"], true);
    assert!(stderr(&output).contains("The source's guest runs on"), "{}", stderr(&output));
}

#[test]
fn a_migration_that_fails_before_the_destination_is_killed_is_not_taken_for_the_kill() {
    let fault = "kill-destination@round=100";
    let output = demo(&["--no-kvm", "--memory", "16M", "--inject", fault, "--timeout-s", "1"]);
    assert_eq!(output.status.code(), Some(3), "{}", stderr(&output));
    assert!(stderr(&output).contains("before round 100"), "{}", stderr(&output));
}

#[test]
fn a_device_process_that_dies_is_named() {
    let run = Run::start(&["--no-kvm", "--memory", "1G", "--device-state", "64M"]);
    for device in run.wait_for("device", 2) {
        kill(device, "-KILL");
    }
    let output = run.finish();
    assert!(!output.status.success());
    let told = stderr(&output);
    let error = told.lines().find(|line| line.starts_with("error: ")).unwrap_or_default();
    assert!(error.contains("dma0"), "{told}");
}

#[test]
fn a_destination_killed_from_outside_leaves_the_guest_running() {
    let run = Run::start(&["--no-kvm", "--memory", "1G"]);
    let destination = run.wait_for("destination", 1);
    std::thread::sleep(Duration::from_millis(100));
    kill(destination[0], "-KILL");
    let output = run.finish();
    assert_eq!(output.status.code().map(|code| code == 3 || code == 4), Some(true), "{}", stderr(&output));
}

#[test]
fn the_first_signal_abandons_and_the_guest_runs_on() {
    let run = Run::start(&["--no-kvm", "--memory", "2G"]);
    run.wait_for("destination", 1);
    std::thread::sleep(Duration::from_millis(200));
    kill(run.child.id(), "-TERM");
    let output = run.finish();
    assert_eq!(output.status.code(), Some(130), "{}", stderr(&output));
    assert!(
        stderr(&output).contains("abandoned on request; the source's guest runs on"),
        "{}",
        stderr(&output)
    );
}

#[test]
fn a_killed_demo_leaves_no_process_behind() {
    let run = Run::start(&["--no-kvm", "--memory", "1G"]);
    run.wait_for("destination", 1);
    kill(run.child.id(), "-KILL");
    run.finish();
}

#[test]
fn a_port_in_use_is_named() {
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let transport = format!("tcp:{}", taken.local_addr().unwrap().port());
    let output = demo(&["--no-kvm", "--memory", "16M", "--transport", &transport]);
    assert_eq!(output.status.code(), Some(4));
    let named = format!("{}: Address already in use", taken.local_addr().unwrap());
    assert!(stderr(&output).contains(&named), "{}", stderr(&output));
}

#[test]
fn bad_options_are_named_and_start_nothing() {
    let cases: [(&[&str], &str); 9] = [
        (&["--memory", "100T"], "RAM"),
        (&["--memory", "lots"], "64M"),
        (&["--transport", "carrier-pigeon"], "carrier-pigeon"),
        (&["--inject", "everything"], "everything"),
        (&["--inject", "corrupt-page", "--transport", "unix"], "corrupt-page needs --transport tcp"),
        (&["--inject", "forget-nobody", "--memory", "16M"], "forget-nobody"),
        (&["--inject", "forget-kvm-log", "--no-kvm", "--memory", "16M"], "No dirty source is named kvm-log"),
        (&["--inject", "forget-device-log", "--device-dirty-rate", "0"], "needs a device that writes"),
        (&["--inject", "kill-destination@round=1"], "N from 2 to 100"),
    ];
    for (arguments, named) in cases {
        let output = demo(arguments);
        assert_eq!(output.status.code(), Some(2), "{arguments:?}: {}", stderr(&output));
        assert!(stderr(&output).contains(named), "{arguments:?}: {}", stderr(&output));
    }
}

#[test]
fn more_memory_than_the_host_has_is_named_before_anything_starts() {
    let report = std::fs::read_to_string("/proc/meminfo").unwrap();
    let line = report.lines().find_map(|line| line.strip_prefix("MemAvailable:")).unwrap();
    let kib: u64 = line.trim().trim_end_matches(" kB").parse().unwrap();
    let more_than_half_mib = (kib >> 11) + 1024;
    if more_than_half_mib > 128 << 10 {
        return vfio_migration_integration::skip("this host has more memory than two guests can take");
    }
    let output = demo(&["--memory", &format!("{more_than_half_mib}M"), "--json"]);
    assert_eq!(output.status.code(), Some(2), "{}", stderr(&output));
    assert!(stderr(&output).contains("Source and destination need"), "{}", stderr(&output));
    let json: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(json["verified"], false);
    assert!(json["error"].as_str().unwrap().contains("need"));
}

#[test]
fn a_sparse_vm_larger_than_the_host_moves_and_is_refused_without_the_flag() {
    let refused = demo(&["--no-kvm", "--memory", "256G"]);
    assert_eq!(refused.status.code(), Some(2), "{}", stderr(&refused));
    let with_kvm = demo(&["--memory", "256G", "--sparse"]);
    assert_eq!(with_kvm.status.code(), Some(2), "{}", stderr(&with_kvm));
    assert!(stderr(&with_kvm).contains("needs --no-kvm"), "{}", stderr(&with_kvm));
    let report = report(&demo(&["--no-kvm", "--memory", "256G", "--sparse", "--json"]));
    assert_eq!(report["verified"], true);
    assert_eq!(report["ram_bytes"], 256_u64 << 30);
    assert_eq!(report["pages_compared"], (256_u64 << 30) / 4096);
    assert_eq!(report["source_digest"], report["destination_digest"]);
    assert!(report["skipped_hole_bytes"].as_u64().unwrap() > 255 << 30);
    let parts = report["downtime"].as_object().unwrap();
    let sum: f64 = parts.values().map(|part| part.as_f64().unwrap()).sum();
    assert!((sum - report["downtime_ms"].as_f64().unwrap()).abs() < 0.1, "{parts:?} add up to the downtime");
}

#[test]
fn a_flipped_bit_in_a_sparse_vm_is_found() {
    let output = demo(&["--no-kvm", "--memory", "8G", "--sparse", "--inject", "corrupt-page"]);
    assert_eq!(output.status.code(), Some(5), "{}", stderr(&output));
}

/// The most that one process has to itself, in bytes; guest RAM is shared.
fn own_bytes(process: u32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{process}/status")).unwrap_or_default();
    let kib = |line: &str| line.strip_prefix("RssAnon:")?.split_whitespace().next()?.parse::<u64>().ok();
    status.lines().find_map(kib).unwrap_or(0) << 10
}

/// Moves a VM with an idle device's state of so many MiB; returns its downtime in milliseconds.
fn move_idle_state(mib: u64) -> f64 {
    let state = format!("{mib}M");
    let mut run = Run::start(&["--json", "--memory", "32M", "--device-state", &state]);
    let mut most = 0;
    while run.child.try_wait().unwrap().is_none() {
        most = run.processes("").into_iter().map(own_bytes).fold(most, u64::max);
        std::thread::sleep(Duration::from_millis(20));
    }
    let report = report(&run.finish());
    assert_eq!(report["verified"], true);
    let bytes = |field: &str| report["device"][field].as_u64().unwrap();
    let in_downtime = bytes("state_bytes") - bytes("precopy_bytes");
    assert!(bytes("state_bytes") >= mib << 20);
    assert!(in_downtime * 20 <= bytes("state_bytes"), "{in_downtime} bytes moved in the downtime");
    assert!((1 << 20..64 << 20).contains(&most), "a process took {most} bytes");
    eprintln!(
        "{mib} MiB: {in_downtime} bytes in the downtime, {most} bytes of memory, {}",
        report["downtime_ms"]
    );
    report["downtime_ms"].as_f64().unwrap()
}

#[test]
fn an_idle_devices_state_goes_ahead_in_little_memory() {
    move_idle_state(64);
}

#[test]
#[ignore = "an optimised build does it in seconds"]
fn an_idle_devices_gibibyte_costs_no_100_ms() {
    let downtimes = [0; 3].map(|_| move_idle_state(1024));
    assert!(downtimes.iter().any(|&ms| ms <= 100.0), "{downtimes:?} ms");
}
