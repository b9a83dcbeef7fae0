//! One connection in the transmission phase: one task, no locks, no channel.
//!
//! Each round takes all requests that a receive brought, lets the export answer them inline, and sends all replies at
//! once. A READ that is answered at once is made in the output buffer behind the space of its head; the head is filled in
//! when the read has succeeded. What comes later is a future in a set that the same task polls, or an answer that somebody
//! else puts into the connection's inbox ([`crate::promise`]).
//!
//! Requests are taken while replies are waiting to be sent, so that a peer that writes without reading does not block
//! itself, but only up to the bounds of [`crate::limits`]; then the connection stops receiving until there is room.

mod receive;

use std::future::poll_fn;
use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::task::{Context, Poll};

use bytes::{Bytes, BytesMut};
use futures::StreamExt;
use futures::stream::FuturesUnordered;
use tokio::io::AsyncWriteExt;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use super::budget::Share;
use super::client_end::ClientEnd;
use super::flight::{Done, InFlight, Status, Work, cost};
use super::patience::Patience;
use super::pieces::PiecedWrite;
use super::promised::Promised;
use super::splice::Pipe;
use super::{Draining, Ended, ServeOptions, ServerError};
use crate::export::{Answer, Export, LateRead, ReadAnswer, Spliced, ZeroMode};
use crate::limits::{
    MAX_BYTES_IN_FLIGHT, MAX_REQUESTS_IN_FLIGHT, MAX_STATUS_EXTENTS, OUTPUT_HIGH_WATER, SPLICE_READ_MIN,
    UNCOUNTED_BYTES,
};
use crate::output::Output;
use crate::proto::server::{Entered, Incoming, Requests, Rules, check, reply};
use crate::wire::{Command, CommandFlags, Errno, Framing, MetaContext, Request, StatusQuery};

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
    promised: Promised,
    bytes_in_flight: usize,
    share: Share,
    phase: Phase,
    /// Set when the client has left.
    left: Option<Ended>,
    status_buffer: Vec<u8>,
    /// Whether to look for the next request.
    patience: Patience,
    /// Requests taken since the last receive.
    taken: usize,
    /// The last request was such a WRITE, and the next one may be.
    long_before: bool,
    /// For large reads, as soon as there is one.
    pipe: Option<Pipe>,
    /// A long WRITE that is being received.
    pieced: Option<PiecedWrite>,
    /// For such, as soon as there is one that can use it.
    intake: Option<Pipe>,
    /// What pieces of writes are cut at: the preferred block.
    unit: u32,
    /// Tells the export when the client leaves.
    _guard: Box<dyn Send + Sync>,
}

impl<S: ClientEnd> Connection<S> {
    /// `own_thread`: that of its export, and no other one watches its stream.
    pub(super) fn new(stream: S, input: BytesMut, entered: Entered, share: Share, own_thread: bool) -> Connection<S> {
        Connection {
            stream,
            input,
            output: Output::default(),
            requests: Requests::new(entered.framing),
            rules: Rules {
                size: entered.info.size,
                read_only: entered.info.read_only,
                minimum_block: entered.info.minimum_block,
                fast_zero: entered.info.fast_zero,
                framing: entered.framing,
                contexts: !entered.contexts.is_empty(),
            },
            contexts: entered.contexts,
            in_flight: FuturesUnordered::new(),
            promised: Promised::by(entered.export.clone()),
            bytes_in_flight: 0,
            share,
            phase: Phase::Serving,
            left: None,
            status_buffer: Vec::new(),
            patience: Patience::new(own_thread),
            taken: 0,
            pipe: None,
            pieced: None,
            long_before: false,
            intake: None,
            unit: entered.info.preferred_block,
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
        self.phase == Phase::Finishing && self.waiting() == 0 && self.output.is_empty()
    }

    /// Works until there is nothing to do (`Pending`), or until the connection's phase has changed or it is finished.
    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), ServerError>> {
        let phase = self.phase;
        loop {
            let more = if self.phase == Phase::Finishing { false } else { self.take_requests(cx)? };
            while let Poll::Ready((request, done)) = self.poll_late(cx) {
                self.finish(&request, done);
                if self.output.has_elsewhere() {
                    // So that the pipe is free for the next one.
                    let _ = self.poll_send(cx)?;
                }
            }
            let sent = self.poll_send(cx)?;
            let (requests, bytes) = self.held();
            self.share.hold(requests, bytes);
            if self.phase != phase || self.is_finished() {
                return Poll::Ready(Ok(()));
            }
            if more {
                if self.has_room(cx) {
                    continue;
                }
                // Woken when a request in flight ends, the peer takes replies, or other connections give room.
                return Poll::Pending;
            }
            if self.phase == Phase::Finishing {
                return Poll::Pending;
            }
            let received = match self.pieced {
                None => self.poll_receive(cx)?,
                Some(_) => self.poll_piece(cx)?,
            };
            match received {
                Poll::Ready(0) => {
                    self.left = Some(Ended::Closed);
                    self.phase = Phase::Finishing;
                    return Poll::Ready(Ok(()));
                }
                Poll::Ready(_) => {}
                Poll::Pending => {
                    if self.phase == Phase::Refusing && self.waiting() == 0 && sent.is_ready() {
                        self.phase = Phase::Finishing;
                        return Poll::Ready(Ok(()));
                    }
                    return Poll::Pending;
                }
            }
        }
    }

