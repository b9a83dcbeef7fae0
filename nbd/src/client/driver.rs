//! The task of one client connection.
//!
//! Callers queue operations; the task takes what is queued, sends it at once, and hands each completion to its caller.
//! It owns the stream and the session, so that there is no lock, and a caller that goes away strands nothing: its
//! request stays in the session until the reply is here, and is then forgotten. A connection that is lost is made anew
//! where that was asked for (`reconnect`), with the same session.

use std::future::poll_fn;
use std::io;
use std::pin::Pin;
use std::sync::{Arc, OnceLock};
use std::task::{Context, Poll};

use bytes::{BufMut, BytesMut};
use tokio::io::AsyncWriteExt;
use tokio::sync::{mpsc, oneshot};
use tokio::time::{sleep, timeout};
use tokio_util::io::poll_read_buf;
use tokio_util::sync::CancellationToken;

use super::ClientError;
use super::reconnect::{Lost, Redial};
use super::sink::{Pages, Sink, receive_limit, take_from};
use crate::limits::{
    CLIENT_CLOSE_TIME, CLIENT_OUTPUT_HIGH_WATER, CLIENT_QUEUE, CLIENT_REQUESTS_IN_FLIGHT, KEPT_BUFFER, RECEIVE_SPACE,
};
use crate::output::Output;
use crate::proto::client::{Completion, Negotiated, Operation, ProtocolError, Refusal, Reply, Session};
use crate::transport::Transport;

/// How a request ended: answered, or the connection died before.
pub(super) type Ending = Result<Result<Reply, Refusal>, ClientError>;

/// What callers send to the task.
pub(super) enum Message {
    /// An operation, and who waits for it.
    Request(Operation, Waiter),
    /// End the connection when all requests are answered.
    Close,
}

impl Message {
    /// There is nobody who could take it.
    pub(super) fn fail(self, fate: &Fate) {
        if let Message::Request(_, waiter) = self {
            waiter.tell(Err(fate.error()));
        }
    }
}

/// Who waits for a request.
pub(super) enum Waiter {
    /// A task.
    Future(oneshot::Sender<Ending>),
    /// Nobody: this is called, on the connection's task.
    Call(Box<dyn FnOnce(Ending) + Send>),
    /// The same, and the content goes to the sink.
    Stream(Box<dyn Sink>, Box<dyn FnOnce(Ending) + Send>),
}

impl Waiter {
    fn tell(self, ending: Ending) {
        match self {
            // A caller that went away needs no reply.
            Waiter::Future(sender) => drop(sender.send(ending)),
            Waiter::Call(call) => call(ending),
            Waiter::Stream(sink, call) => {
                drop(sink);
                call(ending);
            }
        }
    }

    pub(super) fn sink(&mut self) -> Option<&mut (dyn Sink + 'static)> {
        match self {
            Waiter::Stream(sink, _) => Some(sink.as_mut()),
            Waiter::Future(_) | Waiter::Call(_) => None,
        }
    }

    fn is_gone(&self) -> bool {
        matches!(self, Waiter::Future(sender) if sender.is_closed())
    }
}

/// How the connection ended, for everybody who holds a handle.
#[derive(Default)]
pub(super) struct Fate {
    pub(super) closed: CancellationToken,
    /// It is to end, whatever the server does.
    pub(super) leaving: CancellationToken,
    reason: OnceLock<Arc<str>>,
}

impl Fate {
    /// The error of requests on a connection that has ended.
    pub(super) fn error(&self) -> ClientError {
        ClientError::Closed { reason: self.reason.get().cloned().unwrap_or_else(|| "it is ending".into()) }
    }

    fn end(&self, reason: &str) {
        self.reason.get_or_init(|| reason.into());
        self.closed.cancel();
    }
}

/// Ends the fate also when the task is dropped with its runtime, even before it has run.
struct EndOnDrop(Arc<Fate>);

impl Drop for EndOnDrop {
    fn drop(&mut self) {
        self.0.end("its task was dropped");
    }
}

