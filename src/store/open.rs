//! Both forms of the map together: which one counts when an export is opened.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use super::durable_map::{MapError, MapFile};
use super::live_map::{BootId, LiveMap};
use crate::block_map::codec::PageWords;
use crate::block_map::{BlockMap, HeapPlanes, Planes, WORDS_PER_PAGE, pages_for};

/// Where the two forms are: the files `map` and `map.live` of an export's directory.
#[derive(Clone, Debug)]
pub struct MapFiles {
    /// The durable form.
    pub durable: PathBuf,
    /// The live form.
    pub live: PathBuf,
}

/// A map that is open, and the file that it is persisted in.
pub struct OpenedMap {
    /// The map, over the live file.
    pub map: BlockMap,
    /// The durable form.
    pub file: MapFile,
}

impl MapFiles {
    /// In an export's directory.
    pub fn in_directory(directory: &Path) -> MapFiles {
        MapFiles { durable: directory.join("map"), live: directory.join("map.live") }
    }

    /// Opens the map over an already opened (or just created) durable file: the live form of a process that died in
    /// this boot counts, otherwise the durable form. Changes nothing when it fails.
    pub fn open(&self, file: MapFile) -> Result<OpenedMap, MapError> {
        self.open_in_boot(file, BootId::current()?)
    }

    /// The same for a given boot.
    pub fn open_in_boot(&self, mut file: MapFile, boot: BootId) -> Result<OpenedMap, MapError> {
        let header = file.header().clone();
        let blocks = header.block_size.count(header.size);
        let durable = HeapPlanes::new(blocks);
        let loaded = match file.load(&durable) {
            // A page that could not be read has a generation that is not known.
            Err(error @ MapError::Io { .. }) => return Err(error),
            loaded => loaded,
        };
        if let Some(live) = LiveMap::reopen(&self.live, &header, boot)? {
            // A damaged page does no harm here: every page is written anew from the live map.
            let rewrite_all = loaded.is_err();
            let map = BlockMap::new(Box::new(live), blocks);
            for page in 0..pages_for(blocks) {
                if rewrite_all || map.snapshot(page) != page_of(&durable, page) {
                    map.mark_changed(page);
                }
            }
            return Ok(OpenedMap { map, file });
        }
        loaded?;
        // A process that ended in order has removed it. After any other end, bytes of a block may have been changed and be
        // on the disk although nobody flushed: that such a block is clean would be a guess.
        let interrupted = self.live.exists();
        let live = LiveMap::create(&self.live, &header, boot, |live| {
            copy(durable.present(), live.present());
            copy(if interrupted { durable.present() } else { durable.dirty() }, live.dirty());
            Ok(())
        })?;
        let map = BlockMap::new(Box::new(live), blocks);
        for page in 0..pages_for(blocks) {
            if interrupted && map.snapshot(page) != page_of(&durable, page) {
                map.mark_changed(page);
            }
        }
        Ok(OpenedMap { map, file })
    }

    /// From the next process on, the durable form counts: the store may have lost what the live form says is there.
    pub fn distrust_live(&self) -> Result<(), MapError> {
        self.retire_live()?;
        // In its place an empty file, which says that the end was not in order. The old one stays mapped.
        std::fs::File::create(&self.live).map(drop).map_err(MapError::io("create", &self.live))
    }

    /// Removes the live form, after a last persist: the durable form says all.
    pub fn retire_live(&self) -> Result<(), MapError> {
        match std::fs::remove_file(&self.live) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                Err(MapError::io("remove", &self.live)(error))
            }
            _ => Ok(()),
        }
    }
}

fn page_of(planes: &HeapPlanes, page: usize) -> PageWords {
    let mut words = PageWords::default();
    let first = page * WORDS_PER_PAGE;
    let load =
        |plane: &[AtomicU64], slot: usize| plane.get(first + slot).map_or(0, |word| word.load(Ordering::Relaxed));
    for slot in 0..WORDS_PER_PAGE {
        words.present[slot] = load(planes.present(), slot);
        words.dirty[slot] = load(planes.dirty(), slot);
    }
    words
}

fn copy(from: &[AtomicU64], to: &[AtomicU64]) {
    for (from, to) in from.iter().zip(to) {
        to.store(from.load(Ordering::Relaxed), Ordering::Relaxed);
    }
}
