//! What the operator says when a node starts.

use std::path::PathBuf;

use nbd::address::Address;

use super::DiskName;
use crate::migration::driver::Runtimes;
use crate::migration::lease::Timings;

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
    /// The runtimes that may restore containers here.
    pub runtimes: Runtimes,
    /// Where bundles are, one directory a container.
    pub bundle_dir: Option<PathBuf>,
    /// Where disks of containers are mounted, one directory a disk.
    pub mount_dir: Option<PathBuf>,
    /// Freeze a container that came here when a read of its disk waits longer than this for the source.
    pub starve_after: Option<std::time::Duration>,
    /// The lease of the migrations that begin here.
    pub timings: Timings,
}
