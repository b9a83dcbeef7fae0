//! An export in memory: for tests, examples and measurements.

use std::ops::Range;
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use bytes::Bytes;

use crate::export::{Answer, Export, ExportInfo, Exports, Extent, ReadAnswer, STATE_HOLE, STATE_ZERO, ZeroMode};
use crate::wire::{BASE_ALLOCATION, Errno};

/// Unit in which [`MemoryDisk`] tells holes, in bytes.
const BLOCK: u64 = 4096;
static ZEROES: [u8; BLOCK as usize] = [0; BLOCK as usize];

/// A disk in memory. It is as durable as the process, so that FLUSH and FUA have nothing to do. A block of 4 KiB that
/// is all zeroes is told as a hole. Ranges must lie within the disk, as the server sees to.
pub struct MemoryDisk {
    content: RwLock<Vec<u8>>,
    read_only: bool,
}

impl MemoryDisk {
    /// A disk with this content.
    pub fn new(content: Vec<u8>) -> MemoryDisk {
        MemoryDisk { content: RwLock::new(content), read_only: false }
    }

    /// A disk of `size` zero bytes.
    pub fn zeroed(size: usize) -> MemoryDisk {
        MemoryDisk::new(vec![0; size])
    }

    /// The same disk, refusing changes by its clients.
    pub fn read_only(self) -> MemoryDisk {
        MemoryDisk { read_only: true, ..self }
    }

    /// A copy of the content.
    pub fn content(&self) -> Vec<u8> {
        self.lock().clone()
    }

    // A panic while the lock was held cannot leave bytes half written in a way that matters here.
    fn lock(&self) -> RwLockReadGuard<'_, Vec<u8>> {
        self.content.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn lock_mut(&self) -> RwLockWriteGuard<'_, Vec<u8>> {
        self.content.write().unwrap_or_else(PoisonError::into_inner)
    }

    fn change(&self, offset: u64, length: u64, change: impl FnOnce(&mut [u8])) -> Answer<()> {
        let mut content = self.lock_mut();
        let range = content.get_mut(offset as usize..).and_then(|rest| rest.get_mut(..length as usize));
        Answer::Now(range.map(change).ok_or(Errno::ENOSPC))
    }
}

impl Export for MemoryDisk {
    fn info(&self) -> ExportInfo {
        ExportInfo {
            size: self.lock().len() as u64,
            read_only: self.read_only,
            description: "a disk in memory".to_owned(),
            preferred_block: BLOCK as u32,
            fast_zero: true,
            multi_conn: true,
            contexts: vec![BASE_ALLOCATION.to_owned()],
            ..ExportInfo::default()
        }
    }

    fn read(&self, offset: u64, buffer: &mut [u8]) -> ReadAnswer {
        let content = self.lock();
        let Some(bytes) = content.get(offset as usize..).and_then(|rest| rest.get(..buffer.len())) else {
            return ReadAnswer::Now(Err(Errno::EINVAL));
        };
        buffer.copy_from_slice(bytes);
        match holes(bytes) {
            none if none.is_empty() => ReadAnswer::Now(Ok(())),
            holes => ReadAnswer::Sparse(holes),
        }
    }

    fn write(&self, offset: u64, data: Bytes, _fua: bool) -> Answer<()> {
        self.change(offset, data.len() as u64, |range| range.copy_from_slice(&data))
    }

    fn flush(&self) -> Answer<()> {
        Answer::Now(Ok(()))
    }

    fn trim(&self, offset: u64, length: u64, _fua: bool) -> Answer<()> {
        self.change(offset, length, |range| range.fill(0))
    }

    fn write_zeroes(&self, offset: u64, length: u64, _mode: ZeroMode, _fua: bool) -> Answer<()> {
        self.change(offset, length, |range| range.fill(0))
    }

    fn cache(&self, _offset: u64, _length: u64) -> Answer<()> {
        Answer::Now(Ok(()))
    }

    fn block_status(&self, context: &str, offset: u64, length: u64, max_extents: usize) -> Answer<Vec<Extent>> {
        if context != BASE_ALLOCATION {
            return Answer::Now(Err(Errno::EINVAL));
        }
        let content = self.lock();
        let end = (offset + length).min(content.len() as u64);
        let mut extents: Vec<Extent> = Vec::new();
        let mut at = offset;
        while at < end {
            let next = ((at / BLOCK + 1) * BLOCK).min(end);
            let zero = content[at as usize..next as usize].iter().all(|byte| *byte == 0);
            let flags = if zero { STATE_HOLE | STATE_ZERO } else { 0 };
            let full = extents.len() == max_extents;
            match extents.last_mut() {
                Some(last) if last.flags == flags => last.length += next - at,
                _ if full => break,
                _ => extents.push(Extent { length: next - at, flags }),
            }
            at = next;
        }
        Answer::Now(Ok(extents))
    }

    fn client_entered(self: Arc<Self>) -> Box<dyn Send + Sync> {
        Box::new(())
    }
}

/// The ranges of zeroes, in whole blocks counted from the start.
fn holes(bytes: &[u8]) -> Vec<Range<usize>> {
    let mut holes: Vec<Range<usize>> = Vec::new();
    for (index, block) in bytes.chunks_exact(BLOCK as usize).enumerate() {
        if block == ZEROES {
            let start = index * BLOCK as usize;
            match holes.last_mut() {
                Some(last) if last.end == start => last.end += block.len(),
                _ => holes.push(start..start + block.len()),
            }
        }
    }
    holes
}

/// One export under one name, which is also the default export.
pub struct SingleExport {
    name: String,
    export: Arc<dyn Export>,
}

impl SingleExport {
    /// Serves `export` as `name` and as the default.
    pub fn new(name: impl Into<String>, export: Arc<dyn Export>) -> SingleExport {
        SingleExport { name: name.into(), export }
    }
}

impl Exports for SingleExport {
    fn find(&self, name: &str) -> Option<Arc<dyn Export>> {
        (name.is_empty() || name == self.name).then(|| self.export.clone())
    }

    fn list(&self) -> Vec<(String, String)> {
        vec![(self.name.clone(), self.export.info().description)]
    }
}
