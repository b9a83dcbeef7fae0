//! Which blocks of a disk are here, and which were written here.
//!
//! [`BlockMap`] holds the present and dirty planes over a memory that it is given ([`Planes`]: heap, or a live file);
//! [`codec`] turns pages of it into checked bytes and back. Pure: no file, no socket, no clock.

pub mod codec;
mod map;
mod planes;

pub use map::{BlockMap, MissingRuns};
pub use planes::{HeapPlanes, Planes};

/// Words of one plane that one page of the durable form carries (see [`codec`]).
pub const WORDS_PER_PAGE: usize = 255;

/// Blocks that one page of the durable form carries.
pub const BLOCKS_PER_PAGE: u64 = WORDS_PER_PAGE as u64 * 64;

/// Words that a plane of `blocks` blocks takes.
pub fn words_for(blocks: u64) -> usize {
    blocks.div_ceil(64) as usize
}

/// Pages that the durable form of `blocks` blocks takes.
pub fn pages_for(blocks: u64) -> usize {
    blocks.div_ceil(BLOCKS_PER_PAGE) as usize
}
