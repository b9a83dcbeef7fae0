//! Options and their replies (document: "Option types", "Option reply types").

use bytes::{BufMut, BytesMut};

use super::{Fields, MAX_STRING, OPTION_MAGIC, OPTION_REPLY_MAGIC, TransmissionFlags, WireError};

open_newtype! {
    /// What a client asks for in the handshake.
    OptionCode(u32) {
        /// Enter transmission; errors cannot be answered.
        EXPORT_NAME = 1,
        /// Leave.
        ABORT = 2,
        /// List the exports.
        LIST = 3,
        /// Not in use.
        PEEK_EXPORT = 4,
        /// Begin TLS.
        STARTTLS = 5,
        /// Describe an export.
        INFO = 6,
        /// Describe an export and enter transmission.
        GO = 7,
        /// Use structured replies.
        STRUCTURED_REPLY = 8,
        /// List the meta contexts of an export.
        LIST_META_CONTEXT = 9,
        /// Choose the meta contexts of an export.
        SET_META_CONTEXT = 10,
        /// Use extended headers.
        EXTENDED_HEADERS = 11,
    }
}

open_newtype! {
    /// How a server answers an option. Bit 31 marks an error.
    OptionReply(u32) {
        /// Done.
        ACK = 1,
        /// One export of the list.
        SERVER = 2,
        /// One piece of information.
        INFO = 3,
        /// One meta context.
        META_CONTEXT = 4,
        /// The option is not known.
        ERR_UNSUP = (1 << 31) | 1,
        /// Forbidden by the server's configuration.
        ERR_POLICY = (1 << 31) | 2,
        /// The option's data is wrong.
        ERR_INVALID = (1 << 31) | 3,
        /// Not possible on this platform.
        ERR_PLATFORM = (1 << 31) | 4,
        /// TLS has to come first.
        ERR_TLS_REQD = (1 << 31) | 5,
        /// There is no such export.
        ERR_UNKNOWN = (1 << 31) | 6,
        /// The server is shutting down.
        ERR_SHUTDOWN = (1 << 31) | 7,
        /// The client has to ask for block sizes.
        ERR_BLOCK_SIZE_REQD = (1 << 31) | 8,
        /// The request or its answer is too large.
        ERR_TOO_BIG = (1 << 31) | 9,
        /// Extended headers have to come first.
        ERR_EXT_HEADER_REQD = (1 << 31) | 10,
    }
}

impl OptionReply {
    /// Whether the option failed; also true of errors without a name here.
    pub fn is_error(self) -> bool {
        self.0 & (1 << 31) != 0
    }
}

open_newtype! {
    /// A kind of information about an export (document: "NBD_INFO").
    InfoType(u16) {
        /// Size and transmission flags.
        EXPORT = 0,
        /// The export's own name.
        NAME = 1,
        /// Text for people.
        DESCRIPTION = 2,
        /// Minimum, preferred and maximum block size.
        BLOCK_SIZE = 3,
    }
}

/// The head of an option; `length` bytes of data follow it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OptionHeader {
    /// The option.
    pub option: OptionCode,
    /// Length of the data in bytes.
    pub length: u32,
}

impl OptionHeader {
    /// Length in bytes.
    pub const LENGTH: usize = 16;

    /// Appends an option with its data.
    pub fn encode(option: OptionCode, data: &[u8], out: &mut BytesMut) {
        out.put_u64(OPTION_MAGIC);
        out.put_u32(option.0);
        out.put_u32(data.len() as u32);
        out.put_slice(data);
    }

    /// Reads the head at the front of `bytes`; what follows is not looked at.
    ///
    /// # Errors
    /// [`WireError::NotEnough`] or [`WireError::Magic`].
    pub fn decode(bytes: &[u8]) -> Result<OptionHeader, WireError> {
        let mut fields = Fields::of(bytes);
        let mut fields = Fields::of(fields.take(OptionHeader::LENGTH)?);
        fields.magic64("an option", OPTION_MAGIC)?;
        Ok(OptionHeader { option: OptionCode(fields.u32()?), length: fields.u32()? })
    }
}

/// The head of a reply to an option; `length` bytes of data follow it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OptionReplyHeader {
    /// The option that is answered.
    pub option: OptionCode,
    /// The kind of answer.
    pub reply: OptionReply,
    /// Length of the data in bytes.
    pub length: u32,
}

impl OptionReplyHeader {
    /// Length in bytes.
    pub const LENGTH: usize = 20;

    /// Appends a reply with its data.
    pub fn encode(option: OptionCode, reply: OptionReply, data: &[u8], out: &mut BytesMut) {
        out.put_u64(OPTION_REPLY_MAGIC);
        out.put_u32(option.0);
        out.put_u32(reply.0);
        out.put_u32(data.len() as u32);
        out.put_slice(data);
    }

