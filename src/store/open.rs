//! Both forms of the map together: which one counts when an export is opened.

use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;

use super::durable_map::{MapError, MapFile};
use super::live_map::{BootId, LiveMap};
use crate::block_map::{BlockMap, Planes, WORDS_PER_PAGE, pages_for};

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
        if let Some(live) = LiveMap::reopen(&self.live, &header, boot)? {
            let map = BlockMap::new(Box::new(live), blocks);
            let loaded = file.load_each(|page, words| {
                if map.snapshot(page) != *words {
                    map.mark_changed(page);
                }
            });
            match loaded {
                // A page that could not be read has a generation that is not known.
                Err(error @ MapError::Io { .. }) => return Err(error),
                // A damaged page does no harm here: every page is written anew from the live map.
                Err(_) => (0..pages_for(blocks)).for_each(|page| map.mark_changed(page)),
                Ok(()) => {}
            }
            return Ok(OpenedMap { map, file });
        }
        // A process that ended in order has removed it. After any other end, bytes of a block may have been changed and be
        // on the disk although nobody flushed: that such a block is clean would be a guess.
        let interrupted = self.live.exists();
        let mut guessed = Vec::new();
        let live = LiveMap::create(&self.live, &header, boot, |live| {
            file.load(live)?;
            let words = live.present().iter().zip(live.dirty()).enumerate();
            for (word, (present, dirty)) in words.filter(|_| interrupted) {
                let present = present.load(Ordering::Relaxed);
                if dirty.load(Ordering::Relaxed) != present {
                    dirty.store(present, Ordering::Relaxed);
                    guessed.push(word / WORDS_PER_PAGE);
                }
            }
            Ok(())
        })?;
        let map = BlockMap::new(Box::new(live), blocks);
        guessed.into_iter().for_each(|page| map.mark_changed(page));
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
