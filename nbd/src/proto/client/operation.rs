//! What a client asks of a server, and how it stands on the wire.

use bytes::Bytes;

use crate::export::ZeroMode;
use crate::wire::{Command, CommandFlags, Framing, Request, StatusQuery};

/// One request. Ranges and payloads must already be within the server's limits, and lengths within 32 bits unless
/// extended headers were negotiated.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Operation {
    /// Read bytes.
    Read {
        /// Offset in bytes.
        offset: u64,
        /// Length in bytes.
        length: u32,
        /// In one chunk or not at all (NBD_CMD_FLAG_DF). Needs a server that offers it.
        whole: bool,
    },
    /// Read bytes that are not put together, but handed on as they come: see [`super::Session::payload`].
    Stream {
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
        length: u64,
        /// Durable before the reply.
        fua: bool,
    },
    /// Make a range read as zeroes.
    WriteZeroes {
        /// Offset in bytes.
        offset: u64,
        /// Length in bytes.
        length: u64,
        /// How.
        mode: ZeroMode,
        /// Durable before the reply.
        fua: bool,
    },
    /// Prefetch a range.
    Cache {
        /// Offset in bytes.
        offset: u64,
        /// Length in bytes.
        length: u64,
    },
    /// Describe a range in negotiated contexts.
    BlockStatus {
        /// Offset in bytes.
        offset: u64,
        /// Length in bytes.
        length: u64,
        /// Ids of the contexts to hear of; none for all. Needs a server that takes a payload here.
        contexts: Vec<u32>,
        /// Only the first extent of each context (NBD_CMD_FLAG_REQ_ONE).
        one: bool,
    },
}

impl Operation {
    /// Length of the range in bytes.
    pub fn length(&self) -> u64 {
        match self {
            Operation::Read { length, .. } | Operation::Stream { length, .. } => u64::from(*length),
            Operation::Write { data, .. } => data.len() as u64,
            Operation::Flush => 0,
            Operation::Trim { length, .. }
            | Operation::WriteZeroes { length, .. }
            | Operation::Cache { length, .. }
            | Operation::BlockStatus { length, .. } => *length,
        }
    }

    /// The command and the offset in bytes, for messages.
    pub fn place(&self) -> (Command, u64) {
        match self {
            Operation::Read { offset, .. } | Operation::Stream { offset, .. } => (Command::READ, *offset),
            Operation::Write { offset, .. } => (Command::WRITE, *offset),
            Operation::Flush => (Command::FLUSH, 0),
            Operation::Trim { offset, .. } => (Command::TRIM, *offset),
            Operation::WriteZeroes { offset, .. } => (Command::WRITE_ZEROES, *offset),
            Operation::Cache { offset, .. } => (Command::CACHE, *offset),
            Operation::BlockStatus { offset, .. } => (Command::BLOCK_STATUS, *offset),
        }
    }

    /// The head of the request and its payload, which is empty where there is none. `context` translates the ids of
    /// contexts.
    pub(super) fn encode(
        &self,
        cookie: u64,
        framing: Framing,
        context: impl Fn(&u32) -> Option<u32>,
    ) -> (Request, Bytes) {
        let (command, offset) = self.place();
        let mut length = self.length();
        let mut payload = Bytes::new();
        let none = CommandFlags::NONE;
        let flags = match self {
            Operation::Read { whole, .. } => none.with_if(CommandFlags::DF, *whole),
            Operation::Write { data, fua, .. } => {
                payload = data.clone();
                none.with_if(CommandFlags::FUA, *fua).with_if(CommandFlags::PAYLOAD_LEN, framing == Framing::Extended)
            }
            Operation::Trim { fua, .. } => none.with_if(CommandFlags::FUA, *fua),
            Operation::WriteZeroes { mode, fua, .. } => none
                .with_if(CommandFlags::FUA, *fua)
                .with_if(CommandFlags::NO_HOLE, mode.no_hole)
                .with_if(CommandFlags::FAST_ZERO, mode.fast),
            Operation::BlockStatus { contexts, one, .. } => {
                if !contexts.is_empty() {
                    payload = StatusQuery { length, contexts: contexts.iter().filter_map(context).collect() }.encode();
                    length = payload.len() as u64;
                }
                none.with_if(CommandFlags::REQ_ONE, *one).with_if(CommandFlags::PAYLOAD_LEN, !contexts.is_empty())
            }
            _ => none,
        };
        (Request { flags, command, cookie, offset, length }, payload)
    }
}
