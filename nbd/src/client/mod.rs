//! The client's tokio driver.
//!
//! A [`Client`] is a handle to one connection, cheap to clone; its task (`driver`) sends what all handles ask for and
//! hands out the replies, in whatever order they come. Requests that the server would find too long are split here,
//! those that it cannot take are refused before they are sent.

mod connect;
mod driver;
mod error;
mod reconnect;
mod sink;

use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use futures::{StreamExt, TryStreamExt, stream};
use tokio::sync::mpsc::error::TrySendError;
use tokio::sync::{mpsc, oneshot};

use self::driver::{Driver, Ending, Fate, Message, Waiter};
use self::reconnect::{Dial, Redial};
use crate::export::{Extent, ZeroMode};
use crate::limits::{CLIENT_LONGEST_PIECE, CLIENT_PIECES_IN_FLIGHT, CLIENT_QUEUE, MAX_PAYLOAD};
use crate::proto::client::{Operation, Refusal, Reply, Session};
use crate::tls::MaybeTls;
use crate::transport::Transport;
use crate::uri::NbdUri;
use crate::wire::{Command, Framing, TransmissionFlags};

pub use self::connect::{ConnectOptions, Greeted, describe, list, list_contexts, negotiate};
pub use self::error::ClientError;
pub use self::reconnect::Reconnect;
pub use self::sink::Sink;
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
    gives_pages: bool,
}

impl Client {
    /// Connects to a server and enters the transmission phase of an export.
    ///
    /// # Errors
    /// [`ClientError`]: nobody there, not an NBD server, no such export, TLS asked for by one side and not by the other,
    /// certificates that do not fit, or out of time. The first connection is tried once, also where
    /// [`ConnectOptions::reconnect`] is set.
    pub async fn connect(uri: &NbdUri, options: &ConnectOptions) -> Result<Client, ClientError> {
        let options = &options.for_uri(uri)?;
        let (address, time) = (uri.address.clone(), options.time);
        let dial = move || {
            let address = address.clone();
            async move { connect::connect(&address, time).await }
        };
        Client::dialled(dial, &uri.export, options).await
    }

    /// Enters the transmission phase of an export over what `dial` connects to, which is called again to reconnect.
    ///
    /// # Errors
    /// [`ClientError`]: no connection, not an NBD server, no such export, or out of time.
    pub async fn dialled<S, D, F>(mut dial: D, export: &str, options: &ConnectOptions) -> Result<Client, ClientError>
    where
        S: Transport + 'static,
        D: FnMut() -> F + Send + 'static,
        F: Future<Output = Result<S, ClientError>> + Send + 'static,
    {
        let (name, wishes) = (export.to_owned(), options.clone());
        let mut dial: Dial<MaybeTls<S>> = Box::new(move || {
            let (dialling, name, wishes) = (dial(), name.clone(), wishes.clone());
            Box::pin(async move {
                let stream = dialling.await?;
                connect::enter(stream, &name, &wishes).await
            })
        });
        let (stream, info) = dial().await?;
        let redial = options.reconnect.clone().map(|policy| Redial { dial, policy, first: info.clone() });
        Ok(Client::start(stream, info, redial))
    }

    /// Enters the transmission phase of an export over a stream on which the server has sent nothing that was read.
    /// The connection's task is spawned on the current runtime. There is nowhere to reconnect to.
    ///
    /// # Errors
    /// [`ClientError`]: the stream failed, not an NBD server, no such export, or out of time.
    pub async fn handshake<S>(stream: S, export: &str, options: &ConnectOptions) -> Result<Client, ClientError>
    where
        S: Transport + 'static,
    {
        let (stream, info) = connect::enter(stream, export, options).await?;
        Ok(Client::start(stream, info, None))
    }

    fn start<S>(stream: S, info: ClientInfo, redial: Option<Redial<S>>) -> Client
    where
        S: Transport + 'static,
    {
        let (sender, receiver) = mpsc::channel(CLIENT_QUEUE);
        let fate = Arc::new(Fate::default());
        let session = Session::new(&info);
        let session = if redial.is_some() { session.resending() } else { session };
        let gives_pages = stream.socket().is_some();
        tokio::spawn(Driver::new(stream, session, receiver, fate.clone(), redial).run());
        Client { info: Arc::new(info), messages: sender, fate, gives_pages }
    }

