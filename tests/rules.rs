// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Keeps `docs/rules.md` true: every rule is there, and every test it names exists.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

/// Names of all functions in the workspace's Rust files.
fn functions(folder: &Path, found: &mut BTreeSet<String>) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            functions(&path, found);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            let text = fs::read_to_string(&path).unwrap();
            let names = text.split("fn ").skip(1).filter_map(|rest| rest.split(['(', '<']).next());
            found.extend(names.map(str::to_owned));
        }
    }
}

#[test]
fn every_rule_has_its_tests_or_a_reason() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut known = BTreeSet::new();
    for folder in ["src", "tests", "vm-migration", "integration", "cli"] {
        functions(&root.join(folder), &mut known);
    }
    let text = fs::read_to_string(root.join("docs/rules.md")).unwrap();
    let mut next = 1;
    for row in text.lines().filter(|line| line.starts_with("| C")) {
        let number = format!("C{next:02}");
        let cells: Vec<_> = row.split('|').map(str::trim).collect();
        assert_eq!(cells[1], number, "rules are in order and none is left out");
        next += 1;
        if cells[3].starts_with("why not") {
            assert!(cells[3].len() > "why not: ".len(), "{number} has no reason");
            continue;
        }
        let tests: Vec<_> = cells[3].split('`').skip(1).step_by(2).collect();
        assert!(!tests.is_empty(), "{number} names no test");
        for test in tests {
            assert!(known.contains(test), "{number} names {test}, which does not exist");
            assert!(test.contains(&number.to_lowercase()), "{test} does not bear the number of {number}");
        }
    }
    assert_eq!(next, 45, "there are 44 rules");
}
