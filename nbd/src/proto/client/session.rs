//! The client's transmission phase: operations out, completions in.

use bytes::{Buf, Bytes, BytesMut};
use rustc_hash::FxHashMap;

use super::Negotiated;
use super::assemble::Assembly;
use super::operation::Operation;
use crate::export::Extent;
use crate::limits::{MAX_ERROR_PAYLOAD, MAX_STATUS_PAYLOAD};
use crate::wire::{
    CHUNK_MAGIC, ChunkFlags, ChunkHeader, ChunkType, Command, CommandFlags, EXTENDED_CHUNK_MAGIC, Errno, ErrorChunk,
    ExtendedChunkHeader, Framing, Request, RequestHead, SIMPLE_REPLY_MAGIC, SimpleReply, WireError,
};

/// The extents of one context.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ContextExtents {
    /// The context's id, see [`Negotiated::contexts`].
    pub id: u32,
    /// Extents from the request's offset on; none empty, none beyond the range, perhaps not all of it.
    pub extents: Vec<Extent>,
}

/// What a request came to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reply {
    /// Done.
    Done,
    /// The bytes of a READ.
    Data(Bytes),
    /// The answer to a BLOCK_STATUS, one entry for each context.
    Status(Vec<ContextExtents>),
}

/// The server refused a request; the connection goes on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// Why.
    pub error: Errno,
    /// What the server said to it, perhaps empty.
    pub message: String,
    /// Where it failed, if the server said so; an offset in the export in bytes.
    pub offset: Option<u64>,
}

/// A request that was answered.
#[derive(Debug, PartialEq, Eq)]
pub struct Completion<T> {
    /// What the caller gave with the operation.
    pub token: T,
    /// What it came to.
    pub result: Result<Reply, Refusal>,
}

/// Content of a [`Operation::Stream`] that comes now.
#[derive(Debug, PartialEq, Eq)]
pub struct Payload<'a, T> {
    /// What the caller gave with the operation.
    pub token: &'a mut T,
    /// Where in the export it belongs, in bytes.
    pub offset: u64,
    /// What is left of it, in bytes; never 0.
    pub length: u32,
    /// It is zeroes, of which nothing is sent; else it is what follows on the stream.
    pub zeroes: bool,
}

/// The server breaks the protocol, and the connection cannot go on.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ProtocolError {
    /// A message that is not one.
    #[error("the server breaks the protocol: {0}")]
    Wire(#[from] WireError),
    /// A message that does not fit what was asked.
    #[error("the server breaks the protocol: {what} (cookie {cookie:#x})")]
    Broken {
        /// What is wrong.
        what: &'static str,
        /// Of which request.
        cookie: u64,
    },
}

struct Pending<T> {
    token: T,
    command: Command,
    /// The server must answer with one chunk of content, or one extent of each context.
    single: bool,
    /// Content is handed on as it comes.
    streamed: bool,
    offset: u64,
    length: u64,
    assembly: Option<Assembly>,
    status: Vec<ContextExtents>,
    refusal: Option<Refusal>,
    /// What it takes to send it again, in a session that may have to.
    operation: Option<Operation>,
    /// It was refused with ESHUTDOWN and waits to be sent again.
    parked: bool,
}

/// Content that is being handed on.
#[derive(Clone, Copy, Debug)]
struct Open {
    cookie: u64,
    offset: u64,
    left: u32,
    zeroes: bool,
    /// With it the reply ends.
    last: bool,
}

/// The id of a context on this connection, and the one by which the caller knows it.
#[derive(Clone, Copy, Debug)]
struct ContextId {
    wire: u32,
    told: u32,
}

/// Matches replies to requests. `T` is what the caller wants back with a completion.
pub struct Session<T> {
    framing: Framing,
    contexts: Vec<ContextId>,
    next_cookie: u64,
    /// By cookies of our own making.
    pending: FxHashMap<u64, Pending<T>>,
    wanted: usize,
    open: Option<Open>,
    streams: usize,
    /// Requests are kept to be sent again on another connection.
    resending: bool,
    parked: usize,
}