    /// Whether a [`Sink`] that takes pages will get most of its content in them: the stream is a socket, without TLS.
    pub fn gives_pages(&self) -> bool {
        self.gives_pages
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
            return self.read_piece(offset, length as u64).await;
        }
        let mut whole = BytesMut::with_capacity(length);
        let mut replies = stream::iter(pieces(offset, length as u64, longest.into()))
            .map(|(offset, length)| self.read_piece(offset, length))
            .buffered(CLIENT_PIECES_IN_FLIGHT);
        while let Some(piece) = replies.try_next().await? {
            whole.extend_from_slice(&piece);
        }
        Ok(whole.freeze())
    }

    /// Reads `length` bytes in one piece (NBD_CMD_FLAG_DF): the server looks at all of them at once, or refuses with
    /// EOVERFLOW where that is too much for it.
    ///
    /// # Errors
    /// [`ClientError`], also where the server has no such reads, or takes no request of that length.
    pub async fn read_whole(&self, offset: u64, length: u32) -> Result<Bytes, ClientError> {
        self.check(Command::READ, offset, length.into())?;
        self.need(TransmissionFlags::SEND_DF, Command::READ, offset, length.into())?;
        if length == 0 {
            return Ok(Bytes::new());
        }
        if length > self.info.longest_request() {
            return Err(impossible(Command::READ, offset, length.into(), "it is longer than one request may be"));
        }
        match self.request(Operation::Read { offset, length, whole: true }).await? {
            Reply::Data(data) => Ok(data),
            _ => Err(self.fate.error()),
        }
    }

    /// As [`Client::read`], for who has no task that waits: `then` is called with the result on the connection's own task,
    /// which it must not hold up. This returns at once. `then` is dropped where the runtime ends before the reply.
    pub fn read_then(
        &self,
        offset: u64,
        length: usize,
        then: impl FnOnce(Result<Bytes, ClientError>) + Send + 'static,
    ) {
        if let Err(error) = self.check(Command::READ, offset, length as u64) {
            return then(Err(error));
        }
        let one = u32::try_from(length).ok().filter(|length| *length > 0 && *length <= self.info.longest_request());
        let Some(length) = one else {
            let client = self.clone();
            tokio::spawn(async move { then(client.read(offset, length).await) });
            return;
        };
        let fate = self.fate.clone();
        let done = move |ending: Ending| {
            then(match ending {
                Ok(Ok(Reply::Data(data))) => Ok(data),
                Ok(Ok(_)) => Err(fate.error()),
                Ok(Err(refusal)) => Err(refused(Command::READ, offset, length.into(), refusal)),
                Err(error) => Err(error),
            });
        };
        self.queue(Operation::Read { offset, length, whole: false }, Waiter::Call(Box::new(done)));
    }

    /// Reads `length` bytes, which must be one request's at most ([`ClientInfo::longest_request`]), into a sink as they
    /// come. `then` is called when all of them have been given to it and it is dropped, or with why not; otherwise as
    /// [`Client::read_then`].
    pub fn read_to(
        &self,
        offset: u64,
        length: u32,
        sink: Box<dyn Sink>,
        then: impl FnOnce(Result<(), ClientError>) + Send + 'static,
    ) {
        if let Err(error) = self.check(Command::READ, offset, length.into()) {
            return then(Err(error));
        }
        if length == 0 || length > self.info.longest_request() {
            let why = "it is not the length of one request";
            return then(Err(impossible(Command::READ, offset, length.into(), why)));
        }
        let done = move |ending: Ending| {
            then(match ending {
                Ok(Ok(_)) => Ok(()),
                Ok(Err(refusal)) => Err(refused(Command::READ, offset, length.into(), refusal)),
                Err(error) => Err(error),
            });
        };
        self.queue(Operation::Stream { offset, length }, Waiter::Stream(sink, Box::new(done)));
    }

    /// Without waiting.
    fn queue(&self, operation: Operation, waiter: Waiter) {
        match self.messages.try_send(Message::Request(operation, waiter)) {
            Ok(()) => {}
            Err(TrySendError::Full(message)) => {
                let client = self.clone();
                tokio::spawn(async move {
                    if let Err(mpsc::error::SendError(message)) = client.messages.send(message).await {
                        message.fail(&client.fate);
                    }
                });
            }
            Err(TrySendError::Closed(message)) => message.fail(&self.fate),
        }
    }

    /// `length` is one request's at most.
    async fn read_piece(&self, offset: u64, length: u64) -> Result<Bytes, ClientError> {
        let length = length as u32;
        match self.request(Operation::Read { offset, length, whole: false }).await? {
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
            self.each(pieces(offset, data.len() as u64, longest.into()), |at, length| {
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
        self.each(pieces(offset, length, self.longest_range()), trim).await?;
        self.flush_if(after).await
    }

    /// Makes a range read as zeroes, as `mode` says.
    ///
    /// # Errors
    /// [`ClientError`], also where the server has no WRITE_ZEROES, or no FAST_ZERO and `mode` asks for it. Where zeroing
    /// would not be fast, the server refuses [`ZeroMode::fast`] with ENOTSUP.
    pub async fn write_zeroes(&self, offset: u64, length: u64, mode: ZeroMode, fua: bool) -> Result<(), ClientError> {
        self.check_change(Command::WRITE_ZEROES, offset, length)?;
        self.need(TransmissionFlags::SEND_WRITE_ZEROES, Command::WRITE_ZEROES, offset, length)?;
        if mode.fast {
            self.need(TransmissionFlags::SEND_FAST_ZERO, Command::WRITE_ZEROES, offset, length)?;
        }
        let after = fua && !self.has(TransmissionFlags::SEND_FUA);
        let fua = fua && !after;
        let zero = |offset, length| Operation::WriteZeroes { offset, length, mode, fua };
        self.each(pieces(offset, length, self.longest_range()), zero).await?;
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
        // Without 64-bit lengths, the server may be one that fetches what it is asked for into one buffer.
        let extended = self.info.framing == Framing::Extended;
        let longest = if extended { u64::MAX } else { self.info.longest_request().into() };
        self.each(pieces(offset, length, longest), cache).await
    }

    /// The extents of a meta context from `offset` on. The answer has at least one extent and goes no further than
    /// `length`, but it may end before.
    ///
    /// # Errors
    /// [`ClientError`], also where the context was not granted.
    pub async fn block_status(&self, context: &str, offset: u64, length: u64) -> Result<Vec<Extent>, ClientError> {
        self.status(context, offset, length, false).await
    }

    /// The extent of a meta context that begins at `offset`, as far as `length` at most (NBD_CMD_FLAG_REQ_ONE).
    ///
    /// # Errors
    /// [`ClientError`], also where the context was not granted.
    pub async fn block_status_one(&self, context: &str, offset: u64, length: u64) -> Result<Extent, ClientError> {
        let extents = self.status(context, offset, length, true).await?;
        extents.first().copied().ok_or_else(|| ClientError::NoContext(context.to_owned()))
    }

    async fn status(&self, context: &str, offset: u64, length: u64, one: bool) -> Result<Vec<Extent>, ClientError> {
        let known = self.info.contexts.iter().find(|known| known.name == context);
        let id = known.ok_or_else(|| ClientError::NoContext(context.to_owned()))?.id;
        self.check(Command::BLOCK_STATUS, offset, length)?;
        if length == 0 {
            return Err(impossible(Command::BLOCK_STATUS, offset, length, "there is no status of an empty range"));
        }
        let length = length.min(self.longest_range());
        let one_of_many = self.info.contexts.len() > 1 && self.has(TransmissionFlags::BLOCK_STATUS_PAYLOAD);
        let contexts = if one_of_many { vec![id] } else { Vec::new() };
        let found = match self.request(Operation::BlockStatus { offset, length, contexts, one }).await? {
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

    /// Longest TRIM, WRITE_ZEROES or BLOCK_STATUS that is sent as one request, in bytes.
    fn longest_range(&self) -> u64 {
        if self.info.framing == Framing::Extended { u64::MAX } else { CLIENT_LONGEST_PIECE }
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
        pieces: impl Iterator<Item = (u64, u64)>,
        operation: impl Fn(u64, u64) -> Operation,
    ) -> Result<(), ClientError> {
        stream::iter(pieces)
            .map(|(offset, length)| self.request(operation(offset, length)))
            .buffer_unordered(CLIENT_PIECES_IN_FLIGHT)
            .try_for_each(|_| std::future::ready(Ok(())))
            .await
    }

    async fn request(&self, operation: Operation) -> Result<Reply, ClientError> {
        let ((command, offset), length) = (operation.place(), operation.length());
        let (sender, receiver) = oneshot::channel();
        let sent = self.messages.send(Message::Request(operation, Waiter::Future(sender))).await;
        if sent.is_err() {
            return Err(self.fate.error());
        }
        match receiver.await {
            Ok(Ok(Ok(reply))) => Ok(reply),
            Ok(Ok(Err(refusal))) => Err(refused(command, offset, length, refusal)),
            Ok(Err(error)) => Err(error),
            Err(_) => Err(self.fate.error()),
        }
    }
}

fn refused(command: Command, offset: u64, length: u64, refusal: Refusal) -> ClientError {
    let Refusal { error, message, offset: at } = refusal;
    ClientError::Refused { command, offset, length, error, message, at }
}

fn impossible(command: Command, offset: u64, length: u64, why: &'static str) -> ClientError {
    ClientError::Impossible { command, offset, length, why }
}

/// Cuts a range into pieces of at most `longest` bytes.
fn pieces(offset: u64, length: u64, longest: u64) -> impl Iterator<Item = (u64, u64)> {
    let end = offset + length;
    let mut at = offset;
    std::iter::from_fn(move || {
        let piece = (at, (end - at).min(longest));
        at += piece.1;
        (piece.1 > 0).then_some(piece)
    })
}
