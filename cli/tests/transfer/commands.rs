// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! `snapshot` and what the tool says of itself.

use std::fs::{self, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;

use serde_json::Value;
use vfio_migration::snapshot::{CONFIG_FILE, MANIFEST_FILE, MEMORY_FILE, STATE_FILE};
use vfio_migration_integration::skip;

use crate::stored::{Place, assert_same, assert_sound};
use crate::tool::{Ended, Tool, run};

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// Runs `snapshot` with `arguments` and `--json`.
fn snapshot(arguments: &[&str]) -> Ended {
    run([&["snapshot"], arguments, &["--json"]].concat())
}

fn result(arguments: &[&str]) -> Value {
    snapshot(arguments).succeeded().last()
}

/// Flips a bit of a byte of a file.
fn flip(file: &Path, offset: u64) {
    let file = OpenOptions::new().read(true).write(true).open(file).unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, offset).unwrap();
    file.write_all_at(&[byte[0] ^ 0x10], offset).unwrap();
}

#[test]
fn a_sound_snapshot_verifies_and_is_described() {
    let place = Place::new();
    let stored = place.stored("stored", 1);
    let report = result(&["verify", text(&stored)]);
    assert_eq!(report["findings"], Value::Array(Vec::new()));
    assert!(report["bytes"].as_u64().unwrap() >= 64 << 20);
    let info = result(&["info", text(&stored)]);
    assert_eq!(info["kind"], "full");
    assert_eq!(info["memory_bytes"], 64 << 20);
    assert_eq!(info["digest"].as_str().unwrap().len(), 64);
    let populated = info["populated_bytes"].as_u64().unwrap();
    assert!((13 << 20..32 << 20).contains(&populated), "{populated}");
}

#[test]
fn a_flipped_bit_anywhere_is_found_and_named() {
    for (file, offset, named) in [
        (MEMORY_FILE, 0x50_1234, "Memory at GPA 0x500000..0x504000"),
        (MEMORY_FILE, 0x20_0000, "Memory at GPA 0x200000..0x204000"),
        (STATE_FILE, 3, "state.json"),
        (MANIFEST_FILE, 200, "snapshot-manifest is damaged"),
    ] {
        let place = Place::new();
        let stored = place.stored("stored", 1);
        flip(&stored.join(file), offset);
        let ended = snapshot(&["verify", text(&stored)]);
        assert_eq!(ended.code, Some(5), "{file}: {ended:?}");
        let finding = ended.last()["findings"][0].as_str().unwrap().to_owned();
        assert!(finding.contains(named), "{finding}");
    }
}

#[test]
fn a_chain_of_differentials_is_made_compared_and_applied() {
    let place = Place::new();
    let full = place.stored("full", 1);
    let later = place.stored("later", 2);
    let last = place.stored("last", 3);
    let (one, two, whole) = (place.path("one"), place.path("two"), place.path("whole"));
    result(&["create", "--from", text(&later), "--base", text(&full), "--into", text(&one)]);
    let chain = ["--base", text(&full), "--base", text(&one)];
    result(&[&["create", "--from", text(&last), "--into", text(&two)], &chain[..]].concat());
    assert_sound(&two);
    let info = result(&["info", text(&two)]);
    assert_eq!(info["kind"], "differential");
    assert_eq!(info["base"], result(&["info", text(&one)])["digest"]);

    snapshot(&["diff", text(&full), text(&last)]).failed(1, "");
    result(&[&["diff", text(&last), text(&two)], &chain[..]].concat());
    result(&["apply", text(&full), text(&one), text(&two), "--into", text(&whole)]);
    let same = result(&["diff", text(&last), text(&whole)]);
    assert_eq!(same["memory"], Value::Array(Vec::new()));
    for file in [CONFIG_FILE, STATE_FILE, MEMORY_FILE] {
        assert_eq!(fs::read(last.join(file)).unwrap(), fs::read(whole.join(file)).unwrap());
    }

    // A wrong base is refused.
    let wrong = place.path("wrong");
    snapshot(&["apply", text(&later), text(&one), "--into", text(&wrong)]).failed(2, "is a differential to");
    // A damaged block of the base is found on the way.
    flip(&full.join(MEMORY_FILE), 0x20_3000);
    snapshot(&["apply", text(&full), text(&one), "--into", text(&wrong)]).failed(5, "was altered");
    assert!(!wrong.exists());
}

