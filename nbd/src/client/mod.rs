//! The client's tokio driver.
//!
//! A [`Client`] is a handle to one connection, cheap to clone; its task (`driver`) sends what all handles ask for and
//! hands out the replies, in whatever order they come. Requests that the server would find too long are split here,
//! those that it cannot take are refused before they are sent.

mod connect;
mod driver;
mod error;

use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use futures::{StreamExt, TryStreamExt, stream};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::{mpsc, oneshot};

use self::connect::outcome;
use self::driver::{Driver, Fate, Message};
use crate::export::Extent;
use crate::limits::{CLIENT_LONGEST_PIECE, CLIENT_PIECES_IN_FLIGHT, CLIENT_QUEUE, MAX_PAYLOAD};
use crate::proto::client::{Goal, Operation, Outcome, Plan, Reply, Session};
use crate::uri::NbdUri;
use crate::wire::{Command, TransmissionFlags};

pub use self::connect::{ConnectOptions, describe, list, negotiate};
pub use self::error::ClientError;
/// What was negotiated for a connection.
pub use crate::proto::client::Negotiated as ClientInfo;

impl ClientInfo {
    /// Whether the export refuses changes.
    pub fn read_only(&self) -> bool {
        self.flags.contains(TransmissionFlags::READ_ONLY)
    }

    /// Whether a flush on one connection covers what was answered on all others, so that several can be used.
    pub fn can_multi_conn(&self) -> bool {
        self.flags.contains(TransmissionFlags::CAN_MULTI_CONN)
    }

    /// Longest READ or WRITE that is sent as one request, in bytes: a multiple of the minimum block.
    pub fn longest_request(&self) -> u32 {
        let longest = self.maximum_block.min(MAX_PAYLOAD);
        longest - longest % self.minimum_block
    }
}

/// A handle to a connection in the transmission phase.
///
/// The connection ends with [`Client::close`], or in an orderly way when the last handle is dropped. Dropping the future
/// of a request does not take the request back.
#[derive(Clone)]
pub struct Client {
    info: Arc<ClientInfo>,
    messages: mpsc::Sender<Message>,
    fate: Arc<Fate>,
}

impl Client {
    /// Connects to a server and enters the transmission phase of an export.
    ///
    /// # Errors
    /// [`ClientError`]: nobody there, not an NBD server, no such export, TLS asked for, or out of time.
    pub async fn connect(uri: &NbdUri, options: &ConnectOptions) -> Result<Client, ClientError> {
        if uri.tls {
            return Err(ClientError::Tls);
        }
        let stream = connect::connect(&uri.address, options.time).await?;
        Client::handshake(stream, &uri.export, options).await
    }

    /// Enters the transmission phase of an export over a stream on which the server has sent nothing that was read.
    /// The connection's task is spawned on the current runtime.
    ///
    /// # Errors
    /// [`ClientError`]: the stream failed, not an NBD server, no such export, or out of time.
    pub async fn handshake<S>(mut stream: S, export: &str, options: &ConnectOptions) -> Result<Client, ClientError>
    where
        S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
    {
        let plan = Plan {
            goal: Goal::Transmission,
            export: export.to_owned(),
            structured: options.structured || !options.contexts.is_empty(),
            contexts: options.contexts.clone(),
        };
        let Outcome::Export(info) = outcome(&mut stream, plan, options.time).await? else {
            return Err(ClientError::Closed { reason: "the handshake came to a list instead of an export".into() });
        };
        let (sender, receiver) = mpsc::channel(CLIENT_QUEUE);
        let fate = Arc::new(Fate::default());
        tokio::spawn(Driver::new(stream, Session::new(&info), receiver, fate.clone()).run());
        Ok(Client { info: Arc::new(info), messages: sender, fate })
    }

    /// What was negotiated.
    pub fn info(&self) -> &ClientInfo {
        &self.info
    }

