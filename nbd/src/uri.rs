//! NBD URIs (`doc/uri.md` of the protocol's repository).
//!
//! `nbd://host[:port]/export`, `nbd+unix:///export?socket=/path`, and `nbds://`, `nbds+unix://` for TLS, with libnbd's
//! `tls-certificates=DIRECTORY` and `tls-hostname=NAME`. Other parameters are passed over. The export name is the path without its first slash, percent-decoded; nothing else is done to it: `..` and further slashes are parts
//! of the name.

use std::fmt;
use std::net::Ipv6Addr;
use std::path::PathBuf;
use std::str::FromStr;

use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, percent_decode_str, utf8_percent_encode};

use crate::address::{Address, DEFAULT_PORT, split_host};
use crate::wire::MAX_STRING;

/// An export of a server.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct NbdUri {
    /// Where the server is.
    pub address: Address,
    /// Name of the export; empty for the default one.
    pub export: String,
    /// The connection has to be encrypted.
    pub tls: bool,
    /// Directory of the certificates, see [`crate::tls`] (`tls-certificates=`). Without TLS it has no meaning.
    pub tls_certificates: Option<PathBuf>,
    /// The name that the server's certificate must have, where it is not the host (`tls-hostname=`). Without TLS it has
    /// no meaning.
    pub tls_hostname: Option<String>,
}

impl NbdUri {
    /// An export of a server, without TLS.
    pub fn new(address: Address, export: impl Into<String>) -> NbdUri {
        NbdUri { address, export: export.into(), tls: false, tls_certificates: None, tls_hostname: None }
    }
}

/// Why a text is not an NBD URI.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{text:?} is not an NBD URI: {why}; write nbd://host[:port]/name or nbd+unix:///name?socket=/path")]
pub struct UriError {
    text: String,
    why: &'static str,
}

impl FromStr for NbdUri {
    type Err = UriError;

    fn from_str(text: &str) -> Result<NbdUri, UriError> {
        parse(text).map_err(|why| UriError { text: text.to_owned(), why })
    }
}

fn parse(text: &str) -> Result<NbdUri, &'static str> {
    let (scheme, rest) = text.split_once("://").ok_or("there is no scheme://")?;
    let (tls, unix) = match scheme.to_ascii_lowercase().as_str() {
        "nbd" => (false, false),
        "nbds" => (true, false),
        "nbd+unix" => (false, true),
        "nbds+unix" => (true, true),
        "nbd+vsock" | "nbds+vsock" => return Err("vsock is not supported"),
        _ => return Err("the scheme is not nbd, nbds, nbd+unix or nbds+unix"),
    };
    if rest.contains('#') {
        return Err("it has a fragment (a # in a name is written %23)");
    }
    let (rest, query) = rest.split_once('?').unwrap_or((rest, ""));
    let (authority, path) = rest.split_once('/').unwrap_or((rest, ""));
    let export = decode(path)?;
    if export.len() > MAX_STRING {
        return Err("the export name is longer than 4096 bytes");
    }
    let (mut socket, mut tls_certificates, mut tls_hostname) = (None, None, None);
    for (key, value) in query.split('&').filter(|part| !part.is_empty()).filter_map(|part| part.split_once('=')) {
        match key {
            "socket" => socket = Some(decode(value)?),
            "tls-certificates" => tls_certificates = Some(PathBuf::from(decode(value)?)),
            "tls-hostname" => tls_hostname = Some(decode(value)?),
            _ => {}
        }
    }
    let address = match (unix, socket) {
        (true, Some(path)) if !path.is_empty() && authority.is_empty() => Address::Unix(PathBuf::from(path)),
        (true, Some(_)) if !authority.is_empty() => return Err("a Unix socket has no host"),
        (true, _) => return Err("the socket=/path is missing"),
        (false, Some(_)) => return Err("socket= needs the scheme nbd+unix or nbds+unix"),
        (false, None) => {
            let host = authority.rsplit_once('@').map_or(authority, |(_, host)| host);
            let (host, port) = split_host(host)?;
            let host = decode(&host)?;
            if !is_host(&host) {
                return Err("the host is not a name or an address");
            }
            Address::Tcp { host, port: port.unwrap_or(DEFAULT_PORT) }
        }
    };
    Ok(NbdUri { address, export, tls, tls_certificates, tls_hostname })
}

/// Whether a decoded host can be one: with a colon only an IPv6 address, perhaps with a zone.
fn is_host(host: &str) -> bool {
    let (address, zone) = host.split_once('%').map_or((host, None), |(address, zone)| (address, Some(zone)));
    let has_colon = host.contains(':');
    let right = if has_colon { address.parse::<Ipv6Addr>().is_ok() } else { zone.is_none() };
    right && !host.chars().any(|letter| letter.is_whitespace() || letter.is_control() || "/?#@[]".contains(letter))
}

