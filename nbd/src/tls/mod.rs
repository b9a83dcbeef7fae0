//! TLS for NBD streams, both sides (document: "TLS support"), and for any other stream between the same peers.
//!
//! Certificates come from a directory with the file names that QEMU, nbdkit and libnbd share, so that one directory
//! serves all of them:
//!
//! | file | server | client |
//! |---|---|---|
//! | `ca-cert.pem` | needed: clients must have a certificate of this CA | needed: servers must have one |
//! | `ca-crl.pem` | if it is there, certificates on it are refused | the same |
//! | `server-cert.pem`, `server-key.pem` | needed | |
//! | `client-cert.pem`, `client-key.pem` | | both or neither; without them only servers that ask for none |
//!
//! TLS 1.2 and 1.3: older versions are not in the code. A server's certificate has to name the host that was dialled in
//! its subjectAltName; a common name alone does not do. Sessions are not resumed, so that every connection verifies the
//! certificates anew.
//!
//! [`TlsServer`] and [`TlsClient`] go into [`crate::server::ServeOptions`] and [`crate::client::ConnectOptions`], which
//! negotiate with STARTTLS; used directly they encrypt a stream from its first byte. [`Identity`] says who the peer is.

mod error;
mod files;
mod identity;
mod stream;

use std::fmt;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::client::{Resumption, WebPkiServerVerifier};
use rustls::crypto::{CryptoProvider, ring};
use rustls::pki_types::ServerName;
use rustls::server::{NoServerSessionStorage, WebPkiClientVerifier};
use rustls::version::{TLS12, TLS13};
use rustls::{ClientConfig, ServerConfig, SupportedProtocolVersion};
use tokio::io::{AsyncRead, AsyncWrite, BufReader};
use tokio_rustls::{TlsAcceptor, TlsConnector};

use crate::limits::{TLS_RECEIVE_BUFFER, TLS_SEND_BUFFER};

pub use error::TlsError;
pub use identity::Identity;
pub(crate) use stream::MaybeTls;

/// The versions that are spoken.
const VERSIONS: &[&SupportedProtocolVersion] = &[&TLS13, &TLS12];

/// The server's end of an encrypted stream. The buffer below it saves many small receives.
pub type ServerStream<S> = tokio_rustls::server::TlsStream<BufReader<S>>;
/// The client's end of an encrypted stream.
pub type ClientStream<S> = tokio_rustls::client::TlsStream<BufReader<S>>;

/// A server's certificate, and the CA of its clients. Cheap to clone.
#[derive(Clone)]
pub struct TlsServer {
    config: Arc<ServerConfig>,
    directory: Arc<Path>,
}

/// The CA of the servers that are trusted, and perhaps a client's certificate. Cheap to clone.
#[derive(Clone)]
pub struct TlsClient {
    config: Arc<ClientConfig>,
    directory: Arc<Path>,
}

/// How a client uses TLS, see [`crate::client::ConnectOptions::tls`].
#[derive(Clone, Debug)]
pub struct ClientTls {
    /// The certificates.
    pub tls: TlsClient,
    /// The name that the server's certificate must have, where it is not the host that is dialled. `None`: that host;
    /// `localhost` for a Unix socket and for a stream that the caller gave.
    pub host: Option<String>,
}

