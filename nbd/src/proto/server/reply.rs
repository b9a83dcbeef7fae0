//! Replies of the transmission phase.
//!
//! After structured replies were negotiated, a READ is always answered by chunks, also when it failed; a READ that
//! succeeded is one chunk, so that DF holds by itself and DONE stands on a chunk that can no longer fail. Commands without
//! a payload in their answer get simple replies in either mode.

use crate::export::Extent;
use crate::wire::{ChunkFlags, ChunkHeader, ChunkType, Errno, SimpleReply};

/// The bytes of a reply in front of its data: 28 at most.
#[derive(Clone, Copy, Debug)]
pub struct Head {
    bytes: [u8; Head::LONGEST],
    length: usize,
}

impl Head {
    /// Length of the longest head: a chunk's head and an offset.
    pub const LONGEST: usize = ChunkHeader::LENGTH + 8;

    fn of(parts: &[&[u8]]) -> Head {
        let mut head = Head { bytes: [0; Head::LONGEST], length: 0 };
        for part in parts {
            head.bytes[head.length..head.length + part.len()].copy_from_slice(part);
            head.length += part.len();
        }
        head
    }
}

impl std::ops::Deref for Head {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        &self.bytes[..self.length]
    }
}

/// Length of the head of a successful READ.
pub fn read_head_length(structured: bool, length: u32) -> usize {
    match (structured, length) {
        (true, 0) => ChunkHeader::LENGTH,
        (true, _) => ChunkHeader::LENGTH + 8,
        (false, _) => SimpleReply::LENGTH,
    }
}

/// The head of a successful READ; `length` bytes of data follow it.
pub fn read_done(structured: bool, cookie: u64, offset: u64, length: u32) -> Head {
    if !structured {
        return Head::of(&[&SimpleReply { error: 0, cookie }.encode()]);
    }
    // A data chunk must not be empty.
    let (kind, payload) = if length == 0 { (ChunkType::NONE, 0) } else { (ChunkType::OFFSET_DATA, length + 8) };
    let chunk = ChunkHeader { flags: ChunkFlags::DONE, kind, cookie, length: payload }.encode();
    if length == 0 { Head::of(&[&chunk]) } else { Head::of(&[&chunk, &offset.to_be_bytes()]) }
}

/// A READ or BLOCK_STATUS that failed.
pub fn failed(structured: bool, cookie: u64, error: Errno) -> Head {
    let error = error.for_the_wire();
    if !structured {
        return Head::of(&[&SimpleReply { error: error.0, cookie }.encode()]);
    }
    let chunk = ChunkHeader { flags: ChunkFlags::DONE, kind: ChunkType::ERROR, cookie, length: 6 }.encode();
    Head::of(&[&chunk, &error.0.to_be_bytes(), &[0, 0]])
}

/// The whole reply to a command that has no data in its answer.
pub fn finished(cookie: u64, result: Result<(), Errno>) -> Head {
    let error = result.err().map_or(0, |error| error.for_the_wire().0);
    Head::of(&[&SimpleReply { error, cookie }.encode()])
}

/// The whole reply to a BLOCK_STATUS over `length` bytes: one chunk for each context. Extents without length are left
/// out, nothing goes beyond the range, and under `one` only the first extent is told.
///
/// # Errors
/// EIO when a context has no extent, which no right reply can say.
pub fn status(
    cookie: u64,
    length: u32,
    one: bool,
    contexts: &[(u32, Vec<Extent>)],
    out: &mut Vec<u8>,
) -> Result<(), Errno> {
    out.clear();
    for (index, (id, extents)) in contexts.iter().enumerate() {
        let start = out.len();
        out.extend_from_slice(&[0; ChunkHeader::LENGTH]);
        out.extend_from_slice(&id.to_be_bytes());
        let mut left = length;
        let mut count = 0;
        for extent in extents {
            let covered = u32::try_from(extent.length).unwrap_or(u32::MAX).min(left);
            if covered == 0 {
                continue;
            }
            out.extend_from_slice(&covered.to_be_bytes());
            out.extend_from_slice(&(extent.flags as u32).to_be_bytes());
            left -= covered;
            count += 1;
            if one {
                break;
            }
        }
        if count == 0 {
            return Err(Errno::EIO);
        }
        let last = index + 1 == contexts.len();
        let header = ChunkHeader {
            flags: ChunkFlags::NONE.with_if(ChunkFlags::DONE, last),
            kind: ChunkType::BLOCK_STATUS,
            cookie,
            length: 4 + 8 * count,
        };
        out[start..start + ChunkHeader::LENGTH].copy_from_slice(&header.encode());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failed_read_gets_the_kind_of_reply_that_was_negotiated() {
        let head = failed(true, 9, Errno::EIO);
        let chunk = ChunkHeader::decode(&head).unwrap();
        assert_eq!((chunk.kind, chunk.flags, chunk.length), (ChunkType::ERROR, ChunkFlags::DONE, 6));
        assert_eq!(head.len(), ChunkHeader::LENGTH + 6);
        assert_eq!(SimpleReply::decode(&failed(false, 9, Errno::EIO)), Ok(SimpleReply { error: 5, cookie: 9 }));
    }

    #[test]
    fn no_raw_errno_leaves_the_server() {
        assert_eq!(SimpleReply::decode(&finished(1, Err(Errno(122)))).unwrap().error, Errno::EIO.0);
        assert_eq!(SimpleReply::decode(&finished(1, Err(Errno(0)))).unwrap().error, Errno::EIO.0);
        assert_eq!(SimpleReply::decode(&failed(false, 1, Errno(30))).unwrap().error, Errno::EIO.0);
    }

    #[test]
    fn the_announced_head_length_is_the_real_one() {
        for structured in [false, true] {
            for length in [0, 1, 4096] {
                assert_eq!(read_done(structured, 1, 2, length).len(), read_head_length(structured, length));
            }
        }
    }

    #[test]
    fn extents_are_never_empty_nor_beyond_the_range() {
        let extents = [(0, 1), (10, 0), (0, 1), (u64::MAX, 3), (5, 0)].map(|(length, flags)| Extent { length, flags });
        let mut out = Vec::new();
        status(7, 100, false, &[(1, extents.to_vec())], &mut out).unwrap();
        let chunk = ChunkHeader::decode(&out).unwrap();
        assert_eq!(chunk.length, 4 + 16);
        assert_eq!(&out[24..], [0, 0, 0, 10, 0, 0, 0, 0, 0, 0, 0, 90, 0, 0, 0, 3]);
        status(7, 100, true, &[(1, extents.to_vec()), (2, extents.to_vec())], &mut out).unwrap();
        let first = ChunkHeader::decode(&out).unwrap();
        let second = ChunkHeader::decode(&out[32..]).unwrap();
        assert_eq!((first.length, first.flags), (12, ChunkFlags::NONE));
        assert_eq!((second.length, second.flags), (12, ChunkFlags::DONE));
        assert_eq!(status(7, 100, false, &[(1, vec![])], &mut out), Err(Errno::EIO));
    }
}