    /// The next answer that was waited for.
    fn poll_late(&mut self, cx: &mut Context<'_>) -> Poll<(Request, Done)> {
        if let Poll::Ready((request, outcome)) = self.promised.poll_next(cx) {
            return Poll::Ready((request, Done::Read(outcome)));
        }
        match self.in_flight.poll_next_unpin(cx) {
            Poll::Ready(Some(done)) => Poll::Ready(done),
            Poll::Ready(None) | Poll::Pending => Poll::Pending,
        }
    }

    /// How many requests wait for their answer.
    fn waiting(&self) -> usize {
        self.in_flight.len() + self.promised.len()
    }

    fn poll_send(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let pipe = &self.pipe;
        self.output.poll_send_with(&mut self.stream, cx, |stream, cx, length| match (pipe, stream.socket()) {
            (Some(pipe), Some(socket)) => pipe.poll_send(socket, cx, length),
            _ => Poll::Ready(Err(io::ErrorKind::Unsupported.into())),
        })
    }

    fn has_room(&self, cx: &Context<'_>) -> bool {
        if self.output.has_elsewhere()
            || self.output.len() >= OUTPUT_HIGH_WATER
            || self.waiting() >= MAX_REQUESTS_IN_FLIGHT
            || self.bytes_in_flight >= MAX_BYTES_IN_FLIGHT
        {
            return false;
        }
        match self.held() {
            (0, 0) => true,
            (requests, bytes) => self.share.has_room(requests, bytes, cx),
        }
    }

    /// What counts against the server's budget: requests in flight, and bytes held for them and for their replies.
    fn held(&self) -> (usize, usize) {
        let bytes = self.bytes_in_flight + self.output.len() + self.input.len();
        match self.waiting() {
            0 if bytes <= UNCOUNTED_BYTES => (0, 0),
            waiting => (waiting, bytes),
        }
    }

    /// Answers or begins all requests that have arrived. `true` when it stopped for want of room.
    fn take_requests(&mut self, cx: &Context<'_>) -> Result<bool, ServerError> {
        loop {
            if self.pieced.is_some() && !self.give_pieces() {
                return Ok(false);
            }
            if self.input.is_empty() {
                return Ok(false);
            }
            if !self.has_room(cx) {
                return Ok(true);
            }
            let Some(incoming) = self.requests.next(&mut self.input)? else {
                if self.begin_pieces() {
                    continue;
                }
                return Ok(false);
            };
            if incoming.request.command == Command::DISC {
                self.left = Some(Ended::Disconnected);
                self.phase = Phase::Finishing;
                return Ok(false);
            }
            self.taken += 1;
            self.long_before = false;
            self.take(incoming);
        }
    }

