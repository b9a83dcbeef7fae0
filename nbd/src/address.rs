//! Where a server listens or a client connects: `unix:/path` or `host:port`.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

/// NBD's own TCP port.
pub const DEFAULT_PORT: u16 = 10809;

/// An address of a server.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Address {
    /// A Unix socket.
    Unix(PathBuf),
    /// A host (a name, an IPv4 address, or an IPv6 address without brackets) and a TCP port.
    Tcp {
        /// The host.
        host: String,
        /// The port; 0 lets the kernel choose when listening.
        port: u16,
    },
}

/// Why a text is not an address.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{text:?} is not an address: {why}; write unix:/path or host:port")]
pub struct AddressError {
    text: String,
    why: &'static str,
}

impl FromStr for Address {
    type Err = AddressError;

    /// `unix:/path`, `host:port`, `[ipv6]:port`; without a port it is [`DEFAULT_PORT`].
    fn from_str(text: &str) -> Result<Address, AddressError> {
        let error = |why| AddressError { text: text.to_owned(), why };
        if let Some(path) = text.strip_prefix("unix:") {
            return match path {
                "" => Err(error("the path of the socket is missing")),
                path => Ok(Address::Unix(path.into())),
            };
        }
        let (host, port) = split_host(text).map_err(error)?;
        Ok(Address::Tcp { host, port: port.unwrap_or(DEFAULT_PORT) })
    }
}

/// Cuts `host`, `host:port`, `[ipv6]` or `[ipv6]:port`.
pub(crate) fn split_host(text: &str) -> Result<(String, Option<u16>), &'static str> {
    let (host, port) = match text.strip_prefix('[') {
        Some(rest) => {
            let (host, after) = rest.split_once(']').ok_or("the closing bracket is missing")?;
            if host.parse::<std::net::Ipv6Addr>().is_err() && !host.contains('%') {
                return Err("what stands in brackets is not an IPv6 address");
            }
            match after {
                "" => (host, None),
                after => (host, Some(after.strip_prefix(':').ok_or("something stands after the bracket")?)),
            }
        }
        None => match text.split_once(':') {
            Some((_, port)) if port.contains(':') => return Err("an IPv6 address needs brackets"),
            Some((host, port)) => (host, Some(port)),
            None => (text, None),
        },
    };
    if host.is_empty() {
        return Err("the host is missing");
    }
    if host.contains('/') || host.chars().any(char::is_whitespace) {
        return Err("a host has no slash and no space");
    }
    let port = match port {
        None => None,
        Some(port) => Some(port.parse().map_err(|_| "the port is not a number up to 65535")?),
    };
    Ok((host.to_owned(), port))
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Address::Unix(path) => write!(f, "unix:{}", path.display()),
            Address::Tcp { host, port } if host.contains(':') => write!(f, "[{host}]:{port}"),
            Address::Tcp { host, port } => write!(f, "{host}:{port}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_survive_their_text() {
        for text in ["unix:/run/x.sock", "localhost:10809", "127.0.0.1:0", "[::1]:9", "[fe80::1%eth0]:80"] {
            assert_eq!(text.parse::<Address>().unwrap().to_string(), text);
        }
        assert_eq!("host".parse(), Ok(Address::Tcp { host: "host".into(), port: DEFAULT_PORT }));
    }

    #[test]
    fn what_is_not_an_address_is_refused() {
        for text in ["", "unix:", ":80", "host:", "host:65536", "::1", "[::1", "[::1]80", "[x]:1", "a b:1", "/tmp/x"] {
            assert!(text.parse::<Address>().is_err(), "{text:?}");
        }
    }
}
