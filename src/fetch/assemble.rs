//! The bytes that a reader of missing blocks gets: from the flights' replies where it waited for them, from the store
//! for the rest.

use std::io;

use bytes::{Bytes, BytesMut};
use smallvec::SmallVec;

use super::ranges::{Ranges, intersects, subtract};
use crate::store::Disk;
use crate::units::{BlockRange, ByteRange};

/// Blocks and their bytes; nearly always of one reply.
pub(super) type Pieces = SmallVec<[(BlockRange, Bytes); 1]>;

/// What a fetch brought. The blocks that are in none of the pieces are present in the store.
#[derive(Debug, Default)]
pub struct Fetched {
    pieces: Pieces,
}

impl Fetched {
    pub(super) fn push(&mut self, blocks: BlockRange, bytes: Bytes) {
        self.pieces.push((blocks, bytes));
    }

    pub(super) fn extend(&mut self, other: Fetched) {
        if self.pieces.is_empty() {
            *self = other;
        } else {
            self.pieces.extend(other.pieces);
        }
    }

    /// All of it is in the store.
    pub fn is_empty(&self) -> bool {
        self.pieces.is_empty()
    }

    /// The blocks of a range that no reply brought.
    pub(super) fn not_brought(&self, range: BlockRange) -> Ranges {
        match &self.pieces[..] {
            [] => subtract(range, &[]),
            [(blocks, _)] => subtract(range, &[*blocks]),
            pieces => subtract(range, &pieces.iter().map(|(blocks, _)| *blocks).collect::<Ranges>()),
        }
    }

    /// The bytes of a range; without a copy where one reply holds them all. `None` where some are neither in a reply nor in
    /// the store.
    pub fn assemble(&self, disk: &Disk, range: ByteRange) -> io::Result<Option<Bytes>> {
        let size = disk.size();
        let span = |blocks: BlockRange| disk.block_size.bytes_of(blocks, size);
        for (blocks, bytes) in &self.pieces {
            let piece = span(*blocks);
            if piece.start <= range.start && range.end <= piece.end {
                return Ok(Some(bytes.slice((range.start - piece.start) as usize..(range.end - piece.start) as usize)));
            }
        }
        let asked = disk.block_size.cover(range);
        let stored = self.not_brought(asked);
        if !stored.iter().all(|blocks| disk.map.is_present(*blocks)) {
            return Ok(None);
        }
        let mut buffer = BytesMut::zeroed(range.len() as usize);
        for blocks in stored {
            let from = span(blocks);
            let (start, end) = (from.start.max(range.start), from.end.min(range.end));
            disk.read(start, &mut buffer[(start - range.start) as usize..(end - range.start) as usize])?;
        }
        for (blocks, bytes) in self.pieces.iter().filter(|(blocks, _)| intersects(*blocks, asked)) {
            let piece = span(*blocks);
            let (start, end) = (piece.start.max(range.start), piece.end.min(range.end));
            if start < end {
                let from = &bytes[(start - piece.start) as usize..(end - piece.start) as usize];
                buffer[(start - range.start) as usize..(end - range.start) as usize].copy_from_slice(from);
            }
        }
        Ok(Some(buffer.freeze()))
    }
}