    fn take(&mut self, incoming: Incoming) {
        let Incoming { mut request, payload } = incoming;
        let mut wanted = None;
        if request.command == Command::BLOCK_STATUS && self.rules.framing == Framing::Extended {
            match contexts_wanted(&mut request, &payload) {
                Ok(contexts) => wanted = contexts,
                Err(error) => return self.answer(&request, Err(error)),
            }
        }
        let refused = match self.phase {
            Phase::Serving => check(&request, &self.rules).err(),
            _ => Some(Errno::ESHUTDOWN),
        };
        if let Some(error) = refused {
            return self.answer(&request, Err(error));
        }
        let fua = request.flags.contains(CommandFlags::FUA);
        let (offset, length) = (request.offset, request.length);
        let answer = match request.command {
            Command::READ => return self.read(&request),
            Command::FLUSH => self.export.flush(),
            Command::BLOCK_STATUS => return self.block_status(&request, wanted),
            // Nothing to do, but with FUA there is still nothing to wait for.
            _ if length == 0 => Answer::Now(Ok(())),
            Command::WRITE => self.export.write(offset, payload, fua),
            Command::TRIM => self.export.trim(offset, length, fua),
            Command::WRITE_ZEROES => {
                let no_hole = request.flags.contains(CommandFlags::NO_HOLE);
                let fast = request.flags.contains(CommandFlags::FAST_ZERO);
                self.export.write_zeroes(offset, length, ZeroMode { no_hole, fast }, fua)
            }
            Command::CACHE => self.export.cache(offset, length),
            // check() lets no other command through.
            _ => Answer::Now(Err(Errno::EINVAL)),
        };
        self.answered(request, answer);
    }

    fn answered(&mut self, request: Request, answer: Answer<()>) {
        match answer {
            Answer::Now(result) => self.answer(&request, result),
            Answer::Later(work) => self.begin(request, Work::Plain(work)),
        }
    }

    fn begin(&mut self, request: Request, work: Work) {
        self.bytes_in_flight += cost(&request);
        self.in_flight.push(InFlight { request, work });
    }

    /// Answers a large READ with pages, where that is possible.
    fn splice(&mut self, request: &Request) -> bool {
        let is_busy = self.output.has_elsewhere();
        if is_busy || request.length < u64::from(SPLICE_READ_MIN) || self.stream.socket().is_none() {
            return false;
        }
        if self.pipe.is_none() {
            self.pipe = Pipe::new().ok();
        }
        let length = request.length as usize;
        let Some(pipe) = self.pipe.as_ref().filter(|pipe| pipe.holds(request.offset, length)) else { return false };
        match self.export.splice(request.offset, length, pipe.end()) {
            Spliced::Whole => {
                self.output.extend(&reply::read_done(self.rules.framing, request));
                self.output.push_elsewhere(length);
                true
            }
            Spliced::No => false,
            Spliced::Spoilt => {
                self.pipe = None;
                false
            }
        }
    }

    fn read(&mut self, request: &Request) {
        if self.splice(request) {
            return;
        }
        let framing = self.rules.framing;
        let head = reply::read_head_length(framing, request.length);
        // check() lets no longer one through than a payload may be.
        let total = head + request.length as usize;
        let space = self.output.reserve(total);
        let answer = match request.length {
            0 => ReadAnswer::Now(Ok(())),
            _ => self.export.read(request.offset, &mut space[head..]),
        };
        match answer {
            ReadAnswer::Now(Err(error)) => self.answer(request, Err(error)),
            ReadAnswer::Later(work) => self.begin(*request, Work::Read(work)),
            ReadAnswer::Promised => {
                self.bytes_in_flight += cost(request);
                self.promised.ask(*request);
            }
            ReadAnswer::Sparse(holes) if framing.has_chunks() && !request.flags.contains(CommandFlags::DF) => {
                self.read_sparse(request, head, &holes);
            }
            ReadAnswer::Now(Ok(())) | ReadAnswer::Sparse(_) => {
                space[..head].copy_from_slice(&reply::read_done(framing, request));
                self.output.commit(total);
            }
        }
    }

