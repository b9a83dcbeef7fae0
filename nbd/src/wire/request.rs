//! Requests of the transmission phase (document: "Request message").

use bytes::{BufMut, Bytes, BytesMut};

use super::{CommandFlags, EXTENDED_REQUEST_MAGIC, Fields, Framing, REQUEST_MAGIC, WireError};

open_newtype! {
    /// What a request asks for (document: "Request types").
    Command(u16) {
        /// Read bytes.
        READ = 0,
        /// Write bytes, which follow the request.
        WRITE = 1,
        /// Leave; there is no reply.
        DISC = 2,
        /// Make what was answered durable.
        FLUSH = 3,
        /// Give up the content of a range.
        TRIM = 4,
        /// Prefetch a range.
        CACHE = 5,
        /// Make a range read as zeroes.
        WRITE_ZEROES = 6,
        /// Describe a range in the negotiated meta contexts.
        BLOCK_STATUS = 7,
        /// Change the size (experimental).
        RESIZE = 8,
    }
}

/// The head of a request, in either form; the payload follows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Request {
    /// Flags of the command.
    pub flags: CommandFlags,
    /// The command.
    pub command: Command,
    /// Chosen by the client, repeated in the reply, and without meaning to the server.
    pub cookie: u64,
    /// Offset in bytes.
    pub offset: u64,
    /// Length in bytes: of the range that the request is about, or of the payload where there is one. Below 2^32 in the
    /// compact form.
    pub length: u64,
}

impl Request {
    /// Length of a compact request's head in bytes.
    pub const LENGTH: usize = 28;
    /// Length of an extended request's head in bytes.
    pub const EXTENDED_LENGTH: usize = 32;

    /// The compact request as it stands on the wire.
    pub fn encode(&self) -> [u8; Request::LENGTH] {
        let mut bytes = [0; Request::LENGTH];
        bytes[..24].copy_from_slice(&self.front(REQUEST_MAGIC));
        bytes[24..28].copy_from_slice(&(self.length as u32).to_be_bytes());
        bytes
    }

    /// The extended request as it stands on the wire.
    pub fn encode_extended(&self) -> [u8; Request::EXTENDED_LENGTH] {
        let mut bytes = [0; Request::EXTENDED_LENGTH];
        bytes[..24].copy_from_slice(&self.front(EXTENDED_REQUEST_MAGIC));
        bytes[24..32].copy_from_slice(&self.length.to_be_bytes());
        bytes
    }

    /// The request in the form that was negotiated.
    pub fn encode_as(&self, framing: Framing) -> RequestHead {
        match framing {
            Framing::Extended => RequestHead { bytes: self.encode_extended(), length: Request::EXTENDED_LENGTH },
            _ => {
                let mut bytes = [0; Request::EXTENDED_LENGTH];
                bytes[..Request::LENGTH].copy_from_slice(&self.encode());
                RequestHead { bytes, length: Request::LENGTH }
            }
        }
    }

    /// What both forms begin with.
    fn front(&self, magic: u32) -> [u8; 24] {
        let mut bytes = [0; 24];
        bytes[0..4].copy_from_slice(&magic.to_be_bytes());
        bytes[4..6].copy_from_slice(&self.flags.0.to_be_bytes());
        bytes[6..8].copy_from_slice(&self.command.0.to_be_bytes());
        bytes[8..16].copy_from_slice(&self.cookie.to_be_bytes());
        bytes[16..24].copy_from_slice(&self.offset.to_be_bytes());
        bytes
    }

    /// Reads the compact head that stands at the front of `bytes`; what follows is not looked at.
    ///
    /// # Errors
    /// [`WireError::NotEnough`] for fewer than [`Request::LENGTH`] bytes, [`WireError::Magic`] for another magic number.
    pub fn decode(bytes: &[u8]) -> Result<Request, WireError> {
        let mut fields = Fields::of(bytes);
        let mut fields = Fields::of(fields.take(Request::LENGTH)?);
        fields.magic32("a request", REQUEST_MAGIC)?;
        Ok(Request {
            flags: CommandFlags(fields.u16()?),
            command: Command(fields.u16()?),
            cookie: fields.u64()?,
            offset: fields.u64()?,
            length: fields.u32()?.into(),
        })
    }