impl TlsServer {
    /// Reads the certificates of a directory, see [the module](self). A key that others than its owner may read is
    /// warned of in the log.
    ///
    /// # Errors
    /// [`TlsError`]: a file that is missing or not what its name says, or a key of another certificate.
    pub fn load(directory: &Path) -> Result<TlsServer, TlsError> {
        let (roots, crls) = files::authority(directory)?;
        let own = files::pair(directory, "server")?.ok_or_else(|| files::missing(directory, "server-cert.pem"))?;
        let refused = |error| TlsError::unusable(directory.join("server-cert.pem"), error);
        let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider())
            .with_crls(crls)
            .allow_unknown_revocation_status()
            .build()
            .map_err(|error| TlsError::authority(directory.join("ca-cert.pem"), error))?;
        let mut config = ServerConfig::builder_with_provider(provider())
            .with_protocol_versions(VERSIONS)
            .map_err(refused)?
            .with_client_cert_verifier(verifier)
            .with_single_cert(own.chain, own.key)
            .map_err(refused)?;
        config.session_storage = Arc::new(NoServerSessionStorage {});
        config.send_tls13_tickets = 0;
        Ok(TlsServer { config: Arc::new(config), directory: directory.into() })
    }

    /// Takes the TLS handshake of a client, which must have a certificate of the CA. It takes as long as the client
    /// lets it: the caller sets the limit.
    ///
    /// # Errors
    /// [`TlsError::Handshake`].
    pub async fn accept<S>(&self, stream: S) -> Result<ServerStream<S>, TlsError>
    where
        S: AsyncRead + AsyncWrite + Unpin,
    {
        let stream = BufReader::with_capacity(TLS_RECEIVE_BUFFER, stream);
        let buffers = |session: &mut rustls::ServerConnection| session.set_buffer_limit(Some(TLS_SEND_BUFFER));
        let accepted = TlsAcceptor::from(self.config.clone()).accept_with(stream, buffers).await;
        accepted.map_err(|error| TlsError::handshake("the client", error))
    }

    /// Where the certificates were read.
    pub fn directory(&self) -> &Path {
        &self.directory
    }
}

impl TlsClient {
    /// Reads the certificates of a directory, see [the module](self). A key that others than its owner may read is
    /// warned of in the log.
    ///
    /// # Errors
    /// [`TlsError`]: a file that is missing or not what its name says, or a key of another certificate.
    pub fn load(directory: &Path) -> Result<TlsClient, TlsError> {
        let (roots, crls) = files::authority(directory)?;
        let refused = |error| TlsError::unusable(directory.join("client-cert.pem"), error);
        let verifier = WebPkiServerVerifier::builder_with_provider(Arc::new(roots), provider())
            .with_crls(crls)
            .allow_unknown_revocation_status()
            .build()
            .map_err(|error| TlsError::authority(directory.join("ca-cert.pem"), error))?;
        let config = ClientConfig::builder_with_provider(provider())
            .with_protocol_versions(VERSIONS)
            .map_err(refused)?
            .with_webpki_verifier(verifier);
        let mut config = match files::pair(directory, "client")? {
            Some(own) => config.with_client_auth_cert(own.chain, own.key).map_err(refused)?,
            None => config.with_no_client_auth(),
        };
        config.resumption = Resumption::disabled();
        Ok(TlsClient { config: Arc::new(config), directory: directory.into() })
    }

    /// Makes the TLS handshake with a server whose certificate must name `host`: a DNS name, or an IPv4 or IPv6
    /// address (without brackets; a zone does not count). It takes as long as the server lets it: the caller sets the
    /// limit.
    ///
    /// With TLS 1.3 a server that refuses this client says so only in the first read after this.
    ///
    /// # Errors
    /// [`TlsError::Handshake`], or [`TlsError::NotAHost`].
    pub async fn connect<S>(&self, host: &str, stream: S) -> Result<ClientStream<S>, TlsError>
    where
        S: AsyncRead + AsyncWrite + Unpin,
    {
        let name = server_name(host)?;
        let stream = BufReader::with_capacity(TLS_RECEIVE_BUFFER, stream);
        let buffers = |session: &mut rustls::ClientConnection| session.set_buffer_limit(Some(TLS_SEND_BUFFER));
        let connected = TlsConnector::from(self.config.clone()).connect_with(name, stream, buffers).await;
        connected.map_err(|error| TlsError::handshake(&format!("the server {host:?}"), error))
    }

    /// Where the certificates were read.
    pub fn directory(&self) -> &Path {
        &self.directory
    }
}

fn server_name(host: &str) -> Result<ServerName<'static>, TlsError> {
    let address = host.split_once('%').map_or(host, |(address, _)| address);
    match address.parse::<IpAddr>() {
        Ok(address) => Ok(ServerName::IpAddress(address.into())),
        Err(_) => ServerName::try_from(host.to_owned()).map_err(|_| TlsError::NotAHost(host.to_owned())),
    }
}

/// The cryptography, named here and not taken from the process's default, which another crate may set.
fn provider() -> Arc<CryptoProvider> {
    Arc::new(ring::default_provider())
}

impl fmt::Debug for TlsServer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("TlsServer").field(&PathBuf::from(&*self.directory)).finish()
    }
}

impl fmt::Debug for TlsClient {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("TlsClient").field(&PathBuf::from(&*self.directory)).finish()
    }
}
