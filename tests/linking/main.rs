// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Linking the library changes nothing about a VMM but what it asks for.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::fs;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;

use rustls::server::{ClientHello, ResolvesServerCert};
use rustls::sign::CertifiedKey;
use rustls::{Error, PeerIncompatible, ServerConfig, ServerConnection};

const LIBRARY: &str = env!("CARGO_MANIFEST_DIR");

/// What cargo prints when it does as `arguments` say, in `directory`, without a network and with this build's target directory.
fn cargo(directory: &Path, arguments: &[&str]) -> String {
    let target = Path::new(env!("CARGO_TARGET_TMPDIR")).parent().unwrap();
    let output = Command::new(env!("CARGO"))
        .args(arguments)
        .arg("--offline")
        .current_dir(directory)
        .env("CARGO_TARGET_DIR", target)
        .output()
        .unwrap();
    assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

/// A crate outside of any workspace, with `dependencies` and the versions that were tried.
fn embedder(dependencies: &str) -> tempfile::TempDir {
    let directory = tempfile::tempdir().unwrap();
    let manifest = format!(
        "[package]\nname = \"embedder\"\nversion = \"0.1.0\"\nedition = \"2024\"\n[workspace]\n[dependencies]\n{dependencies}"
    );
    fs::write(directory.path().join("Cargo.toml"), manifest).unwrap();
    fs::create_dir(directory.path().join("src")).unwrap();
    fs::write(directory.path().join("src/lib.rs"), include_str!("embedder.rs")).unwrap();
    fs::copy(Path::new(LIBRARY).join("Cargo.lock"), directory.path().join("Cargo.lock")).unwrap();
    directory
}

/// Crates that only some features need.
const OPTIONAL: [&str; 7] =
    ["rustls ", "ring ", "blake3 ", "socket2 ", "versionize ", "versionize_derive ", "base64 "];

/// Which of [`OPTIONAL`] the library depends on with these `features`.
fn pulled_in(features: &[&str]) -> Vec<&'static str> {
    let arguments = ["tree", "--locked", "-e", "normal", "--prefix", "none", "-p", "vfio-migration"];
    let tree = cargo(Path::new(LIBRARY), &[&arguments, features].concat());
    OPTIONAL.into_iter().filter(|name| tree.lines().any(|line| line.starts_with(name))).collect()
}

#[test]
fn the_dirty_path_alone_pulls_in_neither_tls_nor_hashes_nor_sockets_nor_a_saved_form() {
    assert_eq!(pulled_in(&["--no-default-features"]), [""; 0]);
    assert_eq!(pulled_in(&[]), OPTIONAL);
}

#[test]
fn tls_brings_cryptography_only_where_it_is_asked_for() {
    // A second one beside the VMM's, and rustls chooses none by itself.
    let with = |features| pulled_in(&["--no-default-features", "--features", features]);
    assert!(with("tls").contains(&"rustls ") && !with("tls").contains(&"ring "));
    assert!(with("ring").contains(&"ring "));
}

#[test]
fn the_tool_without_its_demo_builds_no_vmm_and_no_guest() {
    let tree = |features: &[&str]| {
        let arguments = ["tree", "--locked", "-e", "normal", "--prefix", "none", "-p", "vfio-migrate"];
        let tree = cargo(Path::new(LIBRARY), &[&arguments, features].concat());
        ["vfio-migration-integration ", "kvm-ioctls "]
            .map(|name| tree.lines().any(|line| line.starts_with(name)))
    };
    assert_eq!(tree(&["--no-default-features"]), [false; 2]);
    assert_eq!(tree(&[]), [true; 2]);
}

#[test]
fn a_vmm_that_patches_nothing_builds_from_a_path() {
    let vm_migration = format!("vm-migration = {{ path = \"{LIBRARY}/vm-migration\" }}\n");
    let embedder = embedder(&format!("vfio-migration = {{ path = \"{LIBRARY}\" }}\n{vm_migration}"));
    cargo(embedder.path(), &["check", "--quiet"]);
}

