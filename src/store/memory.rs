//! A store in memory: for tests, and for trying things out.

use std::io;
use std::sync::{PoisonError, RwLock};

use super::{Durable, Store};
use crate::units::ByteRange;

/// Bytes on the heap. Never durable beyond the process, so its proof of durability holds for exactly as long.
pub struct MemoryStore {
    bytes: RwLock<Vec<u8>>,
}

impl MemoryStore {
    /// All zeroes.
    pub fn new(size: u64) -> Self {
        Self::from_bytes(vec![0; size as usize])
    }

    /// With content.
    pub fn from_bytes(bytes: Vec<u8>) -> Self {
        Self { bytes: RwLock::new(bytes) }
    }

    /// A copy of all bytes.
    pub fn to_bytes(&self) -> Vec<u8> {
        self.bytes.read().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl Store for MemoryStore {
    fn size(&self) -> u64 {
        self.bytes.read().unwrap_or_else(PoisonError::into_inner).len() as u64
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        let bytes = self.bytes.read().unwrap_or_else(PoisonError::into_inner);
        let from = bytes.get(offset as usize..offset as usize + buffer.len());
        buffer.copy_from_slice(from.ok_or(io::ErrorKind::UnexpectedEof)?);
        Ok(())
    }

    fn write_at(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        let mut bytes = self.bytes.write().unwrap_or_else(PoisonError::into_inner);
        let to = bytes.get_mut(offset as usize..offset as usize + data.len());
        to.ok_or(io::ErrorKind::WriteZero)?.copy_from_slice(data);
        Ok(())
    }

    fn write_zeroes(&self, range: ByteRange, _no_hole: bool) -> io::Result<()> {
        let mut bytes = self.bytes.write().unwrap_or_else(PoisonError::into_inner);
        bytes.get_mut(range.start as usize..range.end as usize).ok_or(io::ErrorKind::WriteZero)?.fill(0);
        Ok(())
    }

    fn discard(&self, range: ByteRange) -> io::Result<()> {
        self.write_zeroes(range, false)
    }

    fn sync(&self) -> io::Result<Durable> {
        Ok(Durable(()))
    }

    fn data_ranges(&self, _from: u64, _max: usize) -> io::Result<Option<Vec<ByteRange>>> {
        Ok(None)
    }
}
