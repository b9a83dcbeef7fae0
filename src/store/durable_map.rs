//! The durable form of the block map in a file: what counts after a power loss.
//!
//! The order of a persist is the point: [`MapFile::snapshot`] takes the bits, **then** the store is synced, **then**
//! [`MapFile::commit`] writes the bits and asks for the sync's proof. So no bit gets there before its bytes, and each
//! page is written to its older slot, so that a torn write leaves the last good one.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};

use super::Durable;
use crate::block_map::codec::{self, BadHeader, BadPage, Header, PAGE_BYTES, PageWords};
use crate::block_map::{BlockMap, Planes, WORDS_PER_PAGE, pages_for};

/// Why a map cannot be used. Nothing was changed on the disk.
#[derive(Debug, thiserror::Error)]
pub enum MapError {
    /// Reading or writing failed.
    #[error("cannot {action} the block map {}: {source}", path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// Why it failed.
        source: io::Error,
    },
    /// Two processes must never fill one store.
    #[error("the block map {} is in use by another process; stop that one first, or use another directory", .0.display())]
    InUse(PathBuf),
    /// Not a map that this program can read.
    #[error("{} is not a usable block map: {source}; remove the export and pull it again", path.display())]
    Header {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        source: BadHeader,
    },
    /// The map of something else.
    #[error("the block map {} belongs to \"{found}\", not to \"{expected}\"; use another directory, or remove that export", path.display())]
    OtherDisk {
        /// The file.
        path: PathBuf,
        /// Whose it is.
        found: String,
        /// Who asked.
        expected: String,
    },
    /// The map of a disk of another size.
    #[error("the block map {} is of a disk of {found} bytes, not {expected}; use another directory, or remove that export", path.display())]
    OtherSize {
        /// The file.
        path: PathBuf,
        /// Bytes there.
        found: u64,
        /// Bytes asked for.
        expected: u64,
    },
    /// Both copies of a page are damaged.
    #[error("the block map {} is damaged: {source}; what was written here since the last flush cannot be told, restore the directory from a copy", path.display())]
    Corrupt {
        /// The file.
        path: PathBuf,
        /// Which page.
        source: BadPage,
    },
}

impl MapError {
    pub(super) fn io(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> MapError {
        move |source| MapError::Io { action, path: path.to_owned(), source }
    }
}

/// Pages that one snapshot has at most: 4 MiB, for 64 GiB of a disk in blocks of 4 KiB.
const SNAPSHOT_PAGES: usize = 1024;

/// Bits that were taken from the map before the store was synced.
#[derive(Debug)]
pub struct MapSnapshot {
    pages: Vec<(usize, PageWords)>,
}

/// The durable map file. One owner at a time; see the module's documentation for the order of a persist.
pub struct MapFile {
    path: PathBuf,
    /// Locked: no other process opens the map while this one has it.
    file: Flock<File>,
    header: Header,
    generations: Vec<u64>,
}

impl MapFile {
    /// Makes the file of a disk of which nothing is present. It appears whole or not at all; an existing one is an error.
    pub fn create(path: &Path, header: &Header) -> Result<MapFile, MapError> {
        let pages = pages_for(header.block_size.count(header.size));
        let draft = path.with_extension("new");
        let make = || -> io::Result<File> {
            let file = OpenOptions::new().read(true).write(true).create(true).truncate(true).open(&draft)?;
            file.write_all_at(&header.encode(), 0)?;
            file.set_len(codec::file_length(pages))?;
            file.sync_all()?;
            // A link fails where a rename would replace.
            std::fs::hard_link(&draft, path)?;
            std::fs::remove_file(&draft)?;
            sync_directory(path)?;
            Ok(file)
        };
        let file = lock(make().map_err(MapError::io("create", path))?, path)?;
        Ok(MapFile { path: path.to_owned(), file, header: header.clone(), generations: vec![0; pages] })
    }

