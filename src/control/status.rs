//! What `status --json` says. The names are part of the contract; fields are added, never renamed.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::migration::driver::ContainerState;

/// The version of what [`NodeStatus`] and [`DiskStatus`] look like as JSON.
pub const SCHEMA: u32 = 1;

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
    /// Of a disk that was given away: how far the destination has said it is.
    #[serde(default)]
    pub destination: Option<Filling>,
}

/// How far a disk has filled.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Filling {
    /// Bytes of blocks that are there.
    pub present_bytes: u64,
    /// Bytes of blocks that are not.
    pub missing_bytes: u64,
    /// Bytes per second.
    pub pull_rate: u64,
    /// Seconds until all is there, when that can be said.
    pub eta_s: Option<u64>,
}

impl Filling {
    /// Of a disk of `size` bytes.
    pub fn of(size: u64, present_bytes: u64, pull_rate: u64) -> Self {
        let missing_bytes = size.saturating_sub(present_bytes);
        let eta_s = if missing_bytes == 0 { Some(0) } else { missing_bytes.checked_div(pull_rate) };
        Self { present_bytes, missing_bytes, pull_rate, eta_s }
    }
}

impl DiskStatus {
    /// What is to be said of a container that does not go on here, although its disk came back.
    pub fn stuck(&self) -> Option<String> {
        let id = self.container.as_ref().filter(|_| self.container_state == Some(ContainerState::Stuck))?;
        Some(format!("container {id} DOES NOT GO ON: `lazy-migrate rollback {}` tries again", self.name))
    }

    /// What a bar shows: the host where it fills.
    pub fn filling(&self) -> Filling {
        self.destination.unwrap_or(Filling {
            present_bytes: self.present_bytes,
            missing_bytes: self.missing_bytes,
            pull_rate: self.pull_rate,
            eta_s: self.eta_s,
        })
    }
}

/// A node.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct NodeStatus {
    /// The version of this shape: it rises when a field changes its meaning or goes, not when one is added.
    pub schema: u32,
    /// The program's version.
    pub version: String,
    /// Where it keeps its disks' files.
    pub state_dir: PathBuf,
    /// The NBD addresses.
    pub nbd: Vec<String>,
    /// The peer address.
    pub peer: Option<String>,
    /// All exports, by name.
    pub disks: Vec<DiskStatus>,
}