#[test]
fn a_differential_is_received_and_applied() {
    let place = Place::new();
    let base = place.stored("base", 1);
    let now = place.stored("now", 2);
    let (into, whole) = (place.path("into"), place.path("whole"));
    let (receiver, url) = Tool::receive("tcp:127.0.0.1:0", &into, &["--base", text(&base)]);
    Tool::send(&url, &now, &[]).end().succeeded();
    receiver.end().succeeded();
    assert_eq!(result(&["info", text(&into)])["kind"], "differential");
    result(&["apply", text(&base), text(&into), "--into", text(&whole)]);
    let same = result(&["diff", text(&now), text(&whole)]);
    assert_eq!(same["memory"], Value::Array(Vec::new()));
    Tool::send("tcp:127.0.0.1:1", &into, &[]).end().failed(2, "is a differential, not a full snapshot");
}

#[test]
fn a_snapshot_without_a_manifest_is_sealed() {
    let place = Place::new();
    let stored = place.stored("stored", 1);
    let digest = result(&["info", text(&stored)])["digest"].clone();
    let bare = place.stored("bare", 1);
    fs::remove_file(bare.join(MANIFEST_FILE)).unwrap();
    snapshot(&["verify", text(&bare)]).failed(2, "has no snapshot-manifest");
    let into = place.path("into");
    let create = ["create", "--from", text(&stored), "--base", text(&bare), "--into", text(&into)];
    snapshot(&create).failed(2, "has no manifest");
    // What a seal that was killed leaves disturbs nobody, and goes with the next one.
    let partial = |dir: &Path| dir.join(format!(".{MANIFEST_FILE}.partial-0123456789abcdef"));
    for dir in [&stored, &bare] {
        fs::write(partial(dir), "half a manifest").unwrap();
    }
    assert_sound(&stored);
    assert_eq!(result(&["info", text(&bare)])["digest"], Value::Null);
    for dir in [&stored, &bare] {
        assert_eq!(result(&["seal", text(dir)])["digest"], digest);
        assert!(!partial(dir).exists());
    }
    assert_same(&stored, &bare);
}

#[test]
fn a_snapshot_whose_texts_were_edited_is_sealed_as_it_stands() {
    let place = Place::new();
    let stored = place.stored("stored", 1);
    fs::remove_file(stored.join(MANIFEST_FILE)).unwrap();
    for name in [CONFIG_FILE, STATE_FILE] {
        let value: Value = serde_json::from_slice(&fs::read(stored.join(name)).unwrap()).unwrap();
        fs::write(stored.join(name), format!("\n{value:#}\n")).unwrap();
    }
    result(&["seal", text(&stored)]);
    result(&["verify", text(&stored)]);
    let whole = place.path("whole");
    result(&["apply", text(&stored), "--into", text(&whole)]);
    result(&["diff", text(&stored), text(&whole)]);
}

