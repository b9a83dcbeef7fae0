//! One connection in the transmission phase: one task, no locks, no channel.
//!
//! Each round takes all requests that a receive brought, lets the export answer them inline, and sends all replies at
//! once. A READ that is answered at once is made in the output buffer behind the space of its head; the head is filled in
//! when the read has succeeded. What comes later is a future in a set that the same task polls.
//!
//! Requests are taken while replies are waiting to be sent, so that a peer that writes without reading does not block
//! itself, but only up to the bounds of [`crate::limits`]; then the connection stops receiving until there is room.

use std::future::poll_fn;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use bytes::BytesMut;
use futures::StreamExt;
use futures::stream::FuturesUnordered;
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt};
use tokio::time::timeout;
use tokio_util::io::poll_read_buf;
use tokio_util::sync::CancellationToken;

use super::flight::{Done, InFlight, Status, Work, cost};
use super::{Draining, Ended, ServeOptions, ServerError};
use crate::export::{Answer, Export, ReadAnswer, ZeroMode};
use crate::limits::{
    KEPT_BUFFER, MAX_BYTES_IN_FLIGHT, MAX_REQUESTS_IN_FLIGHT, MAX_STATUS_EXTENTS, OUTPUT_HIGH_WATER, RECEIVE_SPACE,
};
use crate::output::Output;
use crate::proto::server::{Entered, Incoming, Requests, Rules, check, reply};
use crate::wire::{Command, CommandFlags, Errno, MetaContext, Request};

/// What a connection still does.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Phase {
    /// Everything.
    Serving,
    /// New requests are refused.
    Refusing,
    /// It no longer receives.
    Finishing,
}

pub(super) struct Connection<S> {
    stream: S,
    input: BytesMut,
    output: Output,
    requests: Requests,
    export: Arc<dyn Export>,
    rules: Rules,
    contexts: Vec<MetaContext>,
    in_flight: FuturesUnordered<InFlight>,
    bytes_in_flight: usize,
    phase: Phase,
    /// Set when the client has left.
    left: Option<Ended>,
    status_buffer: Vec<u8>,
    /// Tells the export when the client leaves.
    _guard: Box<dyn Send + Sync>,
}

impl<S: AsyncRead + AsyncWrite + Unpin + Send> Connection<S> {
    pub(super) fn new(stream: S, input: BytesMut, entered: Entered) -> Connection<S> {
        Connection {
            stream,
            input,
            output: Output::default(),
            requests: Requests::new(),
            rules: Rules {
                size: entered.info.size,
                read_only: entered.info.read_only,
                structured: entered.structured,
                contexts: !entered.contexts.is_empty(),
            },
            contexts: entered.contexts,
            in_flight: FuturesUnordered::new(),
            bytes_in_flight: 0,
            phase: Phase::Serving,
            left: None,
            status_buffer: Vec::new(),
            _guard: entered.export.clone().client_entered(),
            export: entered.export,
        }
    }

    pub(super) async fn run(
        mut self,
        options: &ServeOptions,
        shutdown: CancellationToken,
    ) -> Result<Ended, ServerError> {
        tokio::select! {
            biased;
            served = poll_fn(|cx| self.poll(cx)) => served?,
            () = shutdown.cancelled() => self.phase = match options.draining {
                Draining::Refuse => Phase::Refusing,
                Draining::HangUp => Phase::Finishing,
            },
        }
        let ended = self.left.unwrap_or(Ended::ShutDown);
        let finish = async {
            while !self.is_finished() {
                poll_fn(|cx| self.poll(cx)).await?;
            }
            self.stream.shutdown().await.map_err(ServerError::from)
        };
        match timeout(options.drain_time, finish).await {
            Ok(Err(error)) if ended == Ended::ShutDown => return Err(error),
            // A client that has left need not take its last replies.
            Ok(_) => {}
            Err(_) => tracing::info!(?ended, "requests in flight are given up: they took too long to end"),
        }
        Ok(ended)
    }

