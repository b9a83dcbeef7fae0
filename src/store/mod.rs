//! The local bytes under an export.
//!
//! [`Store`] is the only way to them: [`FileStore`] for images and block devices, [`MemoryStore`] for tests and tools,
//! [`FaultyStore`] to see what power loss and a full disk do. [`MapFile`] and [`LiveMap`] keep the block map beside it:
//! the one survives a power loss, the other the death of the process.

mod disk;
mod durable_map;
mod faulty;
mod file;
mod holes;
mod live_map;
mod memory;
mod open;

use std::io;
use std::os::fd::BorrowedFd;

pub use disk::Disk;
pub use durable_map::{MapError, MapFile, MapSnapshot};
pub use faulty::FaultyStore;
pub use file::FileStore;
pub use live_map::{BootId, LiveMap};
pub use memory::MemoryStore;
pub use open::{MapFiles, OpenedMap};

use crate::units::{ByteRange, ImageMark};

/// The proof that everything written to a store before the call of [`Store::sync`] that made it is durable.
///
/// Only the stores of this module can make one; [`MapFile::commit`] asks for it: bytes before bits.
#[derive(Debug)]
#[must_use = "the proof is what lets the block map be persisted"]
pub struct Durable(());

/// Takes bytes out of a pipe that holds them.
pub(crate) fn throw_away(pipe: BorrowedFd<'_>, length: u64) -> io::Result<()> {
    let mut scratch = [0; 16 << 10];
    let mut left = length as usize;
    while left > 0 {
        let most = left.min(scratch.len());
        match nix::unistd::read(pipe, &mut scratch[..most]) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(count) => left -= count,
            Err(nix::errno::Errno::EINTR) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
    Ok(())
}

/// A disk's bytes. Calls come from many threads at once; a range is within the size (callers have checked it).
pub trait Store: Send + Sync + 'static {
    /// Size in bytes.
    fn size(&self) -> u64;

    /// Fills the buffer from `offset`.
    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()>;

    /// The same, but only if it need not wait for a disk: `false` where it would have to, and then the buffer holds nothing
    /// of use.
    fn read_cached(&self, offset: u64, buffer: &mut [u8]) -> io::Result<bool> {
        self.read_at(offset, buffer).map(|()| true)
    }

    /// Has the pages of a range spliced into a pipe that is empty and large enough, without blocking on it. `false`: this
    /// store has none, and nothing is in the pipe.
    fn splice_at(&self, _offset: u64, _length: usize, _pipe: BorrowedFd<'_>) -> io::Result<bool> {
        Ok(false)
    }

    /// Whether [`Store::write_pages`] may be called.
    fn takes_pages(&self) -> bool {
        false
    }

    /// Writes the next bytes that are in a pipe to a range. However it ends, they are no longer in the pipe.
    fn write_pages(&self, range: ByteRange, pipe: BorrowedFd<'_>) -> io::Result<()> {
        throw_away(pipe, range.len())?;
        Err(io::ErrorKind::Unsupported.into())
    }

    /// Writes all of `data` at `offset`.
    fn write_at(&self, offset: u64, data: &[u8]) -> io::Result<()>;

    /// Has what was written to a range written to the disk; with `wait`, and waits until it is there, and lets go of it in memory.
    /// Proves nothing: only [`Store::sync`] does. After an error the next sync fails.
    fn write_out(&self, _range: ByteRange, _wait: bool) -> io::Result<()> {
        Ok(())
    }

    /// Makes a range read as zeroes; with `no_hole` its space stays allocated.
    fn write_zeroes(&self, range: ByteRange, no_hole: bool) -> io::Result<()>;

    /// The same, but only where it takes less time than writing the zeroes would: `false` where it would not, and then
    /// nothing was changed.
    fn zero_fast(&self, _range: ByteRange, _no_hole: bool) -> io::Result<bool> {
        Ok(false)
    }

    /// Gives the space of a range back; it reads as zeroes afterwards.
    fn discard(&self, range: ByteRange) -> io::Result<()>;

    /// When the bytes were last changed by anybody; `None` where nothing tells (a block device, memory).
    fn mark(&self) -> io::Result<Option<ImageMark>> {
        Ok(None)
    }

    /// Whether the bytes lie on a disk that turns, so that neighbours are read faster than strangers.
    fn is_rotational(&self) -> bool {
        false
    }

    /// Makes every write that returned before this call durable. After a failure all later calls fail as well: the
    /// system may have dropped the bytes that it could not write.
    fn sync(&self) -> io::Result<Durable>;

    /// The allocated ranges from `from` on, in order, at most `max` of them; `None` in place of a list: the store
    /// cannot tell. Bytes between them are holes and read as zeroes.
    fn data_ranges(&self, from: u64, max: usize) -> io::Result<Option<Vec<ByteRange>>>;
}

#[cfg(test)]
mod map_tests;
