//! A store in a (sparse) file or on a block device.

use std::fs::{File, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::os::fd::{AsRawFd, BorrowedFd};
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};

use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, PosixFadviseAdvice, SpliceFFlags, fallocate, posix_fadvise, splice};
use nix::unistd::{Whence, lseek};

use super::{Durable, Store};
use crate::units::{ByteRange, ImageMark};

/// What plain zeroing writes at a time where the file system has no call for it.
static ZEROES: [u8; 256 * 1024] = [0; 256 * 1024];

/// See the module's documentation.
pub struct FileStore {
    file: File,
    size: u64,
    sync_failed: AtomicBool,
    /// Held while a sync runs and while memory is let go of: see [`FileStore::let_go`].
    syncing: Mutex<()>,
    /// Its file system has no pages to give.
    splices_not: AtomicBool,
    /// It takes none.
    takes_none: AtomicBool,
    /// It does not tell whether a read would wait.
    waits_unasked: AtomicBool,
}

impl FileStore {
    /// Opens an image or a block device with the size that it has.
    pub fn open(path: &Path, read_only: bool) -> io::Result<Self> {
        let mut file = OpenOptions::new().read(true).write(!read_only).open(path)?;
        let kind = file.metadata()?.file_type();
        if !kind.is_file() && !kind.is_block_device() {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "it is neither a file nor a block device"));
        }
        let size = file.seek(SeekFrom::End(0))?;
        Ok(Self::of(file, size))
    }

    /// Opens the store of a lazily filled export: a file is made, or lengthened, to exactly `size`; a block device must
    /// have at least `size`.
    pub fn open_or_create(path: &Path, size: u64) -> io::Result<Self> {
        let made = !path.exists();
        let mut file = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path)?;
        if file.metadata()?.file_type().is_block_device() {
            let found = file.seek(SeekFrom::End(0))?;
            if found < size {
                let why = format!("the device has {found} bytes, the disk {size}");
                return Err(io::Error::new(io::ErrorKind::InvalidInput, why));
            }
        } else if file.metadata()?.len() != size {
            // Only then: it would count as a change of the content.
            file.set_len(size)?;
        }
        if made {
            // What is written to it later is durable only if it can be found.
            file.sync_all()?;
            crate::files::sync_parent(path)?;
        }
        Ok(Self::of(file, size))
    }

    fn of(file: File, size: u64) -> Self {
        let no = || AtomicBool::new(false);
        Self {
            file,
            size,
            sync_failed: no(),
            syncing: Mutex::new(()),
            splices_not: no(),
            takes_none: no(),
            waits_unasked: no(),
        }
    }

    fn fallocate(&self, range: ByteRange, flags: FallocateFlags) -> Result<(), Errno> {
        let length = range.len() as nix::libc::off_t;
        loop {
            match fallocate(&self.file, flags, range.start as nix::libc::off_t, length) {
                Err(Errno::EINTR) => {}
                result => return result,
            }
        }
    }

    /// Has the system let go of the memory of a range that was written out. Not after a failure: what could not be written
    /// passes for written then, and the memory holds the only copy. The kernel tells each error once, so who waited for
    /// this range may have heard nothing of one that a sync beside it was told, and has not yet noted.
    fn let_go(&self, range: ByteRange) {
        let _no_sync = self.syncing.lock().unwrap_or_else(PoisonError::into_inner);
        if !self.sync_failed.load(Ordering::Acquire) {
            // Advice: nobody minds if it is not taken.
            let (start, length) = (range.start as i64, range.len() as i64);
            let _ = posix_fadvise(&self.file, start, length, PosixFadviseAdvice::POSIX_FADV_DONTNEED);
        }
    }

    fn copy_from(&self, pipe: BorrowedFd<'_>, range: ByteRange) -> io::Result<()> {
        let mut buffer = vec![0; (range.len() as usize).min(ZEROES.len())];
        let mut at = range.start;
        while at < range.end {
            let most = buffer.len().min((range.end - at) as usize);
            let count = match nix::unistd::read(pipe, &mut buffer[..most]) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(count) => count,
                Err(Errno::EINTR) => continue,
                Err(errno) => return Err(errno.into()),
            };
            if let Err(error) = self.file.write_all_at(&buffer[..count], at) {
                super::throw_away(pipe, range.end - at - count as u64)?;
                return Err(error);
            }
            at += count as u64;
        }
        Ok(())
    }

    fn zero_by_writing(&self, range: ByteRange) -> io::Result<()> {
        let mut at = range.start;
        while at < range.end {
            let length = (range.end - at).min(ZEROES.len() as u64);
            self.file.write_all_at(&ZEROES[..length as usize], at)?;
            at += length;
        }
        Ok(())
    }
}

