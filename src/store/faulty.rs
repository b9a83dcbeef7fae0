//! A store that breaks on demand: it fails I/O with a given error, and forgets what was not synced on a power loss.

use std::io;
use std::sync::atomic::{AtomicI32, Ordering};
use std::sync::{Mutex, OnceLock, PoisonError};

use super::{Durable, MemoryStore, Store};
use crate::units::ByteRange;

/// A memory store with faults. An error number of 0 means: works.
pub struct FaultyStore {
    live: MemoryStore,
    durable: Mutex<Vec<u8>>,
    write_error: AtomicI32,
    sync_error: AtomicI32,
    before_write: OnceLock<Box<dyn Fn() + Send + Sync>>,
}

impl FaultyStore {
    /// All zeroes, durably.
    pub fn new(size: u64) -> Self {
        Self::from_bytes(vec![0; size as usize])
    }

    /// With durable content.
    pub fn from_bytes(bytes: Vec<u8>) -> Self {
        Self {
            live: MemoryStore::from_bytes(bytes.clone()),
            durable: Mutex::new(bytes),
            write_error: AtomicI32::new(0),
            sync_error: AtomicI32::new(0),
            before_write: OnceLock::new(),
        }
    }

    /// From now on writes, zeroings and discards fail with this error number; 0 ends it.
    pub fn fail_writes(&self, errno: i32) {
        self.write_error.store(errno, Ordering::SeqCst);
    }

    /// Called before each write from now on, on the thread that writes. One for all time.
    pub fn before_writes(&self, call: impl Fn() + Send + Sync + 'static) {
        // The first one stays.
        let _ = self.before_write.set(Box::new(call));
    }

    /// From now on syncs fail with this error number; 0 ends it.
    pub fn fail_syncs(&self, errno: i32) {
        self.sync_error.store(errno, Ordering::SeqCst);
    }

    /// What is on the platter: the bytes as of the last sync.
    pub fn after_power_loss(&self) -> Vec<u8> {
        self.durable.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// What a reader sees now.
    pub fn to_bytes(&self) -> Vec<u8> {
        self.live.to_bytes()
    }
}

fn check(error: &AtomicI32) -> io::Result<()> {
    match error.load(Ordering::SeqCst) {
        0 => Ok(()),
        errno => Err(io::Error::from_raw_os_error(errno)),
    }
}

impl Store for FaultyStore {
    fn size(&self) -> u64 {
        self.live.size()
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        self.live.read_at(offset, buffer)
    }

    fn write_at(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        if let Some(call) = self.before_write.get() {
            call();
        }
        check(&self.write_error)?;
        self.live.write_at(offset, data)
    }

    fn write_zeroes(&self, range: ByteRange, no_hole: bool) -> io::Result<()> {
        check(&self.write_error)?;
        self.live.write_zeroes(range, no_hole)
    }

    fn discard(&self, range: ByteRange) -> io::Result<()> {
        check(&self.write_error)?;
        self.live.discard(range)
    }

    fn sync(&self) -> io::Result<Durable> {
        check(&self.sync_error)?;
        *self.durable.lock().unwrap_or_else(PoisonError::into_inner) = self.live.to_bytes();
        Ok(Durable(()))
    }

    fn data_ranges(&self, _from: u64, _max: usize) -> io::Result<Option<Vec<ByteRange>>> {
        Ok(None)
    }
}