    /// Reads the head at the front of `bytes`; what follows is not looked at.
    ///
    /// # Errors
    /// [`WireError::NotEnough`] or [`WireError::Magic`].
    pub fn decode(bytes: &[u8]) -> Result<OptionReplyHeader, WireError> {
        let mut fields = Fields::of(bytes);
        let mut fields = Fields::of(fields.take(OptionReplyHeader::LENGTH)?);
        fields.magic64("the reply to an option", OPTION_REPLY_MAGIC)?;
        Ok(OptionReplyHeader {
            option: OptionCode(fields.u32()?),
            reply: OptionReply(fields.u32()?),
            length: fields.u32()?,
        })
    }
}

fn put_string(text: &str, out: &mut BytesMut) {
    out.put_u32(text.len() as u32);
    out.put_slice(text.as_bytes());
}

/// The data of GO and INFO.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExportRequest {
    /// Name of the export; empty for the default one.
    pub name: String,
    /// What the client would like to be told, besides [`InfoType::EXPORT`].
    pub infos: Vec<InfoType>,
}

impl ExportRequest {
    /// Appends the data.
    pub fn encode(&self, out: &mut BytesMut) {
        put_string(&self.name, out);
        out.put_u16(self.infos.len() as u16);
        for info in &self.infos {
            out.put_u16(info.0);
        }
    }

    /// Reads the data.
    ///
    /// # Errors
    /// Any [`WireError`] when lengths do not fit together or the name is not a string.
    pub fn decode(data: &[u8]) -> Result<ExportRequest, WireError> {
        let mut fields = Fields::of(data);
        let length = fields.u32()? as usize;
        let name = fields.string(length)?;
        let count = fields.u16()?;
        let infos = (0..count).map(|_| fields.u16().map(InfoType)).collect::<Result<_, _>>()?;
        fields.end()?;
        Ok(ExportRequest { name, infos })
    }
}

/// The data of an INFO reply.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Info {
    /// Size and flags.
    Export {
        /// Size in bytes.
        size: u64,
        /// What the export can do.
        flags: TransmissionFlags,
    },
    /// The export's own name.
    Name(String),
    /// Text for people.
    Description(String),
    /// Constraints on requests, in bytes.
    BlockSize {
        /// Offsets and lengths are multiples of it.
        minimum: u32,
        /// Requests of this alignment are fast.
        preferred: u32,
        /// No READ or WRITE may be longer.
        maximum: u32,
    },
    /// A kind that has no name here; a client ignores it.
    Other(InfoType),
}

impl Info {
    /// Appends the data. [`Info::Other`] has no content.
    pub fn encode(&self, out: &mut BytesMut) {
        match self {
            Info::Export { size, flags } => {
                out.put_u16(InfoType::EXPORT.0);
                out.put_u64(*size);
                out.put_u16(flags.0);
            }
            Info::Name(name) => {
                out.put_u16(InfoType::NAME.0);
                out.put_slice(name.as_bytes());
            }
            Info::Description(text) => {
                out.put_u16(InfoType::DESCRIPTION.0);
                out.put_slice(text.as_bytes());
            }
            Info::BlockSize { minimum, preferred, maximum } => {
                out.put_u16(InfoType::BLOCK_SIZE.0);
                out.put_u32(*minimum);
                out.put_u32(*preferred);
                out.put_u32(*maximum);
            }
            Info::Other(kind) => out.put_u16(kind.0),
        }
    }

    /// Reads the data.
    ///
    /// # Errors
    /// Any [`WireError`] when a known kind has another length, or a text is not a string.
    pub fn decode(data: &[u8]) -> Result<Info, WireError> {
        let mut fields = Fields::of(data);
        let kind = InfoType(fields.u16()?);
        let rest = fields.remaining();
        let info = match kind {
            InfoType::EXPORT => Info::Export { size: fields.u64()?, flags: TransmissionFlags(fields.u16()?) },
            InfoType::NAME => Info::Name(fields.string(rest)?),
            InfoType::DESCRIPTION => Info::Description(fields.string(rest)?),
            InfoType::BLOCK_SIZE => {
                Info::BlockSize { minimum: fields.u32()?, preferred: fields.u32()?, maximum: fields.u32()? }
            }
            other => return Ok(Info::Other(other)),
        };
        fields.end()?;
        Ok(info)
    }
}

/// One export of a LIST, the data of a SERVER reply.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServerEntry {
    /// Name of the export.
    pub name: String,
    /// Text for people, perhaps empty.
    pub description: String,
}

impl ServerEntry {
    /// Appends the data.
    pub fn encode(&self, out: &mut BytesMut) {
        put_string(&self.name, out);
        out.put_slice(self.description.as_bytes());
    }

    /// Reads the data.
    ///
    /// # Errors
    /// Any [`WireError`] when the name reaches beyond the data, or a text is not a string.
    pub fn decode(data: &[u8]) -> Result<ServerEntry, WireError> {
        let mut fields = Fields::of(data);
        let length = fields.u32()? as usize;
        let name = fields.string(length)?;
        let description = fields.string(fields.remaining())?;
        Ok(ServerEntry { name, description })
    }
}

