// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What `.ci/run` ends with: which tests ran nowhere, out of the logs of all runs.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::io::Write;
use std::process::{Command, Stdio};

/// Returns what `.ci/skips` makes of `log`.
fn skips(log: &str) -> String {
    let (succeeded, told) = run_skips(log);
    assert!(succeeded, "{told}");
    told
}

/// Returns whether `.ci/skips` can read all of `log`, and what it makes of it.
fn run_skips(log: &str) -> (bool, String) {
    let program = concat!(env!("CARGO_MANIFEST_DIR"), "/../.ci/skips");
    let mut child = Command::new(program)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::inherit())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(log.as_bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    (output.status.success(), String::from_utf8(output.stdout).unwrap())
}

/// Tests on a machine where the bed works, with one kernel of the two.
const WITH_A_BED: &str = "\
@ tests
     Running unittests src/lib.rs (target/debug/deps/vfio_migration-0123456789abcdef)
test range::a ... ok
SKIPPED kvm::ring: /dev/kvm does not open: No such file or directory
test kvm::ring ... ok
test result: ok. 2 passed; 0 failed; 0 ignored; 0 measured; 0 filtered out; finished in 0.10s
     Running tests/bed_sources/main.rs (target/debug/deps/bed_sources-fedcba9876543210)
SKIPPED hwpt::tracks: not inside the test bed (integration/testbed/run)
SKIPPED container::bits: not inside the test bed (integration/testbed/run)
test hwpt::tracks ... ok
test container::bits ... ok
test result: ok. 2 passed; 0 failed; 1 ignored; 0 measured; 0 filtered out; finished in 0.10s
     Running tests/other.rs (target/debug/deps/other-fedcba9876543210)
test container::bits ... ok
test body ... ignored, the body of what others start
test result: ok. 1 passed; 0 failed; 1 ignored; 0 measured; 0 filtered out; finished in 0.10s
   Doc-tests vfio_migration
test src/lib.rs - (line 12) ... ok
test result: ok. 1 passed; 0 failed; 0 ignored; 0 measured; 0 filtered out; finished in 0.10s
@ test bed: --test bed_sources
vfio-migration bed: /tests/0-bed_sources, 3.14 s after power-on
test container::bits ... ok
test hwpt::tracks ... SKIPPED the mock domain: only the own kernel has it
ok
test result: ok. 2 passed; 0 failed; 0 ignored; 0 measured; 0 filtered out; finished in 0.10s
@ the own kernel's build
SKIPPED test bed: the own kernel takes too long to build
";

#[test]
fn what_ran_in_any_run_is_no_skip_and_what_ran_in_none_is_named_with_the_reason() {
    let expected = "\
tests: 1 test skipped that ran elsewhere

Ran nowhere on this machine:
  test bed, the own kernel's build: the own kernel takes too long to build
  vfio_migration: kvm::ring: /dev/kvm does not open: No such file or directory
  bed_sources: hwpt::tracks: only the own kernel has it

8 passed, 0 failed, 3 skipped
";
    assert_eq!(skips(WITH_A_BED), expected);
}

#[test]
fn tests_that_share_a_reason_share_a_line() {
    let log = "\
@ tests
     Running tests/main.rs (target/debug/deps/main-0123456789abcdef)
SKIPPED one: no strace
test one ... ok
test two ... FAILED
SKIPPED three: no strace
test three ... ok
test result: FAILED. 2 passed; 1 failed; 0 ignored; 0 measured; 0 filtered out; finished in 0.10s
";
    assert_eq!(
        skips(log),
        "\nRan nowhere on this machine:\n  main: one, three: no strace\n\n2 passed, 1 failed, 2 skipped\n"
    );
}

#[test]
fn what_is_ignored_wherever_it_is_counts_as_a_skip() {
    let log = "\
@ tests
     Running tests/main.rs (target/debug/deps/main-0123456789abcdef)
test hundred ... ignored, takes minutes
test ten ... ok
test result: ok. 1 passed; 0 failed; 1 ignored; 0 measured; 1 filtered out; finished in 0.10s
";
    let named =
        "\nRan nowhere on this machine:\n  main: hundred: takes minutes\n\n1 passed, 0 failed, 1 skipped\n";
    assert_eq!(skips(log), named);
}

#[test]
fn a_skip_without_a_name_is_an_error() {
    let (succeeded, told) = run_skips("@ tests\nSKIPPED: no strace\ntest one ... ok\n");
    assert!(!succeeded && told.starts_with("This skip names no test: SKIPPED: no strace\n"), "{told}");
}

#[test]
fn where_all_ran_that_is_said() {
    let log = "@ tests\n     Running tests/main.rs (target/debug/deps/main-0)\ntest one ... ok\n\
        test result: ok. 1 passed; 0 failed;\n";
    assert_eq!(skips(log), "\nRan nowhere on this machine:\n  nothing\n\n1 passed, 0 failed, 0 skipped\n");
}
