//! The server's handshake: fixed newstyle, from the greeting to an export.

use std::sync::Arc;

use bytes::{Buf, BufMut, BytesMut};

use crate::export::{Export, ExportInfo, Exports};
use crate::limits::{MAX_CONTEXTS, MAX_OPTION_DATA, MAX_PAYLOAD, MAX_QUERIES};
use crate::wire::option::shortened;
use crate::wire::{
    ClientFlags, EXPORT_NAME_PADDING, ExportRequest, Framing, HandshakeFlags, INIT_MAGIC, Info, InfoType, MAX_STRING,
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
    /// TLS begins after the bytes in `out` have been sent; then the handshake goes on with [`Handshake::tls_started`].
    StartTls,
}

/// What a client hears of TLS (document: "Server-side requirements").
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum TlsMode {
    /// There is none (NOTLS).
    #[default]
    Off,
    /// It is there for who asks for it (SELECTIVETLS, with no export that needs it).
    Offered,
    /// Nothing is answered before it (FORCEDTLS).
    Required,
    /// It is in use.
    Started,
}

/// What was negotiated.
pub struct Entered {
    /// The export.
    pub export: Arc<dyn Export>,
    /// The name that the client asked for.
    pub name: String,
    /// What the export said of itself to this client.
    pub info: ExportInfo,
    /// The form of requests and replies.
    pub framing: Framing,
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
    /// Extended headers need GO.
    #[error("the client asked for extended headers, and then for an export with EXPORT_NAME")]
    ExtendedExportName,
    /// EXPORT_NAME has no way to answer an error.
    #[error("the client asked for an export with EXPORT_NAME while the server is shutting down")]
    ShuttingDown,
    /// EXPORT_NAME has no way to answer an error.
    #[error(
        "the client asked for an export with EXPORT_NAME and without TLS, which is required here; it needs nbds://"
    )]
    TlsRequired,
    /// Plaintext after STARTTLS may be somebody else's.
    #[error("the client went on without encryption after STARTTLS, or somebody did in its name")]
    PlaintextAfterStartTls,
}

/// What a client without TLS is told where it has to have it.
const NEEDS_TLS: &str = "TLS is required here: connect with nbds:// and certificates";

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
    tls: TlsMode,
    no_zeroes: bool,
    shutting_down: bool,
    framing: Framing,
    /// The last SET_META_CONTEXT: the name of its export, and what it chose.
    chosen: Option<(String, Vec<MetaContext>)>,
}

/// The transmission flags of an export. FLUSH and FUA are always there. `contexts` says whether meta contexts were
/// chosen.
pub fn transmission_flags(info: &ExportInfo, framing: Framing, contexts: bool) -> TransmissionFlags {
    let changes = TransmissionFlags::SEND_TRIM | TransmissionFlags::SEND_WRITE_ZEROES;
    (TransmissionFlags::HAS_FLAGS
        | TransmissionFlags::SEND_FLUSH
        | TransmissionFlags::SEND_FUA
        | TransmissionFlags::SEND_CACHE)
        .with_if(TransmissionFlags::READ_ONLY, info.read_only)
        .with_if(TransmissionFlags::ROTATIONAL, info.rotational)
        .with_if(changes, !info.read_only)
        .with_if(TransmissionFlags::SEND_FAST_ZERO, info.fast_zero && !info.read_only)
        .with_if(TransmissionFlags::SEND_DF, framing.has_chunks())
        .with_if(TransmissionFlags::CAN_MULTI_CONN, info.multi_conn)
        .with_if(TransmissionFlags::BLOCK_STATUS_PAYLOAD, framing == Framing::Extended && contexts)
}

impl Handshake {
    /// Begins a handshake: appends the greeting to `out`.
    pub fn new(out: &mut BytesMut) -> Handshake {
        out.put_u64(INIT_MAGIC);
        out.put_u64(OPTION_MAGIC);
        out.put_u16((HandshakeFlags::FIXED_NEWSTYLE | HandshakeFlags::NO_ZEROES).0);
        Handshake {
            state: State::ClientFlags,
            tls: TlsMode::Off,
            no_zeroes: false,
            shutting_down: false,
            framing: Framing::Simple,
            chosen: None,
        }
    }

    /// The same handshake, with TLS as `tls` says.
    pub fn with_tls(self, tls: TlsMode) -> Handshake {
        Handshake { tls, ..self }
    }

    /// The stream is encrypted from here on: the handshake goes on after [`Step::StartTls`] as if no option had been
    /// sent before it.
    pub fn tls_started(&mut self) {
        self.tls = TlsMode::Started;
        self.state = State::Options;
        self.framing = Framing::Simple;
        self.chosen = None;
    }

    /// From now on, every option but ABORT is answered with ERR_SHUTDOWN.
    pub fn shut_down(&mut self) {
        self.shutting_down = true;
    }

