//! Replies of the transmission phase.
//!
//! After structured replies were negotiated, a READ is always answered by chunks, also when it failed; a READ of data is
//! one chunk, so that DF holds by itself and DONE stands on a chunk that can no longer fail; only one with known holes is
//! cut. Commands without a payload in their answer get simple replies. With extended headers, everything is a chunk that
//! repeats the request's offset.

use crate::export::Extent;
use crate::wire::{
    ChunkFlags, ChunkHeader, ChunkType, Command, Errno, ExtendedChunkHeader, Framing, Request, SimpleReply,
};

/// The bytes of a reply in front of its data.
#[derive(Clone, Copy, Debug)]
pub struct Head {
    bytes: [u8; Head::LONGEST],
    length: usize,
}

impl Head {
    /// Length of the longest head: an extended chunk's head, an offset and the length of a hole.
    pub const LONGEST: usize = ExtendedChunkHeader::LENGTH + 12;

    fn empty() -> Head {
        Head { bytes: [0; Head::LONGEST], length: 0 }
    }

    fn push(mut self, part: &[u8]) -> Head {
        self.bytes[self.length..self.length + part.len()].copy_from_slice(part);
        self.length += part.len();
        self
    }
}

impl std::ops::Deref for Head {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        &self.bytes[..self.length]
    }
}

/// The head of a chunk in the form that was negotiated, which has chunks.
fn chunk(framing: Framing, request: &Request, kind: ChunkType, last: bool, length: u32) -> Head {
    let flags = ChunkFlags::NONE.with_if(ChunkFlags::DONE, last);
    let Request { cookie, offset, .. } = *request;
    match framing {
        Framing::Extended => {
            let header = ExtendedChunkHeader { flags, kind, cookie, offset, length: length.into() };
            Head::empty().push(&header.encode())
        }
        _ => Head::empty().push(&ChunkHeader { flags, kind, cookie, length }.encode()),
    }
}

fn chunk_length(framing: Framing) -> usize {
    if framing == Framing::Extended { ExtendedChunkHeader::LENGTH } else { ChunkHeader::LENGTH }
}

fn simple(request: &Request, error: u32) -> Head {
    Head::empty().push(&SimpleReply { error, cookie: request.cookie }.encode())
}

/// Length of the head of a successful READ.
pub fn read_head_length(framing: Framing, length: u64) -> usize {
    match (framing, length) {
        (Framing::Simple, _) => SimpleReply::LENGTH,
        (framing, 0) => chunk_length(framing),
        (framing, _) => chunk_length(framing) + 8,
    }
}

/// The head of a successful READ in one piece; as many bytes of data as were asked for follow it.
pub fn read_done(framing: Framing, request: &Request) -> Head {
    match (framing, request.length) {
        (Framing::Simple, _) => simple(request, 0),
        // A data chunk must not be empty.
        (_, 0) => chunk(framing, request, ChunkType::NONE, true, 0),
        (_, length) => read_data(framing, request, request.offset, length as u32, true),
    }
}

/// The head of one data chunk of a READ; `length` bytes of data follow it. Only where there are chunks.
pub fn read_data(framing: Framing, request: &Request, offset: u64, length: u32, last: bool) -> Head {
    chunk(framing, request, ChunkType::OFFSET_DATA, last, length + 8).push(&offset.to_be_bytes())
}

/// A chunk of a READ that says that `length` bytes are zeroes. Only where there are chunks.
pub fn read_hole(framing: Framing, request: &Request, offset: u64, length: u32, last: bool) -> Head {
    let head = chunk(framing, request, ChunkType::OFFSET_HOLE, last, 12);
    head.push(&offset.to_be_bytes()).push(&length.to_be_bytes())
}

/// The whole reply to any request that failed, and to one that succeeded and has no data in its answer.
pub fn finished(framing: Framing, request: &Request, result: Result<(), Errno>) -> Head {
    let error = result.err().map(Errno::for_the_wire);
    let with_data = matches!(request.command, Command::READ | Command::BLOCK_STATUS);
    match (framing, error) {
        (Framing::Structured, error) if !with_data => simple(request, error.map_or(0, |error| error.0)),
        (Framing::Simple, error) => simple(request, error.map_or(0, |error| error.0)),
        (_, None) => chunk(framing, request, ChunkType::NONE, true, 0),
        (_, Some(error)) => {
            chunk(framing, request, ChunkType::ERROR, true, 6).push(&error.0.to_be_bytes()).push(&[0, 0])
        }
    }
}

