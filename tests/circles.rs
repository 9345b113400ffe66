// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! No files of the library use each other in a circle.
//!
//! A file uses another where a `use` names something in it. That a module hands its children's items on (`pub use`) does not count, and
//! tests do not either. Folders are held to the same: one uses what any file below it uses. Of the wings of `snapshot`, each uses only
//! those below it.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

/// A module's name, as `transfer::receive`; that of the crate's root is empty.
type Module = String;

/// The text of each file below a folder, by its module; those of tests are left out.
fn files_below(folder: &Path, module: &str, files: &mut BTreeMap<Module, String>) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let stem = path.file_stem().unwrap().to_str().unwrap();
        let child = if module.is_empty() { stem.to_owned() } else { format!("{module}::{stem}") };
        if stem == "tests" {
        } else if path.is_dir() {
            files_below(&path, &child, files);
        } else {
            let module = if ["mod", "lib"].contains(&stem) { module.to_owned() } else { child };
            files.insert(module, fs::read_to_string(&path).unwrap());
        }
    }
}

/// The paths that a `use` names: `a::{b, c::d}` is `a::b` and `a::c::d`.
fn paths_of(tree: &str) -> Vec<String> {
    let Some((prefix, rest)) = tree.split_once('{') else {
        return vec![tree.split(" as ").next().unwrap().trim().to_owned()];
    };
    let inner = &rest[..rest.rfind('}').unwrap()];
    let (mut paths, mut depth, mut begin) = (Vec::new(), 0, 0);
    for (at, c) in inner.char_indices().chain([(inner.len(), ',')]) {
        match c {
            '{' => depth += 1,
            '}' => depth -= 1,
            ',' if depth == 0 => {
                let part = inner[begin..at].trim();
                if !part.is_empty() {
                    paths.extend(paths_of(&format!("{}{part}", prefix.trim())));
                }
                begin = at + 1;
            }
            _ => {}
        }
    }
    paths
}

/// What the private `use`s of a file name, its tests left out.
fn uses_of(text: &str) -> Vec<String> {
    let code: Vec<_> = text.lines().map(|line| line.split("//").next().unwrap()).collect();
    let code = code.join("\n");
    let code = code.split("#[cfg(test)]\nmod tests").next().unwrap();
    let statements = code.split(';').filter_map(|statement| {
        let begin = statement.rfind("\nuse ").map(|at| at + 5).or(statement.starts_with("use ").then_some(4));
        begin.map(|begin| statement[begin..].to_owned())
    });
    statements.flat_map(|tree| paths_of(&tree)).collect()
}

/// The file that `path` leads to from `module`; `None` where it is of another crate.
fn file_of(path: &str, module: &str, files: &BTreeMap<Module, String>) -> Option<Module> {
    let mut base: Vec<&str> = module.split("::").filter(|name| !name.is_empty()).collect();
    let mut names: Vec<&str> = path.split("::").map(str::trim).collect();
    match names[0] {
        "crate" => base.clear(),
        "super" | "self" => {}
        child if files.contains_key(&[&base[..], &[child]].concat().join("::")) => {}
        _ => return None,
    }
    while let Some(&first @ ("crate" | "super" | "self")) = names.first() {
        if first == "super" {
            base.pop();
        }
        names.remove(0);
    }
    let full = [base, names].concat();
    (0..=full.len()).rev().map(|length| full[..length].join("::")).find(|name| files.contains_key(name))
}

/// The files that each file uses.
fn direct_uses(files: &BTreeMap<Module, String>) -> Uses {
    let uses = |(module, text): (&Module, &String)| {
        let used = uses_of(text).into_iter().filter_map(|path| file_of(&path, module, files));
        (module.clone(), used.filter(|used| used != module).collect())
    };
    files.iter().map(uses).collect()
}

/// All that can be reached from each.
fn reach(mut reach: Uses) -> Uses {
    loop {
        let mut grown = reach.clone();
        for all in grown.values_mut() {
            let further: Vec<_> =
                all.iter().filter_map(|module| reach.get(module)).flatten().cloned().collect();
            all.extend(further);
        }
        if grown == reach {
            return reach;
        }
        reach = grown;
    }
}

/// What each file uses.
type Uses = BTreeMap<Module, BTreeSet<Module>>;

/// The circles: each as the files in it, sorted.
fn circles(files: &BTreeMap<Module, String>) -> BTreeSet<Vec<Module>> {
    circles_of(direct_uses(files))
}

/// The circles of what lies in `folder`: a file or a folder in it uses what any file below it uses.
fn circles_in(folder: &str, direct: &Uses) -> BTreeSet<Vec<Module>> {
    let item_of = |module: &str| {
        let inner =
            if folder.is_empty() { module } else { module.strip_prefix(folder)?.strip_prefix("::")? };
        let item = inner.split("::").next().filter(|item| !item.is_empty())?;
        Some(if folder.is_empty() { item.to_owned() } else { format!("{folder}::{item}") })
    };
    let mut uses = Uses::new();
    for (module, used) in direct {
        let Some(item) = item_of(module) else { continue };
        let others: BTreeSet<_> = used.iter().filter_map(|used| item_of(used)).collect();
        uses.entry(item.clone()).or_default().extend(others.into_iter().filter(|other| *other != item));
    }
    circles_of(uses)
}