fn decode(text: &str) -> Result<String, &'static str> {
    let mut hex = text.split('%').skip(1);
    if !hex.all(|code| code.len() >= 2 && code.bytes().take(2).all(|digit| digit.is_ascii_hexdigit())) {
        return Err("a % is not followed by two hexadecimal digits");
    }
    let text = percent_decode_str(text).decode_utf8().map_err(|_| "a percent-encoded part is not UTF-8")?;
    if text.contains('\0') { Err("it contains a NUL") } else { Ok(text.into_owned()) }
}

/// What may stand unencoded in a path and in a query's value.
const ENCODED: &AsciiSet =
    &NON_ALPHANUMERIC.remove(b'-').remove(b'.').remove(b'_').remove(b'~').remove(b'/').remove(b':');

impl fmt::Display for NbdUri {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let s = if self.tls { "s" } else { "" };
        let encode = |text| utf8_percent_encode(text, ENCODED);
        let export = encode(&self.export);
        let mut parameters = Vec::new();
        match &self.address {
            Address::Unix(path) => {
                write!(f, "nbd{s}+unix:///{export}")?;
                parameters.push(("socket", path.to_string_lossy()));
            }
            Address::Tcp { host, port } => {
                if host.contains(':') {
                    write!(f, "nbd{s}://[{}]", encode(host))?;
                } else {
                    write!(f, "nbd{s}://{}", encode(host))?;
                }
                match *port {
                    DEFAULT_PORT => write!(f, "/{export}")?,
                    port => write!(f, ":{port}/{export}")?,
                }
            }
        }
        parameters.extend(self.tls_certificates.iter().map(|path| ("tls-certificates", path.to_string_lossy())));
        parameters.extend(self.tls_hostname.iter().map(|name| ("tls-hostname", name.into())));
        for (index, (key, value)) in parameters.iter().enumerate() {
            write!(f, "{}{key}={}", if index == 0 { '?' } else { '&' }, encode(value))?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn tcp(host: &str, port: u16, export: &str) -> NbdUri {
        NbdUri::new(Address::Tcp { host: host.into(), port }, export)
    }

    #[test]
    fn uris_of_the_document_are_understood() {
        for (text, expected) in [
            ("nbd://example.com", tcp("example.com", 10809, "")),
            ("nbd://example.com/", tcp("example.com", 10809, "")),
            ("NBD://example.com:99/a%20b", tcp("example.com", 99, "a b")),
            ("nbd://[::1]:7/x", tcp("::1", 7, "x")),
            ("nbd://user@host/x/../y", tcp("host", 10809, "x/../y")),
            ("nbd://host//x", tcp("host", 10809, "/x")),
            ("nbd://host/x?future=1&y", tcp("host", 10809, "x")),
        ] {
            assert_eq!(text.parse(), Ok(expected), "{text}");
        }
        let unix = NbdUri { tls: true, ..NbdUri::new(Address::Unix("/tmp/a b".into()), "x") };
        assert_eq!("nbds+unix:///x?socket=/tmp/a%20b".parse(), Ok(unix));
        let certificates = NbdUri {
            tls: true,
            tls_certificates: Some("/etc/pki".into()),
            tls_hostname: Some("a.example".into()),
            ..tcp("host", 10809, "x")
        };
        assert_eq!("nbds://host/x?tls-certificates=%2Fetc/pki&tls-hostname=a.example".parse(), Ok(certificates));
    }

    #[test]
    fn what_is_not_a_uri_is_refused_with_a_reason() {
        for (text, reason) in [
            ("disk", "scheme://"),
            ("http://host/x", "the scheme"),
            ("nbd+vsock:///x", "vsock"),
            ("nbd:///x", "host is missing"),
            ("nbd://host:x/", "port"),
            ("nbd://%20b", "the host is not"),
            ("nbd://a%3Ab", "the host is not"),
            ("nbd://[x%25:]", "the host is not"),
            ("nbd://host/%zz", "hexadecimal"),
            ("nbd://host/%ff", "UTF-8"),
            ("nbd://host/%00", "NUL"),
            ("nbd://host/a#b", "fragment"),
            ("nbd://host/x?socket=/y", "nbd+unix"),
            ("nbd+unix:///x", "socket=/path"),
            ("nbd+unix:///x?socket=", "socket=/path"),
            ("nbd+unix://host/x?socket=/y", "no host"),
        ] {
            let error = text.parse::<NbdUri>().unwrap_err().to_string();
            assert!(error.contains(reason), "{text}: {error}");
        }
    }

    proptest! {
        #[test]
        fn uris_survive_their_text(
            export in "[^\0]{0,20}",
            path in "/[^\0]{1,20}",
            name in proptest::option::of("[^\0]{1,20}"),
            port: u16,
            tls: bool,
        ) {
            for address in [
                Address::Unix(path.clone().into()),
                Address::Tcp { host: "::1".into(), port },
                Address::Tcp { host: "fe80::1%eth0".into(), port },
                Address::Tcp { host: "hôte".into(), port },
                Address::Tcp { host: "host".into(), port },
            ] {
                let tls_certificates = name.is_some().then(|| path.clone().into());
                let uri = NbdUri { address, export: export.clone(), tls, tls_certificates, tls_hostname: name.clone() };
                prop_assert_eq!(uri.to_string().parse(), Ok(uri));
            }
        }
    }
}
