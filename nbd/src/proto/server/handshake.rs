//! The server's handshake: fixed newstyle, from the greeting to an export.

use std::sync::Arc;

use bytes::{Buf, BufMut, BytesMut};

use crate::export::{Export, ExportInfo, Exports};
use crate::limits::{MAX_CONTEXTS, MAX_OPTION_DATA, MAX_PAYLOAD};
use crate::wire::option::shortened;
use crate::wire::{
    ClientFlags, EXPORT_NAME_PADDING, ExportRequest, HandshakeFlags, INIT_MAGIC, Info, InfoType, MAX_STRING,
    MetaContext, MetaQuery, OPTION_MAGIC, OptionCode, OptionHeader, OptionReply, OptionReplyHeader, ServerEntry,
    TransmissionFlags, WireError,
};

/// What [`Handshake::advance`] came to.
pub enum Step {
    /// More bytes are needed.
    NeedMore,
    /// One option was answered; there may be more in the input.
    Answered,
    /// The transmission phase begins (after the bytes in `out` have been sent).
    Enter(Entered),
    /// The client left in an orderly way.
    Aborted,
}

/// What was negotiated.
pub struct Entered {
    /// The export.
    pub export: Arc<dyn Export>,
    /// The name that the client asked for.
    pub name: String,
    /// What the export said of itself to this client.
    pub info: ExportInfo,
    /// Structured replies were negotiated.
    pub structured: bool,
    /// The meta contexts that were chosen for this export.
    pub contexts: Vec<MetaContext>,
}

/// Why a client is hung up on in the handshake.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum HandshakeError {
    /// Flags that are not known may change the meaning of what follows.
    #[error("the client set unknown handshake flags {0:?}")]
    UnknownFlags(ClientFlags),
    /// The stream is out of step.
    #[error("the client does not speak the protocol")]
    Wire(#[from] WireError),
    /// EXPORT_NAME has no way to answer an error.
    #[error("the client asked for the export {0:?} with EXPORT_NAME, and there is none")]
    NoSuchExport(String),
    /// EXPORT_NAME has no way to answer an error.
    #[error("the client sent an EXPORT_NAME that is not a name")]
    BadName,
}

enum State {
    ClientFlags,
    Options,
    /// Throwing away the data of an option that is answered after it.
    Skipping {
        option: OptionCode,
        left: usize,
        reply: OptionReply,
        text: &'static str,
    },
}

/// The handshake of one client.
pub struct Handshake {
    state: State,
    no_zeroes: bool,
    structured: bool,
    /// The last SET_META_CONTEXT: the name of its export, and what it chose.
    chosen: Option<(String, Vec<MetaContext>)>,
}

/// The transmission flags of an export. FLUSH and FUA are always there.
pub fn transmission_flags(info: &ExportInfo, structured: bool) -> TransmissionFlags {
    (TransmissionFlags::HAS_FLAGS
        | TransmissionFlags::SEND_FLUSH
        | TransmissionFlags::SEND_FUA
        | TransmissionFlags::SEND_CACHE)
        .with_if(TransmissionFlags::READ_ONLY, info.read_only)
        .with_if(TransmissionFlags::SEND_TRIM | TransmissionFlags::SEND_WRITE_ZEROES, !info.read_only)
        .with_if(TransmissionFlags::SEND_DF, structured)
        .with_if(TransmissionFlags::CAN_MULTI_CONN, info.multi_conn)
}

impl Handshake {
    /// Begins a handshake: appends the greeting to `out`.
    pub fn new(out: &mut BytesMut) -> Handshake {
        out.put_u64(INIT_MAGIC);
        out.put_u64(OPTION_MAGIC);
        out.put_u16((HandshakeFlags::FIXED_NEWSTYLE | HandshakeFlags::NO_ZEROES).0);
        Handshake { state: State::ClientFlags, no_zeroes: false, structured: false, chosen: None }
    }