/// The circles: each as what is in it, sorted.
fn circles_of(direct: Uses) -> BTreeSet<Vec<Module>> {
    let reach = reach(direct);
    let members = reach.iter().filter(|(module, all)| all.contains(*module));
    members
        .map(|(module, all)| all.iter().filter(|other| reach[*other].contains(module)).cloned().collect())
        .collect()
}

#[test]
fn no_files_use_each_other_in_a_circle() {
    let mut files = BTreeMap::new();
    files_below(&Path::new(env!("CARGO_MANIFEST_DIR")).join("src"), "", &mut files);
    assert!(files.len() > 100);
    let found = circles(&files);
    assert!(found.is_empty(), "{found:#?}");
}

#[test]
fn no_folders_use_each_other_in_a_circle() {
    let mut files = BTreeMap::new();
    files_below(&Path::new(env!("CARGO_MANIFEST_DIR")).join("src"), "", &mut files);
    let folders = files.keys().flat_map(|module| {
        let ends = module.match_indices("::").map(|(at, _)| at);
        ends.map(|end| module[..end].to_owned()).chain([String::new()]).collect::<Vec<_>>()
    });
    let folders: BTreeSet<_> = folders.collect();
    assert!(folders.contains("snapshot::write"));
    let direct = direct_uses(&files);
    let found: Vec<_> = folders.iter().flat_map(|folder| circles_in(folder, &direct)).collect();
    assert!(found.is_empty(), "{found:#?}");
}

/// The wings of `snapshot`, the lowest first.
const WINGS: [&str; 7] = ["format", "disk", "read", "write", "ops", "passed", "migrate"];

/// The uses of a higher wing of `snapshot` by a lower one: the file, and what it names.
fn upward_uses(files: &BTreeMap<Module, String>) -> Vec<(Module, String)> {
    let wing_of = |name: &str| WINGS.iter().position(|wing| *wing == name);
    let mut upward = Vec::new();
    for (module, text) in files {
        let Some(own) = module.strip_prefix("snapshot::").and_then(|rest| wing_of(rest.split("::").next()?))
        else {
            continue;
        };
        for path in uses_of(text) {
            let used = path.strip_prefix("crate::snapshot::");
            if used.and_then(|rest| wing_of(rest.split("::").next()?)).is_some_and(|used| used > own) {
                upward.push((module.clone(), path));
            }
        }
    }
    upward
}

#[test]
fn no_wing_of_snapshots_uses_one_above_it() {
    let mut files = BTreeMap::new();
    files_below(&Path::new(env!("CARGO_MANIFEST_DIR")).join("src"), "", &mut files);
    for wing in WINGS {
        assert!(files.contains_key(&format!("snapshot::{wing}")), "{wing}");
    }
    assert_eq!(upward_uses(&files), []);

    let reader =
        "use crate::snapshot::disk::Directory;\nuse crate::snapshot::write::{Base, SnapshotWriter};\n";
    files.insert("snapshot::read::full".to_owned(), reader.to_owned());
    let found: Vec<_> = upward_uses(&files).into_iter().map(|(_, path)| path).collect();
    assert_eq!(found, ["crate::snapshot::write::Base", "crate::snapshot::write::SnapshotWriter"]);
}

#[test]
fn a_circle_is_found_and_named_and_what_is_handed_on_is_none() {
    let files = |texts: &[(&str, &str)]| {
        texts.iter().map(|(module, text)| ((*module).to_owned(), (*text).to_owned())).collect()
    };
    let sound = files(&[
        ("", "pub mod a;\npub mod b;"),
        ("a", "//! Use.\npub use self::deep::Deep;\nuse std::fs;\n\nuse crate::b::{self, B};"),
        ("a::deep", "use super::A;\n"),
        ("b", "#[cfg(test)]\nmod tests {\n    use crate::a::A;\n}\n"),
    ]);
    assert_eq!(circles(&sound), BTreeSet::new());

    let circle = files(&[
        ("", ""),
        ("a", "use crate::{\n    b::{C, d::D},\n    x,\n};\n"),
        ("b", "use self::d::D;\n"),
        ("b::d", "use crate::a::A as Other;\n"),
        ("c", "use crate::a;\n"),
    ]);
    let expected = ["a", "b", "b::d"].map(str::to_owned).to_vec();
    assert_eq!(circles(&circle), BTreeSet::from([expected]));

    // No two files, but two folders.
    let folders = files(&[
        ("", ""),
        ("a", ""),
        ("a::x", "use crate::b::y::Y;\n"),
        ("a::z", ""),
        ("b", ""),
        ("b::y", "use crate::a::z::Z;\n"),
    ]);
    assert_eq!(circles(&folders), BTreeSet::new());
    assert_eq!(
        circles_in("", &direct_uses(&folders)),
        BTreeSet::from([["a", "b"].map(str::to_owned).to_vec()])
    );
    assert_eq!(circles_in("a", &direct_uses(&folders)), BTreeSet::new());
}
