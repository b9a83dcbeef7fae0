//! The two ports: that of the peers, and NBD's.

use std::net::TcpListener;

use super::finding::Finding;
use crate::control::status::NodeStatus;
use crate::peer::DEFAULT_PORT;

/// NBD's own port.
const NBD_PORT: u16 = 10809;

/// What is known of one port.
pub(super) struct Facts {
    /// The check's name.
    pub(super) check: &'static str,
    /// The port.
    pub(super) port: u16,
    /// Whether the node on this host listens there.
    pub(super) ours: bool,
    /// Whether it could be listened on: nothing, or why not.
    pub(super) bound: Result<(), std::io::Error>,
}

/// The default ports, or those that the node uses.
pub(super) fn gather(node: Option<&NodeStatus>) -> Vec<Facts> {
    let peer = node.and_then(|node| port(node.peer.as_deref()?));
    let nbd = node.and_then(|node| node.nbd.iter().find_map(|address| port(address)));
    [("peer-port", peer, DEFAULT_PORT), ("nbd-port", nbd, NBD_PORT)]
        .into_iter()
        .map(|(check, used, default)| {
            let port = used.unwrap_or(default);
            Facts { check, port, ours: used.is_some(), bound: TcpListener::bind(("0.0.0.0", port)).map(drop) }
        })
        .collect()
}

/// The port of `host:port`; none of a Unix socket.
fn port(address: &str) -> Option<u16> {
    if address.starts_with("unix:") {
        return None;
    }
    address.rsplit_once(':')?.1.parse().ok()
}

/// Whether a node can listen there.
pub(super) fn verdict(facts: &Facts) -> Finding {
    let Facts { check, port, ours, bound } = facts;
    match bound {
        _ if *ours => Finding::ok(check, format!("{port}, this node's")),
        Ok(()) => Finding::ok(check, format!("{port}, free")),
        Err(error) if error.kind() == std::io::ErrorKind::AddrInUse => Finding::warn(
            check,
            format!("{port} is another program's"),
            "a node that is told to use it does not start",
            format!("see whose it is (ss -ltnp 'sport = :{port}'), and end that or give the node another port"),
        ),
        Err(error) => Finding::warn(
            check,
            format!("{port} cannot be tried ({error})"),
            "a node that is told to use it may not start",
            "run this as the user that the node runs as",
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::doctor::finding::Level;

    #[test]
    fn a_port_is_free_ours_or_anothers() {
        let level = |ours, bound| verdict(&Facts { check: "peer-port", port: 10810, ours, bound }).level;
        let taken = || std::io::Error::from(std::io::ErrorKind::AddrInUse);
        assert_eq!(level(false, Ok(())), Level::Ok);
        assert_eq!(level(true, Err(taken())), Level::Ok);
        assert_eq!(level(false, Err(taken())), Level::Warn);
        assert_eq!(level(false, Err(std::io::ErrorKind::PermissionDenied.into())), Level::Warn);
    }

    #[test]
    fn unix_sockets_have_no_port() {
        assert_eq!(port("10.0.0.1:10810"), Some(10810));
        assert_eq!(port("[::1]:99"), Some(99));
        assert_eq!(port("unix:/run/x:99"), None);
    }
}
