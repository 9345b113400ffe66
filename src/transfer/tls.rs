// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Mutual TLS with the file names Cloud Hypervisor uses.
//!
//! | file | who has it |
//! |---|---|
//! | `ca-cert.pem` | both: whoever it signed is trusted |
//! | `server-cert.pem`, `server-key.pem` | the destination |
//! | `client-cert.pem`, `client-key.pem` | the source |
//!
//! The cryptography is `ring`'s with the feature of that name: it builds with a C compiler alone, where rustls' own choice asks for
//! more. Without it, the one that the process has installed is taken ([`CryptoProvider::install_default`]), and rustls, which takes a
//! default of its own where just one is compiled in, still has only the VMM's to choose from.
//! Sessions are not resumed: every connection shows its certificate. Only TLS 1.3 is compiled in: Cargo unites features, so that
//! TLS 1.2 here would be TLS 1.2 in the embedding VMM's own connections.

use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::client::Resumption;
use rustls::crypto::CryptoProvider;
use rustls::pki_types::pem::{self, PemObject};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::server::{VerifierBuilderError, WebPkiClientVerifier};
use rustls::{
    AlertDescription, ClientConfig, ClientConnection, RootCertStore, ServerConfig, ServerConnection,
};
use thiserror::Error;

/// Bytes a certificate or key file may have.
const FILE_BYTES: u64 = 1 << 20;

/// Why certificates cannot be used.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum TlsError {
    /// A file cannot be read.
    #[error("Cannot read {}", .file.display())]
    Read {
        /// The file.
        file: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// A private key that is not private.
    #[error("Private key {} can be read by others than its owner (mode {mode:04o})", .file.display())]
    ReadableByOthers {
        /// The file.
        file: PathBuf,
        /// Its permission bits.
        mode: u32,
    },
    /// A file that is not what its name says.
    #[error("Cannot find a {kind} in {}", .file.display())]
    Pem {
        /// The file.
        file: PathBuf,
        /// What was looked for.
        kind: &'static str,
        /// Why it was not found.
        source: pem::Error,
    },
    /// An authority, certificate or key that TLS cannot use; also a certificate that is not for the key.
    #[error("TLS cannot use {}", .file.display())]
    Unusable {
        /// The file.
        file: PathBuf,
        /// Why not.
        source: rustls::Error,
    },
    /// The authority cannot check certificates.
    #[error("Cannot check certificates against {}", .file.display())]
    Authority {
        /// The file.
        file: PathBuf,
        /// Why not.
        source: VerifierBuilderError,
    },
    /// Neither the library nor the process has any cryptography.
    #[error(
        "No cryptography for TLS: build with the feature `ring`, or install a CryptoProvider as the process's default"
    )]
    NoProvider,
    /// The connection ended, and the peer had not said so: it was cut, or the peer died.
    #[error("Peer closed the connection without a goodbye")]
    Cut,
    /// The peer did not accept what this side showed it.
    #[error("Peer refuses this side's certificate or TLS: alert {alert:?}")]
    Refused {
        /// What the peer said.
        alert: AlertDescription,
    },
}

/// What the source of a migration shows and trusts.
#[derive(Debug, Clone)]
pub struct ClientTls(Arc<ClientConfig>);

impl ClientTls {
    /// Reads `ca-cert.pem`, `client-cert.pem` and `client-key.pem` from `directory`.
    ///
    /// # Errors
    /// A file is missing, is not what its name says, or lets others read the key; or there is no cryptography.
    pub fn from_directory(directory: &Path) -> Result<Self, TlsError> {
        let provider = provider()?;
        let identity = Identity::read(directory, "client")?;
        let unusable = |source| TlsError::Unusable { file: identity.certificate_file.clone(), source };
        let mut config = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .map_err(unusable)?
            .with_root_certificates(authority(directory)?)
            .with_client_auth_cert(identity.chain, identity.key)
            .map_err(unusable)?;
        config.resumption = Resumption::disabled();
        Ok(Self(Arc::new(config)))
    }

    /// Begins a session with `host`; `None` where no certificate can be for it.
    pub(super) fn session(&self, host: &str) -> Option<Result<ClientConnection, rustls::Error>> {
        // A zone says which interface leads there, not who is there.
        let host = host.split_once('%').map_or(host, |(address, _)| address);
        let name = ServerName::try_from(host.to_owned()).ok()?;
        Some(ClientConnection::new(Arc::clone(&self.0), name))
    }
}

/// What the destination of a migration shows and trusts; it talks to nobody without a certificate.
#[derive(Debug, Clone)]
pub struct ServerTls(Arc<ServerConfig>);

impl ServerTls {
    /// Reads `ca-cert.pem`, `server-cert.pem` and `server-key.pem` from `directory`.
    ///
    /// # Errors
    /// A file is missing, is not what its name says, or lets others read the key; or there is no cryptography.
    pub fn from_directory(directory: &Path) -> Result<Self, TlsError> {
        let provider = provider()?;
        let identity = Identity::read(directory, "server")?;
        let roots = Arc::new(authority(directory)?);
        let verifier = WebPkiClientVerifier::builder_with_provider(roots, Arc::clone(&provider))
            .build()
            .map_err(|source| TlsError::Authority { file: authority_file(directory), source })?;
        let unusable = |source| TlsError::Unusable { file: identity.certificate_file.clone(), source };
        let mut config = ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .map_err(unusable)?
            .with_client_cert_verifier(verifier)
            .with_single_cert(identity.chain, identity.key)
            .map_err(unusable)?;
        config.send_tls13_tickets = 0;
        Ok(Self(Arc::new(config)))
    }

