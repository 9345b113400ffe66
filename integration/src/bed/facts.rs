// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What the bed's guest has, if this is it.

use std::collections::BTreeMap;
use std::fs;

use crate::skipped;

const FACTS: &str = "/etc/vfio-migration-bed";

/// What the guest's init found.
#[derive(Debug, Clone)]
pub struct Bed {
    facts: BTreeMap<String, String>,
}

impl Bed {
    /// Reads what there is; outside the bed it says that `test` is skipped.
    pub fn find(test: &str) -> Option<Self> {
        let Ok(text) = fs::read_to_string(FACTS) else {
            skipped(test, "not inside the test bed (integration/testbed/run)");
            return None;
        };
        let facts = text.lines().filter_map(|line| line.split_once('='));
        Some(Self { facts: facts.map(|(key, value)| (key.to_owned(), value.to_owned())).collect() })
    }

    /// One fact; empty where init found none.
    pub fn fact(&self, key: &str) -> &str {
        self.facts.get(key).map_or("", String::as_str)
    }

    /// The two devices of a kind, one for a source and one for a destination, if there are two.
    pub fn two(&self, test: &str, kind: &str) -> Option<[String; 2]> {
        let names: Vec<_> = self.fact(kind).split_whitespace().map(str::to_owned).collect();
        let two = names.try_into().ok();
        if two.is_none() {
            let (kernel, scenario) = (self.fact("kernel"), self.fact("scenario"));
            skipped(test, format!("no two {kind} in scenario {scenario} on the {kernel} kernel"));
        }
        two
    }
}
