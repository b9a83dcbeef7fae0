//! The client's transmission phase: operations out, completions in.

use std::collections::HashMap;

use bytes::{Buf, Bytes, BytesMut};

use super::Negotiated;
use super::assemble::Assembly;
use crate::export::Extent;
use crate::limits::{MAX_ERROR_PAYLOAD, MAX_STATUS_PAYLOAD};
use crate::wire::{
    CHUNK_MAGIC, ChunkFlags, ChunkHeader, ChunkType, Command, CommandFlags, Errno, ErrorChunk, Request,
    SIMPLE_REPLY_MAGIC, SimpleReply, WireError,
};

/// One request. Ranges and payloads must already be within the server's limits.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Operation {
    /// Read bytes.
    Read {
        /// Offset in bytes.
        offset: u64,
        /// Length in bytes.
        length: u32,
    },
    /// Write bytes.
    Write {
        /// Offset in bytes.
        offset: u64,
        /// What to write.
        data: Bytes,
        /// Durable before the reply.
        fua: bool,
    },
    /// Make everything that was answered durable.
    Flush,
    /// Give up the content of a range.
    Trim {
        /// Offset in bytes.
        offset: u64,
        /// Length in bytes.
        length: u32,
        /// Durable before the reply.
        fua: bool,
    },
    /// Make a range read as zeroes.
    WriteZeroes {
        /// Offset in bytes.
        offset: u64,
        /// Length in bytes.
        length: u32,
        /// Do not punch a hole.
        no_hole: bool,
        /// Durable before the reply.
        fua: bool,
    },
    /// Prefetch a range.
    Cache {
        /// Offset in bytes.
        offset: u64,
        /// Length in bytes.
        length: u32,
    },
    /// Describe a range in all negotiated contexts.
    BlockStatus {
        /// Offset in bytes.
        offset: u64,
        /// Length in bytes.
        length: u32,
    },
}

impl Operation {
    /// The head of the request.
    pub fn request(&self, cookie: u64) -> Request {
        let fua_if = |fua: bool| CommandFlags::NONE.with_if(CommandFlags::FUA, fua);
        let none = CommandFlags::NONE;
        let (command, flags, offset, length) = match self {
            Operation::Read { offset, length } => (Command::READ, none, *offset, *length),
            Operation::Write { offset, data, fua } => (Command::WRITE, fua_if(*fua), *offset, data.len() as u32),
            Operation::Flush => (Command::FLUSH, none, 0, 0),
            Operation::Trim { offset, length, fua } => (Command::TRIM, fua_if(*fua), *offset, *length),
            Operation::WriteZeroes { offset, length, no_hole, fua } => {
                (Command::WRITE_ZEROES, fua_if(*fua).with_if(CommandFlags::NO_HOLE, *no_hole), *offset, *length)
            }
            Operation::Cache { offset, length } => (Command::CACHE, none, *offset, *length),
            Operation::BlockStatus { offset, length } => (Command::BLOCK_STATUS, none, *offset, *length),
        };
        Request { flags, command, cookie, offset, length }
    }
}

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
}

/// A request that was answered.
#[derive(Debug, PartialEq, Eq)]
pub struct Completion<T> {
    /// What the caller gave with the operation.
    pub token: T,
    /// What it came to.
    pub result: Result<Reply, Refusal>,
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
    offset: u64,
    length: u32,
    assembly: Option<Assembly>,
    status: Vec<ContextExtents>,
    refusal: Option<Refusal>,
}

/// Matches replies to requests. `T` is what the caller wants back with a completion.
pub struct Session<T> {
    structured: bool,
    contexts: Vec<u32>,
    next_cookie: u64,
    pending: HashMap<u64, Pending<T>>,
    wanted: usize,
}

impl<T> Session<T> {
    /// A session at the start of the transmission phase.
    pub fn new(negotiated: &Negotiated) -> Session<T> {
        Session {
            structured: negotiated.structured,
            contexts: negotiated.contexts.iter().map(|context| context.id).collect(),
            next_cookie: 1,
            pending: HashMap::new(),
            wanted: SimpleReply::LENGTH,
        }
    }

    /// Registers an operation and returns the head to send; a write's payload has to follow it.
    pub fn submit(&mut self, operation: &Operation, token: T) -> [u8; Request::LENGTH] {
        let request = operation.request(self.next_cookie);
        self.next_cookie = self.next_cookie.wrapping_add(1);
        let pending = Pending {
            token,
            command: request.command,
            offset: request.offset,
            length: request.length,
            assembly: None,
            status: Vec::new(),
            refusal: None,
        };
        self.pending.insert(request.cookie, pending);
        request.encode()
    }

