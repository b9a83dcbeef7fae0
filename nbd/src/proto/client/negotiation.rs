//! The client's handshake.
//!
//! The order is: greeting, STARTTLS where TLS is wanted, EXTENDED_HEADERS (or STRUCTURED_REPLY where the server has them not), SET_META_CONTEXT, then
//! GO, INFO or LIST. Each step that the server does not know is passed over; a server without GO is asked with
//! EXPORT_NAME. Nothing is sent before the answer to the last
//! option is here, so that no byte of the transmission phase can arrive while this runs.

use bytes::{Buf, BufMut, BytesMut};

use crate::limits::{MAX_OPTION_REPLIES, MAX_OPTION_REPLY};
use crate::wire::{
    ClientFlags, EXPORT_NAME_PADDING, ExportRequest, Framing, HandshakeFlags, INIT_MAGIC, Info, InfoType, MAX_STRING,
    MetaContext, MetaQuery, OLDSTYLE_MAGIC, OPTION_MAGIC, OptionCode, OptionHeader, OptionReply, OptionReplyHeader,
    ServerEntry, TransmissionFlags, WireError,
};

/// What a negotiation is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Goal {
    /// Enter the transmission phase.
    Transmission,
    /// Describe the export and leave.
    Info,
    /// List the exports and leave.
    List,
    /// List the meta contexts of the export and leave.
    Contexts,
}

/// What to negotiate.
#[derive(Clone, Debug)]
pub struct Plan {
    /// What for.
    pub goal: Goal,
    /// Name of the export; empty for the default one.
    pub export: String,
    /// The best form of requests and replies to ask for; a server without it is asked for the next best. Meta contexts
    /// need [`Framing::Structured`] at least.
    pub framing: Framing,
    /// The meta contexts to ask for; for [`Goal::Contexts`] also namespaces with their colon, or none for all.
    pub contexts: Vec<String>,
    /// Begin TLS before anything else, and leave a server that refuses it.
    pub tls: bool,
}

/// What a server granted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Negotiated {
    /// Size in bytes.
    pub size: u64,
    /// What the export can do.
    pub flags: TransmissionFlags,
    /// Offsets and lengths must be multiples of it; 1 if the server said nothing.
    pub minimum_block: u32,
    /// Requests of this alignment are fast.
    pub preferred_block: u32,
    /// Longest READ or WRITE in bytes.
    pub maximum_block: u32,
    /// The form of requests and replies.
    pub framing: Framing,
    /// The meta contexts that BLOCK_STATUS answers.
    pub contexts: Vec<MetaContext>,
    /// The name the server gave.
    pub name: Option<String>,
    /// The text the server gave.
    pub description: Option<String>,
}

/// Where a negotiation ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The transmission phase has begun, or (for [`Goal::Info`]) the export was described.
    Export(Negotiated),
    /// The server's exports.
    List(Vec<ServerEntry>),
    /// The names of the export's meta contexts.
    Contexts(Vec<String>),
    /// The stream is to be encrypted now; then the negotiation goes on with [`Negotiation::tls_started`].
    StartTls,
}