impl<T> Session<T> {
    /// A session at the start of the transmission phase.
    pub fn new(negotiated: &Negotiated) -> Session<T> {
        let contexts = negotiated.contexts.iter().map(|context| ContextId { wire: context.id, told: context.id });
        let mut session = Session {
            framing: negotiated.framing,
            contexts: contexts.collect(),
            next_cookie: 1,
            pending: FxHashMap::default(),
            wanted: 0,
            open: None,
            streams: 0,
            resending: false,
            parked: 0,
        };
        session.wanted = session.shortest();
        session
    }

    /// The same session, able to [`Session::restart`]. A request that is refused with ESHUTDOWN is not completed: it
    /// waits for the restart.
    pub fn resending(self) -> Session<T> {
        Session { resending: true, ..self }
    }

    /// Registers an operation and returns what is to be sent: the head, and a payload that is empty where there is none.
    pub fn submit(&mut self, operation: &Operation, token: T) -> (RequestHead, Bytes) {
        let cookie = self.next_cookie;
        self.next_cookie = self.next_cookie.wrapping_add(1);
        let (request, payload) = self.encode(operation, cookie);
        let pending = Pending {
            token,
            command: request.command,
            single: request.flags.contains(CommandFlags::DF) || request.flags.contains(CommandFlags::REQ_ONE),
            streamed: matches!(operation, Operation::Stream { .. }),
            offset: request.offset,
            length: operation.length(),
            assembly: None,
            status: Vec::new(),
            refusal: None,
            operation: self.resending.then(|| operation.clone()),
            parked: false,
        };
        self.streams += usize::from(pending.streamed);
        self.pending.insert(cookie, pending);
        (request.encode_as(self.framing), payload)
    }

    /// Goes on over another connection, on which the same was negotiated but for the ids of the contexts. Returns all
    /// requests without an answer, to be sent again in the order in which they were submitted; those whose token is
    /// `abandoned` are forgotten.
    pub fn restart(
        &mut self,
        negotiated: &Negotiated,
        names: &Negotiated,
        abandoned: impl Fn(&T) -> bool,
    ) -> Vec<(RequestHead, Bytes)> {
        let told = |name: &str| names.contexts.iter().find(|context| context.name == name).map(|context| context.id);
        let ids = negotiated.contexts.iter();
        self.contexts =
            ids.filter_map(|context| Some(ContextId { wire: context.id, told: told(&context.name)? })).collect();
        self.wanted = self.shortest();
        self.parked = 0;
        self.open = None;
        self.pending.retain(|_, pending| !abandoned(&pending.token));
        self.streams = self.pending.values().filter(|pending| pending.streamed).count();
        let mut cookies: Vec<u64> = self.pending.keys().copied().collect();
        cookies.sort_unstable();
        let mut requests = Vec::with_capacity(cookies.len());
        for cookie in cookies {
            let Some(pending) = self.pending.get_mut(&cookie) else { continue };
            (pending.assembly, pending.refusal, pending.parked) = (None, None, false);
            pending.status.clear();
            let Some(operation) = pending.operation.clone() else { continue };
            let (request, payload) = self.encode(&operation, cookie);
            requests.push((request.encode_as(self.framing), payload));
        }
        requests
    }

    /// Whether every request without an answer was refused because the server shuts down, and there is one.
    pub fn all_parked(&self) -> bool {
        self.parked > 0 && self.parked == self.pending.len()
    }

    fn encode(&self, operation: &Operation, cookie: u64) -> (Request, Bytes) {
        let wire = |told: &u32| self.contexts.iter().find(|id| id.told == *told).map(|id| id.wire);
        operation.encode(cookie, self.framing, wire)
    }

    /// The request that ends the connection; it has no reply.
    pub fn disconnect(&self) -> RequestHead {
        let none = CommandFlags::NONE;
        Request { flags: none, command: Command::DISC, cookie: 0, offset: 0, length: 0 }.encode_as(self.framing)
    }