    /// Whether [`Handshake::shut_down`] was called.
    pub fn is_shutting_down(&self) -> bool {
        self.shutting_down
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
            let (reply, text) = match self.tls {
                TlsMode::Required => (OptionReply::ERR_TLS_REQD, NEEDS_TLS),
                _ => (OptionReply::ERR_TOO_BIG, "the data of the option is too long"),
            };
            self.state = State::Skipping { option: header.option, left: header.length as usize, reply, text };
            return self.advance(input, exports, out);
        }
        if input.len() < OptionHeader::LENGTH + header.length as usize {
            return Ok(Step::NeedMore);
        }
        input.advance(OptionHeader::LENGTH);
        let data = input.split_to(header.length as usize);
        let step = self.option(header.option, &data, exports, out)?;
        // What was sent before the answer to STARTTLS is not encrypted, so that anybody may have put it there. A client
        // waits for the answer: nothing is lost by not going on with one that does not.
        if matches!(step, Step::StartTls) && !input.is_empty() {
            return Err(HandshakeError::PlaintextAfterStartTls);
        }
        Ok(step)
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
            OptionCode::EXPORT_NAME if self.shutting_down => return Err(HandshakeError::ShuttingDown),
            OptionCode::EXPORT_NAME if self.tls == TlsMode::Required => return Err(HandshakeError::TlsRequired),
            OptionCode::EXPORT_NAME => return self.export_name(data, exports, out),
            OptionCode::ABORT => {
                answer(OptionReply::ACK, "");
                return Ok(Step::Aborted);
            }
            _ if self.shutting_down => answer(OptionReply::ERR_SHUTDOWN, "the server is shutting down"),
            OptionCode::STARTTLS => match self.tls {
                TlsMode::Off => answer(OptionReply::ERR_POLICY, "TLS is not configured here: use nbd:// without it"),
                TlsMode::Started => answer(OptionReply::ERR_INVALID, "TLS is in use already"),
                _ if !data.is_empty() => answer(OptionReply::ERR_INVALID, "the option has no data"),
                TlsMode::Offered | TlsMode::Required => {
                    answer(OptionReply::ACK, "");
                    return Ok(Step::StartTls);
                }
            },
            _ if self.tls == TlsMode::Required => answer(OptionReply::ERR_TLS_REQD, NEEDS_TLS),
            OptionCode::LIST if data.is_empty() => list(exports, out),
            OptionCode::STRUCTURED_REPLY if data.is_empty() && self.framing == Framing::Extended => {
                answer(OptionReply::ERR_EXT_HEADER_REQD, "extended headers are in use already");
            }
            OptionCode::STRUCTURED_REPLY if data.is_empty() => {
                self.framing = Framing::Structured;
                answer(OptionReply::ACK, "");
            }
            OptionCode::EXTENDED_HEADERS if data.is_empty() => {
                self.framing = Framing::Extended;
                answer(OptionReply::ACK, "");
            }
            OptionCode::LIST | OptionCode::STRUCTURED_REPLY | OptionCode::EXTENDED_HEADERS => {
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
                if !self.framing.has_chunks() {
                    answer(OptionReply::ERR_INVALID, "negotiate extended headers or structured replies first");
                } else {
                    match MetaQuery::decode(data) {
                        Ok(query) if query.queries.len() > MAX_QUERIES => {
                            answer(OptionReply::ERR_TOO_BIG, "there are too many queries");
                        }
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
        if self.framing == Framing::Extended {
            return Err(HandshakeError::ExtendedExportName);
        }
        let name = std::str::from_utf8(data).map_err(|_| HandshakeError::BadName)?;
        let export = exports.find(name).ok_or_else(|| HandshakeError::NoSuchExport(name.to_owned()))?;
        let info = described(export.as_ref());
        out.put_u64(info.size);
        out.put_u16(transmission_flags(&info, self.framing, self.has_contexts(name)).0);
        if !self.no_zeroes {
            out.put_bytes(0, EXPORT_NAME_PADDING);
        }
        Ok(Step::Enter(self.entered(name.to_owned(), export, info)))
    }

    fn has_contexts(&self, name: &str) -> bool {
        self.chosen.as_ref().is_some_and(|(chosen_for, contexts)| chosen_for == name && !contexts.is_empty())
    }

    fn entered(&mut self, name: String, export: Arc<dyn Export>, info: ExportInfo) -> Entered {
        // The contexts hold only for the export that they were chosen for.
        let contexts = match self.chosen.take() {
            Some((chosen_for, contexts)) if chosen_for == name => contexts,
            _ => Vec::new(),
        };
        Entered { export, name, info, framing: self.framing, contexts }
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
        let info = described(export.as_ref());
        let flags = transmission_flags(&info, self.framing, self.has_contexts(&request.name));
        let mut tell = |piece: Info| {
            let mut data = BytesMut::new();
            piece.encode(&mut data);
            OptionReplyHeader::encode(option, OptionReply::INFO, &data, out);
        };
        tell(Info::Export { size: info.size, flags });
        if request.infos.contains(&InfoType::NAME) {
            tell(Info::Name(request.name.clone()));
        }
        if request.infos.contains(&InfoType::DESCRIPTION) && !info.description.is_empty() {
            tell(Info::Description(shortened(&info.description).to_owned()));
        }
        if request.infos.contains(&InfoType::BLOCK_SIZE) {
            let (minimum, preferred) = (info.minimum_block, info.preferred_block);
            tell(Info::BlockSize { minimum, preferred, maximum: MAX_PAYLOAD });
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
                // Without meaning in a list.
                let id = if listing { 0 } else { index as u32 + 1 };
                contexts.push(MetaContext { id, name });
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

/// What an export says of itself, within what the protocol allows.
fn described(export: &dyn Export) -> ExportInfo {
    let mut info = export.info();
    info.minimum_block = info.minimum_block.clamp(1, 1 << 16).next_power_of_two();
    info.preferred_block = info.preferred_block.clamp(info.minimum_block.max(512), MAX_PAYLOAD).next_power_of_two();
    info.size -= info.size % u64::from(info.minimum_block);
    info
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

#[cfg(test)]
#[path = "starttls_tests.rs"]
mod starttls_tests;
