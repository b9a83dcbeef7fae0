//! What `status --json` says. The names are part of the contract; fields are added, never renamed.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::migration::driver::ContainerState;

/// How long readers waited for missing blocks, in microseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Faults {
    /// Demand fetches.
    pub count: u64,
    /// The median.
    pub p50_us: u64,
    /// The 99th percentile.
    pub p99_us: u64,
    /// The longest.
    pub max_us: u64,
}

/// One export.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct DiskStatus {
    /// Its name.
    pub name: String,
    /// `local`, `pull`, `source` or `destination`.
    pub role: String,
    /// The migration's phase; `serving`, `pulling` or `complete` where there is none.
    pub phase: String,
    /// The fencing token; 0 before any migration.
    pub epoch: u64,
    /// Bytes.
    pub size: u64,
    /// Bytes.
    pub block_size: u32,
    /// Bytes of blocks that are in the local store.
    pub present_bytes: u64,
    /// Bytes of blocks written here since the handover.
    pub dirty_bytes: u64,
    /// Bytes of blocks that are not in the local store.
    pub missing_bytes: u64,
    /// Bytes fetched from the upstream.
    pub pulled_bytes: u64,
    /// Bytes that were not sent, because they are holes or zeroes.
    pub skipped_bytes: u64,
    /// Bytes per second.
    pub pull_rate: u64,
    /// Seconds until all is present, when that can be said.
    pub eta_s: Option<u64>,
    /// Demand fetches.
    pub faults: Faults,
    /// How long I/O was held or waited for the upstream altogether, in microseconds.
    pub stalled_us: u64,
    /// What is left of the lease.
    pub lease_remaining_ms: Option<u64>,
    /// The peer link: `up`, `down` or `none`.
    pub link: String,
    /// From frozen to resumed, once known.
    pub frozen_ms: Option<u64>,
    /// The upstream's state: `none`, `connected`, `connecting` or why it cannot be used.
    pub upstream: String,
    /// NBD clients.
    pub clients: u64,
    /// The attached block device.
    pub device: Option<PathBuf>,
    /// The migration's other host.
    pub peer: Option<String>,
    /// The migration's container.
    pub container: Option<String>,
    /// What that container does here, where it came to.
    pub container_state: Option<ContainerState>,
    /// Why the background pull stands still.
    pub paused: Option<String>,
    /// The last thing that went wrong.
    pub last_error: Option<String>,
}

/// A node.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct NodeStatus {
    /// The program's version.
    pub version: String,
    /// The NBD addresses.
    pub nbd: Vec<String>,
    /// The peer address.
    pub peer: Option<String>,
    /// All exports, by name.
    pub disks: Vec<DiskStatus>,
}