    /// Takes what stands at the front of `input`, at most one option, and appends the answer to `out`.
    ///
    /// # Errors
    /// [`HandshakeError`]: the client has to be hung up on.
    pub fn advance(
        &mut self,
        input: &mut BytesMut,
        exports: &dyn Exports,
        out: &mut BytesMut,
    ) -> Result<Step, HandshakeError> {
        if let State::ClientFlags = self.state {
            if input.len() < 4 {
                return Ok(Step::NeedMore);
            }
            let flags = ClientFlags(input.get_u32());
            let unknown = flags.without(ClientFlags::FIXED_NEWSTYLE | ClientFlags::NO_ZEROES);
            if unknown != ClientFlags::NONE {
                return Err(HandshakeError::UnknownFlags(unknown));
            }
            self.no_zeroes = flags.contains(ClientFlags::NO_ZEROES);
            self.state = State::Options;
        }
        if let State::Skipping { option, left, reply, text } = &mut self.state {
            let count = input.len().min(*left);
            input.advance(count);
            *left -= count;
            if *left > 0 {
                return Ok(Step::NeedMore);
            }
            OptionReplyHeader::encode(*option, *reply, text.as_bytes(), out);
            self.state = State::Options;
            return Ok(Step::Answered);
        }
        let header = match OptionHeader::decode(input) {
            Ok(header) => header,
            Err(WireError::NotEnough { .. }) => return Ok(Step::NeedMore),
            Err(error) => return Err(error.into()),
        };
        if header.option == OptionCode::EXPORT_NAME && header.length as usize > MAX_STRING {
            return Err(HandshakeError::BadName);
        }
        if header.length > MAX_OPTION_DATA {
            input.advance(OptionHeader::LENGTH);
            self.state = State::Skipping {
                option: header.option,
                left: header.length as usize,
                reply: OptionReply::ERR_TOO_BIG,
                text: "the data of the option is too long",
            };
            return self.advance(input, exports, out);
        }
        if input.len() < OptionHeader::LENGTH + header.length as usize {
            return Ok(Step::NeedMore);
        }
        input.advance(OptionHeader::LENGTH);
        let data = input.split_to(header.length as usize);
        self.option(header.option, &data, exports, out)
    }

    fn option(
        &mut self,
        option: OptionCode,
        data: &[u8],
        exports: &dyn Exports,
        out: &mut BytesMut,
    ) -> Result<Step, HandshakeError> {
        let mut answer =
            |reply: OptionReply, text: &str| OptionReplyHeader::encode(option, reply, text.as_bytes(), out);
        match option {
            OptionCode::EXPORT_NAME => return self.export_name(data, exports, out),
            OptionCode::ABORT => {
                answer(OptionReply::ACK, "");
                return Ok(Step::Aborted);
            }
            OptionCode::LIST if data.is_empty() => list(exports, out),
            OptionCode::STRUCTURED_REPLY if data.is_empty() => {
                self.structured = true;
                answer(OptionReply::ACK, "");
            }
            OptionCode::LIST | OptionCode::STRUCTURED_REPLY => {
                answer(OptionReply::ERR_INVALID, "the option has no data");
            }
            OptionCode::INFO | OptionCode::GO => match ExportRequest::decode(data) {
                Ok(request) => {
                    if let Some(entered) = self.describe(option, request, exports, out) {
                        return Ok(Step::Enter(entered));
                    }
                }
                Err(error) => answer(OptionReply::ERR_INVALID, &error.to_string()),
            },
            OptionCode::LIST_META_CONTEXT | OptionCode::SET_META_CONTEXT => {
                if option == OptionCode::SET_META_CONTEXT {
                    self.chosen = None;
                }
                if !self.structured {
                    answer(OptionReply::ERR_INVALID, "negotiate structured replies first");
                } else {
                    match MetaQuery::decode(data) {
                        Ok(query) => self.meta_context(option, query, exports, out),
                        Err(error) => answer(OptionReply::ERR_INVALID, &error.to_string()),
                    }
                }
            }
            _ => answer(OptionReply::ERR_UNSUP, "the option is not supported"),
        }
        Ok(Step::Answered)
    }

