//! The live map: the planes in a shared mapping of a file, so that they outlive the process (not the machine).
//!
//! A write that was acknowledged has its bytes in the page cache and its bit in this mapping; both are there after a
//! `kill -9`. After a restart of the machine neither is known to be complete, so the file names the boot that it is
//! valid in, and the durable map is used instead.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering, fence};

use memmap2::MmapRaw;
use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, fallocate};

use super::durable_map::MapError;
use crate::block_map::codec::{Header, PAGE_BYTES};
use crate::block_map::{Planes, words_for};

/// The header is a page of its own, so that the words are aligned.
const WORDS_AT: usize = PAGE_BYTES;
/// The header's words: a mark with the version, the boot (two words), and a checksum of what the map belongs to.
const MARK: u64 = u64::from_le_bytes(*b"LAZYLIV1");

/// A mapped live map: [`Planes`] that survive the process.
pub struct LiveMap {
    mapping: MmapRaw,
    words: usize,
}

impl LiveMap {
    /// Maps the file of an earlier process of the same boot; `None` when there is none that is valid.
    pub fn reopen(path: &Path, header: &Header, boot: BootId) -> Result<Option<LiveMap>, MapError> {
        let words = words_for(header.block_size.count(header.size));
        let file = match OpenOptions::new().read(true).write(true).open(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            other => other.map_err(MapError::io("open", path))?,
        };
        if file.metadata().map_err(MapError::io("read", path))?.len() != length(words) {
            return Ok(None);
        }
        let live = Self::map(&file, words).map_err(MapError::io("map", path))?;
        let valid = live
            .head()
            .iter()
            .zip(head_words(header, boot))
            .all(|(word, wanted)| word.load(Ordering::Acquire) == wanted);
        Ok(valid.then_some(live))
    }

    /// Makes a new live map, filled by `fill`. It takes the place of an older one only when it is whole: who dies or fails
    /// meanwhile changes nothing.
    pub fn create(
        path: &Path,
        header: &Header,
        boot: BootId,
        fill: impl FnOnce(&LiveMap) -> Result<(), MapError>,
    ) -> Result<LiveMap, MapError> {
        let words = words_for(header.block_size.count(header.size));
        let draft = path.with_extension("live.new");
        let make = || -> io::Result<LiveMap> {
            match std::fs::remove_file(&draft) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
            let file = OpenOptions::new().read(true).write(true).create_new(true).open(&draft)?;
            // Every page must have its space: a store to a mapped page that finds the disk full is a SIGBUS.
            match fallocate(&file, FallocateFlags::empty(), 0, length(words) as i64) {
                Err(Errno::EOPNOTSUPP) => fill_with_zeroes(&file, length(words))?,
                other => other?,
            }
            Self::map(&file, words)
        };
        let live = make().map_err(MapError::io("create", path))?;
        let filled = fill(&live);
        if filled.is_err() {
            // It is removed before the next one is made at the latest.
            let _ = std::fs::remove_file(&draft);
        }
        filled?;
        fence(Ordering::Release);
        for (word, value) in live.head().iter().zip(head_words(header, boot)).rev() {
            word.store(value, Ordering::Release);
        }
        std::fs::rename(&draft, path).map_err(MapError::io("create", path))?;
        Ok(live)
    }

    fn map(file: &File, words: usize) -> io::Result<LiveMap> {
        Ok(LiveMap { mapping: MmapRaw::map_raw(file)?, words })
    }

    fn head(&self) -> &[AtomicU64] {
        self.slice(0, HEAD_WORDS)
    }

    #[allow(unsafe_code)]
    fn slice(&self, at: usize, words: usize) -> &[AtomicU64] {
        assert!(at.is_multiple_of(8) && at + words * 8 <= self.mapping.len(), "a slice beyond the mapping");
        // SAFETY: the range lies within the mapping (checked above), which lives as long as `self`; mappings begin at
        // a page and `at` is a multiple of 8, so the words are aligned; they are only ever used as atomics, also by
        // another process that may have the file mapped; and every bit pattern is a valid u64.
        unsafe { std::slice::from_raw_parts(self.mapping.as_mut_ptr().add(at).cast::<AtomicU64>(), words) }
    }
}

impl Planes for LiveMap {
    fn present(&self) -> &[AtomicU64] {
        self.slice(WORDS_AT, self.words)
    }

    fn dirty(&self) -> &[AtomicU64] {
        self.slice(WORDS_AT + self.words * 8, self.words)
    }
}

const HEAD_WORDS: usize = 4;

fn length(words: usize) -> u64 {
    (WORDS_AT + 2 * words * 8) as u64
}

/// Takes the space by writing, where the file system has no call for it.
fn fill_with_zeroes(file: &File, length: u64) -> io::Result<()> {
    let zeroes = [0; 64 * 1024];
    let mut at = 0;
    while at < length {
        let part = (length - at).min(zeroes.len() as u64);
        file.write_all_at(&zeroes[..part as usize], at)?;
        at += part;
    }
    Ok(())
}

fn head_words(header: &Header, boot: BootId) -> [u64; HEAD_WORDS] {
    let of = u64::from(crc32fast::hash(&header.encode()));
    [MARK, boot.0 as u64, (boot.0 >> 64) as u64, of]
}

/// Which boot of the machine this is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BootId(pub u128);

impl BootId {
    /// The running kernel's (`/proc/sys/kernel/random/boot_id`).
    pub fn current() -> Result<BootId, MapError> {
        let path = Path::new("/proc/sys/kernel/random/boot_id");
        let text = std::fs::read_to_string(path).map_err(MapError::io("find the boot of", path))?;
        let digits: String = text.chars().filter(char::is_ascii_hexdigit).collect();
        u128::from_str_radix(&digits, 16)
            .map(BootId)
            .map_err(|error| MapError::io("find the boot of", path)(io::Error::other(error)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn space_that_is_taken_by_writing_is_taken_to_the_last_byte() {
        let file = tempfile::tempfile().unwrap();
        fill_with_zeroes(&file, 200_001).unwrap();
        assert_eq!(file.metadata().unwrap().len(), 200_001);
    }
}