impl Store for FileStore {
    fn size(&self) -> u64 {
        self.size
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        self.file.read_exact_at(buffer, offset)
    }

    fn read_cached(&self, offset: u64, buffer: &mut [u8]) -> io::Result<bool> {
        if !self.waits_unasked.load(Ordering::Relaxed) {
            match read_without_waiting(&self.file, offset, buffer) {
                Ok(count) => return Ok(count == buffer.len()),
                Err(Errno::EAGAIN | Errno::EINTR) => return Ok(false),
                // Not every file system can.
                Err(Errno::EOPNOTSUPP | Errno::EINVAL | Errno::ENOSYS) => {
                    self.waits_unasked.store(true, Ordering::Relaxed);
                }
                Err(errno) => return Err(errno.into()),
            }
        }
        self.read_at(offset, buffer).map(|()| true)
    }

    fn mark(&self) -> io::Result<Option<ImageMark>> {
        let found = self.file.metadata()?;
        let modified_ns = found.mtime().saturating_mul(1_000_000_000).saturating_add(found.mtime_nsec());
        Ok(found.is_file().then_some(ImageMark { modified_ns, size: found.len() }))
    }

    fn splice_at(&self, offset: u64, length: usize, pipe: BorrowedFd<'_>) -> io::Result<bool> {
        if self.splices_not.load(Ordering::Relaxed) {
            return Ok(false);
        }
        let flags = SpliceFFlags::SPLICE_F_NONBLOCK | SpliceFFlags::SPLICE_F_MOVE;
        let mut at = offset as nix::libc::loff_t;
        let mut left = length;
        while left > 0 {
            match splice(&self.file, Some(&mut at), pipe, None, left, flags) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(count) => left -= count,
                Err(Errno::EINTR) => {}
                // Not every file system can.
                Err(Errno::EINVAL | Errno::EOPNOTSUPP) if left == length => {
                    self.splices_not.store(true, Ordering::Relaxed);
                    return Ok(false);
                }
                Err(errno) => return Err(errno.into()),
            }
        }
        Ok(true)
    }

    fn takes_pages(&self) -> bool {
        !self.takes_none.load(Ordering::Relaxed)
    }

    fn write_pages(&self, range: ByteRange, pipe: BorrowedFd<'_>) -> io::Result<()> {
        let mut at = range.start as nix::libc::loff_t;
        loop {
            let left = (range.end - at as u64) as usize;
            if left == 0 {
                return Ok(());
            }
            match splice(pipe, None, &self.file, Some(&mut at), left, SpliceFFlags::SPLICE_F_MOVE) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(_) | Err(Errno::EINTR) => {}
                // Not every file system can.
                Err(Errno::EINVAL | Errno::EOPNOTSUPP) => {
                    self.takes_none.store(true, Ordering::Relaxed);
                    return self.copy_from(pipe, ByteRange::new(at as u64, range.end));
                }
                Err(errno) => {
                    super::throw_away(pipe, left as u64)?;
                    return Err(errno.into());
                }
            }
        }
    }

    fn is_rotational(&self) -> bool {
        let Ok(found) = self.file.metadata() else { return false };
        let device = if found.file_type().is_block_device() { found.rdev() } else { found.dev() };
        let (major, minor) = (nix::sys::stat::major(device), nix::sys::stat::minor(device));
        let device = Path::new("/sys/dev/block").join(format!("{major}:{minor}"));
        // A partition has its queue one directory above. File systems without a device of their own have none.
        ["queue/rotational", "../queue/rotational"]
            .iter()
            .find_map(|name| std::fs::read_to_string(device.join(name)).ok())
            .is_some_and(|text| text.trim() == "1")
    }

    fn write_at(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.file.write_all_at(data, offset)
    }

    fn write_out(&self, range: ByteRange, wait: bool) -> io::Result<()> {
        match sync_file_range(&self.file, range, wait) {
            Ok(()) => {
                if wait {
                    self.let_go(range);
                }
                Ok(())
            }
            // A file system or a device that does not know it.
            Err(Errno::EINVAL | Errno::ENOSYS | Errno::ESPIPE | Errno::EOPNOTSUPP) => Ok(()),
            Err(errno) => {
                // The kernel tells an error once: a later fdatasync would succeed.
                self.sync_failed.store(true, Ordering::Release);
                Err(errno.into())
            }
        }
    }

    fn write_zeroes(&self, range: ByteRange, no_hole: bool) -> io::Result<()> {
        if self.zero_fast(range, no_hole)? { Ok(()) } else { self.zero_by_writing(range) }
    }

    fn zero_fast(&self, range: ByteRange, no_hole: bool) -> io::Result<bool> {
        if range.is_empty() {
            return Ok(true);
        }
        let flags = if no_hole {
            FallocateFlags::FALLOC_FL_ZERO_RANGE | FallocateFlags::FALLOC_FL_KEEP_SIZE
        } else {
            FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE
        };
        match self.fallocate(range, flags) {
            Ok(()) => Ok(true),
            // Not every file system can, and a device wants whole sectors.
            Err(Errno::EOPNOTSUPP | Errno::EINVAL | Errno::ENOSYS) => Ok(false),
            Err(errno) => Err(errno.into()),
        }
    }

    fn discard(&self, range: ByteRange) -> io::Result<()> {
        self.write_zeroes(range, false)
    }

    fn sync(&self) -> io::Result<Durable> {
        let _keeping = self.syncing.lock().unwrap_or_else(PoisonError::into_inner);
        if self.sync_failed.load(Ordering::Acquire) {
            return Err(io::Error::other("an earlier sync of this store failed, its bytes may be lost"));
        }
        match self.file.sync_data() {
            Ok(()) => Ok(Durable(())),
            Err(error) => {
                self.sync_failed.store(true, Ordering::Release);
                Err(error)
            }
        }
    }

    fn data_ranges(&self, from: u64, max: usize) -> io::Result<Option<Vec<ByteRange>>> {
        let mut ranges = Vec::new();
        let mut at = from;
        while at < self.size && ranges.len() < max {
            let start = match lseek(&self.file, at as i64, Whence::SeekData) {
                Ok(start) => start as u64,
                Err(Errno::ENXIO) => break,
                Err(Errno::EINVAL | Errno::EOPNOTSUPP) => return Ok(None),
                Err(errno) => return Err(errno.into()),
            };
            let end = lseek(&self.file, start as i64, Whence::SeekHole)? as u64;
            if start >= self.size || end <= start {
                break;
            }
            at = end;
            ranges.push(ByteRange::new(start, end.min(self.size)));
        }
        Ok(Some(ranges))
    }
}