#[test]
fn every_command_that_reads_a_state_takes_its_limit() {
    let place = Place::new();
    let (full, later) = (place.stored("full", 1), place.stored("later", 2));
    let bare = place.stored("bare", 3);
    fs::remove_file(bare.join(MANIFEST_FILE)).unwrap();
    let into = |name| place.path(name).to_str().unwrap().to_owned();
    let (made, whole, received) = (into("made"), into("whole"), into("received"));
    let commands: [&[&str]; 7] = [
        &["send", "tcp:127.0.0.1:1", "--from", text(&full)],
        &["receive", "tcp:127.0.0.1:0", "--into", &received, "--base", text(&full)],
        &["snapshot", "info", text(&full)],
        &["snapshot", "seal", text(&bare)],
        &["snapshot", "diff", text(&full), text(&full)],
        &["snapshot", "create", "--from", text(&later), "--base", text(&full), "--into", &made],
        &["snapshot", "apply", text(&full), "--into", &whole],
    ];
    for command in commands {
        let ended = run([command, &["--state-limit", "64"]].concat());
        ended.failed(2, "state.json has more than 64 bytes, the limit (--state-limit sets the limit)");
    }
    let ended = run(["snapshot", "verify", text(&full), "--state-limit", "64"]);
    ended.failed(2, "state.json has more than 64 bytes, the limit (--state-limit sets the limit)");
    // Those that need nobody else do their work where the limit is wide.
    for command in &commands[2..] {
        run([command, &["--state-limit", "8G"][..]].concat()).succeeded();
    }
    run(["snapshot", "verify", text(&full), "--state-limit", "8G"]).succeeded();
}

#[test]
fn people_are_told_in_sentences() {
    let place = Place::new();
    let stored = place.stored("stored", 1);
    let ended = run(["snapshot", "verify", text(&stored)]).succeeded();
    assert!(ended.stdout.contains("every byte is as it was written"), "{ended:?}");
    let ended = run(["snapshot", "info", text(&stored)]).succeeded();
    assert!(ended.stdout.contains("full snapshot"), "{ended:?}");
    let ended = run(["snapshot", "diff", text(&stored), text(&stored)]).succeeded();
    assert_eq!(ended.stdout, "no difference\n");
}

#[test]
fn bash_completes_the_options_of_every_command() {
    let place = Place::new();
    let script = place.path("completions.bash");
    fs::write(&script, run(["completions", "bash"]).succeeded().stdout).unwrap();
    for (words, expected) in [
        ("rec", "receive"),
        ("receive unix:/socket --che", "--checkpoint"),
        ("snapshot ver", "verify"),
        ("snapshot apply --in", "--into"),
        ("send --timeout-strategy ca", "cancel"),
        ("--log-level de", "debug"),
    ] {
        let ask = format!(
            r#"source {}; COMP_WORDS=(vfio-migrate {words}); COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1))
            function=$(complete -p vfio-migrate | sed 's/.*-F \([^ ]*\) .*/\1/')
            $function vfio-migrate "${{COMP_WORDS[COMP_CWORD]}}" "${{COMP_WORDS[COMP_CWORD - 1]}}"
            echo "${{COMPREPLY[@]}}""#,
            text(&script)
        );
        match Command::new("bash").args(["-c", &ask]).output() {
            Ok(told) => {
                assert_eq!(String::from_utf8_lossy(&told.stdout).trim(), expected, "{words}: {told:?}");
            }
            Err(error) => return skip(format!("no bash: {error}")),
        }
    }
}

#[test]
fn completions_and_manual_pages_name_every_command() {
    let commands = ["receive", "send", "snapshot", "demo"];
    for shell in ["bash", "zsh", "fish"] {
        let ended = run(["completions", shell]).succeeded();
        assert!(commands.iter().all(|command| ended.stdout.contains(command)), "{shell}");
    }
    run(["man", "--into", "/nonexistent"])
        .failed(4, "Cannot write the manual pages into /nonexistent: No such file");
    let page = run(["man"]).succeeded().stdout;
    assert!(page.starts_with(".ie") || page.contains(".TH vfio-migrate 1"), "{page}");
    let place = Place::new();
    run(["man", "--into", text(place.root())]).succeeded();
    for page in ["vfio-migrate.1", "vfio-migrate-receive.1", "vfio-migrate-snapshot-verify.1"] {
        assert!(place.path(page).exists(), "{page}");
    }
}