/// The data of LIST_META_CONTEXT and SET_META_CONTEXT.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MetaQuery {
    /// Name of the export.
    pub export: String,
    /// Context names; for a LIST, `namespace:` stands for all of that namespace, and none for all there are.
    pub queries: Vec<String>,
}

impl MetaQuery {
    /// Appends the data.
    pub fn encode(&self, out: &mut BytesMut) {
        put_string(&self.export, out);
        out.put_u32(self.queries.len() as u32);
        for query in &self.queries {
            put_string(query, out);
        }
    }

    /// Reads the data.
    ///
    /// # Errors
    /// Any [`WireError`] when lengths do not fit together or a name is not a string.
    pub fn decode(data: &[u8]) -> Result<MetaQuery, WireError> {
        let mut fields = Fields::of(data);
        let length = fields.u32()? as usize;
        let export = fields.string(length)?;
        let count = fields.u32()?;
        let mut queries = Vec::new();
        for _ in 0..count {
            let length = fields.u32()? as usize;
            queries.push(fields.string(length)?);
        }
        fields.end()?;
        Ok(MetaQuery { export, queries })
    }
}

/// One meta context, the data of a META_CONTEXT reply.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MetaContext {
    /// Stands for the context in BLOCK_STATUS replies; without meaning in the reply to a LIST.
    pub id: u32,
    /// Its name, `namespace:leaf`.
    pub name: String,
}

impl MetaContext {
    /// Appends the data.
    pub fn encode(&self, out: &mut BytesMut) {
        out.put_u32(self.id);
        out.put_slice(self.name.as_bytes());
    }

    /// Reads the data.
    ///
    /// # Errors
    /// Any [`WireError`] when it is too short or the name is not a string.
    pub fn decode(data: &[u8]) -> Result<MetaContext, WireError> {
        let mut fields = Fields::of(data);
        let id = fields.u32()?;
        let name = fields.string(fields.remaining())?;
        Ok(MetaContext { id, name })
    }
}

/// Cuts a text to what a string of the protocol may hold, at a character's end.
pub fn shortened(text: &str) -> &str {
    let mut end = text.len().min(MAX_STRING);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    &text[..end]
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn messages_survive_the_wire(
            name in "[a-zäß/:]{0,40}",
            text in "\\PC{0,40}",
            numbers in proptest::collection::vec(any::<u16>(), 0..9),
            queries in proptest::collection::vec("[a-z]{1,8}:[a-z:]{0,8}", 0..5),
            size: u64,
            id: u32,
        ) {
            let mut out = BytesMut::new();
            let request = ExportRequest { name: name.clone(), infos: numbers.iter().copied().map(InfoType).collect() };
            request.encode(&mut out);
            prop_assert_eq!(ExportRequest::decode(&out), Ok(request));
            // Any other length than the right one is refused.
            prop_assert!(ExportRequest::decode(&out[..out.len() - 1]).is_err());
            out.put_u8(0);
            prop_assert!(ExportRequest::decode(&out).is_err());

            out.clear();
            let query = MetaQuery { export: name.clone(), queries };
            query.encode(&mut out);
            prop_assert_eq!(MetaQuery::decode(&out), Ok(query));

            out.clear();
            let entry = ServerEntry { name: name.clone(), description: text.clone() };
            entry.encode(&mut out);
            prop_assert_eq!(ServerEntry::decode(&out), Ok(entry));

            out.clear();
            let context = MetaContext { id, name: name.clone() };
            context.encode(&mut out);
            prop_assert_eq!(MetaContext::decode(&out), Ok(context));

            for info in [
                Info::Export { size, flags: TransmissionFlags(id as u16) },
                Info::Name(name),
                Info::Description(text),
                Info::BlockSize { minimum: id, preferred: 7, maximum: u32::MAX },
                Info::Other(InfoType(900)),
            ] {
                out.clear();
                info.encode(&mut out);
                prop_assert_eq!(Info::decode(&out), Ok(info));
            }
        }

        #[test]
        fn any_bytes_are_decoded_without_a_panic(data in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = ExportRequest::decode(&data);
            let _ = MetaQuery::decode(&data);
            let _ = ServerEntry::decode(&data);
            let _ = MetaContext::decode(&data);
            let _ = Info::decode(&data);
            let _ = OptionHeader::decode(&data);
            let _ = OptionReplyHeader::decode(&data);
        }
    }

    #[test]
    fn a_count_that_the_data_cannot_hold_is_refused() {
        let mut out = BytesMut::new();
        put_string("x", &mut out);
        out.put_u32(u32::MAX);
        assert_eq!(MetaQuery::decode(&out), Err(WireError::NotEnough { missing: 4 }));
    }
}