    /// Opens an existing file and checks its header; `None` when there is none. The pages are read by
    /// [`MapFile::load`].
    pub fn open(path: &Path) -> Result<Option<MapFile>, MapError> {
        let file = match OpenOptions::new().read(true).write(true).open(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            other => lock(other.map_err(MapError::io("open", path))?, path)?,
        };
        let mut bytes = [0; PAGE_BYTES];
        match file.read_exact_at(&mut bytes, 0) {
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => {
                return Err(MapError::Header { path: path.to_owned(), source: BadHeader::Damaged });
            }
            other => other.map_err(MapError::io("read", path))?,
        }
        let header = Header::check(&bytes).map_err(|source| MapError::Header { path: path.to_owned(), source })?;
        let pages = pages_for(header.block_size.count(header.size));
        let length = file.metadata().map_err(MapError::io("read", path))?.len();
        if header.size > crate::limits::MAX_DISK || length < codec::file_length(pages) {
            return Err(MapError::Header { path: path.to_owned(), source: BadHeader::Damaged });
        }
        Ok(Some(MapFile { path: path.to_owned(), file, header, generations: vec![0; pages] }))
    }

    /// What the map belongs to.
    pub fn header(&self) -> &Header {
        &self.header
    }

    /// Refuses the map of another disk or size. A size that is not known yet is `None`.
    pub fn expect(&self, identity: &str, size: Option<u64>) -> Result<(), MapError> {
        if self.header.identity != identity {
            let (found, expected) = (self.header.identity.clone(), identity.to_owned());
            return Err(MapError::OtherDisk { path: self.path.clone(), found, expected });
        }
        match size {
            Some(expected) if expected != self.header.size => {
                Err(MapError::OtherSize { path: self.path.clone(), found: self.header.size, expected })
            }
            _ => Ok(()),
        }
    }

    /// Whether no page was ever written.
    pub fn is_blank(&self) -> Result<bool, MapError> {
        let mut bytes = vec![0; 64 * PAGE_BYTES];
        let (mut at, end) = (PAGE_BYTES as u64, codec::file_length(self.generations.len()));
        while at < end {
            let length = (end - at).min(bytes.len() as u64) as usize;
            self.file.read_exact_at(&mut bytes[..length], at).map_err(MapError::io("read", &self.path))?;
            if bytes[..length].iter().any(|byte| *byte != 0) {
                return Ok(false);
            }
            at += length as u64;
        }
        Ok(true)
    }

    /// Reads all pages into planes that hold nothing yet. A damaged page is an error, never a guess.
    pub fn load(&mut self, planes: &dyn Planes) -> Result<(), MapError> {
        self.load_each(|index, words| {
            let first = index * WORDS_PER_PAGE;
            let count = WORDS_PER_PAGE.min(planes.present().len().saturating_sub(first));
            for slot in 0..count {
                // Memory of which nothing is set is not touched: it may take none.
                if words.present[slot] | words.dirty[slot] != 0 {
                    planes.present()[first + slot].store(words.present[slot], Ordering::Relaxed);
                    planes.dirty()[first + slot].store(words.dirty[slot], Ordering::Relaxed);
                }
            }
        })
    }

    /// Reads all pages and shows each that is whole; with one that is not, it ends with an error, but only after the others.
    pub fn load_each(&mut self, mut each: impl FnMut(usize, &PageWords)) -> Result<(), MapError> {
        // What a dead process wrote may be in memory alone: the next persist must not replace the page below it before.
        self.file.sync_data().map_err(MapError::io("sync", &self.path))?;
        let (mut slots, mut damaged) = ([[0; PAGE_BYTES]; 2], None);
        for index in 0..self.generations.len() {
            for (slot, bytes) in slots.iter_mut().enumerate() {
                let offset = codec::slot_offset(index, slot as u64);
                self.file.read_exact_at(bytes, offset).map_err(MapError::io("read", &self.path))?;
            }
            let page = match codec::check_page(index, [&slots[0], &slots[1]]) {
                Ok(page) => page,
                // The others are read all the same: their generations are needed by an owner that knows the bits.
                Err(source) => {
                    damaged.get_or_insert(source);
                    continue;
                }
            };
            self.generations[index] = page.generation;
            each(index, &page.words);
        }
        damaged.map_or(Ok(()), |source| Err(MapError::Corrupt { path: self.path.clone(), source }))
    }

    /// Bits that changed since the last snapshot, of pages from `from` on: a bounded part, so that the map of a large disk
    /// is not in memory twice. To be taken **before** the store is synced.
    pub fn snapshot(map: &BlockMap, from: usize) -> MapSnapshot {
        let pages = map.take_changed(from, SNAPSHOT_PAGES);
        MapSnapshot { pages: pages.into_iter().map(|page| (page, map.snapshot(page))).collect() }
    }