#[test]
fn a_vmms_own_crate_takes_the_place_of_vm_migration_by_one_line() {
    let line =
        format!("[patch.\"file://{LIBRARY}/vm-migration\"]\nvm-migration = {{ path = \"vm-migration\" }}\n");
    let own = "vm-migration = { path = \"vm-migration\" }\n";
    let embedder = embedder(&format!("vfio-migration = {{ path = \"{LIBRARY}\" }}\n{own}{line}"));
    let own = embedder.path().join("vm-migration");
    fs::create_dir_all(own.join("src")).unwrap();
    let manifest = "[package]\nname = \"vm-migration\"\nversion = \"0.1.0\"\nedition = \"2024\"\n[dependencies]\nanyhow = \"1\"\nserde = { version = \"1\", features = [\"derive\"] }\nserde_json = \"1\"\nthiserror = \"2\"\n";
    fs::write(own.join("Cargo.toml"), manifest).unwrap();
    fs::write(own.join("src/lib.rs"), include_str!("vmms_own.rs")).unwrap();
    let lib = embedder.path().join("src/lib.rs");
    let which = "pub const WHOSE: bool = vm_migration::OF_THE_VMM;\n";
    fs::write(&lib, fs::read_to_string(&lib).unwrap() + which).unwrap();
    cargo(embedder.path(), &["check", "--quiet"]);
}

/// What a recipe for Cloud Hypervisor takes from the library, the features it names have.
#[test]
fn the_recipes_use_nothing_that_their_features_lack() {
    let page = include_str!("../../docs/cloud-hypervisor.md");
    let (first, _) = page.split_once("## Recipe 2").unwrap();
    for (recipe, features) in [(first, r#"["device-state"]"#), (page, r#"["transfer", "ring"]"#)] {
        assert!(page.contains(&format!("features = {features}")));
        let uses: Vec<_> = recipe.lines().filter(|line| line.starts_with("use vfio_migration::")).collect();
        assert!(uses.len() >= 4, "{uses:?}");
        let library = format!("{{ path = \"{LIBRARY}\", default-features = false, features = {features} }}");
        let embedder = embedder(&format!("vfio-migration = {library}\n"));
        let text = format!("#![allow(unused_imports)]\n{}\n", uses.join("\n"));
        fs::write(embedder.path().join("src/lib.rs"), text).unwrap();
        cargo(embedder.path(), &["check", "--quiet"]);
    }
}

/// Whoever is asked for a certificate here has agreed on a protocol version.
#[derive(Debug)]
struct NoCertificate;

impl ResolvesServerCert for NoCertificate {
    fn resolve(&self, _hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        None
    }
}

/// A TLS 1.2 ClientHello that every server of that version takes.
fn tls_1_2_hello() -> Vec<u8> {
    let record = [22, 3, 1, 0, 82, 1, 0, 0, 78];
    let version_and_random = [&[3, 3], &[0; 32][..]].concat();
    let session_suites_compression = [0, 0, 4, 0xc0, 0x2b, 0xc0, 0x2f, 1, 0];
    let extensions = [
        &[0, 33][..],
        &[0, 10, 0, 4, 0, 2, 0, 0x17],    // group P-256
        &[0, 11, 0, 2, 1, 0],             // points uncompressed
        &[0, 13, 0, 6, 0, 4, 4, 3, 4, 1], // ECDSA and RSA with SHA-256
        &[0, 23, 0, 0, 0xff, 1, 0, 1, 0], // extended master secret, secure renegotiation
    ];
    [&record[..], &version_and_random, &session_suites_compression, &extensions.concat()].concat()
}

#[test]
fn a_vmm_with_a_rustls_of_its_own_still_refuses_tls_1_2() {
    let config = ServerConfig::builder().with_no_client_auth().with_cert_resolver(Arc::new(NoCertificate));
    let mut server = ServerConnection::new(Arc::new(config)).unwrap();
    let hello = tls_1_2_hello();
    let mut hello = &hello[..];
    while !hello.is_empty() {
        server.read_tls(&mut hello).unwrap();
    }
    let refused = server.process_new_packets().unwrap_err();
    assert_eq!(refused, Error::PeerIncompatible(PeerIncompatible::SupportedVersionsExtensionRequired));
}
