//! A store with the map of what is in it, and what is known of its holes.

use std::io;
use std::sync::Arc;

use super::Store;
use super::holes::Holes;
use crate::block_map::BlockMap;
use crate::units::{BlockSize, ByteRange, ImageMark};

/// The local side of a virtual disk. All changes of its bytes go through it, so that no written block passes for a hole.
pub struct Disk {
    store: Arc<dyn Store>,
    /// What is present and dirty.
    pub map: BlockMap,
    /// The unit of the map.
    pub block_size: BlockSize,
    holes: Holes,
}

impl Disk {
    /// A map must be of the store's size.
    pub fn new(store: Arc<dyn Store>, map: BlockMap, block_size: BlockSize) -> Disk {
        debug_assert_eq!(map.blocks(), block_size.count(store.size()));
        Disk { store, map, block_size, holes: Holes::default() }
    }

    /// In bytes.
    pub fn size(&self) -> u64 {
        self.store.size()
    }

    /// See [`Store::read_at`].
    #[inline]
    pub fn read(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        self.store.read_at(offset, buffer)
    }

    /// See [`Store::mark`].
    pub fn mark(&self) -> io::Result<Option<ImageMark>> {
        self.store.mark()
    }

    /// See [`Store::write_at`].
    #[inline]
    pub fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        let result = self.store.write_at(offset, data);
        // Also after a failure: a part of it may have been written.
        self.holes.written(ByteRange::at(offset, data.len() as u64));
        result
    }

    /// See [`Store::write_zeroes`].
    pub fn write_zeroes(&self, range: ByteRange, no_hole: bool) -> io::Result<()> {
        let result = self.store.write_zeroes(range, no_hole);
        if no_hole || result.is_err() {
            self.holes.written(range);
        } else {
            self.holes.discarded(range);
        }
        result
    }

    /// See [`Store::discard`].
    pub fn discard(&self, range: ByteRange) -> io::Result<()> {
        let result = self.store.discard(range);
        if result.is_ok() {
            self.holes.discarded(range);
        }
        result
    }

    /// See [`Store::sync`].
    pub fn sync(&self) -> io::Result<super::Durable> {
        self.store.sync()
    }

    /// Whether the holes are known; if not, [`Disk::scan_holes`] must come first.
    pub fn holes_known(&self) -> bool {
        self.holes.known()
    }

    /// Finds the holes. May take long.
    pub fn scan_holes(&self) -> io::Result<()> {
        self.holes.scan(self.store.as_ref())
    }

    /// Whether the byte at `at` lies in a hole that is known, and up to where (at most `end`) that is so.
    pub fn hole_run(&self, at: u64, end: u64) -> (u64, bool) {
        self.holes.run(at, end)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::FileStore;

    fn disk(size: u64) -> (tempfile::TempDir, Disk) {
        let dir = tempfile::tempdir().unwrap();
        let store = Arc::new(FileStore::open_or_create(&dir.path().join("disk"), size).unwrap());
        let map = BlockMap::full(BlockSize::DEFAULT.count(size));
        (dir, Disk::new(store, map, BlockSize::DEFAULT))
    }

    #[test]
    fn what_is_written_before_during_or_after_the_scan_is_no_hole() {
        let size = (1 << 20) + 100;
        let (_dir, disk) = disk(size);
        disk.write(8192, &[1; 10]).unwrap();
        disk.scan_holes().unwrap();
        disk.write(65536 + 4000, &[1; 200]).unwrap();
        assert_eq!(disk.hole_run(0, size), (8192, true));
        assert!(!disk.hole_run(8192, size).1);
        assert_eq!(disk.hole_run(65536, size), (65536 + 8192, false));
        assert_eq!(disk.hole_run(65536 + 8192, size), (size, true));
        disk.discard(ByteRange::new(8192, 65536 + 4097)).unwrap();
        assert_eq!(disk.hole_run(0, size), (65536 + 4096, true), "only whole granules become holes");
        disk.write_zeroes(ByteRange::new(0, 4096), true).unwrap();
        assert!(!disk.hole_run(0, size).1, "allocated zeroes are no hole");
    }
}