    /// Writes a snapshot and makes it durable. When nothing changed nothing is written. On an error the snapshot's pages
    /// must be marked as changed again ([`MapSnapshot::give_back`]).
    pub fn commit(&mut self, snapshot: &MapSnapshot, _bytes_first: &Durable) -> Result<(), MapError> {
        if snapshot.pages.is_empty() {
            return Ok(());
        }
        for (index, words) in &snapshot.pages {
            let Some(generation) = self.generations.get(*index) else { continue };
            let next = generation + 1;
            let offset = codec::slot_offset(*index, codec::slot_for(next));
            let bytes = codec::encode_page(*index, next, words);
            self.file.write_all_at(&bytes, offset).map_err(MapError::io("write", &self.path))?;
        }
        self.file.sync_data().map_err(MapError::io("sync", &self.path))?;
        // Only now: until a slot is durable the other one is the last good one, and is not written.
        for (index, _) in &snapshot.pages {
            if let Some(generation) = self.generations.get_mut(*index) {
                *generation += 1;
            }
        }
        Ok(())
    }
}

impl MapSnapshot {
    /// Marks its pages as changed again, after a persist that failed.
    pub fn give_back(&self, map: &BlockMap) {
        self.pages.iter().for_each(|(page, _)| map.mark_changed(*page));
    }

    /// Where the next part begins, if this one may not be all.
    pub fn rest(&self) -> Option<usize> {
        let last = self.pages.last().filter(|_| self.pages.len() == SNAPSHOT_PAGES);
        last.map(|(page, _)| page + 1)
    }

    /// Nothing had changed.
    pub fn is_empty(&self) -> bool {
        self.pages.is_empty()
    }
}

fn lock(file: File, path: &Path) -> Result<Flock<File>, MapError> {
    Flock::lock(file, FlockArg::LockExclusiveNonblock).map_err(|(_, errno)| match errno {
        Errno::EWOULDBLOCK => MapError::InUse(path.to_owned()),
        errno => MapError::io("lock", path)(errno.into()),
    })
}

fn sync_directory(path: &Path) -> io::Result<()> {
    let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    File::open(parent)?.sync_all()
}

#[cfg(test)]
mod tests {
    use nix::fcntl::{FcntlArg, SealFlag, fcntl};
    use nix::sys::memfd::{MFdFlags, memfd_create};

    use super::*;
    use crate::block_map::BLOCKS_PER_PAGE;
    use crate::store::{MemoryStore, Store};
    use crate::units::BlockSize;

    #[test]
    fn a_persist_that_fails_half_way_leaves_the_last_good_slot_alone() {
        let file = File::from(memfd_create(c"map", MFdFlags::MFD_ALLOW_SEALING).unwrap());
        // Of two pages only the first has its space.
        file.set_len(codec::file_length(1)).unwrap();
        fcntl(&file, FcntlArg::F_ADD_SEALS(SealFlag::F_SEAL_GROW)).unwrap();
        let path = PathBuf::from("map");
        let header =
            Header { size: 4096 * 2 * BLOCKS_PER_PAGE, block_size: BlockSize::DEFAULT, identity: "disk".into() };
        let mut map = MapFile { file: lock(file, &path).unwrap(), path, header, generations: vec![0; 2] };
        let durable = MemoryStore::new(4096).sync().unwrap();
        let first = MapSnapshot { pages: vec![(0, PageWords::default())] };
        map.commit(&first, &durable).unwrap();
        let slot = |map: &MapFile| {
            let mut bytes = [0; PAGE_BYTES];
            map.file.read_exact_at(&mut bytes, codec::slot_offset(0, codec::slot_for(1))).unwrap();
            bytes
        };
        let good = slot(&map);
        let full = PageWords { present: [u64::MAX; WORDS_PER_PAGE], dirty: [0; WORDS_PER_PAGE] };
        let both = MapSnapshot { pages: vec![(0, full.clone()), (1, full)] };
        for _ in 0..2 {
            assert!(map.commit(&both, &durable).is_err());
            assert!(slot(&map) == good, "what was durable was written over before something newer was");
        }
    }
}
