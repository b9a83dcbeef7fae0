//! The memory under a block map.

use std::sync::atomic::AtomicU64;

/// Two equally long planes of words, bit `n % 64` of word `n / 64` being block `n`.
///
/// The memory may outlive the process (a shared mapping of a file): it then holds whatever the last process left.
pub trait Planes: Send + Sync {
    /// Bits of the blocks whose bytes are in the store.
    fn present(&self) -> &[AtomicU64];
    /// Bits of the blocks that were written locally.
    fn dirty(&self) -> &[AtomicU64];
}

/// Planes on the heap.
pub struct HeapPlanes {
    present: Box<[AtomicU64]>,
    dirty: Box<[AtomicU64]>,
}

impl HeapPlanes {
    /// Planes for `blocks` blocks: nothing present, nothing dirty.
    pub fn new(blocks: u64) -> Self {
        let plane = || (0..super::words_for(blocks)).map(|_| AtomicU64::new(0)).collect();
        Self { present: plane(), dirty: plane() }
    }
}

impl Planes for HeapPlanes {
    fn present(&self) -> &[AtomicU64] {
        &self.present
    }

    fn dirty(&self) -> &[AtomicU64] {
        &self.dirty
    }
}