/// Why a negotiation failed. The connection is of no more use.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NegotiationError {
    /// What answered is something else.
    #[error("this is not an NBD server")]
    NotNbd,
    /// A greeting of before 2011.
    #[error("the server speaks the oldstyle protocol, which is not supported")]
    Oldstyle,
    /// The option cannot be spoken without fixed newstyle.
    #[error("the server does not speak fixed newstyle, so it cannot {0}")]
    NotFixed(&'static str),
    /// No export of that name.
    #[error("the server has no export {name:?}{}", said(.message))]
    NoSuchExport {
        /// The name.
        name: String,
        /// What the server said.
        message: String,
    },
    /// TLS is asked for.
    #[error("the server wants TLS{}: use nbds:// (or nbds+unix://) with tls-certificates=DIRECTORY", said(.0))]
    TlsRequired(String),
    /// TLS is refused, and the connection was given up before anything was asked in plain text.
    #[error("the server refused TLS ({reply}){}: give it certificates, or use nbd:// where the network can be trusted", said(.message))]
    TlsRefused {
        /// The error.
        reply: OptionReply,
        /// What the server said.
        message: String,
    },
    /// Plaintext after the answer to STARTTLS may be somebody else's.
    #[error(
        "something without encryption came after the server had begun TLS: somebody may be meddling with the connection"
    )]
    PlaintextAfterStartTls,
    /// Any other refusal.
    #[error("the server refused {option}: {reply}{}", said(.message))]
    Refused {
        /// What was asked.
        option: OptionCode,
        /// The error.
        reply: OptionReply,
        /// What the server said.
        message: String,
    },
    /// The server breaks the protocol.
    #[error("the server breaks the protocol: {0}")]
    Broken(&'static str),
    /// The server breaks the protocol.
    #[error("the server breaks the protocol")]
    Wire(#[from] WireError),
}

fn said(message: &str) -> String {
    if message.is_empty() { String::new() } else { format!(" (it says: {message})") }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Greeting,
    /// Waiting for the replies to an option.
    Option(OptionCode),
    /// Waiting for the reply to EXPORT_NAME, which has a form of its own.
    ExportName,
}

/// The handshake of one connection.
pub struct Negotiation {
    plan: Plan,
    state: State,
    no_zeroes: bool,
    exported: bool,
    replies: usize,
    list: Vec<ServerEntry>,
    names: Vec<String>,
    negotiated: Negotiated,
}

impl Negotiation {
    /// A negotiation that waits for the server's greeting.
    pub fn new(plan: Plan) -> Negotiation {
        Negotiation {
            plan,
            state: State::Greeting,
            no_zeroes: false,
            exported: false,
            replies: 0,
            list: Vec::new(),
            names: Vec::new(),
            negotiated: Negotiated {
                size: 0,
                flags: TransmissionFlags::NONE,
                minimum_block: 1,
                preferred_block: 4096,
                maximum_block: crate::limits::MAX_PAYLOAD,
                framing: Framing::Simple,
                contexts: Vec::new(),
                name: None,
                description: None,
            },
        }
    }

    /// Takes what stands in `input` and appends what is to be sent to `out`. At the outcome of [`Goal::Info`],
    /// [`Goal::List`] and [`Goal::Contexts`] that is an ABORT.
    ///
    /// # Errors
    /// [`NegotiationError`]: hang up. After a refusal there is an ABORT to be sent first.
    pub fn advance(&mut self, input: &mut BytesMut, out: &mut BytesMut) -> Result<Option<Outcome>, NegotiationError> {
        loop {
            let outcome = match self.state {
                State::Greeting => {
                    if !self.greeting(input, out)? {
                        return Ok(None);
                    }
                    None
                }
                State::ExportName => {
                    if !self.export_name(input)? {
                        return Ok(None);
                    }
                    Some(Outcome::Export(self.negotiated.clone()))
                }
                State::Option(option) => {
                    let header = match OptionReplyHeader::decode(input) {
                        Ok(header) => header,
                        Err(WireError::NotEnough { .. }) => return Ok(None),
                        Err(error) => return Err(error.into()),
                    };
                    if header.length > MAX_OPTION_REPLY {
                        return Err(NegotiationError::Broken("the reply to an option is too long"));
                    }
                    if header.option != option {
                        return Err(NegotiationError::Broken("the reply is to another option than was sent"));
                    }
                    if input.len() < OptionReplyHeader::LENGTH + header.length as usize {
                        return Ok(None);
                    }
                    input.advance(OptionReplyHeader::LENGTH);
                    let data = input.split_to(header.length as usize);
                    self.reply(option, header.reply, &data, out)?
                }
            };
            if let Some(outcome) = outcome {
                if !input.is_empty() {
                    if outcome == Outcome::StartTls {
                        return Err(NegotiationError::PlaintextAfterStartTls);
                    }
                    return Err(NegotiationError::Broken("it sends before it is asked"));
                }
                return Ok(Some(outcome));
            }
        }
    }

    fn greeting(&mut self, input: &mut BytesMut, out: &mut BytesMut) -> Result<bool, NegotiationError> {
        // A server of another protocol is recognised by its first bytes, however few it sends.
        let magic = INIT_MAGIC.to_be_bytes();
        let known = input.len().min(magic.len());
        if input[..known] != magic[..known] {
            return Err(NegotiationError::NotNbd);
        }
        if input.len() < 18 {
            return Ok(false);
        }
        input.advance(8);
        match input.get_u64() {
            OPTION_MAGIC => {}
            OLDSTYLE_MAGIC => return Err(NegotiationError::Oldstyle),
            _ => return Err(NegotiationError::NotNbd),
        }
        let flags = HandshakeFlags(input.get_u16());
        let fixed = flags.contains(HandshakeFlags::FIXED_NEWSTYLE);
        self.no_zeroes = flags.contains(HandshakeFlags::NO_ZEROES);
        let answer = ClientFlags::NONE
            .with_if(ClientFlags::FIXED_NEWSTYLE, fixed)
            .with_if(ClientFlags::NO_ZEROES, self.no_zeroes);
        out.put_u32(answer.0);
        match self.plan.goal {
            _ if self.plan.tls && !fixed => return Err(NegotiationError::NotFixed("begin TLS")),
            Goal::List if !fixed => return Err(NegotiationError::NotFixed("list its exports")),
            Goal::Info if !fixed => return Err(NegotiationError::NotFixed("describe an export")),
            Goal::Contexts if !fixed => return Err(NegotiationError::NotFixed("list meta contexts")),
            Goal::Transmission if !fixed => self.ask_export_name(out),
            _ if self.plan.tls => self.ask(OptionCode::STARTTLS, b"", out),
            _ => self.ask_first(out),
        }
        Ok(true)
    }

    /// Goes on over the encrypted stream, after [`Outcome::StartTls`]. Appends the next option to `out`.
    pub fn tls_started(&mut self, out: &mut BytesMut) {
        self.ask_first(out);
    }

    fn ask_first(&mut self, out: &mut BytesMut) {
        match self.plan.goal {
            Goal::List => self.ask(OptionCode::LIST, b"", out),
            // They need one of them.
            Goal::Contexts => self.ask_for_framing(self.plan.framing.max(Framing::Structured), out),
            _ => self.ask_for_framing(self.plan.framing, out),
        }
    }

    fn ask(&mut self, option: OptionCode, data: &[u8], out: &mut BytesMut) {
        OptionHeader::encode(option, data, out);
        self.replies = 0;
        self.state = State::Option(option);
    }

    fn ask_for_framing(&mut self, framing: Framing, out: &mut BytesMut) {
        match framing {
            Framing::Extended => self.ask(OptionCode::EXTENDED_HEADERS, b"", out),
            Framing::Structured => self.ask(OptionCode::STRUCTURED_REPLY, b"", out),
            Framing::Simple => self.ask_for_export(out),
        }
    }

    fn ask_for_contexts(&mut self, out: &mut BytesMut) {
        let listing = self.plan.goal == Goal::Contexts;
        if !listing && (!self.negotiated.framing.has_chunks() || self.plan.contexts.is_empty()) {
            return self.ask_for_export(out);
        }
        let mut data = BytesMut::new();
        MetaQuery { export: self.plan.export.clone(), queries: self.plan.contexts.clone() }.encode(&mut data);
        let option = if listing { OptionCode::LIST_META_CONTEXT } else { OptionCode::SET_META_CONTEXT };
        self.ask(option, &data, out);
    }

    fn ask_for_export(&mut self, out: &mut BytesMut) {
        let infos = vec![InfoType::BLOCK_SIZE, InfoType::NAME, InfoType::DESCRIPTION];
        let mut data = BytesMut::new();
        ExportRequest { name: self.plan.export.clone(), infos }.encode(&mut data);
        let option = if self.plan.goal == Goal::Info { OptionCode::INFO } else { OptionCode::GO };
        self.ask(option, &data, out);
    }

    fn ask_export_name(&mut self, out: &mut BytesMut) {
        OptionHeader::encode(OptionCode::EXPORT_NAME, self.plan.export.as_bytes(), out);
        self.state = State::ExportName;
    }

    fn export_name(&mut self, input: &mut BytesMut) -> Result<bool, NegotiationError> {
        let padding = if self.no_zeroes { 0 } else { EXPORT_NAME_PADDING };
        if input.len() < 10 + padding {
            return Ok(false);
        }
        self.negotiated.size = input.get_u64();
        self.negotiated.flags = TransmissionFlags(input.get_u16());
        input.advance(padding);
        self.check()?;
        Ok(true)
    }

    fn reply(
        &mut self,
        option: OptionCode,
        reply: OptionReply,
        data: &[u8],
        out: &mut BytesMut,
    ) -> Result<Option<Outcome>, NegotiationError> {
        self.replies += 1;
        if self.replies > MAX_OPTION_REPLIES {
            return Err(NegotiationError::Broken("it does not stop to answer one option"));
        }
        if reply.is_error() {
            let message = String::from_utf8_lossy(&data[..data.len().min(MAX_STRING)]).into_owned();
            let refused = self.refused(option, reply, message, out);
            if refused.is_err() {
                OptionHeader::encode(OptionCode::ABORT, b"", out);
            }
            return refused.map(|()| None);
        }
        match (option, reply) {
            (OptionCode::STARTTLS, OptionReply::ACK) => return Ok(Some(Outcome::StartTls)),
            (OptionCode::EXTENDED_HEADERS | OptionCode::STRUCTURED_REPLY, OptionReply::ACK) => {
                let extended = option == OptionCode::EXTENDED_HEADERS;
                self.negotiated.framing = if extended { Framing::Extended } else { Framing::Structured };
                self.ask_for_contexts(out);
            }
            (OptionCode::SET_META_CONTEXT, OptionReply::META_CONTEXT) => self.context(MetaContext::decode(data)?)?,
            (OptionCode::SET_META_CONTEXT, OptionReply::ACK) => self.ask_for_export(out),
            (OptionCode::LIST_META_CONTEXT, OptionReply::META_CONTEXT) => {
                self.names.push(MetaContext::decode(data)?.name);
            }
            (OptionCode::LIST_META_CONTEXT, OptionReply::ACK) => {
                OptionHeader::encode(OptionCode::ABORT, b"", out);
                return Ok(Some(Outcome::Contexts(std::mem::take(&mut self.names))));
            }
            (OptionCode::LIST, OptionReply::SERVER) => self.list.push(ServerEntry::decode(data)?),
            (OptionCode::LIST, OptionReply::ACK) => {
                OptionHeader::encode(OptionCode::ABORT, b"", out);
                return Ok(Some(Outcome::List(std::mem::take(&mut self.list))));
            }
            (OptionCode::GO | OptionCode::INFO, OptionReply::INFO) => self.info(Info::decode(data)?),
            (OptionCode::GO | OptionCode::INFO, OptionReply::ACK) => {
                if !self.exported {
                    return Err(NegotiationError::Broken("it does not say how large the export is"));
                }
                self.check()?;
                if option == OptionCode::INFO {
                    OptionHeader::encode(OptionCode::ABORT, b"", out);
                }
                return Ok(Some(Outcome::Export(self.negotiated.clone())));
            }
            _ => return Err(NegotiationError::Broken("the reply does not belong to the option")),
        }
        Ok(None)
    }

    fn refused(
        &mut self,
        option: OptionCode,
        reply: OptionReply,
        message: String,
        out: &mut BytesMut,
    ) -> Result<(), NegotiationError> {
        match (option, reply) {
            (_, OptionReply::ERR_TLS_REQD) => return Err(NegotiationError::TlsRequired(message)),
            (OptionCode::STARTTLS, reply) if reply != OptionReply::ERR_SHUTDOWN => {
                return Err(NegotiationError::TlsRefused { reply, message });
            }
            // The document has the client leave.
            (_, OptionReply::ERR_SHUTDOWN) => return Err(NegotiationError::Refused { option, reply, message }),
            (OptionCode::EXTENDED_HEADERS, _) => self.ask_for_framing(Framing::Structured, out),
            (OptionCode::STRUCTURED_REPLY, _) if self.plan.goal != Goal::Contexts => {
                self.ask_for_framing(Framing::Simple, out)
            }
            // A server that does not know the option, or no such context; an unknown export shows at GO.
            (OptionCode::SET_META_CONTEXT, _) => {
                self.negotiated.contexts.clear();
                self.ask_for_export(out);
            }
            // Not after extended headers, which need GO.
            (OptionCode::GO, OptionReply::ERR_UNSUP) if self.negotiated.framing != Framing::Extended => {
                self.ask_export_name(out);
            }
            (OptionCode::GO | OptionCode::INFO | OptionCode::LIST_META_CONTEXT, OptionReply::ERR_UNKNOWN) => {
                return Err(NegotiationError::NoSuchExport { name: self.plan.export.clone(), message });
            }
            _ => return Err(NegotiationError::Refused { option, reply, message }),
        }
        Ok(())
    }

    fn context(&mut self, context: MetaContext) -> Result<(), NegotiationError> {
        if !self.plan.contexts.contains(&context.name) {
            return Err(NegotiationError::Broken("it chose a meta context that was not asked for"));
        }
        if self.negotiated.contexts.iter().any(|known| known.id == context.id || known.name == context.name) {
            return Err(NegotiationError::Broken("it chose a meta context twice"));
        }
        self.negotiated.contexts.push(context);
        Ok(())
    }

    fn info(&mut self, info: Info) {
        match info {
            Info::Export { size, flags } => {
                self.exported = true;
                self.negotiated.size = size;
                self.negotiated.flags = flags;
            }
            Info::Name(name) => self.negotiated.name = Some(name),
            Info::Description(text) => self.negotiated.description = Some(text),
            Info::BlockSize { minimum, preferred, maximum } => {
                self.negotiated.minimum_block = minimum;
                self.negotiated.preferred_block = preferred;
                self.negotiated.maximum_block = maximum;
            }
            Info::Other(_) => {}
        }
    }

    /// What the server granted must make sense: everything after this computes with it.
    fn check(&self) -> Result<(), NegotiationError> {
        let n = &self.negotiated;
        if i64::try_from(n.size).is_err() {
            return Err(NegotiationError::Broken("the export's size is beyond 2^63"));
        }
        let minimum_right = n.minimum_block.is_power_of_two() && n.minimum_block <= 65536;
        let preferred_right = n.preferred_block.is_power_of_two() && n.preferred_block >= n.minimum_block.max(512);
        if !minimum_right || !preferred_right || n.maximum_block < n.minimum_block {
            return Err(NegotiationError::Broken("its block sizes contradict each other"));
        }
        Ok(())
    }
}

#[cfg(test)]
#[path = "negotiation_tests.rs"]
mod tests;