/// Why the task stops.
#[derive(Debug, thiserror::Error)]
enum Stop {
    #[error("it was closed here")]
    Closed,
    #[error("it was closed here, and the server did not answer any more")]
    GivenUp,
    #[error("the server closed it")]
    ByServer,
    #[error("{0}")]
    Stream(#[from] io::Error),
    #[error("{0}")]
    Protocol(#[from] ProtocolError),
    #[error("the server is shutting down")]
    ShuttingDown,
    #[error("{0}")]
    Lost(#[from] Lost),
}

impl Stop {
    /// Whether another connection may do better.
    fn is_loss(&self) -> bool {
        matches!(self, Stop::ByServer | Stop::Stream(_) | Stop::ShuttingDown)
    }
}

/// Whether the connection is to end.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Closing {
    No,
    /// When every request has been answered.
    WhenAnswered,
    /// Every handle is gone, and with it everybody who could wait for a reply: when all requests have been sent.
    WhenSent,
}

pub(super) struct Driver<S> {
    /// First, so that the reason is there before the callers' channels close.
    fate: EndOnDrop,
    stream: S,
    session: Session<Waiter>,
    input: BytesMut,
    output: Output,
    pages: Pages,
    messages: mpsc::Receiver<Message>,
    batch: Vec<Message>,
    closing: Closing,
    redial: Option<Redial<S>>,
}

impl<S: Transport> Driver<S> {
    pub(super) fn new(
        stream: S,
        session: Session<Waiter>,
        messages: mpsc::Receiver<Message>,
        fate: Arc<Fate>,
        redial: Option<Redial<S>>,
    ) -> Driver<S> {
        Driver {
            fate: EndOnDrop(fate),
            stream,
            session,
            input: BytesMut::new(),
            output: Output::default(),
            pages: Pages::default(),
            messages,
            batch: Vec::new(),
            closing: Closing::No,
            redial,
        }
    }

    /// Works until the connection ends; then every request without an answer fails.
    pub(super) async fn run(mut self) {
        let leaving = self.fate.0.leaving.clone();
        // A server that hangs must not keep the connection, its descriptor and its requests for ever.
        let give_up = async {
            leaving.cancelled().await;
            sleep(CLIENT_CLOSE_TIME).await;
        };
        let stop = tokio::select! {
            stop = self.work() => stop,
            () = give_up => Stop::GivenUp,
        };
        if matches!(stop, Stop::Closed) {
            self.output.extend(&self.session.disconnect());
            // The server may be gone: it is left in any case.
            let leave = async {
                let _ = poll_fn(|cx| self.output.poll_send(&mut self.stream, cx)).await;
                let _ = self.stream.shutdown().await;
            };
            let _ = timeout(CLIENT_CLOSE_TIME, leave).await;
        }
        self.fate.0.end(&stop.to_string());
        self.messages.close();
        for waiting in self.session.fail_all() {
            waiting.tell(Err(self.fate.0.error()));
        }
        while let Some(message) = self.messages.recv().await {
            message.fail(&self.fate.0);
        }
    }

    /// Works over one connection after the other.
    async fn work(&mut self) -> Stop {
        loop {
            let stop = poll_fn(|cx| self.poll(cx)).await;
            let Some(redial) = self.redial.as_mut().filter(|_| stop.is_loss() && self.closing == Closing::No) else {
                return stop;
            };
            tracing::info!(reason = %stop, "the connection to an NBD server is lost, and made anew");
            let connected = tokio::select! {
                connected = redial.connect() => connected,
                () = self.fate.0.leaving.cancelled() => return stop,
            };
            match connected {
                Ok((stream, negotiated)) => self.restart(stream, &negotiated),
                Err(lost) => return lost.into(),
            }
        }
    }

    fn restart(&mut self, stream: S, negotiated: &Negotiated) {
        self.stream = stream;
        self.input.clear();
        self.output = Output::default();
        let Some(redial) = &self.redial else { return };
        for (head, payload) in self.session.restart(negotiated, &redial.first, Waiter::is_gone) {
            self.output.extend(&head);
            self.output.push(payload);
        }
    }

    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Stop> {
        match self.try_poll(cx) {
            Poll::Ready(Err(stop)) => Poll::Ready(stop),
            Poll::Ready(Ok(())) => Poll::Ready(Stop::Closed),
            Poll::Pending => Poll::Pending,
        }
    }

    fn try_poll(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Stop>> {
        loop {
            let queued = self.take_messages(cx);
            let sent = self.output.poll_send(&mut self.stream, cx).map_err(Stop::from)?;
            let answered = self.closing == Closing::WhenSent || self.session.in_flight() == 0;
            if self.closing != Closing::No && answered && self.output.is_empty() {
                return Poll::Ready(Ok(()));
            }
            let received = self.receive(cx)?;
            if self.session.all_parked() {
                return Poll::Ready(Err(Stop::ShuttingDown));
            }
            // Once more if something happened that may have made room or work; else all wakers are set.
            if received || (queued && sent.is_ready()) {
                continue;
            }
            return Poll::Pending;
        }
    }

    /// Takes operations from the queue while there is room. `true` when some were taken.
    fn take_messages(&mut self, cx: &mut Context<'_>) -> bool {
        let mut taken = false;
        while self.closing == Closing::No && self.output.len() < CLIENT_OUTPUT_HIGH_WATER {
            let room = CLIENT_REQUESTS_IN_FLIGHT.saturating_sub(self.session.in_flight()).min(CLIENT_QUEUE);
            if room == 0 {
                break;
            }
            match self.messages.poll_recv_many(cx, &mut self.batch, room) {
                Poll::Pending => break,
                Poll::Ready(0) => {
                    self.closing = Closing::WhenSent;
                    self.fate.0.leaving.cancel();
                }
                Poll::Ready(_) => {}
            }
            taken = true;
            for message in self.batch.drain(..) {
                match message {
                    Message::Close => self.closing = Closing::WhenAnswered,
                    Message::Request(_, waiting) if waiting.is_gone() => {}
                    Message::Request(operation, waiting) => {
                        let (head, payload) = self.session.submit(&operation, waiting);
                        self.output.extend(&head);
                        self.output.push(payload);
                    }
                }
            }
        }
        taken
    }

    /// Receives once and completes what has come. `true` when something was received.
    fn receive(&mut self, cx: &mut Context<'_>) -> Result<bool, Stop> {
        if self.input.is_empty() && self.session.has_streams() {
            match self.pages.poll_move(&self.stream, &mut self.session, cx)? {
                Poll::Pending => return Ok(false),
                Poll::Ready(Some(0)) => return Err(Stop::ByServer),
                Poll::Ready(Some(_)) => return self.take_in().map(|()| true),
                Poll::Ready(None) => {}
            }
        }
        if self.input.is_empty() && self.input.capacity() > KEPT_BUFFER {
            self.input = BytesMut::new();
        }
        let pages = self.pages.possible(&self.stream);
        let limit = receive_limit(&mut self.session, self.input.len(), pages);
        let missing = self.session.wanted().saturating_sub(self.input.len()).min(limit);
        let space = limit.clamp(missing, RECEIVE_SPACE.max(missing));
        if self.input.capacity() - self.input.len() < missing.max(space / 4) {
            self.input.reserve(missing.max(space));
        }
        match poll_read_buf(Pin::new(&mut self.stream), cx, &mut (&mut self.input).limit(limit))? {
            Poll::Pending => return Ok(false),
            Poll::Ready(0) => return Err(Stop::ByServer),
            Poll::Ready(_) => {}
        }
        self.take_in().map(|()| true)
    }

    /// Completes what has come.
    fn take_in(&mut self) -> Result<(), Stop> {
        loop {
            while let Some(Completion { token, result }) = self.session.receive(&mut self.input)? {
                token.tell(Ok(result));
            }
            if self.session.payload().is_none() || take_from(&mut self.session, &mut self.input) {
                return Ok(());
            }
        }
    }
}