    fn is_finished(&self) -> bool {
        self.phase == Phase::Finishing && self.in_flight.is_empty() && self.output.is_empty()
    }

    /// Works until there is nothing to do (`Pending`), or until the connection's phase has changed or it is finished.
    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), ServerError>> {
        let phase = self.phase;
        loop {
            let more = if self.phase == Phase::Finishing { false } else { self.take_requests()? };
            while let Poll::Ready(Some((request, done))) = self.in_flight.poll_next_unpin(cx) {
                self.finish(&request, done);
            }
            let sent = self.output.poll_send(&mut self.stream, cx)?;
            if self.phase != phase || self.is_finished() {
                return Poll::Ready(Ok(()));
            }
            if more {
                if self.has_room() {
                    continue;
                }
                // Woken when a request in flight ends or the peer takes replies.
                return Poll::Pending;
            }
            if self.phase == Phase::Finishing {
                return Poll::Pending;
            }
            self.make_space();
            match poll_read_buf(Pin::new(&mut self.stream), cx, &mut self.input)? {
                Poll::Ready(0) => {
                    self.left = Some(Ended::Closed);
                    self.phase = Phase::Finishing;
                    return Poll::Ready(Ok(()));
                }
                Poll::Ready(_) => {}
                Poll::Pending => {
                    if self.phase == Phase::Refusing && self.in_flight.is_empty() && sent.is_ready() {
                        self.phase = Phase::Finishing;
                        return Poll::Ready(Ok(()));
                    }
                    return Poll::Pending;
                }
            }
        }
    }

    fn has_room(&self) -> bool {
        self.output.len() < OUTPUT_HIGH_WATER
            && self.in_flight.len() < MAX_REQUESTS_IN_FLIGHT
            && self.bytes_in_flight < MAX_BYTES_IN_FLIGHT
    }

    /// Space to receive what is missing of the next request, or many small ones.
    fn make_space(&mut self) {
        if self.input.is_empty() && self.input.capacity() > KEPT_BUFFER {
            self.input = BytesMut::new();
        }
        let missing = self.requests.wanted(&self.input).saturating_sub(self.input.len());
        let free = self.input.capacity() - self.input.len();
        if free < missing.max(RECEIVE_SPACE / 4) {
            self.input.reserve(missing.max(RECEIVE_SPACE));
        }
    }

    /// Answers or begins all requests that have arrived. `true` when it stopped for want of room.
    fn take_requests(&mut self) -> Result<bool, ServerError> {
        loop {
            if self.input.is_empty() {
                return Ok(false);
            }
            if !self.has_room() {
                return Ok(true);
            }
            let Some(incoming) = self.requests.next(&mut self.input)? else { return Ok(false) };
            if incoming.request.command == Command::DISC {
                self.left = Some(Ended::Disconnected);
                self.phase = Phase::Finishing;
                return Ok(false);
            }
            self.take(incoming);
        }
    }

    fn take(&mut self, incoming: Incoming) {
        let Incoming { request, payload } = incoming;
        let refused = match self.phase {
            Phase::Serving => check(&request, &self.rules).err(),
            _ => Some(Errno::ESHUTDOWN),
        };
        if let Some(error) = refused {
            return self.answer_error(&request, error);
        }
        let fua = request.flags.contains(CommandFlags::FUA);
        let (offset, length) = (request.offset, u64::from(request.length));
        let answer = match request.command {
            Command::READ => return self.read(&request),
            Command::FLUSH => self.export.flush(),
            Command::BLOCK_STATUS => return self.block_status(&request),
            // Nothing to do, but with FUA there is still nothing to wait for.
            _ if length == 0 => Answer::Now(Ok(())),
            Command::WRITE => self.export.write(offset, payload, fua),
            Command::TRIM => self.export.trim(offset, length, fua),
            Command::WRITE_ZEROES => {
                let mode = ZeroMode { no_hole: request.flags.contains(CommandFlags::NO_HOLE) };
                self.export.write_zeroes(offset, length, mode, fua)
            }
            Command::CACHE => self.export.cache(offset, length),
            // check() lets no other command through.
            _ => Answer::Now(Err(Errno::EINVAL)),
        };
        match answer {
            Answer::Now(result) => self.output.extend(&reply::finished(request.cookie, result)),
            Answer::Later(work) => self.begin(request, Work::Plain(work)),
        }
    }

    fn begin(&mut self, request: Request, work: Work) {
        self.bytes_in_flight += cost(&request);
        self.in_flight.push(InFlight { request, work });
    }

    fn read(&mut self, request: &Request) {
        let structured = self.rules.structured;
        let head = reply::read_head_length(structured, request.length);
        let total = head + request.length as usize;
        let space = self.output.reserve(total);
        let answer = match request.length {
            0 => ReadAnswer::Now(Ok(())),
            _ => self.export.read(request.offset, &mut space[head..]),
        };
        match answer {
            ReadAnswer::Now(Ok(())) => {
                let done = reply::read_done(structured, request.cookie, request.offset, request.length);
                space[..head].copy_from_slice(&done);
                self.output.commit(total);
            }
            ReadAnswer::Now(Err(error)) => self.answer_error(request, error),
            ReadAnswer::Later(work) => self.begin(*request, Work::Read(work)),
        }
    }

    fn block_status(&mut self, request: &Request) {
        let one = request.flags.contains(CommandFlags::REQ_ONE);
        let most = if one { 1 } else { MAX_STATUS_EXTENTS };
        let ask = |context: &MetaContext| {
            let length = request.length.into();
            (context.id, self.export.block_status(&context.name, request.offset, length, most))
        };
        let answers: Vec<_> = self.contexts.iter().map(ask).collect();
        if answers.iter().any(|(_, answer)| matches!(answer, Answer::Later(_))) {
            let work = Box::pin(async move {
                let mut status = Status::new();
                for (id, answer) in answers {
                    let extents = match answer {
                        Answer::Now(extents) => extents?,
                        Answer::Later(work) => work.await?,
                    };
                    status.push((id, extents));
                }
                Ok(status)
            });
            return self.begin(*request, Work::Status(work));
        }
        let mut status = Status::new();
        let mut outcome = Ok(());
        for (id, answer) in answers {
            match answer {
                Answer::Now(Ok(extents)) => status.push((id, extents)),
                Answer::Now(Err(error)) => outcome = Err(error),
                Answer::Later(_) => {}
            }
        }
        self.answer_status(request, outcome.map(|()| status));
    }

    fn finish(&mut self, request: &Request, done: Done) {
        self.bytes_in_flight -= cost(request);
        match done {
            Done::Plain(result) => self.output.extend(&reply::finished(request.cookie, result)),
            Done::Read(Ok(data)) if data.len() == request.length as usize => {
                let structured = self.rules.structured;
                self.output.extend(&reply::read_done(structured, request.cookie, request.offset, request.length));
                self.output.push(data);
            }
            Done::Read(Ok(data)) => {
                tracing::error!(
                    asked = request.length,
                    got = data.len(),
                    "an export answered a read of another length"
                );
                self.answer_error(request, Errno::EIO);
            }
            Done::Read(Err(error)) => self.answer_error(request, error),
            Done::Status(status) => self.answer_status(request, status),
        }
    }

    fn answer_status(&mut self, request: &Request, status: Result<Status, Errno>) {
        let one = request.flags.contains(CommandFlags::REQ_ONE);
        let encoded = status
            .and_then(|status| reply::status(request.cookie, request.length, one, &status, &mut self.status_buffer));
        match encoded {
            Ok(()) => self.output.extend(&self.status_buffer),
            Err(error) => self.answer_error(request, error),
        }
    }

    /// The negative answer to any request, in the form that its command and the negotiation ask for.
    fn answer_error(&mut self, request: &Request, error: Errno) {
        let head = match request.command {
            Command::READ | Command::BLOCK_STATUS => reply::failed(self.rules.structured, request.cookie, error),
            _ => reply::finished(request.cookie, Err(error)),
        };
        self.output.extend(&head);
    }
}
