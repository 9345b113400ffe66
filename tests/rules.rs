// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Keeps `docs/rules.md` true: every rule is there, and every test it names exists.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

/// Names of the tests in a Rust file: functions that `#[test]` stands before, if need be with more attributes or comments between.
fn tests_in(text: &str) -> Vec<String> {
    let (mut names, mut marked) = (Vec::new(), false);
    for line in text.lines().map(str::trim) {
        if let Some(rest) = line.strip_prefix("fn ")
            && marked
        {
            names.extend(rest.split(['(', '<']).next().map(str::to_owned));
        }
        let between = line.starts_with("#[") || line.starts_with("//");
        marked = line == "#[test]" || marked && between;
    }
    names
}

/// Names of all tests in the Rust files below a folder.
fn tests_below(folder: &Path, found: &mut BTreeSet<String>) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            tests_below(&path, found);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            found.extend(tests_in(&fs::read_to_string(&path).unwrap()));
        }
    }
}

#[test]
fn only_a_function_marked_as_a_test_is_one() {
    let marked =
        "#[test]\nfn plain() {}\n    #[test]\n    #[ignore]\n    /// Why.\n    fn inner(x in 0..9u8) {}";
    assert_eq!(tests_in(marked), ["plain", "inner"]);
    assert!(
        tests_in("#[test]\nmod other;\nfn apart() {}\n// #[test]\nfn commented() {}\nfn bare() {}")
            .is_empty()
    );
}

#[test]
fn every_rule_has_its_tests_or_a_reason() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut known = BTreeSet::new();
    for folder in ["src", "tests", "vm-migration", "integration", "cli"] {
        tests_below(&root.join(folder), &mut known);
    }
    let text = fs::read_to_string(root.join("docs/rules.md")).unwrap();
    let mut numbers = Vec::new();
    for row in text.lines().filter(|line| line.starts_with("| C")) {
        let cells: Vec<_> = row.split('|').map(str::trim).collect();
        let number = cells[1].to_owned();
        numbers.push(number.clone());
        if cells[3].starts_with("why not") {
            assert!(cells[3].len() > "why not: ".len(), "{number} has no reason");
            continue;
        }
        let tests: Vec<_> = cells[3].split('`').skip(1).step_by(2).collect();
        assert!(!tests.is_empty(), "{number} names no test");
        for test in tests {
            assert!(known.contains(test), "{number} names {test}, which is no test");
            assert!(test.contains(&number.to_lowercase()), "{test} does not bear the number of {number}");
        }
    }
    assert!(numbers.is_sorted(), "rules are in order");
    let expected: Vec<_> = (1..=69).map(|number| format!("C{number:02}")).collect();
    assert!(numbers == expected, "every rule up to C69 is there");
}
