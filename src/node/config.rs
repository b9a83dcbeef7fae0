//! What the operator says when a node starts.

use std::net::ToSocketAddrs;
use std::path::PathBuf;

use nbd::address::Address;
use nbd::server::TlsPolicy;

use super::{ClientRights, DiskName};
use crate::migration::driver::Runtimes;
use crate::migration::lease::Timings;
use crate::peer::link::NodeTls;

/// A node's settings.
#[derive(Clone, Debug)]
pub struct NodeConfig {
    /// Where everything is kept.
    pub state_dir: PathBuf,
    /// Images that are exports from the start, so that a node that answers has them.
    pub disks: Vec<(DiskName, PathBuf)>,
    /// Where exports are served.
    pub nbd: Vec<Address>,
    /// `host:port` of the peer link; without it this node neither sends nor receives disks.
    pub peer: Option<String>,
    /// `host:port` by which peers reach it, when that is not the address that its connections come from.
    pub advertise: Option<String>,
    /// This host's certificates; without them nothing is encrypted, and nobody has to prove anything.
    pub tls: Option<NodeTls>,
    /// Hosts that may bring disks here, by the name of their certificate.
    pub allowed_peers: Vec<String>,
    /// What NBD clients with a certificate see.
    pub clients: ClientRights,
    /// The runtimes that may restore containers here.
    pub runtimes: Runtimes,
    /// Where bundles are, one directory a container.
    pub bundle_dir: Option<PathBuf>,
    /// Where disks of containers are mounted, one directory a disk.
    pub mount_dir: Option<PathBuf>,
    /// Bytes a second that all pulls in the background take together at most.
    pub pull_rate: Option<u64>,
    /// Freeze a container that came here when a read of its disk waits longer than this for the source.
    pub starve_after: Option<std::time::Duration>,
    /// The lease of the migrations that begin here.
    pub timings: Timings,
}

impl NodeConfig {
    /// Encryption is forced where other hosts can connect.
    pub(super) fn tls_policy(&self, address: &Address) -> TlsPolicy {
        match &self.tls {
            None => TlsPolicy::Off,
            Some(tls) if is_private(address) => TlsPolicy::Offered(tls.server.clone()),
            Some(tls) => TlsPolicy::Required(tls.server.clone()),
        }
    }
}

/// Whether only this host can connect: a Unix socket, or a loopback address.
pub fn is_private(address: &Address) -> bool {
    match address {
        Address::Unix(_) => true,
        Address::Tcp { host, port } => (host.as_str(), *port)
            .to_socket_addrs()
            .is_ok_and(|mut found| found.all(|address| address.ip().is_loopback())),
    }
}
