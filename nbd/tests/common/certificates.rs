//! Certificates for the tests: a CA, and directories with what it has issued.

#![allow(dead_code, reason = "each test binary uses a part")]

use std::path::{Path, PathBuf};

use nbd::client::ConnectOptions;
use nbd::tls::{ClientTls, TlsClient, TlsServer};
use rcgen::{
    BasicConstraints, CertificateParams, CertificateRevocationListParams, CertifiedIssuer, DnType,
    ExtendedKeyUsagePurpose, IsCa, KeyIdMethod, KeyPair, KeyUsagePurpose, RevokedCertParams, SerialNumber,
    date_time_ymd,
};
use tempfile::TempDir;

/// The serial number of a certificate that can be revoked.
const REVOCABLE: u64 = 4711;

/// A CA.
pub struct Authority(CertifiedIssuer<'static, KeyPair>);

/// What is special about a certificate.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Good,
    Expired,
    Revocable,
}

impl Authority {
    pub fn new() -> Authority {
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, "tests' CA");
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        Authority(CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap())
    }

    /// Writes the CA's own certificate into a directory.
    pub fn put_authority(&self, directory: &Path) {
        std::fs::write(directory.join("ca-cert.pem"), self.0.pem()).unwrap();
    }

    /// Issues a certificate for `server` or `client`, with a common name and other names, into a directory.
    pub fn put(&self, directory: &Path, side: &str, common: &str, names: &[&str], kind: Kind) {
        let names: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
        let mut params = CertificateParams::new(names).unwrap();
        params.distinguished_name.push(DnType::CommonName, common);
        params.extended_key_usages = match side {
            "server" => vec![ExtendedKeyUsagePurpose::ServerAuth],
            _ => vec![ExtendedKeyUsagePurpose::ClientAuth],
        };
        if kind == Kind::Expired {
            (params.not_before, params.not_after) = (date_time_ymd(2001, 1, 1), date_time_ymd(2002, 1, 1));
        }
        if kind == Kind::Revocable {
            params.serial_number = Some(SerialNumber::from(REVOCABLE));
        }
        let key = KeyPair::generate().unwrap();
        let certificate = params.signed_by(&key, &self.0).unwrap();
        std::fs::write(directory.join(format!("{side}-cert.pem")), certificate.pem()).unwrap();
        std::fs::write(directory.join(format!("{side}-key.pem")), key.serialize_pem()).unwrap();
    }

    /// Writes a list on which the revocable certificate is.
    pub fn put_revocations(&self, directory: &Path) {
        let params = CertificateRevocationListParams {
            this_update: date_time_ymd(2020, 1, 1),
            next_update: date_time_ymd(2090, 1, 1),
            crl_number: SerialNumber::from(1),
            issuing_distribution_point: None,
            revoked_certs: vec![RevokedCertParams {
                serial_number: SerialNumber::from(REVOCABLE),
                revocation_time: date_time_ymd(2020, 1, 1),
                reason_code: None,
                invalidity_date: None,
            }],
            key_identifier_method: KeyIdMethod::Sha256,
        };
        std::fs::write(directory.join("ca-crl.pem"), params.signed_by(&self.0).unwrap().pem().unwrap()).unwrap();
    }

    /// A directory with everything: a server for `localhost` and `127.0.0.1`, and the client `alice`.
    pub fn directory(&self) -> Certificates {
        let certificates = Certificates(tempfile::tempdir().unwrap());
        self.put_authority(certificates.path());
        self.put(certificates.path(), "server", "server", &["localhost", "127.0.0.1"], Kind::Good);
        self.put(certificates.path(), "client", "alice", &[], Kind::Good);
        certificates
    }
}

/// A directory of certificates, removed when it is dropped.
pub struct Certificates(TempDir);

impl Certificates {
    /// A complete directory of a CA of its own.
    pub fn new() -> Certificates {
        Authority::new().directory()
    }

    pub fn path(&self) -> &Path {
        self.0.path()
    }

    pub fn file(&self, name: &str) -> PathBuf {
        self.path().join(name)
    }

    pub fn remove(&self, names: &[&str]) {
        names.iter().for_each(|name| std::fs::remove_file(self.file(name)).unwrap());
    }

    pub fn server(&self) -> TlsServer {
        TlsServer::load(self.path()).unwrap()
    }

    pub fn client(&self) -> TlsClient {
        TlsClient::load(self.path()).unwrap()
    }

    /// Options of a client that insists on TLS.
    pub fn options(&self) -> ConnectOptions {
        ConnectOptions { tls: Some(ClientTls { tls: self.client(), host: None }), ..ConnectOptions::default() }
    }
}
