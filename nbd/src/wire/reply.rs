//! Replies of the transmission phase (document: "Simple reply message", "Structured reply chunk message", "Extended
//! reply chunk message").

use super::{
    CHUNK_MAGIC, ChunkFlags, EXTENDED_CHUNK_MAGIC, Errno, Fields, SIMPLE_REPLY_MAGIC, WireError, option::shortened,
};

/// A simple reply; after a successful READ without structured replies the data follows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SimpleReply {
    /// 0 for success.
    pub error: u32,
    /// The request's cookie.
    pub cookie: u64,
}

impl SimpleReply {
    /// Length in bytes.
    pub const LENGTH: usize = 16;

    /// The reply as it stands on the wire.
    pub fn encode(&self) -> [u8; SimpleReply::LENGTH] {
        let mut bytes = [0; SimpleReply::LENGTH];
        bytes[0..4].copy_from_slice(&SIMPLE_REPLY_MAGIC.to_be_bytes());
        bytes[4..8].copy_from_slice(&self.error.to_be_bytes());
        bytes[8..16].copy_from_slice(&self.cookie.to_be_bytes());
        bytes
    }

    /// Reads the reply at the front of `bytes`; what follows is not looked at.
    ///
    /// # Errors
    /// [`WireError::NotEnough`] or [`WireError::Magic`].
    pub fn decode(bytes: &[u8]) -> Result<SimpleReply, WireError> {
        let mut fields = Fields::of(bytes);
        let mut fields = Fields::of(fields.take(SimpleReply::LENGTH)?);
        fields.magic32("a simple reply", SIMPLE_REPLY_MAGIC)?;
        Ok(SimpleReply { error: fields.u32()?, cookie: fields.u64()? })
    }
}

open_newtype! {
    /// What a chunk carries (document: "Structured reply types"). Bit 15 marks an error.
    ChunkType(u16) {
        /// Nothing: ends a reply.
        NONE = 0,
        /// Bytes of a READ.
        OFFSET_DATA = 1,
        /// A range of a READ that is all zeroes.
        OFFSET_HOLE = 2,
        /// Extents of a meta context.
        BLOCK_STATUS = 5,
        /// Extents of a meta context, with 64-bit lengths (extended headers).
        BLOCK_STATUS_EXT = 6,
        /// The request failed.
        ERROR = (1 << 15) | 1,
        /// The request failed at an offset.
        ERROR_OFFSET = (1 << 15) | 2,
    }
}

impl ChunkType {
    /// Whether the chunk says that the request failed; also true of error types without a name here.
    pub fn is_error(self) -> bool {
        self.0 & (1 << 15) != 0
    }
}

/// The head of a structured reply's chunk; `length` bytes of payload follow it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ChunkHeader {
    /// Flags.
    pub flags: ChunkFlags,
    /// What the payload is.
    pub kind: ChunkType,
    /// The request's cookie.
    pub cookie: u64,
    /// Length of the payload in bytes.
    pub length: u32,
}

impl ChunkHeader {
    /// Length in bytes.
    pub const LENGTH: usize = 20;

    /// The head as it stands on the wire.
    pub fn encode(&self) -> [u8; ChunkHeader::LENGTH] {
        let mut bytes = [0; ChunkHeader::LENGTH];
        bytes[0..4].copy_from_slice(&CHUNK_MAGIC.to_be_bytes());
        bytes[4..6].copy_from_slice(&self.flags.0.to_be_bytes());
        bytes[6..8].copy_from_slice(&self.kind.0.to_be_bytes());
        bytes[8..16].copy_from_slice(&self.cookie.to_be_bytes());
        bytes[16..20].copy_from_slice(&self.length.to_be_bytes());
        bytes
    }

    /// Reads the head at the front of `bytes`; what follows is not looked at.
    ///
    /// # Errors
    /// [`WireError::NotEnough`] or [`WireError::Magic`].
    pub fn decode(bytes: &[u8]) -> Result<ChunkHeader, WireError> {
        let mut fields = Fields::of(bytes);
        let mut fields = Fields::of(fields.take(ChunkHeader::LENGTH)?);
        fields.magic32("a reply chunk", CHUNK_MAGIC)?;
        Ok(ChunkHeader {
            flags: ChunkFlags(fields.u16()?),
            kind: ChunkType(fields.u16()?),
            cookie: fields.u64()?,
            length: fields.u32()?,
        })
    }
}

/// The head of a chunk with extended headers; `length` bytes of payload follow it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ExtendedChunkHeader {
    /// Flags.
    pub flags: ChunkFlags,
    /// What the payload is.
    pub kind: ChunkType,
    /// The request's cookie.
    pub cookie: u64,
    /// The request's offset, whatever the chunk is about.
    pub offset: u64,
    /// Length of the payload in bytes.
    pub length: u64,
}

impl ExtendedChunkHeader {
    /// Length in bytes.
    pub const LENGTH: usize = 32;