/// The whole reply to a BLOCK_STATUS: one chunk for each context. Extents without length are left out, nothing goes
/// beyond the range, and under `one` only the first extent is told.
///
/// # Errors
/// EIO when a context has no extent, which no right reply can say.
pub fn status(
    framing: Framing,
    request: &Request,
    one: bool,
    contexts: &[(u32, Vec<Extent>)],
    out: &mut Vec<u8>,
) -> Result<(), Errno> {
    out.clear();
    let extended = framing == Framing::Extended;
    let head = chunk_length(framing);
    for (index, (id, extents)) in contexts.iter().enumerate() {
        let start = out.len();
        out.resize(start + head, 0);
        out.extend_from_slice(&id.to_be_bytes());
        let descriptors = out.len();
        if extended {
            out.extend_from_slice(&[0; 4]);
        }
        let mut left = request.length;
        let mut count = 0u32;
        for extent in extents {
            let covered = extent.length.min(left);
            if covered == 0 {
                continue;
            }
            if extended {
                out.extend_from_slice(&covered.to_be_bytes());
                out.extend_from_slice(&extent.flags.to_be_bytes());
            } else {
                out.extend_from_slice(&(covered as u32).to_be_bytes());
                out.extend_from_slice(&(extent.flags as u32).to_be_bytes());
            }
            left -= covered;
            count += 1;
            if one {
                break;
            }
        }
        if count == 0 {
            return Err(Errno::EIO);
        }
        let kind = if extended { ChunkType::BLOCK_STATUS_EXT } else { ChunkType::BLOCK_STATUS };
        if extended {
            out[descriptors..descriptors + 4].copy_from_slice(&count.to_be_bytes());
        }
        let last = index + 1 == contexts.len();
        let length = (out.len() - start - head) as u32;
        out[start..start + head].copy_from_slice(&chunk(framing, request, kind, last, length));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::CommandFlags;

    const FRAMINGS: [Framing; 3] = [Framing::Simple, Framing::Structured, Framing::Extended];

    fn request(command: Command, offset: u64, length: u64) -> Request {
        Request { flags: CommandFlags::NONE, command, cookie: 9, offset, length }
    }

    #[test]
    fn a_failed_request_gets_the_kind_of_reply_that_was_negotiated() {
        let eio = Err(Errno::EIO);
        let (read, trim) = (request(Command::READ, 5, 1), request(Command::TRIM, 5, 1));
        let chunk = ChunkHeader::decode(&finished(Framing::Structured, &read, eio)).unwrap();
        assert_eq!((chunk.kind, chunk.flags, chunk.length), (ChunkType::ERROR, ChunkFlags::DONE, 6));
        for (framing, request) in [(Framing::Simple, &read), (Framing::Simple, &trim), (Framing::Structured, &trim)] {
            let reply = SimpleReply::decode(&finished(framing, request, eio));
            assert_eq!(reply, Ok(SimpleReply { error: 5, cookie: 9 }), "{framing:?}");
        }
        for request in [read, trim] {
            let head = finished(Framing::Extended, &request, eio);
            let chunk = ExtendedChunkHeader::decode(&head).unwrap();
            assert_eq!((chunk.kind, chunk.flags, chunk.offset), (ChunkType::ERROR, ChunkFlags::DONE, 5));
            assert_eq!(head[32..], [0, 0, 0, 5, 0, 0]);
        }
        let done = ExtendedChunkHeader::decode(&finished(Framing::Extended, &trim, Ok(()))).unwrap();
        assert_eq!((done.kind, done.flags, done.length), (ChunkType::NONE, ChunkFlags::DONE, 0));
    }

    #[test]
    fn no_raw_errno_leaves_the_server() {
        for (command, errno) in [(Command::WRITE, 122), (Command::WRITE, 0), (Command::READ, 30)] {
            let head = finished(Framing::Simple, &request(command, 0, 1), Err(Errno(errno)));
            assert_eq!(SimpleReply::decode(&head).unwrap().error, Errno::EIO.0);
        }
    }

    #[test]
    fn the_announced_head_length_is_the_real_one() {
        for framing in FRAMINGS {
            for length in [0, 1, 4096] {
                let head = read_done(framing, &request(Command::READ, 2, length));
                assert_eq!(head.len(), read_head_length(framing, length), "{framing:?} {length}");
            }
        }
    }

    #[test]
    fn extents_are_never_empty_nor_beyond_the_range() {
        let extents = [(0, 1), (10, 0), (0, 1), (u64::MAX, 3), (5, 0)].map(|(length, flags)| Extent { length, flags });
        let mut out = Vec::new();
        let (request, structured) = (request(Command::BLOCK_STATUS, 0, 100), Framing::Structured);
        status(structured, &request, false, &[(1, extents.to_vec())], &mut out).unwrap();
        let chunk = ChunkHeader::decode(&out).unwrap();
        assert_eq!(chunk.length, 4 + 16);
        assert_eq!(&out[24..], [0, 0, 0, 10, 0, 0, 0, 0, 0, 0, 0, 90, 0, 0, 0, 3]);
        status(structured, &request, true, &[(1, extents.to_vec()), (2, extents.to_vec())], &mut out).unwrap();
        let first = ChunkHeader::decode(&out).unwrap();
        let second = ChunkHeader::decode(&out[32..]).unwrap();
        assert_eq!((first.length, first.flags), (12, ChunkFlags::NONE));
        assert_eq!((second.length, second.flags), (12, ChunkFlags::DONE));
        assert_eq!(status(structured, &request, false, &[(1, vec![])], &mut out), Err(Errno::EIO));
    }

    #[test]
    fn extended_extents_have_64_bits() {
        let extents = vec![Extent { length: 3 << 32, flags: 1 << 40 }, Extent { length: 1 << 40, flags: 0 }];
        let mut out = Vec::new();
        let request = request(Command::BLOCK_STATUS, 77, 5 << 32);
        status(Framing::Extended, &request, false, &[(6, extents)], &mut out).unwrap();
        let chunk = ExtendedChunkHeader::decode(&out).unwrap();
        assert_eq!((chunk.kind, chunk.offset, chunk.length), (ChunkType::BLOCK_STATUS_EXT, 77, 8 + 32));
        assert_eq!(out[32..40], [0, 0, 0, 6, 0, 0, 0, 2]);
        let words: Vec<u64> = out[40..].chunks(8).map(|word| u64::from_be_bytes(word.try_into().unwrap())).collect();
        assert_eq!(words, [3 << 32, 1 << 40, 2 << 32, 0]);
    }
}