    fn export_name(&mut self, data: &[u8], exports: &dyn Exports, out: &mut BytesMut) -> Result<Step, HandshakeError> {
        let name = std::str::from_utf8(data).map_err(|_| HandshakeError::BadName)?;
        let export = exports.find(name).ok_or_else(|| HandshakeError::NoSuchExport(name.to_owned()))?;
        let info = export.info();
        out.put_u64(info.size);
        out.put_u16(transmission_flags(&info, self.structured).0);
        if !self.no_zeroes {
            out.put_bytes(0, EXPORT_NAME_PADDING);
        }
        Ok(Step::Enter(self.entered(name.to_owned(), export, info)))
    }

    fn entered(&mut self, name: String, export: Arc<dyn Export>, info: ExportInfo) -> Entered {
        // The contexts hold only for the export that they were chosen for.
        let contexts = match self.chosen.take() {
            Some((chosen_for, contexts)) if chosen_for == name => contexts,
            _ => Vec::new(),
        };
        Entered { export, name, info, structured: self.structured, contexts }
    }

    /// Answers INFO and GO. `Some` when the client goes on to transmission.
    fn describe(
        &mut self,
        option: OptionCode,
        request: ExportRequest,
        exports: &dyn Exports,
        out: &mut BytesMut,
    ) -> Option<Entered> {
        let Some(export) = exports.find(&request.name) else {
            OptionReplyHeader::encode(option, OptionReply::ERR_UNKNOWN, b"there is no such export", out);
            return None;
        };
        let info = export.info();
        let mut tell = |piece: Info| {
            let mut data = BytesMut::new();
            piece.encode(&mut data);
            OptionReplyHeader::encode(option, OptionReply::INFO, &data, out);
        };
        tell(Info::Export { size: info.size, flags: transmission_flags(&info, self.structured) });
        if request.infos.contains(&InfoType::NAME) {
            tell(Info::Name(request.name.clone()));
        }
        if request.infos.contains(&InfoType::DESCRIPTION) && !info.description.is_empty() {
            tell(Info::Description(shortened(&info.description).to_owned()));
        }
        if request.infos.contains(&InfoType::BLOCK_SIZE) {
            tell(Info::BlockSize { minimum: 1, preferred: info.preferred_block, maximum: MAX_PAYLOAD });
        }
        OptionReplyHeader::encode(option, OptionReply::ACK, b"", out);
        (option == OptionCode::GO).then(|| self.entered(request.name, export, info))
    }

    fn meta_context(&mut self, option: OptionCode, query: MetaQuery, exports: &dyn Exports, out: &mut BytesMut) {
        let Some(export) = exports.find(&query.export) else {
            OptionReplyHeader::encode(option, OptionReply::ERR_UNKNOWN, b"there is no such export", out);
            return;
        };
        let available = export.info().contexts;
        let listing = option == OptionCode::LIST_META_CONTEXT;
        let mut contexts = Vec::new();
        for (index, name) in available.into_iter().take(MAX_CONTEXTS).enumerate() {
            let asked = query
                .queries
                .iter()
                .any(|query| *query == name || (listing && query.ends_with(':') && name.starts_with(query.as_str())));
            if asked || (listing && query.queries.is_empty()) {
                contexts.push(MetaContext { id: index as u32 + 1, name });
            }
        }
        for context in &contexts {
            let mut data = BytesMut::new();
            context.encode(&mut data);
            OptionReplyHeader::encode(option, OptionReply::META_CONTEXT, &data, out);
        }
        OptionReplyHeader::encode(option, OptionReply::ACK, b"", out);
        if !listing {
            self.chosen = Some((query.export, contexts));
        }
    }
}

fn list(exports: &dyn Exports, out: &mut BytesMut) {
    for (name, description) in exports.list() {
        // A name that the protocol cannot carry could not be asked for either.
        if name.len() <= MAX_STRING {
            let mut data = BytesMut::new();
            ServerEntry { name, description: shortened(&description).to_owned() }.encode(&mut data);
            OptionReplyHeader::encode(OptionCode::LIST, OptionReply::SERVER, &data, out);
        }
    }
    OptionReplyHeader::encode(OptionCode::LIST, OptionReply::ACK, b"", out);
}

#[cfg(test)]
#[path = "handshake_tests.rs"]
mod tests;