/// Reads what is in the page cache of the beginning of a range.
#[allow(unsafe_code)]
fn read_without_waiting(file: &File, offset: u64, buffer: &mut [u8]) -> Result<usize, Errno> {
    use nix::libc::{RWF_NOWAIT, SYS_preadv2, c_ulong, iovec, syscall};
    let vector = iovec { iov_base: buffer.as_mut_ptr().cast(), iov_len: buffer.len() };
    // Where a long has 64 bits the first half is all of it.
    let (low, high) = (offset as c_ulong, (offset >> 32) as c_ulong);
    // SAFETY: the descriptor is open and the vector's one buffer writable as long as the references live, which is longer
    // than the call; the kernel writes within its length. (The C library's function is not in every one.)
    let count = unsafe { syscall(SYS_preadv2, file.as_raw_fd(), &raw const vector, 1, low, high, RWF_NOWAIT) };
    Errno::result(count).map(|count| count as usize)
}

#[allow(unsafe_code)]
fn sync_file_range(file: &File, range: ByteRange, wait: bool) -> Result<(), Errno> {
    use nix::libc::{SYNC_FILE_RANGE_WAIT_AFTER, SYNC_FILE_RANGE_WAIT_BEFORE, SYNC_FILE_RANGE_WRITE};
    let flags = if wait {
        SYNC_FILE_RANGE_WAIT_BEFORE | SYNC_FILE_RANGE_WRITE | SYNC_FILE_RANGE_WAIT_AFTER
    } else {
        SYNC_FILE_RANGE_WRITE
    };
    // SAFETY: takes a descriptor, which the reference keeps open, and plain numbers.
    let result = unsafe { nix::libc::sync_file_range(file.as_raw_fd(), range.start as i64, range.len() as i64, flags) };
    Errno::result(result).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn zeroing_and_discarding_at_odd_offsets_change_just_that_range() {
        let dir = tempfile::tempdir().unwrap();
        let store = FileStore::open_or_create(&dir.path().join("disk"), 300_001).unwrap();
        let mut model = vec![7u8; 300_001];
        store.write_at(0, &model).unwrap();
        store.write_zeroes(ByteRange::new(5, 9000), true).unwrap();
        store.write_zeroes(ByteRange::new(12_287, 20_481), false).unwrap();
        store.discard(ByteRange::new(200_000, 300_001)).unwrap();
        for range in [5..9000, 12_287..20_481, 200_000..300_001] {
            model[range].fill(0);
        }
        let mut bytes = vec![1; 300_001];
        store.read_at(0, &mut bytes).unwrap();
        assert!(bytes == model);
    }

    #[test]
    fn holes_lie_between_the_data_ranges() {
        let dir = tempfile::tempdir().unwrap();
        let store = FileStore::open_or_create(&dir.path().join("disk"), 1 << 20).unwrap();
        store.write_at(512 << 10, &[1; 4096]).unwrap();
        let ranges = store.data_ranges(0, 10).unwrap().unwrap();
        assert!(ranges.iter().any(|r| r.start <= 512 << 10 && r.end >= (512 << 10) + 4096), "{ranges:?}");
        assert!(ranges.iter().map(|r| r.len()).sum::<u64>() < 1 << 19, "{ranges:?}");
    }

    #[test]
    fn what_is_in_memory_is_read_without_waiting_and_is_right_wherever_it_lies() {
        let dir = tempfile::tempdir().unwrap();
        let store = FileStore::open_or_create(&dir.path().join("disk"), (5 << 30) + 3).unwrap();
        let model: Vec<u8> = (0..100_000u32).map(|at| (at / 7) as u8).collect();
        for offset in [0, (5 << 30) - 100_000, (4 << 30) - 50] {
            store.write_at(offset, &model).unwrap();
            let mut bytes = vec![0; 100_000];
            assert!(store.read_cached(offset, &mut bytes).unwrap(), "it was written just now");
            assert!(bytes == model, "at {offset}");
        }
        // Half of it lies beyond the end: left to the read that waits, which says so.
        assert!(!store.read_cached(5 << 30, &mut [0; 6]).unwrap());
        assert!(store.read_at(5 << 30, &mut [0; 6]).is_err());
    }

    #[test]
    fn what_could_not_be_written_stays_in_memory() {
        let dir = tempfile::tempdir().unwrap();
        let store = FileStore::open_or_create(&dir.path().join("disk"), 1 << 20).unwrap();
        let range = ByteRange::new(0, 1 << 20);
        let in_memory = || store.read_cached(0, &mut vec![0; 1 << 20]).unwrap();
        store.write_at(0, &vec![7; 1 << 20]).unwrap();
        store.write_out(range, true).unwrap();
        // In a file system that is nothing but memory nothing can be let go of.
        let on_disk = !in_memory();
        store.write_at(0, &vec![8; 1 << 20]).unwrap();
        store.sync_failed.store(true, Ordering::Release);
        store.write_out(range, true).unwrap();
        assert!(in_memory(), "on a disk: {on_disk}");
        assert!(store.sync().is_err());
    }

    #[test]
    fn a_directory_is_no_store() {
        let dir = tempfile::tempdir().unwrap();
        assert!(FileStore::open(dir.path(), true).is_err());
    }
}
