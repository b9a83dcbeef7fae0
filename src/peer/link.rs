//! How the other node is reached, and who it is: plain TCP, or TLS in which both sides prove their names.
//!
//! Encryption begins with the first byte, before the preamble: who has no certificate of the same CA is not even asked
//! what he wants. The names are those that the record of the migration keeps, so that every later word about it comes
//! from the host that it was begun with.

use std::io;
use std::net::SocketAddr;
use std::path::Path;

use nbd::address::Address;
use nbd::tls::{Identity, TlsClient, TlsError, TlsServer};
use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;
use tokio_util::either::Either;

use super::{PREAMBLE_BYTES, tune};
use crate::error::{Failure, Outcome, chain};
use crate::upstream::Stream;

/// A connection between nodes: plain, or encrypted.
pub type PeerStream = Either<TcpStream, Box<dyn Stream>>;

/// This host's certificates, for both directions.
#[derive(Clone, Debug)]
pub struct NodeTls {
    /// For who dials this host.
    pub server: TlsServer,
    /// For whom this host dials.
    pub client: TlsClient,
}

impl NodeTls {
    /// Reads both from a directory, see [`nbd::tls`].
    ///
    /// # Errors
    /// [`TlsError`] names the file that is missing or wrong.
    pub fn load(directory: &Path) -> Result<NodeTls, TlsError> {
        Ok(NodeTls { server: TlsServer::load(directory)?, client: TlsClient::load(directory)? })
    }
}

/// Another node: where it answers, and how it proves that it is the one.
#[derive(Clone, Debug)]
pub struct PeerAddress {
    address: String,
    secured: Option<(TlsClient, String)>,
}

impl PeerAddress {
    /// `host:port`, believed.
    pub fn plain(address: impl Into<String>) -> Self {
        Self { address: address.into(), secured: None }
    }

    /// `host:port`, where a server answers whose certificate has the name.
    pub fn secured(address: impl Into<String>, tls: TlsClient, name: impl Into<String>) -> Self {
        Self { address: address.into(), secured: Some((tls, name.into())) }
    }

    /// `host:port`.
    pub fn address(&self) -> &str {
        &self.address
    }

    /// Whether it is spoken to over TLS.
    pub fn is_secured(&self) -> bool {
        self.secured.is_some()
    }

    /// A connection that begins with the given preamble.
    pub async fn dial(&self, preamble: &[u8; PREAMBLE_BYTES]) -> io::Result<PeerStream> {
        let stream = TcpStream::connect(&self.address).await?;
        tune(&stream)?;
        let mut stream: PeerStream = match &self.secured {
            None => Either::Left(stream),
            Some((tls, name)) => {
                let secured = tls.connect(name, stream).await;
                Either::Right(Box::new(secured.map_err(|error| io::Error::other(chain(&error)))?))
            }
        };
        stream.write_all(preamble).await?;
        stream.flush().await?;
        Ok(stream)
    }
}

/// The host of `host:port`, as a certificate would name it.
pub fn host_of(address: &str) -> Option<String> {
    match address.parse() {
        Ok(Address::Tcp { host, .. }) => Some(host),
        _ => None,
    }
}

/// Who is at the other end of a connection that was accepted.
#[derive(Clone, Debug)]
pub struct Caller {
    /// Where it comes from.
    pub address: SocketAddr,
    /// The names of its certificate; `None` where the link is not encrypted.
    pub identity: Option<Identity>,
}

impl Caller {
    /// Whether it is the host that a migration was begun with; `None`: that was done without certificates.
    pub fn must_be(&self, name: Option<&str>) -> Outcome<()> {
        match (&self.identity, name) {
            (None, None) => Ok(()),
            (Some(identity), Some(name)) if identity.is(name) => Ok(()),
            (Some(_), Some(name)) => Err(Failure::refused(format!(
                "{} is not {name}, with whom this migration was begun; its certificate names {}",
                self.address,
                self.names()
            ))),
            (None, Some(name)) => Err(Failure::refused(format!(
                "this migration was begun with {name} over TLS, and this connection has none; start both nodes with --tls"
            ))),
            (Some(_), None) => Err(Failure::refused(
                "this migration was begun without TLS, so nobody can prove to be the other host; finish it without --tls",
            )),
        }
    }

    /// For people: the names of the certificate.
    pub fn names(&self) -> String {
        match &self.identity {
            Some(identity) if !identity.names().is_empty() => identity.names().join(", "),
            Some(_) => "nobody".into(),
            None => "nobody: the link is not encrypted".into(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_host_of_an_address_is_what_a_certificate_names() {
        for (address, host) in [("b.example:10810", "b.example"), ("10.0.0.2:1", "10.0.0.2"), ("[::1]:2", "::1")] {
            assert_eq!(host_of(address).as_deref(), Some(host));
        }
    }

    #[test]
    fn a_word_without_proof_is_not_about_a_migration_that_was_begun_with_proof() {
        let address = "127.0.0.1:1".parse().unwrap();
        let plain = Caller { address, identity: None };
        assert_eq!(plain.must_be(None), Ok(()));
        assert!(plain.must_be(Some("b")).unwrap_err().message.contains("--tls"));
        let nobody = Caller { address, identity: Some(Identity::default()) };
        assert!(nobody.must_be(Some("b")).unwrap_err().message.contains("is not b"));
        assert!(nobody.must_be(None).unwrap_err().message.contains("without TLS"));
    }
}