    /// Reads the extended head that stands at the front of `bytes`; what follows is not looked at.
    ///
    /// # Errors
    /// [`WireError::NotEnough`] for fewer than [`Request::EXTENDED_LENGTH`] bytes, [`WireError::Magic`] for another
    /// magic number.
    pub fn decode_extended(bytes: &[u8]) -> Result<Request, WireError> {
        let mut fields = Fields::of(bytes);
        let mut fields = Fields::of(fields.take(Request::EXTENDED_LENGTH)?);
        fields.magic32("an extended request", EXTENDED_REQUEST_MAGIC)?;
        Ok(Request {
            flags: CommandFlags(fields.u16()?),
            command: Command(fields.u16()?),
            cookie: fields.u64()?,
            offset: fields.u64()?,
            length: fields.u64()?,
        })
    }
}

/// An encoded request of either form.
#[derive(Clone, Copy, Debug)]
pub struct RequestHead {
    bytes: [u8; Request::EXTENDED_LENGTH],
    length: usize,
}

impl std::ops::Deref for RequestHead {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        &self.bytes[..self.length]
    }
}

/// The payload of a BLOCK_STATUS that asks for some of the negotiated contexts (extended headers with
/// [`CommandFlags::PAYLOAD_LEN`]).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StatusQuery {
    /// Length of the range in bytes.
    pub length: u64,
    /// Ids of the contexts that are asked for.
    pub contexts: Vec<u32>,
}

impl StatusQuery {
    /// Length of the payload for this many contexts, in bytes.
    pub const fn encoded_length(contexts: usize) -> usize {
        8 + 4 * contexts
    }

    /// The payload.
    pub fn encode(&self) -> Bytes {
        let mut bytes = BytesMut::with_capacity(StatusQuery::encoded_length(self.contexts.len()));
        bytes.put_u64(self.length);
        for id in &self.contexts {
            bytes.put_u32(*id);
        }
        bytes.freeze()
    }

    /// Reads the payload.
    ///
    /// # Errors
    /// [`WireError::NotEnough`] when it ends within a field.
    pub fn decode(payload: &[u8]) -> Result<StatusQuery, WireError> {
        let mut fields = Fields::of(payload);
        let length = fields.u64()?;
        let mut contexts = Vec::with_capacity(fields.remaining() / 4);
        while fields.remaining() > 0 {
            contexts.push(fields.u32()?);
        }
        Ok(StatusQuery { length, contexts })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_has_the_layout_of_the_document() {
        let request = Request {
            flags: CommandFlags::FUA,
            command: Command::WRITE,
            cookie: 0x0102_0304_0506_0708,
            offset: 4096,
            length: 512,
        };
        let bytes = request.encode();
        assert_eq!(
            bytes,
            [0x25, 0x60, 0x95, 0x13, 0, 1, 0, 1, 1, 2, 3, 4, 5, 6, 7, 8, 0, 0, 0, 0, 0, 0, 0x10, 0, 0, 0, 2, 0]
        );
        assert_eq!(Request::decode(&bytes), Ok(request));
        assert_eq!(Request::decode(&bytes[..27]), Err(WireError::NotEnough { missing: 1 }));
    }

    #[test]
    fn an_extended_request_has_the_layout_of_the_document() {
        let request = Request {
            flags: CommandFlags::PAYLOAD_LEN,
            command: Command::BLOCK_STATUS,
            cookie: 0x0102_0304_0506_0708,
            offset: 4096,
            length: 5 << 32,
        };
        let bytes = request.encode_extended();
        assert_eq!(bytes[..16], [0x21, 0xe4, 0x1c, 0x71, 0, 0x20, 0, 7, 1, 2, 3, 4, 5, 6, 7, 8]);
        assert_eq!(bytes[16..], [0, 0, 0, 0, 0, 0, 0x10, 0, 0, 0, 0, 5, 0, 0, 0, 0]);
        assert_eq!(Request::decode_extended(&bytes), Ok(request));
        assert_eq!(Request::decode_extended(&bytes[..31]), Err(WireError::NotEnough { missing: 1 }));
        assert!(matches!(Request::decode(&bytes), Err(WireError::Magic { .. })), "not the compact form");
    }

    #[test]
    fn a_status_query_has_the_layout_of_the_document() {
        let query = StatusQuery { length: 1 << 32, contexts: vec![7, 9] };
        let bytes = query.encode();
        assert_eq!(bytes[..], [0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 7, 0, 0, 0, 9]);
        assert_eq!(StatusQuery::decode(&bytes), Ok(query));
        for wrong in [0, 7, 9, 15] {
            assert!(StatusQuery::decode(&bytes[..wrong]).is_err(), "{wrong} bytes");
        }
        assert_eq!(StatusQuery::decode(&bytes[..8]).map(|query| query.contexts.len()), Ok(0));
    }

    #[test]
    fn another_magic_number_is_refused() {
        assert!(matches!(Request::decode(&[0; 28]), Err(WireError::Magic { found: 0, .. })));
    }
}
