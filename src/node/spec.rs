//! What a disk is: written down when it is made, read when the node starts.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::DiskName;
use crate::error::{Failure, Outcome};
use crate::pull::Order;
use crate::units::BlockSize;

/// The file in a disk's directory.
const FILE: &str = "disk.json";
/// The version of its shape.
const VERSION: u32 = 1;

/// Where a disk's bytes come from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "kebab-case")]
pub enum Origin {
    /// An image that was there.
    Local {
        /// A file or a block device.
        image: PathBuf,
    },
    /// Any NBD server.
    Pull {
        /// Its URI.
        from: String,
        /// Where the bytes go.
        store: PathBuf,
        /// The background pull's order.
        order: Order,
        /// Its limit in bytes per second.
        rate: Option<u64>,
        /// Whether it runs.
        background: bool,
    },
    /// Another node's disk.
    Migration {
        /// The source's peer address.
        from: String,
        /// Where the bytes go, if not into the disk's directory: where they were when this host gave the disk away.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        store: Option<PathBuf>,
    },
}

impl Origin {
    /// Where its bytes are, if not in the disk's directory.
    pub fn store(&self) -> Option<&Path> {
        match self {
            Origin::Local { image } => Some(image),
            Origin::Pull { store, .. } => Some(store),
            Origin::Migration { store, .. } => store.as_deref(),
        }
    }
}

/// A disk as it was made.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskSpec {
    version: u32,
    /// Its name.
    pub name: DiskName,
    /// Its size in bytes.
    pub size: u64,
    /// The unit of its block map.
    pub block_size: BlockSize,
    /// Where its bytes come from.
    pub origin: Origin,
}

impl DiskSpec {
    /// Of this version.
    pub fn new(name: DiskName, size: u64, block_size: BlockSize, origin: Origin) -> Self {
        Self { version: VERSION, name, size, block_size, origin }
    }

    /// Writes it into the disk's directory, whole or not at all.
    pub fn write(&self, directory: &Path) -> Outcome<()> {
        let path = directory.join(FILE);
        let json = serde_json::to_vec_pretty(self).map_err(Failure::failed)?;
        crate::files::write_atomically(&path, &json)
            .map_err(|error| Failure::failed(format!("cannot write {}: {error}", path.display())))
    }

    /// Reads it; `None` when the directory holds no disk (it was being made when the node died).
    pub fn read(directory: &Path) -> Outcome<Option<Self>> {
        let path = directory.join(FILE);
        let json = match std::fs::read(&path) {
            Ok(json) => json,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(Failure::failed(format!("cannot read {}: {error}", path.display()))),
        };
        let damaged =
            |why: String| Failure::failed(format!("{} cannot be used: {why}; nothing was changed", path.display()));
        let spec: Self = serde_json::from_slice(&json).map_err(|error| damaged(error.to_string()))?;
        if spec.version > VERSION {
            return Err(damaged(format!("it has version {}, newer than {VERSION}", spec.version)));
        }
        if directory.file_name().is_none_or(|name| name != spec.name.as_str()) {
            return Err(damaged(format!("it is of disk '{}'", spec.name)));
        }
        Ok(Some(spec))
    }
}
