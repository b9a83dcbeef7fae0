//! Who the peer of an encrypted stream is.

use std::net::IpAddr;

use tokio::io::{AsyncRead, AsyncWrite};
use x509_parser::extensions::GeneralName;
use x509_parser::parse_x509_certificate;

use super::{ClientStream, ServerStream};

/// The names of a peer's certificate, which was verified in the TLS handshake.
///
/// They come from the peer's own certificate, not from those of its issuers: the DNS names and IP addresses of its
/// subjectAltName, then its common name.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Identity {
    names: Vec<String>,
}

impl Identity {
    /// The client at the other end.
    pub fn of_client<S: AsyncRead + AsyncWrite + Unpin>(stream: &ServerStream<S>) -> Identity {
        Identity::of(stream.get_ref().1.peer_certificates())
    }

    /// The server at the other end.
    pub fn of_server<S: AsyncRead + AsyncWrite + Unpin>(stream: &ClientStream<S>) -> Identity {
        Identity::of(stream.get_ref().1.peer_certificates())
    }

    fn of(certificates: Option<&[rustls::pki_types::CertificateDer<'_>]>) -> Identity {
        certificates.and_then(<[_]>::first).map(|own| Identity { names: names(own) }).unwrap_or_default()
    }

    /// All names, each once, as they stand in the certificate; addresses in their usual form.
    pub fn names(&self) -> &[String] {
        &self.names
    }

    /// Whether a name is one of them: in full, without regard to upper and lower case. An address has to be the same
    /// address, however it is written. `*` is no wildcard: such a name is nobody.
    pub fn is(&self, name: &str) -> bool {
        let address = name.parse::<IpAddr>().ok();
        self.names.iter().any(|known| match address {
            Some(address) => known.parse() == Ok(address),
            None => known.eq_ignore_ascii_case(name) && !known.contains('*'),
        })
    }
}

fn names(certificate: &[u8]) -> Vec<String> {
    let mut names: Vec<String> = Vec::new();
    // What TLS has verified can be parsed; if not, it has no name.
    let Ok((_, certificate)) = parse_x509_certificate(certificate) else { return names };
    let mut add = |name: String| {
        if !name.is_empty() && !names.contains(&name) {
            names.push(name);
        }
    };
    if let Ok(Some(alternatives)) = certificate.subject_alternative_name() {
        for name in &alternatives.value.general_names {
            match name {
                GeneralName::DNSName(name) => add((*name).to_owned()),
                GeneralName::IPAddress(bytes) => {
                    let v4 = <[u8; 4]>::try_from(*bytes).map(IpAddr::from);
                    let v6 = <[u8; 16]>::try_from(*bytes).map(IpAddr::from);
                    if let Ok(address) = v4.or(v6) {
                        add(address.to_string());
                    }
                }
                _ => {}
            }
        }
    }
    for name in certificate.subject().iter_common_name() {
        if let Ok(name) = name.as_str() {
            add(name.to_owned());
        }
    }
    names
}