    /// Reads `length` bytes. The result shares memory with the receive buffer where the server sent it in one piece:
    /// copy what is to be kept for long.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn read(&self, offset: u64, length: usize) -> Result<Bytes, ClientError> {
        self.check(Command::READ, offset, length as u64)?;
        if length == 0 {
            return Ok(Bytes::new());
        }
        let longest = self.info.longest_request();
        if length <= longest as usize {
            return self.read_piece(offset, length as u32).await;
        }
        let mut whole = BytesMut::with_capacity(length);
        let mut replies = stream::iter(pieces(offset, length as u64, longest))
            .map(|(offset, length)| self.read_piece(offset, length))
            .buffered(CLIENT_PIECES_IN_FLIGHT);
        while let Some(piece) = replies.try_next().await? {
            whole.extend_from_slice(&piece);
        }
        Ok(whole.freeze())
    }

    async fn read_piece(&self, offset: u64, length: u32) -> Result<Bytes, ClientError> {
        match self.request(Operation::Read { offset, length }).await? {
            Reply::Data(data) => Ok(data),
            _ => Err(self.fate.error()),
        }
    }

    /// Writes bytes; with `fua` they are durable when this returns.
    ///
    /// # Errors
    /// [`ClientError`]; after an error, any part may have been written.
    pub async fn write(&self, offset: u64, data: Bytes, fua: bool) -> Result<(), ClientError> {
        self.check_change(Command::WRITE, offset, data.len() as u64)?;
        let longest = self.info.longest_request();
        let after = fua && !self.has(TransmissionFlags::SEND_FUA);
        if !data.is_empty() && data.len() <= longest as usize {
            self.request(Operation::Write { offset, data, fua: fua && !after }).await?;
        } else {
            self.each(pieces(offset, data.len() as u64, longest), |at, length| {
                let start = (at - offset) as usize;
                let data = data.slice(start..start + length as usize);
                Operation::Write { offset: at, data, fua: fua && !after }
            })
            .await?;
        }
        self.flush_if(after).await
    }

    /// Makes everything that was answered durable: on this connection, and with [`ClientInfo::can_multi_conn`] on all.
    /// Without the server's FLUSH there is nothing to wait for, and this succeeds.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn flush(&self) -> Result<(), ClientError> {
        if !self.has(TransmissionFlags::SEND_FLUSH) {
            return if self.fate.closed.is_cancelled() { Err(self.fate.error()) } else { Ok(()) };
        }
        self.request(Operation::Flush).await.map(drop)
    }

    /// Gives up the content of a range.
    ///
    /// # Errors
    /// [`ClientError`], also where the server has no TRIM.
    pub async fn trim(&self, offset: u64, length: u64, fua: bool) -> Result<(), ClientError> {
        self.check_change(Command::TRIM, offset, length)?;
        self.need(TransmissionFlags::SEND_TRIM, Command::TRIM, offset, length)?;
        let after = fua && !self.has(TransmissionFlags::SEND_FUA);
        let fua = fua && !after;
        let trim = |offset, length| Operation::Trim { offset, length, fua };
        self.each(pieces(offset, length, CLIENT_LONGEST_PIECE), trim).await?;
        self.flush_if(after).await
    }

    /// Makes a range read as zeroes; with `no_hole` it stays allocated.
    ///
    /// # Errors
    /// [`ClientError`], also where the server has no WRITE_ZEROES.
    pub async fn write_zeroes(&self, offset: u64, length: u64, no_hole: bool, fua: bool) -> Result<(), ClientError> {
        self.check_change(Command::WRITE_ZEROES, offset, length)?;
        self.need(TransmissionFlags::SEND_WRITE_ZEROES, Command::WRITE_ZEROES, offset, length)?;
        let after = fua && !self.has(TransmissionFlags::SEND_FUA);
        let fua = fua && !after;
        let zero = |offset, length| Operation::WriteZeroes { offset, length, no_hole, fua };
        self.each(pieces(offset, length, CLIENT_LONGEST_PIECE), zero).await?;
        self.flush_if(after).await
    }

    /// Asks the server to prefetch a range.
    ///
    /// # Errors
    /// [`ClientError`], also where the server has no CACHE.
    pub async fn cache(&self, offset: u64, length: u64) -> Result<(), ClientError> {
        self.check(Command::CACHE, offset, length)?;
        self.need(TransmissionFlags::SEND_CACHE, Command::CACHE, offset, length)?;
        let cache = |offset, length| Operation::Cache { offset, length };
        self.each(pieces(offset, length, self.info.longest_request()), cache).await
    }

    /// The extents of a meta context from `offset` on. The answer has at least one extent and goes no further than
    /// `length`, but it may end before.
    ///
    /// # Errors
    /// [`ClientError`], also where the context was not granted.
    pub async fn block_status(&self, context: &str, offset: u64, length: u64) -> Result<Vec<Extent>, ClientError> {
        let known = self.info.contexts.iter().find(|known| known.name == context);
        let id = known.ok_or_else(|| ClientError::NoContext(context.to_owned()))?.id;
        self.check(Command::BLOCK_STATUS, offset, length)?;
        if length == 0 {
            return Err(impossible(Command::BLOCK_STATUS, offset, length, "there is no status of an empty range"));
        }
        let length = length.min(CLIENT_LONGEST_PIECE.into()) as u32;
        let found = match self.request(Operation::BlockStatus { offset, length }).await? {
            Reply::Status(contexts) => contexts.into_iter().find(|found| found.id == id),
            _ => None,
        };
        found.map(|found| found.extents).ok_or_else(|| ClientError::NoContext(context.to_owned()))
    }

    /// Ends the connection when all requests have been answered, or after
    /// [`CLIENT_CLOSE_TIME`](crate::limits::CLIENT_CLOSE_TIME): then what is left fails. Later requests fail.
    pub async fn close(&self) {
        self.fate.leaving.cancel();
        tokio::select! {
            // If the task is gone, so is the connection.
            _ = self.messages.send(Message::Close) => {}
            () = self.fate.closed.cancelled() => {}
        }
        self.fate.closed.cancelled().await;
    }

    /// Waits until the connection has ended, and says why.
    pub async fn closed(&self) -> ClientError {
        self.fate.closed.cancelled().await;
        self.fate.error()
    }

    /// Whether the connection has ended.
    pub fn is_closed(&self) -> bool {
        self.fate.closed.is_cancelled()
    }

    fn has(&self, flag: TransmissionFlags) -> bool {
        self.info.flags.contains(flag)
    }

    async fn flush_if(&self, condition: bool) -> Result<(), ClientError> {
        if condition { self.flush().await } else { Ok(()) }
    }

    fn need(&self, flag: TransmissionFlags, command: Command, offset: u64, length: u64) -> Result<(), ClientError> {
        if self.has(flag) { Ok(()) } else { Err(impossible(command, offset, length, "the server does not offer it")) }
    }

    fn check_change(&self, command: Command, offset: u64, length: u64) -> Result<(), ClientError> {
        self.check(command, offset, length)?;
        if self.info.read_only() {
            return Err(impossible(command, offset, length, "the export is read-only"));
        }
        Ok(())
    }

    fn check(&self, command: Command, offset: u64, length: u64) -> Result<(), ClientError> {
        if offset.checked_add(length).is_none_or(|end| end > self.info.size) {
            return Err(impossible(command, offset, length, "it reaches beyond the end of the export"));
        }
        let block = u64::from(self.info.minimum_block);
        if !offset.is_multiple_of(block) || !length.is_multiple_of(block) {
            return Err(impossible(command, offset, length, "it is not aligned to the server's minimum block size"));
        }
        Ok(())
    }

    /// Sends one request for each piece, a few at a time.
    async fn each(
        &self,
        pieces: impl Iterator<Item = (u64, u32)>,
        operation: impl Fn(u64, u32) -> Operation,
    ) -> Result<(), ClientError> {
        stream::iter(pieces)
            .map(|(offset, length)| self.request(operation(offset, length)))
            .buffer_unordered(CLIENT_PIECES_IN_FLIGHT)
            .try_for_each(|_| std::future::ready(Ok(())))
            .await
    }

    async fn request(&self, operation: Operation) -> Result<Reply, ClientError> {
        let request = operation.request(0);
        let (sender, receiver) = oneshot::channel();
        let sent = self.messages.send(Message::Request(operation, sender)).await;
        if sent.is_err() {
            return Err(self.fate.error());
        }
        match receiver.await {
            Ok(Ok(Ok(reply))) => Ok(reply),
            Ok(Ok(Err(refusal))) => Err(ClientError::Refused {
                command: request.command,
                offset: request.offset,
                length: request.length.into(),
                error: refusal.error,
                message: refusal.message,
            }),
            Ok(Err(error)) => Err(error),
            Err(_) => Err(self.fate.error()),
        }
    }
}

fn impossible(command: Command, offset: u64, length: u64, why: &'static str) -> ClientError {
    ClientError::Impossible { command, offset, length, why }
}

/// Cuts a range into pieces of at most `longest` bytes.
fn pieces(offset: u64, length: u64, longest: u32) -> impl Iterator<Item = (u64, u32)> {
    let end = offset + length;
    (offset..end).step_by(longest as usize).map(move |at| (at, (end - at).min(longest.into()) as u32))
}