    /// Requests without an answer.
    pub fn in_flight(&self) -> usize {
        self.pending.len()
    }

    /// Gives up every request without an answer.
    pub fn fail_all(&mut self) -> impl Iterator<Item = T> + '_ {
        (self.open, self.streams) = (None, 0);
        self.pending.drain().map(|(_, pending)| pending.token)
    }

    /// Bytes that the buffer has to hold in all before the message at its front can be taken.
    pub fn wanted(&self) -> usize {
        self.wanted
    }

    /// The content that comes now, after [`Session::receive`] has stopped for it: it goes on when all of it was
    /// [`Session::taken`] from the stream, `input` first.
    pub fn payload(&mut self) -> Option<Payload<'_, T>> {
        let Open { cookie, offset, left, zeroes, .. } = self.open.filter(|open| open.left > 0)?;
        let pending = self.pending.get_mut(&cookie)?;
        Some(Payload { token: &mut pending.token, offset, length: left, zeroes })
    }

    /// Takes note that `length` bytes of the [`Session::payload`] went where they belong: not more than it has.
    pub fn taken(&mut self, length: u32) {
        if let Some(open) = &mut self.open {
            open.offset += u64::from(length);
            open.left = open.left.saturating_sub(length);
        }
    }

    /// Whether a [`Operation::Stream`] is in flight: who receives no more than [`Session::wanted`] leaves its content to
    /// be taken from the stream itself.
    pub fn has_streams(&self) -> bool {
        self.streams > 0
    }

    /// Length of the shortest message, which every one begins with.
    fn shortest(&self) -> usize {
        if self.framing == Framing::Extended { ExtendedChunkHeader::LENGTH } else { SimpleReply::LENGTH }
    }

    /// Takes messages from the front of `input` up to the next completion; `None` when more bytes are needed, or the
    /// [`Session::payload`] has to be taken first.
    ///
    /// # Errors
    /// [`ProtocolError`]: hang up.
    pub fn receive(&mut self, input: &mut BytesMut) -> Result<Option<Completion<T>>, ProtocolError> {
        loop {
            self.wanted = self.shortest();
            match self.open {
                Some(open) if open.left > 0 => return Ok(None),
                Some(open) => {
                    self.open = None;
                    if open.last
                        && let Some(completion) = self.done(open.cookie)?
                    {
                        return Ok(Some(completion));
                    }
                }
                None => {}
            }
            if input.len() < self.wanted {
                return Ok(None);
            }
            let (header, length) = match u32::from_be_bytes([input[0], input[1], input[2], input[3]]) {
                SIMPLE_REPLY_MAGIC if self.framing != Framing::Extended => match self.simple(input)? {
                    Simple::Completed(completion) => return Ok(Some(completion)),
                    Simple::Parked | Simple::Opened => continue,
                    Simple::NeedMore => return Ok(None),
                },
                CHUNK_MAGIC if self.framing == Framing::Structured => match ChunkHeader::decode(input) {
                    Ok(header) => (header, ChunkHeader::LENGTH),
                    Err(WireError::NotEnough { .. }) => {
                        self.wanted = ChunkHeader::LENGTH;
                        return Ok(None);
                    }
                    Err(error) => return Err(error.into()),
                },
                EXTENDED_CHUNK_MAGIC if self.framing == Framing::Extended => {
                    (self.extended(ExtendedChunkHeader::decode(input)?)?, ExtendedChunkHeader::LENGTH)
                }
                found => {
                    let expected = match self.framing {
                        Framing::Simple => SIMPLE_REPLY_MAGIC,
                        Framing::Structured => CHUNK_MAGIC,
                        Framing::Extended => EXTENDED_CHUNK_MAGIC,
                    };
                    let (expected, found) = (expected.into(), found.into());
                    return Err(WireError::Magic { what: "a reply", expected, found }.into());
                }
            };
            self.check_chunk(&header)?;
            let streamed = header.kind == ChunkType::OFFSET_DATA && self.is_streamed(header.cookie);
            // Of content that is handed on, only the offset before it is looked at.
            self.wanted = length + if streamed { 8 } else { header.length as usize };
            if input.len() < self.wanted {
                return Ok(None);
            }
            input.advance(length);
            if streamed {
                self.open(&header, input.get_u64(), header.length - 8, false)?;
                continue;
            }
            let payload = input.split_to(header.length as usize);
            self.chunk(&header, payload)?;
            if self.open.is_some() {
                continue;
            }
            if header.flags.contains(ChunkFlags::DONE)
                && let Some(completion) = self.done(header.cookie)?
            {
                return Ok(Some(completion));
            }
        }
    }

    /// Checks what only an extended head has, and gives the rest.
    fn extended(&self, header: ExtendedChunkHeader) -> Result<ChunkHeader, ProtocolError> {
        let ExtendedChunkHeader { flags, kind, cookie, offset, length } = header;
        let broken = |what| ProtocolError::Broken { what, cookie };
        let pending = self.pending.get(&cookie).ok_or(broken("a reply to a request that is not in flight"))?;
        if offset != pending.offset {
            return Err(broken("a reply with the offset of another request"));
        }
        let length = u32::try_from(length).map_err(|_| broken("a chunk that is far too long"))?;
        Ok(ChunkHeader { flags, kind, cookie, length })
    }

    fn simple(&mut self, input: &mut BytesMut) -> Result<Simple<T>, ProtocolError> {
        let reply = SimpleReply::decode(input)?;
        let broken = |what| ProtocolError::Broken { what, cookie: reply.cookie };
        let pending = self.pending.get(&reply.cookie).filter(|pending| !pending.parked);
        let pending = pending.ok_or(broken("a reply to a request that is not in flight"))?;
        let with_data = pending.command == Command::READ;
        if self.framing.has_chunks() && (with_data || pending.command == Command::BLOCK_STATUS) {
            return Err(broken("a simple reply where a structured one is due"));
        }
        if pending.assembly.is_some() || pending.refusal.is_some() {
            return Err(broken("a simple reply in the middle of a structured one"));
        }
        if pending.streamed && reply.error == 0 {
            let (cookie, offset, left) = (reply.cookie, pending.offset, pending.length as u32);
            input.advance(SimpleReply::LENGTH);
            let (flags, kind) = (ChunkFlags::DONE, ChunkType::OFFSET_DATA);
            self.open(&ChunkHeader { flags, kind, cookie, length: left }, offset, left, false)?;
            return Ok(Simple::Opened);
        }
        let length = if with_data && reply.error == 0 { pending.length as usize } else { 0 };
        self.wanted = SimpleReply::LENGTH + length;
        if input.len() < self.wanted {
            return Ok(Simple::NeedMore);
        }
        input.advance(SimpleReply::LENGTH);
        let data = input.split_to(length).freeze();
        let result = match reply.error {
            0 if with_data => Ok(Reply::Data(data)),
            0 => Ok(Reply::Done),
            error => Err(Refusal { error: Errno(error), message: String::new(), offset: None }),
        };
        Ok(match self.complete(reply.cookie, result) {
            Some(completion) => Simple::Completed(completion),
            None => Simple::Parked,
        })
    }

    /// Refuses a chunk by its head, before its payload is buffered.
    fn check_chunk(&self, header: &ChunkHeader) -> Result<(), ProtocolError> {
        let broken = |what| Err(ProtocolError::Broken { what, cookie: header.cookie });
        let Some(pending) = self.pending.get(&header.cookie).filter(|pending| !pending.parked) else {
            return broken("a reply to a request that is not in flight");
        };
        let length = header.length;
        match header.kind {
            ChunkType::NONE if length != 0 => broken("an empty chunk with a payload"),
            ChunkType::NONE if !header.flags.contains(ChunkFlags::DONE) => {
                broken("an empty chunk that is not the last")
            }
            ChunkType::NONE => Ok(()),
            ChunkType::OFFSET_DATA | ChunkType::OFFSET_HOLE if pending.command != Command::READ => {
                broken("data for a request that is not a READ")
            }
            ChunkType::OFFSET_DATA if length <= 8 || u64::from(length - 8) > pending.length => {
                broken("a data chunk of a wrong length")
            }
            ChunkType::OFFSET_HOLE if length != 12 => broken("a hole chunk of a wrong length"),
            ChunkType::OFFSET_DATA | ChunkType::OFFSET_HOLE => Ok(()),
            ChunkType::BLOCK_STATUS_EXT if self.framing != Framing::Extended => {
                broken("extents of 64 bits without extended headers")
            }
            ChunkType::BLOCK_STATUS | ChunkType::BLOCK_STATUS_EXT if pending.command != Command::BLOCK_STATUS => {
                broken("extents for a request that is not a BLOCK_STATUS")
            }
            ChunkType::BLOCK_STATUS if length < 12 || length % 8 != 4 || length > MAX_STATUS_PAYLOAD => {
                broken("a chunk of extents of a wrong length")
            }
            ChunkType::BLOCK_STATUS_EXT if length < 24 || length % 16 != 8 || length > MAX_STATUS_PAYLOAD => {
                broken("a chunk of extents of a wrong length")
            }
            ChunkType::BLOCK_STATUS | ChunkType::BLOCK_STATUS_EXT => Ok(()),
            kind if kind.is_error() && (6..=MAX_ERROR_PAYLOAD).contains(&length) => Ok(()),
            kind if kind.is_error() => broken("an error chunk of a wrong length"),
            _ => broken("a chunk of an unknown type"),
        }
    }

    fn is_streamed(&self, cookie: u64) -> bool {
        self.pending.get(&cookie).is_some_and(|pending| pending.streamed)
    }

    /// Content to be handed on begins.
    fn open(&mut self, header: &ChunkHeader, offset: u64, left: u32, zeroes: bool) -> Result<(), ProtocolError> {
        let cookie = header.cookie;
        let Some(pending) = self.pending.get_mut(&cookie) else { return Ok(()) };
        let (from, length) = (pending.offset, pending.length as u32);
        let assembly = pending.assembly.get_or_insert_with(|| Assembly::new(from, length));
        assembly.elsewhere(offset, left).map_err(|what| ProtocolError::Broken { what, cookie })?;
        let last = header.flags.contains(ChunkFlags::DONE);
        self.open = Some(Open { cookie, offset, left, zeroes, last });
        Ok(())
    }

    fn chunk(&mut self, header: &ChunkHeader, mut payload: BytesMut) -> Result<(), ProtocolError> {
        let broken = |what| ProtocolError::Broken { what, cookie: header.cookie };
        let Some(pending) = self.pending.get_mut(&header.cookie) else { return Ok(()) };
        match header.kind {
            ChunkType::OFFSET_DATA | ChunkType::OFFSET_HOLE => {
                // A READ is never longer than 32 bits can say.
                let (from, length) = (pending.offset, pending.length as u32);
                if pending.single && pending.assembly.is_some() {
                    return Err(broken("a second chunk of content, where one was asked for"));
                }
                let offset = payload.get_u64();
                if pending.streamed {
                    return self.open(header, offset, payload.get_u32(), true);
                }
                let assembly = pending.assembly.get_or_insert_with(|| Assembly::new(from, length));
                let outcome = if header.kind == ChunkType::OFFSET_DATA {
                    assembly.data(offset, payload.freeze())
                } else {
                    assembly.hole(offset, payload.get_u32())
                };
                outcome.map_err(broken)?;
            }
            ChunkType::BLOCK_STATUS | ChunkType::BLOCK_STATUS_EXT => {
                let wire = payload.get_u32();
                let Some(ContextId { told: id, .. }) = self.contexts.iter().find(|id| id.wire == wire).copied() else {
                    return Err(broken("extents of a context that was not negotiated"));
                };
                if pending.status.iter().any(|known| known.id == id) {
                    return Err(broken("extents of a context twice"));
                }
                let wide = header.kind == ChunkType::BLOCK_STATUS_EXT;
                let extents = extents(&mut payload, pending.length, wide).map_err(broken)?;
                if pending.single && extents.len() > 1 {
                    return Err(broken("a second extent, where one was asked for"));
                }
                pending.status.push(ContextExtents { id, extents });
            }
            kind if kind.is_error() => {
                let chunk = ErrorChunk::decode(kind, &payload)?;
                if chunk.error.0 == 0 {
                    return Err(broken("an error chunk without an error"));
                }
                let ErrorChunk { error, message, offset } = chunk;
                pending.refusal.get_or_insert(Refusal { error, message, offset });
            }
            _ => {}
        }
        Ok(())
    }

    fn done(&mut self, cookie: u64) -> Result<Option<Completion<T>>, ProtocolError> {
        let broken = |what| ProtocolError::Broken { what, cookie };
        let pending = self.pending.get_mut(&cookie).ok_or(broken("a reply to a request that is not in flight"))?;
        let result = match (pending.refusal.take(), pending.command) {
            (Some(refusal), _) => Err(refusal),
            (None, Command::READ) => {
                let (offset, length) = (pending.offset, pending.length as u32);
                let assembly = pending.assembly.take().unwrap_or_else(|| Assembly::new(offset, length));
                let data = assembly.finish().map_err(broken)?;
                Ok(if pending.streamed { Reply::Done } else { Reply::Data(data) })
            }
            (None, Command::BLOCK_STATUS) if pending.status.is_empty() => {
                return Err(broken("a BLOCK_STATUS reply without extents"));
            }
            (None, Command::BLOCK_STATUS) => Ok(Reply::Status(std::mem::take(&mut pending.status))),
            (None, _) => Ok(Reply::Done),
        };
        Ok(self.complete(cookie, result))
    }

    /// Ends a request, unless it is to be sent again.
    fn complete(&mut self, cookie: u64, result: Result<Reply, Refusal>) -> Option<Completion<T>> {
        self.wanted = self.shortest();
        let shutting_down = matches!(&result, Err(refusal) if refusal.error == Errno::ESHUTDOWN);
        if shutting_down
            && let Some(pending) = self.pending.get_mut(&cookie)
            && pending.operation.is_some()
        {
            self.parked += usize::from(!pending.parked);
            pending.parked = true;
            return None;
        }
        let pending = self.pending.remove(&cookie)?;
        self.streams -= usize::from(pending.streamed);
        self.parked -= usize::from(pending.parked);
        Some(Completion { token: pending.token, result })
    }
}

/// What came of a simple reply.
enum Simple<T> {
    NeedMore,
    /// Content is to be handed on first.
    Opened,
    Completed(Completion<T>),
    Parked,
}

/// Decodes extents, behind the context's id. Only the last may reach beyond the request; it is cut there.
fn extents(payload: &mut BytesMut, length: u64, wide: bool) -> Result<Vec<Extent>, &'static str> {
    let mut left = length;
    let each = if wide { 16 } else { 8 };
    if wide {
        let told = payload.get_u32() as usize;
        if told != 0 && told != payload.len() / each {
            return Err("a wrong number of extents");
        }
    }
    let mut extents = Vec::with_capacity(payload.len() / each);
    while payload.len() >= each {
        let (size, flags) = match wide {
            true => (payload.get_u64(), payload.get_u64()),
            false => (payload.get_u32().into(), payload.get_u32().into()),
        };
        if size == 0 {
            return Err("an extent without length");
        }
        if left == 0 {
            return Err("extents beyond what was asked");
        }
        let covered = size.min(left);
        left -= covered;
        extents.push(Extent { length: covered, flags });
    }
    Ok(extents)
}

#[cfg(test)]
#[path = "session_tests.rs"]
mod tests;
