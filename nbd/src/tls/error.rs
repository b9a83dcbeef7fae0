//! What can go wrong with TLS, and what to do then.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use rustls::pki_types::pem;
use rustls::server::VerifierBuilderError;
use rustls::{AlertDescription, CertificateError, Error};

/// Why there is no TLS. It can be cloned, so that one failure can be told to several waiters.
#[derive(Clone, Debug, thiserror::Error)]
pub enum TlsError {
    /// A file of the directory cannot be read.
    #[error("cannot read {}: put it there, or name the directory that has it", .path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: Arc<io::Error>,
    },
    /// A file of the directory has not what it should have.
    #[error("{} has no {what} in PEM form: write it anew", .path.display())]
    Content {
        /// The file.
        path: PathBuf,
        /// What should be in it.
        what: &'static str,
        /// Why it is not.
        source: Arc<pem::Error>,
    },
    /// The CA's certificate or revocation list cannot be used.
    #[error("{} cannot be used to verify peers: it must hold certificates of a CA (and ca-crl.pem its list)", .path.display())]
    Authority {
        /// The file.
        path: PathBuf,
        /// Why.
        source: Arc<VerifierBuilderError>,
    },
    /// A certificate cannot be used: not one, not with its key, or of a kind that is not known.
    #[error("{} cannot be used: it must be an X.509 v3 certificate, and the key beside it its own", .path.display())]
    Unusable {
        /// The file.
        path: PathBuf,
        /// Why.
        source: Arc<Error>,
    },
    /// What was dialled can be in no certificate.
    #[error("{0:?} is not a host name or an address, so no certificate can be for it: give tls-hostname=")]
    NotAHost(String),
    /// A URI asks for TLS, and there are no certificates.
    #[error(
        "TLS needs certificates: add tls-certificates=DIRECTORY to the URI; the directory has at least ca-cert.pem"
    )]
    NoCertificates,
    /// The kernel's client speaks no TLS.
    #[error("the kernel's NBD client cannot speak TLS: connect to the server from a process, and attach that")]
    Kernel,
    /// The handshake failed.
    #[error("no TLS with {peer}: {why}")]
    Handshake {
        /// With whom.
        peer: String,
        /// Why, and what to do.
        why: &'static str,
        /// What the TLS library says.
        source: Arc<io::Error>,
    },
}

impl TlsError {
    pub(super) fn unusable(path: PathBuf, source: Error) -> TlsError {
        TlsError::Unusable { path, source: Arc::new(source) }
    }

    pub(super) fn authority(path: PathBuf, source: VerifierBuilderError) -> TlsError {
        TlsError::Authority { path, source: Arc::new(source) }
    }

    pub(crate) fn handshake(peer: &str, source: io::Error) -> TlsError {
        let why = reason(&source).map_or("the connection broke", explained);
        TlsError::Handshake { peer: peer.to_owned(), why, source: Arc::new(source) }
    }

    /// Whether an error of an encrypted stream comes from TLS, and not from the stream below it.
    pub(crate) fn is_of_tls(error: &io::Error) -> bool {
        reason(error).is_some()
    }
}

fn reason(error: &io::Error) -> Option<&Error> {
    error.get_ref()?.downcast_ref()
}

/// What went wrong in words, and what to do.
fn explained(error: &Error) -> &'static str {
    match error {
        Error::InvalidCertificate(error) => match error {
            CertificateError::UnknownIssuer | CertificateError::BadSignature => {
                "its certificate is not of the CA in ca-cert.pem; both sides need certificates of one CA"
            }
            CertificateError::Expired | CertificateError::ExpiredContext { .. } => {
                "its certificate has expired; renew it, or set the clock"
            }
            CertificateError::NotValidYet | CertificateError::NotValidYetContext { .. } => {
                "its certificate is not valid yet; look at the clocks of both sides"
            }
            CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. } => {
                "its certificate is for another host; dial a name or address of its subjectAltName, or give tls-hostname="
            }
            CertificateError::Revoked => "its certificate has been revoked; issue another",
            CertificateError::InvalidPurpose | CertificateError::InvalidPurposeContext { .. } => {
                "its certificate is not for this use; extendedKeyUsage must have serverAuth or clientAuth as fits"
            }
            _ => "its certificate cannot be verified; issue another",
        },
        Error::NoCertificatesPresented => {
            "it has no certificate, and only clients with one are served; give it client-cert.pem and client-key.pem"
        }
        Error::AlertReceived(alert) => match alert {
            AlertDescription::CertificateRequired => {
                "it wants a certificate and got none; put client-cert.pem and client-key.pem into the directory"
            }
            AlertDescription::UnknownCA | AlertDescription::DecryptError => {
                "it refuses our certificate, which is not of its CA; both sides need certificates of one CA"
            }
            AlertDescription::BadCertificate
            | AlertDescription::UnsupportedCertificate
            | AlertDescription::CertificateRevoked
            | AlertDescription::CertificateExpired
            | AlertDescription::CertificateUnknown
            | AlertDescription::AccessDenied => "it refuses our certificate; look at its log, and issue another",
            AlertDescription::ProtocolVersion | AlertDescription::HandshakeFailure => {
                "no version of TLS and no cipher is common to both sides, or it wants a certificate; TLS 1.2 is the oldest"
            }
            _ => "it broke off the handshake; look at its log",
        },
        Error::PeerIncompatible(_) => "no version of TLS and no cipher is common to both sides; TLS 1.2 is the oldest",
        Error::InvalidMessage(_) | Error::InappropriateMessage { .. } => "what it sends is not TLS",
        _ => "the handshake came to nothing",
    }
}