    /// The head as it stands on the wire.
    pub fn encode(&self) -> [u8; ExtendedChunkHeader::LENGTH] {
        let mut bytes = [0; ExtendedChunkHeader::LENGTH];
        bytes[0..4].copy_from_slice(&EXTENDED_CHUNK_MAGIC.to_be_bytes());
        bytes[4..6].copy_from_slice(&self.flags.0.to_be_bytes());
        bytes[6..8].copy_from_slice(&self.kind.0.to_be_bytes());
        bytes[8..16].copy_from_slice(&self.cookie.to_be_bytes());
        bytes[16..24].copy_from_slice(&self.offset.to_be_bytes());
        bytes[24..32].copy_from_slice(&self.length.to_be_bytes());
        bytes
    }

    /// Reads the head at the front of `bytes`; what follows is not looked at.
    ///
    /// # Errors
    /// [`WireError::NotEnough`] or [`WireError::Magic`].
    pub fn decode(bytes: &[u8]) -> Result<ExtendedChunkHeader, WireError> {
        let mut fields = Fields::of(bytes);
        let mut fields = Fields::of(fields.take(ExtendedChunkHeader::LENGTH)?);
        fields.magic32("an extended reply chunk", EXTENDED_CHUNK_MAGIC)?;
        Ok(ExtendedChunkHeader {
            flags: ChunkFlags(fields.u16()?),
            kind: ChunkType(fields.u16()?),
            cookie: fields.u64()?,
            offset: fields.u64()?,
            length: fields.u64()?,
        })
    }
}

/// The payload of an error chunk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ErrorChunk {
    /// Why the request failed; never 0 in a right reply.
    pub error: Errno,
    /// Text for people, perhaps empty.
    pub message: String,
    /// Where it failed, in a chunk of type ERROR_OFFSET.
    pub offset: Option<u64>,
}

impl ErrorChunk {
    /// Appends the payload; the text is cut to what a string may hold.
    pub fn encode(&self, out: &mut Vec<u8>) {
        let message = shortened(&self.message).as_bytes();
        out.extend_from_slice(&self.error.0.to_be_bytes());
        out.extend_from_slice(&(message.len() as u16).to_be_bytes());
        out.extend_from_slice(message);
        if let Some(offset) = self.offset {
            out.extend_from_slice(&offset.to_be_bytes());
        }
    }

    /// Reads the payload of a chunk of type `kind`. Bytes after the known fields of an error type without a name are
    /// ignored, and a text that is not UTF-8 is mended, since both only concern people.
    ///
    /// # Errors
    /// [`WireError::NotEnough`] when the text reaches beyond the payload; [`WireError::Malformed`] when bytes are left.
    pub fn decode(kind: ChunkType, payload: &[u8]) -> Result<ErrorChunk, WireError> {
        let mut fields = Fields::of(payload);
        let error = Errno(fields.u32()?);
        let length = usize::from(fields.u16()?);
        let message = String::from_utf8_lossy(fields.take(length)?).into_owned();
        let offset = if kind == ChunkType::ERROR_OFFSET { Some(fields.u64()?) } else { None };
        if kind == ChunkType::ERROR || kind == ChunkType::ERROR_OFFSET {
            fields.end()?;
        }
        Ok(ErrorChunk { error, message, offset })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn replies_survive_the_wire() {
        let simple = SimpleReply { error: 5, cookie: 77 };
        assert_eq!(SimpleReply::decode(&simple.encode()), Ok(simple));
        let chunk = ChunkHeader { flags: ChunkFlags::DONE, kind: ChunkType::OFFSET_HOLE, cookie: u64::MAX, length: 12 };
        assert_eq!(ChunkHeader::decode(&chunk.encode()), Ok(chunk));
        let (flags, kind) = (ChunkFlags::NONE, ChunkType::BLOCK_STATUS_EXT);
        let extended = ExtendedChunkHeader { flags, kind, cookie: 1, offset: 2, length: 24 };
        let bytes = extended.encode();
        assert_eq!(bytes[..16], [0x6e, 0x8a, 0x27, 0x8c, 0, 0, 0, 6, 0, 0, 0, 0, 0, 0, 0, 1]);
        assert_eq!(bytes[16..], [0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0, 24]);
        assert_eq!(ExtendedChunkHeader::decode(&bytes), Ok(extended));
        for (kind, offset) in [(ChunkType::ERROR, None), (ChunkType::ERROR_OFFSET, Some(9))] {
            let error = ErrorChunk { error: Errno::EIO, message: "medium".into(), offset };
            let mut bytes = Vec::new();
            error.encode(&mut bytes);
            assert_eq!(ErrorChunk::decode(kind, &bytes), Ok(error));
        }
    }

    #[test]
    fn an_error_text_may_not_reach_beyond_its_chunk() {
        let payload = [0, 0, 0, 5, 0, 9, b'x'];
        assert_eq!(ErrorChunk::decode(ChunkType::ERROR, &payload), Err(WireError::NotEnough { missing: 8 }));
        assert!(ErrorChunk::decode(ChunkType::ERROR, &[0, 0, 0, 5, 0, 0, 1]).is_err());
        assert!(ChunkType(0x8077).is_error());
    }
}
