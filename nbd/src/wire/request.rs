//! Requests of the transmission phase (document: "Request message").

use super::{CommandFlags, Fields, REQUEST_MAGIC, WireError};

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

/// The head of a request; a WRITE's payload follows it.
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
    /// Length in bytes.
    pub length: u32,
}

impl Request {
    /// Length of a request's head in bytes.
    pub const LENGTH: usize = 28;

    /// The request as it stands on the wire.
    pub fn encode(&self) -> [u8; Request::LENGTH] {
        let mut bytes = [0; Request::LENGTH];
        bytes[0..4].copy_from_slice(&REQUEST_MAGIC.to_be_bytes());
        bytes[4..6].copy_from_slice(&self.flags.0.to_be_bytes());
        bytes[6..8].copy_from_slice(&self.command.0.to_be_bytes());
        bytes[8..16].copy_from_slice(&self.cookie.to_be_bytes());
        bytes[16..24].copy_from_slice(&self.offset.to_be_bytes());
        bytes[24..28].copy_from_slice(&self.length.to_be_bytes());
        bytes
    }

    /// Reads the head that stands at the front of `bytes`; what follows is not looked at.
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
            length: fields.u32()?,
        })
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
    fn another_magic_number_is_refused() {
        assert!(matches!(Request::decode(&[0; 28]), Err(WireError::Magic { found: 0, .. })));
    }
}
