// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Certificates made for one test.

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, DnType, IsCa, KeyPair, date_time_ymd};
use tempfile::TempDir;
use vfio_migration::transfer::tls::{ClientTls, ServerTls};

/// An authority that signs what it is asked to.
pub(crate) struct Authority(CertifiedIssuer<'static, KeyPair>);

impl Authority {
    pub(crate) fn new(name: &str) -> Self {
        let mut params = CertificateParams::new([]).unwrap();
        params.distinguished_name.push(DnType::CommonName, name);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        Self(CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap())
    }

    pub(crate) fn sign(&self, params: &CertificateParams) -> Signed {
        let key = KeyPair::generate().unwrap();
        let certificate = params.signed_by(&key, &self.0).unwrap().pem();
        Signed { certificate, key: key.serialize_pem() }
    }
}

pub(crate) struct Signed {
    pub(crate) certificate: String,
    pub(crate) key: String,
}

/// A certificate for loopback, by name and both addresses.
pub(crate) fn loopback() -> CertificateParams {
    CertificateParams::new(["localhost".into(), "127.0.0.1".into(), "::1".into()]).unwrap()
}

pub(crate) fn expired() -> CertificateParams {
    let mut params = loopback();
    params.not_before = date_time_ymd(2001, 1, 1);
    params.not_after = date_time_ymd(2002, 1, 1);
    params
}

/// A directory with the files of a destination and of a source.
pub(crate) struct Files(TempDir);

impl Files {
    pub(crate) fn new(authority: &Authority, server: &Signed, client: &Signed) -> Self {
        let files = Self(tempfile::tempdir().unwrap());
        files.write("ca-cert.pem", &authority.0.pem(), 0o644);
        files.write("server-cert.pem", &server.certificate, 0o644);
        files.write("server-key.pem", &server.key, 0o600);
        files.write("client-cert.pem", &client.certificate, 0o644);
        files.write("client-key.pem", &client.key, 0o600);
        files
    }

    /// Files that work.
    pub(crate) fn good() -> Self {
        Self::of(&Authority::new("ours"))
    }

    /// Files that work, signed by `authority`.
    pub(crate) fn of(authority: &Authority) -> Self {
        Self::new(authority, &authority.sign(&loopback()), &authority.sign(&loopback()))
    }

    pub(crate) fn write(&self, name: &str, text: &str, mode: u32) {
        let file = self.path().join(name);
        fs::write(&file, text).unwrap();
        fs::set_permissions(&file, Permissions::from_mode(mode)).unwrap();
    }

    pub(crate) fn path(&self) -> &Path {
        self.0.path()
    }

    pub(crate) fn server(&self) -> ServerTls {
        ServerTls::from_directory(self.path()).unwrap()
    }

    pub(crate) fn client(&self) -> ClientTls {
        ClientTls::from_directory(self.path()).unwrap()
    }
}
