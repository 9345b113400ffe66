// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! No two public types of the library have the same name, so that a reader who searches for one finds one.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

/// Files that stand in for others, with the same types, while a feature is off.
const STAND_INS: [&str; 2] = ["without_state.rs", "without_tls.rs"];

/// Adds where each public type below a folder is defined, by its name.
fn types_below(folder: &Path, types: &mut BTreeMap<String, Vec<PathBuf>>) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            types_below(&path, types);
        } else if !STAND_INS.iter().any(|name| path.ends_with(name)) {
            for name in types_of(&fs::read_to_string(&path).unwrap()) {
                types.entry(name).or_default().push(path.clone());
            }
        }
    }
}

/// The names of the public structs, enums, traits and aliases that a text defines.
fn types_of(text: &str) -> impl Iterator<Item = String> {
    text.lines().filter_map(|line| {
        let mut words = line.trim_start().strip_prefix("pub ")?.split_whitespace();
        let word = words.find(|word| *word != "unsafe")?;
        let name = words.next().filter(|_| ["struct", "enum", "trait", "type", "union"].contains(&word))?;
        Some(name.split(|c: char| !c.is_alphanumeric() && c != '_').next()?.to_owned())
    })
}

#[test]
fn no_two_public_types_have_the_same_name() {
    let mut types = BTreeMap::new();
    types_below(&Path::new(env!("CARGO_MANIFEST_DIR")).join("src"), &mut types);
    assert!(types.len() > 100, "the search found {} types", types.len());
    types.retain(|_, files| files.len() > 1);
    assert!(types.is_empty(), "public types of the same name: {types:#?}");
}

#[test]
fn the_search_sees_every_kind_of_type() {
    let text = "pub struct A;\n    pub enum B<T> {\npub(crate) struct C;\npub unsafe trait D: X {\npub type E = u8;\npub fn f() {}";
    assert_eq!(types_of(text).collect::<Vec<_>>(), ["A", "B", "D", "E"]);
}
