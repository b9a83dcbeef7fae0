//! The small disk: blocks of four cells, a cell being the least that is written. What a cell holds is a number that
//! stands for its bytes: every write has its own, 0 is zeroes.

use std::ops::Range;

use lazy_migrate::units::{BlockRange, BlockSize, ByteRange};

/// What a cell holds.
pub type Value = u32;

/// Cells of a block.
pub const CELLS: usize = 4;

/// Bytes of a cell: a block is a region of the tracker and of the pull order, so that both have something to tell apart.
pub const CELL_BYTES: u64 = (1 << 20) / CELLS as u64;

/// The unit of the map.
pub fn block_size() -> BlockSize {
    BlockSize::new(1 << 20).expect("a block size of the table")
}

/// How large a disk is.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    /// In cells; the last block may be partial.
    pub cells: usize,
}

impl Shape {
    /// In bytes.
    pub fn size(self) -> u64 {
        self.cells as u64 * CELL_BYTES
    }

    /// In blocks.
    pub fn blocks(self) -> u64 {
        block_size().count(self.size())
    }

    /// Cells as bytes.
    pub fn bytes(self, cells: &Range<usize>) -> ByteRange {
        ByteRange::new(cells.start as u64 * CELL_BYTES, cells.end as u64 * CELL_BYTES)
    }

    /// The blocks that cells touch.
    pub fn cover(self, cells: &Range<usize>) -> BlockRange {
        block_size().cover(self.bytes(cells))
    }

    /// The blocks that cells cover whole.
    pub fn inside(self, cells: &Range<usize>) -> BlockRange {
        block_size().inside(self.bytes(cells), self.size())
    }

    /// The cells of blocks.
    pub fn cells_of(self, blocks: BlockRange) -> Range<usize> {
        let cell = |block: u64| (block as usize * CELLS).min(self.cells);
        cell(blocks.start.0)..cell(blocks.end.0)
    }
}