    /// Answers a READ in pieces; its data stands in the output buffer behind `head` bytes, not queued.
    fn read_sparse(&mut self, request: &Request, head: usize, holes: &[Range<usize>]) {
        let framing = self.rules.framing;
        let length = request.length as usize;
        let data = match holes {
            [all] if all.len() == length => Bytes::new(),
            _ => Bytes::copy_from_slice(&self.output.reserve(head + length)[head..]),
        };
        let mut at = 0;
        let end = length..length;
        for hole in holes.iter().chain([&end]) {
            let (start, stop) = (hole.start.clamp(at, length), hole.end.clamp(at, length));
            if start > at {
                let offset = request.offset + at as u64;
                let piece = data.slice(at..start);
                self.output.extend(&reply::read_data(framing, request, offset, piece.len() as u32, start == length));
                self.output.push(piece);
            }
            if stop > start {
                let (offset, zeroes) = (request.offset + start as u64, (stop - start) as u32);
                self.output.extend(&reply::read_hole(framing, request, offset, zeroes, stop == length));
            }
            at = stop.max(start);
        }
    }

    /// `wanted` are the ids of the contexts that the client wants to hear of, if it said so.
    fn block_status(&mut self, request: &Request, wanted: Option<Vec<u32>>) {
        if let Some(wanted) = &wanted {
            let known = |id: &u32| self.contexts.iter().any(|context| context.id == *id);
            let twice = wanted.iter().enumerate().any(|(index, id)| wanted[..index].contains(id));
            if twice || wanted.is_empty() || !wanted.iter().all(known) {
                return self.answer(request, Err(Errno::EINVAL));
            }
        }
        let one = request.flags.contains(CommandFlags::REQ_ONE);
        let most = if one { 1 } else { MAX_STATUS_EXTENTS };
        let ask = |context: &MetaContext| {
            let extents = self.export.block_status(&context.name, request.offset, request.length, most);
            (context.id, extents)
        };
        let chosen = |context: &&MetaContext| wanted.as_ref().is_none_or(|wanted| wanted.contains(&context.id));
        let answers: Vec<_> = self.contexts.iter().filter(chosen).map(ask).collect();
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
            Done::Plain(result) => self.answer(request, result),
            Done::Read(Ok(LateRead::AtHand)) => self.read(request),
            Done::Read(Ok(LateRead::Bytes(data))) if data.len() as u64 == request.length => {
                self.output.extend(&reply::read_done(self.rules.framing, request));
                self.output.push(data);
            }
            Done::Read(Ok(LateRead::Bytes(data))) => {
                tracing::error!(
                    asked = request.length,
                    got = data.len(),
                    "an export answered a read of another length"
                );
                self.answer(request, Err(Errno::EIO));
            }
            Done::Read(Err(error)) => self.answer(request, Err(error)),
            Done::Status(status) => self.answer_status(request, status),
        }
    }

    fn answer_status(&mut self, request: &Request, status: Result<Status, Errno>) {
        let one = request.flags.contains(CommandFlags::REQ_ONE);
        let framing = self.rules.framing;
        let encoded = status.and_then(|status| reply::status(framing, request, one, &status, &mut self.status_buffer));
        match encoded {
            Ok(()) => self.output.extend(&self.status_buffer),
            Err(error) => self.answer(request, Err(error)),
        }
    }

    /// The answer to any request that has failed, or has no data in its answer.
    fn answer(&mut self, request: &Request, result: Result<(), Errno>) {
        self.output.extend(&reply::finished(self.rules.framing, request, result));
    }
}

/// Takes the payload of a BLOCK_STATUS, if it has one: the request gets the length of its range, and the ids of the
/// contexts that it is about are given back.
fn contexts_wanted(request: &mut Request, payload: &[u8]) -> Result<Option<Vec<u32>>, Errno> {
    if !request.flags.contains(CommandFlags::PAYLOAD_LEN) {
        return Ok(None);
    }
    let query = StatusQuery::decode(payload).map_err(|_| Errno::EINVAL)?;
    request.length = query.length;
    Ok(Some(query.contexts))
}
