//! The shapes of the control API: what a command asks, what the node answers. JSON over HTTP on the Unix socket.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::device::Via;
use crate::error::Failure;
use crate::migration::record::{LinkPolicy, RollbackMode};
use crate::node::DiskName;
use crate::pull::Order;

/// `POST /v1/disks`: an existing image becomes an export.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct AddAsk {
    /// The export's name.
    pub name: DiskName,
    /// A file or a block device, absolute.
    pub image: PathBuf,
}

/// `POST /v1/pulls`: a lazily filled export from an NBD server.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct PullAsk {
    /// The export's name.
    pub name: DiskName,
    /// The upstream's NBD URI.
    pub from: String,
    /// Where the bytes go; without it, a file in the state directory.
    pub store: Option<PathBuf>,
    /// The order of the background pull.
    pub order: Order,
    /// The background pull's limit in bytes per second.
    pub rate: Option<u64>,
    /// Whether anything is fetched that was not asked for.
    pub background: bool,
}

/// `POST /v1/disks/NAME/attach`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct AttachAsk {
    /// `/dev/nbdN`; without it, the kernel chooses.
    pub device: Option<PathBuf>,
    /// By the kernel's device, or by FUSE and loop.
    pub via: Via,
}

/// The answer to an attach.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct AttachReply {
    /// The block device; a direct read of it has succeeded.
    pub device: PathBuf,
}

/// `POST /v1/disks/NAME/prepare`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct PrepareCommand {
    /// The destination's peer address.
    pub to: String,
    /// What to do when the destination falls silent after the handover.
    #[serde(flatten)]
    pub policy: LinkPolicy,
}

/// `POST /v1/disks/NAME/migrate`: answered with a stream of [`MigrateEvent`], one JSON object a line.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct MigrateAsk {
    /// The destination's peer address.
    pub to: String,
    /// The runtime's name for the container.
    pub container: String,
    /// Which runtime it runs in.
    pub runtime: String,
    /// Move TCP connections with it.
    pub tcp_established: bool,
    /// When its memory is copied.
    #[serde(default)]
    pub memory: Memory,
    /// What to do when the destination falls silent after the handover.
    #[serde(flatten)]
    pub policy: LinkPolicy,
}

/// When a container's memory is copied.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Memory {
    /// All of it while the container is frozen.
    #[default]
    Frozen,
    /// In rounds while it runs, and what it has written since the last while it is frozen.
    Precopy,
}

/// What happens during a `migrate`.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "kebab-case")]
pub enum MigrateEvent {
    /// The destination is ready.
    Prepared {
        /// Since the command, in milliseconds.
        at_ms: u64,
    },
    /// A round of the memory was copied; the container runs on.
    Precopied {
        /// Since the command, in milliseconds.
        at_ms: u64,
        /// Which; the first is 1.
        round: u32,
        /// Its size.
        image_bytes: u64,
    },
    /// The container stands still.
    Frozen {
        /// Since the command, in milliseconds.
        at_ms: u64,
    },
    /// The checkpoint is at the destination.
    Checkpointed {
        /// Since the command, in milliseconds.
        at_ms: u64,
        /// Its size.
        image_bytes: u64,
    },
    /// The destination owns the disk.
    HandedOver {
        /// Since the command, in milliseconds.
        at_ms: u64,
    },
    /// The container runs at the destination.
    Resumed {
        /// Since the command, in milliseconds.
        at_ms: u64,
        /// From frozen to resumed.
        frozen_ms: u64,
    },
    /// The pull goes on.
    Progress {
        /// Bytes that are at the destination.
        present_bytes: u64,
        /// The disk's size.
        size: u64,
        /// Bytes per second.
        pull_rate: u64,
    },
    /// Everything is at the destination, and the source released.
    Complete(MigrateReport),
    /// It was not done; what the text says is how things stand.
    Failed(Failure),
}

/// The figures of a finished migration.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct MigrateReport {
    /// From frozen to resumed.
    pub frozen_ms: u64,
    /// Fetches that a reader waited for.
    pub demand_fetches: u64,
    /// Bytes that came over the link.
    pub pulled_bytes: u64,
    /// Bytes that did not have to: holes and zeroes.
    pub skipped_bytes: u64,
    /// From the command to complete.
    pub total_s: f64,
}

/// `POST /v1/disks/NAME/rollback`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct RollbackAsk {
    /// Say what would be done, and change nothing.
    pub plan: bool,
    /// Wait until it is safe.
    pub wait: bool,
}

/// What a rollback would do, or did.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RollbackReport {
    /// The disk.
    pub name: DiskName,
    /// What is restored.
    pub mode: RollbackMode,
    /// Whether it was done.
    pub rolled_back: bool,
    /// The phase here, now.
    pub phase: String,
    /// The epoch here, now.
    pub epoch: u64,
    /// The destination.
    pub peer: String,
    /// Whether the destination answers.
    pub peer_reachable: bool,
    /// Whether it can be done at once.
    pub safe_now: bool,
    /// Milliseconds until it is safe without the destination's word.
    pub safe_in_ms: u64,
    /// What the destination wrote since the handover, as last heard: this is lost.
    pub lost_bytes: u64,
    /// The container that goes on here.
    pub container: Option<String>,
    /// From the command to the disk in use again.
    pub took_ms: u64,
}

/// `POST /v1/disks/NAME/verify`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct VerifyReport {
    /// Whether every compared block is the same.
    pub verified: bool,
    /// Bytes that were compared.
    pub compared_bytes: u64,
    /// Bytes written here since the handover: not compared.
    pub dirty_bytes: u64,
    /// Bytes that are not here yet: not compared.
    pub missing_bytes: u64,
    /// Byte offsets of blocks that differ; the first few.
    pub differing: Vec<u64>,
}

impl VerifyReport {
    /// Nothing was compared yet.
    pub(crate) fn new() -> Self {
        Self { verified: true, compared_bytes: 0, dirty_bytes: 0, missing_bytes: 0, differing: Vec::new() }
    }
}

/// What `wait` waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum WaitFor {
    /// Every block is at the destination, durably; at the source: released.
    Complete,
    /// The destination owns the disk.
    Active,
    /// A handover can be done.
    Ready,
    /// The source serves the disk: before a migration, or after a cancel or a rollback.
    Serving,
}
