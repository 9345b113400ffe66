// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! TLS of a peer that is not ours: rustls as it is, session tickets included, with the files of a test.

use std::sync::Arc;

use rustls::crypto::ring::default_provider;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::WebPkiClientVerifier;
use rustls::{ClientConfig, RootCertStore, ServerConfig};

use crate::certificates::Files;

/// What a receiver shows and trusts.
pub(crate) fn server(files: &Files) -> Arc<ServerConfig> {
    let provider = Arc::new(default_provider());
    let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots(files)), Arc::clone(&provider));
    let config = ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_client_cert_verifier(verifier.build().unwrap())
        .with_single_cert(certificates(files, "server-cert.pem"), key(files, "server-key.pem"));
    Arc::new(config.unwrap())
}

/// What a source shows and trusts.
pub(crate) fn client(files: &Files) -> Arc<ClientConfig> {
    let config = ClientConfig::builder_with_provider(Arc::new(default_provider()))
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots(files))
        .with_client_auth_cert(certificates(files, "client-cert.pem"), key(files, "client-key.pem"));
    Arc::new(config.unwrap())
}

fn certificates(files: &Files, name: &str) -> Vec<CertificateDer<'static>> {
    CertificateDer::pem_file_iter(files.path().join(name)).unwrap().map(Result::unwrap).collect()
}

fn key(files: &Files, name: &str) -> PrivateKeyDer<'static> {
    PrivateKeyDer::from_pem_file(files.path().join(name)).unwrap()
}

fn roots(files: &Files) -> RootCertStore {
    let mut roots = RootCertStore::empty();
    roots.add_parsable_certificates(certificates(files, "ca-cert.pem"));
    roots
}
