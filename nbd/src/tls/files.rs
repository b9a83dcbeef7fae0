//! The files of a certificate directory.

use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::RootCertStore;
use rustls::pki_types::pem::{self, PemObject};
use rustls::pki_types::{CertificateDer, CertificateRevocationListDer, PrivateKeyDer};

use super::TlsError;

/// A certificate with those between it and the CA, and its key.
pub(super) struct Pair {
    pub(super) chain: Vec<CertificateDer<'static>>,
    pub(super) key: PrivateKeyDer<'static>,
}

/// The CA, and its revocation list if there is one.
pub(super) fn authority(
    directory: &Path,
) -> Result<(RootCertStore, Vec<CertificateRevocationListDer<'static>>), TlsError> {
    let path = directory.join("ca-cert.pem");
    let mut roots = RootCertStore::empty();
    for certificate in certificates(&path)? {
        roots.add(certificate).map_err(|error| TlsError::unusable(path.clone(), error))?;
    }
    let path = directory.join("ca-crl.pem");
    let crls = match read(&path)? {
        Some(text) => all(&path, "certificate revocation list", &text)?,
        None => Vec::new(),
    };
    Ok((roots, crls))
}

/// The certificate of one side and its key; `None` when neither is there.
pub(super) fn pair(directory: &Path, side: &str) -> Result<Option<Pair>, TlsError> {
    let (chain_path, key_path) =
        (directory.join(format!("{side}-cert.pem")), directory.join(format!("{side}-key.pem")));
    let key = match (read(&chain_path)?, read(&key_path)?) {
        (None, None) => return Ok(None),
        (None, Some(_)) => return Err(absent(chain_path)),
        (Some(_), None) => return Err(absent(key_path)),
        (Some(_), Some(key)) => key,
    };
    let chain = certificates(&chain_path)?;
    let wrong = |source| content(&key_path, "private key", source);
    let key = PrivateKeyDer::from_pem_slice(&key).map_err(wrong)?;
    warn_if_open(&key_path);
    Ok(Some(Pair { chain, key }))
}

/// The error of a file that has to be there.
pub(super) fn missing(directory: &Path, name: &str) -> TlsError {
    absent(directory.join(name))
}

fn absent(path: PathBuf) -> TlsError {
    TlsError::Read { path, source: Arc::new(io::ErrorKind::NotFound.into()) }
}

fn content(path: &Path, what: &'static str, source: pem::Error) -> TlsError {
    TlsError::Content { path: path.to_owned(), what, source: Arc::new(source) }
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let text = read(path)?.ok_or_else(|| absent(path.to_owned()))?;
    all(path, "certificate", &text)
}

/// All objects of one kind; one at least.
fn all<T: PemObject>(path: &Path, what: &'static str, text: &[u8]) -> Result<Vec<T>, TlsError> {
    let found: Result<Vec<T>, _> = T::pem_slice_iter(text).collect();
    match found {
        Ok(found) if found.is_empty() => Err(content(path, what, pem::Error::NoItemsFound)),
        Ok(found) => Ok(found),
        Err(error) => Err(content(path, what, error)),
    }
}

/// The content of a file; `None` when there is no such file.
fn read(path: &Path) -> Result<Option<Vec<u8>>, TlsError> {
    match std::fs::read(path) {
        Ok(text) => Ok(Some(text)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(TlsError::Read { path: path.to_owned(), source: Arc::new(error) }),
    }
}

fn warn_if_open(path: &Path) {
    let open = std::fs::metadata(path).is_ok_and(|metadata| metadata.permissions().mode() & 0o077 != 0);
    if open {
        tracing::warn!(path = %path.display(), "others than the owner may read this key: chmod 600 it");
    }
}