    /// Begins a session.
    pub(super) fn session(&self) -> Result<ServerConnection, rustls::Error> {
        ServerConnection::new(Arc::clone(&self.0))
    }
}

/// Names the certificate as what the peer complains of, where that is what it says, and a connection that was cut as that.
pub(super) fn explain(error: io::Error) -> io::Error {
    if error.kind() == io::ErrorKind::UnexpectedEof && error.get_ref().is_some() {
        return io::Error::new(error.kind(), TlsError::Cut);
    }
    let inner = error.get_ref().and_then(|inner| inner.downcast_ref());
    match inner {
        Some(&rustls::Error::AlertReceived(alert)) => {
            io::Error::new(io::ErrorKind::PermissionDenied, TlsError::Refused { alert })
        }
        _ => error,
    }
}

/// A certificate chain and its key.
struct Identity {
    certificate_file: PathBuf,
    chain: Vec<CertificateDer<'static>>,
    key: PrivateKeyDer<'static>,
}

impl Identity {
    /// Reads `<side>-cert.pem` and `<side>-key.pem`.
    fn read(directory: &Path, side: &str) -> Result<Self, TlsError> {
        let certificate_file = directory.join(format!("{side}-cert.pem"));
        let chain = certificates(&certificate_file)?;
        let key = private_key(&directory.join(format!("{side}-key.pem")))?;
        Ok(Self { certificate_file, chain, key })
    }
}

/// The cryptography that comes along.
#[cfg(feature = "ring")]
#[expect(clippy::unnecessary_wraps, reason = "the signature is that without the feature")]
fn provider() -> Result<Arc<CryptoProvider>, TlsError> {
    Ok(Arc::new(rustls::crypto::ring::default_provider()))
}

/// The cryptography that the process has installed.
#[cfg(not(feature = "ring"))]
fn provider() -> Result<Arc<CryptoProvider>, TlsError> {
    CryptoProvider::get_default().cloned().ok_or(TlsError::NoProvider)
}

fn authority_file(directory: &Path) -> PathBuf {
    directory.join("ca-cert.pem")
}

/// Reads whom to trust. Certificates that are nothing of the kind are passed over, as Cloud Hypervisor does, unless all are.
fn authority(directory: &Path) -> Result<RootCertStore, TlsError> {
    let file = authority_file(directory);
    let mut roots = RootCertStore::empty();
    let mut unusable = None;
    for certificate in certificates(&file)? {
        if let Err(source) = roots.add(certificate) {
            log::warn!("Passed over a certificate in {}: {source}", file.display());
            unusable = Some(source);
        }
    }
    match unusable {
        Some(source) if roots.is_empty() => Err(TlsError::Unusable { file, source }),
        _ => Ok(roots),
    }
}

/// Reads every certificate in `file`, at least one.
fn certificates(file: &Path) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let bytes = contents(file, &open(file)?)?;
    let chain: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&bytes).collect();
    let chain =
        chain.and_then(|chain| if chain.is_empty() { Err(pem::Error::NoItemsFound) } else { Ok(chain) });
    chain.map_err(|source| TlsError::Pem { file: file.to_owned(), kind: "certificate", source })
}

/// Reads the key in `file`, which only its owner may be able to read.
fn private_key(file: &Path) -> Result<PrivateKeyDer<'static>, TlsError> {
    let opened = open(file)?;
    let read_error = |source| TlsError::Read { file: file.to_owned(), source };
    let mode = opened.metadata().map_err(read_error)?.permissions().mode() & 0o7777;
    if mode & 0o077 != 0 {
        return Err(TlsError::ReadableByOthers { file: file.to_owned(), mode });
    }
    PrivateKeyDer::from_pem_slice(&contents(file, &opened)?).map_err(|source| TlsError::Pem {
        file: file.to_owned(),
        kind: "private key",
        source,
    })
}

fn open(file: &Path) -> Result<File, TlsError> {
    File::open(file).map_err(|source| TlsError::Read { file: file.to_owned(), source })
}

fn contents(file: &Path, opened: &File) -> Result<Vec<u8>, TlsError> {
    let mut bytes = Vec::new();
    let read = opened.take(FILE_BYTES).read_to_end(&mut bytes);
    read.map_err(|source| TlsError::Read { file: file.to_owned(), source })?;
    Ok(bytes)
}

#[cfg(all(test, not(feature = "ring")))]
mod tests {
    use super::*;

    #[test]
    fn without_cryptography_the_error_names_the_feature_and_what_else_helps() {
        let nowhere = Path::new("/nowhere");
        let refused = [ClientTls::from_directory(nowhere).err(), ServerTls::from_directory(nowhere).err()];
        for error in refused {
            let text = error.unwrap().to_string();
            assert!(text.contains("feature `ring`") && text.contains("CryptoProvider"), "{text}");
        }
    }
}
