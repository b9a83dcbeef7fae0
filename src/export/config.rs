//! What an export is made of, and why it cannot be.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use super::home::Home;
use crate::fetch::Traffic;
use crate::pull::Order;
use crate::store::MapError;
use crate::units::BlockSize;
use crate::upstream::UpstreamError;

/// A lazily filled export.
#[derive(Clone, Debug)]
pub struct ExportConfig {
    /// Its name, for descriptions and messages.
    pub name: String,
    /// The export's own directory: `disk.img`, `map` and `map.live` live there. Made when it is not there.
    pub directory: PathBuf,
    /// The store, when it is not `disk.img` of the directory: a file or a block device.
    pub store: Option<PathBuf>,
    /// Whose content this is, in words (at most 1024 bytes): the source's URI or the migration's identity. A directory
    /// that was begun with another one is refused.
    pub identity: String,
    /// The size in bytes where it is known; otherwise it is that of the map that is there, or of the upstream.
    pub size: Option<u64>,
    /// The store was the disk before: what the upstream says was not written since need not be fetched. Not for a map of
    /// an earlier process.
    pub returns: bool,
    /// The unit of a new map.
    pub block_size: BlockSize,
    /// The order of the background pull.
    pub order: Order,
    /// Bytes a second of background pull; `None`: as fast as it goes.
    pub rate: Option<u64>,
    /// Whether to pull in the background at all.
    pub background: bool,
    /// What its pull shares with others.
    pub traffic: Arc<Traffic>,
    /// Where its clients are served and what they wait for is fetched; `None`: where everything else is done.
    pub home: Option<Arc<Home>>,
}

impl ExportConfig {
    /// With the defaults.
    pub fn new(name: impl Into<String>, directory: impl Into<PathBuf>, identity: impl Into<String>) -> ExportConfig {
        ExportConfig {
            name: name.into(),
            directory: directory.into(),
            store: None,
            identity: identity.into(),
            size: None,
            returns: false,
            block_size: BlockSize::DEFAULT,
            order: Order::default(),
            rate: None,
            background: true,
            traffic: Arc::default(),
            home: None,
        }
    }

    /// Where the store is.
    pub fn store_path(&self) -> PathBuf {
        self.store.clone().unwrap_or_else(|| self.directory.join("disk.img"))
    }
}

/// Why there is no export. Nothing that was there has been changed.
#[derive(Debug, thiserror::Error)]
pub enum ExportError {
    /// A local image cannot be opened.
    #[error("cannot open the image {}: {source}; check the path and its permissions", path.display())]
    Image {
        /// The image.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// The store of a lazily filled export cannot be opened or made.
    #[error("cannot use {} as the store: {source}; check the path, its permissions and the free space", path.display())]
    Store {
        /// The store.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// There is a file where a new store would be.
    #[error("{} holds data already and no block map belongs to it; name another --store, or move it away", path.display())]
    StoreInUse {
        /// The file.
        path: PathBuf,
    },
    /// The map says that blocks are there, but the store is gone.
    #[error("the store {} is gone, but its block map {} is not; bring the store back, or remove the export and pull it again", store.display(), map.display())]
    StoreGone {
        /// The store.
        store: PathBuf,
        /// The map.
        map: PathBuf,
    },
    /// The store has another size than the map says.
    #[error("the store {} has {found} bytes, its block map is of {expected}; bring the right store back, or remove the export", path.display())]
    StoreSize {
        /// The store.
        path: PathBuf,
        /// Bytes there.
        found: u64,
        /// Bytes by the map.
        expected: u64,
    },
    /// The block map cannot be used.
    #[error(transparent)]
    Map(#[from] MapError),
    /// The upstream is needed for the size of a new export.
    #[error(transparent)]
    Upstream(#[from] UpstreamError),
    /// Beyond [`crate::limits::MAX_DISK`].
    #[error("a disk of {0} bytes is larger than this program handles (64 TiB)")]
    TooLarge(u64),
}
