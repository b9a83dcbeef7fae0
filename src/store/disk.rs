//! A store with the map of what is in it, and what is known of its holes.

use std::io;
use std::os::fd::BorrowedFd;
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

    /// See [`Store::read_cached`].
    #[inline]
    pub fn read_cached(&self, offset: u64, buffer: &mut [u8]) -> io::Result<bool> {
        self.store.read_cached(offset, buffer)
    }

    /// See [`Store::mark`].
    pub fn mark(&self) -> io::Result<Option<ImageMark>> {
        self.store.mark()
    }

    /// See [`Store::splice_at`].
    pub fn splice(&self, offset: u64, length: usize, pipe: BorrowedFd<'_>) -> io::Result<bool> {
        self.store.splice_at(offset, length, pipe)
    }

    /// See [`Store::is_rotational`].
    pub fn is_rotational(&self) -> bool {
        self.store.is_rotational()
    }

    /// See [`Store::write_at`].
    #[inline]
    pub fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        let result = self.store.write_at(offset, data);
        // Also after a failure: a part of it may have been written.
        self.holes.written(ByteRange::at(offset, data.len() as u64));
        result
    }

    /// See [`Store::takes_pages`].
    pub fn takes_pages(&self) -> bool {
        self.store.takes_pages()
    }

    /// See [`Store::write_pages`].
    pub fn write_pages(&self, range: ByteRange, pipe: BorrowedFd<'_>) -> io::Result<()> {
        let result = self.store.write_pages(range, pipe);
        self.holes.written(range);
        result
    }

    /// See [`Store::write_out`].
    pub fn write_out(&self, range: ByteRange, wait: bool) -> io::Result<()> {
        self.store.write_out(range, wait)
    }

    /// See [`Store::write_zeroes`].
    pub fn write_zeroes(&self, range: ByteRange, no_hole: bool) -> io::Result<()> {
        self.zeroing(range, no_hole, || self.store.write_zeroes(range, no_hole).map(|()| true)).map(drop)
    }

    /// See [`Store::zero_fast`].
    pub fn zero_fast(&self, range: ByteRange, no_hole: bool) -> io::Result<bool> {
        self.zeroing(range, no_hole, || self.store.zero_fast(range, no_hole))
    }

    /// See [`Store::discard`].
    pub fn discard(&self, range: ByteRange) -> io::Result<()> {
        self.zeroing(range, false, || self.store.discard(range).map(|()| true)).map(drop)
    }

    /// Around each call that makes a range read as zeroes and says whether it did.
    fn zeroing(&self, range: ByteRange, allocated: bool, zero: impl FnOnce() -> io::Result<bool>) -> io::Result<bool> {
        if !allocated {
            self.holes.discarding(range);
        }
        let done = zero();
        if !allocated && matches!(done, Ok(true)) {
            self.holes.discarded(range);
        } else {
            self.holes.written(range);
        }
        done
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

    /// A store whose every discard is overtaken by a write of the first block, which is then in the store.
    struct Overtaken(FileStore, std::sync::OnceLock<std::sync::Weak<Disk>>);

    impl Store for Overtaken {
        fn size(&self) -> u64 {
            self.0.size()
        }
        fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
            self.0.read_at(offset, buffer)
        }
        fn write_at(&self, offset: u64, data: &[u8]) -> io::Result<()> {
            self.0.write_at(offset, data)
        }
        fn write_zeroes(&self, range: ByteRange, no_hole: bool) -> io::Result<()> {
            self.0.write_zeroes(range, no_hole)
        }
        fn discard(&self, range: ByteRange) -> io::Result<()> {
            self.0.discard(range)?;
            self.1.get().unwrap().upgrade().unwrap().write(0, &[5; 4096])
        }
        fn sync(&self) -> io::Result<crate::store::Durable> {
            self.0.sync()
        }
        fn data_ranges(&self, from: u64, max: usize) -> io::Result<Option<Vec<ByteRange>>> {
            self.0.data_ranges(from, max)
        }
    }

    #[test]
    fn a_write_that_overtakes_a_discard_is_no_hole() {
        let dir = tempfile::tempdir().unwrap();
        let file = FileStore::open_or_create(&dir.path().join("disk"), 65536).unwrap();
        let store = Arc::new(Overtaken(file, std::sync::OnceLock::new()));
        let disk = Arc::new(Disk::new(store.clone(), BlockMap::full(16), BlockSize::DEFAULT));
        store.1.set(Arc::downgrade(&disk)).unwrap();
        disk.scan_holes().unwrap();
        disk.discard(ByteRange::new(0, 65536)).unwrap();
        let mut first = [0; 4096];
        disk.read(0, &mut first).unwrap();
        assert_eq!((first, disk.hole_run(0, 65536)), ([5; 4096], (4096, false)));
        assert_eq!(disk.hole_run(4096, 65536), (65536, true));
    }
}