    /// The request that ends the connection; it has no reply.
    pub fn disconnect() -> [u8; Request::LENGTH] {
        let none = CommandFlags::NONE;
        Request { flags: none, command: Command::DISC, cookie: 0, offset: 0, length: 0 }.encode()
    }

    /// Requests without an answer.
    pub fn in_flight(&self) -> usize {
        self.pending.len()
    }

    /// Gives up every request without an answer.
    pub fn fail_all(&mut self) -> impl Iterator<Item = T> + '_ {
        self.pending.drain().map(|(_, pending)| pending.token)
    }

    /// Bytes that the buffer has to hold in all before the message at its front can be taken.
    pub fn wanted(&self) -> usize {
        self.wanted
    }

    /// Takes messages from the front of `input` up to the next completion; `None` when more bytes are needed.
    ///
    /// # Errors
    /// [`ProtocolError`]: hang up.
    pub fn receive(&mut self, input: &mut BytesMut) -> Result<Option<Completion<T>>, ProtocolError> {
        loop {
            self.wanted = SimpleReply::LENGTH;
            if input.len() < SimpleReply::LENGTH {
                return Ok(None);
            }
            match u32::from_be_bytes([input[0], input[1], input[2], input[3]]) {
                SIMPLE_REPLY_MAGIC => return self.simple(input),
                CHUNK_MAGIC if self.structured => {
                    let header = match ChunkHeader::decode(input) {
                        Ok(header) => header,
                        Err(WireError::NotEnough { .. }) => {
                            self.wanted = ChunkHeader::LENGTH;
                            return Ok(None);
                        }
                        Err(error) => return Err(error.into()),
                    };
                    self.check_chunk(&header)?;
                    self.wanted = ChunkHeader::LENGTH + header.length as usize;
                    if input.len() < self.wanted {
                        return Ok(None);
                    }
                    input.advance(ChunkHeader::LENGTH);
                    let payload = input.split_to(header.length as usize);
                    self.chunk(&header, payload)?;
                    if header.flags.contains(ChunkFlags::DONE) {
                        return self.done(header.cookie).map(Some);
                    }
                }
                found => {
                    let expected = if self.structured { CHUNK_MAGIC } else { SIMPLE_REPLY_MAGIC };
                    let (expected, found) = (expected.into(), found.into());
                    return Err(WireError::Magic { what: "a reply", expected, found }.into());
                }
            }
        }
    }

    fn simple(&mut self, input: &mut BytesMut) -> Result<Option<Completion<T>>, ProtocolError> {
        let reply = SimpleReply::decode(input)?;
        let broken = |what| ProtocolError::Broken { what, cookie: reply.cookie };
        let pending = self.pending.get(&reply.cookie).ok_or(broken("a reply to a request that was never sent"))?;
        let with_data = pending.command == Command::READ;
        if self.structured && (with_data || pending.command == Command::BLOCK_STATUS) {
            return Err(broken("a simple reply where a structured one is due"));
        }
        if pending.assembly.is_some() || pending.refusal.is_some() {
            return Err(broken("a simple reply in the middle of a structured one"));
        }
        let length = if with_data && reply.error == 0 { pending.length as usize } else { 0 };
        self.wanted = SimpleReply::LENGTH + length;
        if input.len() < self.wanted {
            return Ok(None);
        }
        input.advance(SimpleReply::LENGTH);
        let data = input.split_to(length).freeze();
        let Some(pending) = self.pending.remove(&reply.cookie) else { return Ok(None) };
        self.wanted = SimpleReply::LENGTH;
        let result = match reply.error {
            0 if with_data => Ok(Reply::Data(data)),
            0 => Ok(Reply::Done),
            error => Err(Refusal { error: Errno(error), message: String::new() }),
        };
        Ok(Some(Completion { token: pending.token, result }))
    }

    /// Refuses a chunk by its head, before its payload is buffered.
    fn check_chunk(&self, header: &ChunkHeader) -> Result<(), ProtocolError> {
        let broken = |what| Err(ProtocolError::Broken { what, cookie: header.cookie });
        let Some(pending) = self.pending.get(&header.cookie) else {
            return broken("a reply to a request that was never sent");
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
            ChunkType::OFFSET_DATA if length <= 8 || length - 8 > pending.length => {
                broken("a data chunk of a wrong length")
            }
            ChunkType::OFFSET_HOLE if length != 12 => broken("a hole chunk of a wrong length"),
            ChunkType::OFFSET_DATA | ChunkType::OFFSET_HOLE => Ok(()),
            ChunkType::BLOCK_STATUS if pending.command != Command::BLOCK_STATUS => {
                broken("extents for a request that is not a BLOCK_STATUS")
            }
            ChunkType::BLOCK_STATUS if length < 12 || length % 8 != 4 || length > MAX_STATUS_PAYLOAD => {
                broken("a chunk of extents of a wrong length")
            }
            ChunkType::BLOCK_STATUS => Ok(()),
            kind if kind.is_error() && (6..=MAX_ERROR_PAYLOAD).contains(&length) => Ok(()),
            kind if kind.is_error() => broken("an error chunk of a wrong length"),
            _ => broken("a chunk of an unknown type"),
        }
    }

    fn chunk(&mut self, header: &ChunkHeader, mut payload: BytesMut) -> Result<(), ProtocolError> {
        let broken = |what| ProtocolError::Broken { what, cookie: header.cookie };
        let Some(pending) = self.pending.get_mut(&header.cookie) else { return Ok(()) };
        match header.kind {
            ChunkType::OFFSET_DATA | ChunkType::OFFSET_HOLE => {
                let (from, length) = (pending.offset, pending.length);
                let assembly = pending.assembly.get_or_insert_with(|| Assembly::new(from, length));
                let offset = payload.get_u64();
                let outcome = if header.kind == ChunkType::OFFSET_DATA {
                    assembly.data(offset, payload.freeze())
                } else {
                    assembly.hole(offset, payload.get_u32())
                };
                outcome.map_err(broken)?;
            }
            ChunkType::BLOCK_STATUS => {
                let id = payload.get_u32();
                if !self.contexts.contains(&id) {
                    return Err(broken("extents of a context that was not negotiated"));
                }
                if pending.status.iter().any(|known| known.id == id) {
                    return Err(broken("extents of a context twice"));
                }
                let extents = extents(&mut payload, pending.length).map_err(broken)?;
                pending.status.push(ContextExtents { id, extents });
            }
            kind if kind.is_error() => {
                let chunk = ErrorChunk::decode(kind, &payload)?;
                if chunk.error.0 == 0 {
                    return Err(broken("an error chunk without an error"));
                }
                pending.refusal.get_or_insert(Refusal { error: chunk.error, message: chunk.message });
            }
            _ => {}
        }
        Ok(())
    }

    fn done(&mut self, cookie: u64) -> Result<Completion<T>, ProtocolError> {
        let broken = |what| ProtocolError::Broken { what, cookie };
        let pending = self.pending.remove(&cookie).ok_or(broken("a reply to a request that was never sent"))?;
        self.wanted = SimpleReply::LENGTH;
        let result = match (pending.refusal, pending.command) {
            (Some(refusal), _) => Err(refusal),
            (None, Command::READ) => {
                let assembly = pending.assembly.unwrap_or_else(|| Assembly::new(pending.offset, pending.length));
                Ok(Reply::Data(assembly.finish().map_err(broken)?))
            }
            (None, Command::BLOCK_STATUS) if pending.status.is_empty() => {
                return Err(broken("a BLOCK_STATUS reply without extents"));
            }
            (None, Command::BLOCK_STATUS) => Ok(Reply::Status(pending.status)),
            (None, _) => Ok(Reply::Done),
        };
        Ok(Completion { token: pending.token, result })
    }
}

/// Decodes extents. Only the last may reach beyond the request; it is cut there.
fn extents(payload: &mut BytesMut, length: u32) -> Result<Vec<Extent>, &'static str> {
    let mut left = length;
    let mut extents = Vec::with_capacity(payload.len() / 8);
    while payload.len() >= 8 {
        let (size, flags) = (payload.get_u32(), payload.get_u32());
        if size == 0 {
            return Err("an extent without length");
        }
        if left == 0 {
            return Err("extents beyond what was asked");
        }
        let covered = size.min(left);
        left -= covered;
        extents.push(Extent { length: covered.into(), flags: flags.into() });
    }
    Ok(extents)
}

#[cfg(test)]
#[path = "session_tests.rs"]
mod tests;
