// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The model of a migration finds nothing wrong with the library, and every mistake that is made on purpose.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::process::{Command, Output};

use clap::ValueEnum;
use vfio_migration_integration::model::{LARGE, Mutation, SMALL, explore};

fn model(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_model")).args(arguments).output().unwrap()
}

#[test]
fn no_page_is_lost_and_never_do_two_run_whatever_happens() {
    for scenario in &SMALL {
        let explored = explore(scenario, None).unwrap_or_else(|violation| panic!("{violation}"));
        assert!(explored.handed_over > 0, "{}: no migration succeeds", scenario.name);
    }
}

#[test]
fn every_mistake_is_found_on_a_shortest_way() {
    for &mutation in Mutation::value_variants() {
        let scenario =
            SMALL.iter().chain(&LARGE).find(|scenario| scenario.name == mutation.scenario()).unwrap();
        let Err(violation) = explore(scenario, Some(mutation)) else {
            panic!("{mutation} is not found in scenario {}", scenario.name);
        };
        assert!(!violation.trace.is_empty(), "{mutation}");
    }
}

#[test]
fn mutations_are_listed_and_their_exit_status_tells() {
    let listed = String::from_utf8(model(&["--list"]).stdout).unwrap();
    assert_eq!(listed.lines().count(), Mutation::value_variants().len());
    assert!(listed.lines().count() >= 14);
    let found = model(&["--mutation", "commit-on-send"]);
    let told = String::from_utf8(found.stdout).unwrap();
    assert_eq!(found.status.code(), Some(1));
    assert!(told.contains("  1. a migration to receiver 0 begins") && told.contains("Violation: "), "{told}");
    assert_eq!(model(&["--scenario", "writes"]).status.code(), Some(0));
    assert_eq!(model(&["--mutation", "no-such-mutation"]).status.code(), Some(2));
    let elsewhere = model(&["--mutation", "stop-before-p2p", "--scenario", "writes"]);
    let told = String::from_utf8(elsewhere.stdout).unwrap();
    assert_eq!(elsewhere.status.code(), Some(3), "{told}");
    let scenario = Mutation::StopBeforeP2p.scenario();
    assert!(
        told.contains(&format!("stop-before-p2p is not found here; it shows in scenario {scenario}")),
        "{told}"
    );
    let help = model(&["--help"]);
    let told = String::from_utf8(help.stdout).unwrap();
    assert_eq!(help.status.code(), Some(0));
    let words = ["--list", "--mutation <NAME>", "--scenario <NAME>", "Exit status:", "writes"];
    assert!(words.iter().all(|word| told.contains(word)), "{told}");
}
